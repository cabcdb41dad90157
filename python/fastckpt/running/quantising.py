"""Quantised tensors on the road: bands of dense rows are filled, quantised while in cache, and written out.

A stretch is a run of a tensor's rows whose values begin on a digest leaf; one worker makes it band by band.
Law: every value is made from the plan's own rows; a tensor's scales go out once, when its last stretch is
done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..digest import LEAF
from ..dtypes import int32
from ..extents import Buffer, fresh
from ..planning.axes import upright
from ..planning.batches import Slots, cut
from ..planning.binding import Binding
from ..planning.copies import NOTHING, Chunk, Table, item_sizes
from ..planning.plans import Plan
from ..quantisation.quantised_targets import DENSE_BYTES, Quantised, flat
from ..quantisation.rounding import (
    Bytes,
    Error,
    Floats,
    Zeros,
    amax,
    not_finite,
    quantise,
    scale_of,
    stored_scales,
    stored_zeros,
)
from ..reader import Lane, is_one_run
from ..target import Target

STRETCH_BYTES = 8 * LEAF
"""Values of one stretch, about: a large tensor is shared out among the workers."""

WIDER = 8
"""Steps at once of what lies turned in memory, so that more of each of its pages is read."""


class Sink(Protocol):
    """Where the bytes of a tensor go, from `offset` on, which is that of a digest leaf."""

    def room(self, tensor: int, offset: int, nbytes: int) -> Bytes | None:
        """The memory they may be made in; None where there is none."""

    def put(self, tensor: int, offset: int, data: memoryview) -> None:
        """Take them."""


@dataclass(slots=True)
class _Tensor:
    """A quantised tensor on its way: its scales and zero points, the stretches left, and its error so far."""

    number: int
    matrix: Quantised
    scales: Floats
    zeros: Zeros
    largest: Floats | None
    left: int
    error: Error = field(default_factory=Error)
    lock: Lock = field(default_factory=Lock)

    def quantise(self, band: Band, dense: Bytes, out: Bytes) -> Error:
        """Quantise a band's dense rows into `out`; keeps their scales and zero points. Raises SourceError."""
        matrix, scheme = self.matrix, self.matrix.scheme
        _, columns = flat(matrix.shape)
        stop = band.row + band.count
        largest = None if self.largest is None else self.largest[band.row : stop]
        pitch = (band.pitch or band.count * matrix.dtype.itemsize) if scheme.turned else 0
        found = quantise(dense, matrix.dtype, band.count, columns, scheme, largest, out, pitch=pitch)
        if found is None:
            raise not_finite(matrix.name, band.row, stop)
        if self.largest is None or scheme.block[0]:
            into = band.row // (scheme.block[0] or matrix.shape[-2])
            self.scales[into : into + len(found.scales)] = found.scales
            self.zeros[into : into + len(found.zeros)] = found.zeros
        return found.error


