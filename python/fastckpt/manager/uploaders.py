"""Commits carried elsewhere, with proof that they arrived.

Law: the commit record goes last, so that a destination that has it has all; every file is read back and its
digest compared before it counts; what is there already with the right digest is not sent again.
"""

from __future__ import annotations

import errno
import importlib
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from ..digest import LEAF, Digesting
from ..errors import ManagerError, SourceError, WriteError
from ..output.filesystem import make_directories, real, sync_directory
from ..output.manifest import NAME, Manifest, rank_name
from ..paths import pieces_of
from ..verification.outputs import verify


class Destination(Protocol):
    """Where files go; `name` is a relative path with "/". Both may raise OSError: it is tried again."""

    def put(self, path: str, name: str) -> None:
        """Store a local file under a name, whole or not at all."""

    def read(self, name: str) -> Iterator[bytes]:
        """What is stored under a name, in pieces of at most LEAF bytes. Raises FileNotFoundError."""


class LocalDirectory:
    """A directory of this machine, or one that it mounts."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = real(root)

    def put(self, path: str, name: str) -> None:
        """Copy beside, sync, rename."""
        final = os.path.join(self.root, name)
        for made in make_directories(os.path.dirname(final)):
            sync_directory(os.path.dirname(made))
        staged = f"{final}.{secrets.token_hex(4)}.part"
        try:
            with open(path, "rb") as source, open(staged, "xb") as out:
                for piece in iter(lambda: source.read(LEAF), b""):
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            os.replace(staged, final)
            sync_directory(os.path.dirname(final))
        finally:
            with suppress(FileNotFoundError):
                os.unlink(staged)

    def read(self, name: str) -> Iterator[bytes]:
        """The file's bytes."""
        with open(os.path.join(self.root, name), "rb") as f:
            yield from iter(lambda: f.read(LEAF), b"")


_FOREIGN = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("fsspec.exceptions", "FSTimeoutError"),  # an OSError from Python 3.11 on
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)
"""What the clients of object stores raise past fsspec when a store cannot be reached: no OSErrors."""


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn the errors of the clients that are loaded into OSErrors."""
    try:
        yield
    except OSError:
        raise
    except tuple(
        getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules
    ) as e:
        raise OSError(errno.EIO, f"{type(e).__name__}: {e}") from e


class FsspecDirectory:
    """A directory of any file system that fsspec knows ("s3://bucket/run", "memory://run")."""

    def __init__(self, url: str) -> None:
        try:
            core = importlib.import_module("fsspec.core")
            self._fs, self._root = core.url_to_fs(url)
        except (ImportError, ValueError) as e:
            raise ManagerError(f"{url}: needs fsspec and its package for this scheme: {e}") from None

    @_as_os_errors()
    def put(self, path: str, name: str) -> None:
        """Upload; object stores show a file only when it is whole."""
        where = f"{self._root}/{name}"
        self._fs.makedirs(os.path.dirname(where), exist_ok=True)
        self._fs.put_file(path, where)

    def read(self, name: str) -> Iterator[bytes]:
        """The object's bytes, fetched again."""
        with _as_os_errors():
            self._fs.invalidate_cache()
            with self._fs.open(f"{self._root}/{name}", "rb") as f:
                yield from iter(lambda: f.read(LEAF), b"")

    @_as_os_errors()
    def sizes(self, below: str = "") -> dict[str, int]:
        """What is stored below a name, by name: bytes; not what has that very name, as an object may."""
        self._fs.invalidate_cache()
        top = f"{self._root}/{below}".rstrip("/")
        if not self._fs.exists(top):
            return {}
        found = self._fs.find(top, detail=True)
        names = ((path[len(self._root) :].lstrip("/"), int(info["size"])) for path, info in found.items())
        return {name: nbytes for name, nbytes in names if not below or name.startswith(f"{below}/")}

    @_as_os_errors()
    def remove(self, names: Sequence[str]) -> None:
        """Remove, in this order; what is gone already is no error."""
        for name in names:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{name}")

    @_as_os_errors()
    def move(self, old: str, new: str) -> None:
        """Store under another name: a copy, then the removal."""
        self._fs.makedirs(os.path.dirname(f"{self._root}/{new}"), exist_ok=True)
        self._fs.cp_file(f"{self._root}/{old}", f"{self._root}/{new}")
        self._fs.rm_file(f"{self._root}/{old}")


@dataclass(frozen=True, slots=True)
class Upload:
    """What an upload did: files and bytes sent, files that were there already, tries that failed."""

    name: str
    sent: int
    nbytes: int
    there: int
    failures: int
    seconds: float


class Uploader:
    """Carries commits to a destination: `tries` for each file, waiting `pause` seconds, twice as long each
    time. One upload at a time in the background."""

    def __init__(self, destination: Destination, *, tries: int = 5, pause: float = 1.0) -> None:
        if tries < 1:
            raise ManagerError(f"tries: wanted at least 1, got {tries}")
        self._destination, self._tries, self._pause = destination, tries, pause
        self._worker = ThreadPoolExecutor(1, "fastckpt-upload")
        self._running: list[Future[Upload]] = []

    def upload(self, path: str | os.PathLike[str], name: str | None = None) -> Upload:
        """Carry a committed directory to `name` (default: its own) and prove that it arrived.

        Raises SourceError where it is not sound here, WriteError where it cannot be carried."""
        began = time.perf_counter()
        root = os.path.realpath(path)
        name = name or os.path.basename(root)
        found = verify(root)
        if not found.ok:
            raise SourceError(f"{root}: not uploaded, it is not sound: {found.problems[0]}")
        manifest = Manifest.read(root)
        records = [rank_name(s.rank) for s in manifest.shards]
        files = [
            *sorted(manifest.all_files()),
            *(r for r in records if os.path.isfile(os.path.join(root, r))),
            NAME,  # last: who has it has all
        ]
        sent = nbytes = there = failures = 0
        for file in files:
            local = os.path.join(root, file)
            digesting = Digesting.of(pieces_of(local, LEAF))
            wanted = digesting.digest()
            if self._arrived(f"{name}/{file}", wanted):
                there += 1
                continue
            failures += self._send(local, f"{name}/{file}", wanted)
            sent += 1
            nbytes += digesting.nbytes
        return Upload(name, sent, nbytes, there, failures, time.perf_counter() - began)

    def start(self, path: str | os.PathLike[str], name: str | None = None) -> Future[Upload]:
        """The same in the background, after those before; `wait` tells how it went."""
        future = self._worker.submit(self.upload, path, name)
        self._running.append(future)
        return future

    def wait(self) -> list[Upload]:
        """Wait for all that was started; the first error is raised when all have ended."""
        running, self._running = self._running, []
        errors = [e for f in running if (e := f.exception()) is not None]
        if errors:
            raise errors[0]
        return [f.result() for f in running]

    def close(self) -> None:
        """Wait, and end the background thread."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def _send(self, local: str, name: str, wanted: str) -> int:
        """Put a file until it is read back right; how often it failed."""
        last = ""
        for attempt in range(self._tries):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            try:
                self._destination.put(local, name)
                if Digesting.of(self._destination.read(name)).digest() == wanted:
                    return attempt
                last = "what was read back has another digest"
            except OSError as e:
                last = str(e)
        raise WriteError(f"{local}: could not be carried to {name} in {self._tries} tries: {last}")

    def _arrived(self, name: str, wanted: str) -> bool:
        try:
            return Digesting.of(self._destination.read(name)).digest() == wanted
        except OSError:  # not there, or not to be reached now: it is sent
            return False
