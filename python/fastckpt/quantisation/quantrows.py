"""Matrices as a GPU quantises them: rows of a table, cut into tiles.

Law: the tiles of a row cover it exactly; a count here is that of `quant_tiles_of` (csrc/quant_place_cuda.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType, float16
from ..errors import ViewError
from .rounding import KINDS
from .schemes import Scheme

QUANT_ROWS = np.dtype(
    [
        *((name, "<u8") for name in ("src", "out", "scales", "zeros", "amax", "bad")),
        ("pitch", "<i8"),
        ("first_tile", "<u8"),
        *((name, "<u4") for name in ("rows", "columns", "first", "share", "group", "width")),
        *((name, "<f4") for name in ("reach", "floor", "lowest")),
        *((name, "u1") for name in ("dtype", "kind", "flags", "reserved")),
    ]
)
"""`struct QuantRows` of csrc/copy_cuda.h, field by field."""

RECIPROCAL, HALF, ZERO, SQUARE, LARGEST, POWER = 1, 2, 4, 8, 16, 32
"""Bits of `flags`."""

THREADS = 256
PATCH = 8
PATCHES = THREADS * PATCH
"""The constants of csrc/quant_place_cuda.h: a thread's piece is PATCH values, a tile PATCHES pieces."""

SIDE = 128
"""Of a square block."""

MOST = (1 << 31) - 1
"""Tiles of a table, rows and columns of a matrix."""

Part = tuple[int | float, ...]
"""A row of QUANT_ROWS."""


@dataclass(frozen=True, slots=True)
class There:
    """A matrix in device memory: where what it becomes lies (addresses, 0 for what there is not).

    `rows`, `columns`: of the whole, a stack as one; `tall`: rows of one matrix of it. `amax`: the words that
    hold the largest magnitude of each row, or of each matrix where that shares a scale."""

    scheme: Scheme
    dtype: DType
    rows: int
    columns: int
    tall: int
    out: int = 0
    scales: int = 0
    zeros: int = 0
    amax: int = 0
    bad: int = 0

    @property
    def unit(self) -> int:
        """Rows that are quantised together: a band of them begins on a multiple of so many."""
        return max(PATCH, self.scheme.block[0])

    def part(self, first: int, count: int, src: int, pitch: int, *, largest: bool = False) -> Part:
        """Rows [first, first + count), which begin at `src`, as a row of QUANT_ROWS; `largest`: they are only
        looked through for `amax`."""
        s, (down, across) = self.scheme, self.scheme.block
        flags = s.reciprocal * RECIPROCAL | (s.scale_dtype is float16) * HALF | s.asymmetric * ZERO
        flags |= s.microscaled * POWER
        kind, group, share, width = KINDS[s.dtype.name + s.packed], 0, 1, 0
        if largest or (not s.packed and not across):  # whole rows, about PATCH pieces a thread
            width = _side_by_side(-(-self.columns // PATCH // PATCH))
            share = down or self.tall
        if largest:
            kind, flags = 0, LARGEST
        elif s.packed == "across" or s.microscaled:
            group, width = _log(across), _side_by_side(-(-self.columns // PATCH))
        elif s.packed:
            group, width = _log(down), _log(PATCHES // down)
        elif across:
            flags, share, width = flags | SQUARE, SIDE, _log(PATCHES // SIDE)
        return (
            src, self.out, self.scales, self.zeros, self.amax, self.bad, pitch, 0,
            count, self.columns, first, share, group, width,
            s.reach, s.floor, -s.zero_offset, self.dtype.code, kind, flags, 0,
        )  # fmt: skip


def covered(scheme: Scheme) -> bool:
    """Whether the kernel has this scheme: those of `schemes.SCHEMES`, not every one that could be made."""
    blocks = {"": ((0, 0), (1, 0), (SIDE, SIDE)), "across": ((1, 32), (1, 64), (1, 128))}
    if scheme.microscaled:
        return scheme.block == (1, 32)
    return scheme.block in blocks.get(scheme.packed, ((32, 1), (64, 1), (128, 1)))


def tiled(parts: Sequence[Part]) -> tuple[NDArray[np.void], NDArray[np.uint32], NDArray[np.int64]]:
    """The table of some parts, the row of each tile, and where each part's tiles begin, all of them last.

    Raises ViewError beyond what a kernel counts."""
    table = np.array(list(parts), QUANT_ROWS)
    count = counts(table)
    borders = np.concatenate([[0], np.cumsum(count)])
    rows = int((table["first"].astype(np.int64) + table["rows"]).max(initial=0))
    columns, tiles = int(table["columns"].max(initial=0)), int(borders[-1])
    if max(rows, columns, tiles) > MOST:
        raise ViewError(f"quantise: {rows} rows or {columns} columns, {tiles} tiles; at most {MOST} of each")
    table["first_tile"] = borders[:-1]
    return table, np.repeat(np.arange(len(table), dtype=np.uint32), count), borders


def counts(table: NDArray[np.void]) -> NDArray[np.int64]:
    """The tiles of each row."""
    rows, columns, width = (table[name].astype(np.int64) for name in ("rows", "columns", "width"))
    line = (table["kind"] < KINDS["int32across"]) & (table["flags"] & (SQUARE | POWER) == 0)
    high = np.where(line, THREADS >> width, PATCHES >> width)
    across = np.where(line, 1, -(-columns // (PATCH << width)))
    return np.asarray(-(-rows // high) * across)


def _side_by_side(wanted: int) -> int:
    """The logarithm of the threads of a row: a power of two, sixteen at least and all at most."""
    return min(_log(THREADS), max(4, (wanted - 1).bit_length()))


def _log(power: int) -> int:
    return power.bit_length() - 1
