"""A reader over another reader, which computes what lies nowhere (`lowrank`, `finishes`, `dequantised`,
`prequantised`) for the rows that ask for it.

Law: of a computed matrix, no more is held than the elements of one row of a batch and what they are made
from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import dtypes
from ..computed.dequantised import Dequantised
from ..computed.finishes import Agreed, Each, Largest, Requantised, floats
from ..computed.lowrank import LowRank, add
from ..computed.nowhere import computed, elements, runs
from ..computed.prequantised import Elements, Matrix, Part
from ..digest import LEAF
from ..extents import Buffer, Extents, File
from ..planning.axes import classify
from ..planning.binding import Binding
from ..planning.compiling import compile, single
from ..planning.copies import Executor, Ints, Table, item_sizes
from ..quantisation.rounding import Error
from ..reader import Lane, Reader
from ..target import Target
from ..views import View
from .limits import STAGE

WASTE = 2
"""How many rows may be read for each one that is used; above that, each run of rows is read by itself."""


class Losses:
    """How far quantised values lie from the dense ones: (output file, matrix) -> error. Every lane adds."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, Matrix], Error] = {}
        self._lock = Lock()

    def add(self, file: int, matrix: Matrix, error: Error) -> None:
        """Adds the error of some values of a matrix in a file."""
        with self._lock:
            self.found[file, matrix] = self.found.get((file, matrix), Error()) + error


class Computing:
    """Reads the places of a binding of which some lie nowhere; `inner` makes the reader of all others.

    `losses`: of what is quantised here; `dequantises`: everything it computes is dequantised, which needs no
    more memory than the result."""

    def __init__(
        self,
        extents: Extents,
        binding: Binding,
        inner: Callable[[Sequence[File | Buffer]], Reader],
        losses: Losses | None = None,
    ) -> None:
        self.extents = extents
        self.binding = binding
        self.losses = losses or Losses()
        self.made = computed(binding.places)
        self.nowhere = np.isin(np.arange(len(binding.places) + 1), list(self.made))
        self.dequantises = all(isinstance(m, Dequantised) for m in self.made.values())
        nothing = Buffer(None, 0, 0)
        self.inner = inner([nothing if i in self.made else p for i, p in enumerate(binding.places)])

    def __enter__(self) -> Computing:
        self.inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inner.__exit__(kind, error, trace)

    def lane(self, executor: Executor) -> ComputingLane:
        """A lane over one of the inner reader's."""
        return ComputingLane(self, self.inner.lane(executor), executor)

    def batch_sizes(self, stage: int, band: int) -> tuple[int, int]:
        """A leaf, as what matrices are computed from is held too."""
        most = min(STAGE, band) if self.dequantises else LEAF
        return most, most


