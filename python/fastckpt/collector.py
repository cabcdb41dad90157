"""Pauses Python's cycle collector while many long-lived objects are made.

Opening and planning make millions of small objects and no cycles; without a pause the collector walks all
of them again and again, for about half of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No collection inside; as it was before, after."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
