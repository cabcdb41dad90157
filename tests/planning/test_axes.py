"""Axes of rows: what is one stride is joined, and a matrix is turned."""

import itertools
import random

import numpy as np
from dull_rows import UNWRITTEN, interpret
from fastckpt import dtypes
from fastckpt.extents import Buffer, Extent, Extents
from fastckpt.planning.axes import clip, coalesce, upright
from fastckpt.planning.batches import Slots, cut
from fastckpt.planning.binding import Binding
from fastckpt.planning.compiling import compile
from fastckpt.planning.copies import COPY
from fastckpt.stored import strided
from fastckpt.target import Target
from fastckpt.views import cat
from reading import read


def test_coalesce_joins_what_is_one_stride_on_both_sides():
    size = np.array([[2, 3, 4], [2, 3, 4], [1, 1, 1]])
    src = np.array([[12, 4, 1], [12, 4, 1], [9, 9, 9]])
    dst = np.array([[12, 4, 1], [24, 4, 1], [9, 9, 9]])
    shape, s, d = coalesce(size, src, dst)
    assert shape.tolist() == [[1, 1, 1, 24], [1, 1, 2, 12], [1, 1, 1, 1]]
    assert s[0].tolist() == [0, 0, 0, 1] and s[1].tolist() == [0, 0, 12, 1] and s[2].tolist() == [0, 0, 0, 0]
    assert d[1].tolist() == [0, 0, 24, 1]


def test_nothing_lies_in_a_gap():
    """Of every other element: no part of the row in what lies between, or of no row."""
    rows = np.zeros(1, COPY)
    rows["shape"], rows["dst_stride"] = (1, 1, 1, 4), (0, 0, 0, 16)
    rows["src_dtype"] = rows["dst_dtype"] = dtypes.int64.code
    for low, high, shapes in ((0, 24, [[1, 1, 1, 2]]), (8, 16, []), (56, 99, []), (40, 64, [[1, 1, 1, 1]])):
        got, came = clip(rows, np.array([low]), np.array([high]))
        assert got["shape"].tolist() == shapes and came.tolist() == [0] * len(shapes)
    assert [len(x) for x in clip(rows[:0], *np.zeros((2, 0), np.int64))] == [0, 0]


def matrices(rng):
    """Random matrices over one buffer: turned, padded, fused, cast, cut across their lines."""
    data = np.arange(1, 4000, dtype=np.int64) * 0x0101010101
    extents = Extents([Extent(Buffer(data, data.ctypes.data, data.nbytes), 0, data.nbytes, "a")])
    while True:
        shape = [rng.randrange(1, 6) for _ in range(rng.randrange(1, 6))]
        view = strided(extents, 0, dtypes.int64, shape, offset=rng.randrange(0, 50))
        axes = list(range(len(shape)))
        rng.shuffle(axes)
        view = view.permute(axes)
        if rng.random() < 0.4:
            view = view.pad(rng.randrange(view.ndim), rng.randrange(2), rng.randrange(3))
        split = rng.randrange(0, view.ndim + 1)
        view = view.reshape([int(np.prod(view.shape[:split])), int(np.prod(view.shape[split:]))])
        if rng.random() < 0.4:
            view = cat([view, view], rng.randrange(2))
        if rng.random() < 0.5:
            view = view.T
        yield view


def test_upright_rows_fill_the_transpose():
    rng = random.Random(5)
    for view in itertools.islice(matrices(rng), 400):
        chunk, extents = compile([Target("t", view)], view.extents)
        (rows, columns), binding = view.shape, Binding.of(extents)
        want, step, width = read(view), rng.randrange(1, 5), columns * 8
        slots = Slots.of([0], [0], [rows * width])
        for batch in cut(chunk, 0, slots, binding, stage=step * width, band=step * width, in_order=True):
            assert batch.stop - batch.start <= step * width
            top, count = batch.start // width, (batch.stop - batch.start) // width
            out = np.full(count * width, UNWRITTEN, np.uint8)
            interpret(upright(batch.rows, width, count), binding.places, [out])
            assert np.array_equal(out.view(np.int64).reshape(columns, count).T, want[top : top + count])
