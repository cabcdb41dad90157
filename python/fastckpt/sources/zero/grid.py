"""ZeRO checkpoints of one model-parallel rank each, joined: DeepSpeed's tensor and pipeline parallel grids.

Model-parallel rank p * tp + t is tensor-parallel rank t of pipeline stage p. Tensors are cut over the ranks
of a stage as `cuts` says. A pipeline's 16-bit weights lie in a file a layer (`Layers`), its masters with
the stage that trains them; a tied module stands in several stages, once in the result.

Law: what two ranks hold of one tensor must agree where it is compared, or nothing is read.
Source: deepspeed/runtime/pipe/{topology,module}.py (ranks; layer files; tied_modules) of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ...checkpoint import JSON, Checkpoint, Entry, Replica, moved
from ...dtypes import DType
from ...errors import SourceError
from ...extents import Extents
from ...views import View, cat, zeros
from ..assembly import assemble
from ..options import Options
from ..plain_values import mapping
from ..ranks import check_one_save
from ..samples import Agreement, samples
from ..torchtensors import places
from .cuts import Cut, Cuts, Piece
from .files import Grid
from .opening import Opening
from .pipeline import TIED, layers
from .state import Rank


def joined(path: str, grid: Grid, ranks: Sequence[Rank], options: Options, tp: int) -> Checkpoint:
    """The checkpoint of the whole model, of `tp` tensor-parallel ranks. `ranks` were read with their names as
    they stand, those of a pipeline for their masters.

    Raises SourceError for ranks that are missing or of another save, parts that do not fit, and cuts of
    which nothing is said."""
    files, state = grid.ranks[0], ranks[0].state
    where, pp = files.folder, len(ranks) // tp
    _check_one_save(ranks, where)
    cuts = Cuts(state.universal, tp, where)
    opening = Opening(files, options, extents=[e for r in ranks for e in r.checkpoint.extents])
    layer_files = sorted(grid.layers)
    opened = dict(zip(layer_files, opening.layers([grid.layers[k] for k in layer_files]), strict=True))
    extents = Extents(opening.extents)
    bases = accumulate((len(r.checkpoint.extents) for r in ranks), initial=0)
    held: list[dict[str, Entry]] = [
        {n: moved(e, extents, base) for n, e in r.checkpoint.entries.items()}
        for r, base in zip(ranks, bases, strict=False)
    ]
    stages = [held[p * tp : (p + 1) * tp] for p in range(pp)]
    same = Agreement(where, options.replicas)
    notes: list[str] = []
    unread = [note for r in ranks for note in r.checkpoint.unread]
    if state.pipeline:
        copies = []
        for t in range(tp):
            masters = {n: e for column in reversed(stages) for n, e in column[t].items()}
            files_of_t = {layer: file for (layer, model), file in opened.items() if model == t}
            copies.append(layers(files_of_t, [r.state for r in ranks[t::tp]], masters, extents, same, where))
        notes = [
            f"layer {layer} is taken for frozen, as no stage trains it: if none was, its file is left of an "
            "earlier save of more layers"
            for layer in copies[0].idle
        ]
        unread += [f"{name}: no tensor" for c in copies for name in c.other]
        stages.insert(0, [c.beside(options.exclude_frozen) for c in copies])
        if options.weights == "module" and (lost := [n for n in masters if n not in copies[-1].copies]):
            raise SourceError(f"{where}: {lost[0]} is in no file of a layer, only its master is read")
        if options.weights == "module" or state.shapes is None:
            stages = [stages[0], [c.copies for c in copies]]
    entries: dict[str, Entry] = {}
    for columns in stages:
        for name, entry in _stage(columns, cuts, same, where).items():
            earlier = entries.setdefault(name, entry)
            if earlier is not entry and not cuts.over_stages(name):
                if not name.startswith(TIED):
                    raise SourceError(f"{where}: {name} is in two stages, and is no tied module")
                same.add(f"{name} in two stages of the pipeline", earlier, entry)
    cuts.check_used(n for n, e in entries.items() if isinstance(e, _Joined))
    same.check()
    _check_apart(entries, where)
    _check_gated(entries, where)
    return _assembled(
        path, grid, ranks, options, opening, extents, entries, (pp, tp), notes, unread, same.replicas
    )


def _check_one_save(ranks: Sequence[Rank], where: str) -> None:
    first = ranks[0]
    for mp, rank in enumerate(ranks):
        a, b = rank.state, first.state
        check_one_save(f"{where}: model-parallel rank {mp}", (
            ("global_steps", a.global_steps, b.global_steps),
            ("optimizer step", rank.step, first.step),
            ("ds_version", a.version, b.version),
            ("dp_world_size", a.dp_world, b.dp_world),
            ("mp_world_size", a.mp_world, b.mp_world),
            ("checkpoint_parallel_dimensions", a.degrees, b.degrees),
            ("universal_checkpoint_info", a.universal, b.universal),
            ("`module`", a.pipeline, b.pipeline),
            ("ZeRO stage", rank.checkpoint.facts.get("stage"), first.checkpoint.facts.get("stage")),
        ))  # fmt: skip
        if a.experts:
            raise SourceError(f"{where}: DeepSpeed's MoE layers in a grid are not supported yet")


# ---- the ranks of a stage ----


def _stage(
    columns: Sequence[Mapping[str, Entry]], cuts: Cuts, same: Agreement, where: str
) -> dict[str, Entry]:
    """The whole tensors of a stage; `columns`: what each of its tensor-parallel ranks holds."""
    first = columns[0]
    for rank, own in enumerate(columns):
        if odd := sorted({*own} ^ {*first}):
            raise SourceError(f"{where}: only one of tensor-parallel ranks 0 and {rank} holds {odd[0]}")
    out: dict[str, Entry] = {}
    for name, entry in first.items():
        parts = [own[name] for own in columns]
        shapes = [part.shape for part in parts]
        # A rank that has no head holds an empty part, which no optimizer owns.
        full = [part for part in parts if 0 not in part.shape] or parts
        for what, got in (("dtype", {p.dtype.name for p in full}), ("kind", {p.kind for p in full})):
            if len(got) > 1:
                raise SourceError(f"{where}: {name}: tensor-parallel ranks hold it as {what}s {sorted(got)}")
        if full[0].kind == "buffer":
            if len({*shapes}) > 1:
                raise SourceError(f"{where}: buffer {name} has {shapes}: nothing says how it is cut")
            for part in parts[1:]:
                same.add(f"buffer {name} on two tensor-parallel ranks", entry, part)
            out[name] = entry
            continue
        cut = cuts.of(name, shapes)
        for a, b in cut.same:
            what = f"{name}, which tensor-parallel ranks {a.rank} and {b.rank} both hold"
            same.add(what, _Piece(parts[a.rank], cut.axis, a), _Piece(parts[b.rank], cut.axis, b))
        out[name] = _Joined(tuple(parts), cut, full[0].dtype, full[0].kind)
    return out


def _check_apart(entries: Mapping[str, Entry], where: str) -> None:
    """Raises SourceError for a parameter of which nothing is said, so that it is cut by default, and of which
    every rank has the same: it would rather stand whole on each."""
    default = {n: e.parts for n, e in entries.items() if isinstance(e, _Joined) and not e.cut.told}
    seen = samples(part.build for parts in default.values() for part in parts)
    for name, parts in default.items():
        held = [next(seen) for _ in parts]
        if len({*held}) == 1 and len({*held[0]}) > 1 and len({p.shape for p in parts}) == 1:
            raise SourceError(
                f"{where}: {name} is the same on all {len(parts)} tensor-parallel ranks, and "
                "universal_checkpoint_info does not say that it is replicated: in doubt"
            )


def _check_gated(entries: Mapping[str, Entry], where: str) -> None:
    """Raises SourceError for Megatron's gate and up in one matrix, of which every rank's part has some of
    both: older versions of Megatron-DeepSpeed do not say so."""
    for name, entry in entries.items():
        down = entries.get(name.replace("dense_h_to_4h", "dense_4h_to_h"))
        if down is None or down is entry or not isinstance(entry, _Joined) or len(entry.parts) == 1:
            continue
        if not entry.cut.told and entry.shape[0] == 2 * math.prod(down.shape[1:]):
            raise SourceError(
                f"{where}: {name} is gate and up in one, and universal_checkpoint_info does not say so"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A piece of an entry."""

    of: Entry
    axis: int
    piece: Piece

    def build(self) -> View:
        view = self.of.build()
        return view.narrow(self.axis, self.piece.start, self.piece.length) if view.shape else view


