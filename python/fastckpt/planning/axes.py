"""What is done to the axes of rows: joined, unrolled, turned, clipped, and named by the path they take.

Law: none changes which source element goes to which destination byte, but `upright`, which says it.
"""

from __future__ import annotations

import numpy as np

from .copies import AXES, COPY, GENERAL, LONGEST, NOTHING, ROWS, TRANSPOSE, Ints, Table, item_sizes


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


def with_axes(table: Table, size: Ints, src_stride: Ints, dst_stride: Ints) -> tuple[Table, Ints]:
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
    item = item_sizes(rows["dst_dtype"])
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
    out, _ = with_axes(out, *axes)
    classify(out)
    return out


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
        shape, strides = rows["shape"].astype(np.int64), rows["dst_stride"]
        step = np.maximum(strides[:, axis], 1)
        width = ((shape[:, axis + 1 :] - 1) * strides[:, axis + 1 :]).sum(axis=1)
        width += item_sizes(rows["dst_dtype"])
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
    src_item, dst_item = item_sizes(rows["src_dtype"]), item_sizes(rows["dst_dtype"])
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
