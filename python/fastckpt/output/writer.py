"""The one place that makes output real: files at their final size, bytes at their final offset, one commit.

Law: nothing of a run counts before `commit`, and nothing of it stays without. A directory with a
`fastckpt.json` is whole. `whole.py` and `part.py` are the two ways there; docs/formats.md has the manifest.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..digest import LEAF, Digesting
from ..errors import WriteError, expect
from ..paths import inside, pieces_of
from . import syscalls
from .files import FileLayout
from .filesystem import as_write_errors, standing, write_file
from .manifest import NAME, TRACE, FileEntry, Manifest, Record, Shard, TensorTable, rank_of
from .part import Part
from .signals import Endings
from .whole import Whole

_EARLY = 1 << 18
"""Writes of this many bytes are started on their way to disk at once; smaller ones wait for company."""


class OutputFile:
    """A file of the output, at its final size, its head and fixed parts written."""

    def __init__(self, output: Output, layout: FileLayout, rank: int, fd: int, staged: str) -> None:
        self.layout, self.rank = layout, rank
        self._output, self._fd, self._staged = output, fd, staged
        self._left = int(layout.slots.nbytes.sum())
        self._rest = Digesting()  # of the bytes that are no tensor's: the head, in `close` the parts
        self._lock = threading.Lock()

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset` of the file; any thread, each byte once.

        Raises WriteError when the bytes do not fit the file or the disk."""
        if data.nbytes == 0:
            return
        flat = data.cast("B")
        if offset < 0 or offset + flat.nbytes > self.layout.nbytes:
            end = offset + flat.nbytes
            raise WriteError(f"{self.layout.path}: bytes [{offset}, {end}) of a file of {self.layout.nbytes}")
        self._put(offset, flat)
        if self._output.durable and flat.nbytes >= _EARLY:
            syscalls.start_writeback(self._fd, offset, flat.nbytes)
        with self._lock:
            self._left -= flat.nbytes

    def close(self, crcs: Mapping[str, int], digests: NDArray[np.uint64]) -> None:
        """Finish the file; slot name -> CRC32 (needed where the layout says so), the digest of each slot.

        Raises WriteError where the tensors' bytes did not all come, or a digest is missing."""
        layout = self.layout
        if self._left:
            raise WriteError(f"{layout.path}: {self._left} bytes of its tensors were not written")
        if len(digests) != len(layout.slots):
            raise WriteError(f"{layout.path}: {len(digests)} digests for {len(layout.slots)} tensors")
        closing = layout.closing(crcs)
        for offset, data in closing:
            self._put(offset, memoryview(data))
        parts = sorted([*layout.fixed, *closing])
        _check_tiles(layout, [(0, self._rest.nbytes), *((offset, len(data)) for offset, data in parts)])
        self._rest.add(b"".join([data for _, data in parts]))
        self.release(sync=self._output.durable)
        self._output._finished(self, FileEntry(layout.nbytes, self._rest.digest()), digests)

    def begin(self) -> None:
        """Write what is known before any tensor is. Raises OSError."""
        for piece in self.layout.head():
            _write_all(self._fd, self._rest.nbytes, memoryview(piece))
            self._rest.add(piece)
        for offset, data in self.layout.fixed:
            _write_all(self._fd, offset, memoryview(data))

    def release(self, *, sync: bool) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with self._output.as_write_errors(self.layout.path):
                try:
                    if sync:
                        os.fsync(fd)
                finally:
                    os.close(fd)

    def _put(self, offset: int, data: memoryview) -> None:
        with self._output.as_write_errors(self.layout.path):
            _write_all(self._fd, offset, data)


