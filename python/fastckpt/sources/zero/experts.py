"""Experts of DeepSpeed's MoE layers: on which ranks their masters lie, and under what names.

Law: a group of experts is cut over the dp / ep ranks that hold the same experts. Every such set of ranks
counts its experts 0, 1, .. as if it were alone; expert e of set s is number s * (experts in a set) + e of
all. AutoEP's are in stacks; those of a set are taken apart at stages 1 and 2, so that they compare with the
experts' files, and stay one at stage 3, where a rank has no whole expert. Source: deepspeed/utils/groups.py
(the order of ranks), runtime/engine.py (`_save_moe_checkpoint`: global numbers in the files of experts),
runtime/zero/stage_1_and_2.py (`partition_count`), stage3.py (`_zero3_partition_group_metadata`) of DeepSpeed
0.19.8."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...errors import SourceError
from ..plain_values import mapping
from ..torchfile import Tensor
from .autoep import AutoEp, piece
from .partitions import Flat, Placed, Shape, sliced
from .state import ModelState, OptimState

_LOCAL = re.compile(r"(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)")

Alignment = tuple[tuple[int, ...], ...] | None


def is_expert(name: str, autoep: AutoEp | None) -> bool:
    """Whether a parameter is an expert's, or a stack of experts."""
    return _LOCAL.fullmatch(name) is not None if autoep is None else autoep.stack(name) is not None


def _numbered(name: str, autoep: AutoEp | None) -> tuple[str, int, str] | None:
    """An expert's number in a name, and what stands before and after it; None for other names."""
    if autoep is None:
        found = _LOCAL.fullmatch(name)
        return (found[1], int(found[2]), found[3]) if found else None
    stack = autoep.stack(name)
    return None if stack in (None, name) else (f"{stack}.", int(name.removeprefix(f"{stack}.")), "")


def spread(
    state: ModelState, alignment: Alignment, flats: Sequence[Flat], counts: Sequence[int], where: str
) -> tuple[ModelState, Alignment, list[Flat]]:
    """Groups, alignment paddings and flats in which each group of experts stands once for each set of ranks,
    under global names; `flats`, as given, are each over all ranks, and all count as many groups (`in_order`).
    Raises SourceError."""
    autoep = state.autoep
    shapes: Sequence[Mapping[str, Shape]] = state.shapes or ()
    if autoep is not None:
        shapes, alignment = _apart(shapes, alignment, autoep, where)
    world = max(counts, default=1)
    local = _locals(shapes, autoep, where)
    groups, paddings, cut = [], [], []
    for g, (group, flat, count) in enumerate(zip(shapes, flats, counts, strict=True)):
        of_experts = {is_expert(name, autoep) for name in group}
        if len(of_experts) > 1 or (count != world and of_experts != {True}):
            raise SourceError(
                f"{where}: group {g} is cut over {count} of {world} ranks and is not of experts alone"
            )
        if world % count:
            raise SourceError(f"{where}: group {g} is cut over {count} ranks, which does not divide {world}")
        sets = world // count if of_experts == {True} else 1
        if autoep is not None and of_experts == {True} and sets != autoep.sets:
            raise SourceError(f"{where}: group {g} is cut for {sets} sets of ranks, AutoEP had {autoep.sets}")
        for number, ranks in enumerate(_sets(world, sets, state.data_before_experts)):
            groups.append({_global(n, number, local, autoep): shape for n, shape in group.items()})
            cut.append(_over(flat, ranks))
            if alignment is not None:
                paddings.append(alignment[g])
    return replace(state, shapes=tuple(groups)), None if alignment is None else tuple(paddings), cut


def _apart(
    shapes: Sequence[Mapping[str, Shape]], alignment: Alignment, autoep: AutoEp, where: str
) -> tuple[list[dict[str, Shape]], Alignment]:
    """Groups with the experts of each stack one by one, and the paddings after them."""
    groups: list[dict[str, Shape]] = []
    paddings: list[tuple[int, ...]] = []
    for g, group in enumerate(shapes):
        after = alignment[g] if alignment is not None else ()
        each: list[int] = []
        apart: dict[str, Shape] = {}
        for k, (name, shape) in enumerate(group.items()):
            if name not in autoep.stacks:
                apart[name] = shape
                each += after[k : k + 1]
                continue
            _check_stack(name, shape, autoep, where)
            apart |= {piece(name, e): shape[1:] for e in range(shape[0])}
            each += [0] * (shape[0] - 1) * (k < len(after))
            each += after[k : k + 1]
        groups.append(apart)
        paddings.append((*each, *after[len(group) :]))
    return groups, None if alignment is None else tuple(paddings)


