"""Figures, lists and columns for people, as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..checkpoint import JSON


SHOWN = 20
"""Names of one kind that a list shows before it only counts."""

LONGEST = 400
"""Characters of a fact that are shown."""


def size(nbytes: int) -> str:
    """Bytes for people, in powers of 1000: "301 B", "1.23 GB"."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"


def harmless(text: str) -> str:
    """The text with control characters spelled out: names come from files, and terminals obey them."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def counted(n: int, noun: str) -> str:
    """A number and its noun: "1 file", "2 files"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def spelled(fact: JSON) -> str:
    """A JSON value in a line: lists with commas, yes and no."""
    if isinstance(fact, list):
        return ", ".join(spelled(v) for v in fact) or "none"
    if isinstance(fact, dict):
        return ", ".join(f"{k} {spelled(v)}" for k, v in fact.items()) or "none"
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return "none" if fact is None else str(fact)


def cut(line: str) -> str:
    """A line of at most LONGEST characters, and what it lacks."""
    more = len(line) - LONGEST
    return line if more <= 0 else f"{line[:LONGEST]} ... {counted(more, 'character')} more with --json"


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of cells as indented lines with aligned columns."""
    rows = list(rows)
    if not rows:
        return []
    widths = [max(len(r[k]) for r in rows if k < len(r)) for k in range(max(map(len, rows)))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=False)).rstrip() for r in rows]


def some(title: str, names: Sequence[str]) -> list[str]:
    """A title with a count and at most SHOWN names under it; nothing where there are none."""
    if not names:
        return []
    rest = [f"  ... {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{title} ({len(names)})", *(f"  {n}" for n in names[:SHOWN]), *rest]
