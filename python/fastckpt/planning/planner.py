"""From targets to Copy rows: compile, coalesce, cut into batches, order, bind.

Rows live in one numpy array whose dtype IS `struct Copy` of `csrc/copy.h`. They hold offsets, never
addresses: a compiled row counts source bytes from the start of its extent and destination bytes from the
start of its tensor; `bind` moves the first to files and `cut` the second to batches. So compiled rows
are data that can be kept, hashed, sent away and bound again to files whose headers moved.

Law: the rows of a tensor write each of its bytes exactly once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import ViewError
from ..extents import COMPUTED, LINE, Buffer, Extents, File
from ..target import Target
from ..views import ZERO, View, dense_strides

Ints = NDArray[np.int64]
Table = NDArray[np.void]

AXES = 4
"""Axes of a Copy row."""

COPY = np.dtype(
    [
        ("src", "<u8"),
        ("dst", "<u8"),
        ("src_stride", "<i8", (AXES,)),
        ("dst_stride", "<i8", (AXES,)),
        ("shape", "<u4", (AXES,)),
        ("src_buffer", "<u4"),
        ("dst_buffer", "<u4"),
        ("first_tile", "<u8"),
        ("src_dtype", "u1"),
        ("dst_dtype", "u1"),
        ("path", "u1"),
        ("reserved", "u1", (13,)),
    ]
)
"""`struct Copy`, field by field (docs/formats.md)."""

WORDS = COPY.itemsize // 8
"""Words of eight bytes of a row."""

NOTHING = 0xFFFFFFFF
"""The source buffer of a row that writes zeros."""

LONGEST = (1 << 32) - 1
"""Elements of one axis of a Copy row."""

LEAF = 1 << 20
"""Bytes of a digest's leaf; batches are cut on leaf borders, so that digests are taken on the way out."""

ROWS, TRANSPOSE, GENERAL = 0, 1, 2
"""Values of a row's `path`."""

WINDOW = 1 << 13
"""Fragments compiled at once: the planner's working memory."""

_ITEM = np.array([d.itemsize for d in DTYPES], np.int64)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of `count` consecutive targets: `tensor` is each row's target, counted from the first.

    `src` counts from the start of extent `src_buffer`, `dst` from the start of the target."""

    count: int
    rows: Table
    tensor: Ints


@dataclass(frozen=True, slots=True)
class Kept:
    """A Chunk put away: of the 8-byte words of its rows only those that differ between rows.

    Rows of many small tensors agree in all but a few words, so they take a quarter of the place and less."""

    first: NDArray[np.uint64]
    which: NDArray[np.intp]
    words: NDArray[np.uint64]
    count: int
    tensor: NDArray[np.uint32]

    @staticmethod
    def of(chunk: Chunk) -> Kept:
        """The chunk put away."""
        words = np.ascontiguousarray(chunk.rows).view(np.uint64).reshape(-1, WORDS)
        first = words[0].copy() if len(words) else np.zeros(WORDS, np.uint64)
        which = np.flatnonzero((words != first).any(axis=0))
        return Kept(first, which, words[:, which], chunk.count, chunk.tensor.astype(np.uint32))

    def chunk(self) -> Chunk:
        """The chunk as it was."""
        words = np.empty((len(self.tensor), WORDS), np.uint64)
        words[:] = self.first
        words[:, self.which] = self.words
        return Chunk(self.count, words.reshape(-1).view(COPY), self.tensor.astype(np.int64))

    @property
    def nbytes(self) -> int:
        """The bytes it takes."""
        return self.words.nbytes + self.tensor.nbytes


# ---- compile ----


def compile(targets: Sequence[Target], extents: Extents) -> tuple[Chunk, Extents]:
    """Copy rows of `targets`, at most four axes each, and the extent table they index.

    `extents` is the checkpoint's table; a target over another (a constant) adds to it. Raises the
    target's own error with its name put before."""
    tables: dict[int, Ints | None] = {id(extents): None}
    parts: list[tuple[Ints, Table]] = []
    by_ndim: dict[int, list[tuple[int, View]]] = {}
    for i, target in enumerate(targets):
        if len(target.view.held):
            by_ndim.setdefault(len(target.view.boxes), []).append((i, target.view))
    for ndim, chosen in by_ndim.items():
        columns = []
        for _, view in chosen:
            if len(view.extents) and id(view.extents) not in tables:
                extents, moved = extents.union(view.extents)
                tables[id(view.extents)] = np.array([*moved, ZERO], np.int64)
            moved_to = tables.get(id(view.extents))
            if moved_to is None:
                columns.append(view.held)
            else:
                rows = view.held.copy()
                rows[:, 0] = moved_to[rows[:, 0]]
                columns.append(rows)
        counts = np.array([len(v.held) for _, v in chosen])
        tensor = np.repeat(np.array([i for i, _ in chosen], np.int64), counts)
        codes = np.repeat(np.array([v.dtype.code for _, v in chosen], np.int64), counts)
        steps = {boxes: dense_strides(boxes) for boxes in {v.boxes for _, v in chosen}}
        dense = np.array([steps[v.boxes] for _, v in chosen], np.int64).reshape(len(chosen), ndim)
        strides = np.repeat(dense, counts, axis=0) * _ITEM[codes][:, None]
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
    for n, step in zip(view.boxes[::-1], rest[: -len(view.boxes) - 1 : -1], strict=True):
        if axes and n != 1 and step == axes[-1][0] * axes[-1][1]:
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
    item = _ITEM[stored]
    origin, size = fragments[:, 3 : 3 + ndim], fragments[:, 3 + ndim : 3 + 2 * ndim]
    size, src_stride, dst_stride = coalesce(size, fragments[:, 3 + 2 * ndim :] * item[:, None], strides)
    if size.size and int(size.max()) > LONGEST:
        raise ViewError(f"plan: an axis of {int(size.max())} elements; a copy row has at most {LONGEST}")
    table = np.zeros(len(size), COPY)
    table["src"], table["dst"] = np.where(zero, 0, fragments[:, 2] * item), (origin * strides).sum(axis=1)
    table["src_buffer"] = np.where(zero, NOTHING, fragments[:, 0])
    table["src_dtype"], table["dst_dtype"] = stored, codes
    table, which = _with_axes(table, size, np.where(zero[:, None], 0, src_stride), dst_stride)
    return tensor[which], table


