"""Targets as rows: one a run, none with an axis that it cannot count."""

import random

import numpy as np
import pytest
from dull_rows import random_targets
from fastckpt import dtypes
from fastckpt.errors import ViewError
from fastckpt.extents import Buffer, Extent, Extents, File
from fastckpt.planning.axes import coalesce
from fastckpt.planning.binding import Binding
from fastckpt.planning.compiling import compile, single
from fastckpt.planning.copies import COPY, LONGEST, NOTHING, nbytes
from fastckpt.stored import strided
from fastckpt.target import Target
from fastckpt.views import cat, dense_strides


def test_the_row_of_one_fragment_is_compiles():
    found = 0
    for seed in range(300):
        targets, extents = random_targets(random.Random(seed))
        for target in targets:
            row = single(target.view)
            chunk, _ = compile([target], extents)
            if row is not None and target.view.extents is extents:
                found += 1
                assert row.tobytes() == chunk.rows.tobytes()
            elif len(chunk.rows) == 1 and target.view.numel and target.name != "constant":
                assert chunk.rows["src_buffer"][0] == NOTHING or len(target.view.held) > 1
    assert found > 200


def test_a_zero_3_parameter_is_one_row_a_rank():
    extents = Extents([Extent(File(f"/r{r}", 4096), 0, 4096, "0") for r in range(4)])
    parts = [strided(extents, r, dtypes.float32, (256,)) for r in range(4)]
    view = cat(parts).narrow(0, 0, 1000).reshape((10, 100)).cast(dtypes.bfloat16)
    chunk, _ = compile([Target("w", view)], extents)
    assert nbytes(chunk.rows, "src").sum() == 4000 and nbytes(chunk.rows, "dst").sum() == 2000
    assert set(chunk.rows["src_buffer"].tolist()) == {0, 1, 2, 3}
    bound = Binding.of(extents).bind(chunk.rows)
    assert (bound["dst"] == chunk.rows["dst"]).all()


def test_copy_is_the_documented_struct():
    assert COPY.itemsize == 128
    assert [COPY.fields[n][1] for n in COPY.names] == [0, 8, 16, 48, 80, 96, 100, 104, 112, 113, 114, 115]


def test_no_axis_outgrows_a_row():
    """Stacked experts pass 2^32 elements: what a row cannot count is not joined, or refused."""
    int8 = dtypes.BY_NAME["int8"]
    for shape in ((3, 1 << 31), (5, 1 << 20, 1 << 20), (1 << 31, 2, 2), (70_000, 70_000)):
        size, src, dst = (np.array([x], np.int64) for x in (shape, *[dense_strides(shape)] * 2))
        joined, *_ = coalesce(size, src, dst)
        assert int(joined.max()) <= LONGEST and int(joined.prod()) == int(size.prod())
    owner = np.zeros(1, np.int8)
    extents = Extents([Extent(Buffer(owner, owner.ctypes.data, 1 << 40), 0, 1 << 40, "a")])
    wide = Target("w", strided(extents, 0, int8, (3, 1 << 31)))
    chunk, _ = compile([wide], extents)
    assert nbytes(chunk.rows, "dst").sum() == 3 << 31
    long = Target("w", strided(extents, 0, int8, (1 << 32,)))
    with pytest.raises(ViewError, match="axis of 4294967296 elements"):
        compile([long], extents)
