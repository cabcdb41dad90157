"""A reader over another: what is made when it is read (`lowrank`, `finishes`, `dequantised`) is made for the
rows that ask for it.

Law: of a made matrix no more is held than the elements of one row of a batch, and the base they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from . import dtypes
from .dequantised import Parts
from .extents import Buffer, Extents, File
from .finishes import Agreed, Each, Largest, Requantised
from .lowrank import Floats, LowRank, added, computed, elements, runs
from .planner import Binding, Executor, Ints, Table, classify, compile
from .reader import Lane, Reader
from .target import Target
from .views import View

_ITEM = dtypes.float32.itemsize

WASTE = 2
"""Rows or columns read for one that is used, at most, before they are read run by run."""


class Merging:
    """Makes the places of `extents` that lie nowhere; `inner` makes the reader of all others."""

    def __init__(
        self, extents: Extents, binding: Binding, inner: Callable[[Sequence[File | Buffer]], Reader]
    ) -> None:
        self.extents = extents
        self.binding = binding
        self.made = computed(binding.places)
        nothing = Buffer(None, 0, 0)
        self.inner = inner([nothing if i in self.made else p for i, p in enumerate(binding.places)])

    def __enter__(self) -> Merging:
        self.inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inner.__exit__(kind, error, trace)

    def lane(self, executor: Executor) -> MergingLane:
        """A lane over one of the inner reader's."""
        return MergingLane(self, self.inner.lane(executor), executor)


class MergingLane:
    """See Merging."""

    def __init__(self, reader: Merging, lane: Lane, executor: Executor) -> None:
        self.reader = reader
        self.lane = lane
        self.executor = executor
        self.bytes_read = 0

    def run(self, rows: Table, destinations: Sequence[Buffer]) -> None:
        """Run what lies somewhere as the inner lane does, and make the rest row by row."""
        mine = np.isin(rows["src_buffer"], list(self.reader.made))
        if not mine.all():
            self.lane.run(rows[~mine], destinations)
        for i in np.flatnonzero(mine).tolist():
            self._make(rows[i : i + 1].copy(), destinations)
        self.bytes_read = self.lane.bytes_read

    def direct(self, rows: Table, nbytes: int) -> memoryview | None:
        """What the inner lane has as it is."""
        if np.isin(rows["src_buffer"], list(self.reader.made)).any():
            return None
        found = self.lane.direct(rows, nbytes)
        self.bytes_read = self.lane.bytes_read
        return found

    def _make(self, row: Table, destinations: Sequence[Buffer]) -> None:
        matrix = self.reader.made[int(row["src_buffer"][0])]
        assert isinstance(matrix, (LowRank, Parts, Each, Largest, Requantised, Agreed))
        columns = matrix.base.shape[1] if isinstance(matrix, LowRank) else matrix.shape[1]
        strides = (row["src_stride"][0] // _ITEM).tolist()
        down, across, strides = elements(
            int(row["src"][0]) // _ITEM, row["shape"][0].tolist(), strides, columns
        )
        if isinstance(matrix, LowRank):
            box = added(
                _picked(self._of(matrix.base), down, across),
                _picked(self._of(matrix.left), down, np.arange(matrix.left.shape[1])),
                _picked(self._of(matrix.right), np.arange(matrix.right.shape[0]), across),
                matrix.scale,
            )
        else:
            box = _picked(lambda *at: matrix.box(self._read, *at), down, across)
        row["src"], row["src_buffer"], row["src_stride"] = 0, 0, np.array(strides) * _ITEM
        classify(row)
        held = Buffer(box, box.ctypes.data, box.nbytes)
        self.executor.bind([held]).run(row, destinations)

    def _of(self, view: View) -> Box:
        """Boxes of a view, as float32."""

        def box(r0: int, r1: int, c0: int, c1: int) -> Floats:
            part = view.narrow(0, r0, r1 - r0).narrow(1, c0, c1 - c0)
            return np.asarray(self._read(part.cast(dtypes.float32)), np.float32)

        return box

    def _read(self, view: View) -> NDArray[np.generic]:
        """The dense elements of a view over the checkpoint's own places."""
        out = np.empty(view.shape, NUMPY[view.dtype.name])
        # The reader's table begins with the view's own, so that no index changes.
        chunk, _ = compile([Target("", replace(view, extents=self.reader.extents))], self.reader.extents)
        rows = self.reader.binding.bind(chunk.rows)
        classify(rows)
        self.lane.run(rows, [Buffer(out, out.ctypes.data, out.nbytes)])
        return out


NUMPY = {"float32": np.float32, "int8": np.int8, "int32": np.int32, "int64": np.int64}
"""The dtypes that matrices are made of once they are read, in numpy."""

Box = Callable[[int, int, int, int], Floats]
"""Rows [first, stop) and columns [first, stop) of a matrix."""


def _picked(box: Box, down: Ints, across: Ints) -> Floats:
    """The elements at rows `down` and columns `across`, both ascending."""
    left, right = int(across[0]), int(across[-1]) + 1
    if len(across) == right - left and len(down) == int(down[-1]) + 1 - int(down[0]):
        return box(int(down[0]), int(down[-1]) + 1, left, right)
    out = np.empty((len(down), len(across)), np.float32)
    at = 0
    for start, stop in _ranges(down):
        mine = down[(down >= start) & (down < stop)]
        out[at : at + len(mine)] = box(start, stop, left, right)[np.ix_(mine - start, across - left)]
        at += len(mine)
    return out


def _ranges(down: Ints) -> list[tuple[int, int]]:
    """Ranges that hold every number of `down`: one, where it wastes little, else one for each run."""
    start, stop = int(down[0]), int(down[-1]) + 1
    return [(start, stop)] if stop - start <= WASTE * len(down) else runs(down)
