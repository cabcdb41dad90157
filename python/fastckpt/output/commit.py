"""How an output directory becomes real: in one step, or rank by rank with a commit record.

Law: at any moment a directory whose `fastckpt.json` is there is a whole output of one plan, the old
one or the new one. `Whole` renames a finished sibling directory; `Part` renames a rank's finished files,
then its record, and whoever finds every rank's record writes `fastckpt.json`.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from ..digest import digest64
from ..errors import SourceError, WriteError
from ..extents import let_go
from . import syscalls
from .manifest import NAME, Manifest, merged, rank_name, rank_of

TRACE = ".fastckpt-"
"""What names of unfinished business inside an output directory begin with."""

_LONG = 128
"""Bytes of an output's name that staging directories still carry as it is."""

_TRIES = 100
"""How often a directory is made that other runs take away again."""


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Turn an OSError of the file system into a WriteError that says where."""
    try:
        yield
    except OSError as e:
        hint = " (no space left)" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise WriteError(f"{what}: {e.strerror or e}{hint}") from None


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


def remove_tree(path: str) -> None:
    """Remove a directory and all that is in it, as far as that can be done."""
    with suppress(OSError):  # rmtree lets some errors through all the same
        shutil.rmtree(path, ignore_errors=True)


def refuse_loss(path: str, keep: Iterable[str]) -> None:
    """Refuse to replace a directory that holds something this run reads, under its own name or by a link."""
    for kept in keep:
        spelled = os.path.realpath(kept), os.path.abspath(kept)
        if any(os.path.commonpath([path, p]) == path for p in spelled):
            raise WriteError(f"{path}: overwriting it would remove {kept}, which this run reads")


class Whole:
    """All ranks at once: a temporary sibling directory that takes the output's name when it is finished."""

    def __init__(self, path: str, *, overwrite: bool, durable: bool, keep: Iterable[str]) -> None:
        self.path = os.path.realpath(path)
        self.parent, self.name = os.path.split(self.path)
        self._overwrite, self._durable, self._keep = overwrite, durable, tuple(keep)
        self._replaces = False
        self._made: list[str] = []
        self._staging = ""
        self._lock = -1
        self.left = ""
        """The old output, where this user may replace and not remove it."""

    def start(self) -> None:
        """Refuse what must not be overwritten, remove what dead runs left, make the staging directory."""
        entries: list[str] = []
        with telling(self.path):
            if os.path.ismount(self.path):
                raise WriteError(f"{self.path}: a mount point cannot be renamed; name a directory below it")
            if is_there(self.path):
                if not os.path.isdir(self.path):
                    raise WriteError(f"{self.path}: exists and is no directory")
                entries = sorted(os.listdir(self.path))
                if entries and not self._overwrite:
                    raise WriteError(
                        f"{self.path}: not empty ({len(entries)} entries, {entries[0]} first); "
                        "name a new directory, or ask to overwrite"
                    )
                self._replaces = bool(entries)
        if self._replaces:
            refuse_loss(self.path, self._keep)
            if not any(e == NAME or rank_of(e) is not None for e in entries):
                raise WriteError(
                    f"{self.path}: not empty ({len(entries)} entries, {entries[0]} first) and no output of "
                    "fastckpt; only those are overwritten"
                )
        with telling(self.parent):
            mark = f"{os.getpid()}-{os.urandom(4).hex()}"
            self._staging = os.path.join(self.parent, _staging(self.name) + mark)
            move_in(self.parent, partial(os.mkdir, self._staging), self._made)
            self._sweep()
            self._lock = _lock(self._staging)
        if self._replaces:
            self._try_exchange()

    def stage(self, name: str) -> str:
        """The path to write the file `name` at."""
        staged = os.path.join(self._staging, name)
        with telling(staged):
            os.makedirs(os.path.dirname(staged), exist_ok=True)
        return staged

    def settle(self, name: str, staged: str) -> None:
        """The file is finished: here it already has its name."""

    def commit(self, manifest: Manifest) -> Manifest:
        """Make the directory real, in one step, and remove the one it replaces."""
        with telling(self.path):
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

    def _unlock(self) -> None:
        fd, self._lock = self._lock, -1
        let_go(fd)

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
                    let_go(lock)

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
                f"{self.path}: this file system cannot exchange two directories in one step ({e.strerror}), "
                "so the old output cannot be replaced safely; it was left as it is: name a new directory"
            ) from None


