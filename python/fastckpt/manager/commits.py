"""The directory of a manager's commits: what stands, what is being made, what goes.

Law: a directory named as a step is a whole commit; it takes that name in one rename and gives it up in
one rename, so that a kill at any moment leaves commits and hidden leftovers, nothing between.

    root/step-00000012/                   a commit (fastckpt.json is its record)
    root/latest                           a hint: the newest step's name
    root/.saving-step-00000013-TOKEN/     being made, or torn
    root/.trash-step-00000004-TOKEN/      being removed
    root/.aside-step-00000011-TOKEN/      set aside by a rewind or found broken; never removed by itself
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from weakref import WeakValueDictionary

from ..checkpoint import JSON
from ..errors import ManagerError, SourceError, WriteError
from ..output import syscalls
from ..output.filesystem import (
    as_write_errors,
    is_there,
    make_directories,
    real,
    remove_tree,
    replace_file,
    sync_directory,
    write_file,
)
from ..output.manifest import NAME, Manifest
from ..paths import let_go
from ..sources.training import LAYOUT

LATEST = "latest"
SAVING, TRASH, ASIDE = ".saving-", ".trash-", ".aside-"
PROBE = ".fastckpt-probe-"
LOCK = ".fastckpt-lock"

_SAVING_HERE: WeakValueDictionary[tuple[int, int, int], Store] = WeakValueDictionary()
"""(process, device and inode of the root) -> who changes it. The lock on the file is the process's: alone it
would let two managers of one process clean each other's saves away, and the first to close would let go of it
for both. Names do not tell: a root may be mounted twice, or on a file system that does not mind case."""
_TAKING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit that stands: its step, the key all its parts share, when, its metrics, its bytes, and
    whether this disk holds the parts of all ranks."""

    step: int
    key: str
    created: float
    metrics: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0
    everywhere: bool = True

    @staticmethod
    def of(step: int, found: Manifest) -> Commit:
        """What a record says."""
        return Commit(
            step, found.key, datetime.fromisoformat(found.created).timestamp(),
            _numbers(found.record.options.get("metrics")),
            sum(f.nbytes for f in found.all_files().values()),
            found.world == found.record.placement.get("ranks", 1),
        )  # fmt: skip


