"""Who else is told of saves and loads: five methods, and one that keeps a JSON file.

Law: the commits are the truth. What a handler says of the last epoch is asked, then checked against them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..checkpoint import JSON
from ..output.filesystem import as_write_errors, replace_file

SAVE, LOAD, PARTIAL_LOAD = "checkpoint_save", "checkpoint_load", "checkpoint_partial_load"
"""The three actions that are reported."""


@dataclass(frozen=True, slots=True)
class Took:
    """What an action took on each rank."""

    seconds: tuple[float, ...]
    nbytes: tuple[int, ...]

    @staticmethod
    def of(said: Sequence[JSON]) -> Took:
        """From what the ranks said: (seconds, bytes) each."""
        pairs = [s if isinstance(s, list) else [0.0, 0] for s in said]
        return Took(tuple(float(str(s)) for s, _ in pairs), tuple(int(str(n)) for _, n in pairs))


@runtime_checkable
class MetadataHandler(Protocol):
    """What a manager tells, and asks: the caffe2 CheckpointManager's five methods."""

    def set_params(
        self, *, root: str, nodes: Sequence[str], path_prefix: str | None, path_type: str | None
    ) -> None:
        """Where the checkpoints of which nodes lie."""

    def write(self, epoch: int) -> None:
        """A commit of this epoch stands."""

    def last_epoch(self, user_epoch: int | None = None) -> int | None:
        """The epoch to resume from, given what the user asked for; None: from the start."""

    def report(self, action: str, stats: Mapping[str, float]) -> None:
        """What an action took: path of each node's part -> seconds."""

    def accessible(self, epoch: int | None = None) -> bool:
        """Whether checkpoints (or this one) can be reached now; a save is skipped where not."""


class JsonMetadata:
    """Keeps epochs and the last timings in one JSON file, replaced whole at each change."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._held: dict[str, JSON] = {"params": {}, "epochs": [], "stats": {}}
        try:
            with open(self._path, encoding="utf-8") as f:
                found = json.load(f)
            if isinstance(found, dict):
                self._held.update(found)
        except (OSError, ValueError):
            pass  # none yet, or torn by another program: only a memory of commits that speak for themselves

    def set_params(
        self, *, root: str, nodes: Sequence[str], path_prefix: str | None, path_type: str | None
    ) -> None:
        """Where the checkpoints of which nodes lie."""
        self._held["params"] = {
            "root": root, "nodes": list(nodes), "path_prefix": path_prefix, "path_type": path_type,
        }  # fmt: skip

    def write(self, epoch: int) -> None:
        """A commit of this epoch stands. Raises WriteError."""
        epochs = self._held["epochs"]
        known = [e for e in epochs if isinstance(e, int)] if isinstance(epochs, list) else []
        self._held["epochs"] = [*(e for e in known if e < epoch), epoch]
        self._store()

    def last_epoch(self, user_epoch: int | None = None) -> int | None:
        """What the user asked for, else the last epoch written."""
        epochs = self._held["epochs"]
        if user_epoch is not None or not isinstance(epochs, list) or not epochs:
            return user_epoch
        return epochs[-1] if isinstance(epochs[-1], int) else None

    def report(self, action: str, stats: Mapping[str, float]) -> None:
        """What the last action of this kind took. Raises WriteError."""
        held = self._held["stats"]
        self._held["stats"] = {**(held if isinstance(held, dict) else {}), action: dict(stats)}
        self._store()

    def accessible(self, epoch: int | None = None) -> bool:
        """Whether the file's directory is there."""
        return os.path.isdir(os.path.dirname(os.path.abspath(self._path)))

    def _store(self) -> None:
        with as_write_errors(self._path):
            replace_file(self._path, json.dumps(self._held, indent=1).encode())
