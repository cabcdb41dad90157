"""Bring the bytes a batch needs to where an executor can see them: mapped, or read by position.

Mapped is the road with the compiled module: its mappings survive a file that is truncated under them
(a SourceError, not a dead process), and pages are given back behind the reader; what nothing changes is read
by position. Positioned is the road without it: reads into a scratch buffer, never a memmap.

Law: a file that is not the one whose header was read (size, time, inode) is an error.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .digest import LEAF
from .errors import SourceError, WriteError, naming
from .extents import Buffer, File, fresh
from .paths import fill, let_go
from .planning.copies import AXES, NOTHING, Executor, Runner, Table, item_sizes, nbytes

GAP = 1 << 16
"""The widest gap in bytes that one rank alone reads through."""

OPEN = 64
"""The most files that a lane which reads by position keeps open."""


class Lane(Protocol):
    """One worker's way through a reader: what it needs is read, then run. `bytes_read`: of sources, for the
    outputs; `bytes_scanned`: for scales alone."""

    bytes_read: int
    bytes_scanned: int

    def run(self, rows: Table, destinations: Sequence[Buffer], file: int = 0) -> None:
        """Fill `destinations`, parts of the output `file`, as bound `rows` say. Raises SourceError when a
        file gave less than it had."""

    def direct(self, rows: Table, staging: memoryview) -> memoryview | None:
        """The bytes that `rows` make, as many as `staging` has, where they are one run of a file, element for
        element; else None. In `staging`, or elsewhere until the next call.

        Raises SourceError when a file gave less than it had."""


class Reader(Protocol):
    """Opened sources; a context manager."""

    def lane(self, executor: Executor) -> Lane:
        """A lane for one worker thread."""

    def batch_sizes(self, stage: int, band: int) -> tuple[int, int]:
        """Output bytes to make at once, of tensors as they lie and of one that is transposed: `band` at most,
        and `stage` of what is mapped."""

    def __enter__(self) -> Reader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def same_file(place: File, fd: int) -> None:
    """Refuse an open file that is not the one whose header was read."""
    now = os.fstat(fd)
    if place.mtime_ns == 0:
        changed = now.st_size != place.nbytes
    else:
        changed = (now.st_size, now.st_mtime_ns, now.st_ino) != (place.nbytes, place.mtime_ns, place.inode)
    if changed:
        how = f"{place.nbytes} bytes then, {now.st_size} now"
        if now.st_size == place.nbytes:
            how = "as large as then, but " + ("written to" if now.st_ino == place.inode else "another file")
        raise SourceError(
            f"{place.path}: changed since its header was read ({how}); open the checkpoint again"
        )


def _open(place: File) -> int:
    try:
        fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            same_file(place, fd)
        except BaseException:
            let_go(fd)
            raise
    except OSError as e:
        kind = WriteError if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM) else SourceError
        raise kind(f"{place.path}: {e.strerror}") from None
    return fd


def check_unchanged(places: Sequence[File | Buffer], used: Iterable[int]) -> None:
    """Refuse what was read from files that are no longer those whose headers were read: some bytes may be
    old and some new."""
    for i in used:
        place = places[i]
        if isinstance(place, File):
            let_go(_open(place))


class Positioned:
    """Reads each batch's runs into a scratch buffer by position.

    `gap`: the widest gap in bytes read through; 0 reads exactly what is needed."""

    def __init__(self, places: Sequence[File | Buffer], *, gap: int = 0) -> None:
        self.places = tuple(places)
        self.gap = gap
        self.lanes: list[PositionedLane] = []

    def __enter__(self) -> Positioned:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in self.lanes:
            lane.close()
        if kind is None:
            check_unchanged(self.places, {place for lane in self.lanes for place in lane.used})

    def lane(self, executor: Executor) -> PositionedLane:
        """A lane with a scratch buffer and descriptors of its own."""
        self.lanes.append(PositionedLane(self, executor))
        return self.lanes[-1]

    def batch_sizes(self, stage: int, band: int) -> tuple[int, int]:
        """As little as there is: the scratch buffer holds what a batch needs."""
        return LEAF, LEAF


class PositionedLane:
    """See Positioned."""

    def __init__(self, reader: Positioned, executor: Executor) -> None:
        self.reader = reader
        self.executor = executor
        self.bytes_read = self.bytes_scanned = 0
        self.buffers = [p for p in reader.places if isinstance(p, Buffer)]
        held = [i for i, p in enumerate(reader.places) if isinstance(p, Buffer)]
        self.index = {i: k for k, i in enumerate(held)}
        self.scratch = np.empty(0, np.uint8)
        self.runner: Runner | None = None
        self.fds: dict[int, int] = {}
        self.used: set[int] = set()

    def direct(self, rows: Table, staging: memoryview) -> memoryview | None:
        """The bytes in `staging`. Tensors in memory are copied as all else is."""
        if len(rows) != 1 or len(staging) == 0:
            return None
        place, start = int(rows["src_buffer"][0]), int(rows["src"][0])
        if place == NOTHING or place in self.index or not is_one_run(rows[0], len(staging)):
            return None
        self._read(place, start, staging)
        self.bytes_read += len(staging)
        return staging

    def close(self) -> None:
        """Close what is open."""
        for fd in self.fds.values():
            let_go(fd)
        self.fds = {}

    def run(self, rows: Table, destinations: Sequence[Buffer], file: int = 0) -> None:
        """Read the runs of every row, packed, then run the rows over the scratch buffer."""
        rows = rows.copy()
        reads: list[tuple[int, int, int, int]] = []  # place, offset, bytes, where in scratch
        used = 0
        for row in rows:
            place = int(row["src_buffer"])
            if place == NOTHING:
                continue
            if place in self.index:
                row["src_buffer"] = 1 + self.index[place]
                continue
            start = int(row["src"])
            runs, length, strides = packed(row, self.reader.gap)
            row["src_buffer"], row["src"], row["src_stride"] = 0, used, strides
            for offset in runs.tolist():
                reads.append((place, start + offset, length, used))
                used += length
        if self.runner is None or used > len(self.scratch):
            if used > len(self.scratch):
                self.scratch = fresh(used)
            held = Buffer(self.scratch, self.scratch.ctypes.data, self.scratch.nbytes)
            self.runner = self.executor.bind([held, *self.buffers])
        view = memoryview(self.scratch.data)
        for place, offset, length, at in reads:
            self._read(place, offset, view[at : at + length])
        self.bytes_read += used
        self.runner.run(rows, destinations)

    def _read(self, place: int, offset: int, into: memoryview) -> None:
        at = self.reader.places[place]
        assert isinstance(at, File)  # what lies in a buffer is not read
        fd = self._fd(place, at)
        try:
            with naming(at.path):
                fill(into, fd, offset)
        except OSError as e:
            raise SourceError(f"{at.path}: {e.strerror} from byte {offset} on") from None

    def _fd(self, place: int, at: File) -> int:
        """The descriptor of a place that is a file; the one opened first gives way beyond OPEN."""
        if place not in self.fds:
            if len(self.fds) >= OPEN:
                let_go(self.fds.pop(next(iter(self.fds))))
            self.fds[place] = _open(at)
            self.used.add(place)
        return self.fds[place]


def packed(row: np.void, gap: int) -> tuple[NDArray[np.int64], int, list[int]]:
    """How to read one row: the runs' offsets in bytes from its first element, the bytes of each run, and
    the row's source strides once the runs lie back to back."""
    shape, strides = row["shape"].tolist(), row["src_stride"].tolist()
    covered = int(item_sizes([int(row["src_dtype"])])[0])
    new = [0] * AXES
    offsets = np.zeros(1, np.int64)
    whole = True
    length = covered
    count = 1
    for axis in sorted(range(AXES), key=lambda a: strides[a]):
        n, step = shape[axis], strides[axis]
        if n == 1 or step == 0:
            continue
        if whole and step <= covered + gap:
            new[axis] = step
            covered += (n - 1) * step
            length = covered
            continue
        whole = False
        new[axis] = length * count
        count *= n
        offsets = (np.arange(n, dtype=np.int64)[:, None] * step + offsets[None, :]).ravel()
    return offsets, length, new


