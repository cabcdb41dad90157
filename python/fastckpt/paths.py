"""What stands at a path, and its bytes.

Law: a disk that fails is an error. os.path would say that nothing is there, and something else would be read
in its place.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from .errors import SourceError

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What the system says where nothing stands."""

_PIECE = 1 << 20


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether anything stands there. Raises SourceError where that cannot be known."""
    return _mode(path) != 0


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file stands there. Raises SourceError where that cannot be known."""
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


def regular(path: str | os.PathLike[str]) -> os.stat_result:
    """What the system says of a regular file. Raises SourceError when it is missing or none."""
    try:
        s = os.stat(path)
    except OSError as e:
        raise SourceError(f"{os.fspath(path)}: {e.strerror}{unexpanded(path)}") from None
    except ValueError as e:  # no path at all, such as one with a zero byte
        raise SourceError(f"{os.fspath(path)!r}: {e}") from None
    if not stat.S_ISREG(s.st_mode):
        raise SourceError(f"{os.fspath(path)}: not a regular file")
    return s


def unexpanded(path: str | os.PathLike[str]) -> str:
    """What a message adds to a path that a shell would have spelled out, had it seen it."""
    return "; only a shell makes a home directory of ~" if os.fspath(path).startswith("~") else ""


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


def content(path: str, limit: int = 1 << 62) -> bytes:
    """The bytes of a file, at most `limit`. Raises SourceError where they cannot be read, or may never come:
    a pipe would be waited for."""
    regular(path)
    made = bytearray()
    try:
        with open(path, "rb") as f:
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
