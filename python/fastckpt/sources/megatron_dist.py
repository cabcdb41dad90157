"""The tensors of megatron-core's torch_dist checkpoints: a DCP save of whole tensors.

Keys are a GPTModel's names, with the layers of a homogeneous model as a first axis in place of their number,
and a layer's experts as the next one. Gate and up of a gated block are the halves of one tensor, or `_w` and
`_v`. Law: every name that comes out is one that a model of one process, made of megatron's own modules, has.
Source: megatron-core 0.16.1 and 0.19.2, core/dist_checkpointing/{serialization,mapping,optimizer}.py and
strategies/torch.py, core/transformer/{transformer_block,mlp}.py, core/transformer/moe/experts.py,
core/models/gpt/gpt_layer_specs.py, core/optimizer/.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping

from ..checkpoint import JSON, Checkpoint, Saved, Single
from ..errors import SourceError, naming
from ..extents import Extents, File
from ..paths import is_file
from ..plainjson import read_json
from ..stored import boxes
from ..views import View, cat
from . import torchfile
from .assembly import assemble
from .dcp import NAME, later, located, nbytes
from .dcp_metadata import Metadata, metadata
from .megatron_args import args_of
from .options import Options
from .samples import COMPARED, OF_ONE, difference
from .steps import HUB
from .torchfile import Reader

RECORD = "metadata.json"
"""Written last."""
COMMON = "common.pt"
"""What is no tensor; 0.19 saves it as a value beside the tensors, under the key below."""
_COMMON_STATE = "common_state/shard_0_1"

_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_param|param)\.(.+)")
_NOT_THE_MODEL = re.compile(r"(?:chained_\d+\.)?optimizer\.|rng_state|rerun_state")
_PREFIXES = ("module.", "model.")
"""Of NeMo 2 and NeMo 1."""
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(linear_fc[12]\.(?:weight|bias).*)")
_HALF = re.compile(r"(.+\.linear_fc1\.(?:weight|bias))_([wv])")

_NORMS = tuple(
    (re.compile(rf"{module}\.layer_norm_(weight|bias)"), rf"{norm}.\1")
    for module, norm in (
        (r"self_attention\.linear_(?:qkv|q_down_proj|kv_down_proj|qkv_down_proj)", "input_layernorm"),
        (r"self_attention\.linear_q_up_proj", "self_attention.q_layernorm"),
        (r"self_attention\.linear_kv_up_proj", "self_attention.kv_layernorm"),
        (r"mlp\.linear_fc1", "pre_mlp_layernorm"),
    )
)
"""Norms under the name of the matrix that follows, as Transformer Engine's modules hold them and as
megatron's own are saved, -> the names they have in megatron's own modules."""


def read(path: str, root: str, options: Options, format: str) -> Checkpoint:
    """The model in the torch_dist save at `root`. Raises SourceError."""
    where = os.path.join(root, NAME)
    for name in (RECORD, NAME):
        if not is_file(os.path.join(root, name)):
            raise SourceError(f"{root}: a Megatron checkpoint without {name}: not finished, or a part of one")
    backend = read_json(os.path.join(root, RECORD)).get("sharded_backend")
    if backend != "torch_dist":
        raise SourceError(f"{root}: its sharded_backend is {backend!r}; wanted 'torch_dist'")
    with naming(where):
        found = metadata(where, nbytes(root))
        step, args = _common(root, found, options)
        keys, copies, notes, unread = _chosen(found, options)
    wanted = [*keys.values(), *copies.values()]
    extents, rows, digests, files = located(found, wanted, (root, *options.also), options.check_crc)
    table = Extents(extents)

    def views(keys: Mapping[str, str]) -> dict[str, View]:
        tensors = {name: found.tensors[key] for name, key in keys.items()}
        return {name: boxes(table, t.dtype, t.shape, rows[t.key]) for name, t in tensors.items()}

    narrow, stacks = views(copies), views(keys)
    stacks |= {name: _whole(stacks[name], copy.shape) for name, copy in narrow.items()}
    with naming(where):
        _check_masters(narrow, stacks)
        entries = {name: Single.of(view) for name, view in _named(stacks).items()}
    search = [os.path.join(at, name) for at in (root, os.path.dirname(root)) for name in ("", HUB)]
    return assemble(
        path, format, entries, table, options, files=files, search=search,
        saved=Saved(step=step, args=args), notes=[*notes, *later(where, files)], facts={"ranks": 1},
        unread=unread, layout=[row.tobytes() for row in rows.values()],
        headers=[found.digest, *digests],
    )  # fmt: skip


def _common(root: str, found: Metadata, options: Options) -> tuple[int | None, dict[str, JSON]]:
    """(iteration, args) of what is no tensor."""
    state: object = {}
    if is_file(path := os.path.join(root, COMMON)):
        state = torchfile.load(path, wanted=lambda root: ()).root
    elif (place := found.others.get(_COMMON_STATE)) is not None:
        file = File.at(os.path.join(root, place.file))
        with Reader(file) as reader:
            held = torchfile.embedded(
                reader, place.offset, place.nbytes, check_crc=options.check_crc, known=torchfile.Known()
            ).root
        state = held[0] if isinstance(held, list) and len(held) == 1 else held
    args = args_of(state)
    step = state.get("iteration") if isinstance(state, dict) else None
    return step if isinstance(step, int) else None, args


def _chosen(found: Metadata, options: Options) -> tuple[dict[str, str], dict[str, str], list[str], list[str]]:
    """(name -> key of its tensor, name -> key of its 16-bit copy, notes, what is not read): a master where
    there is one and it is wanted.

    Masters have their tensor's name where the optimizer is saved in the model's form (`param` in the
    distributed optimizer's, `fp32_param` in others'), and none where it is saved as buckets (dp_reshardable,
    dp_zero_gather_scatter)."""
    model = [key for key in found.tensors if not _NOT_THE_MODEL.match(key)]
    prefix = next((p for p in _PREFIXES if model and all(key.startswith(p) for key in model)), "")
    keys = {key.removeprefix(prefix): key for key in model}
    left = [name for name in keys if name.startswith("mtp.")]
    unread = [f"{name}: multi-token prediction" for name in left]
    keys = {name: key for name, key in keys.items() if not name.startswith("mtp.")}
    if not keys:
        raise SourceError(f"no tensors of a model; keys: {', '.join([*found.paths][:8]) or 'none'}")
    masters = {m[1].removeprefix(prefix): key for key in found.tensors if (m := _MASTER.fullmatch(key))}
    rest = len(found.paths) - len(keys) - len(left)
    unread += [f"{rest} values beside the model's tensors (optimizer, extra states and the like)"]
    narrow = [name for name, key in keys.items() if found.tensors[key].dtype.itemsize == 2]
    if options.weights == "module":
        return keys, {}, [], unread
    notes, copies = [], {}
    if bare := [name for name in narrow if name not in masters]:
        why = "its optimizer's copies have no names" if len(bare) == len(narrow) else f"such as {bare[0]}"
        notes = [f"no fp32 copy of {len(bare)} tensors, which are taken in 16 bits: {why}"]
    for name in [name for name in keys if name in masters]:  # in one order in every process
        own, master = found.tensors[keys[name]], found.tensors[masters[name]]
        fits = own.shape == master.shape or _in_parts(master.shape, own.shape)
        if not fits or not COMPARED.keys() >= {own.dtype.name, master.dtype.name}:
            raise SourceError(
                f"{master.key} is {master.dtype}{[*master.shape]}, its tensor {own.dtype}{[*own.shape]}; "
                "weights='module' (--weights module) takes the latter"
            )
        copies[name], keys[name] = keys[name], masters[name]
    return keys, copies, notes, unread


def _in_parts(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` is stored as the distributed optimizer did up to megatron-core 0.15
    (fully_sharded_model_space): [parts of each axis.., elements of a part]."""
    parts = stored[:-1]
    fits = len(parts) == len(shape) and all(p and n % p == 0 for n, p in zip(shape, parts, strict=True))
    return fits and math.prod(stored) == math.prod(shape)


