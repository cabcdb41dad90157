"""SIGTERM and SIGHUP end a run as Ctrl-C does: it unwinds and leaves nothing behind.

Law: only in the main thread, and only where the signal would kill the process anyway: whoever handles or
ignores it (a trainer, nohup) is left alone.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""What a scheduler, or a terminal that is closed, sends."""


class Endings:
    """What ends this run, from `heard` to `as_before`; `waiting` puts it off while the run cleans up."""

    def __init__(self) -> None:
        self._before: dict[int, object] = {}
        self._waited: list[int] = []

    def heard(self) -> None:
        """From here on SIGTERM and SIGHUP raise SystemExit(128 + number)."""
        if threading.current_thread() is threading.main_thread():
            for number in ENDINGS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._before[number] = signal.SIG_DFL
                    signal.signal(number, unwind)

    def waiting(self) -> None:
        """From here on these signals and Ctrl-C wait: a run that they ended must be able to clean up.

        One that is heard meanwhile is raised; called again, the rest wait too."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *ENDINGS):
                if (found := signal.getsignal(number)) in (unwind, signal.default_int_handler):
                    self._before.setdefault(number, found)
                    signal.signal(number, self._wait)

    def as_before(self) -> None:
        """Everything as it was; a signal that waited is heard now."""
        if threading.current_thread() is threading.main_thread():
            try:
                for number in [*self._before]:
                    signal.signal(number, self._before[number])  # type: ignore[arg-type]
                    del self._before[number]
            finally:
                if self._before:  # one was heard as soon as it was as before
                    self.as_before()
            if self._waited:
                signal.raise_signal(self._waited.pop())

    def _wait(self, number: int, frame: FrameType | None) -> None:
        self._waited.append(number)


def unwind(number: int, frame: FrameType | None) -> None:
    """A handler that leaves through every `finally` and `with`."""
    raise SystemExit(128 + number)
