"""Where bytes lie: files, buffers in memory, and contiguous runs of them.

Law: an extent lies inside its file or buffer; this is checked here, at construction, and trusted after.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import SourceError


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was when its header was read: path, size in bytes, modification time, inode.

    A later read compares these, so that a file that changes under us is an error."""

    path: str
    nbytes: int
    mtime_ns: int = 0
    inode: int = 0

    @staticmethod
    def at(path: str | os.PathLike[str]) -> File:
        """The file at `path` as it is now. Raises SourceError when it is missing or no regular file."""
        try:
            s = os.stat(path)
        except OSError as e:
            raise SourceError(f"{os.fspath(path)}: {e.strerror}{unexpanded(path)}") from None
        except ValueError as e:  # no path at all, such as one with a zero byte
            raise SourceError(f"{os.fspath(path)!r}: {e}") from None
        if not stat.S_ISREG(s.st_mode):
            raise SourceError(f"{os.fspath(path)}: not a regular file")
        return File(os.fspath(path), s.st_size, s.st_mtime_ns, s.st_ino)


def unexpanded(path: str | os.PathLike[str]) -> str:
    """What a message adds to a path that a shell would have spelled out, had it seen it."""
    return "; only a shell makes a home directory of ~" if os.fspath(path).startswith("~") else ""


ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What the system says where nothing stands."""


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether anything stands there. Raises SourceError where that cannot be known."""
    return _mode(path) != 0


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file stands there. Raises SourceError where the disk fails; os.path would say no, and
    something else would be read instead."""
    return stat.S_ISREG(_mode(path))


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Whether a directory stands there. Raises SourceError where that cannot be known."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: str | os.PathLike[str]) -> int:
    try:
        return os.stat(path).st_mode
    except ValueError:  # no path at all, such as one with a zero byte
        return 0
    except OSError as e:
        if e.errno in ABSENT:
            return 0
        raise SourceError(f"{os.fspath(path)}: {e.strerror}") from None


def inside(name: str) -> bool:
    """Whether a file name that a record gives is relative, plain and stays inside the record's directory."""
    odd = {"\0", "\\"} & set(name) or {"", ".", ".."} & set(name.split("/"))
    return not odd and len(name) <= 4096


def listed(path: str, pattern: str) -> list[str]:
    """The names in a directory that match a shell's pattern, sorted. Raises SourceError."""
    try:
        names = os.listdir(path)
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}") from None
    return sorted(n for n in fnmatch.filter(names, pattern) if not n.startswith("."))


_PIECE = 1 << 20


def content(path: str, limit: int = 1 << 62) -> bytes:
    """The bytes of a file, at most `limit`. Raises SourceError where they cannot be read, or may never come:
    a pipe would be waited for."""
    made, file = bytearray(), File.at(path)
    try:
        with open(file.path, "rb") as f:
            # read(limit) makes room for all of it first, in a small file too
            while piece := f.read(min(limit - len(made), _PIECE)):
                made += piece
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}") from None
    return bytes(made)


def pieces_of(path: str, nbytes: int) -> Iterator[bytes]:
    """The bytes of a file, at most `nbytes` at a time. Raises SourceError where it cannot be read."""
    if not is_file(path):
        raise SourceError(f"{path}: no such file")
    try:
        with open(path, "rb") as f:
            while piece := f.read(nbytes):
                yield piece
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}") from None


def fill(into: bytearray | memoryview, fd: int, offset: int) -> None:
    """Read bytes of a file from `offset` on until `into` is full. Raises OSError, SourceError at its end."""
    view = memoryview(into)
    while view:
        n = os.preadv(fd, [view], offset)
        if n == 0:
            raise SourceError(f"the file was cut: it ends at byte {offset}, wanted {offset + len(view)}")
        view, offset = view[n:], offset + n


def let_go(fd: int) -> None:
    """Close a descriptor that was only read, or held for its lock: an error loses nothing."""
    with suppress(OSError):
        os.close(fd)


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Bytes in memory: `address` and `nbytes` on `device`; `owner` keeps them alive."""

    owner: object
    address: int
    nbytes: int
    device: str = "cpu"

    def check(self) -> None:
        """Raise SourceError where the owner has these bytes no more."""

    def part(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Some of the bytes where they lie, which must be main memory; the caller keeps `owner` alive."""
        self.check()
        held = (ctypes.c_uint8 * nbytes).from_address(self.address + start)
        return np.frombuffer(memoryview(held), np.uint8)


COMPUTED = "computed"
"""The device of bytes that lie nowhere until a copy asks for them (`computed.nowhere`)."""

LINE = 64
"""Bytes of a cache line."""


def fresh(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised memory that begins on a cache line, as numpy's need not: storing a vector that straddles
    two lines is slow."""
    held = np.empty(nbytes + LINE, np.uint8)
    start = -held.ctypes.data % LINE
    return held[start : start + nbytes]


@dataclass(frozen=True, slots=True, eq=False)
class Constant(Buffer):
    """A buffer whose bytes the plan itself carries; two with equal bytes are equal."""

    content: bytes = b""

    @staticmethod
    def of(content: bytes) -> Constant:
        """A buffer of these bytes."""
        held = np.frombuffer(content, np.uint8)
        return Constant(held, held.ctypes.data, len(content), content=content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous byte run: `nbytes` from `offset` of `where`.

    `key` is the run's name inside its file (a torch storage key, a tensor name), which stays the
    same when offsets move; a cached plan finds its extents again by (path, key)."""

    where: File | Buffer
    offset: int
    nbytes: int
    key: str = ""

    def __post_init__(self) -> None:
        if self.offset < 0 or self.nbytes < 0 or self.offset + self.nbytes > self.where.nbytes:
            name = self.where.path if isinstance(self.where, File) else "buffer"
            raise SourceError(
                f"{name}: {self.key or 'extent'} needs bytes [{self.offset}, {self.offset + self.nbytes}) "
                f"of {self.where.nbytes}"
            )


class Extents:
    """An immutable table of extents; a fragment names its extent by the index in this table.

    Views of one checkpoint share one table, so that joining them moves no Python object."""

    __slots__ = ("_index", "_items", "_nbytes")

    def __init__(self, items: Iterable[Extent] = ()) -> None:
        self._items: tuple[Extent, ...] = tuple(items)
        self._index: dict[Extent, int] | None = None
        self._nbytes: NDArray[np.int64] | None = None

    @property
    def nbytes(self) -> NDArray[np.int64]:
        """The size of each extent."""
        if self._nbytes is None:
            self._nbytes = np.array([e.nbytes for e in self._items], np.int64)
        return self._nbytes

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Extent:
        return self._items[i]

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._items)

    def union(self, other: Extents) -> tuple[Extents, list[int]]:
        """A table holding both, and the new index of each of `other`'s extents; own indices stay."""
        if other is self:
            return self, list(range(len(self)))
        if self._index is None:
            self._index = {e: i for i, e in enumerate(self._items)}
        extra: list[Extent] = []
        where: dict[Extent, int] = {}
        moved = []
        for e in other:
            i = self._index.get(e)
            if i is None:
                i = where.get(e)
            if i is None:
                i = len(self._items) + len(extra)
                where[e] = i
                extra.append(e)
            moved.append(i)
        return (self if not extra else Extents(self._items + tuple(extra))), moved
