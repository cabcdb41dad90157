"""Pauses Python's cycle collector while many long-lived objects are made.

Opening and planning make millions of small objects and no cycles; without a pause the collector walks all
of them again and again, for about half of the time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_pauses: set[object] = set()
"""Those of all threads that are to end with the collector on."""


@contextmanager
def paused() -> Iterator[None]:
    """No collection inside; as it was before, after. A process forked inside collects."""
    was, this = gc.isenabled(), object()
    if was:
        _pauses.add(this)
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
            _pauses.discard(this)


def _forked() -> None:
    """The threads that paused stayed with the parent, so nobody would end their pauses here."""
    if _pauses:
        _pauses.clear()
        gc.enable()


os.register_at_fork(after_in_child=_forked)
