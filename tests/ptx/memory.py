"""The memory of a GPU that does not forgive: what lies where, who touched it, and what a warp's access costs.

Global memory is one array of bytes that stands at an address of its own. Between allocations nothing may be
touched. What one thread writes no other may read or write in the same launch; the same holds of shared memory
between two barriers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .operations import Array

BASE = 0x7F4200000000
GUARD = 512  # bytes between allocations at least; each begins on a multiple of it
SECTOR, LINE, WARP, BANKS = 32, 128, 32, 32


class Fault(Exception):
    """What a GPU or its watcher would stop at; `lane`: which of the threads."""

    def __init__(self, what: str, lane: int = 0) -> None:
        super().__init__(what)
        self.lane = lane


@dataclass(slots=True)
class Traffic:
    """Accesses of warps: how many, sectors of 32 bytes and lines of 128 that each touched, bytes asked."""

    requests: int = 0
    sectors: int = 0
    lines: int = 0
    nbytes: int = 0


class Touched:
    """Who wrote and who read each unit (a byte or a word) since the last time that all met."""

    def __init__(self, units: int) -> None:
        self.writer = np.zeros(units, np.int32)  # the thread's number from 1 on
        self.reader = np.zeros(units, np.int32)  # the same; -1: several

    def clear(self, units: slice) -> None:
        self.writer[units] = self.reader[units] = 0

    def read(self, units: Array, who: Array) -> Array:
        """Which of the accesses race: units of `who`, both [n, units of an access]."""
        writer = self.writer[units]
        before = self.reader[units]
        self.reader[units] = np.where((before == 0) | (before == who), who, -1)
        self.reader[units[self.reader[units] != who]] = -1
        return ((writer != 0) & (writer != who)).any(axis=1)

    def write(self, units: Array, who: Array) -> Array:
        """As `read`."""
        writer, reader = self.writer[units], self.reader[units]
        race = ((writer != 0) & (writer != who)) | ((reader != 0) & (reader != who))
        self.writer[units] = who
        return (race | (self.writer[units] != who)).any(axis=1)


class Global:
    """Global memory. `put` allocates; `launch` forgets who touched what."""

    def __init__(self, nbytes: int = 1 << 26) -> None:
        self.data = np.zeros(nbytes, np.uint8)
        self.owner = np.zeros(nbytes, np.uint16)  # which allocation a byte belongs to; 0: none
        self.names = ["nothing"]
        self.written = [""]
        self.touched = Touched(nbytes)
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.constants: dict[str, int] = {}
        self.end = GUARD

    def put(self, name: str, data: Array, at: int = 0, written: str = "never") -> int:
        """The address of a copy of these bytes, `at` after the start of an allocation that ends with them.

        `written`: "never", "once" or, by several threads that write the same, "same"."""
        raw = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
        start, self.end = self.end, -(-(self.end + at + len(raw) + GUARD) // GUARD) * GUARD
        if self.end > len(self.data):
            raise MemoryError(f"{name}: {len(raw)} bytes, {len(self.data) - start} left")
        self.data[start + at : start + at + len(raw)] = raw
        self.data[start : start + at] = 0xA5
        self.owner[start : start + at + len(raw)] = len(self.names)
        self.names.append(name)
        self.written.append(written)
        return BASE + start + at

    def get(self, address: int, nbytes: int) -> Array:
        """A copy of what lies there."""
        return self.data[address - BASE : address - BASE + nbytes].copy()

    def constant(self, name: str, data: bytes) -> int:
        """The address of a program's array, which is put there once."""
        if name not in self.constants:
            self.constants[name] = self.put(name, np.frombuffer(data, np.uint8))
        return self.constants[name]

    def launch(self) -> None:
        """A launch begins."""
        self.touched.clear(slice(self.end))

    def places(self, address: Array, nbytes: int) -> Array:
        """Offsets into `data`, checked: aligned, and inside one allocation."""
        at = (address - np.uint64(BASE)).astype(np.int64)
        wild = (at < 0) | (at > len(self.data) - nbytes)
        if not wild.any():
            wild = (self.owner[at] == 0) | (self.owner[at] != self.owner[at + nbytes - 1])
        for bad, what in (
            (wild, "is outside of what was allocated"),
            (address % nbytes != 0, "is not aligned"),
        ):
            if bad.any():
                lane = int(np.flatnonzero(bad)[0])
                raise Fault(
                    f"{nbytes} bytes at {int(address[lane]):#x} {what}{self.near(int(at[lane]))}", lane
                )
        return at

    def near(self, at: int) -> str:
        """Of which allocation a place beyond its end may have been meant."""
        before = self.owner[: max(0, min(at, len(self.owner)))]
        held = np.flatnonzero(before[-GUARD * 8 :])
        if not len(held):
            return ""
        last = len(before) - len(before[-GUARD * 8 :]) + int(held[-1])
        return f", {at - last - 1} after {self.names[before[last]]}"

    def load(self, address: Array, dtype: np.dtype, count: int, who: Array) -> Array:
        """[n, count] values, by the threads `who`."""
        nbytes = dtype.itemsize * count
        at = self.places(address, nbytes)
        mutable = np.array([w != "never" for w in self.written])[self.owner[at]]
        if mutable.any():
            units = at[mutable, None] + np.arange(nbytes)
            self.refuse(self.touched.read(units, who[mutable, None]), at[mutable], "reads what another wrote")
        self.count("read", at, nbytes, who)
        return self.data.view(dtype)[(at // dtype.itemsize)[:, None] + np.arange(count)]

    def store(self, address: Array, values: Array, who: Array) -> None:
        """[n, count] values, by the threads `who`."""
        size, count = values.itemsize, values.shape[1]
        values = np.ascontiguousarray(values).view(f"u{size}")
        at = self.places(address, size * count)
        kinds = np.array(self.written)[self.owner[at]]
        self.refuse(kinds == "never", at, "writes what is only read")
        cells = (at // size)[:, None] + np.arange(count)
        once = kinds == "once"
        units = at[once, None] + np.arange(size * count)
        self.refuse(self.touched.write(units, who[once, None]), at[once], "writes what another wrote or read")
        self.data.view(values.dtype)[cells] = values
        self.refuse(
            (self.data.view(values.dtype)[cells] != values).any(axis=1), at, "writes otherwise than another"
        )
        self.count("write", at, size * count, who)

    def prefetch(self, address: Array) -> None:
        """An address that may be prefetched is one that may be read."""
        self.places(address, 1)

    def raise_to(self, address: Array, values: Array, who: Array) -> Array:
        """What atom.max finds, one thread after the other."""
        at = self.places(address, values.itemsize) // values.itemsize
        cells = self.data.view(values.dtype)
        found = np.empty_like(values)
        for i, (cell, value) in enumerate(zip(at.tolist(), values, strict=True)):
            found[i] = cells[cell]
            cells[cell] = max(cells[cell], value)
        self.count("atomic", at * values.itemsize, values.itemsize, who)
        return found

    def refuse(self, bad: Array, at: Array, what: str) -> None:
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            raise Fault(
                f"{self.names[self.owner[at[lane]]]}: {int(at[lane]) + BASE:#x}: a thread {what}", lane
            )

    def count(self, kind: str, at: Array, nbytes: int, who: Array) -> None:
        """One instruction by the threads `who`, warp by warp."""
        warp = (who - 1) // WARP
        for owner in np.unique(self.owner[at]):
            mine = self.owner[at] == owner
            t = self.traffic.setdefault((self.names[owner], kind), Traffic())
            key, place = warp[mine].astype(np.int64) << 40, at[mine]
            t.requests += len(np.unique(key))
            t.sectors += len(np.unique(key | place // SECTOR))
            t.lines += len(np.unique(key | place // LINE))
            t.nbytes += len(place) * nbytes


class Shared:
    """Shared memory of several blocks, [blocks, words]. What nobody wrote is not read."""

    def __init__(self, blocks: int, nbytes: int) -> None:
        self.words = -(-nbytes // 4)
        self.data = np.full(blocks * self.words, 0xDEADBEEF, np.uint32)
        self.known = np.zeros(blocks * self.words, bool)
        self.touched = Touched(blocks * self.words)
        self.waves: Counter[str] = Counter()
        """Times that the banks were asked, and how few would have done: by "load", "store", "least"."""

    def meet(self, block: int) -> None:
        """The threads of a block have met: what they touched is settled."""
        self.touched.clear(slice(block * self.words, (block + 1) * self.words))

    def places(self, address: Array, nbytes: int, block: Array) -> Array:
        """[n, words] of `data`, checked."""
        for bad, what in (
            (address > 4 * self.words - nbytes, "outside"),
            (address % nbytes != 0, "not aligned"),
        ):
            if bad.any():
                lane = int(np.flatnonzero(bad)[0])
                raise Fault(f"{nbytes} bytes of shared memory at {int(address[lane])}: {what}", lane)
        if nbytes % 4:
            raise Fault(f"shared memory in pieces of {nbytes} bytes is not known here")
        return (block * self.words + address // 4)[:, None] + np.arange(nbytes // 4)

    def load(self, address: Array, dtype: np.dtype, count: int, who: Array, block: Array) -> Array:
        """[n, count] values, by the threads `who` of `block`."""
        at = self.places(address.astype(np.int64), dtype.itemsize * count, block)
        self.refuse(~self.known[at].all(axis=1), "reads what nobody wrote")
        self.refuse(self.touched.read(at, who[:, None]), "reads what another wrote since they met")
        self.count("load", at, who)
        return self.data[at].view(dtype)

    def store(self, address: Array, values: Array, who: Array, block: Array) -> None:
        """[n, count] values, by the threads `who` of `block`."""
        at = self.places(address.astype(np.int64), values.itemsize * values.shape[1], block)
        self.refuse(self.touched.write(at, who[:, None]), "writes what another wrote or read since they met")
        self.known[at] = True
        self.data[at] = np.ascontiguousarray(values).view(np.uint32)
        self.count("store", at, who)

    def refuse(self, bad: Array, what: str) -> None:
        if bad.any():
            raise Fault(f"shared memory: a thread {what}", int(np.flatnonzero(bad)[0]))

    def count(self, kind: str, at: Array, who: Array) -> None:
        """A warp asks in as many parts as it wants times 128 bytes; in each part the busiest bank decides."""
        part = (who - 1) // (WARP // at.shape[1])
        groups, group = np.unique(part, return_inverse=True)
        words = np.unique(group[:, None].astype(np.int64) << 40 | at)
        bank = (words & (1 << 40) - 1) % self.words % BANKS
        busy = np.bincount((words >> 40) * BANKS + bank, minlength=len(groups) * BANKS).reshape(-1, BANKS)
        self.waves[kind] += int(busy.max(axis=1).sum())
        self.waves["least"] += len(groups)