class Mapped:
    """Maps every file and gives pages back behind the copies (compiled module only)."""

    def __init__(self, places: Sequence[File | Buffer]) -> None:
        from . import _C

        self.places = tuple(places)
        self.mappings: dict[int, _C.Mapping] = {}
        self.runners: dict[Executor, Runner] = {}
        self.used: set[int] = set()
        self.by_position = Positioned(places)
        try:
            for i, place in enumerate(self.places):
                if isinstance(place, File):
                    let_go(_open(place))
                    self.mappings[i] = _C.Mapping(place.path, place.nbytes)
        except BaseException as e:
            self.__exit__(type(e), e, None)
            raise
        self.buffers = [
            Buffer(self.mappings[i], self.mappings[i].address, p.nbytes) if isinstance(p, File) else p
            for i, p in enumerate(self.places)
        ]

    def __enter__(self) -> Mapped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.by_position.__exit__(kind, error, trace)
            if kind is None:  # bytes cut off the last page that is left read as zeros, without a fault
                check_unchanged(self.places, self.used)
        finally:
            for mapping in self.mappings.values():
                mapping.close()
            self.mappings = {}

    def lane(self, executor: Executor) -> MappedLane:
        """A lane; all lanes of an executor share one runner, so that none gives back what another reads."""
        if executor not in self.runners:
            self.runners[executor] = executor.bind(self.buffers)
        return MappedLane(self, self.runners[executor], self.by_position.lane(executor))

    def batch_sizes(self, stage: int, band: int) -> tuple[int, int]:
        """Nothing is held beside the outputs."""
        return min(stage, band), band


class MappedLane:
    """See Mapped."""

    def __init__(self, reader: Mapped, runner: Runner, by_position: PositionedLane) -> None:
        self.reader = reader
        self.runner = runner
        self.by_position = by_position
        self.bytes_read = self.bytes_scanned = 0

    def run(self, rows: Table, destinations: Sequence[Buffer], file: int = 0) -> None:
        """Run the rows over the mappings; the runner refuses pages that were not there."""
        self.runner.run(rows, destinations)
        self.bytes_read += int(nbytes(rows, "src").sum())
        self.reader.used.update(i for i in set(rows["src_buffer"].tolist()) if i != NOTHING)

    def direct(self, rows: Table, staging: memoryview) -> memoryview | None:
        """The bytes in `staging`, read by position: over the mapping they would be fetched twice, from far
        away, to be digested and to be written, and every page be mapped and given back."""
        found = self.by_position.direct(rows, staging)
        self.bytes_read += 0 if found is None else len(found)
        return found


def is_one_run(row: np.void, nbytes: int) -> bool:
    """Whether a row copies `nbytes` as they are, from one run to the start of its destination."""
    item = int(item_sizes([int(row["dst_dtype"])])[0])
    shape = row["shape"].tolist()
    return bool(
        row["src_dtype"] == row["dst_dtype"]
        and row["dst"] == 0
        and shape[:-1] == [1] * (AXES - 1)
        and shape[-1] * item == nbytes
        and row["src_stride"][-1] == row["dst_stride"][-1] == item
    )
