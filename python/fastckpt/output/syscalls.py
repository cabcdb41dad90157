"""Four calls Python does not offer, by ctypes: Linux' fallocate, sync_file_range, renameat2; malloc_trim.

Law: where the platform lacks a call, `allocate` and `start_writeback` do the nearest thing that is
correct and slower, and `give_back` nothing; `exchange` raises, because nothing else swaps two directories
in one step.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_LIBC = (
    ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and ctypes.sizeof(ctypes.c_long) == 8
    else None
)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM)


def _function(name: str, *arguments: type) -> Callable[..., int] | None:
    function: Callable[..., int] | None = None
    if _LIBC is not None and hasattr(_LIBC, name):
        found = _LIBC[name]
        found.argtypes, found.restype = arguments, ctypes.c_int
        function = found
    return function


_fallocate = _function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_renameat2 = _function(
    "renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)
_malloc_trim = _function("malloc_trim", ctypes.c_size_t)


def give_back() -> None:
    """Give the system back what was freed. Once it freed a large block, glibc keeps others of that size."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def allocate(fd: int, nbytes: int) -> None:
    """Give a new file its final size, with its blocks where the file system can reserve them.

    Raises OSError (ENOSPC, EDQUOT, EFBIG). glibc's posix_fallocate is not used: where the file system
    cannot allocate, it writes a byte into every block."""
    while nbytes and _fallocate is not None:
        if _fallocate(fd, 0, 0, nbytes) == 0:
            return
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            break
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    os.ftruncate(fd, nbytes)


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Start writing these bytes to disk without waiting; only a hint, so a failure is ignored."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def exchange(a: str, b: str) -> None:
    """Swap two directory entries in one step. Raises OSError."""
    code = errno.ENOSYS
    if _renameat2 is not None:
        if not _renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
            return
        code = ctypes.get_errno()
    said = os.strerror(code)
    if code in _UNSUPPORTED:
        said = f"this file system cannot exchange two directories in one step ({said})"
    raise OSError(code, said)
