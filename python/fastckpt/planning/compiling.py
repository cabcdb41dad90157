"""From targets to rows over extents: what `binding` and `batches` then put at files and buffers.

Law: a compiled row counts from the start of its extent and of its tensor, so that it can be kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..dtypes import DTYPES
from ..errors import ViewError
from ..extents import Extents
from ..target import Target
from ..views import ZERO, View, dense_strides
from .axes import coalesce, with_axes
from .copies import AXES, COPY, LONGEST, NOTHING, Chunk, Ints, Table, item_sizes

WINDOW = 1 << 12
"""Fragments compiled at once: the planner's working memory."""


def compile(targets: Sequence[Target], extents: Extents) -> tuple[Chunk, Extents]:
    """Copy rows of `targets`, at most four axes each, and the extent table they index.

    `extents` is the checkpoint's table; a target over another (a constant) adds to it. Raises the
    target's own error with its name put before."""
    own = extents
    tables: dict[int, Ints] = {}
    parts: list[tuple[Ints, Table]] = []
    by_ndim: dict[int, list[tuple[int, View]]] = {}
    for i, target in enumerate(targets):
        view = target.view
        if len(view.held):
            by_ndim.setdefault(len(view.held_shape), []).append((i, view))
    for ndim, chosen in by_ndim.items():
        columns = [view.held for _, view in chosen]
        for k, (_, view) in enumerate(chosen):
            if view.extents is own or not len(view.extents):
                continue
            if id(view.extents) not in tables:
                extents, moved = extents.union(view.extents)
                tables[id(view.extents)] = np.array([*moved, ZERO], np.int64)
            columns[k] = view.held.copy()
            columns[k][:, 0] = tables[id(view.extents)][view.held[:, 0]]
        counts = np.array([len(rows) for rows in columns])
        tensor = np.repeat(np.array([i for i, _ in chosen], np.int64), counts)
        codes = np.repeat(np.array([v.dtype.code for _, v in chosen], np.int64), counts)
        shapes = [v.held_shape for _, v in chosen]
        steps = {shape: dense_strides(shape) for shape in set(shapes)}
        dense = np.array([steps[shape] for shape in shapes], np.int64).reshape(len(chosen), ndim)
        strides = np.repeat(dense, counts, axis=0) * item_sizes(codes)[:, None]
        parts.append(_compile(np.concatenate(columns), ndim, strides, codes, tensor))
    if not parts:
        return Chunk(len(targets), np.empty(0, COPY), np.empty(0, np.int64)), extents
    tensor = np.concatenate([t for t, _ in parts])
    table = np.concatenate([r for _, r in parts])
    order = np.argsort(tensor, kind="stable")
    return Chunk(len(targets), table[order], tensor[order]), extents


def single(view: View) -> Table | None:
    """The row that `compile` makes of a view of one fragment, made sooner; None for any other view."""
    if len(view.held) != 1 or view.numel > LONGEST:
        return None
    extent, code, offset, *rest = view.held[0].tolist()
    axes: list[tuple[int, int]] = []  # elements and source stride, innermost first
    for n, step in zip(view.held_shape[::-1], rest[: -len(view.held_shape) - 1 : -1], strict=True):
        if axes and step == axes[-1][0] * axes[-1][1]:
            axes[-1] = n * axes[-1][0], axes[-1][1]
        elif n != 1:
            axes.append((n, step))
    if extent == ZERO or len(axes) > AXES:
        return None
    row = np.zeros(1, COPY)
    src_item, dst_item = DTYPES[code].itemsize, view.dtype.itemsize
    row["src"], row["src_buffer"], row["shape"] = offset * src_item, extent, 1
    row["src_dtype"], row["dst_dtype"] = code, view.dtype.code
    step_out = dst_item
    for axis, (n, step) in enumerate(axes, 1):
        row["shape"][0, -axis], row["src_stride"][0, -axis] = n, step * src_item
        row["dst_stride"][0, -axis] = step_out
        step_out *= n
    return row


def _compile(fragments: Ints, ndim: int, strides: Ints, codes: Ints, tensor: Ints) -> tuple[Ints, Table]:
    """The rows of fragments of one number of axes, with the tensor each belongs to."""
    zero = fragments[:, 0] == ZERO
    stored = np.where(zero, codes, fragments[:, 1])
    item = item_sizes(stored)
    origin, size = fragments[:, 3 : 3 + ndim], fragments[:, 3 + ndim : 3 + 2 * ndim]
    size, src_stride, dst_stride = coalesce(size, fragments[:, 3 + 2 * ndim :] * item[:, None], strides)
    if size.size and int(size.max()) > LONGEST:
        raise ViewError(f"plan: an axis of {int(size.max())} elements; a copy row has at most {LONGEST}")
    table = np.zeros(len(size), COPY)
    table["src"], table["dst"] = np.where(zero, 0, fragments[:, 2] * item), (origin * strides).sum(axis=1)
    table["src_buffer"] = np.where(zero, NOTHING, fragments[:, 0])
    table["src_dtype"], table["dst_dtype"] = stored, codes
    table, which = with_axes(table, size, np.where(zero[:, None], 0, src_stride), dst_stride)
    return tensor[which], table


def in_windows(
    targets: Iterable[tuple[int, Target]], extents: Extents
) -> Iterator[tuple[list[tuple[int, Target]], Chunk, Extents]]:
    """`compile` of a stream of (serving rank, target), WINDOW fragments at a time: each window, its rows, and
    the extent table they index.

    Views are let go behind, so that a plan costs its rows, not its fragments."""
    window: list[tuple[int, Target]] = []
    held = 0
    for item in targets:
        window.append(item)
        held += 1 + len(item[1].view.held)
        if held >= WINDOW:
            chunk, extents = compile([t for _, t in window], extents)
            yield window, chunk, extents
            window, held = [], 0
    if window:
        chunk, extents = compile([t for _, t in window], extents)
        yield window, chunk, extents
