"""What the points of a part showed, one by one and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Outcome:
    """One point: where and how in words, what it counts under, and what was wrong, by the kind of fault.

    `reached` is false where the run ended before the point: such a point counts for nothing."""

    point: str
    group: str
    kind: str
    wrong: Mapping[str, Sequence[str]]
    reached: bool = True

    def line(self) -> bytes:
        """For a pipe."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def of(line: bytes) -> Outcome:
        """What `line` gave."""
        return Outcome(**json.loads(line))


@dataclass(slots=True)
class Tally:
    """Points by their group and kind, those with each kind of fault, and the faults in words."""

    faults: tuple[str, ...]
    points: int = 0
    not_reached: int = 0
    by_group: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    words: list[str] = field(default_factory=list)

    def enter(self, outcome: Outcome) -> None:
        """Count a point; what is wrong counts also where the point was not reached."""
        if outcome.reached:
            self.points += 1
            self.by_group[outcome.group] += 1
            self.by_kind[outcome.kind] += 1
        else:
            self.not_reached += 1
        for fault, words in outcome.wrong.items():
            self.found[fault] += bool(words)
            self.words += [f"{outcome.point}: {fault}: {word}" for word in words]

    @property
    def good(self) -> bool:
        return self.points > 0 and not self.words

    def json(self) -> dict[str, object]:
        """For the results."""
        return {
            "points": self.points, **{f: self.found[f] for f in self.faults}, "by_group": dict(self.by_group),
            "by_kind": dict(sorted(self.by_kind.items())), "not_reached": self.not_reached,
            "good": self.good, "words": self.words[:100],
        }  # fmt: skip
