"""Matrices that lie nowhere: a view, an extent and rows of copies like any other, and no bytes.

What is computed when it is read (`lowrank`, `finishes`, `dequantised`, `prequantised`) lies in no file. It
has an extent all the same, in a Buffer of device COMPUTED: `computing` makes the elements that a copy asks
for, and whatever does not know how to refuses that device. Its rows lie `pitch` elements apart, more than
twice their width, so that no axis of a copy can run along both rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType
from ..extents import COMPUTED, Buffer, Extent, Extents
from ..stored import strided
from ..views import View

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def pitch(columns: int) -> int:
    """Elements from one row to the next."""
    return 2 * columns + 1


def nowhere(owner: object, shape: tuple[int, ...], dtype: DType, key: str) -> Extent:
    """An extent for a matrix of that shape that lies nowhere, its rows `pitch` apart; see `pitched`."""
    nbytes = shape[0] * pitch(shape[1]) * dtype.itemsize
    return Extent(Buffer(owner, 0, nbytes, COMPUTED), 0, nbytes, key)


def lies_nowhere(extent: Extent) -> bool:
    """Whether an extent was made by `nowhere`."""
    return isinstance(extent.where, Buffer) and extent.where.device == COMPUTED


def pitched(extents: Extents, index: int, dtype: DType, shape: tuple[int, ...]) -> View:
    """The view of the matrix whose extent (made by `nowhere`) is number `index` of the table."""
    return strided(extents, index, dtype, shape, stride=(pitch(shape[1]), 1))


def elements(
    first: int, shape: Sequence[int], strides: Sequence[int], columns: int
) -> tuple[Ints, Ints, list[tuple[int, int]]]:
    """Which rows and columns a box reads of a matrix that lies nowhere and has so many `columns`; `first`,
    `shape` and `strides` of the box are in elements.

    Returns the rows and the columns, both ascending, and for each axis of the box (step, 0 or 1): it steps so
    many of those rows (0) or columns (1). An axis cannot run along both, since the pitch is too wide."""
    step_down = pitch(columns)
    of_row, of_column = divmod(first, step_down)
    down, across = np.array([of_row]), np.array([of_column])
    axes: list[tuple[int, bool]] = []
    for axis in sorted((a for a, n in enumerate(shape) if n > 1), key=lambda a: -strides[a]):
        n, step = shape[axis], strides[axis]
        if step % step_down == 0:
            down = (down[:, None] + np.arange(n) * (step // step_down)).ravel()
        else:
            across = (across[:, None] + np.arange(n) * step).ravel()
        axes.append((axis, step % step_down == 0))
    steps, reach = [(0, 0)] * len(shape), [1, 1]
    for axis, of_rows in reversed(axes):
        which = 0 if of_rows else 1
        steps[axis] = reach[which], which
        reach[which] *= shape[axis]
    return down, across, steps


def runs(numbers: Ints) -> list[tuple[int, int]]:
    """Ascending numbers as ranges [start, stop)."""
    ends = np.flatnonzero(np.diff(numbers) != 1)
    first, last = (
        numbers[np.concatenate([[0], ends + 1])],
        numbers[np.concatenate([ends, [len(numbers) - 1]])],
    )
    return [(int(a), int(b) + 1) for a, b in zip(first, last, strict=True)]


def computed(places: Sequence[object]) -> dict[int, object]:
    """Number -> what makes it, for those of a binding's places that are computed when they are read."""
    return {
        i: p.owner
        for i, p in enumerate(places)
        if isinstance(p, Buffer) and p.device == COMPUTED and p.owner is not None
    }
