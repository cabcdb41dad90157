"""JobRunner: runs a job's groups, saving after each epoch and resuming where the last commit stands.

Law: the order is caffe2's. An epoch is evaluated, saved, then ended; what is saved is the state in which
the stop conditions were asked, so that a resumed job answers them alike.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, cast

from ..errors import FastckptError, ManagerError
from .coordination import by_some
from .job import Condition, Job
from .manager import CheckpointManager
from .reporting import CheckpointWarning
from .uploaders import Uploader

SCRATCH: Literal["scratch"] = "scratch"
FAILURES = 3
"""Failed saves in a row that end a job."""


class JobRunner:
    """Runs `job`, its state in the commits of `manager`.

    `resume_from_epoch`: None resumes the newest valid commit, a number that one (newer ones are set aside),
    "scratch" starts anew and refuses a root that holds commits. `uploader` carries the last commit on when
    the training is done."""

    def __init__(
        self,
        job: Job,
        manager: CheckpointManager,
        resume_from_epoch: int | Literal["scratch"] | None = None,
        uploader: Uploader | None = None,
    ) -> None:
        self._job, self._manager, self._uploader = job, manager, uploader
        self._resume = resume_from_epoch
        self._failures = 0

    def train(self) -> int:
        """Run the job to its end; the last epoch. Collective.

        Raises ManagerError where the first save fails, or three in a row; SystemExit(143) after the save
        that a SIGTERM asks for, where the manager listens for it."""
        context, job, manager = self._job.context, self._job, self._manager
        context.rank, context.world = manager.rank, manager.world
        start = self._start()
        if start is None:
            job.init_group.run(context)
            context.epoch = 0
            self._save(0, must=True)
        else:
            context.epoch = start
            self._restore(start)
        done = start is not None and self._any(job.limits)
        while not done:
            context.epoch += 1
            context.metrics.clear()
            job.epoch_group.run(context)
            done = self._any(job.stop_conditions)
            self._save(context.epoch, last=done)
            if manager.preempted:
                manager.wait()
                raise SystemExit(128 + signal.SIGTERM)
        self._settle()
        if self._uploader is not None:
            self._upload(self._uploader, context.epoch)
        job.download_group.run(context)
        job.exit_group.run(context)
        return context.epoch

    def load_from(self, names: Sequence[str], epoch: int) -> dict[str, object]:
        """Tensors of an epoch by name, as this rank saved them: for evaluation. Collective.

        Raises ManagerError, before anything is read, where a node does not have the epoch."""
        return cast("dict[str, object]", self._manager.restore(epoch, names))

    # ---- internals ----

    def _start(self) -> int | None:
        """The epoch to resume from; None: from scratch."""
        manager = self._manager
        if self._resume == SCRATCH:
            standing = manager.resume_step()
            if standing is not None:
                raise ManagerError(
                    f"{manager.root}: holds commits (the newest is {standing}); a start from scratch needs a "
                    "root of its own"
                )
            return None
        return manager.resume_step(self._resume)

    def _restore(self, start: int) -> None:
        """The state of an epoch into the job, or of the valid one before it where none was asked for."""
        context, manager = self._job.context, self._manager
        mine = context.state if self._job.saves(context.rank) else {}
        manager.restore(start if self._resume is not None else None, template=mine)
        if manager.restored is not None:
            context.epoch = manager.restored
        aside = manager.rewind(start) if self._resume is not None else []
        if aside:
            warnings.warn(
                f"resuming epoch {start}: newer commits {aside} were set aside",
                CheckpointWarning,
                stacklevel=3,
            )

    def _save(self, epoch: int, *, must: bool = False, last: bool = False) -> None:
        """Save an epoch; a failure is reported, the third in a row raised, that of the first save always.

        The first and the last are saved whatever the policy."""
        context, manager = self._job.context, self._manager
        state = context.state if self._job.saves(context.rank) else {}
        if must:
            if not manager.save(epoch, state, context.metrics, force=True):
                raise ManagerError(f"{manager.root}: the first save was skipped; can it be reached?")
            manager.wait()
            return
        if manager.in_flight:
            self._count(f"the epoch before {epoch}", self._landed)
        self._count(f"epoch {epoch}", lambda: manager.save(epoch, state, context.metrics, force=last))

    def _landed(self) -> bool:
        """Wait for the save in flight."""
        self._manager.wait()
        return True

    def _count(self, what: str, work: Callable[[], bool]) -> None:
        """Do it, and count failures in a row; what is still in flight is no success yet."""
        try:
            if work() and not self._manager.in_flight:
                self._failures = 0
        except FastckptError as e:
            self._failures += 1
            if self._failures >= FAILURES:
                raise
            warnings.warn(
                f"{what} was not saved ({self._failures} failures in a row): {e}",
                CheckpointWarning,
                stacklevel=4,
            )

    def _settle(self) -> None:
        """The last save, if it is still in flight."""
        self._count("the last epoch", self._landed)

    def _any(self, conditions: Sequence[Condition]) -> bool:
        """Whether a condition is true on any rank; all are asked, on every rank."""
        context = self._job.context
        mine = [condition(context) for condition in conditions]
        return any(said is True for said in self._manager.group.exchange(any(mine)))

    def _upload(self, uploader: Uploader, epoch: int) -> None:
        def carry() -> None:
            if epoch in self._manager.steps():
                uploader.start(self._manager.path(epoch))
                uploader.wait()

        by_some(self._manager.group, f"upload of epoch {epoch}", self._manager.rank == 0, carry)
