"""Rows of another checkpoint are refused before they read a byte."""

import numpy as np
import pytest
from fastckpt import dtypes
from fastckpt.errors import ViewError
from fastckpt.extents import Extent, Extents, File
from fastckpt.planning.batches import Slots, cut
from fastckpt.planning.binding import Binding
from fastckpt.planning.compiling import compile
from fastckpt.stored import strided
from fastckpt.target import Target


def test_rows_of_another_checkpoint_are_refused():
    extents = Extents([Extent(File("/r", 4096), 1024, 400, "0")])
    chunk, _ = compile([Target("w", strided(extents, 0, dtypes.float32, (100,)))], extents)
    small, _ = compile([Target("w", strided(extents, 0, dtypes.float32, (9,)))], extents)
    bound = Binding.of(extents).bind(chunk.rows)
    assert bound["src"].tolist() == [1024] and bound["src_buffer"].tolist() == [0]
    shorter = Binding.of(Extents([Extent(File("/r", 4096), 1024, 399, "0")]))
    with pytest.raises(ViewError, match=r"bytes \[0, 400\) of extent 0, which has 399"):
        shorter.bind(chunk.rows)
    with pytest.raises(ViewError, match=r"bytes \[0, 400\)"):
        shorter.bind(np.concatenate([small.rows, chunk.rows]))
    with pytest.raises(ViewError, match="extent 0 of 0"):
        Binding.of(Extents()).bind(chunk.rows)
    with pytest.raises(ViewError, match="outside its tensor"):
        list(cut(chunk, 0, Slots.of([0], [0], [396]), Binding.of(extents)))
