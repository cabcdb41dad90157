"""The floors: what the machine needs for the same bytes when nobody thinks about them.

M is libc's memcpy of the source, C gathers, casts and digests into reused staging, W writes the output's
bytes from one hot buffer. Each runs on the threads, over the bytes and into the files of its subject.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from fastckpt.digest import LEAF, crc32, leaf_digests
from fastckpt.executors.cpu import Cpu
from fastckpt.extents import Buffer, fresh
from fastckpt.output import syscalls
from fastckpt.planning.batches import Batch, cut, spread
from fastckpt.planning.binding import Binding
from fastckpt.planning.copies import NOTHING
from fastckpt.planning.plans import Plan
from fastckpt.reader import Lane, Mapped
from fastckpt.running.limits import BAND, STAGE
from fastckpt.running.quantising import Quantising, Stretch

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcpy.restype = ctypes.c_void_p

PIECE = 8 << 20


def share(work: Iterable[Callable[[], object]], threads: int) -> None:
    """Run the pieces of work on so many threads, each taking the next."""
    if threads == 1:
        for piece in work:
            piece()
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda piece: piece(), work):
            pass


class Memcpy:
    """M: the source bytes, from where they lie into one touched buffer."""

    def __init__(self, source: Sequence[tuple[int, int]], threads: int) -> None:
        self.threads = threads
        self.nbytes = sum(n for _, n in source)
        self.into = np.ones(self.nbytes, np.uint8)
        at = itertools.accumulate((n for _, n in source), initial=self.into.ctypes.data)
        self.pieces = [
            (to + k, address + k, min(PIECE, n - k))
            for (address, n), to in zip(source, at, strict=False)
            for k in range(0, n, PIECE)
        ]

    def __call__(self) -> None:
        share([lambda p=p: _memcpy(*p) for p in self.pieces], self.threads)


def batches(plan: Plan, binding: Binding, *, band: int = BAND, apart: bool = False) -> list[Batch]:
    """All batches of a plan, as the road cuts them; not what it quantises."""
    quantising = Quantising(plan, plan.slots(), {})
    how = partial(spread, stage=band) if apart else partial(cut, stage=STAGE, thin=LEAF)
    return [
        batch
        for first, chunk in plan.chunks()
        for batch in how(quantising.others(first, chunk), first, quantising.rest, binding, band=band)
    ]


def source_runs(plan: Plan, binding: Binding, bases: Sequence[int]) -> list[tuple[int, int]]:
    """(address, nbytes) of the source bytes a plan needs, neighbours joined; `bases` by place."""
    spans: list[tuple[int, int, int]] = []
    for batch in batches(plan, binding, apart=True):
        rows = batch.rows[batch.rows["src_buffer"] != NOTHING]
        size = rows["shape"].astype(np.int64).prod(axis=1) * 4  # the benchmarks' sources are fp32
        spans += zip(rows["src_buffer"].tolist(), rows["src"].tolist(), size.tolist(), strict=True)
    spans.sort()
    out: list[tuple[int, int]] = []
    for place, start, size in spans:
        address = bases[place] + start
        if out and out[-1][0] + out[-1][1] == address:
            out[-1] = (out[-1][0], out[-1][1] + size)
        else:
            out.append((address, size))
    return out


class GatherCast:
    """C: a fresh mapping, every batch into reused staging, digests (and CRCs) taken; nothing is written."""

    def __init__(self, plan: Plan, threads: int) -> None:
        self.threads = threads
        self.binding = Binding.of(plan.extents)
        self.batches = batches(plan, self.binding)
        self.crc = [f.crc for f in plan.files]
        self.staging = [fresh(BAND) for _ in range(threads)]
        for staging in self.staging:
            staging[:] = 1

    def __call__(self) -> None:
        each(self.binding, self.batches, [partial(self.worker, s) for s in self.staging])

    def worker(self, staging: np.ndarray, lane: Lane) -> Callable[[Batch], None]:
        address, view = staging.ctypes.data, memoryview(staging.data)

        def run(batch: Batch) -> None:
            n = batch.stop - batch.start
            lane.run(batch.rows, [Buffer(staging, address, n)])
            leaf_digests(view[:n], batch.leaf_offset, batch.leaf_size)
            if self.crc[batch.file]:
                for at, size in zip(batch.leaf_offset.tolist(), batch.leaf_size.tolist(), strict=True):
                    crc32(view[at : at + size])

        return run


class GatherQuantise(GatherCast):
    """C of a plan that quantises, without a first read: values are made band by band in reused staging and
    digested there, the rest is cast. To be readied before each run."""

    def __init__(self, plan: Plan, threads: int) -> None:
        super().__init__(plan, threads)
        self.plan = plan
        self.ready()

    def ready(self) -> None:
        """The stretches, which count what is left of their tensors."""
        self.quantising = Quantising(self.plan, self.plan.slots(), {})
        self.stretches = [
            stretch
            for first, chunk in self.plan.chunks()
            for stretch in self.quantising.stretches(first, chunk, self.binding)
        ]

    def __call__(self) -> None:
        each(self.binding, [*self.stretches, *self.batches], [partial(self.both, s) for s in self.staging])

    def both(self, staging: np.ndarray, lane: Lane) -> Callable[[Batch | Stretch], None]:
        cast, quantise = self.worker(staging, lane), self.quantising.worker(lane, Digested())
        return lambda item: quantise(item) if isinstance(item, Stretch) else cast(item)


class Digested:
    """An end that digests what it is given and keeps nothing."""

    def room(self, tensor: int, offset: int, nbytes: int) -> None:
        """No memory."""

    def put(self, tensor: int, offset: int, data: memoryview) -> None:
        at = np.arange(0, len(data), LEAF, dtype=np.int64)
        leaf_digests(data, at, np.minimum(LEAF, len(data) - at))


Item = TypeVar("Item")


def each(
    binding: Binding, items: Iterable[Item], workers: Sequence[Callable[[Lane], Callable[[Item], None]]]
) -> None:
    """Every item on one of the workers, over a fresh mapping."""
    todo = iter(items)
    lock = threading.Lock()

    def work(make: Callable[[Lane], Callable[[Item], None]]) -> None:
        run = make(reader.lane(executor))
        while True:
            with lock:
                item = next(todo, None)
            if item is None:
                return
            run(item)

    executor = Cpu()
    with Mapped(binding.places) as reader:
        share([partial(work, w) for w in workers], len(workers))


class Write:
    """W: files of these sizes from one hot buffer, allocated first; one thread a file."""

    def __init__(self, sizes: Sequence[int], folder: str, threads: int, *, durable: bool) -> None:
        self.sizes, self.folder, self.threads, self.durable = sizes, folder, threads, durable
        self.hot = memoryview(np.ones(LEAF, np.uint8).data)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self) -> None:
        os.makedirs(self.folder)

        def write(number: int, size: int) -> None:
            fd = os.open(os.path.join(self.folder, str(number)), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            syscalls.allocate(fd, size)
            for at in range(0, size, LEAF):
                n = min(LEAF, size - at)
                os.pwrite(fd, self.hot[:n], at)
                if self.durable:
                    syscalls.start_writeback(fd, at, n)
            if self.durable:
                os.fsync(fd)
            os.close(fd)

        share([lambda k=k, n=n: write(k, n) for k, n in enumerate(self.sizes)], self.threads)


def drop_cache(folder: str) -> None:
    """Put every file below `folder` out of the page cache, where the kernel does it."""
    for root, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def touch(folder: str) -> None:
    """Read every file below `folder`, so that it lies in the page cache."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb", buffering=0) as f:
                while f.read(PIECE):
                    pass
