"""What a job is told of its checkpoints: warnings, what saves and restores took, and the metadata handler.

Law: a handler that fails costs no commit; that it failed is a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .metadata import SAVE, MetadataHandler, Took


class CheckpointWarning(UserWarning):
    """Something about checkpoints that the user should know and that does not stop the job."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What an action (save, load, partial load) on a step took on one rank: seconds and bytes."""

    action: str
    step: int
    rank: int
    seconds: float
    nbytes: int

    @property
    def gb_per_second(self) -> float:
        """10^9 bytes a second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(slots=True, eq=False)
class Reporter:
    """Who is told on one rank: `stats`, and on rank 0 the handler, if there is one.

    `path`: where the part of a rank in a step lies."""

    rank: int
    path: Callable[[int, int], str]
    handler: MetadataHandler | None
    stats: list[Timing] = field(default_factory=list)

    def done(self, action: str, step: int, took: Took) -> None:
        """An action on a step is done."""
        for rank, (s, n) in enumerate(zip(took.seconds, took.nbytes, strict=True)):
            self.stats.append(Timing(action, step, rank, s, n))
        if self.handler is None or self.rank:
            return
        how = "stands" if action == SAVE else "is restored"
        with only_said(f"step {step} {how}, but the metadata handler failed"):
            if action == SAVE:
                self.handler.write(step)
            self.handler.report(action, {self.path(step, rank): s for rank, s in enumerate(took.seconds)})

    def accessible(self, step: int | None) -> bool:
        """Whether the handler says that checkpoints, or that step, can be reached."""
        return self.handler is None or self.handler.accessible(step)

    def last(self, user_step: int | None) -> int | None:
        """The step to resume from as the handler of rank 0 says; without one what the user asked for."""
        if self.handler is None or self.rank:
            return user_step
        return self.handler.last_epoch(user_step)


@contextmanager
def only_said(what: str) -> Iterator[None]:
    """Turn a failure that costs no commit into a warning, so that the ranks stay in step."""
    try:
        yield
    except Exception as e:  # of a handler that is not ours: this rank alone would leave the others waiting
        warnings.warn(f"{what}: {type(e).__name__}: {e}", CheckpointWarning, stacklevel=5)
