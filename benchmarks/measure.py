"""A subject and its floor, measured in turn in one process (ABAB), and the figure that comes of it.

Law: a figure is a ratio (or difference) of two times of the same run. Rounds whose floor is more than 1.3
times the best floor say more of the machine than of the subject: they are dropped and counted.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

STEADY = 1.3
"""A round counts when its floor is at most this many times the best floor."""

PATIENCE = 60.0
"""Seconds after which a row takes the rounds it has."""


FLOORS = {
    "M", "C", "W", "W durable", "memcpy", "write", "fsync", "python",
    "cast", "staged cast", "one tensor", "copy", "anew", "unchecked", "without it",
}  # fmt: skip
"""What the machine can do at best, or fastckpt itself; what else a row is compared with is other software."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Step:
    """Something timed: `before` is called first, off the clock; `after` likewise."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing

    def seconds(self) -> float:
        """One timed run."""
        self.before()
        began = time.perf_counter()
        self.run()
        took = time.perf_counter() - began
        self.after()
        return took


@dataclass(frozen=True, slots=True)
class Goal:
    """At most (`at_most`) or at least the limit."""

    limit: float
    at_most: bool = True

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the table before it is measured: what, on which input, in which unit, with which goal.

    `value` makes the figure of the subject's and the floor's seconds."""

    what: str
    shape: str
    unit: str
    value: Callable[[float, float], float]
    goal: Goal | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A measured row. `best`, `median`: the figure; `subject_s`, `floor_s`: best and median seconds."""

    what: str
    shape: str
    unit: str
    goal: str
    best: float
    median: float
    met: str
    subject_s: tuple[float, float]
    floor: str
    floor_s: tuple[float, float]
    rounds: int
    dropped: int
    load: float
    told: dict[str, float | str] = field(default_factory=dict)

    @property
    def peer(self) -> bool:
        """Whether other software is what it is compared with."""
        return bool(self.floor) and not FLOORS.issuperset(self.floor.split(" + "))

    @property
    def footprint(self) -> bool:
        """Whether it is no time: bytes of memory or from storage."""
        return not self.subject_s[0]


def of_floor(subject: float, floor: float) -> float:
    return subject / floor


def times_faster(subject: float, floor: float) -> float:
    return floor / subject


def seconds(subject: float, floor: float) -> float:
    return subject


def on(threads: int) -> str:
    """How a row says it."""
    return "one thread" if threads == 1 else f"{threads} threads"


class Bench:
    """pytest-benchmark's fixture, with a floor in every round's set-up."""

    def __init__(self, fixture: object, tell: Callable[[Row], None]) -> None:
        self.fixture = fixture
        self.tell = tell

    def measure(
        self,
        figure: Figure,
        subject: Step,
        floor: Sequence[Step] = (),
        *,
        rounds: int = 7,
        told: dict[str, float | str] | None = None,
    ) -> Row:
        """Measure one row: a throw-away round, then rounds of the floor's steps and the subject until
        `rounds` of them count; beyond `rounds`, for PATIENCE seconds and three times as many at most.

        `told`: further figures for the row's JSON; the caller may fill the dict while it is measured."""
        pairs: list[tuple[float, float]] = []

        def steady() -> list[tuple[float, float]]:
            most = STEADY * min((floor for _, floor in pairs), default=0.0)
            return [pair for pair in pairs if pair[1] <= most]

        def alternate() -> None:
            self._round(subject, floor)
            began = time.perf_counter()
            while len(pairs) < rounds or (
                len(steady()) < rounds and len(pairs) < 3 * rounds and time.perf_counter() - began < PATIENCE
            ):
                pairs.append(self._round(subject, floor))

        self.fixture.pedantic(alternate, rounds=1)  # type: ignore[attr-defined]
        kept = steady()
        best = (min(s for s, _ in kept), min(f for _, f in kept))
        middle = (statistics.median(s for s, _ in kept), statistics.median(f for _, f in kept))
        low, mid = figure.value(*best), figure.value(*middle)
        return self.enter(
            Row(
                figure.what, figure.shape, figure.unit,
                str(figure.goal or ""), low, mid, _judged(figure.goal, low, mid), (best[0], middle[0]),
                " + ".join(step.name for step in floor), (best[1], middle[1]),
                len(kept), len(pairs) - len(kept), os.getloadavg()[0], told or {},
            )
        )  # fmt: skip

    def _round(self, subject: Step, floor: Sequence[Step]) -> tuple[float, float]:
        below = sum(step.seconds() for step in floor)
        return subject.seconds(), below

    def record(
        self,
        what: str,
        shape: str,
        unit: str,
        values: Sequence[float],
        goal: Goal | None,
        told: dict[str, float | str],
    ) -> Row:
        """A row that is no time: bytes, or a time some other process took."""
        best = min(values) if goal is None or goal.at_most else max(values)
        middle = statistics.median(values)
        nothing = (0.0, 0.0)
        return self.enter(
            Row(
                what, shape, unit, str(goal or ""), best, middle, _judged(goal, best, middle),
                nothing, "", nothing, len(values), 0, os.getloadavg()[0], told,
            )
        )  # fmt: skip

    def enter(self, row: Row) -> Row:
        self.fixture.extra_info.update(asdict(row))  # type: ignore[attr-defined]
        self.tell(row)
        return row


def _judged(goal: Goal | None, best: float, middle: float) -> str:
    if goal is None:
        return ""
    return "yes" if goal.met(middle) else "best" if goal.met(best) else "no"
