"""SIGTERM, by which a scheduler says that the job must end soon: heard, and left to the manager to act on.

Law: after `unheard` the process does again what it did before `listen`.
"""

from __future__ import annotations

import signal
from types import FrameType

from ..errors import ManagerError


class Sigterm:
    """`heard`: whether it came since `listen`."""

    def __init__(self) -> None:
        self.heard = False
        self._before: signal.Handlers | object | None = None
        self._deaf = False  # unheard, and still the handler

    def listen(self) -> None:
        """From here on it is noted, and does not end the process. Raises ManagerError in any thread but the
        main one."""
        try:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        except ValueError as e:
            raise ManagerError(f"save_on_signal: {e}") from None

    def unheard(self) -> None:
        """As before `listen`: at once in the main thread, else when it comes."""
        if self._before is None:
            return
        try:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]
            self._before = None
        except ValueError:
            self._deaf = True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        if self._deaf:
            signal.signal(number, self._before)  # type: ignore[arg-type]
            signal.raise_signal(number)