def _check_stack(name: str, shape: Shape, autoep: AutoEp, where: str) -> None:
    want = autoep.stacks[name] // autoep.sets
    if len(shape) != 3 or shape[0] != want:
        raise SourceError(f"{where}: {name} has shape {shape}, wanted {want} experts of {autoep.sets} sets")


def _over(flat: Flat, ranks: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Flat:
    """A flat over these of its ranks alone."""
    return replace(flat, extent=flat.extent[ranks], offset=flat.offset[ranks], length=flat.length[ranks])


def sliced_in_sets(
    autoep: AutoEp,
    states: Sequence[ModelState],
    saved: Sequence[OptimState],
    flats: Sequence[Flat],
    where: str,
) -> list[Placed]:
    """Stage 3: where the parameters lie, each stack once for each set of ranks. `states`, `saved`: those of
    all ranks, which say over which ranks a sub-group is cut. Raises SourceError where they disagree."""
    shapes, every = states[0].shapes or (), [tuple(range(len(saved)))]
    sets = _told_sets(states, autoep.sets, where)
    if len(shapes) != len(flats):
        raise SourceError(f"{where}: {len(shapes)} sub-groups in param_shapes, {len(flats)} of masters")
    dense: list[tuple[Mapping[str, Shape], Flat]] = []
    parts: list[list[tuple[Mapping[str, Shape], Flat]]] = [[] for _ in sets]
    for g, (group, flat) in enumerate(zip(shapes, flats, strict=True)):
        of_experts = any(name in autoep.stacks for name in group)
        for name, shape in group.items() if of_experts else ():
            if name not in autoep.stacks:
                raise SourceError(f"{where}: sub-group {g} is of experts, and of {name}")
            _check_stack(name, shape, autoep, where)
        for number, ranks in enumerate(sets if of_experts else every):
            for r in ranks:
                told = saved[r].ranks or ()
                if told[g : g + 1] != (ranks,):
                    raise SourceError(f"{where}: rank {r}: sub-group {g} is cut over {told}, wanted {ranks}")
            own = {piece(n, number): s for n, s in group.items()} if of_experts else group
            (parts[number] if of_experts else dense).append((own, _over(flat, np.array(ranks, np.int64))))
    out: list[Placed] = []
    for number, stream in enumerate((dense, *parts)):
        at = f"{where}: experts of set {number - 1}" if number else where
        out += sliced([group for group, _ in stream], [flat for _, flat in stream], at)
    return out


def _told_sets(states: Sequence[ModelState], sets: int, where: str) -> list[tuple[int, ...]]:
    """The ranks of each set in order, as each says its place. Raises SourceError."""
    told = {(s.autoep.set, s.autoep.place): r for r, s in enumerate(states) if s.autoep is not None}
    each = len(states) // sets if sets else 0
    wanted = [[(s, k) for k in range(each)] for s in range(sets)]
    if len(states) != sets * each or {*told} != {place for row in wanted for place in row}:
        raise SourceError(
            f"{where}: experts of {sets} sets of {len(states)} ranks, whose places are {sorted(told)!s:.80}: "
            "wanted each once"
        )
    return [tuple(told[place] for place in row) for row in wanted]


def in_order(
    saved: Sequence[OptimState],
    shapes: Sequence[Mapping[str, Shape]],
    autoep: AutoEp | None,
    paths: Sequence[str],
) -> list[OptimState]:
    """Each rank's optimizer state with its groups in the order of param_shapes, which is rank 0's.

    Groups of experts stand in the order of a set of their names, which is that of the rank's PYTHONHASHSEED
    (deepspeed/moe/utils.py, `split_params_into_different_moe_groups_for_optimizer`). What a rank says of a
    group must be true of the one it is taken for: the ranks it is cut over, the paddings, the parameters it
    holds a piece of. Raises SourceError where that fits no order, or more than one."""
    known: dict[int, OptimState] = {}  # states of identical files are one
    for state, path in zip(saved, paths, strict=True):
        if id(state) not in known:
            known[id(state)] = _ordered(state, saved[0], shapes, autoep, path)
    return [known[id(state)] for state in saved]


def _ordered(
    state: OptimState,
    first: OptimState,
    shapes: Sequence[Mapping[str, Shape]],
    autoep: AutoEp | None,
    path: str,
) -> OptimState:
    told = {
        "partition_count": state.counts, "masters": state.flats,
        "param_alignment_paddings": state.alignment, "param_slice_mappings": state.held,
    }  # fmt: skip
    for what, groups in told.items():
        if groups is not None and len(groups) != len(shapes):
            raise SourceError(f"{path}: {len(groups)} groups in {what}, {len(shapes)} in param_shapes")
    experts = [g for g, group in enumerate(shapes) if all(is_expert(n, autoep) for n in group)]

    def fits(g: int, own: int) -> bool:
        same = state.counts[own] == first.counts[g]
        if state.alignment is not None and first.alignment is not None:
            same &= state.alignment[own] == first.alignment[g]
        return same and (state.held is None or state.held[own].keys() <= shapes[g].keys())

    if all(fits(g, g) for g in experts):
        return state
    order = list(range(len(shapes)))
    left = {g: {own for own in experts if fits(g, own)} for g in experts}
    while left:  # as long as one order alone fits, some group can be but one
        g = min(left, key=lambda g: len(left[g]))
        if len(left[g]) != 1:
            orders = "more than one order" if left[g] else "no order"
            raise SourceError(
                f"{path}: its groups of experts fit {orders} of rank 0's: partition_count is "
                f"{state.counts}, wanted {first.counts}: files of two saves"
            )
        (order[g],) = left.pop(g)
        for others in left.values():
            others.discard(order[g])
    return replace(
        state,
        counts=tuple(state.counts[own] for own in order),
        flats=tuple(state.flats[own] for own in order),
        alignment=state.alignment and tuple(state.alignment[own] for own in order),
        held=state.held and tuple(state.held[own] for own in order),
    )


def tensors(root: object, expert: int, autoep: AutoEp | None, where: str) -> dict[str, Tensor]:
    """The tensors of an expert's file. Raises SourceError for names that are not that expert's."""
    out = {}
    for name, t in mapping(root, where).items():
        found = _numbered(name, autoep) if isinstance(name, str) else None
        if found is None or found[1] != expert or not isinstance(t, Tensor):
            raise SourceError(f"{where}: {name!r} is no tensor of expert {expert}")
        out[str(name)] = t
    return out


def check_files(state: ModelState, held: Mapping[tuple[int, int], str], where: str) -> None:
    """Raises SourceError unless each expert that `num_experts` counts has its file, and no other has; at
    stage 3 AutoEP's have none."""
    filed = state.autoep is None or state.autoep.by_expert
    counts = dict(enumerate(state.experts if filed else ()))
    wanted = ((layer, e) for layer, count in counts.items() for e in range(count))
    extra = sorted((layer, e) for layer, e in held if e >= counts.get(layer, 0))
    if (missing := next((x for x in wanted if x not in held), None)) is not None:
        layer, e = missing
        total = sum(state.experts)
        raise SourceError(
            f"{where}: {total - len(held) + len(extra)} of {total} expert files missing: expert {e} of MoE "
            f"layer {layer}; not saved by that process, or left on another node's disk, "
            "which also= (--also) names"
        )
    if extra:
        layer, e = extra[0]
        raise SourceError(
            f"{held[extra[0]]}: expert {e} of MoE layer {layer}, but the run had {list(counts.values())}: "
            "left from another run, remove it"
        )


def _sets(world: int, sets: int, data_first: bool) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """The ranks that hold the same experts, in the order of their partitions."""
    ranks = np.arange(world, dtype=np.int64)
    table = ranks.reshape(sets, -1) if data_first else ranks.reshape(-1, sets).T
    yield from (row.copy() for row in table)


def _locals(shapes: Sequence[Mapping[str, Shape]], autoep: AutoEp | None, where: str) -> dict[str, int]:
    """Layer's prefix -> how many experts a set of ranks holds."""
    numbers: dict[str, set[int]] = {}
    for group in shapes:
        for name in group:
            if found := _numbered(name, autoep):
                numbers.setdefault(found[0], set()).add(found[1])
    for prefix, seen in numbers.items():
        if seen != set(range(len(seen))):
            raise SourceError(
                f"{where}: param_shapes has experts {sorted(seen)[:8]} of {prefix}; wanted 0, 1, .."
            )
    return {prefix: len(seen) for prefix, seen in numbers.items()}


def _global(name: str, number: int, local: Mapping[str, int], autoep: AutoEp | None) -> str:
    """The name of a set's expert among all; other names stay."""
    if (found := _numbered(name, autoep)) is None:
        return name
    before, own, after = found
    return f"{before}{number * local[before] + own}{after}"
