"""Reads what Megatron-LM's training leaves: torch_dist checkpoints, and those of `--ckpt-format torch`.

Names are those of megatron-core's GPTModel: of a model of one process, or "rank/name" where ranks hold parts
of it. The pipeline is undone here: layers have the numbers they have in the whole model. Which elements of a
tensor of the hub each part is, `joining/megatron.py` says; where a run puts its saves, `steps`. Source:
Megatron-LM, megatron/training/checkpointing.py (get_checkpoint_name, generate_state_dict); megatron-core
0.16.1 and 0.19.2; verl 0.9.1, verl/utils/megatron_utils.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import JSON, Checkpoint, Entry, Saved
from ..errors import SourceError, naming
from ..extents import Extents
from ..paths import is_directory, is_file, listed
from ..placement import Placement
from . import megatron_dist, steps, torchfile
from .assembly import assemble
from .dcp import NAME, SUFFIX
from .megatron_args import FORMAT, KEPT, Args, args_of, size, writer_of
from .options import Options
from .plain_values import mapping
from .ranks import check_one_save
from .samples import Agreement
from .torchfile import Tensor, TorchFile
from .torchtensors import Opened, in_one_table, places, refuse_unread

_FILE = "model_optim_rng.pt"
_INSIDE = ((), ("weights",), ("model_weights",), ("dist_ckpt",), ("model", "dist_ckpt"))
_CHUNK = re.compile(r"model(\d*)")
_TURNED = re.compile(r".+\.mlp\.experts\.weight[12]")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXTRA = "_extra_state"
_EMBEDDING = "embedding.word_embeddings.weight"
_TIED = "output_layer.weight"


def matches(path: str) -> bool:
    """Whether `path` is a run's directory, one save of it, or one of NeMo's with its `weights`."""
    if not is_directory(path):
        return False
    return steps.is_run(path) or any(_is_dist(d) or _is_ranks(d) for d in _places(path))


def read(path: str, options: Options) -> Checkpoint:
    """The model in a save: the last one, or `tag`'s. Raises SourceError."""
    options.refuse_frozen(path)
    root = steps.chosen(path, options.tag)
    for directory in _places(root):
        if _is_dist(directory):
            return megatron_dist.read(path, directory, options, FORMAT)
        if _is_ranks(directory):
            options.refuse_also(path)
            return _ranks(path, directory, options)
    raise SourceError(
        f"{root}: no save of Megatron's that is read; wanted mp_rank_*/{_FILE} (--ckpt-format torch), or "
        f"{megatron_dist.RECORD} beside {NAME} (torch_dist; {NAME} alone is torch_dcp's or fsdp_dtensor's)"
    )


def _places(root: str) -> Iterator[str]:
    """Where a save may lie: here, in NeMo's `weights` or `model_weights`, or where verl puts its model's."""
    inside = [os.path.join(d, *names) for d in steps.models(root) for names in _INSIDE]
    return filter(is_directory, inside)


def _is_dist(directory: str) -> bool:
    inside = os.listdir(directory)
    saved = any(n == NAME or n.endswith(SUFFIX) for n in inside)
    return megatron_dist.COMMON in inside or (saved and megatron_dist.RECORD in inside)


def _is_ranks(directory: str) -> bool:
    return any(is_file(os.path.join(directory, n, _FILE)) for n in listed(directory, "mp_rank_*"))


# ---- a file a rank ----


