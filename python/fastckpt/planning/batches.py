"""Tensors become batches, which workers read, run and write: in files (`cut`), or in memory (`spread`).

Law: the rows of a batch write each of its bytes exactly once, and no other. Batches are cut on the borders of
a digest's leaves, so that digests are taken on the way out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..digest import LEAF
from ..errors import ViewError
from ..extents import COMPUTED, LINE, Buffer
from .axes import classify, clip
from .binding import Binding
from .copies import NOTHING, Chunk, Ints, Table, item_sizes, nbytes, span

THINNEST = 1 << 16
"""Bytes that are cut no further where a tensor picks a little of many pages."""

NO_LEAVES: Ints = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive output bytes [start, stop) of one file, and what fills them.

    `rows`: sources bound, destinations counted from `start`. `leaf_offset`, `leaf_size`, `leaf`: the digest
    leaves that lie in it, as bytes from `start` and as indices of the plan's leaves. See `spread` for what
    it is where every tensor is memory of its own."""

    file: int
    start: int
    stop: int
    rows: Table
    leaf_offset: Ints
    leaf_size: Ints
    leaf: Ints


@dataclass(frozen=True, slots=True)
class Slots:
    """Where tensors lie in the output, as columns in the plan's order: the file, the bytes from its
    start, the size in bytes, and the number of the first digest leaf."""

    file: Ints
    offset: Ints
    nbytes: Ints
    leaf: Ints

    @staticmethod
    def of(file: Sequence[int] | Ints, offset: Sequence[int] | Ints, nbytes: Sequence[int] | Ints) -> Slots:
        """The columns, with leaves numbered in the same order."""
        where = np.asarray(file, np.int64), np.asarray(offset, np.int64), np.asarray(nbytes, np.int64)
        leaves = -(-where[2] // LEAF)
        return Slots(*where, np.cumsum(leaves) - leaves)

    @property
    def leaves(self) -> int:
        """The number of leaves of all tensors."""
        return int(self.leaf[-1] - (-self.nbytes[-1] // LEAF)) if len(self.leaf) else 0


def cut(
    chunk: Chunk,
    first: int,
    slots: Slots,
    binding: Binding,
    *,
    stage: int = LEAF,
    band: int = 8 * LEAF,
    thin: int | None = None,
    in_order: bool = False,
) -> Iterator[Batch]:
    """Batches of the chunk's tensors, the plan's `first` and on, in the order their sources lie: ranks that
    share pages of a source follow each other. `in_order`: in the order of the output instead.

    A batch holds at most `stage` bytes of output, or `band` bytes of one tensor that is transposed on
    the way (its source rows are long, so narrow bands would read few bytes of many pages), or `thin` bytes
    (None: `stage`) of one that picks a little of many pages; leaves are whole where these are multiples of
    LEAF."""
    tensors = slice(first, first + chunk.count)
    file, offset, size = slots.file[tensors], slots.offset[tensors], slots.nbytes[tensors]
    rows = binding.bind(chunk.rows)
    # One address space for the whole chunk: tensors in file order, each at the sum of the sizes before it.
    order = np.lexsort((offset, file))
    base = np.empty(chunk.count, np.int64)
    base[order] = np.cumsum(size[order]) - size[order]
    order = order[size[order] > 0]
    if not len(order):
        return
    limit = np.full(chunk.count, stage)
    if thin is not None:
        limit[_thinness(rows, chunk, nbytes(rows, "src")) > 1] = thin
    limit[_transposed(rows, chunk)] = band
    parts = _parts(file[order], offset[order], size[order], limit[order], stage)
    starts = [int(base[order[k]]) + low for k, _, low, _ in parts]
    edges = np.array([*starts, int(size.sum())], np.int64)
    rows, _, at = _at_edges(rows, chunk.tensor, base, size, edges)
    by_source = np.lexsort((rows["src"], rows["src_buffer"], at))
    rows, at = rows[by_source], at[by_source]
    rows["dst"] -= edges[at].astype(np.uint64)
    classify(rows)
    borders = np.searchsorted(at, np.arange(len(parts) + 1))
    lead = rows[borders[:-1]]
    turn = np.arange(len(parts)) if in_order else np.lexsort((lead["src"], lead["src_buffer"]))
    for i in turn.tolist():
        k, after, low, high = parts[i]
        own, inside = order[k], order[k:after]
        leaf_offset, leaf_size, leaf = offset[inside] - offset[own], size[inside], slots.leaf[first + inside]
        if after == k + 1:  # one, or a part of it
            leaf_offset = np.arange(0, high - low, LEAF, dtype=np.int64)
            leaf_size = np.minimum(LEAF, high - low - leaf_offset)
            leaf = leaf + (low + leaf_offset) // LEAF
        start = int(offset[own])
        part = rows[borders[i] : borders[i + 1]]
        yield Batch(int(file[own]), start + low, start + high, part, leaf_offset, leaf_size, leaf)


def _parts(file: Ints, offset: Ints, size: Ints, limit: Ints, stage: int) -> list[tuple[int, int, int, int]]:
    """What each batch holds of tensors in file order: tensors [k, after), bytes [low, high) from the start of
    tensor k. Neighbours of a leaf at most share one of `stage` bytes; a larger one has parts of `limit`."""
    small = size <= np.minimum(limit, LEAF)
    meets = small[1:] & small[:-1] & (file[1:] == file[:-1]) & (offset[1:] == (offset + size)[:-1])
    runs = np.append(np.flatnonzero(~meets) + 1, len(size))
    ends = np.cumsum(size)
    parts: list[tuple[int, int, int, int]] = []
    k = 0
    while k < len(size):
        n = int(size[k])
        if small[k]:
            run = ends[k + 1 : runs[np.searchsorted(runs, k, "right")]]
            after = k + 1 + int(np.searchsorted(run, ends[k] - n + stage, "right"))
            parts.append((k, after, 0, int(ends[after - 1] - ends[k]) + n))
        else:
            after, step = k + 1, int(limit[k])
            parts += [(k, after, low, min(n, low + step)) for low in range(0, n, step)]
        k = after
    return parts


def spread(
    chunk: Chunk,
    first: int,
    slots: Slots,
    binding: Binding,
    *,
    stage: int,
    band: int,
    by_file: bool = False,
) -> Iterator[Batch]:
    """Batches of about `stage` bytes of tensors, each memory of its own, in the order of the source.

    Rows are cut to at most `stage` bytes, `band` of a tensor that is transposed on the way, and less of one
    that picks a little of many pages: the others that want the rest of those pages are then not far. What is
    made when it is read has no pages, and is cut between its lines.
    `dst_buffer` is the plan's number of a tensor and `dst` counts from its start; a batch runs from 0 to its
    bytes and has no leaves. `by_file`: none has tensors of two files; else `file` is 0."""
    tensors = slice(first, first + chunk.count)
    size, file = slots.nbytes[tensors], slots.file[tensors]
    rows = binding.bind(chunk.rows)
    # One address space for the whole chunk: each tensor at the sum of the sizes before it.
    base = np.cumsum(size) - size
    nowhere = _lies_nowhere(rows, binding)
    thin = _thinness(rows, chunk, np.where(nowhere, 0, nbytes(rows, "src")))
    unit = np.full(chunk.count, LINE)
    np.maximum.at(unit, chunk.tensor[nowhere], rows["dst_stride"][nowhere, -2])
    step = np.maximum(stage // thin, min(stage, THINNEST))
    unit = np.where(unit > step, LINE, unit)
    step = step // unit * unit
    step = np.where(_transposed(rows, chunk), band, step)
    pieces = -(-size // step)
    within = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    edges = np.append(np.repeat(base, pieces) + within * np.repeat(step, pieces), size.sum())
    rows, tensor, _ = _at_edges(rows, chunk.tensor, base, size, edges)
    owner = file[tensor] if by_file else np.zeros(len(rows), np.int64)
    order = np.lexsort((rows["src"], rows["src_buffer"], owner))
    rows, tensor, owner = rows[order], tensor[order], owner[order]
    rows["dst"] -= base[tensor].astype(np.uint64)
    rows["dst_buffer"] = first + tensor
    classify(rows)
    written = nbytes(rows, "dst")
    stop = np.cumsum(written)
    turn = (stop - written) // stage
    changes = (turn[1:] != turn[:-1]) | (owner[1:] != owner[:-1])
    borders = [0, *(np.flatnonzero(changes) + 1).tolist(), len(rows)] if len(rows) else []
    for a, b in itertools.pairwise(borders):
        made = int(stop[b - 1] - stop[a] + written[a])
        yield Batch(int(owner[a]), 0, made, rows[a:b], NO_LEAVES, NO_LEAVES, NO_LEAVES)


def _lies_nowhere(rows: Table, binding: Binding) -> NDArray[np.bool_]:
    """Which bound rows read what is made for them."""
    made = [isinstance(p, Buffer) and p.device == COMPUTED for p in binding.places]
    return np.array([*made, False]).take(rows["src_buffer"], mode="clip")


def _transposed(rows: Table, chunk: Chunk) -> NDArray[np.bool_]:
    """Which of the chunk's tensors are transposed on the way."""
    out = np.zeros(chunk.count, bool)
    turned = (rows["src_buffer"] != NOTHING) & (rows["shape"][:, -1] > 1)
    turned &= rows["src_stride"][:, -1] != item_sizes(rows["src_dtype"])
    out[chunk.tensor[turned]] = True
    return out


def _thinness(rows: Table, chunk: Chunk, moved: Ints) -> Ints:
    """How many times the bytes that it moves each of the chunk's tensors spans in its source, rounded up."""
    low, high = span(rows, "src")
    out = np.ones(chunk.count, np.int64)
    np.maximum.at(out, chunk.tensor, np.where(moved == 0, 1, -(-(high - low) // np.maximum(moved, 1))))
    return out


def _at_edges(rows: Table, tensor: Ints, base: Ints, size: Ints, edges: Ints) -> tuple[Table, Ints, Ints]:
    """The rows with tensor t from `base[t]` on, cut where `edges` are; the tensor of each, and between which
    edges it lies.

    Raises ViewError for a row that would write outside its tensor."""
    rows["dst"] += base[tensor].astype(np.uint64)
    low, high = span(rows, "dst")
    if (low < base[tensor]).any() or (high > (base + size)[tensor]).any():
        raise ViewError("plan: a row writes outside its tensor")
    one = np.searchsorted(edges, low, "right") - 1
    two = np.searchsorted(edges, high - 1, "right") - 1
    cross = one != two
    if not cross.any():
        return rows, tensor, one
    times = two - one + 1
    times[~cross] = 1
    keep = np.repeat(np.arange(len(rows)), times)
    at = one[keep] + np.arange(len(keep)) - np.repeat(np.cumsum(times) - times, times)
    spans = cross[keep]
    whole, part = keep[~spans], keep[spans]
    clipped, origin = clip(rows[part], edges[at[spans]], edges[at[spans] + 1])
    rows = np.concatenate([rows[whole], clipped])
    tensor = np.concatenate([tensor[whole], tensor[part][origin]])
    return rows, tensor, np.concatenate([at[~spans], at[spans][origin]])