class Part:
    """One rank of a set in a shared directory: files, then the rank's record, then the commit record.

    Files wait under temporary names until the rank commits, so that an old output stays whole until then.
    Records that give way are renamed, not removed: whoever completes the set learns from them which files
    of the old output are no part of the new one."""

    def __init__(
        self,
        path: str,
        rank: int,
        world: int,
        key: str,
        *,
        overwrite: bool,
        durable: bool,
        keep: Iterable[str],
    ) -> None:
        self.path = os.path.realpath(path)
        self.rank, self.world, self.key = rank, world, key
        self._overwrite, self._durable, self._keep = overwrite, durable, tuple(keep)
        self._mine = f"{TRACE}rank-{rank}."
        self._token = os.urandom(4).hex()
        self._made: list[str] = []
        self._waiting: list[tuple[str, str]] = []
        self._placed: list[str] = []
        self._lock = -1
        self._numbers = itertools.count(1)  # next() is one step: files may be begun by several threads

    def start(self) -> None:
        """Refuse a directory that is another plan's, remove what this rank left when it was killed."""
        with telling(self.path):
            try:  # one call: another rank that gives up may take the directory away at any moment
                entries = sorted(os.listdir(self.path))
            except FileNotFoundError:
                entries = []
            except NotADirectoryError:
                if not os.path.lexists(self.path):
                    raise  # a parent is none
                raise WriteError(f"{self.path}: exists and is no directory") from None
        records = [e for e in entries if e == NAME or rank_of(e) is not None]
        if not self._overwrite:
            for record in records:
                found = self._read(record)
                if found is None and not os.path.lexists(os.path.join(self.path, record)):
                    continue  # another rank of this set is replacing it
                if found is None or found.key != self.key:
                    raise WriteError(
                        f"{self.path}: {record} is of another plan ({found.key if found else 'unreadable'}, "
                        f"this one is {self.key}); name a new directory, or ask to overwrite"
                    )
            if entries and not records and not any(e.startswith(TRACE) for e in entries):
                raise WriteError(
                    f"{self.path}: not empty ({len(entries)} entries, {entries[0]} first) and no output of "
                    "fastckpt; name a new directory, or ask to overwrite"
                )
        elif entries:
            refuse_loss(self.path, self._keep)
        with telling(self.path):
            move_in(self.path, self._claim, self._made)

    def stage(self, name: str) -> str:
        """The path to write the file `name` at."""
        return os.path.join(self.path, f"{self._mine}{self._token}.{next(self._numbers)}.tmp")

    def settle(self, name: str, staged: str) -> None:
        """The file is finished: it gets its name when the rank commits."""
        self._waiting.append((name, staged))

    def done(self, rank: int) -> Manifest | None:
        """The record by which that rank is done: its own, or that of a set that one process made; its files
        have their sizes."""
        found = self._record(rank) or self._set()
        return found if found is not None and self._missing(found) is None else None

    def commit(self, manifest: Manifest) -> Manifest:
        """Name this rank's files, write its record, and complete the set if it is the last."""
        with telling(self.path):
            # written now, so that a full disk is found before the old set gives way
            record = self._staged(rank_name(self.rank), manifest)
            self._displace()
            directories = {self.path}
            for name, staged in self._waiting:
                final = os.path.join(self.path, name)
                directory = os.path.dirname(final)
                move_in(directory, partial(os.replace, staged, final), self._made)
                directories.add(directory)
                self._placed.append(name)
            self._sync(directories | {os.path.dirname(made) for made in self._made})
            self._name(record, rank_name(self.rank))
            self._waiting, self._placed, self._made = [], [], []
        return self.complete(manifest)

    def complete(self, manifest: Manifest) -> Manifest:
        """The commit record, written, if every rank's record is there; else `manifest`, this rank's own."""
        parts = [record for r in range(self.world) if (record := self._record(r)) is not None]
        if len(parts) < self.world:
            return manifest
        whole = merged(parts)
        if (missing := self._missing(whole)) is not None:
            raise WriteError(
                f"{self.path}: every rank is done, but {missing}; run the rank it belongs to again"
            )
        with telling(self.path):
            replaced = [e for e in os.listdir(self.path) if e.startswith(f"{TRACE}replaced-")]
            self._remove_old(replaced, whole)
            if self._read(NAME) != whole:
                self._name(self._staged(NAME, whole), NAME)
            for entry in replaced:
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.path, entry))
        return whole

    def abandon(self) -> None:
        """Leave nothing of this run."""
        if self._placed and self._record(self.rank) is None:
            others = [r for k in range(self.world) if k != self.rank and (r := self._record(k)) is not None]
            for name in set(self._placed).difference(*(other.files for other in others)):
                with suppress(OSError):
                    os.unlink(os.path.join(self.path, name))
        self.finish()
        remove_directories(self._made)

    def _claim(self) -> None:
        """Leave the locked file that says that a rank is at work, then remove what this rank left before.

        The file first: ranks that start now see that the directory is ours. Raises WriteError where another
        run of this rank is at work, FileNotFoundError where that ended between the file and the lock."""
        marker = os.path.join(self.path, self._mine + "open")
        fd = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _locked(fd):
                raise WriteError(
                    f"{self.path}: another run is making rank {self.rank}; run this one again when that ended"
                )
            if not os.path.samestat(os.fstat(fd), os.stat(marker)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), marker)
        except BaseException:
            let_go(fd)
            raise
        self._lock = fd
        self._sweep()

    # ---- records ----

    def _read(self, name: str) -> Manifest | None:
        """A record, if it is there and sound."""
        try:
            return Manifest.read(os.path.join(self.path, name))
        except SourceError:
            return None

    def _record(self, rank: int) -> Manifest | None:
        """That rank's record, if it is there, sound, and of this plan."""
        found = self._read(rank_name(rank))
        if found is None or (found.key, found.world) != (self.key, self.world):
            return None
        return found if [s.rank for s in found.shards] == [rank] else None

    def _set(self) -> Manifest | None:
        """The commit record, if it is there, sound, and of this plan."""
        found = self._read(NAME)
        if found is None or (found.key, found.world) != (self.key, self.world):
            return None
        return found if found.complete else None

    def _missing(self, manifest: Manifest) -> str | None:
        """The first file that is not there with its size, in words."""
        for name, entry in manifest.all_files().items():
            try:
                nbytes = os.stat(os.path.join(self.path, name)).st_size
            except OSError as e:
                return f"{name}: {e.strerror}"
            if nbytes != entry.nbytes:
                return f"{name} has {nbytes} bytes, not {entry.nbytes}"
        return None

    def _displace(self) -> None:
        """Before the first new file: the commit record, this rank's record and those of ranks there will
        not be give way. Other ranks' records are theirs."""
        for entry in sorted(os.listdir(self.path)):
            rank = rank_of(entry)
            if entry == NAME or rank == self.rank or (rank is not None and rank >= self.world):
                away = os.path.join(self.path, f"{TRACE}replaced-{os.urandom(8).hex()}.json")
                with suppress(FileNotFoundError):  # another rank was faster
                    os.rename(os.path.join(self.path, entry), away)
        self._sync({self.path})

    def _remove_old(self, replaced: Iterable[str], whole: Manifest) -> None:
        """Remove the files of replaced records that are no part of this set."""
        new = whole.all_files()
        for entry in replaced:
            old = self._read(entry)
            if old is None:
                continue  # unreadable or gone: verify reports files that are extra
            for name in old.all_files().keys() - new.keys():
                path = os.path.join(self.path, name)
                with suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(path)
                if os.path.dirname(name):
                    with suppress(OSError):
                        os.rmdir(os.path.dirname(path))

    def _staged(self, name: str, manifest: Manifest) -> str:
        """A record before it counts: whole, durable, under a temporary name."""
        staged = self.stage(name)
        write_file(staged, manifest.text(), self._durable)
        return staged

    def _name(self, staged: str, name: str) -> None:
        """Let a staged record count."""
        os.replace(staged, os.path.join(self.path, name))
        self._sync({self.path})

    def _sync(self, directories: Iterable[str]) -> None:
        if self._durable:
            for directory in directories:
                sync_directory(directory)

    def _sweep(self) -> None:
        """Remove this rank's temporary files; not the marker."""
        for entry in os.listdir(self.path):
            if entry.startswith(self._mine) and entry != self._mine + "open":
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.path, entry))

    def finish(self) -> None:
        """Take what is temporary away, the marker last, and let another run have the rank."""
        fd, self._lock = self._lock, -1
        if fd >= 0:
            with suppress(OSError):
                self._sweep()
                os.unlink(os.path.join(self.path, self._mine + "open"))
            let_go(fd)


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
    if _locked(fd):
        return fd
    let_go(fd)
    return -1


def _locked(fd: int) -> bool:
    """Lock what is open there until it is closed, or its process is gone; False where another run holds it.

    True where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