class Output:
    """One output directory being made: `with Output(...) as out:` create, write, close, `out.commit(record)`.

    `rank` None makes all `world` ranks at once and the directory appears in one step; with `rank`, the
    files of that rank are added to a directory that `world` ranks share, and the last one completes it.
    `key` is the plan's, the same for every rank of a set. `durable` waits for the disk. `keep`: paths that
    overwriting must not remove. Leaving without `commit` (an error, Ctrl-C, SIGTERM, SIGHUP) leaves nothing.
    Raises WriteError before any work where the directory is not empty and `overwrite` is not asked for."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        key: str,
        rank: int | None = None,
        world: int = 1,
        overwrite: bool = False,
        durable: bool = True,
        keep: Iterable[str] = (),
    ) -> None:
        expect("durable", durable, bool)
        expect("overwrite", overwrite, bool)
        if not os.fspath(path) or "\0" in os.fspath(path):
            raise WriteError(f"out: {os.fspath(path)!r} is no name of a directory")
        self.path, self.key, self.rank, self.world, self.durable = os.fspath(path), key, rank, world, durable
        self._place: Whole | Part = (
            Whole(self.path, overwrite=overwrite, durable=durable, keep=keep)
            if rank is None
            else Part(self.path, rank, world, key, overwrite=overwrite, durable=durable, keep=keep)
        )
        self._open: list[OutputFile] = []
        self._names: set[str] = set()
        self._shared: dict[str, FileEntry] = {}
        self._files: dict[int, dict[str, FileEntry]] = {}
        self._tensors: dict[int, TensorTable] = {}
        self._aliases: dict[int, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._committed = False
        self._endings = Endings()

    def __enter__(self) -> Output:
        try:
            self._endings.heard()
            self._place.start()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def refuse(self, nbytes: int) -> None:
        """Raise WriteError where entering or `reserve` would, as far as that shows while nothing is made: not
        where another run makes this rank, nor where the file system cannot exchange two directories."""
        self._place.refuse()
        if self.rank is not None and self.done(self.rank):
            return
        with as_write_errors(self.path):
            directory = self._standing()
            if not os.path.isdir(directory):
                raise WriteError(f"{self.path}: {directory} is no directory")
            if not os.access(directory, os.W_OK | os.X_OK):
                raise WriteError(f"{self.path}: {directory} cannot be written to")
        self.reserve(nbytes)

    def reserve(self, nbytes: int) -> None:
        """Raise WriteError, before anything is written, where the file system has no room for `nbytes`."""
        with as_write_errors(self.path):
            s = os.statvfs(self._standing())
        free = s.f_bavail * s.f_frsize
        if s.f_blocks and nbytes > free:  # one without blocks does not tell
            raise WriteError(f"{self.path}: needs {nbytes} bytes, the file system has {free} free")

    def done(self, rank: int) -> bool:
        """Whether a rank of a shared directory is done: its record is of this plan, its files whole."""
        return isinstance(self._place, Part) and self._place.done(rank) is not None

    def complete(self) -> Manifest:
        """The manifest of a set whose rank here is `done`: the whole one, written if only that was missing.

        Raises WriteError where this rank is not done."""
        if isinstance(self._place, Part) and (done := self._place.done(self._place.rank)) is not None:
            return self._place.complete(done)
        raise WriteError(f"{self.path}: rank {self.rank} is not done")

    def create(self, layout: FileLayout, rank: int | None = None) -> OutputFile:
        """A file of `rank` (default: this output's, or 0), at its final size, with its fixed parts.

        Raises WriteError where the name is taken or leaves the directory, or the space is not there."""
        staged = self._stage(layout.path)
        with self.as_write_errors(layout.path):
            fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        owner = rank if rank is not None else self.rank or 0
        file = OutputFile(self, layout, owner, fd, staged)
        with self._lock:
            self._open.append(file)
        with self.as_write_errors(f"{layout.path} ({layout.nbytes} bytes)"):
            syscalls.allocate(fd, layout.nbytes)
            file.begin()
        return file

    def copy(self, source: str | os.PathLike[str]) -> None:
        """A file copied as it is, under its own name (config, tokenizer). Raises SourceError."""
        source = os.fspath(source)
        self._small(os.path.basename(source), pieces_of(source, LEAF), None)

    def text(self, name: str, data: bytes, rank: int | None = None) -> None:
        """A small file of these bytes; of all ranks together, or of `rank`, such as its index."""
        self._small(name, (data[k : k + LEAF] for k in range(0, len(data), LEAF)), rank)

    def adopt(self, path: str | os.PathLike[str], name: str) -> None:
        """A file that somebody else wrote on this file system, moved in as it is; read once for its digest.

        Raises WriteError where it is not there or lies on another file system."""
        staged = self._stage(name)
        with as_write_errors(f"{os.fspath(path)} as {name}"):
            os.rename(path, staged)
            with open(staged, "rb") as f:
                digesting = Digesting.of(iter(lambda: f.read(LEAF), b""))
                if self.durable:
                    os.fsync(f.fileno())
        self._place.settle(name, staged)
        with self._lock:
            self._shared[name] = FileEntry(digesting.nbytes, digesting.digest())

    def commit(self, record: Record) -> Manifest:
        """Make the output real; the manifest of the set, or of this rank where others are still to come.

        Raises WriteError where a file is not closed, and leaves everything as it was before the run."""
        if self._open:
            raise WriteError(f"{self._open[0].layout.path}: was not closed")
        ranks = range(self.world) if self.rank is None else (self.rank,)
        shards = tuple(
            Shard(r, self._files.get(r, {}), self._tensors.get(r, TensorTable()), self._aliases.get(r, {}))
            for r in ranks
        )
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        manifest = Manifest(self.key, self.world, now, record, self._shared, shards)
        result = self._place.commit(manifest)
        self._committed = True
        return result

    def as_write_errors(self, name: str) -> AbstractContextManager[None]:
        """Turn an OSError into a WriteError that names a file of this output."""
        return as_write_errors(os.path.join(self.path, name))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of a commit."""
        left = self._place.left if isinstance(self._place, Whole) else ""
        return (f"{left}: the old output, which this user may not remove",) if left else ()

    # ---- internals ----

    def _standing(self) -> str:
        """Where the first thing of this output is made: the nearest directory that is there."""
        return standing(self._place.parent if isinstance(self._place, Whole) else self._place.path)

    def _stage(self, name: str) -> str:
        """Check a file's name, take it, and say where to write."""
        if not inside(name):
            raise WriteError(f"file name {name!r} leaves the directory")
        if name == NAME or rank_of(name) is not None or name.startswith(TRACE):
            raise WriteError(f"file name {name!r} is fastckpt's own")
        with self._lock:
            if name in self._names:
                raise WriteError(f"{name}: written twice")
            self._names.add(name)
        return self._place.stage(name)

    def _small(self, name: str, pieces: Iterable[bytes], rank: int | None) -> None:
        staged = self._stage(name)
        digesting = Digesting()

        def told() -> Iterator[bytes]:
            for piece in pieces:
                digesting.add(piece)
                yield piece

        try:
            with self.as_write_errors(name):
                write_file(staged, told(), self.durable)
        except BaseException:
            self._names.discard(name)
            raise
        self._place.settle(name, staged)
        entry = FileEntry(digesting.nbytes, digesting.digest())
        with self._lock:
            (self._shared if rank is None else self._files.setdefault(rank, {}))[name] = entry

    def _finished(self, file: OutputFile, entry: FileEntry, digests: NDArray[np.uint64]) -> None:
        """Enter a closed file into the record."""
        layout = file.layout
        with self._lock:
            tensors = self._tensors.setdefault(file.rank, TensorTable())
            twice = next((name for name in layout.slots.names if name in tensors), None) if tensors else None
            if twice is not None:
                raise WriteError(f"{layout.path}: {twice} is also in {tensors[twice].file}")
            tensors.add(layout.path, layout.slots, digests)
            self._files.setdefault(file.rank, {})[layout.path] = entry
            self._aliases.setdefault(file.rank, {}).update(layout.aliases)
            self._place.settle(layout.path, file._staged)
            self._open.remove(file)

    def _leave(self) -> None:
        """Close what is open; without a commit, remove what was made."""
        try:
            try:
                self._endings.waiting()
            finally:
                self._endings.waiting()  # one signal ended the run, a second one the line above
        finally:
            self._clear()

    def _clear(self) -> None:
        """While signals wait."""
        try:
            for file in self._open:
                with suppress(WriteError):  # what a server says only now does not matter any more
                    file.release(sync=False)
            if not self._committed:
                self._place.abandon()
            elif isinstance(self._place, Part):
                self._place.finish()
        finally:
            self._endings.as_before()


def _write_all(fd: int, offset: int, data: memoryview) -> None:
    """All of `data` at `offset`; a short write goes on where it stopped."""
    while data:
        n = os.pwrite(fd, data, offset)
        if n == 0:
            raise OSError(0, "the file takes no more bytes")
        data, offset = data[n:], offset + n


def _check_tiles(layout: FileLayout, parts: Sequence[tuple[int, int]]) -> None:
    """Raise WriteError unless the slots and what is no tensor's, as (offset, bytes), tile the file."""
    begin = np.concatenate([layout.slots.offset, np.array([offset for offset, _ in parts], np.int64)])
    nbytes = np.concatenate([layout.slots.nbytes, np.array([size for _, size in parts], np.int64)])
    order = np.lexsort((nbytes, begin))
    begin, end = begin[order], np.cumsum(nbytes[order])
    wrong = np.flatnonzero(begin != end - nbytes[order])
    if len(wrong):
        at = min(int(begin[wrong[0]]), int((end - nbytes[order])[wrong[0]]))
        raise WriteError(f"{layout.path}: its layout has a hole or overlap at byte {at}")
    if int(nbytes.sum()) != layout.nbytes:
        raise WriteError(f"{layout.path}: its layout ends at byte {int(nbytes.sum())} of {layout.nbytes}")
