"""Steps on the file system that a commit is made of: files written whole, directories made and removed.

Law: other runs make and remove directories beside us at any moment; no step takes that for a failure.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from ..errors import WriteError
from ..paths import let_go, unexpanded

_TRIES = 100
"""How often a directory is made that other runs take away again."""


@contextmanager
def as_write_errors(what: str) -> Iterator[None]:
    """Turn an OSError of the file system into a WriteError that says where."""
    try:
        yield
    except OSError as e:
        hint = " (no space left)" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise WriteError(f"{what}: {e.strerror or e}{hint}") from None


def real(path: str | os.PathLike[str]) -> str:
    """The path without links, from the root. Raises WriteError where the working directory is gone, for what
    is no path, and for one that begins with ~: a directory of that name is seldom meant, and ./~ says so."""
    if said := unexpanded(path):
        raise WriteError(f"{os.fspath(path)}: begins with ~{said}; write it out, or ./~")
    try:
        with as_write_errors(os.fspath(path)):
            return os.path.realpath(path)
    except ValueError as e:
        raise WriteError(f"{os.fspath(path)!r}: no path: {e}") from None


def resemble(path: str, other: str) -> None:
    """Give a directory the group and permissions of one that may be there: what goes into a private directory
    stays private. Its owner may always write."""
    with suppress(FileNotFoundError):
        now, then = os.stat(path), os.stat(other)
        mode = stat.S_IMODE(then.st_mode) | stat.S_IRWXU
        try:
            if now.st_gid != then.st_gid:
                os.chown(path, -1, then.st_gid)
        except PermissionError:  # no group of ours: this one may what all may
            mode &= ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
        if mode != stat.S_IMODE(now.st_mode):
            os.chmod(path, mode)


def sync_directory(path: str) -> None:
    """Make the entries of a directory durable, where the file system can sync one at all."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        let_go(fd)


def write_file(path: str, pieces: Iterable[bytes], durable: bool) -> None:
    """A new file of these pieces, whole or not at all."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def replace_file(path: str, content: bytes) -> None:
    """A file of these bytes in place of what was there, whole or not at all; not made durable.

    Raises OSError."""
    staged = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}-{os.urandom(4).hex()}")
    write_file(staged, [content], durable=False)
    try:
        os.replace(staged, path)
    except OSError:
        with suppress(OSError):
            os.unlink(staged)
        raise


def remove_tree(path: str) -> None:
    """Remove a file, a link, or a directory and all that is in it, as far as that can be done."""
    import shutil  # brings every archive format, and most runs remove nothing

    with suppress(OSError):  # rmtree lets some errors through all the same
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def refuse_loss(path: str, keep: Iterable[str]) -> None:
    """Refuse to replace a directory that holds something this run reads, under its own name or by a link."""
    for kept in keep:
        spelled = os.path.realpath(kept), os.path.abspath(kept)
        if any(os.path.commonpath([path, p]) == path for p in spelled):
            raise WriteError(f"{path}: overwriting it would remove {kept}, which this run reads")


def standing(path: str) -> str:
    """The path, or the nearest directory above it that is there. Raises OSError."""
    while not is_there(path):
        path = os.path.dirname(path)
    return path


def make_directories(path: str) -> list[str]:
    """Make a directory and its parents; those that were made, outermost first."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    made = []
    for directory in reversed(missing):
        with suppress(FileExistsError, FileNotFoundError):  # another run may be faster, or take one away
            os.mkdir(directory)
            made.append(directory)
    return made


def move_in(directory: str, put: Callable[[], object], made: list[str]) -> None:
    """Make `directory`, entering what was made in `made`, and `put` something there.

    A run that gives up removes the directories it made while they are empty, and that may be between the
    two: then again. Raises OSError."""
    for left in reversed(range(_TRIES)):
        made += [d for d in make_directories(directory) if d not in made]
        try:
            put()
            return
        except FileNotFoundError:
            if not left:
                raise


def remove_directories(made: Iterable[str]) -> None:
    """Remove directories this run made, where nobody put anything in."""
    for directory in reversed(list(made)):
        with suppress(OSError):
            os.rmdir(directory)


def is_there(path: str) -> bool:
    """Whether the path exists; OSError where nothing could, such as a name that is too long."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


_LOCKED: set[int] = set()
"""Descriptors with a lock. A forked process shares the lock and may outlive this one: it lets go of them."""


def locked(fd: int) -> bool:
    """Lock what is open there until `unlock`, or this process is gone; False where another run holds it.

    True where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    _LOCKED.add(fd)
    return True


def unlock(fd: int) -> None:
    """Close what was opened to be locked."""
    _LOCKED.discard(fd)
    let_go(fd)


def _forked() -> None:
    while _LOCKED:
        let_go(_LOCKED.pop())


os.register_at_fork(after_in_child=_forked)