@dataclass(frozen=True, slots=True, eq=False)
class _Joined:
    """The entry of a whole tensor."""

    parts: tuple[Entry, ...]
    cut: Cut
    dtype: DType
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cut.shape

    def build(self) -> View:
        if 0 in self.shape:
            return zeros(self.shape, self.dtype)
        pieces = [_Piece(self.parts[p.rank], self.cut.axis, p).build() for p in self.cut.pieces]
        return cat(pieces, self.cut.axis) if len(pieces) > 1 else pieces[0]


def _assembled(
    path: str,
    grid: Grid,
    ranks: Sequence[Rank],
    options: Options,
    opening: Opening,
    extents: Extents,
    entries: Mapping[str, Entry],
    degrees: tuple[int, int],
    notes: Sequence[str],
    unread: Sequence[str],
    replicas: tuple[Replica, ...],
) -> Checkpoint:
    files, first = grid.ranks[0], ranks[0].checkpoint
    of_all = [r.checkpoint for r in ranks]
    aliases: dict[str, str] = {}
    for checkpoint in of_all:
        for name, holder in checkpoint.aliases.items():
            if aliases.setdefault(name, holder) != holder:
                raise SourceError(f"{files.folder}: {name} is tied to {aliases[name]} and to {holder}")
    unpadded = [
        f"rows of {n} from {e.shape[0]} on: padding of the vocabulary"
        for n, e in entries.items()
        if isinstance(e, _Joined) and e.cut.padded
    ]
    world = first.facts.get("world")  # the data-parallel ranks of each
    facts: dict[str, JSON] = {
        **{key: value for key, value in first.facts.items() if key not in ("groups", "world")},
        "grid": {
            **({"data parallel": world} if world else {}),
            "tensor parallel": degrees[1], "pipeline stages": degrees[0],
        },
    }  # fmt: skip
    return assemble(
        path, "zero", entries, extents, options,
        aliases=aliases, files=[*(f for c in of_all for f in c.files), *(f.file for f in opening.opened)],
        search=[os.path.abspath(path), os.path.abspath(files.root)],
        saved=first.saved, notes=[*first.notes, *notes], facts=facts,
        unread=[*dict.fromkeys(unread), *unpadded],
        inert=[n for c in of_all for n in c.inert] + [n for f in opening.opened for n in f.inert],
        layout=[
            *(c.structure.encode() for c in of_all),
            repr([(n, e.cut) for n, e in entries.items() if isinstance(e, _Joined)]).encode(),
            *(places(mapping(f.root, f.file.path).values()) for f in opening.opened),
        ],
        headers=[*(c.headers for c in of_all), *(f.digest for f in opening.opened)], replicas=replicas,
    )  # fmt: skip
