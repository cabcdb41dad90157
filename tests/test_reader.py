"""What a lane reads of a file as it lies is what running the rows makes; whatever differs at all is made."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from fastckpt import dtypes
from fastckpt.errors import SourceError
from fastckpt.executors import pick
from fastckpt.extents import Buffer, Extent, Extents, File
from fastckpt.planning.batches import Slots, cut
from fastckpt.planning.binding import Binding
from fastckpt.planning.compiling import compile
from fastckpt.reader import Lane, Mapped, Positioned
from fastckpt.stored import strided
from fastckpt.target import Target
from fastckpt.views import View

pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

DATA = np.arange(1 << 16, dtype=np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Extents:
    path = tmp_path / "a"
    path.write_bytes(b"head" + DATA.tobytes())
    told = os.stat(path)
    return Extents(
        [Extent(File(str(path), told.st_size, told.st_mtime_ns, told.st_ino), 4, DATA.nbytes, "0")]
    )


def direct(lane: Lane, view: View, extents: Extents) -> bytes | None:
    """What `direct` gives of the only batch of a view, after checking that `run` agrees."""
    chunk, extents = compile([Target("t", view)], extents)
    (batch,) = cut(
        chunk, 0, Slots.of([0], [0], [view.nbytes]), Binding.of(extents), stage=1 << 20, band=1 << 20
    )
    found = lane.direct(batch.rows, memoryview(bytearray(view.nbytes)))
    held = None if found is None else bytes(found)
    out = np.empty(view.nbytes, np.uint8)
    lane.run(batch.rows, [Buffer(out, out.ctypes.data, out.nbytes)])
    assert held is None or held == out.tobytes()
    return held


READERS = pytest.mark.parametrize("reader_of", [Mapped, Positioned])
ReaderOf = type[Mapped] | type[Positioned]


@READERS
def test_one_run_of_a_file_is_read_as_it_lies(file: Extents, reader_of: ReaderOf) -> None:
    view = strided(file, 0, dtypes.float32, (256, 256))
    with reader_of(Binding.of(file).places) as reader:
        lane = reader.lane(pick("cpu"))
        assert direct(lane, view.narrow(0, 3, 9), file) == DATA[3 * 256 : 12 * 256].tobytes()
        assert lane.bytes_read == 2 * 9 * 1024
        assert direct(lane, view.cast(dtypes.bfloat16), file) is None
        assert direct(lane, view.T, file) is None
        assert direct(lane, view.narrow(1, 0, 9), file) is None
        assert direct(lane, view.pad(0, 0, 1), file) is None
        assert direct(lane, strided(file, 0, dtypes.float32, (9,), stride=(2,)), file) is None
        assert direct(lane, strided(file, 0, dtypes.float32, (9,), stride=(0,)), file) is None


@READERS
def test_memory_is_copied(reader_of: ReaderOf) -> None:
    """A tensor may change between its digest and its writing."""
    memory = Extents([Extent(Buffer(DATA, DATA.ctypes.data, DATA.nbytes), 0, DATA.nbytes, "m")])
    with reader_of(Binding.of(memory).places) as reader:
        assert direct(reader.lane(pick("cpu")), strided(memory, 0, dtypes.float32, (9,)), memory) is None


@READERS
def test_a_file_cut_short_while_it_is_read_is_an_error(
    tmp_path: Path, file: Extents, reader_of: ReaderOf
) -> None:
    view = strided(file, 0, dtypes.float32, (1 << 16,))
    with (
        pytest.raises(SourceError, match=r"changed since|shrank|ends at byte"),
        reader_of(Binding.of(file).places) as reader,
    ):
        os.truncate(reader.places[0].path, 4096)
        direct(reader.lane(pick("cpu")), view, file)
