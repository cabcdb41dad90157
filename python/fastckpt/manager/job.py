"""A job: what runs once at the start, what runs every epoch, what ends it, what runs after.

Law: a job is data (lists of callables); who runs it and when is the runner's. Callables get the context,
and what they leave in `context.state` is what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar

from ..errors import ManagerError


@dataclass(slots=True)
class Context:
    """Where a job stands, handed to each of its callables.

    `state` is saved and restored: modules, optimizers, tensors and plain values by key. `values` are the
    job's own and are not saved. `epoch` is the one that runs, or ran last (0: none)."""

    state: dict[str, object] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    epoch: int = 0
    rank: int = 0
    world: int = 1
    metrics: dict[str, float] = field(default_factory=dict)


Task = Callable[[Context], object]
Condition = Callable[[Context], bool]


class TaskGroup:
    """Callables that run one after another. `with group:` makes it the one that `task` adds to."""

    _active: ClassVar[ContextVar[tuple[TaskGroup, ...]]] = ContextVar("groups", default=())

    def __init__(self, tasks: Collection[Task] = ()) -> None:
        self.tasks: list[Task] = list(tasks)
        self._tokens: list[Token[tuple[TaskGroup, ...]]] = []

    def __enter__(self) -> TaskGroup:
        self._tokens.append(self._active.set((*self._active.get(), self)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active.reset(self._tokens.pop())

    @classmethod
    def current(cls) -> TaskGroup:
        """The innermost group that is entered. Raises ManagerError where none is."""
        entered = cls._active.get()
        if not entered:
            raise ManagerError("no task group is entered; use `with job.init_group:` or `with job:`")
        return entered[-1]

    def add(self, task: Task) -> Task:
        """Add a callable at the end."""
        self.tasks.append(task)
        return task

    def run(self, context: Context) -> None:
        """Call all of them, in order."""
        for each in self.tasks:
            each(context)


def task(function: Task) -> Task:
    """Add a callable to the group that is entered (a decorator too). Raises ManagerError."""
    return TaskGroup.current().add(function)


class Job:
    """Four groups and the conditions that end it, as caffe2's.

    `init_group` runs once, on a start from scratch. `epoch_group` runs until a stop condition is true at
    the end of an epoch. `download_group` then collects what is scattered, `exit_group` saves the results.
    `state`: what is saved; its modules and optimizers are built before the job and filled by the init group
    or by a restore. `ranks`: those whose state is saved (None: all).

    `with job:` makes it `Job.current()` and enters its epoch group."""

    _entered: ClassVar[ContextVar[tuple[Job, ...]]] = ContextVar("jobs", default=())

    def __init__(
        self,
        *,
        init: Collection[Task] = (),
        epoch: Collection[Task] = (),
        download: Collection[Task] = (),
        exit: Collection[Task] = (),
        stop_conditions: Collection[Condition] = (),
        state: dict[str, object] | None = None,
        ranks: Collection[int] | None = None,
    ) -> None:
        self.init_group, self.epoch_group = TaskGroup(init), TaskGroup(epoch)
        self.download_group, self.exit_group = TaskGroup(download), TaskGroup(exit)
        self.stop_conditions: list[Condition] = list(stop_conditions)
        self.limits: list[Condition] = []
        self.context = Context({} if state is None else state)
        self.ranks = None if ranks is None else frozenset(ranks)
        self._tokens: list[Token[tuple[Job, ...]]] = []

    def __enter__(self) -> Job:
        self._tokens.append(self._entered.set((*self._entered.get(), self)))
        self.epoch_group.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.epoch_group.__exit__(kind, error, trace)
        self._entered.reset(self._tokens.pop())

    @classmethod
    def current(cls) -> Job:
        """The innermost job that is entered. Raises ManagerError where none is."""
        entered = cls._entered.get()
        if not entered:
            raise ManagerError("no job is entered; use `with Job() as job:`")
        return entered[-1]

    def add_stop_condition(self, condition: Condition, *, at_start: bool = False) -> None:
        """End the job when this is true after an epoch; `at_start`: also asked before the first one, so
        that a finished job that is started again does nothing more."""
        self.stop_conditions.append(condition)
        if at_start:
            self.limits.append(condition)

    def saves(self, rank: int) -> bool:
        """Whether this rank's state is saved."""
        return self.ranks is None or rank in self.ranks


EPOCHS_RUN = "epochs_run"
"""The key of the state under which `epoch_limiter` counts."""


def epoch_limiter(n: int, job: Job | None = None) -> None:
    """End a job (default: the current one) after `n` epochs in all.

    The count lives in the job's state, so that it goes on across resumes. Raises ManagerError."""
    if n < 1:
        raise ManagerError(f"epoch_limiter: wanted at least 1 epoch, got {n}")
    job = job or Job.current()
    job.context.state.setdefault(EPOCHS_RUN, 0)

    def count(context: Context) -> None:
        context.state[EPOCHS_RUN] = _count(context) + 1

    job.epoch_group.add(count)
    job.add_stop_condition(lambda context: _count(context) >= n, at_start=True)


def _count(context: Context) -> int:
    found = context.state.get(EPOCHS_RUN, 0)
    if not isinstance(found, int):
        raise ManagerError(f"state[{EPOCHS_RUN!r}] is {found!r}, wanted the number of epochs run")
    return found
