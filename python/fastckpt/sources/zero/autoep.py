"""AutoEP: DeepSpeed's layers in place of a model's mixtures of experts, as the metadata of a save has them.

Law: the experts of a layer are three stacks, MODULE.experts.w1 (gate) and w3 (up) of [experts, width, hidden]
and w2 (down) of [experts, hidden, width]. Of S sets of ranks the s-th holds the s-th of S equal parts; any
other placement is refused. Source: deepspeed/module_inject/auto_ep_layer.py, checkpoint/autoep_affine.py and
runtime/engine.py (`_save_moe_checkpoint`) of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ...checkpoint import Entry, Single
from ...errors import SourceError
from ...views import View, cat
from ..plain_values import listing, mapping

KEYS = ("ds_autoep_layers", "autoep_layers")
"""Where model states have it; the second is an older name."""

_STACKS = ("w1", "w2", "w3")
_CHILDREN = ("router", "experts", "shared_experts", "shared_experts_gate")
"""The modules of such a layer. One of any other name is the router under the model's own name for it."""

MOST = 1 << 22
"""The most experts of all layers together."""

_PIECE = re.compile(r"(.+)\.(\d{1,9})")


@dataclass(frozen=True, slots=True)
class AutoEp:
    """What one rank's model states say. `modules`: the layers; `stacks`: the names of their experts' tensors,
    and of how many experts each is; `sets`: the sets of ranks that share them; `set` and `place`: which of
    these this rank is of, and which rank of it; `by_expert`: the 16-bit weights lie in a file an expert."""

    modules: tuple[str, ...]
    stacks: Mapping[str, int]
    sets: int
    set: int
    place: int
    by_expert: bool

    @property
    def layers(self) -> tuple[object, ...]:
        """What it says on every rank alike."""
        return self.stacks, self.sets, self.by_expert

    def stack(self, name: str) -> str | None:
        """The stack that a name is of, or is a numbered piece of (`piece`)."""
        found = _PIECE.fullmatch(name)
        stack = found[1] if found else name
        return stack if stack in self.stacks else None

    def routers(self, names: Sequence[str]) -> dict[str, str]:
        """The second names of what routers hold, in order, and the first."""
        known, modules = {*names}, {*self.modules}
        lengths = {len(module) for module in modules}
        out = {}
        for name in names:
            for n in lengths:
                child, _, leaf = name[n + 1 :].partition(".")
                first = f"{name[:n]}.router.{leaf}"
                if (
                    name[:n] in modules
                    and name[n : n + 1] == "."
                    and child not in _CHILDREN
                    and first in known
                ):
                    out[name] = first
        return out

    def joined(self, entries: Mapping[str, Entry], *, lack: bool, where: str) -> dict[str, Entry]:
        """Entries with each stack in place of its pieces. Raises SourceError for one that is not whole, or
        with no piece unless stacks may `lack`."""
        pieces: dict[str, dict[int, Entry]] = {stack: {} for stack in self.stacks}
        out: dict[str, Entry] = {}
        for name, entry in entries.items():
            stack = self.stack(name)
            if stack is None:
                out[name] = entry
                continue
            number = int(name.removeprefix(f"{stack}."))
            pieces[stack][number] = out[stack] = entry  # in its place among the others
        for stack, held in pieces.items():
            if held or not lack:
                out[stack] = _joined([held[k] for k in sorted(held)], self.stacks[stack], f"{where}: {stack}")
        return out


def piece(stack: str, number: int) -> str:
    """The name that part of a stack has until it is joined: an expert's, or that of a set of ranks."""
    return f"{stack}.{number}"


def _joined(pieces: Sequence[Entry], experts: int, where: str) -> Entry:
    shapes = [p.shape if len(p.shape) == 3 else (1, *p.shape) for p in pieces]
    count = sum(shape[0] for shape in shapes)
    if count != experts or len({(shape[1:], p.dtype) for shape, p in zip(shapes, pieces, strict=True)}) != 1:
        raise SourceError(f"{where}: {len(pieces)} parts of {count} experts, wanted {experts} alike")
    whole, first = (experts, *shapes[0][1:]), pieces[0]
    return Single(whole, first.dtype, partial(_cat, pieces, shapes), first.kind)


