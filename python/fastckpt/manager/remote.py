"""Commits in an object store, by URL: made in a local directory, carried there, the commit record last.

Law: a step of the store that has its commit record has all of it, read back and compared by digest when it
was carried; without the record it is not a commit. An object store has no rename, so a whole commit is never
replaced there, and one that goes loses its record first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress

from ..digest import digest
from ..errors import ManagerError, SourceError, WriteError, expect
from ..output.filesystem import as_write_errors, remove_tree
from ..output.manifest import NAME, Manifest
from ..paths import is_file
from ..planning.plancache import user_cache
from ..verification.outputs import verify
from .commits import ASIDE, LATEST, SAVING, TRASH, Commit, Store, require_whole
from .uploaders import FsspecDirectory, Uploader


class RemoteStore(Store):
    """The commits below a URL that fsspec knows, as seen from one process.

    `scratch` is a local directory, the same for all ranks: commits are made there, and brought there to be
    read; the newest stays. The lock is the scratch's: two jobs with different ones are not kept apart."""

    local = False

    def __init__(self, url: str, scratch: str | None, *, prefix: str, digits: int, durable: bool) -> None:
        self.url = url
        super().__init__(scratch or default_scratch(url), prefix=prefix, digits=digits, durable=durable)
        self._far = FsspecDirectory(url)
        self._uploader = Uploader(self._far)
        self._spelled = re.compile(re.escape(prefix) + r"([0-9]+)/(.+)")

    @property
    def place(self) -> str:
        """Where the commits stand, as their records say it."""
        return self.url

    # ---- what stands there ----

    def _stored(self) -> dict[int, dict[str, int]]:
        """step -> what is stored of it: name -> bytes. Raises WriteError where that cannot be asked."""
        found: dict[int, dict[str, int]] = {}
        with as_write_errors(self.url):
            for path, nbytes in self._far.sizes().items():
                named = self._spelled.fullmatch(path)
                if named and path.startswith(f"{self.name(int(named[1]))}/"):
                    found.setdefault(int(named[1]), {})[named[2]] = nbytes
        return found

    def steps(self) -> list[int]:
        """Steps with a commit record, ascending."""
        return sorted(step for step, names in self._stored().items() if NAME in names)

    def manifest(self, step: int) -> Manifest:
        """The record of a step whose files are all there with their sizes. Raises SourceError."""
        with as_write_errors(self.url):
            stored = self._far.sizes(self.name(step))
        return self._checked(step, {n.split("/", 1)[1]: k for n, k in stored.items()})

    def _checked(self, step: int, stored: dict[str, int]) -> Manifest:
        where = f"{self.url}/{self.name(step)}"
        if NAME not in stored:
            raise SourceError(f"{where}: no {NAME}")
        text = b"".join(self._read(step, NAME))
        return require_whole(where, step, Manifest.parse(text, f"{where}/{NAME}"), stored.get)

    def _read(self, step: int, file: str) -> Iterator[bytes]:
        """What is stored of a step's file. Raises SourceError where it is not there, WriteError where that
        cannot be known: a commit that cannot be reached now is not a broken one."""
        name = f"{self.name(step)}/{file}"
        with as_write_errors(f"{self.url}/{name}"):
            try:
                yield from self._far.read(name)
            except FileNotFoundError:
                raise SourceError(f"{self.url}/{name}: is not there") from None

    def commit(self, step: int) -> Commit | None:
        """What stands at a step; None where nothing whole does. Digests are not checked here.

        Raises WriteError where that cannot be known."""
        try:
            found = self.manifest(step)
        except SourceError:
            return None
        return Commit.of(step, found)

    def commits(self) -> list[Commit]:
        """Everything whole, by step."""
        out = []
        for step, stored in sorted(self._stored().items()):
            with suppress(SourceError):
                out.append(Commit.of(step, self._checked(step, stored)))
        return out

    def bring(self, step: int, *, again: bool = False) -> None:
        """Bring a step whole to the scratch directory; its bytes are checked by whoever reads them. `again`:
        also where a sound copy is there.

        Raises SourceError where it does not stand, WriteError where it cannot be brought."""
        wanted = self.manifest(step)
        here = os.path.join(self.path(step), NAME)
        with suppress(SourceError):
            if not again and Manifest.read(here).key == wanted.key and verify(self.path(step)).ok:
                return
        staged = self._away(SAVING, step)
        try:
            with as_write_errors(staged):
                for name in [*wanted.all_files(), NAME]:
                    path = os.path.join(staged, name)
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    with open(path, "xb") as f:
                        f.writelines(self._read(step, name))
                self._clear(step)
                os.rename(staged, self.path(step))
        except BaseException:
            remove_tree(staged)
            raise

    def forget(self, step: int) -> None:
        """Remove a step's copy from the scratch directory. Raises WriteError."""
        with as_write_errors(self.path(step)):
            self._clear(step)

    def _clear(self, step: int) -> None:
        """Give a step's name in the scratch directory free, where a copy has it. Raises OSError."""
        if not self._is_copy(self.name(step)):
            os.rename(self.path(step), self._away(ASIDE, step))
        old = self._away(TRASH, step)
        with suppress(FileNotFoundError):
            os.rename(self.path(step), old)
        remove_tree(old)

    def _is_copy(self, entry: str) -> bool:
        """Whether a directory of the scratch is no commit, or one of this URL: others are not ours to remove,
        such as those of a job that saved to this disk before it saved to the store."""
        record = os.path.join(self.root, entry, NAME)
        with suppress(SourceError):
            return not is_file(record) or Manifest.read(record).record.source.path == self.url
        return False

    # ---- changes: the coordinator only ----

    def seal(self, step: int, token: str, *, aside: bool) -> None:
        """Carry the finished directory to the store: its record, written last, is the moment of the commit.

        Raises WriteError where it cannot be carried, ManagerError where a whole commit stands there."""
        if aside:
            self.set_aside([step])
        if self.commit(step) is not None:
            raise ManagerError(f"{self.url}: step {step} stands, and nothing is replaced here in one step")
        self._remove_all(step)  # what a torn upload left
        with as_write_errors(self.path(step)):
            self._clear(step)
        staged = self.saving(step, token)
        try:
            self._uploader.upload(staged, self.name(step))
        except SourceError as e:
            raise WriteError(str(e)) from None
        with as_write_errors(self.path(step)):
            os.rename(staged, self.path(step))
        found = self.commit(step)
        if found is None or found.key != token:
            raise WriteError(f"{self.url}: step {step} is not what was just carried there")
        for entry in os.listdir(self.root):
            if self._named.fullmatch(entry) and entry != self.name(step) and self._is_copy(entry):
                remove_tree(os.path.join(self.root, entry))
        self._hint(self.name(step))

    def remove(self, steps: Iterable[int]) -> None:
        """Remove commits, never the newest whole one; the record goes first."""
        newest = max((c.step for c in self.commits()), default=None)
        for step in steps:
            if step != newest:
                self._remove_all(step)

    def _remove_all(self, step: int) -> None:
        with as_write_errors(self.url):
            self._far.remove([f"{self.name(step)}/{NAME}"])
            self._far.remove(sorted(self._far.sizes(self.name(step))))

    def set_aside(self, steps: Iterable[int]) -> None:
        """Hide commits without removing them, under names that are no step's; the record is moved first."""
        for step in steps:
            away = os.path.basename(self._away(ASIDE, step))
            name = self.name(step)
            with as_write_errors(self.url):
                stored = [n.split("/", 1)[1] for n in self._far.sizes(name)]
                for file in sorted(stored, key=lambda n: n != NAME):
                    self._far.move(f"{name}/{file}", f"{away}/{file}")

    def sweep(self, *, aside: bool = False) -> None:
        """Remove torn leftovers here, and there those of steps before the newest commit."""
        super().sweep(aside=aside)
        stored = self._stored()
        newest = max((s for s, names in stored.items() if NAME in names), default=-1)
        for step, names in stored.items():
            if NAME not in names and step < newest:
                self._remove_all(step)
        if aside:
            with as_write_errors(self.url):
                self._far.remove([n for n in self._far.sizes() if n.startswith(ASIDE)])

    def _hint(self, name: str) -> None:
        """Write `latest` here and there; only a hint, so a failure is none."""
        super()._hint(name)
        with suppress(OSError):
            self._far.put(os.path.join(self.root, LATEST), LATEST)


