"""All ranks in one run: a directory beside the output, which takes its name in one step.

Law: at any moment the output's name stands for the whole old output or the whole new one.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from contextlib import suppress

from ..digest import digest64
from ..errors import WriteError
from . import syscalls
from .filesystem import (
    as_write_errors,
    is_there,
    locked,
    move_in,
    real,
    refuse_loss,
    remove_directories,
    remove_tree,
    resemble,
    sync_directory,
    unlock,
    write_file,
)
from .manifest import NAME, TRACE, Manifest, rank_of

_LONG = 128
"""Bytes of an output's name that staging directories still carry as it is."""


class Whole:
    """All ranks at once: a temporary sibling directory that takes the output's name when it is finished."""

    def __init__(self, path: str, *, overwrite: bool, durable: bool, keep: Iterable[str]) -> None:
        self.path = real(path)
        self.parent, self.name = os.path.split(self.path)
        self._overwrite, self._durable, self._keep = overwrite, durable, tuple(keep)
        self._replaces = False
        self._made: list[str] = []
        self._staging = ""
        self._lock = -1
        self.left = ""
        """The old output, where this user may replace and not remove it."""

    def refuse(self) -> None:
        """Raise WriteError for a place that cannot become an output, or must not be overwritten."""
        entries: list[str] = []
        with as_write_errors(self.path):
            if os.path.ismount(self.path):
                raise WriteError(f"{self.path}: a mount point cannot be renamed; name a directory below it")
            if is_there(self.path):
                if not os.path.isdir(self.path):
                    raise WriteError(f"{self.path}: exists and is no directory")
                entries = sorted(os.listdir(self.path))
                self._replaces = bool(entries)
        if self._replaces:
            if self._overwrite:
                refuse_loss(self.path, self._keep)
            ours = any(e == NAME or rank_of(e) is not None for e in entries)
            if not ours or not self._overwrite:
                way = "overwrite=True (--overwrite) replaces it" if ours else "it is no output of fastckpt"
                raise WriteError(
                    f"{self.path}: not empty ({len(entries)} entries, {entries[0]} first); name a new "
                    f"directory; {way}"
                )

    def start(self) -> None:
        """Refuse what must not be overwritten, remove what dead runs left, make the staging directory."""
        self.refuse()
        with as_write_errors(self.parent):
            move_in(self.parent, self._claim, self._made)
            self._sweep()
        if self._replaces:
            self._try_exchange()

    def stage(self, name: str) -> str:
        """The path to write the file `name` at."""
        staged = os.path.join(self._staging, name)
        with as_write_errors(staged):
            os.makedirs(os.path.dirname(staged), exist_ok=True)
        return staged

    def settle(self, name: str, staged: str) -> None:
        """The file is finished: here it already has its name."""

    def commit(self, manifest: Manifest) -> Manifest:
        """Make the directory real, in one step, and remove the one it replaces."""
        if (missing := manifest.missing(self._staging)) is not None:
            raise WriteError(f"{self.path}: somebody removed what this run wrote ({missing}); run it again")
        with as_write_errors(self.path):
            write_file(os.path.join(self._staging, NAME), manifest.text(), self._durable)
            if self._durable:
                for directory, _, _ in os.walk(self._staging, topdown=False):
                    sync_directory(directory)
            try:
                self._swap(self._staging, self.path)
            except OSError as e:
                if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise WriteError(f"{self.path}: another run put something there meanwhile") from None
                raise
            if self._durable:
                try:
                    for changed in (self.parent, *(os.path.dirname(made) for made in self._made)):
                        sync_directory(changed)
                except OSError:  # a name that the disk may not keep does not count: back to what was
                    self._swap(self.path, self._staging)
                    raise
            self._made = []
        if self._replaces:
            remove_tree(self._staging)
            self.left = self._staging if os.path.lexists(self._staging) else ""
        self._unlock()
        return manifest

    def _swap(self, new: str, old: str) -> None:
        """Let a directory take the name of another, which takes its, or of nothing or an empty one."""
        if self._replaces:
            syscalls.exchange(new, old)
        else:
            os.rename(new, old)  # else ENOTEMPTY

    def abandon(self) -> None:
        """Leave nothing of this run."""
        if self._staging:
            remove_tree(self._staging)
        self._unlock()
        remove_directories(self._made)

    def _claim(self) -> None:
        """Make the staging directory and lock it. Raises FileNotFoundError where a run of another container,
        to which the number of this process says nothing, swept it away between the two."""
        mark = f"{os.getpid()}-{os.urandom(4).hex()}"
        self._staging = os.path.join(self.parent, _staging(self.name) + mark)
        os.mkdir(self._staging)
        self._lock = _lock(self._staging)
        if self._lock < 0 or not is_there(self._staging):
            self._unlock()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._staging)
        resemble(self._staging, self.path)

    def _unlock(self) -> None:
        fd, self._lock = self._lock, -1
        unlock(fd)

    def _sweep(self) -> None:
        """Remove staging directories of dead processes of this host; those of other hosts may live.

        A lock tells a live process of another container, whose number says nothing here."""
        pattern = re.compile(re.escape(_staging(self.name)) + r"([0-9]+)-[0-9a-f]{8}")
        for entry in os.listdir(self.parent):
            found = pattern.fullmatch(entry)
            if not found or _alive(int(found[1])):
                continue
            left = os.path.join(self.parent, entry)
            with suppress(OSError):
                if (lock := _lock(left)) >= 0:
                    remove_tree(left)
                    unlock(lock)

    def _try_exchange(self) -> None:
        """Learn before the work whether the file system can exchange two directories."""
        a, b = (os.path.join(self._staging, x) for x in "ab")
        try:
            os.mkdir(a)
            os.mkdir(b)
            syscalls.exchange(a, b)
            os.rmdir(a)
            os.rmdir(b)
        except OSError as e:
            raise WriteError(
                f"{self.path}: {e.strerror}, so the old output cannot be replaced safely; "
                "it was left as it is: name a new directory"
            ) from None


def _staging(name: str) -> str:
    """How staging directories for an output of this name begin, on this host; a long name by its digest,
    since they must not be too long themselves."""
    spelled = os.fsencode(name)
    shown = name if len(spelled) <= _LONG else f"{digest64(spelled):016x}"
    return f".{shown}{TRACE}{_host()}-"


def _host() -> str:
    return re.sub("[^A-Za-z0-9]", "_", os.uname().nodename)[:32]


def _lock(directory: str) -> int:
    """A descriptor that holds the directory's lock (none where the file system has no locks); -1 where
    another process holds it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if locked(fd):
        return fd
    unlock(fd)
    return -1


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
