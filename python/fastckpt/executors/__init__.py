"""Executors: whatever runs Copy rows between buffers.

Law: every executor gives the same bytes. Rows are trusted; bounds are checked when they are bound.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import DeviceError
from ..planning.copies import Executor
from .cpu import RECENT_BYTES, Cpu, built


def _cpu(recent_bytes: int) -> Executor:
    return Cpu(recent_bytes=recent_bytes)


def _torch(recent_bytes: int) -> Executor:
    from .torch import Torch

    return Torch()


EXECUTORS: dict[str, Callable[[int], Executor]] = {"cpu": _cpu, "torch": _torch}
"""Name -> maker, given `recent_bytes` as `pick` is; it raises DeviceError where its executor cannot run.
`cuda` is picked by the rooms whose buffers lie on a GPU."""


def pick(name: str | None = None, recent_bytes: int = RECENT_BYTES) -> Executor:
    """The executor of that name, or `cpu` where the compiled module is built and `torch` where it is not.

    `recent_bytes`: how much of mapped sources `cpu` keeps before it gives pages back; the others keep none.
    Raises DeviceError for an unknown name and for an executor that cannot run here."""
    if name is None:
        name = "cpu" if built() else "torch"
    make = EXECUTORS.get(name)
    if make is None:
        raise DeviceError(f"no executor {name!r}; known: {', '.join(EXECUTORS)}")
    return make(recent_bytes)