def _whole(stored: View, shape: tuple[int, ...]) -> View:
    """A tensor that may be stored in parts."""
    if stored.shape == shape:
        return stored
    parts, ndim = stored.shape[:-1], len(shape)
    within = [n // p for n, p in zip(shape, parts, strict=True)]
    pairs = [axis for i in range(ndim) for axis in (i, ndim + i)]
    return stored.reshape((*parts, *within)).permute(pairs).reshape(shape)


def _check_masters(copies: Mapping[str, View], masters: Mapping[str, View]) -> None:
    """Raises SourceError for masters that are not what their copies were rounded from: an optimizer may keep
    only what rounding lost (store_param_remainders), and weights may be of 8 bits."""
    if found := difference(copies, masters, OF_ONE):
        raise SourceError(
            f"{found}: it was not rounded from it, as with use_precision_aware_optimizer or fp8 weights; "
            "weights='module' (--weights module) takes the copies"
        )


def _named(stacks: Mapping[str, View]) -> dict[str, View]:
    """Each tensor of a model of one process, by its name there."""
    out: dict[str, View] = {}
    halves: dict[str, dict[str, View]] = {}
    for key, stack in stacks.items():
        for name, tensor in _unstacked(key, stack):
            half = _HALF.fullmatch(name)
            into, at = (out, name) if half is None else (halves.setdefault(half[1], {}), half[2])
            if at in into:
                raise SourceError(f"two tensors would be {name}")
            into[at] = tensor
    for name, both in halves.items():
        if name in out or both.keys() != {"w", "v"}:
            raise SourceError(f"{name}: wanted it whole, or its halves _w and _v")
        w, v = both["w"], both["v"]
        if (w.shape[1:], w.dtype) != (v.shape[1:], v.dtype):
            raise SourceError(f"{name}: halves of {w.dtype}{[*w.shape]} and {v.dtype}{[*v.shape]}")
        out[name] = cat([w, v])
    return out


def _unstacked(key: str, stack: View) -> Iterator[tuple[str, View]]:
    """The layers and experts of a key, under names of their own."""
    layer = _LAYER.fullmatch(key)
    if layer is None:
        yield key, stack
        return
    inside = next((p.sub(to, layer[2]) for p, to in _NORMS if p.fullmatch(layer[2])), layer[2])
    expert = _EXPERT.fullmatch(inside)
    stacked = (layer[1] is None) + (expert is not None and expert[1] is None)
    if len(stack.shape) <= stacked:
        raise SourceError(f"{key}: {[*stack.shape]} has no axis of layers or experts")
    for i, one in enumerate(_apart(stack)) if layer[1] is None else [(int(layer[1]), stack)]:
        at = f"decoder.layers.{i}"
        if expert is None:
            yield f"{at}.{inside}", one
            continue
        for e, part in enumerate(_apart(one)) if expert[1] is None else [(int(expert[1]), one)]:
            yield f"{at}.mlp.experts.local_experts.{e}.{expert[2]}", part


def _apart(stack: View) -> Iterator[View]:
    """Element after element of the first axis."""
    return (stack.narrow(0, i, 1).reshape(stack.shape[1:]) for i in range(stack.shape[0]))