class ComputingLane:
    """See Computing. Within `run`, `_file` is the output whose batch is run."""

    def __init__(self, reader: Computing, lane: Lane, executor: Executor) -> None:
        self.reader = reader
        self.lane = lane
        self.executor = executor
        self.bytes_read = self.bytes_scanned = 0
        self._file = 0

    def run(self, rows: Table, destinations: Sequence[Buffer], file: int = 0) -> None:
        """Run the rows that the inner lane can read, and compute the others one by one."""
        self._file = file
        mine = self._made(rows)
        if not mine.all():
            self.lane.run(rows[~mine], destinations)
        for i in np.flatnonzero(mine).tolist():
            self._make(rows[i : i + 1].copy(), destinations)
        self.bytes_read = self.lane.bytes_read - self.bytes_scanned

    def direct(self, rows: Table, staging: memoryview) -> memoryview | None:
        """As the inner lane does; None where a row must be computed."""
        if self._made(rows).any():
            return None
        found = self.lane.direct(rows, staging)
        self.bytes_read = self.lane.bytes_read - self.bytes_scanned
        return found

    def _made(self, rows: Table) -> NDArray[np.bool_]:
        """Which rows read what lies nowhere; zeros have no place."""
        return self.reader.nowhere.take(rows["src_buffer"], mode="clip")

    def _make(self, row: Table, destinations: Sequence[Buffer]) -> None:
        matrix = self.reader.made[int(row["src_buffer"][0])]
        assert isinstance(matrix, (LowRank, Dequantised, Part, Each, Largest, Requantised, Agreed))
        columns = matrix.base.shape[1] if isinstance(matrix, LowRank) else matrix.shape[1]
        item = int(item_sizes(row["src_dtype"])[0])
        strides = (row["src_stride"][0] // item).tolist()
        down, across, steps = elements(int(row["src"][0]) // item, row["shape"][0].tolist(), strides, columns)
        box: Elements
        if isinstance(matrix, Part):
            box = _picked(partial(matrix.box, self), down, across)
        elif isinstance(matrix, LowRank):
            rank = np.arange(matrix.right.shape[0])
            left = _picked(partial(floats, self.dense, matrix.left), down, rank)
            right = _picked(partial(floats, self.dense, matrix.right), rank, across)
            box = base = _picked(partial(floats, self.dense, matrix.base), down, across)
            add(base, left, right, matrix.scale)
        elif isinstance(matrix, Dequantised):
            wanted = dtypes.DTYPES[int(row["dst_dtype"][0])]
            box = _picked(partial(matrix.box, self.dense, wanted), down, across)
            if box.dtype != np.float32:
                row["src_dtype"] = row["dst_dtype"]
        else:
            box = _picked(partial(matrix.box, self.dense), down, across)
        row["src"], row["src_buffer"] = 0, 0
        row["src_stride"] = [n * box.strides[axis] for n, axis in steps]
        classify(row)
        reach = sum((n - 1) * step for n, step in zip(box.shape, box.strides, strict=True))
        held = Buffer(box, box.ctypes.data, reach + box.itemsize)
        self.executor.bind([held]).run(row, destinations)

    def add_error(self, matrix: Matrix, error: Error) -> None:
        """Adds how far some quantised values lie from the dense ones."""
        self.reader.losses.add(self._file, matrix, error)

    def dense(self, view: View, *, scan: bool = False) -> Elements:
        """The dense elements of a view, which may itself be computed (an adapter's); `scan`: they are read
        for scales alone."""
        before = self.lane.bytes_read
        out = np.empty(view.shape, NUMPY[view.dtype.name])
        # The reader's table begins with the view's own, so that no index changes.
        rows = single(view)
        if rows is None:
            extents = self.reader.extents
            rows = compile([Target("", replace(view, extents=extents))], extents)[0].rows
        rows = self.reader.binding.bind(rows)
        classify(rows)
        self.run(rows, [Buffer(out, out.ctypes.data, out.nbytes)], self._file)
        self.bytes_scanned += self.lane.bytes_read - before if scan else 0
        return out


NUMPY = {
    "float32": np.float32, "bfloat16": np.uint16, "float16": np.float16, "int8": np.int8, "int32": np.int32,
    "int64": np.int64, "uint8": np.uint8, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8,
}  # fmt: skip
"""The dtypes of what matrices are computed from, in numpy, which has no bfloat16 and no fp8."""

Item = TypeVar("Item", bound=np.generic)
Box = Callable[[int, int, int, int], NDArray[Item]]
"""Rows [first, stop) and columns [first, stop) of a matrix."""


def _picked(box: Box[Item], down: Ints, across: Ints) -> NDArray[Item]:
    """The elements at rows `down` and columns `across`, both ascending."""
    left, right = int(across[0]), int(across[-1]) + 1
    if len(across) == right - left and len(down) == int(down[-1]) + 1 - int(down[0]):
        return box(int(down[0]), int(down[-1]) + 1, left, right)
    parts = []
    for start, stop in _ranges(down):
        mine = down[(down >= start) & (down < stop)]
        parts.append(box(start, stop, left, right)[np.ix_(mine - start, across - left)])
    return np.concatenate(parts)


def _ranges(down: Ints) -> list[tuple[int, int]]:
    """Ranges that hold every number of `down`: one, where it wastes little, else one for each run."""
    start, stop = int(down[0]), int(down[-1]) + 1
    return [(start, stop)] if stop - start <= WASTE * len(down) else runs(down)
