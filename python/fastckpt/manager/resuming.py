"""Which step is resumed, and restoring it: what stands everywhere, what the handler says, what is broken.

Law: a broken commit is passed over with a warning, never in silence; a step that was asked for is never
replaced by another.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

from ..errors import ManagerError, SourceError
from . import loading
from .commits import Store
from .coordination import Group, by_some, together
from .loading import Asked
from .metadata import LOAD, PARTIAL_LOAD
from .reporting import CheckpointWarning, Reporter
from .retention import Retention
from .saving import Disk
from .standing import Standing


@dataclass(slots=True, eq=False)
class Resuming:
    """`step` and `names`: the step that was restored last, whole, and its tensors; None: none was."""

    store: Store
    group: Group
    disk: Disk
    retention: Retention
    reporter: Reporter
    step: int | None = None
    names: set[str] | None = None

    def restore(self, step: int | None, asked: Asked) -> object:
        """The state of a step, or of the newest valid one. Collective. Raises ManagerError, SourceError."""
        root, broken, standing = self.store.root, self.retention.broken, self._standing()
        if step is not None:
            if step not in standing.steps:
                raise ManagerError(f"{root}: step {step} cannot be restored: {standing.lacking(step)}")
            return self._load(step, asked)
        while good := [s for s in standing.steps if s not in broken]:
            candidate = max(good)
            key = standing.steps[candidate]
            try:
                return self._load(candidate, asked)
            except SourceError as e:
                standing = Standing.of(self.store, self.group)
                if standing.steps.get(candidate) != key:
                    continue  # it is gone or another: a job that saves here cleaned beside us
                broken.add(candidate)
                _warn(f"COMMIT {candidate} IS BROKEN and passed over for the one before it: {e}")
        raise ManagerError(f"{root}: no valid commit to restore; broken: {sorted(broken) or 'none'}")

    def resume_step(self, user_step: int | None) -> int | None:
        """The user's step, else the newest that stands; the handler of rank 0 is asked too. Collective.

        Raises ManagerError where the user's step does not stand."""
        standing = self._standing()
        if user_step is not None and user_step not in standing.steps:
            raise ManagerError(
                f"{self.store.root}: step {user_step} cannot be resumed: {standing.lacking(user_step)}"
            )
        good = [s for s in standing.steps if s not in self.retention.broken]
        newest = max(good, default=None)
        told = together(self.group, "metadata", lambda: self.reporter.last(user_step))[0]
        if user_step is not None or told is None:
            return newest if user_step is None else user_step
        if not isinstance(told, int) or told not in good:
            why = standing.lacking(told) if isinstance(told, int) else "no step"
            _warn(f"metadata says step {told}: {why}; resuming {newest}")
        elif newest is not None and newest > told:
            _warn(f"metadata knows of step {told}, step {newest} stands: it is resumed")
        return newest

    def compare(self, step: int, names: set[str]) -> None:
        """Warn where a resumed run saves tensors under other names than it restored."""
        old = self.names
        if old is None or names == old:
            return
        self.names = names
        more, less = sorted(names - old), sorted(old - names)
        _warn(
            f"step {step}: the names changed: {len(more)} new ({', '.join(more[:5]) or 'none'}), "
            f"{len(less)} gone ({', '.join(less[:5]) or 'none'})",
            level=8,
        )

    def _standing(self) -> Standing:
        """What stands everywhere; what is newer here and does not is said, not passed over in silence."""
        here = self.store.steps()
        standing = Standing.of(self.store, self.group)
        newest = max(standing.steps, default=-1)
        for step in (s for s in here if s > newest and s not in self.retention.broken):
            why = standing.lacking(step)
            _warn(f"COMMIT {step} IS BROKEN and passed over for the one before it: {why}", level=5)
        return standing

    def _load(self, step: int, asked: Asked) -> object:
        if not self.store.local:
            bring = partial(self.store.bring, step)
            by_some(self.group, f"bringing step {step}", self.disk.coordinator, bring)
        done = loading.load(self.store, self.group, self.disk, step, asked)
        if asked.names is None:
            self.names, self.step = set(done.saved_names), step
        for note in done.notes:
            _warn(f"step {step}: {note}", level=5)
        self.reporter.done(LOAD if asked.names is None else PARTIAL_LOAD, step, done.took)
        return done.value


def _warn(said: str, level: int = 4) -> None:
    """Warn in the name of the manager's caller, `level` frames up."""
    warnings.warn(said, CheckpointWarning, stacklevel=level)
