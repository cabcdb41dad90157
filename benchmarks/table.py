"""The markdown table of a run's JSON, on standard output or into files between their marks.

python benchmarks/table.py [--short] benchmarks/results/RUN.json [FILE.md ...]

--short: only rows that are compared with other software, or are no time, without how they were measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from measure import Row

FAULTS = {
    "kills": ("lost", "torn", "restart"),
    "crashes": ("lost", "torn", "restart"),
    "damage": ("missed", "wrong", "alarms"),
}
"""The parts of a reliability run, and what can be wrong at a point of each, in the table's order."""
MARKS = "<!-- figures -->", "<!-- end of figures -->"


def line(row: Row) -> str:
    """One row for a terminal."""
    below = f" | {row.floor} {_pair(row.floor_s)} s" if row.floor else ""
    own = f" | {_pair(row.subject_s)} s" if row.subject_s[0] else ""
    goal = f" (goal {row.goal}: {row.met})" if row.goal else ""
    return (
        f"{row.what} [{row.shape}]: {_number(row.best)} / {_number(row.median)} {row.unit}{goal}{own}{below}"
        f" | {row.rounds} rounds, {row.dropped} dropped, load {row.load:.1f}"
    )


def made_on(run: dict[str, object]) -> str:
    """The machine, the time and the commit in a sentence that its options end."""
    machine, commit = run["machine"], run["commit"]
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs ({machine['best_instructions']}), "
        f"{machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}, DeepSpeed {machine['deepspeed']}; {run['date']} UTC, "
        f"commit {str(commit['id'])[:10]}{' and uncommitted changes' if commit['dirty'] else ''}; "
    )


def reliability(run: dict[str, object]) -> str:
    """A run of reliability/run.py as markdown: a row a part."""
    options = run["options"]
    words = ", ".join(f"{name} {value}" for name, value in options.items())
    out = [
        f"{made_on(run)}{words}.",
        "",
        "| part | points | lost, or missed by verify | torn, or restored wrong "
        "| restarts that failed, or false alarms | not reached, not counted | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, faults in FAULTS.items():
        part = run.get(name)
        if part is None:
            continue
        groups = ", ".join(f"{n} of {group}" for group, n in part["by_group"].items())
        ended = "" if part["ended"] else "; stopped before its end"
        found = " | ".join(str(part[fault]) for fault in faults)
        out.append(
            f"| {name} | {part['points']} ({groups}){ended} | {found} | {part['not_reached']} "
            f"| {part['seconds'] / 60:.0f} |"
        )
    return "\n".join(out)


def table(run: dict[str, object], *, short: bool = False) -> str:
    """The run as markdown: the machine in a sentence, then a row a figure."""
    if "rows" not in run:
        return reliability(run)
    options = run["options"]
    rows = [Row(**{f.name: r[f.name] for f in fields(Row)}) for r in run["rows"] if r]
    out = [f"{made_on(run)}--size={options['size']}, {options['threads']} threads.", ""]
    return "\n".join(out + (_short(rows) if short else _whole(rows)))


def _short(rows: Sequence[Row]) -> list[str]:
    out = ["| what | input | best | median | unit | fastckpt | the other |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.short:
            took = f"{row.subject_s[0]:.3g} s | {row.floor_s[0]:.3g} s" if row.floor else " | "
            figure = f"{_number(row.best)} | {_number(row.median)} | {row.unit}"
            out.append(f"| {row.what} | {row.shape} | {figure} | {took} |")
    return out


def _whole(rows: Sequence[Row]) -> list[str]:
    out = [
        "| what | input | best | median | unit | goal | met | seconds (floor) | rounds (dropped) | load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        took = "" if not row.subject_s[0] else f"{row.subject_s[0]:.3g}"
        if row.floor:
            took += f" ({row.floor}: {row.floor_s[0]:.3g})"
        out.append(
            f"| {row.what} | {row.shape} | {_number(row.best)} | {_number(row.median)} | {row.unit} "
            f"| {row.goal} | {row.met} | {took} | {row.rounds} ({row.dropped}) | {row.load:.1f} |"
        )
    return out


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _pair(pair: tuple[float, float]) -> str:
    return f"{_number(pair[0])} / {_number(pair[1])}"


def main() -> int:
    names = [name for name in sys.argv[1:] if name != "--short"]
    runs = [name for name in names if name.endswith(".json")]
    short = len(names) < len(sys.argv) - 1
    made = "\n\n".join(table(json.loads(Path(name).read_text()), short=short) for name in runs)
    pages = [name for name in names if name not in runs]
    if not pages:
        print(made)
    for name in pages:
        head, rest = Path(name).read_text().split(MARKS[0])
        Path(name).write_text(f"{head}{MARKS[0]}\n{made}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