def store_at(
    place: str,
    *,
    path_type: str,
    named: bool,
    prefix: str,
    digits: int,
    scratch: str | os.PathLike[str] | None,
    shared: bool,
    durable: bool,
) -> Store:
    """The commits at a path, a file:// URL or an object store's; `named`: the last part of `place` is no
    directory but stands before each step's prefix, as caffe2's. Raises ManagerError, FastckptError for an
    argument of another type."""
    expect("path_type", path_type, str)
    expect("step_prefix", prefix, str)
    expect("step_digits", digits, int)
    scheme, separator, rest = place.partition("://")
    far = bool(separator) and scheme != "file"
    if path_type not in ("local", "fsspec") or (far and named and path_type == "local"):
        raise ManagerError(f"path type {path_type!r} for {place}: wanted local, or fsspec for a URL")
    place = rest if separator and not far else place
    if named:
        directory, start = os.path.split(place)
        place, prefix = directory or ".", start + prefix
    if not far:
        if scratch is not None:
            raise ManagerError(f"{place}: a scratch directory goes with a URL")
        return Store(place, prefix=prefix, digits=digits, durable=durable)
    if not shared:
        raise ManagerError(f"{place}: the ranks of an object store share it and a scratch directory")
    where = None if scratch is None else os.fspath(scratch)
    return RemoteStore(place, where, prefix=prefix, digits=digits, durable=durable)


def default_scratch(url: str) -> str:
    """Where the commits of a URL are made when nothing else is said: below the user's cache directory. Raises
    ManagerError where there is none."""
    found = user_cache("commits", digest(url.encode()))
    if found is None:
        raise ManagerError(f"{url}: this user has no cache directory to make commits in: scratch=")
    return found
