"""Views of what is stored: one strided run, many runs one after another, boxes, or a plan's own constant.

Law: a view that is made here lies inside its extents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .dtypes import DType
from .errors import SourceError, ViewError
from .extents import Constant, Extent, Extents
from .views import Rows, View, dense_strides, no_rows, zeros


def strided(
    extents: Extents,
    extent: int,
    dtype: DType,
    shape: Sequence[int],
    *,
    offset: int = 0,
    stride: Sequence[int] | None = None,
) -> View:
    """One fragment: element i.. is element `offset + sum(i * stride)` of extent number `extent`.

    `offset` and `stride` in elements of `dtype`; the default stride is dense, row-major. Raises
    SourceError when an element would lie outside the extent."""
    shape = tuple(shape)
    steps = dense_strides(shape) if stride is None else list(stride)
    if len(steps) != len(shape) or min(offset, *shape, *steps, 0) < 0:
        raise SourceError(f"tensor of shape {shape}, stride {tuple(steps)}, offset {offset} is no tensor")
    if 0 in shape:
        return View(shape, dtype, extents, no_rows(len(shape)))
    last = offset + sum([(n - 1) * s for n, s in zip(shape, steps, strict=True)])
    at = extents[extent]
    if (last + 1) * dtype.itemsize > at.nbytes:
        raise SourceError(
            f"tensor of shape {shape}, stride {tuple(steps)}, offset {offset} needs "
            f"{(last + 1) * dtype.itemsize} bytes of {at.key or 'its extent'}, which has {at.nbytes}"
        )
    row = [extent, dtype.code, offset] + [0] * len(shape) + list(shape) + steps
    return View(shape, dtype, extents, np.array([row], np.int64))


def runs(extents: Extents, dtype: DType, extent: Rows, offset: Rows, length: Rows) -> View:
    """The concatenation of 1-D runs: run k is `length[k]` elements from `offset[k]` of extent `extent[k]`.

    Equal to `cat` of `strided` views, in one step; empty runs are dropped. Raises SourceError when a
    run leaves its extent."""
    rows, _ = runs_of_many(extents, dtype, extent, offset, length, np.array([len(extent)]))
    return View((int(length.sum()),), dtype, extents, rows)


def runs_of_many(
    extents: Extents, dtype: DType, extent: Rows, offset: Rows, length: Rows, counts: Rows
) -> tuple[Rows, list[int]]:
    """The fragments of many one-axis views at once; view i is the concatenation of the next `counts[i]` runs
    (see `runs`).

    Returns the rows of all views and their borders: view i has the rows [borders[i], borders[i + 1])."""
    view = np.repeat(np.arange(len(counts)), counts)
    keep = length > 0
    if not keep.all():
        extent, offset, length, view = extent[keep], offset[keep], length[keep], view[keep]
    borders = np.searchsorted(view, np.arange(len(counts) + 1))
    begin = np.cumsum(length) - length
    first = begin[borders[view]]
    out = np.empty((len(extent), 6), np.int64)
    out[:, 0], out[:, 1], out[:, 2] = extent, dtype.code, offset
    out[:, 3], out[:, 4], out[:, 5] = begin - first, length, 1
    bad = (offset < 0) | ((offset + length) * dtype.itemsize > extents.nbytes[extent])
    if bad.any():
        k = int(np.argmax(bad))
        at, low, high = extents[int(extent[k])], int(offset[k]), int(offset[k] + length[k])
        raise SourceError(
            f"{getattr(at.where, 'path', 'buffer')}: {at.key or 'extent'} has {at.nbytes} bytes, "
            f"elements [{low}, {high}) of {dtype} need {high * dtype.itemsize}"
        )
    return out, borders.tolist()


def boxes(
    extents: Extents, dtype: DType, shape: tuple[int, ...], rows: Rows | Sequence[Sequence[int]]
) -> View:
    """The view whose fragments are `rows` (see `views`), which must tile it."""
    if 0 in shape:
        return zeros(shape, dtype)
    return View(shape, dtype, extents, np.asarray(rows, np.int64).reshape(len(rows), -1))


def check_tiles(shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Raises SourceError unless boxes, each (origin, size), are disjoint and cover `shape`."""
    table = np.array(boxes, np.int64).reshape(len(boxes), 2, len(shape))
    origin, size = table[:, 0], table[:, 1]
    stop = origin + size
    outside = ((origin < 0) | (size < 1) | (stop > np.array(shape, np.int64))).any(1)
    for k in np.flatnonzero(outside)[:1]:
        raise SourceError(f"a box of {size[k].tolist()} at {origin[k].tolist()} is outside {list(shape)}")
    have = sum(math.prod(row) for row in size.tolist())
    if have != math.prod(shape):
        raise SourceError(f"its boxes have {have} elements, {list(shape)} has {math.prod(shape)}")
    if not shape:
        return
    axis = int(np.argmax([len(np.unique(column)) for column in origin.T]))  # most boxes lie apart on this one
    order = np.argsort(origin[:, axis], kind="stable")
    origin, stop = origin[order], stop[order]
    reach = np.searchsorted(origin[:, axis], stop[:, axis])  # boxes that begin before this one ends
    for k in np.flatnonzero(reach > np.arange(len(origin)) + 1).tolist():
        rest = slice(k + 1, int(reach[k]))
        over = ((origin[rest] < stop[k]) & (origin[k] < stop[rest])).all(1)
        if over.any():
            j = k + 1 + int(np.argmax(over))
            raise SourceError(f"boxes at {origin[k].tolist()} and {origin[j].tolist()} overlap")


def constant(values: NDArray[np.generic], dtype: DType) -> View:
    """A view of bytes that the plan itself carries: slopes, ones, scalar scales.

    `values`' bytes must be those of `dtype` (a bfloat16 constant is given as uint16)."""
    data = np.asarray(values)
    if data.itemsize != dtype.itemsize:
        raise ViewError(
            f"constant: {data.dtype} has {data.itemsize} bytes an element, {dtype} {dtype.itemsize}"
        )
    held = Constant.of(data.tobytes())
    return strided(Extents([Extent(held, 0, held.nbytes, "constant")]), 0, dtype, data.shape)
