"""The `cpu` executor: Copy rows on threads of the compiled module.

Law: bytes equal to the torch executor's. Pages of mapped sources are given back behind the copies, and a
mapped file that shrank while it was read is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError, SourceError
from ..extents import Buffer
from ..native import _C
from ..planning.copies import Table

RECENT_BYTES = 32 << 20
"""Bytes of mapped sources that a runner keeps, all its threads together; beyond, the older half goes back."""


def built() -> bool:
    """Whether the compiled module is there."""
    return _C is not None


class Cpu:
    """Runs rows with the compiled module; `isa` forces an instruction set ("portable", "avx2", "avx512").

    `recent_bytes`: how much of mapped sources a runner keeps before it gives pages back; 0 keeps all.
    Raises DeviceError when the module is not built or the machine lacks the instruction set."""

    name = "cpu"

    def __init__(self, isa: str | None = None, recent_bytes: int = RECENT_BYTES) -> None:
        if not built():
            raise DeviceError(
                "executor cpu: fastckpt._C is not built; install with a C++17 compiler, or use executor torch"
            )
        if isa is not None and isa not in _C.isas():
            raise DeviceError(f"executor cpu: no instruction set {isa!r} here; have {', '.join(_C.isas())}")
        self._isa = -1 if isa is None else _C.isas().index(isa)
        self._recent = recent_bytes

    def bind(self, sources: Sequence[Buffer]) -> CpuRunner:
        """A runner over these source buffers; a buffer owned by a `_C.Mapping` has its pages given back."""
        return CpuRunner(sources, self._isa, self._recent)


class CpuRunner:
    """`Cpu` with its sources; threads may share one."""

    def __init__(self, sources: Sequence[Buffer], isa: int, recent_bytes: int) -> None:
        self._sources = tuple(sources)
        self._addresses = _addresses(self._sources)
        mapped = [b.nbytes if isinstance(b.owner, _C.Mapping) else 0 for b in self._sources]
        self._recent = None
        if any(mapped) and recent_bytes:
            self._recent = _C.Recent(self._addresses, np.array(mapped, np.uint64), recent_bytes)
        self._faults = _C.faults()
        self._isa = isa

    def run(self, rows: Table, destinations: Sequence[Buffer], threads: int = 1) -> None:
        """Runs `rows` in order (in any order with `threads` > 1) into `destinations`.

        Raises DeviceError for rows of another layout, buffers of another device, and rows that name a
        buffer or a conversion that does not exist; SourceError when a page of a mapped source was not there,
        or could not be read."""
        _check_layout(rows.dtype)
        try:
            _C.copy_rows(
                np.ascontiguousarray(rows).view(np.uint8),
                self._addresses,
                _addresses(destinations),
                threads,
                self._isa,
                self._recent,
            )
        except ValueError as e:
            raise DeviceError(f"executor cpu: {e}") from None
        if _C.faults() != self._faults:
            for b in self._sources:
                if isinstance(b.owner, _C.Mapping) and b.owner.faulted:
                    raise SourceError(f"{b.owner.path}: shrank, or failed, while it was read")


def _addresses(buffers: Sequence[Buffer]) -> NDArray[np.uint64]:
    for b in buffers:
        if b.device != "cpu":
            raise DeviceError(f"executor cpu: wanted buffers in main memory, got one on {b.device}")
    return np.array([b.address for b in buffers], np.uint64)


_checked: list[np.dtype[np.void]] = []
"""The dtype of rows, once it was found right; numpy makes equal ones that are not the same object."""


def _check_layout(dtype: np.dtype[np.void]) -> None:
    """Raises DeviceError unless `dtype` is struct Copy field by field."""
    if _checked and dtype == _checked[0]:
        return
    got = [(name, of[1], of[0].itemsize) for name, of in dtype.fields.items()] if dtype.fields else []
    if got != _C.fields() or dtype.itemsize != _C.copy_bytes:
        raise DeviceError(f"executor cpu: got rows of {got}, csrc/copy.h wants {_C.fields()}; build it again")
    _checked.append(dtype)