class Store:
    """The commits below one root directory, as seen from one process.

    `prefix` and `digits` spell the steps ("step-", 8 -> step-00000012). `durable` waits for the disk."""

    local = True
    """Whether commits lie where they are made, and one can be exchanged for another in one step."""

    def __init__(self, root: str, *, prefix: str, digits: int, durable: bool) -> None:
        if not prefix or "/" in prefix or prefix.startswith(".") or digits < 1:
            raise ManagerError(f"step names: prefix {prefix!r} with {digits} digits gives no plain file name")
        self.root, self.durable = real(root), durable
        self._prefix, self._digits = prefix, digits
        self._named = re.compile(re.escape(prefix) + r"([0-9]+)")
        self._known: dict[int, tuple[tuple[int, int], Commit]] = {}
        self._lock = -1
        self._taken = (0, 0, 0)

    @property
    def place(self) -> str:
        """Where the commits stand, as their records say it."""
        return self.root

    # ---- names ----

    def name(self, step: int) -> str:
        """The directory name of a step. Raises ManagerError for a negative one."""
        if step < 0:
            raise ManagerError(f"step {step}: steps count from 0")
        return f"{self._prefix}{step:0{self._digits}d}"

    def path(self, step: int) -> str:
        """Where a step's commit lies, or would."""
        return os.path.join(self.root, self.name(step))

    def saving(self, step: int, token: str) -> str:
        """Where a step is made before it stands."""
        return os.path.join(self.root, f"{SAVING}{self.name(step)}-{token}")

    # ---- what stands ----

    def steps(self) -> list[int]:
        """Steps with a commit record, ascending; their files are not looked at.

        Raises WriteError for a root that is there and cannot be listed: that is not the same as none."""
        with as_write_errors(self.root):
            try:
                entries = os.listdir(self.root)
            except FileNotFoundError:
                return []
            named = [(e, int(found[1])) for e in entries if (found := self._named.fullmatch(e))]
            return sorted(
                step
                for entry, step in named
                if entry == self.name(step) and is_there(os.path.join(self.root, entry, NAME))
            )

    def manifest(self, step: int) -> Manifest:
        """The record of a step whose files are all there with their sizes. Raises SourceError."""
        path = self.path(step)

        def size(name: str) -> int:
            try:
                return os.stat(os.path.join(path, name)).st_size
            except OSError as e:
                raise SourceError(f"{path}: {name}: {e.strerror}") from None

        return require_whole(path, step, Manifest.read(os.path.join(path, NAME)), size)

    def commit(self, step: int) -> Commit | None:
        """What stands at a step; None where nothing whole does. Digests are not checked here.

        Raises WriteError where that cannot be known."""
        with as_write_errors(self.path(step)):
            try:
                record = os.stat(os.path.join(self.path(step), NAME))
            except (FileNotFoundError, NotADirectoryError):
                return None
        mark = (record.st_mtime_ns, record.st_ino)
        if step not in self._known or self._known[step][0] != mark:
            try:
                found = self.manifest(step)
            except SourceError:
                return None
            self._known[step] = (mark, Commit.of(step, found))
        return self._known[step][1]

    def commits(self) -> list[Commit]:
        """Everything whole, by step."""
        return [c for step in self.steps() if (c := self.commit(step)) is not None]

    def bring(self, step: int, *, again: bool = False) -> None:
        """Bring a step to `path(step)`, where it already is; stores that are elsewhere do something."""

    def forget(self, step: int) -> None:
        """Remove what `bring` brought: here nothing."""

    # ---- changes: the coordinator of this disk only ----

    def take(self) -> None:
        """Be the only one that changes this root, and remove what dead ones left half made.

        Raises ManagerError where another process or manager saves here. The lock dies with the process."""
        if self._lock >= 0 and self._taken[0] == os.getpid():
            return
        self.release()  # in a fork: the lock is the parent's
        with as_write_errors(self.root):
            os.makedirs(self.root, exist_ok=True)
            found = os.stat(self.root)
        taken = os.getpid(), found.st_dev, found.st_ino
        with _TAKING:
            if _SAVING_HERE.setdefault(taken, self) is not self:
                raise ManagerError(f"{self.root}: another manager of this process saves here; close it first")
            self._taken = taken
        try:
            self._lock = self._locked()
        except BaseException:
            self.release()
            raise
        self.sweep()

    def _locked(self) -> int:
        """The lock's file, locked."""
        with as_write_errors(self.root):
            fd = os.open(os.path.join(self.root, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # A record lock: forked data workers that outlive their parent do not hold it.
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            let_go(fd)
            raise ManagerError(f"{self.root}: another process saves here") from None
        except OSError:  # a file system without locks: the user's to keep to one
            pass
        return fd

    def release(self) -> None:
        """Let others save here."""
        fd, self._lock = self._lock, -1
        let_go(fd)
        with _TAKING:
            if _SAVING_HERE.get(self._taken) is self:
                del _SAVING_HERE[self._taken]

    def sweep(self, *, aside: bool = False) -> None:
        """Remove torn saves and what was on its way out, with `aside` what was set aside."""
        kinds = (SAVING, TRASH, PROBE, f".{LATEST}-", *((ASIDE,) if aside else ()))
        for entry in os.listdir(self.root):
            if entry.startswith(kinds):
                remove_tree(os.path.join(self.root, entry))

    def begin(self, step: int, token: str) -> None:
        """Make the directory in which a step is made."""
        with as_write_errors(self.saving(step, token)):
            os.mkdir(self.saving(step, token))

    def seal(self, step: int, token: str, *, aside: bool) -> None:
        """Let the finished directory take the step's name: the moment of the commit.

        A commit that stood there is exchanged with it in one step, then removed; what was none is set `aside`
        before. Raises WriteError where the directory is not whole, or the file system cannot do it."""
        staged, final = self.saving(step, token), self.path(step)
        try:
            made = Manifest.read(os.path.join(staged, NAME))
        except SourceError as e:
            raise WriteError(str(e)) from None
        if not made.complete or made.key != token:
            raise WriteError(f"{staged}: is not whole: {len(made.shards)} of {made.world} ranks")
        with as_write_errors(final):
            if aside and os.path.lexists(final):  # no commit, so none is missing between the two renames
                os.rename(final, self._away(ASIDE, step))
            if os.path.lexists(final):
                syscalls.exchange(staged, final)
                old = self._away(TRASH, step)
                os.rename(staged, old)
                self._sync()
                remove_tree(old)
            else:
                os.rename(staged, final)
                self._sync()
        found = self.commit(step)
        if found is None or found.key != token:
            raise WriteError(f"{final}: is not what was just written there")
        self._hint(self.name(step))

    def drop(self, step: int, token: str) -> None:
        """Remove a save that came to nothing."""
        remove_tree(self.saving(step, token))

    def remove(self, steps: Iterable[int]) -> None:
        """Remove commits, never the newest whole one: renamed first, so that none is ever half there."""
        newest = max((c.step for c in self.commits()), default=None)
        for step in steps:
            if step == newest or not os.path.isdir(self.path(step)):
                continue
            away = self._away(TRASH, step)
            with as_write_errors(self.path(step)):
                os.rename(self.path(step), away)
                self._sync()
            remove_tree(away)

    def set_aside(self, steps: Iterable[int]) -> None:
        """Hide commits without removing them, under names that are no step's."""
        for step in steps:
            with as_write_errors(self.path(step)):
                os.rename(self.path(step), self._away(ASIDE, step))
                self._sync()

    def _away(self, what: str, step: int) -> str:
        return os.path.join(self.root, f"{what}{self.name(step)}-{secrets.token_hex(4)}")

    def _hint(self, name: str) -> None:
        """Write `latest`, whole or not at all; only a hint, so a failure is none."""
        with suppress(OSError):
            replace_file(os.path.join(self.root, LATEST), f"{name}\n".encode())

    def _sync(self) -> None:
        if self.durable:
            sync_directory(self.root)


def require_whole(where: str, step: int, found: Manifest, size: Callable[[str], int | None]) -> Manifest:
    """The record of a step, found to be a commit of that step, of all its ranks and of files of their sizes.

    `size`: the bytes of a file by its name, None where it is not there. Raises SourceError."""
    if found.record.layout != LAYOUT:
        raise SourceError(f"{where}: is no commit, but an output of layout {found.record.layout}")
    if not found.complete:
        raise SourceError(f"{where}: {len(found.shards)} of {found.world} ranks are in its record")
    if found.record.source.step != step:
        raise SourceError(f"{where}: its record is of step {found.record.source.step}")
    for name, entry in found.all_files().items():
        if (nbytes := size(name)) != entry.nbytes:
            raise SourceError(f"{where}: {name} has {nbytes} bytes, the record says {entry.nbytes}")
    return found


def ready(root: str) -> bool:
    """Whether a root can be written: made where it is missing. One that is full can be reached, and the save
    says so: training that went on for days without a commit would only have been warned."""
    try:
        make_directories(os.path.realpath(root))
        probe = os.path.join(root, PROBE + secrets.token_hex(4))
        write_file(probe, [b"x"], durable=False)
        with suppress(FileNotFoundError):  # swept away
            os.unlink(probe)
    except OSError as e:
        return e.errno in (errno.ENOSPC, errno.EDQUOT)
    return True


def _numbers(value: JSON) -> dict[str, float]:
    """The metrics of a record."""
    if not isinstance(value, dict):
        return {}
    return {k: float(v) for k, v in value.items() if isinstance(v, (int, float))}
