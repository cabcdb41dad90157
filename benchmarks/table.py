"""The markdown table of a run's JSON, on standard output or into files between their marks.

python benchmarks/table.py [--short] benchmarks/results/RUN.json [... FILE.md ...]

--short: of all runs together, every row that is compared with other software and the peaks of memory, and how
many goals are met.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
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


def machine_of(run: dict[str, object]) -> str:
    machine = run["machine"]
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs ({machine['best_instructions']}), "
        f"{machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}, DeepSpeed {machine['deepspeed']}"
    )


def commit_of(run: dict[str, object]) -> str:
    commit = run["commit"]
    return f"commit {str(commit['id'])[:10]}{' and uncommitted changes' if commit['dirty'] else ''}"


def made_on(run: dict[str, object]) -> str:
    """The machine, the time and the commit in a sentence that its options end."""
    return f"{machine_of(run)}; {run['date']} UTC, {commit_of(run)}; "


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


def rows_of(run: dict[str, object]) -> list[Row]:
    return [Row(**{f.name: r[f.name] for f in fields(Row)}) for r in run.get("rows", ()) if r]


def table(run: dict[str, object]) -> str:
    """The run as markdown: the machine in a sentence, then a row a figure."""
    if "rows" not in run:
        return reliability(run)
    options = run["options"]
    out = [f"{made_on(run)}--size={options['size']}, {options['threads']} threads.", ""]
    return "\n".join(out + _whole(rows_of(run)))


def short(runs: Sequence[dict[str, object]]) -> str:
    """All runs in two tables for who knows no floors, a pair for each machine."""
    return "\n\n".join(
        _short(machine, [run for run in runs if rows_of(run) and machine_of(run) == machine])
        for machine in dict.fromkeys(machine_of(run) for run in runs if rows_of(run))
    )


def _short(machine: str, runs: Sequence[dict[str, object]]) -> str:
    rows = sorted((row for run in runs for row in rows_of(run)), key=lambda row: ": " not in row.shape)
    peers, prints = [r for r in rows if r.peer], [r for r in rows if r.footprint]
    made = ", ".join(dict.fromkeys(f"{str(run['date'])[:10]} ({commit_of(run)})" for run in runs))
    inputs = "; ".join(dict.fromkeys(row.shape for row in (*peers, *prints) if ": " in row.shape))
    out = [
        f"{machine}; {made}. {inputs}.",
        "",
        "| against other software | input | best | median | rounds |",
        "|---|---|---|---|---|",
    ]
    for row in peers:
        counted = f"{row.rounds} of {row.rounds + row.dropped}" if row.dropped else f"{row.rounds}"
        out.append(
            f"| {row.what} | {_name(row.shape)} | {_number(row.best)} {row.unit} | {_number(row.median)} "
            f"| {counted} |"
        )
    if prints:
        out += ["", *_footprints(prints)]
    if judged := Counter(row.met for row in rows if row.goal):
        out += [
            "",
            f"Of {judged.total()} goals {judged['yes']} are met, {judged['best']} more by the best round "
            f"alone, and {judged['no']} are missed.",
        ]
    return "\n".join(out)


def _footprints(prints: Sequence[Row]) -> list[str]:
    """Memory and bytes read: a row for each kind of run, a column for each figure."""
    kinds = dict.fromkeys((row.what.partition(": ")[0], row.shape) for row in prints)
    columns = dict.fromkeys((row.what.partition(": ")[2], row.unit) for row in prints)
    found = {tuple(row.what.split(": ", 1)): f"{_number(row.best)} / {_number(row.median)}" for row in prints}
    out = [
        f"| best / median of a run | input | {' | '.join(f'{what}, {unit}' for what, unit in columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for kind, shape in kinds:
        cells = " | ".join(found.get((kind, what), "") for what, _ in columns)
        out.append(f"| {kind} | {_name(shape)} | {cells} |")
    return out


def _name(shape: str) -> str:
    return shape.partition(": ")[0]


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
    runs = [json.loads(Path(name).read_text()) for name in names if name.endswith(".json")]
    made = short(runs) if len(names) < len(sys.argv) - 1 else "\n\n".join(table(run) for run in runs)
    pages = [name for name in names if not name.endswith(".json")]
    if not pages:
        print(made)
    for name in pages:
        head, rest = Path(name).read_text().split(MARKS[0])
        Path(name).write_text(f"{head}{MARKS[0]}\n{made}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
