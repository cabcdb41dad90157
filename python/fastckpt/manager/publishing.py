"""Versions for the servers: a committed step, resharded into a directory of its own, and one link.

Law: `current` names a whole version at every moment; it moves in one rename, forward or back, and what it
names is never removed.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress

from .. import sources
from ..checkpoint import Checkpoint
from ..errors import ManagerError, SourceError
from ..output.filesystem import as_write_errors, real, remove_tree, sync_directory
from ..output.manifest import NAME, Manifest
from ..paths import is_directory, is_file
from ..planning.plans import Plan
from ..planning.request import Serving
from ..road import plan, reshard
from ..running.runs import Progress, Report, require_place
from ..sources.training import ENGINE, engine_directory, parts_of
from .opened import Opened, check_files
from .policies import positive

CURRENT = "current"
_TRASH = ".trash-"
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def model_of(opened: Opened, part: str | None) -> Checkpoint:
    """The model in a commit, as a checkpoint, its digests checked; `part` is its key in the state.

    Raises ManagerError where it is not clear which part that is, SourceError where it is broken."""
    parts = parts_of(opened.tree)
    if part is None:
        models = [k for k, kind in parts.items() if kind in ("module", ENGINE)]
        if len(models) > 1 or (not models and any(kind != "value" for kind in parts.values())):
            raise ManagerError(f"{opened.path}: which part is the model? It has {', '.join(sorted(parts))}")
        part = models[0] if models else ""
    elif part not in parts:
        raise ManagerError(f"{opened.path}: no part {part!r}; it has {', '.join(sorted(parts))}")
    if parts.get(part) == ENGINE:
        where = engine_directory(part)
        files = opened.commit.manifest.files
        check_files(opened.path, [n for n in files if n.startswith(f"{where}/")], files)
        return sources.open(os.path.join(opened.path, where))
    prefix = f"{part}." if part else ""
    names = {n.removeprefix(prefix): n for n in opened.names if n.startswith(prefix)}
    if not names:
        raise ManagerError(f"{opened.path}: part {part!r} holds no tensors")
    opened.prove(list(names.values()))
    return opened.checkpoint(names)


def publish(
    source: Checkpoint,
    version: str,
    to: str | os.PathLike[str],
    serving: Serving,
    *,
    allow_nonfinite: bool = False,
    keep: int | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report | None:
    """Write `to/VERSION` and make it current; None where it was there already, whole, and only the link
    moved. Raises what `reshard` raises."""
    if keep is not None:
        positive("keep", keep)
    root = real(to)
    path = os.path.join(root, _checked(version))
    made = None
    if not os.path.exists(os.path.join(path, NAME)):
        made = reshard(
            source, allow_nonfinite=allow_nonfinite, out=path, memory=memory, threads=threads,
            progress=progress, **serving,
        )  # fmt: skip
    else:
        _same(path, plan(source, **serving), source)
    point(root, version)
    if keep is not None:
        gc(root, keep)
    return made


def rehearsed(
    source: Checkpoint, version: str, to: str | os.PathLike[str], serving: Serving, *, keep: int | None = None
) -> Plan:
    """The plan of `publish`, which writes nothing. Raises what `publish` raises before its first byte."""
    if keep is not None:
        positive("keep", keep)
    path = os.path.join(real(to), _checked(version))
    planned = plan(source, **serving)
    if os.path.exists(os.path.join(path, NAME)):
        _same(path, planned, source)
    else:
        require_place(planned, path, None)
    return planned


def _same(path: str, wanted: Plan, source: Checkpoint) -> None:
    """Refuse to take a version of something else for this one."""
    found = _whole(path)
    if found.record.source.headers != source.headers or found.key != wanted.key:
        raise ManagerError(
            f"{path}: is there already, of another save or made otherwise ({found.world} ranks, layout "
            f"{found.record.layout}); publish under another name, or remove it"
        )


def _whole(path: str) -> Manifest:
    """The record of a version that has all its files, by their sizes. Raises ManagerError."""
    found = Manifest.read(path)
    if (missing := found.missing(path)) is not None or not found.complete:
        why = missing or f"{len(found.shards)} of {found.world} ranks are in its record"
        raise ManagerError(f"{path}: is no longer whole: {why}; remove it and publish it again")
    return found


def versions(to: str | os.PathLike[str]) -> list[str]:
    """The whole versions below a directory, the oldest first: outputs that were made of the step they are
    named after. What else lies there is not ours to remove."""
    root = real(to)
    if not is_directory(root):
        return []
    found = []
    for name in os.listdir(root):
        record = os.path.join(root, name, NAME)
        if name != CURRENT and _VERSION.fullmatch(name) and is_file(record):
            with suppress(SourceError):  # broken: nothing says whose it is
                if name in Manifest.read(record).record.source.path.split(os.sep):
                    found.append((os.stat(record).st_mtime_ns, name))
    return [name for _, name in sorted(found)]


def current(to: str | os.PathLike[str]) -> str | None:
    """The version that is current; None where none is."""
    try:
        return os.path.basename(os.readlink(os.path.join(real(to), CURRENT)))
    except OSError:
        return None


def point(to: str | os.PathLike[str], version: str) -> None:
    """Make a version current, in one step: forward, or back to an older one.

    Raises ManagerError where it is not there whole, WriteError where the link cannot be moved."""
    root = real(to)
    if not is_file(os.path.join(root, _checked(version), NAME)):
        raise ManagerError(
            f"{root}: no whole version {version!r}; there are {', '.join(versions(root)) or 'none'}"
        )
    _whole(os.path.join(root, version))
    staged = os.path.join(root, f".{CURRENT}-{secrets.token_hex(4)}")
    with as_write_errors(os.path.join(root, CURRENT)):
        os.symlink(version, staged)
        try:
            os.replace(staged, os.path.join(root, CURRENT))
            sync_directory(root)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(staged)


def gc(to: str | os.PathLike[str], keep: int) -> list[str]:
    """Remove all but the newest `keep` versions, never the current one; the names that went."""
    positive("keep", keep)
    root, live = real(to), current(to)
    gone = [v for v in versions(root)[:-keep] if v != live]
    for name in gone:
        with as_write_errors(os.path.join(root, name)):
            os.rename(os.path.join(root, name), os.path.join(root, f"{_TRASH}{name}-{secrets.token_hex(4)}"))
    for entry in os.listdir(root):
        if entry.startswith(_TRASH):  # what a run left that was killed here too
            remove_tree(os.path.join(root, entry))
    return gone


def _checked(version: str) -> str:
    if not _VERSION.fullmatch(version) or version == CURRENT:
        raise ManagerError(f"version {version!r} is no plain name")
    return version
