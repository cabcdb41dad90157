"""What a command prints: its result, and its progress as a bar on a terminal or JSON lines for machines.

Law: progress goes to stderr; stdout belongs to the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import WriteError
from .text import harmless

if TYPE_CHECKING:
    from ..checkpoint import JSON
    from ..running.runs import Progress

INTERVAL = 0.2
"""Seconds between two JSON lines of one phase."""


def show(args: argparse.Namespace, text: Callable[[], str], as_json: Callable[[], JSON]) -> None:
    """Print a result as `--json` and `--quiet` ask. Raises WriteError where standard output takes none."""
    if args.quiet and not args.json:
        return
    told = json.dumps(as_json(), indent=2) if args.json else harmless(text())
    try:
        print(told, flush=True)
    except BrokenPipeError:  # no fault of ours, nor the user's
        raise
    except OSError as e:
        raise WriteError(f"standard output: {e.strerror}") from None


@contextmanager
def progress(*, as_json: bool, quiet: bool) -> Iterator[Progress | None]:
    """What to hand a run as `progress` (bytes done, bytes in all, phase); None where nothing is shown."""
    if quiet:
        yield None
    elif as_json:
        yield _Lines().show
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield None


class _Lines:
    """Progress as JSON lines: the first and the last of a phase, and one each INTERVAL between."""

    def __init__(self) -> None:
        self._phase = ""
        self._said = 0.0

    def show(self, done: int, total: int, phase: str) -> None:
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._said < INTERVAL:
            return
        self._phase, self._said = phase, now
        print(json.dumps({"phase": phase, "done": done, "total": total}), file=sys.stderr, flush=True)


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar a phase, with bytes and their rate."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    tasks: dict[str, TaskID] = {}
    named, bar = TextColumn("{task.description:>7}"), BarColumn()
    figures = DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(named, bar, *figures, console=Console(stderr=True)) as bars:

        def show(done: int, total: int, phase: str) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show
