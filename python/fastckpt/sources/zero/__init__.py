"""Reads DeepSpeed ZeRO checkpoints of stages 0 to 3 and of BF16_Optimizer: headers and pickles only.

Law: a parameter is the fp32 (or bf16, fp16) master that the ranks' partitions hold, in the order and at the
offsets of `param_shapes`; what does not add up is a SourceError. Optimizer moments are never read.
The result's order is that of DeepSpeed's converter: buffers, frozen, trainable, tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ...checkpoint import JSON, Checkpoint
from ...errors import SourceError
from .. import torchfile
from ..options import Options
from ..ranks import check_one_save, check_ranks
from ..samples import check_copy, number, one_axis, read_all
from ..torchfile import Tensor, TorchFile
from ..torchtensors import Opened, by_storage, places
from .entries import Reading, columns, places_in, places_of
from .experts import Alignment, in_order, is_expert, sliced_in_sets, spread
from .files import Files, Grid, find, is_zero
from .opening import Opening, Whole, optim_tensors
from .order import check_order, comparable, sampled
from .partitions import Placed, chained, sliced
from .parts import Parts, trainable
from .state import ModelState, OptimState, Rank, model_state, optim_state
from .swapped import swapped_in

State = TypeVar("State", OptimState, ModelState)


def matches(path: str) -> bool:
    """Whether `path` is a ZeRO tag folder or a directory that holds tag folders."""
    return is_zero(path)


def read(path: str, options: Options) -> Checkpoint:
    """The ZeRO checkpoint in `path`: a directory with `latest`, a HF Trainer's checkpoint-N, or a tag folder.

    Raises SourceError for files that are missing, left over or of different runs, for sizes that do not fit,
    and for grids of which nothing says how they are joined."""
    grid = find(path, options.tag, options.also)
    first, *others = grid.ranks
    if not others and not grid.layers:
        rank = _rank(path, first, options)
        _degrees(grid, rank.state)  # refuses one rank of several
        return rank.checkpoint
    if first.universal is not None:
        raise SourceError(
            f"{first.folder}: a universal checkpoint of a grid is not read; open what it was made of"
        )
    asked = replace(options, rename=())
    if grid.layers and first.optim:  # a pipeline's copies lie in files of layers
        asked = replace(asked, weights="master")
    ranks = [_rank(path, first, asked)]
    _, tp = _degrees(grid, ranks[0].state)
    ranks += [_rank(path, files, asked) for files in others]
    from .grid import joined  # most checkpoints have one rank, and are opened without it

    return joined(path, grid, ranks, options, tp)


def _degrees(grid: Grid, state: ModelState) -> tuple[int, int]:
    return grid.degrees(state.mp_world, state.degrees, state.pipeline)


def _rank(path: str, files: Files, options: Options) -> Rank:
    """The checkpoint of one model-parallel rank."""
    opening = Opening(files, options)
    if files.universal is not None and options.weights == "master":
        return _from_universal(path, opening)
    first, step = _first(opening) if files.optim else (None, None)
    if files.model is not None:
        model, state = opening.model(files.model, first)
        _check_copies(opening, state)
        if state.shapes is None or (first is None and options.weights == "module"):
            return Rank(_from_module(path, opening, model, state), state, step)
        if first is not None and first.stage != 3:
            return Rank(_from_masters(path, opening, first, [model], [state]), state, step)
    elif first is not None and first.stage == 3:
        models, states = _models_of_ranks(opening, _world(first, files), told=first.step is not None)
        return Rank(_from_masters(path, opening, first, models, states), states[0], step)
    model_file = f"mp_rank_{files.mp:02}_model_states.pt"
    if first is None:
        what = files.what("*_optim_states.pt")
        raise SourceError(f"{files.folder}: no {what} which hold the masters" + (
            f"; weights='module' (--weights module) reads the 16-bit copy in {model_file}"
            if files.model
            else ""
        ))  # fmt: skip
    kind = model_file if first.stage != 3 else f"zero_pp_rank_0_{model_file}"
    raise SourceError(f"{files.folder}: optimizer files of stage {first.stage or 1}, but no {kind}")


# ---- whose files ----


def _first(opening: Opening) -> tuple[OptimState, int | None]:
    """The optimizer state of the lowest rank there is, which says stage and world, and its step."""
    path = opening.files.optim[min(opening.files.optim)]
    file = torchfile.load(path, wanted=optim_tensors, known=opening.trees)
    state = optim_state(file.root, path)
    return state, _step(state, file)


def _world(first: OptimState, files: Files, experts: bool = False) -> int:
    """The data-parallel ranks, over which every group is cut; groups of experts over some of them."""
    counts = set(first.counts)
    if 0 in counts or not counts or (len(counts) > 1 and not experts):
        raise SourceError(f"{files.folder}: groups are cut over {sorted(counts)} ranks, wanted one number")
    return max(counts)


def _models_of_ranks(
    opening: Opening, world: int, *, told: bool = True
) -> tuple[list[Opened], list[ModelState]]:
    """Stage 3: rank 0's model states, and the other ranks' where frozen parameters lie in all of them, or
    which experts are whose.

    `told`: the optimizer files say of which step they are. Where they do not (SGD), the model states of all
    ranks are looked at, which lie beside them."""
    files = opening.files
    paths = check_ranks(files.model_of, world, files.what("model states"), files.folder)
    model, state = opening.model(paths[0])
    needed = bool(state.frozen_shapes) and not opening.options.exclude_frozen
    needed |= state.autoep is not None
    if told and not needed:
        return [model], [state]
    opened = opening.fragments(paths[1:])
    states = _each(opened, model_state)
    for other, path in zip(states, paths[1:], strict=True):
        check_one_save(path, (
            ("global_steps", other.global_steps, state.global_steps),
            ("ds_version", other.version, state.version),
            ("frozen_param_shapes", other.frozen_shapes, state.frozen_shapes),
            ("fragments", list(other.fragments or {}), list(state.fragments or {})),
            *(() if state.autoep is None else (
                ("param_shapes", other.shapes, state.shapes),
                ("ds_autoep_layers", other.autoep and other.autoep.layers, state.autoep.layers),
            )),
        ))  # fmt: skip
    return ([model, *opened], [state, *states]) if needed else ([model], [state])


def _check_copies(opening: Opening, state: ModelState) -> None:
    """Raises SourceError unless other nodes' model states are of the same save; they are not read further."""
    paths = opening.files.copies
    for other, path in zip(_each(opening.fragments(paths), model_state), paths, strict=True):
        check_one_save(path, (
            ("global_steps", other.global_steps, state.global_steps),
            ("ds_version", other.version, state.version),
            ("param_shapes", other.shapes, state.shapes),
        ))  # fmt: skip