def _cat(pieces: Sequence[Entry], shapes: Sequence[tuple[int, ...]]) -> View:
    return cat([p.build().reshape(shape) for p, shape in zip(pieces, shapes, strict=True)])


# ---- the metadata ----


def autoep(value: object, experts: Sequence[int], where: str) -> AutoEp | None:
    """What is under one of KEYS, None for nothing; `experts`: `num_experts`. Raises SourceError for what is
    missing or not known, and for experts that are placed in another way."""
    if not value:
        return None
    where = f"{where}: {KEYS[0]}"
    layers = [mapping(layer, where) for layer in listing(value, where)]
    counts = [_number(layer, "num_experts", where) for layer in layers]
    if counts != [*experts]:
        raise SourceError(
            f"{where} has {counts} experts a layer, num_experts is {[*experts]}: AutoEP beside other MoE "
            "layers is not read"
        )
    if sum(counts) > MOST:
        raise SourceError(f"{where}: {sum(counts)} experts; the limit is {MOST}")
    for layer in layers:
        _check_placed(layer, where)
    kind, version = (layers[0].get(key) for key in ("checkpoint_format", "checkpoint_format_version"))
    by_expert = kind in ("per_expert_files", None) and version is None  # 0.19.2 knew no other
    if not by_expert and (kind, version) != ("zero3_partitioned", 1):
        raise SourceError(f"{where}: format {kind!r:.40} of version {version!r:.40} is not known")
    names = ("ep_size", "ep_rank", "expert_data_parallel_rank")
    sets, own, place = (_number(layers[0], name, where, 0 if by_expert else None) for name in names)
    for layer in layers:
        if odd := [n for n in (*names, "checkpoint_format") if layer.get(n) != layers[0].get(n)]:
            raise SourceError(f"{where}: {odd[0]} is not the same for all layers")
    modules = tuple(str(layer.get("module_path")) for layer in layers)
    of = dict(zip(modules, counts, strict=True))
    stacks = {f"{module}.experts.{name}": count for module, count in of.items() for name in _STACKS}
    if len(of) < len(layers):
        raise SourceError(f"{where} has a layer twice: {', '.join(modules):.120}")
    return AutoEp(modules, stacks, sets, own, place, by_expert)


def _check_placed(layer: Mapping[object, object], where: str) -> None:
    """Raises SourceError unless a layer's sets of ranks hold equal parts of its experts in turn."""
    count, local, sets = (_number(layer, n, where) for n in ("num_experts", "num_local_experts", "ep_size"))
    path, prefix = layer.get("module_path"), layer.get("expert_key_prefix")
    if not path or prefix != f"{path}.experts":
        raise SourceError(f"{where}: {prefix!r:.80} are no experts of {path!r:.80}")
    if local * sets != count or not count:
        raise SourceError(f"{where}: {path}: {sets} sets of {local} experts, wanted {count}")
    told = layer.get("expert_placement")
    if told is None:  # DeepSpeed's older versions have this one alone
        return
    placement = mapping(told, f"{where}: {path}: expert_placement")
    ranks = [mapping(r, where) for r in listing(placement.get("ranks"), f"{where}: {path}: ranks")]
    uniform = len(ranks) == sets and all(
        (r.get("rank"), r.get("experts")) == (s, [*range(s * local, (s + 1) * local)])
        for s, r in enumerate(ranks)
    )
    if placement.get("version") != 1 or placement.get("num_experts") != count or not uniform:
        raise SourceError(f"{where}: {path}: expert_placement: wanted {sets} equal parts in order, version 1")


def _number(layer: Mapping[object, object], name: str, where: str, default: int | None = None) -> int:
    value = layer.get(name, default)
    if type(value) is not int or not 0 <= value < 1 << 20:
        raise SourceError(f"{where}: {name} is {value!r:.40}, wanted a whole number below 2^20")
    return value
