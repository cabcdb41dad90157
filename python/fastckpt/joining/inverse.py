"""Copies the other way round: from where a tensor's elements went to, the tensor as a view of there.

Law: pieces are boxes of the tensor, its axes cut where pieces step; together they hold every element. The
first piece that holds an element gives it; what later ones hold once more is told, as boxes too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..dtypes import DType
from ..errors import SourceError
from ..extents import Extent, Extents
from ..views import MAX_FRAGMENTS, ZERO, View, dense_strides

Axis = tuple[int, int, int]
"""Elements, and what lies between neighbours in the tensor and in the shard, in elements."""

Box = tuple[list[int], list[int], list[int]]
"""Origin, size, and strides in the shard."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a tensor and where they lie: `start` in the tensor, `offset` in the extent, both counted in
    elements; axes from the widest stride in the tensor to the narrowest."""

    start: int
    axes: tuple[Axis, ...]
    extent: int
    offset: int
    dtype: DType


def pieces_of(made: View, held: View, known: Mapping[Extent, str]) -> Iterator[tuple[str, Piece]]:
    """What a shard's tensor `held` holds, by the target `made` it was written from.

    Raises SourceError for a shard that does not lie as dense boxes."""
    d = held.ndim
    for row in held.rows.tolist():
        extent, _, offset, *box = row
        origin, size, stride = box[:d], box[d : 2 * d], box[2 * d :]
        if any(n > 1 and s != t for n, s, t in zip(size, stride, dense_strides(size), strict=True)):
            raise SourceError(f"a tensor of {held.shape} that lies with strides {stride} cannot be joined")
        part = made
        for axis, (start, n) in enumerate(zip(origin, size, strict=True)):
            if n != held.shape[axis]:
                part = part.narrow(axis, start, n)
        yield from _in_run(part, extent, offset, held.dtype, known)


def _in_run(
    made: View, run: int, begin: int, dtype: DType, known: Mapping[Extent, str]
) -> Iterator[tuple[str, Piece]]:
    """What a dense run of extent `run` from element `begin` on holds, by the target it was written from."""
    d, steps = len(made.held_shape), dense_strides(made.held_shape)
    for line in made.held.tolist():
        extent, _, start, *box = line
        tensor = None if extent == ZERO else known.get(made.extents[extent])
        if tensor is None:
            continue  # padding, or a constant
        origin, size, stride = box[:d], box[d : 2 * d], box[2 * d :]
        axes = sorted(
            ((n, s, t) for n, s, t in zip(size, stride, steps, strict=True) if n > 1 and s),
            key=lambda axis: -axis[1],
        )
        offset = begin + sum(o * t for o, t in zip(origin, steps, strict=True))
        yield tensor, Piece(start, tuple(_coalesced(axes)), run, offset, dtype)


def _coalesced(axes: Sequence[Axis]) -> list[Axis]:
    """Neighbouring axes that are one stride on both sides, joined."""
    out: list[Axis] = []
    for n, s, t in reversed(axes):
        if out and s == out[-1][0] * out[-1][1] and t == out[-1][0] * out[-1][2]:
            m, inner, step = out.pop()
            out.append((n * m, inner, step))
        else:
            out.append((n, s, t))
    return out[::-1]


# ---- pieces to a view ----


class _Boxes:
    """Disjoint boxes of a shape, as rows of a view, and how many elements they cover; `again`: those of
    elements that were covered already."""

    def __init__(self, ndim: int) -> None:
        self.rows: list[list[int]] = []
        self.again: list[list[int]] = []
        self.covered = 0
        self._low = np.empty((16, ndim), np.int64)
        self._high = np.empty((16, ndim), np.int64)

    def add(self, source: tuple[int, int], offset: int, box: Box) -> None:
        """A box of (extent, dtype code) from `offset` on."""
        origin, size, stride = box
        n = len(self.rows)
        over = (self._low[:n] < np.add(origin, size)) & (self._high[:n] > origin)
        hits = np.flatnonzero(over.all(axis=1))
        if len(hits):
            low, high = self._low[hits[0]].tolist(), self._high[hits[0]].tolist()
            for a, step in enumerate(stride):
                # What lies before and behind the covered box on this axis is new; go on within.
                start, stop = origin[a], origin[a] + size[a]
                for first, last in ((start, low[a]), (high[a], stop)):
                    if last > first:
                        part = _with(origin, a, first), _with(size, a, last - first), stride
                        self.add(source, offset + (first - start) * step, part)
                first, last = max(start, low[a]), min(stop, high[a])
                origin, size = _with(origin, a, first), _with(size, a, last - first)
                offset += (first - start) * step
            self.again.append([*source, offset, *origin, *size, *stride])
            return
        if n == len(self._low):
            self._low, self._high = (np.concatenate([x, np.empty_like(x)]) for x in (self._low, self._high))
        self._low[n], self._high[n] = origin, np.add(origin, size)
        self.rows.append([*source, offset, *origin, *size, *stride])
        self.covered += math.prod(size)


def _with(numbers: list[int], index: int, value: int) -> list[int]:
    return [*numbers[:index], value, *numbers[index + 1 :]]


def joined(
    where: str, shape: tuple[int, ...], pieces: Sequence[Piece], extents: Extents
) -> tuple[View, list[list[int]]]:
    """The tensor of `shape` that the pieces make, of its first rows where they hold those only, and what they
    hold of it once more, as rows over its held shape.

    Raises SourceError where an element is missing, or dtypes differ."""
    dtypes = {p.dtype for p in pieces}
    if len(dtypes) != 1:
        raise SourceError(f"{where}: its parts are {', '.join(sorted(d.name for d in dtypes))}, wanted one")
    dtype, numel = dtypes.pop(), math.prod(shape)
    grouping = _grouping(shape, {s for p in pieces for _, s, _ in p.axes})
    boxes = _Boxes(len(grouping))
    stop = 0
    for piece in pieces:
        for start, offset, axes in _in_axes(where, piece.start, piece.offset, piece.axes, grouping):
            stop = max(stop, start + sum((n - 1) * s for n, s, _ in axes) + 1)
            boxes.add((piece.extent, dtype.code), offset, _box(start, axes, grouping))
    if boxes.covered != numel:
        row = numel // shape[0] if shape else 1
        if boxes.covered % row or stop != boxes.covered or grouping != shape:
            raise SourceError(f"{where}: the shards hold {boxes.covered} of its {numel} elements")
        shape = grouping = (stop // row, *shape[1:])
    rows = np.array(boxes.rows, np.int64).reshape(-1, 3 + 3 * len(grouping))
    return View(shape, dtype, extents, rows, None if grouping == shape else grouping), boxes.again


def kept(view: View, again: Sequence[int]) -> View:
    """The elements of a box that lies once more, where they are taken from."""
    part, d = View(view.held_shape, view.dtype, view.extents, view.held), len(view.held_shape)
    for axis, (start, n) in enumerate(zip(again[3 : 3 + d], again[3 + d : 3 + 2 * d], strict=True)):
        part = part.narrow(axis, start, n)
    return part


def other(view: View, again: Sequence[int]) -> View:
    """The same elements, where they lie once more."""
    d = len(view.held_shape)
    size = again[3 + d : 3 + 2 * d]
    row = [*again[:3], *[0] * d, *again[3 + d :]]
    return View(tuple(size), view.dtype, view.extents, np.array([row], np.int64))


def _grouping(shape: tuple[int, ...], strides: set[int]) -> tuple[int, ...]:
    """The shape, its axes cut where pieces step: by each stride that fits between those there are."""
    levels = [math.prod(shape), *dense_strides(shape)] if shape else [1, 1]
    for s in sorted(strides - set(levels), reverse=True):
        above, below = min(n for n in levels if n > s), max(n for n in levels if n < s)
        if above % s == 0 and s % below == 0:
            levels.insert(next(i for i, n in enumerate(levels) if n < s), s)
    return tuple(a // b for a, b in itertools.pairwise(levels))


def _in_axes(
    where: str, start: int, offset: int, axes: Sequence[Axis], grouping: tuple[int, ...]
) -> Iterator[tuple[int, int, list[Axis]]]:
    """The piece as boxes of `grouping`: (start, offset, axes), where each axis runs along one of its axes.

    A run that goes past the end of an axis is cut in three: the rest of the first row, whole rows, and the
    beginning of the last. An axis whose step is none of `grouping`'s is cut into single elements."""
    steps = dense_strides(grouping)
    for i, (n, s, t) in enumerate(axes):
        others = [*axes[:i], *axes[i + 1 :]]
        at = [a for a, step in enumerate(steps) if step == s and grouping[a] > 1]
        if not at:
            if n > MAX_FRAGMENTS:
                raise SourceError(f"{where}: {n} elements {s} apart would each be a fragment")
            for k in range(n):
                yield from _in_axes(where, start + k * s, offset + k * t, others, grouping)
            return
        size = grouping[at[0]]
        first = start // s % size
        if first + n <= size:
            continue
        head = min(n, size - first) if first else 0
        full, tail = divmod(n - head, size)
        up = [(full, s * size, t * size)] if full > 1 else []
        for count, skipped, more in (
            (head, 0, []),
            (size if full else 0, head, up),
            (tail, head + full * size, []),
        ):
            if count:
                own = [(count, s, t)] if count > 1 else []
                joined = sorted([*others, *own, *more], key=lambda axis: -axis[1])
                yield from _in_axes(where, start + skipped * s, offset + skipped * t, joined, grouping)
        return
    yield start, offset, [*axes]


def _box(start: int, axes: Sequence[Axis], grouping: tuple[int, ...]) -> Box:
    """The box whose axes run along axes of `grouping`."""
    steps = dense_strides(grouping)
    origin = [start // step % n for step, n in zip(steps, grouping, strict=True)]
    size, stride = [1] * len(grouping), [0] * len(grouping)
    for n, s, t in axes:
        a = next(a for a, step in enumerate(steps) if step == s and grouping[a] > 1)
        size[a], stride[a] = n, t
    return origin, size, stride