@dataclass(frozen=True, slots=True)
class _Grid:
    """The ranks that hold different weights: `tp`, `ep` and `etp` (expert_tensor_parallel_size) of the `pp`
    stages, each of `chunks` virtual ones."""

    tp: int
    pp: int
    chunks: int
    ep: int
    etp: int

    @staticmethod
    def of(args: Args) -> _Grid:
        tp, pp = size(args, "tensor_model_parallel_size"), size(args, "pipeline_model_parallel_size")
        ep = size(args, "expert_model_parallel_size")
        etp = size(args, "expert_tensor_parallel_size", tp) if "num_experts" in args else tp
        if ep * etp % tp:
            raise SourceError(f"tp {tp} does not divide expert_tensor_parallel_size {etp} * ep {ep}")
        return _Grid(tp, pp, size(args, "virtual_pipeline_model_parallel_size"), ep, etp)

    @property
    def placement(self) -> Placement:
        """The grid of one stage, as layout megatron counts its ranks."""
        return Placement(tp=self.tp, dp=self.ep * self.etp // self.tp, ep=self.ep)

    def directories(self) -> Iterator[tuple[int, list[str]]]:
        """Each rank of a stage, and its directories in every stage."""
        for p in self.placement.ranks():
            expert = p.rank // self.etp % self.ep
            ends = f"_{expert:03d}" if self.ep > 1 else ""
            stages = [f"_{s:03d}" if self.pp > 1 else "" for s in range(self.pp)]
            yield p.rank, [f"mp_rank_{p.tp_rank:02d}{stage}{ends}" for stage in stages]


@dataclass(frozen=True, slots=True, eq=False)
class _Rank:
    """A rank's file: the tensors of each virtual stage, all else in words, args, iteration, and which process
    of how many wrote it."""

    file: TorchFile
    chunks: tuple[dict[str, Tensor], ...]
    rest: tuple[str, ...]
    args: dict[str, JSON]
    step: object
    writer: tuple[int, int] | None


def _ranks(path: str, root: str, options: Options) -> Checkpoint:
    """The parts of every rank. Raises SourceError where one is missing, left over, or of another save."""
    found = [n for n in listed(root, "mp_rank_*") if is_directory(os.path.join(root, n))]
    first = _load(root, found[0], options)
    grid = _Grid.of(first.args)
    told = f"its args say tp {grid.tp}, pp {grid.pp}, ep {grid.ep}, expert tp {grid.etp}"
    if (wanted := grid.placement.world * grid.pp) != len(found):
        raise SourceError(f"{root}: {len(found)} directories of ranks, wanted {wanted}: {told}")
    placed = list(grid.directories())
    names = [name for _, stages in placed for name in stages]
    if len({*names}) != len(names):
        raise SourceError(f"{root}: several ranks share the name of a directory: {told}")
    if odd := sorted({*names} ^ {*found}):
        what = "is missing" if odd[0] in names else "is no rank's"
        raise SourceError(f"{root}: {odd[0]} {what}: {told}")
    ranks = {n: first if n == found[0] else _load(root, n, options) for n in names}
    for name, rank in ranks.items():
        of_args = ((f"args: {key}", rank.args.get(key), first.args.get(key)) for key in KEPT)
        check_one_save(f"{root}: {name}", (*of_args, ("iteration", rank.step, first.step)))
        if len(rank.chunks) != grid.chunks:
            raise SourceError(f"{root}: {name} holds {len(rank.chunks)} virtual stages, wanted {grid.chunks}")
    _check_writers(root, grid, placed, ranks)
    unread = {note for rank in ranks.values() for note in rank.rest}
    extents, opened = in_one_table([rank.file for rank in ranks.values()])
    of = dict(zip(ranks, opened, strict=True))
    same = Agreement(root, options.replicas)
    if grid.pp > 1 and first.args.get("untie_embeddings_and_output_weights") is False:
        _drop_copies(placed, ranks, of, extents, same)
        unread.add(f"{_TIED}: the last stage's copy of the embedding")
    entries: dict[str, Entry] = {}
    for number, stages in placed:
        before = f"{number}/" if len(placed) > 1 else ""
        for name, stage, tensor in _in_one([(n, ranks[n]) for n in stages], grid.chunks):
            if before + name in entries:
                raise SourceError(f"{root}: two stages hold {name}, one of them {stage}")
            entries[before + name] = of[stage].entry(tensor, extents)
    step = first.step if isinstance(first.step, int) else None
    narrow = options.weights == "master" and any(e.dtype.itemsize == 2 for e in entries.values())
    facts: dict[str, JSON] = {
        "ranks": len(placed), "stages": grid.pp,
        "grid": {"tp": grid.tp, "dp": grid.placement.dp, "ep": grid.ep},
    }  # fmt: skip
    return assemble(
        path, FORMAT, entries, extents, options, files=[r.file.file for r in ranks.values()],
        search=[root, os.path.dirname(root)], facts=facts,
        saved=Saved(step=step, args=first.args, grid=grid.placement),
        notes=["the weights are the 16-bit copy: the optimizer's copies have no names"] if narrow else [],
        unread=sorted(unread),
        inert=[n for r in ranks.values() for n in r.file.inert],
        layout=[places(c.values()) for r in ranks.values() for c in r.chunks],
        headers=[r.file.digest for r in ranks.values()], replicas=same.replicas,
    )  # fmt: skip


def _check_writers(
    root: str, grid: _Grid, placed: Sequence[tuple[int, list[str]]], ranks: Mapping[str, _Rank]
) -> None:
    """Raises SourceError for a file under another rank's name.

    Tools that convert checkpoints write every file as one process. Source: megatron-core, parallel_state.py
    (RankGenerator): tp is the fastest axis."""
    if len({rank.writer for rank in ranks.values()}) == 1:
        return
    for number, stages in placed:
        for stage, name in enumerate(stages):
            if (told := ranks[name].writer) is None:
                continue
            process, world = told
            inside = process % max(world // grid.pp, 1)
            for what, got, want in (
                ("tp", process % grid.tp, number % grid.tp),
                ("pp", process // max(world // grid.pp, 1), stage),
                ("ep", inside // grid.etp % grid.ep, number // grid.etp % grid.ep),
            ):
                if got != want:
                    raise SourceError(
                        f"{root}: {name} was written by process {process} of {world}, {what} rank {got}; "
                        f"wanted {what} rank {want}"
                    )


def _drop_copies(
    placed: Sequence[tuple[int, list[str]]],
    ranks: Mapping[str, _Rank],
    of: Mapping[str, Opened],
    extents: Extents,
    same: Agreement,
) -> None:
    """Takes the last stages' copies of the embedding away, which are tied to it and go to `same`. Raises
    SourceError for one that has other values."""
    for _, stages in placed:
        first, last = ranks[stages[0]], ranks[stages[-1]]
        embedding, copy = first.chunks[0].get(_EMBEDDING), last.chunks[-1].pop(_TIED, None)
        if embedding is not None and copy is not None:
            what = f"{_EMBEDDING} of {stages[0]} and {_TIED} of {stages[-1]}, which are one as the args say"
            kept, other = of[stages[0]].entry(embedding, extents), of[stages[-1]].entry(copy, extents)
            same.add(what, kept, other, always=True)
    same.check()


def _in_one(stages: Sequence[tuple[str, _Rank]], chunks: int) -> Iterator[tuple[str, str, Tensor]]:
    """(name in the whole model, stage, tensor) of the stages of a pipeline: the first virtual stage of each,
    then the second of each, and so on."""
    shift = 0
    for chunk in range(chunks):
        for stage, rank in stages:
            count = 0
            for name, tensor in rank.chunks[chunk].items():
                if (layer := _LAYER.fullmatch(name)) is None:
                    yield name, stage, tensor
                    continue
                count = max(count, int(layer[1]) + 1)
                yield f"decoder.layers.{shift + int(layer[1])}.{layer[2]}", stage, tensor
            shift += count


def _load(root: str, name: str, options: Options) -> _Rank:
    where = os.path.join(root, name, _FILE)
    file = torchfile.load(
        where,
        check_crc=options.check_crc,
        wanted=lambda root: (t for chunk in _chunks(root)[0] for t in chunk.values()),
    )
    with naming(where):
        args = args_of(file.root)
        chunks, rest = _chunks(file.root)
    step = file.root.get("iteration") if isinstance(file.root, dict) else None
    return _Rank(file, tuple(chunks), tuple(rest), args, step, writer_of(file.root))


def _chunks(root: object) -> tuple[list[dict[str, Tensor]], list[str]]:
    """The model's tensors, a dict for each virtual stage, and what is not read."""
    state = root if isinstance(root, dict) else {}
    keys = ["model"] if "model" in state else []
    while f"model{len(keys)}" in state:
        keys.append(f"model{len(keys)}")
    if not keys:
        raise SourceError(f"no model; keys: {', '.join(map(str, state)) or 'none'}")
    rest = [f"{key}: beside the model" for key in state if key not in keys]
    return [dict(_tensors(key, state[key], rest)) for key in keys], rest


def _tensors(key: str, model: object, rest: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name, value in mapping(model, key).items():
        if not isinstance(name, str) or isinstance(value, dict):
            raise SourceError(f"{key}: {name!r}: the form of Megatron before its core, which is not read")
        if name.endswith(_EXTRA):
            rest.append(f"{_EXTRA}: Transformer Engine's own")
        elif name.startswith("mtp."):
            rest.append("mtp: multi-token prediction")
        elif _TURNED.fullmatch(name):
            raise SourceError(
                f"{name}: a rank's experts turned and in one, as GroupedMLP has them (megatron-core 0.16 and "
                "before, without Transformer Engine), are not read; --ckpt-format torch_dist saves them apart"
            )
        elif isinstance(value, Tensor):
            yield name, value
        else:
            refuse_unread(name, value)
            rest.append(f"{name}: no tensor")
