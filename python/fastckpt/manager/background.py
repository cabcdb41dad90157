"""One save at a time behind the training, in a thread of its own.

Law: no error is lost: it is raised by the next `wait`, or told in a warning where none comes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .reporting import CheckpointWarning


class Background:
    """What one manager does behind the training, in one process."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._flight: Future[None] | None = None
        self._unheard: weakref.finalize[..., Background] | None = None

    @property
    def in_flight(self) -> bool:
        """Whether something goes on, or ended and nobody waited for it yet."""
        return self._flight is not None

    @property
    def busy(self) -> bool:
        """Whether something goes on."""
        return self._flight is not None and not self._flight.done()

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`; nothing else may be in flight. Where the system gives no thread, or Python ends, it
        is done when this returns."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "fastckpt-save")
        try:
            self._flight = self._thread.submit(work)
        except RuntimeError:
            self._thread = None  # which would take it up once it had a thread
            work()
        else:
            self._unheard = weakref.finalize(self, _warn_of_failure, self._flight)

    def wait(self) -> None:
        """Wait for what is in flight, if anything; its error is raised here."""
        if self._flight is None:
            return
        error = self._flight.exception()  # an interrupt ends the waiting, not the work
        self._flight = None
        if self._unheard is not None:
            self._unheard.detach()
        if error is not None:
            raise error

    def end(self) -> None:
        """Let the thread go."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def _warn_of_failure(flight: Future[None]) -> None:
    """Say what went wrong where the manager goes, or Python ends, and nobody asked."""
    if flight.done() and (error := flight.exception()) is not None:
        warnings.warn(f"in the background: {error}", CheckpointWarning, stacklevel=1)
