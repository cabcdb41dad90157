"""Parts of tensors that torch.distributed cut, as torch.save pickles them: DTensor and ShardedTensor.

Law: a part lies where its own record says, as torch would put it there; what may be meant two ways is
refused. Source: torch/distributed/tensor/{_api,_dtensor_spec,placement_types,_utils}.py, device_mesh.py and
_shard/sharded_tensor/ of torch 2.6 and 2.13.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import SourceError
from .plain_values import integers, listing
from .torchfile import Inert, Tensor, type_name

Sizes = tuple[int, ...]

MOST_RUNS = 1 << 16
"""Runs of one axis that one rank may hold."""


class Cut(NamedTuple):
    """An axis of a tensor, cut over the ranks along an axis of their mesh.

    Rows are cut into `factor` runs first, and each of these over the ranks: the order of FSDP over tensor
    parallelism (_StridedShard)."""

    axis: int
    factor: int = 1


@dataclass(frozen=True, slots=True)
class Meshed:
    """What a rank holds of a DTensor of `shape`: `local`, at that coordinate of its mesh; `cuts`: what each
    axis of the mesh cuts, None where its ranks hold the same."""

    shape: Sizes
    local: Tensor
    coordinate: Sizes
    cuts: tuple[Cut | None, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.local,)


@dataclass(frozen=True, slots=True)
class Boxed:
    """What a rank holds of a ShardedTensor of `shape`: tensors, and where the first element of each lies."""

    shape: Sizes
    boxes: tuple[tuple[Sizes, Tensor], ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for _, t in self.boxes)


Part = Meshed | Boxed


class Box(NamedTuple):
    """`size` elements from `origin` of the whole, which lie in `tensor` of rank `rank` from `start` on."""

    origin: Sizes
    size: Sizes
    rank: int
    tensor: Tensor
    start: Sizes


def part_of(value: object) -> Part | None:
    """A pickled value as a part of a tensor, None if it is none. Raises SourceError for one that is odd."""
    if not isinstance(value, Inert) or value.name != "torch._tensor._rebuild_from_type_v2":
        return None
    func, kind, made, state = (*value.args, None, None, None, None)[:4]
    name = kind.name if isinstance(kind, Inert) else ""
    if not isinstance(func, Inert) or not name.startswith("torch.distributed."):
        return None
    if not func.name.endswith("._rebuild_wrapper_subclass") or not isinstance(made, tuple) or len(made) < 3:
        raise SourceError(f"{name} made by {func.name} is not read")
    shape = integers(made[2], f"{name}: its shape")
    if name.endswith(".DTensor"):
        return _meshed(shape, _fields(state))
    if name.endswith(".ShardedTensor"):
        return _boxed(shape, state)
    raise SourceError(f"a tensor of {name} is not read")


def boxes_of(parts: Mapping[int, Part]) -> Iterator[Box]:
    """Where the elements of a tensor lie; `parts`: what each rank holds of it.

    What several ranks hold comes several times, in the order of their numbers. Raises SourceError for parts
    that do not fit each other."""
    if len({(type(p), p.shape) for p in parts.values()}) != 1:
        raise SourceError("its ranks hold it in several forms or shapes")
    meshed = {rank: part for rank, part in parts.items() if isinstance(part, Meshed)}
    if meshed:
        yield from _on_a_mesh(meshed)
        return
    for rank, part in parts.items():
        for origin, tensor in part.boxes if isinstance(part, Boxed) else ():
            yield Box(origin, tensor.shape, rank, tensor, (0,) * len(origin))


# ---- DTensor ----


def _meshed(shape: Sizes, state: Mapping[object, object]) -> Meshed:
    local, spec = state.get("_local_tensor"), _fields(_state(state.get("_spec")))
    if not isinstance(local, Tensor):
        raise SourceError(f"a DTensor's part is {type_name(local)}")
    mesh = _fields(_state(spec.get("mesh")))
    placements = listing(spec.get("placements"), "a DTensor's placements")
    coordinate = integers(mesh.get("_coordinate_on_dim"), "a DTensor's coordinate in its mesh")
    if len(coordinate) != len(placements):
        raise SourceError(f"a DTensor at {list(coordinate)} of a mesh has {len(placements)} placements")
    order = spec.get("shard_order")
    for entry in order if isinstance(order, tuple | list) else ():
        axes = entry.args[1] if isinstance(entry, Inert) and len(entry.args) == 2 else None
        if not isinstance(axes, tuple | list) or sorted(map(str, axes)) != [*map(str, axes)]:
            raise SourceError("a DTensor cut in another order than its mesh's axes is not read")
    return Meshed(shape, local, coordinate, tuple(_cut(p, len(shape)) for p in placements))


def _cut(placement: object, ndim: int) -> Cut | None:
    kind = type_name(placement).rpartition(".")[2]
    if kind == "Replicate":
        return None
    state = _fields(_state(placement))
    axis, factor = state.get("dim"), state.get("split_factor", 1)
    if kind not in ("Shard", "_StridedShard") or type(axis) is not int or type(factor) is not int:
        raise SourceError(f"a DTensor's placement {type_name(placement)} is not read")
    if not -ndim <= axis < ndim or not 1 <= factor <= MOST_RUNS:
        raise SourceError(f"a DTensor of {ndim} axes cut along axis {axis}, {factor} runs")
    return Cut(axis % ndim, factor)


def _on_a_mesh(parts: Mapping[int, Meshed]) -> Iterator[Box]:
    first = next(iter(parts.values()))
    if any(p.cuts != first.cuts for p in parts.values()):
        raise SourceError("its ranks have several placements")
    sizes = [1 + max(axis) for axis in zip(*(p.coordinate for p in parts.values()), strict=True)]
    if len({p.coordinate for p in parts.values()}) != math.prod(sizes):
        raise SourceError(f"ranks of its mesh of {sizes} are missing")
    for rank, part in parts.items():
        steps = [s for s in zip(part.cuts, sizes, part.coordinate, strict=True) if s[0] is not None]
        runs = [
            _runs(n, [(cut.factor, *where) for cut, *where in steps if cut and cut.axis == axis])
            for axis, n in enumerate(part.shape)
        ]
        held = tuple(sum(length for _, length in own) for own in runs)
        if held != part.local.shape:
            raise SourceError(
                f"rank {rank} holds {list(part.local.shape)}; at {list(part.coordinate)} of a mesh of "
                f"{sizes} its part of {list(part.shape)} is {list(held)}"
            )
        starts = [itertools.accumulate((length for _, length in own), initial=0) for own in runs]
        placed = [zip(own, at, strict=False) for own, at in zip(runs, starts, strict=True)]
        for box in itertools.product(*placed):
            origin, size = tuple(run[0] for run, _ in box), tuple(run[1] for run, _ in box)
            if 0 not in size:
                yield Box(origin, size, rank, part.local, tuple(at for _, at in box))


def _runs(length: int, steps: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """The (start, length) of an axis that a rank is left with, in the order it holds them.

    `steps`: (factor of the cut, over how many ranks, which of them this is)."""
    held, left = [(0, length)], length
    strided = any(factor > 1 for factor, _, _ in steps)
    for factor, count, at in steps:
        if strided and left % (factor * count):
            raise SourceError(
                f"{left} rows in {factor} runs over {count} ranks, which do not divide them: which rank "
                "holds which is in doubt"
            )
        pieces = [_chunk(held, factor, k) for k in range(factor)]
        held = [run for piece in pieces for run in _chunk(piece, count, at)]
        left = sum(own for _, own in held)
    return held or [(0, 0)]


def _chunk(runs: Sequence[tuple[int, int]], count: int, at: int) -> list[tuple[int, int]]:
    """Number `at` of the `count` parts that torch.chunk makes of these runs."""
    total = sum(length for _, length in runs)
    size = -(-total // count)
    low, high = min(at * size, total), min((at + 1) * size, total)
    out, begin = [], 0
    for start, length in runs:
        a, b = max(low - begin, 0), min(high - begin, length)
        if a < b:
            out.append((start + a, b - a))
        begin += length
    return out


# ---- ShardedTensor ----


def _boxed(shape: Sizes, state: object) -> Boxed:
    shards, *_ = listing(state, "a ShardedTensor's state") or [None]
    boxes = []
    for shard in listing(shards, "a ShardedTensor's parts"):
        said = _fields(_state(shard))
        where, tensor = _fields(_state(said.get("metadata"))), said.get("tensor")
        origin = integers(where.get("shard_offsets"), "a ShardedTensor's part: its origin")
        if not isinstance(tensor, Tensor):
            raise SourceError(f"a ShardedTensor's part is {type_name(tensor)}")
        size = integers(where.get("shard_sizes"), "a ShardedTensor's part: its size")
        if size != tensor.shape or not len(origin) == len(size) == len(shape):
            raise SourceError(
                f"a ShardedTensor's part has {list(tensor.shape)}, its record says {list(size)} at "
                f"{list(origin)} of {list(shape)}"
            )
        if tensor.numel:
            boxes.append((origin, tensor))
    return Boxed(shape, tuple(boxes))


# ---- plain values, checked ----


def _state(value: object) -> object:
    if not isinstance(value, Inert):
        raise SourceError(f"wanted an object of torch.distributed, got {type_name(value)}")
    return value.state


def _fields(state: object) -> Mapping[object, object]:
    """The fields of an object: its __dict__, or (None or its __dict__, its slots)."""
    if isinstance(state, tuple) and len(state) == 2:
        return {**(_fields(state[0]) if state[0] else {}), **_fields(state[1])}
    if not isinstance(state, dict):
        raise SourceError(f"wanted fields, got {type_name(state)}")
    return state
