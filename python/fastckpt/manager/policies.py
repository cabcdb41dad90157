"""When to save and what to keep, as small functions that can be put together.

Law: a keeping policy only names steps to keep; the newest whole commit is kept whatever it says, and
nothing is removed before a newer commit stands.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..errors import ManagerError, expect
from .commits import Commit


@dataclass(frozen=True, slots=True)
class Moment:
    """When a save is asked for: the step, the newest commit's step (None: none yet), seconds since this
    manager's last save (infinite: none yet), whether the job was told to end (SIGTERM), and whether a save
    goes on in the background."""

    step: int
    last: int | None
    seconds: float
    preempted: bool = False
    busy: bool = False


When = Callable[[Moment], bool]
"""Whether to save at a moment."""

Keep = Callable[[Sequence[Commit]], set[int]]
"""Which steps to keep of the commits that stand, oldest first."""


# ---- when to save ----


def every(n: int) -> When:
    """At steps that `n` divides."""
    positive("save interval", n)
    return lambda m: m.step % n == 0


def on_steps(steps: Collection[int]) -> When:
    """At these steps."""
    wanted = frozenset(steps)
    return lambda m: m.step in wanted


def every_seconds(seconds: float) -> When:
    """When this long has passed since the last save."""
    _seconds("save_seconds", seconds)
    return lambda m: m.seconds >= seconds


def first() -> When:
    """Where nothing stands yet."""
    return lambda m: m.last is None


def idle(seconds: float = 0.0) -> When:
    """As often as the disk can follow: when no save goes on and this long has passed since the last."""
    _seconds("idle", seconds)
    return lambda m: not m.busy and m.seconds >= seconds


def when_any(*policies: When) -> When:
    """When one of them says so."""
    return lambda m: any(p(m) for p in policies)


def when_asked(interval: int, steps: Collection[int], seconds: float | None, when: When | None) -> When:
    """One policy of a manager's arguments: what one of them says, every step where none does. Raises
    FastckptError for an argument of another type."""
    expect("save_interval", interval, int)
    expect("save_on_steps", steps, Collection)
    expect("save_seconds", seconds, int, float, type(None))
    chosen = [] if when is None else [when]
    if seconds is not None:
        chosen.append(every_seconds(seconds))
    if steps:
        chosen.append(on_steps(steps))
    if interval != 1 or not chosen:
        chosen.append(every(interval))
    return when_any(*chosen)


# ---- what to keep ----


def newest(n: int) -> Keep:
    """The last `n`."""
    positive("max_to_keep", n)
    return lambda commits: {c.step for c in commits[-n:]}


def multiples(n: int) -> Keep:
    """Steps that `n` divides."""
    positive("keep_period", n)
    return lambda commits: {c.step for c in commits if c.step % n == 0}


def these(steps: Collection[int]) -> Keep:
    """These steps."""
    wanted = frozenset(steps)
    return lambda commits: {c.step for c in commits} & wanted


def spaced(seconds: float) -> Keep:
    """Commits at least this far apart in time, from the oldest step on; a clock that was set back does not
    make them all too close."""
    _seconds("keep_seconds", seconds)

    def keep(commits: Sequence[Commit]) -> set[int]:
        out: set[int] = set()
        last = float("-inf")
        for c in commits:
            if abs(c.created - last) >= seconds:
                out.add(c.step)
                last = c.created
        return out

    return keep


def best(n: int, metric: str, mode: str = "min", *, without: bool = False) -> Keep:
    """The `n` best by a metric, the newer of equals; `without`: also commits that lack it. NaN is worst."""
    positive("keep_best", n)
    order = ranking(metric, mode)

    def keep(commits: Sequence[Commit]) -> set[int]:
        lacking = {c.step for c in commits if metric not in c.metrics}
        return {c.step for c in order(commits)[:n]} | (lacking if without else set())

    return keep


def keep_any(*policies: Keep) -> Keep:
    """What one of them keeps."""
    return lambda commits: {s for p in policies for s in p(commits)}


def keep_asked(
    last: int | None,
    period: int | None,
    seconds: float | None,
    keep: Keep | None,
    *,
    keep_best: int | None,
    best_metric: str | None,
    best_mode: str,
    without: bool,
) -> Keep | None:
    """One policy of a manager's arguments: what one of them keeps; None keeps everything. Raises
    FastckptError for an argument of another type, ManagerError for a best of nothing."""
    for name, count in (("max_to_keep", last), ("keep_period", period), ("keep_best", keep_best)):
        expect(name, count, int, type(None))
    expect("keep_seconds", seconds, int, float, type(None))
    expect("best_metric", best_metric, str, type(None))
    expect("best_mode", best_mode, str)
    _require_mode(best_mode)
    expect("keep_without_metric", without, bool)
    chosen = [] if keep is None else [keep]
    if keep_best is not None:
        if best_metric is None:
            raise ManagerError("keep_best goes with best_metric (--metric): best by what?")
        chosen.append(best(keep_best, best_metric, best_mode, without=without))
    if last is not None:
        chosen.append(newest(last))
    if period is not None:
        chosen.append(multiples(period))
    if seconds is not None:
        chosen.append(spaced(seconds))
    return keep_any(*chosen) if chosen else None


def ranking(metric: str, mode: str) -> Callable[[Sequence[Commit]], list[Commit]]:
    """Commits that have a metric, best first, the newer of equals first; NaN last."""
    _require_mode(mode)
    sign = 1.0 if mode == "min" else -1.0

    def key(c: Commit) -> tuple[bool, float, int]:
        value = c.metrics[metric]
        unordered = value != value
        return unordered, 0.0 if unordered else sign * value, -c.step

    return lambda commits: sorted((c for c in commits if metric in c.metrics), key=key)


def _require_mode(mode: str) -> None:
    if mode not in ("min", "max"):
        raise ManagerError(f"mode {mode!r}: wanted min or max")


def _seconds(what: str, n: float) -> None:
    expect(what, n, int, float)
    if not n >= 0:  # NaN is none: nothing would ever be saved, or kept
        raise ManagerError(f"{what}: wanted seconds from 0 on, got {n}")


def positive(what: str, n: int) -> None:
    """Raises ManagerError for a number below 1, FastckptError for what is no number."""
    expect(what, n, int)
    if n < 1:
        raise ManagerError(f"{what}: wanted at least 1, got {n}")
