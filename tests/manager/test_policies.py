"""When to save and what to keep."""

from __future__ import annotations

import math

import pytest
from fastckpt.errors import FastckptError, ManagerError
from fastckpt.manager import policies
from fastckpt.manager.commits import Commit
from fastckpt.manager.policies import Moment

COMMITS = [
    Commit(0, "a", 100.0, {"loss": 3.0}),
    Commit(1, "b", 101.0, {"loss": 1.0}),
    Commit(2, "c", 110.0, {}),
    Commit(3, "d", 111.0, {"loss": 1.0}),
    Commit(4, "e", 125.0, {"loss": math.nan}),
]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (policies.newest(2), {3, 4}),
        (policies.newest(9), {0, 1, 2, 3, 4}),
        (policies.multiples(2), {0, 2, 4}),
        (policies.these([1, 7]), {1}),
        (policies.spaced(10), {0, 2, 4}),
        (policies.best(1, "loss"), {3}),
        (policies.best(2, "loss"), {1, 3}),
        (policies.best(1, "loss", "max"), {0}),
        (policies.best(4, "loss"), {0, 1, 3, 4}),
        (policies.best(1, "loss", without=True), {2, 3}),
        (policies.best(3, "accuracy"), set()),
        (policies.keep_any(policies.newest(1), policies.these([0])), {0, 4}),
    ],
)
def test_keeping(keep: policies.Keep, kept: set[int]) -> None:
    assert keep(COMMITS) == kept
    assert keep([]) == set()


def test_a_clock_that_was_set_back() -> None:
    commits = [Commit(s, "k", t) for s, t in enumerate((500.0, 505.0, 100.0, 105.0, 111.0))]
    assert policies.spaced(10)(commits) == {0, 2, 4}


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        (policies.every(3), [0, 3, 6]),
        (policies.on_steps([2, 5]), [2, 5]),
        (policies.every_seconds(4.5), [5, 6]),
        (policies.when_any(policies.every(4), policies.on_steps([5])), [0, 4, 5]),
    ],
)
def test_saving(when: policies.When, steps: list[int]) -> None:
    assert [s for s in range(7) if when(Moment(s, None, float(s)))] == steps


@pytest.mark.parametrize("make", [policies.every_seconds, policies.spaced, policies.idle])
@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_nonsense_seconds(make: object, seconds: float) -> None:
    with pytest.raises(ManagerError, match=f": wanted seconds from 0 on, got {seconds}"):
        make(seconds)  # type: ignore[operator]


def test_a_managers_seconds() -> None:
    when = policies.when_asked(1, (), 5, None)
    assert [when(Moment(s, None, t)) for s, t in ((0, math.inf), (1, 4.0), (2, 5.0))] == [True, False, True]
    none = {"keep_best": None, "best_metric": None, "best_mode": "min", "without": False}
    keep = policies.keep_asked(None, None, 10.0, None, **none)  # type: ignore[arg-type]
    assert keep is not None and keep(COMMITS) == {0, 2, 4}


def test_the_first_and_while_nothing_goes_on() -> None:
    assert policies.first()(Moment(7, None, math.inf)) and not policies.first()(Moment(7, 3, math.inf))
    moments = [Moment(1, 0, s, busy=busy) for s in (0.0, 5.0) for busy in (False, True)]
    assert [policies.idle()(m) for m in moments] == [True, False, True, False]
    assert [policies.idle(5)(m) for m in moments] == [False, False, True, False]


@pytest.mark.parametrize("make", [policies.every, policies.newest, policies.multiples])
def test_nonsense(make: object) -> None:
    with pytest.raises(ManagerError, match="at least 1, got 0"):
        make(0)  # type: ignore[operator]
    with pytest.raises(FastckptError, match="wanted int, got str '3'"):
        make("3")  # type: ignore[operator]
    with pytest.raises(ManagerError, match="wanted min or max"):
        policies.best(1, "loss", "least")
