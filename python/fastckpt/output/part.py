"""One rank a run, in a directory that all ranks share: its files, then its record, then the commit record.

Law: a directory whose `fastckpt.json` is there is a whole output of one plan, the old one or the new one. A
rank's finished files are renamed, then its record; whoever finds every rank's record writes `fastckpt.json`.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from ..errors import SourceError, WriteError
from .filesystem import (
    as_write_errors,
    locked,
    move_in,
    real,
    refuse_loss,
    remove_directories,
    sync_directory,
    unlock,
    write_file,
)
from .manifest import NAME, TRACE, Manifest, merged, rank_name, rank_of


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
        self.path = real(path)
        self.rank, self.world, self.key = rank, world, key
        self._overwrite, self._durable, self._keep = overwrite, durable, tuple(keep)
        self._mine = f"{TRACE}rank-{rank}."
        self._token = os.urandom(4).hex()
        self._made: list[str] = []
        self._waiting: list[tuple[str, str]] = []
        self._placed: list[str] = []
        self._lock = -1
        self._numbers = itertools.count(1)  # next() is one step: files may be begun by several threads

    def refuse(self) -> None:
        """Raise WriteError for a place that is no directory or another plan's."""
        with as_write_errors(self.path):
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
                        f"this one is {self.key}), or the checkpoint's files were written since; name a new "
                        "directory; overwrite=True (--overwrite) replaces it"
                    )
            if entries and not records and not any(e.startswith(TRACE) for e in entries):
                raise WriteError(
                    f"{self.path}: not empty ({len(entries)} entries, {entries[0]} first) and no output of "
                    "fastckpt; name a new directory; overwrite=True (--overwrite) writes into it"
                )
        elif entries:
            refuse_loss(self.path, self._keep)

    def start(self) -> None:
        """Refuse a directory that is another plan's, remove what this rank left when it was killed."""
        self.refuse()
        with as_write_errors(self.path):
            move_in(self.path, self._claim, self._made)

    def stage(self, name: str) -> str:
        """The path to write the file `name` at."""
        return os.path.join(self.path, f"{self._mine}{self._token}.{next(self._numbers)}.tmp")

    def settle(self, name: str, staged: str) -> None:
        """The file is finished: it gets its name when the rank commits."""
        self._waiting.append((name, staged))

    def done(self, rank: int) -> Manifest | None:
        """The record that says that a rank is done: its own, or the whole set's where one process made all.

        None where there is none, or where a file it lists is not there with its size."""
        found = self._record(rank) or self._set()
        return found if found is not None and found.missing(self.path) is None else None

    def commit(self, manifest: Manifest) -> Manifest:
        """Name this rank's files, write its record, and complete the set if it is the last."""
        with as_write_errors(self.path):
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
        with as_write_errors(self.path):
            there = {rank_of(entry) for entry in os.listdir(self.path)}
        if not there.issuperset(range(self.world)):
            return manifest  # no other rank's record is read until the last has come
        parts = [record for r in range(self.world) if (record := self._record(r)) is not None]
        if len(parts) < self.world:
            return manifest
        whole = merged(parts)
        if (missing := whole.missing(self.path)) is not None:
            raise WriteError(
                f"{self.path}: every rank is done, but {missing}; run the rank it belongs to again"
            )
        with as_write_errors(self.path):
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
            if not locked(fd):
                raise WriteError(
                    f"{self.path}: another run is making rank {self.rank}; run this one again when that ended"
                )
            if not os.path.samestat(os.fstat(fd), os.stat(marker)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), marker)
            self._sweep()
        except BaseException:
            unlock(fd)
            raise
        self._lock = fd

    # ---- records ----

    def _read(self, name: str) -> Manifest | None:
        """A record, if it is there and sound."""
        try:
            return Manifest.read(os.path.join(self.path, name))
        except SourceError:
            return None

    def _record(self, rank: int) -> Manifest | None:
        """That rank's record, if it is there, sound, and of this plan."""
        found = self._of_plan(rank_name(rank))
        return found if found is not None and [s.rank for s in found.shards] == [rank] else None

    def _set(self) -> Manifest | None:
        """The commit record, if it is there, sound, and of this plan."""
        found = self._of_plan(NAME)
        return found if found is not None and found.complete else None

    def _of_plan(self, name: str) -> Manifest | None:
        """A record, if it is there, sound, and of this plan."""
        found = self._read(name)
        return found if found is not None and (found.key, found.world) == (self.key, self.world) else None

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
            unlock(fd)