def _with_axes(table: Table, size: Ints, src_stride: Ints, dst_stride: Ints) -> tuple[Table, Ints]:
    """The rows with these axes, a fifth one unrolled into rows, and the number of the row that each was."""
    which = np.arange(len(table))
    src, dst = table["src"].astype(np.int64), table["dst"].astype(np.int64)
    while size.shape[1] > AXES:
        times = size[:, 0]
        step = np.arange(int(times.sum())) - np.repeat(np.cumsum(times) - times, times)
        src = np.repeat(src, times) + step * np.repeat(src_stride[:, 0], times)
        dst = np.repeat(dst, times) + step * np.repeat(dst_stride[:, 0], times)
        axes = (size, src_stride, dst_stride)
        size, src_stride, dst_stride = (np.repeat(a[:, 1:], times, axis=0) for a in axes)
        which = np.repeat(which, times)
    out: Table = table[which]
    out["src"], out["dst"] = src, dst
    out["src_stride"], out["dst_stride"], out["shape"] = src_stride, dst_stride, size
    return out, which


def upright(rows: Table, width: int, count: int) -> Table:
    """Rows that fill `count` lines of `width` bytes, as rows that fill the transpose of that matrix."""
    item = _ITEM[rows["dst_dtype"]]
    size, src, dst = (rows[name].astype(np.int64) for name in ("shape", "src_stride", "dst_stride"))
    # An axis that runs on into the next lines becomes two.
    inner = np.where((dst < width) & ((size - 1) * dst >= width), width // np.maximum(dst, 1), size)
    pairs = (size // inner, inner), (src * inner, src), (dst * inner, dst)
    size, src, dst = (np.concatenate(pair, axis=1) for pair in pairs)
    dst = np.where(dst % width == 0, dst // width * item[:, None], dst * count)
    order = np.argsort(-dst, axis=1, kind="stable")
    axes = coalesce(*(np.take_along_axis(a, order, axis=1) for a in (size, src, dst)))
    out = rows.copy()
    start = rows["dst"].astype(np.int64)
    out["dst"] = start // width * item + start % width * count
    out, _ = _with_axes(out, *axes)
    classify(out)
    return out


def coalesce(size: Ints, src: Ints, dst: Ints) -> tuple[Ints, Ints, Ints]:
    """Drop unit axes and join neighbours that are one stride on both sides, row by row.

    No axis grows beyond LONGEST. Returns the three arrays right-aligned with at least AXES axes, leading
    ones (1, 0, 0). Law: visits the same (source, destination) pairs in the same order."""
    n, ndim = size.shape
    width = max(AXES, ndim)
    out = np.zeros((3, n, width), np.int64)
    out[0] = 1
    at = np.full(n, width - 1)  # the axis being filled
    every = np.arange(n)
    for a in range(ndim - 1, -1, -1):
        length, s, d = size[:, a], src[:, a], dst[:, a]
        have, hs, hd = out[0][every, at], out[1][every, at], out[2][every, at]
        real = length != 1
        joins = real & (have != 1) & (s == have * hs) & (d == have * hd) & (length <= LONGEST // have)
        fresh = real & ~joins
        at = np.where(fresh & (have != 1), at - 1, at)
        out[0][every, at] = np.where(joins, have * length, np.where(fresh, length, out[0][every, at]))
        out[1][every, at] = np.where(fresh, s, out[1][every, at])
        out[2][every, at] = np.where(fresh, d, out[2][every, at])
    used = max(AXES, int(width - at.min()) if n else AXES)
    return out[0][:, width - used :], out[1][:, width - used :], out[2][:, width - used :]


def compiled(
    targets: Iterable[tuple[int, Target]], extents: Extents
) -> Iterator[tuple[list[tuple[int, Target]], Chunk, Extents]]:
    """Compile a stream of (serving rank, target) in windows of WINDOW fragments.

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


# ---- bind: extents become source buffers ----


@dataclass(frozen=True, slots=True)
class Binding:
    """Where each extent lies: `places` are the distinct files and buffers, in order of first use;
    extent i is `nbytes[i]` bytes from `offset[i]` of place `place[i]`."""

    places: tuple[File | Buffer, ...]
    place: Ints
    offset: Ints
    nbytes: Ints

    @staticmethod
    def of(extents: Extents) -> Binding:
        """The binding of an extent table."""
        index: dict[int | File, int] = {}
        places: list[File | Buffer] = []
        place = np.empty(len(extents), np.int64)
        offset = np.empty(len(extents), np.int64)
        size = np.empty(len(extents), np.int64)
        for i, extent in enumerate(extents):
            key = extent.where if isinstance(extent.where, File) else id(extent.where)
            if key not in index:
                index[key] = len(places)
                places.append(extent.where)
            place[i], offset[i], size[i] = index[key], extent.offset, extent.nbytes
        return Binding(tuple(places), place, offset, size)

    def bind(self, rows: Table) -> Table:
        """The rows with `src_buffer` a place and `src` counted from that place's start.

        Raises ViewError for a row that would read outside its extent: a plan of other files."""
        out: Table = rows.copy()
        real = out["src_buffer"] != NOTHING
        extent = out["src_buffer"][real].astype(np.int64)
        if len(extent) and int(extent.max()) >= len(self.place):
            raise ViewError(f"plan: a row reads extent {int(extent.max())} of {len(self.place)}")
        low, high = span(out[real], "src")
        bad = (low < 0) | (high > self.nbytes[extent])
        if bad.any():
            i = int(np.argmax(bad))
            raise ViewError(
                f"plan: a row reads bytes [{int(low[i])}, {int(high[i])}) of extent {int(extent[i])}, "
                f"which has {int(self.nbytes[extent[i]])}"
            )
        out["src"][real] += self.offset[extent].astype(np.uint64)
        out["src_buffer"][real] = self.place[extent]
        return out


def span(rows: Table, side: str) -> tuple[Ints, Ints]:
    """The first and one past the last byte each row touches on `side` ("src" or "dst")."""
    item = _ITEM[rows[f"{side}_dtype"]]
    start = rows[side].astype(np.int64)
    reach = ((rows["shape"].astype(np.int64) - 1) * rows[f"{side}_stride"]).sum(axis=1)
    return start, start + reach + item


def nbytes(rows: Table, side: str) -> Ints:
    """The bytes each row moves on `side`; zero rows read none."""
    moved = rows["shape"].astype(np.int64).prod(axis=1) * _ITEM[rows[f"{side}_dtype"]]
    return np.where(rows["src_buffer"] == NOTHING, 0, moved) if side == "src" else moved


# ---- cut: tensors become batches ----


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
    (None: `stage`) of one that picks a little of many pages; all are multiples of LEAF."""
    count = chunk.count
    if count == 0:
        return
    tensors = slice(first, first + count)
    file, offset, size = slots.file[tensors], slots.offset[tensors], slots.nbytes[tensors]
    order = np.lexsort((offset, file))
    rows = binding.bind(chunk.rows)

    # One address space for the whole chunk: tensors in file order, each at the sum of the sizes before it.
    base = np.empty(count, np.int64)
    base[order] = np.cumsum(size[order]) - size[order]
    starts: list[int] = []
    heads: list[tuple[int, int, int, int, int]] = []  # file, start, stop, first, last (in `order`)
    open_at = -1
    sizes, files, offsets = size.tolist(), file.tolist(), offset.tolist()
    most = np.full(count, stage)
    if thin is not None:
        most[_thinness(rows, chunk, nbytes(rows, "src")) > 1] = thin
    limits, bases = np.where(_transposed(rows, chunk), band, most).tolist(), base.tolist()
    for k, t in enumerate(order.tolist()):
        n = sizes[t]
        if n == 0:
            continue
        if open_at >= 0:
            f, a, b, k0, _ = heads[open_at]
            if n <= LEAF and f == files[t] and b == offsets[t] and b + n - a <= stage:
                heads[open_at] = (f, a, b + n, k0, k)
                continue
        for a in range(0, n, limits[t]):
            starts.append(bases[t] + a)
            heads.append((files[t], offsets[t] + a, offsets[t] + min(n, a + limits[t]), k, k))
        open_at = len(heads) - 1 if n <= LEAF else -1
    if not heads:
        return

    edges = np.array([*starts, int(size.sum())], np.int64)
    rows, _, at = _at_edges(rows, chunk.tensor, base, size, edges)
    by_source = np.lexsort((rows["src"], rows["src_buffer"], at))
    rows, at = rows[by_source], at[by_source]
    rows["dst"] -= edges[at].astype(np.uint64)
    classify(rows)
    borders = np.searchsorted(at, np.arange(len(heads) + 1))
    lead = rows[borders[:-1]]
    turn = np.arange(len(heads)) if in_order else np.lexsort((lead["src"], lead["src_buffer"]))
    for i in turn.tolist():
        f, a, b, k0, k1 = heads[i]
        if k0 == k1:
            t = int(order[k0])
            skip = a - offsets[t]
            leaf0 = int(slots.leaf[first + t]) + skip // LEAF
            leaf_offset = np.arange(0, b - a, LEAF, dtype=np.int64)
            leaf = leaf0 + np.arange(len(leaf_offset), dtype=np.int64)
            leaf_size = np.minimum(LEAF, b - a - leaf_offset)
        else:  # several whole tensors, none larger than a leaf
            inside = order[k0 : k1 + 1]
            inside = inside[size[inside] > 0]
            leaf_offset, leaf_size, leaf = offset[inside] - a, size[inside], slots.leaf[first + inside]
        yield Batch(f, a, b, rows[borders[i] : borders[i + 1]], leaf_offset, leaf_size, leaf)


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


THINNEST = 1 << 16
"""Bytes that are cut no further where a tensor picks a little of many pages."""

NO_LEAVES: Ints = np.empty(0, np.int64)


def _lies_nowhere(rows: Table, binding: Binding) -> NDArray[np.bool_]:
    """Which bound rows read what is made for them."""
    made = [isinstance(p, Buffer) and p.device == COMPUTED for p in binding.places]
    return np.array([*made, False]).take(rows["src_buffer"], mode="clip")


def _transposed(rows: Table, chunk: Chunk) -> NDArray[np.bool_]:
    """Which of the chunk's tensors are transposed on the way."""
    out = np.zeros(chunk.count, bool)
    turned = (rows["src_buffer"] != NOTHING) & (rows["shape"][:, -1] > 1)
    turned &= rows["src_stride"][:, -1] != _ITEM[rows["src_dtype"]]
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


def clip(rows: Table, low: Ints, high: Ints) -> tuple[Table, Ints]:
    """The parts of rows whose destination lies in [low, high) (bytes, same origin as `dst`), and which
    row each part came from.

    Destination strides descend and nest, so a range of the destination is, axis by axis, a partial
    first index, whole indices and a partial last one: at most seven parts a row."""
    origin = np.arange(len(rows))
    low = low - rows["dst"].astype(np.int64)
    high = high - rows["dst"].astype(np.int64)
    done: list[Table] = []
    came: list[Ints] = []
    for axis in range(AXES):
        if not len(rows):
            break
        shape, strides = rows["shape"].astype(np.int64), rows["dst_stride"]
        step = np.maximum(strides[:, axis], 1)
        width = ((shape[:, axis + 1 :] - 1) * strides[:, axis + 1 :]).sum(axis=1) + _ITEM[rows["dst_dtype"]]
        count = shape[:, axis]
        touch0 = np.maximum(0, (low - width) // step + 1)
        touch1 = np.minimum(count - 1, -(-high // step) - 1)
        full0 = np.maximum(0, -(-low // step))
        full1 = np.minimum(count, (high - width) // step + 1)
        some = full1 > full0
        if some.any():
            done.append(_at(rows[some], axis, full0[some], (full1 - full0)[some]))
            came.append(origin[some])
        first = (touch0 <= touch1) & ((touch0 < full0) | ~some)
        second = (touch1 >= full1) & (touch1 > touch0)
        again, lows, highs, origins = [], [], [], []
        for mask, index in ((first, touch0), (second, touch1)):
            if mask.any():
                i = index[mask]
                again.append(_at(rows[mask], axis, i, np.ones(len(i), np.int64)))
                lows.append(low[mask] - i * strides[mask, axis])
                highs.append(high[mask] - i * strides[mask, axis])
                origins.append(origin[mask])
        if not again:
            break
        rows, origin = np.concatenate(again), np.concatenate(origins)
        low, high = np.concatenate(lows), np.concatenate(highs)
    if not done:
        return np.empty(0, COPY), np.empty(0, np.int64)
    return np.concatenate(done), np.concatenate(came)


def _at(rows: Table, axis: int, start: Ints, count: Ints) -> Table:
    """The rows narrowed on one axis to [start, start + count)."""
    out: Table = rows.copy()
    out["src"] += (start * rows["src_stride"][:, axis]).astype(np.uint64)
    out["dst"] += (start * rows["dst_stride"][:, axis]).astype(np.uint64)
    out["shape"][:, axis] = count
    return out


def classify(rows: Table) -> None:
    """Name each row's path; a transpose has its source-contiguous axis moved to axis 2."""
    src_item, dst_item = _ITEM[rows["src_dtype"]], _ITEM[rows["dst_dtype"]]
    shape = rows["shape"]
    last = shape[:, -1] == 1
    dst_dense = last | (rows["dst_stride"][:, -1] == dst_item)
    src_dense = last | (rows["src_stride"][:, -1] == src_item) | (rows["src_buffer"] == NOTHING)
    rows["path"] = np.where(dst_dense & src_dense, ROWS, GENERAL)
    for axis in range(AXES - 1):
        turned = (rows["path"] == GENERAL) & dst_dense & (shape[:, axis] > 1)
        turned &= rows["src_stride"][:, axis] == src_item
        if turned.any():
            rows["path"][turned] = TRANSPOSE
            if axis != AXES - 2:
                for name in ("src_stride", "dst_stride", "shape"):
                    column = rows[name]
                    moved = column[turned]
                    order = [a for a in range(AXES - 1) if a != axis] + [axis, AXES - 1]
                    column[turned] = moved[:, order]


# ---- who runs rows ----


class Runner(Protocol):
    """An executor bound to its source buffers."""

    def run(self, rows: Table, destinations: Sequence[Buffer], threads: int = 1) -> None:
        """Run every row: `src_buffer` indexes the bound sources, `dst_buffer` the destinations."""

    def touched(self, source: int, start: int, stop: int) -> None:
        """Be told that bytes [start, stop) of a source were read by somebody else."""


class Executor(Protocol):
    """Whatever runs rows: the reference in torch, threads in C++, a GPU."""

    @property
    def name(self) -> str:
        """Its name in `executors.EXECUTORS`."""

    def bind(self, sources: Sequence[Buffer]) -> Runner:
        """Fix the source buffers, so that running a batch converts none of them again."""


def item_sizes(codes: Sequence[int] | NDArray[np.uint8]) -> Ints:
    """Bytes of an element of each dtype code."""
    return _ITEM[np.array(codes, np.int64)]
