"""What a part of the run found, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from program import Verdict


@dataclass(slots=True)
class Tally:
    """Points run; those with a lost commit, with a torn one that passed for good, with a restart that failed.

    `words`: each of these in words."""

    points: int = 0
    lost: int = 0
    torn: int = 0
    restart: int = 0
    by_world: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    words: list[str] = field(default_factory=list)

    def enter(self, point: str, world: str, kind: str, verdict: Verdict, restart: Sequence[str]) -> None:
        """Count a point."""
        self.points += 1
        self.by_world[world] += 1
        self.by_kind[kind] += 1
        self.lost += bool(verdict.lost)
        self.torn += bool(verdict.torn)
        self.restart += bool(restart)
        self.words += [f"{point}: {word}" for word in (*verdict.lost, *verdict.torn, *restart)]

    @property
    def good(self) -> bool:
        return self.points > 0 and not (self.lost or self.torn or self.restart)

    def json(self) -> dict[str, object]:
        """For the results."""
        return {
            "points": self.points, "lost": self.lost, "torn": self.torn, "restart": self.restart,
            "by_world": dict(self.by_world), "by_kind": dict(self.by_kind), "words": self.words[:100],
        }  # fmt: skip