@dataclass(frozen=True, slots=True)
class Band:
    """Dense rows [row, row + count) of a tensor, as `quantise` takes them: either in memory already (`there`,
    `pitch` bytes from line to line where they lie turned), or to be filled by the copies `rows`."""

    row: int
    count: int
    rows: Table
    there: Bytes | None = None
    pitch: int = 0

    def dense(self, lane: Lane, staging: Bytes, nbytes: int) -> Bytes:
        """The rows' `nbytes`, in `staging` if they lie nowhere as they are."""
        if self.there is not None:
            lane.bytes_read += nbytes
            return self.there
        held = lane.direct(self.rows, memoryview(staging.data)[:nbytes])
        if held is not None:
            return np.frombuffer(held, np.uint8)
        lane.run(self.rows, [Buffer(staging, staging.ctypes.data, nbytes)])
        return staging[:nbytes]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bands of one tensor, in order, that make bytes [start, stop) of its values, which lie in `file`."""

    tensor: _Tensor
    file: int
    start: int
    stop: int
    bands: tuple[Band, ...]


class _Out:
    """A stretch's values on their way to `sink`, from offset `at` of a tensor on: made in its memory where it
    has room, else in `staging`, from which whole leaves are put."""

    def __init__(self, sink: Sink, tensor: int, at: int, staging: Bytes) -> None:
        self.sink, self.tensor, self.at, self.staging = sink, tensor, at, staging
        self.staged = True  # whether what is made next lies in staging
        self.filled = 0  # bytes of staging that were made and not put yet

    def room(self, nbytes: int) -> Bytes:
        """Where the next `nbytes` are to be made; then `take` them."""
        there = self.sink.room(self.tensor, self.at, nbytes)
        self.staged = there is None
        return self.staging[self.filled : self.filled + nbytes] if there is None else there

    def take(self, nbytes: int) -> None:
        """They are made."""
        if not self.staged:
            self.at += nbytes
            return
        self.filled += nbytes
        if leaves := self.filled // LEAF * LEAF:
            self._put(leaves)

    def close(self) -> None:
        """Put what is left."""
        if self.filled:
            self._put(self.filled)

    def _put(self, nbytes: int) -> None:
        self.sink.put(self.tensor, self.at, memoryview(self.staging.data)[:nbytes])
        self.at, self.filled = self.at + nbytes, self.filled - nbytes
        self.staging[: self.filled] = self.staging[nbytes : nbytes + self.filled].copy()


class Dense:
    """The dense matrices that a chunk's rows make, to be taken band by band."""

    def __init__(self, chunk: Chunk, binding: Binding) -> None:
        self.binding = binding
        self.rows, self.bound = chunk.rows, binding.bind(chunk.rows)
        self.edges = np.searchsorted(chunk.tensor, np.arange(chunk.count + 1)).tolist()

    def bands(self, target: int, rows: int, width: int, step: int, *, turned: bool = False) -> Iterator[Band]:
        """The chunk's target of that number, a matrix of `rows` x `width` bytes, `step` rows at once; column
        after column where `turned`."""
        mine = slice(self.edges[target], self.edges[target + 1])
        lines = _lines_in_memory(self.bound[mine], self.binding, rows, width) if turned else None
        if lines is not None:
            for row in range(0, rows, step * WIDER):
                count = min(step * WIDER, rows - row)
                held = lines.held[row * lines.item : len(lines.held) - (rows - row - count) * lines.item]
                yield Band(row, count, self.rows[:0], held, lines.pitch)
            return
        there = None if turned else _in_memory(self.bound[mine], self.binding, rows * width)
        if there is not None:
            for row in range(0, rows, step):
                count = min(step, rows - row)
                yield Band(row, count, self.rows[:0], there[row * width : (row + count) * width])
            return
        alone = Chunk(1, self.rows[mine], np.zeros(mine.stop - mine.start, np.int64))
        slots = Slots.of([0], [0], [rows * width])
        batches = cut(alone, 0, slots, self.binding, stage=step * width, band=step * width, in_order=True)
        for batch in batches:
            count = (batch.stop - batch.start) // width
            filled = upright(batch.rows, width, count) if turned else batch.rows
            yield Band(batch.start // width, count, filled)


class Quantising:
    """The quantised tensors of one run.

    `largest`: dense name -> the amax of its rows, as `Scan` found it; `staging`: bytes that each worker
    holds."""

    def __init__(self, plan: Plan, slots: Slots, largest: Mapping[str, Floats]) -> None:
        self.plan = plan
        self.largest = largest
        self.errors: dict[int, Error] = {}
        matrices = plan.quantised.values()
        self.dense = max((_step(q) * q.shape[-1] * q.dtype.itemsize for q in matrices), default=0)
        self.values = LEAF + max((_widest(q) * q.shape[-1] * q.scheme.bits // 8 for q in matrices), default=0)
        self.staging = self.dense + self.values if self.dense else 0
        self.made = np.zeros(len(plan.tensors), bool)
        for i, q in plan.quantised.items():
            beside = [at for at in (q.zeros, q.form) if at is not None and not q.scheme.dynamic]
            self.made[[i, q.scales, *beside]] = True
        self.rest = replace(slots, nbytes=np.where(self.made, 0, slots.nbytes))

    def others(self, first: int, chunk: Chunk) -> Chunk:
        """The chunk without the rows of quantised tensors; to be cut by the slots `rest`."""
        keep = ~self.made[first + chunk.tensor]
        return chunk if keep.all() else Chunk(chunk.count, chunk.rows[keep], chunk.tensor[keep])

    def stretches(self, first: int, chunk: Chunk, binding: Binding) -> Iterator[Stretch]:
        """The stretches of the chunk's quantised tensors."""
        if not self.plan.quantised:
            return
        dense = Dense(chunk, binding)
        for i in range(chunk.count):
            matrix = self.plan.quantised.get(first + i)
            if matrix is None:
                continue
            rows, columns = flat(matrix.shape)
            out = columns * matrix.scheme.bits // 8
            step, share = _step(matrix), _share(matrix)
            tensor, file = self._tensor(first + i, matrix, -(-rows // share)), int(self.rest.file[first + i])
            bands: list[Band] = []
            width = columns * matrix.dtype.itemsize
            for band in dense.bands(i, rows, width, step, turned=matrix.scheme.turned):
                if bands and band.row % share == 0:
                    yield Stretch(tensor, file, bands[0].row * out, band.row * out, tuple(bands))
                    bands = []
                bands.append(band)
            yield Stretch(tensor, file, bands[0].row * out, rows * out, tuple(bands))

    def _tensor(self, number: int, matrix: Quantised, left: int) -> _Tensor:
        rows, _ = flat(matrix.shape)
        lead = rows // matrix.shape[-2]
        down, across = matrix.scheme.grid(matrix.shape[-2], matrix.shape[-1])
        scales = np.empty((lead * down, across), np.float32)
        largest = None
        if matrix.scanned:
            largest = self.largest[matrix.name]
            if matrix.scheme.block[0] == 0:
                one = largest.reshape(lead, -1).max(axis=1)
                scales[:] = scale_of(one, matrix.scheme).reshape(lead, 1)
                largest = np.repeat(one, matrix.shape[-2])
        return _Tensor(number, matrix, scales, np.zeros(scales.shape, np.int8), largest, left)

    def worker(self, lane: Lane, sink: Sink) -> Callable[[Stretch], None]:
        """A worker with staging of its own for dense rows and for values."""
        dense, values = fresh(self.dense), fresh(self.values)

        def run(stretch: Stretch) -> None:
            tensor, error = stretch.tensor, Error()
            _, columns = flat(tensor.matrix.shape)
            out = _Out(sink, tensor.number, stretch.start, values)
            for band in stretch.bands:
                n = band.count * columns
                size = n * tensor.matrix.scheme.bits // 8
                rows = band.dense(lane, dense, n * tensor.matrix.dtype.itemsize)
                error += tensor.quantise(band, rows, out.room(size))
                out.take(size)
            out.close()
            with tensor.lock:
                tensor.left -= 1
                tensor.error += error
                last = tensor.left == 0
            if last:
                for at, array in _beside(tensor):
                    sink.put(at, 0, memoryview(array.reshape(-1).view(np.uint8).data))
                self.errors[tensor.number] = tensor.error

        return run


def _in_memory(rows: Table, binding: Binding, nbytes: int) -> Bytes | None:
    """The dense bytes of a tensor where they lie already, as they are, in main memory; else None."""
    if len(rows) != 1 or rows["src_buffer"][0] == NOTHING or not is_one_run(rows[0], nbytes):
        return None
    row = rows[0]
    place = binding.places[int(row["src_buffer"])]
    if not isinstance(place, Buffer) or place.device != "cpu":
        return None
    return place.part(int(row["src"]), nbytes)


@dataclass(frozen=True, slots=True)
class _Lines:
    """A matrix that lies turned: its bytes, from column to column and of an element."""

    held: Bytes
    pitch: int
    item: int


def _lines_in_memory(rows: Table, binding: Binding, count: int, width: int) -> _Lines | None:
    """A matrix of `count` x `width` bytes where it lies turned in main memory, as it is; else None."""
    if len(rows) != 1 or rows["src_buffer"][0] == NOTHING or rows["src_dtype"] != rows["dst_dtype"]:
        return None
    row, item = rows[0], int(item_sizes(rows["dst_dtype"])[0])
    place, pitch = binding.places[int(row["src_buffer"])], int(row["src_stride"][-1])
    lies = row["shape"].tolist() == [1, 1, count, width // item] and int(row["src_stride"][-2]) == item
    if not lies or pitch < count * item or not isinstance(place, Buffer) or place.device != "cpu":
        return None
    return _Lines(place.part(int(row["src"]), (width // item - 1) * pitch + count * item), pitch, item)


def _beside(tensor: _Tensor) -> Iterator[tuple[int, NDArray[np.generic]]]:
    """What goes out beside the values once all are made: (plan's tensor, array)."""
    matrix, scheme = tensor.matrix, tensor.matrix.scheme
    yield matrix.scales, stored_scales(tensor.scales, scheme)
    if matrix.zeros is not None and not scheme.dynamic:
        yield matrix.zeros, stored_zeros(tensor.zeros, scheme)
    if matrix.form is not None:
        yield matrix.form, form_of(matrix)


def form_of(matrix: Quantised) -> NDArray[np.generic]:
    """What the tensor `form` of a matrix holds."""
    form = np.array(matrix.scheme.form_values(matrix.shape), np.int64)
    return form.astype(np.int32) if matrix.scheme.form_dtype is int32 else form


class Scan:
    """The first read: the largest magnitude of every row of some dense matrices, by name."""

    def __init__(self) -> None:
        self.largest: dict[str, Floats] = {}

    def bands(self, window: list[tuple[int, Target]], chunk: Chunk, binding: Binding) -> Iterator[ScanBand]:
        """The bands of a window of compiled targets."""
        dense = Dense(chunk, binding)
        for i, (_, target) in enumerate(window):
            rows, columns = flat(target.shape)
            width = columns * target.view.dtype.itemsize
            found = self.largest[target.name] = np.empty(rows, np.float32)
            for band in dense.bands(i, rows, width, max(1, DENSE_BYTES // width)):
                yield ScanBand(target, band, found, 0, band.count * width)

    def worker(self, lane: Lane) -> Callable[[ScanBand], None]:
        """A worker with staging of its own."""
        staging = fresh(DENSE_BYTES)

        def run(scanned: ScanBand) -> None:
            nonlocal staging
            if len(staging) < scanned.stop:
                staging = fresh(scanned.stop)
            band, (_, columns) = scanned.band, flat(scanned.target.shape)
            dense = band.dense(lane, staging, scanned.stop)
            largest = amax(dense, scanned.target.view.dtype, band.count, columns)
            if not np.isfinite(largest).all():
                raise not_finite(scanned.target.name, band.row, band.row + band.count)
            scanned.found[band.row : band.row + band.count] = largest

        return run


@dataclass(frozen=True, slots=True)
class ScanBand:
    """A band of a matrix to look through; it has `stop` - `start` dense bytes."""

    target: Target
    band: Band
    found: Floats
    start: int
    stop: int


def _step(matrix: Quantised) -> int:
    """Rows made dense at once: whole blocks, or a power of two, as leaves are."""
    if matrix.scheme.block[0] == 0 and not matrix.scanned:
        return matrix.shape[-2]
    fit = DENSE_BYTES // (matrix.shape[-1] * matrix.dtype.itemsize)
    return max(matrix.scheme.block[0], 1 << fit.bit_length() - 1 if fit else 1)


def _widest(matrix: Quantised) -> int:
    """Rows of a band at most."""
    return _step(matrix) * (WIDER if matrix.scheme.turned else 1)


def _share(matrix: Quantised) -> int:
    """Rows of a stretch: whole bands that begin on a leaf."""
    out = matrix.shape[-1] * matrix.scheme.bits // 8
    one = math.lcm(_widest(matrix), LEAF // math.gcd(LEAF, out))
    return one * max(1, -(-STRETCH_BYTES // (one * out)))