def _each(opened: Sequence[Opened], read_state: Callable[[object, str], State]) -> list[State]:
    """The state of each file; a tree that several files share is read once."""
    states: dict[int, State] = {}
    for o in opened:
        if id(o.file.root) not in states:
            states[id(o.file.root)] = read_state(o.file.root, o.file.file.path)
    return [states[id(o.file.root)] for o in opened]


# ---- the two roads ----


def _from_masters(
    path: str, opening: Opening, first: OptimState, models: Sequence[Opened], states: Sequence[ModelState]
) -> Checkpoint:
    """Stages 1 to 3: the masters in all ranks' optimizer files. `models`, `states`: rank 0's, or all."""
    found = _masters(opening, first, states)
    where, layout, experts = opening.files.folder, found.layout, found.experts
    at_stage_3, of_all = first.stage == 3, opening.options.weights == "module"
    world, state = len(found.paths), found.state
    reading = Reading(path, opening, models, [state, *states[1:]])
    extents, entries = reading.extents, reading.beside_masters(at_stage_3)
    masters = {n: e for placed in layout for n, e in placed.entries(extents).items()}
    if not opening.options.exclude_frozen:
        entries |= {n: e.entry(extents, "frozen") for n, e in experts.items() if n not in masters}
    weights, notes = masters, []
    if of_all or experts:  # which expert is whose is worked out: its copy must agree
        copies = reading.copies(layout, experts, of_all=of_all)
        if not (of_all and state.zenflow):
            check_copy(one_axis(copies), one_axis(masters), where)
        weights = copies if of_all else masters
    elif not at_stage_3:
        names = sampled(state.shapes or (), found.alignment, world)
        dense = [n for n in names if comparable(state.module.get(n))]
        notes = check_order(layout, extents, one_axis(reading.module(dense, "parameter")), found.paths)
        if notes and state.zenflow:
            raise SourceError(
                f"{where}: the masters are behind the weights that ZenFlow trains, which are in `module`: "
                "weights='module' (--weights module) reads those"
            )
    entries |= weights
    return reading.checkpoint(
        entries,
        facts={
            "stage": 1 if first.stage is None else first.stage,
            "optimizer": "ZeRO" if first.stage is not None else "BF16_Optimizer",
            "world": world,
            "groups": [_group_facts(placed) for placed in layout],
            "master dtype": ", ".join(sorted({placed.flat.dtype.name for placed in layout})),
            "weights": opening.options.weights,
            **({"experts": list(state.experts)} if state.experts else {}),
        },
        notes=notes,
        unread=[
            f"optimizer moments of {world} ranks", *_other_copy(opening.options, len(weights), at_stage_3)
        ],
        layout=[
            *(a.tobytes() for p in layout for a in (p.flat.extent, p.flat.offset, p.flat.length)),
            *(a.tobytes() for p in layout for a in (p.numel, p.start)),
            *places_of(states),
            *([places(e.tensor for e in experts.values())] if experts else []),
        ],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Masters:
    """Where the masters lie: `paths` of all ranks' optimizer files, and the `layout` of the flats in them.

    `state`: rank 0's model states, and `alignment`: the paddings in the flats, with each group of experts
    once for each set of ranks; `experts`: their copies, by name."""

    paths: Sequence[str]
    layout: Sequence[Placed]
    state: ModelState
    alignment: Alignment
    experts: Mapping[str, Whole]


def _masters(opening: Opening, first: OptimState, states: Sequence[ModelState]) -> _Masters:
    """The masters in all ranks' files. Raises SourceError where they do not fit the model states."""
    files, where, state = opening.files, opening.files.folder, states[0]
    at_stage_3 = first.stage == 3
    world = _world(first, files, bool(state.experts))
    if state.dp_world is not None and state.dp_world % world:
        raise SourceError(
            f"{where}: model states of {state.dp_world} data-parallel ranks, optimizer files of {world}"
        )
    paths = check_ranks(files.optim, world, files.what("optimizer files"), where)
    optim = opening.optim(paths)
    saved = _each(optim, optim_state)
    if state.autoep is not None and state.autoep.by_expert == at_stage_3:
        raise SourceError(f"{where}: AutoEP's model states are not of stage {first.stage}: files of two runs")
    if state.experts and not at_stage_3:
        saved = in_order(saved, state.shapes or (), state.autoep, paths)
    _check_one_run(saved, optim, paths, state)
    flats, alignment = columns(optim, [s.flats for s in saved], where), first.alignment
    experts = opening.experts(state)
    if experts:
        if at_stage_3:
            raise SourceError(f"{where}: DeepSpeed's MoE layers at stage 3, which DeepSpeed does not write")
        state, alignment, flats = spread(state, alignment, flats, first.counts, where)
    shapes = state.shapes or ()
    if not at_stage_3:
        layout = chained(shapes, alignment, flats, where)
    elif state.autoep is None:
        layout = sliced(shapes, swapped_in(opening, state, saved, flats, paths), where)
    else:
        layout = sliced_in_sets(state.autoep, states, saved, flats, where)
    return _Masters(paths, layout, state, alignment, experts)


def _from_universal(path: str, opening: Opening) -> Rank:
    """A universal checkpoint: the masters whole, a file each, beside copies of the run's model states."""
    files, where = opening.files, opening.files.folder
    at_stage_3 = files.model is None
    if files.model is not None:
        model, state = opening.model(files.model)
        models, states = [model], [state]
    else:
        models, states = _models_of_ranks(opening, len(files.model_of))
        state = states[0]
    if state.shapes is None or state.experts:
        what = "experts of MoE layers" if state.experts else "ZeRO was off: param_shapes is None"
        raise SourceError(f"{where}: a universal checkpoint that is not read: {what}")
    held = opening.universal(trainable(state))
    reading = Reading(path, opening, models, states)
    entries = reading.beside_masters(at_stage_3)
    masters = {name: master.entry(reading.extents, "parameter") for name, master in held.items()}
    if not at_stage_3:  # its maker takes the order of the parameters from where round robin has another
        check_copy(one_axis(reading.module(masters, "parameter")), one_axis(masters), where)
    entries |= masters
    checkpoint = reading.checkpoint(
        entries,
        facts={"stage": 3 if at_stage_3 else "1 or 2", "universal": True, "weights": "master"},
        unread=["optimizer moments", *_other_copy(opening.options, len(masters), at_stage_3)],
        layout=[*places_of(states), places(master.tensor for master in held.values())],
    )
    return Rank(checkpoint, state, None)


def _from_module(path: str, opening: Opening, model: Opened, state: ModelState) -> Checkpoint:
    """Stage 0, whose masters have no param_shapes, and the 16-bit copy where there are no optimizer files."""
    where = opening.files.folder
    off = state.shapes is None
    if off and opening.options.exclude_frozen:
        raise SourceError(f"{where}: exclude_frozen was asked for; at stage 0 nothing says what was frozen")
    experts = opening.experts(state)
    reading = Reading(path, opening, [model], [state])
    found, shapes = reading.found, trainable(state)
    if off:
        tensors = {n: t for n, t in state.module.items() if isinstance(t, Tensor)}
        tied = by_storage(tensors) | found.tied
        names = [n for n in tensors if n not in tied and n not in found.buffers]
        reading.found = found = Parts(found.buffers, (), tied, found.other, ())
    else:
        names = [name for name in shapes if not is_expert(name, state.autoep)]
    entries = reading.module(found.buffers, "buffer")
    if not opening.options.exclude_frozen:
        entries |= reading.module(found.kept, "frozen") | reading.frozen_whole()
    names = [] if state.pipeline else names  # files of layers have them
    for name in names:
        t = state.module.get(name)
        got = t.shape if isinstance(t, Tensor) else "nothing"
        if got != (shape := shapes.get(name, got)):
            raise SourceError(f"{where}: {name}: `module` has {got}, wanted {shape}")
    entries |= reading.module(names, "parameter")
    entries |= {name: e.entry(reading.extents, "parameter") for name, e in experts.items()}
    asked = opening.options.weights == "module"
    why = "ZeRO was off: its masters have no param_shapes"
    if not off:
        why = "there are no optimizer files to compare it with"
    return reading.checkpoint(
        entries,
        facts={
            "stage": 0 if off else "1 or 2", "weights": "module", "why module": why,
            **({"experts": list(state.experts)} if state.experts else {}),
        },
        notes=[] if asked else [f"the weights are the copy in `module`: {why}"],
        unread=["optimizer state"] if off else [],
        layout=[places_in(state), *([places(e.tensor for e in experts.values())] if experts else [])],
    )  # fmt: skip


# ---- checks and facts ----


def _check_one_run(
    states: Sequence[OptimState], opened: Sequence[Opened], paths: Sequence[str], model: ModelState
) -> None:
    """All ranks' optimizer files come from one save of one run, as far as they say."""
    steps = [_step(s, o.file) for s, o in zip(states, opened, strict=True)]
    first = states[0]
    for s, step, path in zip(states, steps, paths, strict=True):
        check_one_save(path, (
            ("zero_stage", s.stage, first.stage),
            ("partition_count", s.counts, first.counts),
            ("param_alignment_paddings", s.alignment, first.alignment),
            ("ds_version", s.version, model.version or first.version),
            ("optimizer step", step, steps[0]),
        ))  # fmt: skip


def _step(state: OptimState, file: TorchFile) -> int | None:
    if not isinstance(state.step, Tensor):
        return state.step
    extent = file.extents[state.step.storage.extent]
    size = state.step.dtype.itemsize
    (data,) = read_all(file.file.path, [(extent.offset + state.step.offset * size, size)])
    try:
        return int(number(data, state.step.dtype))
    except (SourceError, ValueError, OverflowError) as e:  # of a dtype that counts nothing, NaN, infinite
        raise SourceError(f"{file.file.path}: the optimizer's step: {e}") from None


def _group_facts(placed: Placed) -> JSON:
    numel = int(placed.numel.sum())
    return {
        "parameters": len(placed.names), "numel": numel, "padding": int(placed.flat.length.sum()) - numel,
        "dtype": placed.flat.dtype.name,
    }  # fmt: skip


def _other_copy(options: Options, parameters: int, at_stage_3: bool) -> list[str]:
    """The copy of the weights that was not asked for."""
    if at_stage_3:
        return []
    other = "masters" if options.weights == "module" else "16-bit copy in `module`"
    return [f"{other} of {parameters} parameters"]
