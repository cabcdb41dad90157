"""Where bytes lie: files, buffers in memory, and contiguous runs of them.

Law: an extent lies inside its file or buffer; this is checked here, at construction, and trusted after.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import SourceError
from .paths import regular


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
        s = regular(path)
        return File(os.fspath(path), s.st_size, s.st_mtime_ns, s.st_ino)


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
