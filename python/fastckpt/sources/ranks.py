"""The files of a run's ranks: each there once, none left over, and all of one save."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice

from ..errors import SourceError

SHOWN = 8
"""The most ranks that an error names."""


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts rank 10 after rank 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def check_ranks(files: Mapping[int, str], world: int, what: str, where: str) -> list[str]:
    """The files of ranks 0..world-1 in order; SourceError names what is missing or left over."""
    if missing := list(islice((r for r in range(world) if r not in files), SHOWN + 1)):
        count = world - sum(r < world for r in files)
        raise SourceError(
            f"{where}: {what} of {count} of {world} ranks missing: rank {_some(missing)}; "
            "not saved by that process, or left on another node's disk, which also= (--also) names"
        )
    if extra := sorted(r for r in files if r >= world):
        raise SourceError(
            f"{where}: {what} of rank {_some(extra)}, but the run had {world} ranks: "
            "left from a larger world, remove them"
        )
    return [files[r] for r in range(world)]


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:SHOWN])) + (", ..." if len(ranks) > SHOWN else "")


def check_one_save(where: str, told: Iterable[tuple[str, object, object]]) -> None:
    """Raises SourceError unless a rank says what the others say; `told`: what of, its word, theirs."""
    for what, got, wanted in told:
        if got != wanted:
            raise SourceError(f"{where}: {what} is {got!r:.120}, wanted {wanted!r:.120}: files of two saves")
