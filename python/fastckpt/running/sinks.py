"""Where the bytes of batches go: into files, into tensors in main memory, or only under a digest.

Law: a sink is filled by several workers at once, each output byte by one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..digest import LEAF, combined, crc32, crc32_combine, leaf_digests
from ..dtypes import DTYPES
from ..errors import SourceError
from ..extents import Buffer, fresh
from ..finite import nonfinite
from ..output.writer import OutputFile
from ..pipeline import each
from ..planning.batches import Batch, Slots
from ..planning.planned import PlannedTensors
from ..reader import Lane

Worker = Callable[[Batch], None]
"""What one thread does with each batch it gets."""


class ToDigests:
    """The sink of a run that only wants to know what the bytes would be: the digest of every tensor."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.leaves = np.zeros(slots.leaves, np.uint64)

    def worker(self, lane: Lane, size: int) -> Worker:
        """A worker with a staging buffer of `size` bytes of its own."""
        made = _maker(lane, size)
        return lambda batch: self.take(batch, made(batch))

    def take(self, batch: Batch, filled: memoryview) -> None:
        """Digest the leaves of a batch."""
        self.leaves[batch.leaf] = leaf_digests(filled, batch.leaf_offset, batch.leaf_size)

    def digests(self) -> NDArray[np.uint64]:
        """The digest of every tensor, when all leaves are there."""
        return combined(self.leaves, -(-self.slots.nbytes // LEAF))


def _maker(lane: Lane, size: int) -> Callable[[Batch], memoryview]:
    """What gives a batch's bytes, valid until the next: in a staging of `size` bytes or the lane's."""
    staging = fresh(size)
    address = staging.ctypes.data
    whole = memoryview(staging.data)

    def made(batch: Batch) -> memoryview:
        n = batch.stop - batch.start
        filled = lane.direct(batch.rows, whole[:n])
        if filled is not None:
            return filled
        lane.run(batch.rows, [Buffer(staging, address, n)], batch.file)
        return whole[:n]

    return made


class ToFiles:
    """The sink of a run over files: open files, leaf digests, checksums, the finite check.

    `tensors`: the plan's, each with its file's number; `files`: the open files by number. With `finite` a
    NaN or an infinity in the output is a SourceError."""

    def __init__(
        self, slots: Slots, tensors: PlannedTensors, files: Sequence[OutputFile], *, finite: bool
    ) -> None:
        self.slots = slots
        self.tensors = tensors
        self.files = files
        self.finite = finite
        self.digests = ToDigests(slots)
        self.crcs: dict[int, int] = {}  # leaf -> CRC32, of files that need them
        self.codes = np.array([d.code for d in tensors.made.dtypes], np.uint8)

    def worker(self, lane: Lane, size: int) -> Worker:
        """A worker with a staging buffer of `size` bytes of its own."""
        made = _maker(lane, size)

        def run(batch: Batch) -> None:
            filled = made(batch)
            self.digests.take(batch, filled)
            if self.files[batch.file].layout.crc:
                for at, length, leaf in zip(
                    batch.leaf_offset.tolist(), batch.leaf_size.tolist(), batch.leaf.tolist(), strict=True
                ):
                    self.crcs[leaf] = crc32(filled[at : at + length])
            if self.finite:
                self.check(batch, filled)
            self.files[batch.file].write(batch.start, filled)

        return run

    def put(self, tensor: int, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor from `offset` on, a leaf's; they end on a leaf or with the tensor."""
        at = np.arange(0, len(data), LEAF, dtype=np.int64)
        first = int(self.slots.leaf[tensor]) + offset // LEAF
        digests = leaf_digests(data, at, np.minimum(LEAF, len(data) - at))
        self.digests.leaves[first : first + len(at)] = digests
        self.files[int(self.slots.file[tensor])].write(int(self.slots.offset[tensor]) + offset, data)

    def room(self, tensor: int, offset: int, nbytes: int) -> None:
        """Files have no memory of their own."""

    def check(self, batch: Batch, filled: memoryview) -> None:
        """Refuse a batch that holds a NaN or an infinity, naming the tensor."""
        tensors = np.searchsorted(self.slots.leaf, batch.leaf, "right") - 1
        codes = self.codes[tensors]
        if (codes == codes[0]).all() and not nonfinite(filled, DTYPES[int(codes[0])]):
            return
        for tensor, at, length in zip(
            tensors.tolist(), batch.leaf_offset.tolist(), batch.leaf_size.tolist(), strict=True
        ):
            kind = DTYPES[int(self.codes[tensor])]
            if bad := nonfinite(filled[at : at + length], kind):
                raise SourceError(
                    f"{self.tensors[tensor].name}: {bad} values of one MiB of its {kind} output are NaN or "
                    "infinite; allow_nonfinite=True (--allow-nonfinite) accepts them"
                )

    def close(self, threads: int) -> None:
        """Close every file, several at a time: what is known only now, and the wait for the disk."""
        names, slots, digests = self.tensors.made.names, self.slots, self.digests.digests()
        # Each file's tensors as they lie in it; what is empty lies before what begins at the same byte.
        order = np.lexsort((slots.nbytes, slots.offset, slots.file))
        border = np.searchsorted(slots.file[order], np.arange(len(self.files) + 1))

        def close(number: int) -> None:
            file, own = self.files[number], order[border[number] : border[number + 1]]
            crcs = {names[i]: self.tensor_crc(i) for i in own.tolist()} if file.layout.crc else {}
            file.close(crcs, digests[own])

        each(close, range(len(self.files)), threads)

    def tensor_crc(self, tensor: int) -> int:
        """The CRC32 of a tensor whose leaves are all written."""
        first, n = int(self.slots.leaf[tensor]), int(self.slots.nbytes[tensor])
        total = 0
        for k in range(-(-n // LEAF)):
            total = crc32_combine(total, self.crcs[first + k], min(LEAF, n - k * LEAF))
        return total


class ToMemory:
    """The sink of a run over tensors that are filled where they lie; `buffers` by the plan's tensor index."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = buffers

    def worker(self, lane: Lane) -> Worker:
        """A worker for the batches of `spread`."""

        def run(batch: Batch) -> None:
            rows = batch.rows.copy()
            used, rows["dst_buffer"] = np.unique(rows["dst_buffer"], return_inverse=True)
            lane.run(rows, [self.buffers[i] for i in used.tolist()], batch.file)

        return run

    def put(self, tensor: int, offset: int, data: memoryview) -> None:
        """Copy bytes of a tensor to their place, from `offset` on."""
        self.room(tensor, offset, len(data))[:] = np.frombuffer(data, np.uint8)

    def room(self, tensor: int, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """The memory of those bytes."""
        return self.buffers[tensor].part(offset, nbytes)
