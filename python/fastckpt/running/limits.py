"""What a run may hold at once: its threads, and the bytes of their staging.

Law: a run holds at most FIXED_MEMORY and its threads' staging, or what `memory` says.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..digest import LEAF
from ..errors import WriteError
from ..executors.cpu import RECENT_BYTES
from ..output.files import parse_size
from ..pipeline import cores

STAGE = 2 * LEAF
"""Output bytes made at once: smaller ones cost steps, larger ones leave the cache."""

BAND = 8 * LEAF
"""Output bytes made at once of a tensor that is transposed on the way."""

MOST_THREADS = 1 << 10
"""More are a slip of the pen, and would take minutes to start."""

FIXED_MEMORY = 64 << 20
"""What a run may hold besides its threads' staging: the promise of docs/architecture.md."""

ENTRY = 200
"""Bytes of mapped sources that give way to the names, places and rows of one tensor."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The `threads` of a run and the `band` of each in bytes.

    `spare`: the bytes that `memory` leaves for all bands, None where it was not given."""

    threads: int
    band: int
    spare: int | None = None

    @staticmethod
    def of(threads: int | None, memory: str | int | None) -> Limits:
        """The limits asked for. Raises WriteError for too many threads or too little memory."""
        count = workers(threads)
        if memory is None:
            return Limits(count, band(count))
        budget = parse_size(memory, "memory")
        spare = budget - FIXED_MEMORY
        if spare < 2 * LEAF:
            raise WriteError(
                f"memory {memory!r}: {budget} bytes are too few, "
                f"a run needs at least {FIXED_MEMORY + 2 * LEAF}"
            )
        count = max(1, min(count, spare // (2 * LEAF)))
        return Limits(count, max(LEAF, min(BAND, spare // count // LEAF // 2 * LEAF)), spare)

    def fitting(self, need: int) -> int:
        """As many threads as `memory` holds `need` bytes for, each. Raises WriteError where it holds none."""
        if self.spare is None or not need:
            return self.threads
        if self.spare < need:
            raise WriteError(
                f"memory: a band of blocks to quantise takes {need} bytes above {FIXED_MEMORY}, "
                f"got {self.spare}"
            )
        return min(self.threads, self.spare // need)


def band(threads: int) -> int:
    """The band of each of so many threads: together at most 4 MiB a thread and 16 MiB of the fixed part."""
    return min(BAND, (16 + 4 * threads) // threads * LEAF)


def recent(tensors: int) -> int:
    """Bytes of mapped sources to keep: less where the names of very many tensors take their place."""
    return max(RECENT_BYTES // 4, RECENT_BYTES - ENTRY * tensors)


def workers(asked: int | None) -> int:
    """The threads of a run: those asked for, else one a core that this process may use. Raises WriteError."""
    if asked is None:
        return cores()
    if not 1 <= asked <= MOST_THREADS:
        raise WriteError(f"threads: wanted 1 to {MOST_THREADS}, got {asked}")
    return asked
