"""Batches through reader and executor, by several workers at once, into files or tensors.

Law: a worker's error stops all workers and is raised once, in the caller's thread; so does Ctrl-C.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..digest import combined, crc32, crc32_combine, leaf_digests
from ..dtypes import DTYPES
from ..errors import SourceError, WriteError
from ..extents import Buffer, fresh
from ..finite import nonfinite
from ..output.writer import OutputFile
from ..planning.batches import LEAF, Batch, Slots
from ..planning.planned import PlannedTensors
from ..reader import Lane

Worker = Callable[[Batch], None]


class Work(Protocol):
    """What a worker does at once: output bytes [start, stop)."""

    @property
    def start(self) -> int:
        """The first byte."""

    @property
    def stop(self) -> int:
        """One past the last."""


Item = TypeVar("Item", bound=Work)


AHEAD = 32
"""Batches made ahead of each worker."""


class _Waiting(Generic[Item]):
    """Batches between the caller that makes them and the workers that run them, by the place they go to.

    A signal may end what the caller does at any moment: it never holds a lock that a worker wants."""

    def __init__(self, room: int, place: Callable[[Item], int]) -> None:
        self._room, self._place = room, place
        self._new: SimpleQueue[tuple[int, Item] | None] = SimpleQueue()  # (turn, item); None at the end
        self._less = threading.Lock()  # held but when there is room again
        self._less.acquire()
        self._workers = threading.Lock()  # of what follows
        self._queues: dict[int, deque[tuple[int, Item]]] = {}  # by place
        self._busy: list[int] = []  # the places of the items that run
        self._made = self._taken = 0

    def put(self, item: Item) -> None:
        """Add one; waits while there is no room."""
        while self._made - self._taken >= self._room:
            self._less.acquire()
        self._new.put((self._made, item))
        self._made += 1

    def end(self) -> None:
        """No more will come."""
        self._new.put(None)

    def take(self) -> tuple[int, Item] | None:
        """The next item and its place: of those whose place nobody works on, if there are any; None at the
        end. To be followed by `done`."""
        with self._workers:
            while not self._queues or not self._new.empty():
                if (new := self._new.get()) is None:
                    self.end()  # the other workers are to hear it too
                    if not self._queues:
                        return None
                    break
                self._queues.setdefault(self._place(new[1]), deque()).append(new)
            free = [p for p in self._queues if p not in self._busy]
            place = min(free or self._queues, key=lambda p: self._queues[p][0][0])
            _, item = self._queues[place].popleft()
            if not self._queues[place]:
                del self._queues[place]
            self._busy.append(place)
            self._taken += 1
            if self._made - self._taken <= self._room // 2 and self._less.locked():
                self._less.release()  # the caller is not woken for each
            return place, item

    def done(self, place: int) -> None:
        """An item of that place has run."""
        with self._workers:
            self._busy.remove(place)


def feed(
    batches: Iterable[Item],
    workers: Sequence[Callable[[Item], None]],
    done: Callable[[int], None],
    place: Callable[[Item], int] = lambda item: 0,
) -> None:
    """Run every batch on one of the workers; `done` gets each batch's output bytes, in the caller's thread.

    The caller's thread makes the batches (planning) while the workers run them. `place`: where an item is
    written; workers keep to places of their own where they can, since two writers of a file wait for each
    other. Raises the first error of a worker after all have stopped, WriteError where the system starts no
    more threads."""
    waiting = _Waiting(AHEAD * len(workers), place)
    finished: SimpleQueue[int] = SimpleQueue()
    errors: list[BaseException] = []
    stop = threading.Event()

    def work(worker: Callable[[Item], None]) -> None:
        while (taken := waiting.take()) is not None:
            place, batch = taken
            try:
                if not stop.is_set():
                    worker(batch)
                    finished.put(batch.stop - batch.start)
            except BaseException as error:  # carried to the caller's thread, which raises it
                errors.append(error)
                stop.set()
            waiting.done(place)

    def report() -> None:
        while not finished.empty():
            done(finished.get())

    threads = [
        threading.Thread(target=work, args=(w,), name=f"fastckpt-{i}", daemon=True)
        for i, w in enumerate(workers)
    ]
    heard: BaseException | None = None
    try:
        for thread in threads:
            _start(thread, len(threads))
        for batch in batches:
            if stop.is_set():
                break
            waiting.put(batch)
            report()
    except BaseException as error:
        stop.set()
        heard = error
    # Whatever is raised here, a second Ctrl-C too: no worker may outlive the files and mappings it uses.
    while True:
        try:
            waiting.end()
            alive = [t for t in threads if t.is_alive()]
            if not alive:
                break
            alive[0].join(0.1)
            report()
        except BaseException as error:
            stop.set()
            heard = heard or error
    if heard is not None:
        raise heard
    if errors:
        raise errors[0]
    report()


def _start(thread: threading.Thread, wanted: int) -> None:
    try:
        thread.start()
    except RuntimeError as e:
        if "start new thread" in str(e):
            raise WriteError(f"threads: {wanted} wanted, the system starts no more ({e})") from None
        # A signal was heard while the new thread was waited for, and its lock is not held any more.
        raise (e.__context__ or e) from None


class ToDigests:
    """The end of a run that only wants to know what the bytes would be: the digest of every tensor."""

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
        lane.run(batch.rows, [Buffer(staging, address, n)])
        return whole[:n]

    return made


class ToFiles:
    """The end of a run over files: open files, leaf digests, checksums, the finite check.

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
                    "infinite; allow_nonfinite accepts them"
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

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(close, range(len(self.files))))

    def tensor_crc(self, tensor: int) -> int:
        """The CRC32 of a tensor whose leaves are all written."""
        first, n = int(self.slots.leaf[tensor]), int(self.slots.nbytes[tensor])
        total = 0
        for k in range(-(-n // LEAF)):
            total = crc32_combine(total, self.crcs[first + k], min(LEAF, n - k * LEAF))
        return total


class ToMemory:
    """The end of a run over tensors that are filled where they lie; `buffers` by the plan's tensor index."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = buffers

    def worker(self, lane: Lane) -> Worker:
        """A worker whose batches are cut apart."""

        def run(batch: Batch) -> None:
            rows = batch.rows.copy()
            used, rows["dst_buffer"] = np.unique(rows["dst_buffer"], return_inverse=True)
            lane.run(rows, [self.buffers[i] for i in used.tolist()])

        return run

    def put(self, tensor: int, offset: int, data: memoryview) -> None:
        """Copy bytes of a tensor to their place, from `offset` on."""
        self.room(tensor, offset, len(data))[:] = np.frombuffer(data, np.uint8)

    def room(self, tensor: int, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """The memory of those bytes."""
        return self.buffers[tensor].part(offset, nbytes)
