"""Rows cut into tiles for a GPU: which path each row takes, and which row each block works on.

Law: the tiles of a row cover it exactly; how many there are, csrc/tiles_cuda.h says alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import ViewError
from ..native import _C
from ..planning.axes import classify
from ..planning.copies import GENERAL, NOTHING, ROWS, TRANSPOSE, Table, item_sizes

LEAST = 16, 8
"""A transpose with fewer lines goes the general way, and one with shorter ones."""
SHORT = 32
"""Bytes of the narrower side under which a line among several goes the general way."""
MOST = (1 << 31) - 1
"""Lines of a row, and tiles of a path."""

_WIDE = ("float32", "bfloat16", "float16")
_FAST = np.array(
    [
        [
            s.name in _WIDE and (d.name in _WIDE or (d.name == "float8_e4m3fn" and s.name != "float16"))
            for d in DTYPES
        ]
        for s in DTYPES
    ]
)
"""By source and destination: the casts of csrc/tiles_cuda.h; others go the general way."""
_BASE = 16
"""Buffers begin on multiples of this for the kernels; a remainder goes into the rows."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows as a GPU runs them: by path, `first_tile` filled, offsets from `sources` and `destinations`.

    `owner[i]` is the row of tile i; the tiles of path p are [borders[p], borders[p + 1])."""

    rows: Table
    owner: NDArray[np.uint32]
    borders: tuple[int, int, int, int]
    sources: NDArray[np.uint64]
    destinations: NDArray[np.uint64]


def tile(rows: Table, sources: NDArray[np.uint64], destinations: NDArray[np.uint64]) -> Tiles:
    """The tiles of bound rows over buffers at these addresses.

    Raises ViewError for a row or a table beyond what a kernel counts."""
    rows = rows[rows["shape"].all(axis=1)]
    if len(rows):
        zero = rows["src_buffer"] == NOTHING
        at = np.where(zero, 0, rows["src_buffer"])
        off = (sources % _BASE)[at] if len(sources) else np.zeros(len(rows), np.uint64)
        rows["src"] += np.where(zero, np.uint64(0), off)
        rows["dst"] += (destinations % _BASE)[rows["dst_buffer"]]
    _choose(rows)
    rows = rows[np.argsort(rows["path"], kind="stable")]
    made = np.zeros(len(rows), np.uint64)
    _C.tiles_of_rows(rows.view(np.uint8), made)
    count = made.view(np.int64)
    lines = rows["shape"][:, :-1].astype(np.float64).prod(axis=1)
    per_path = np.bincount(rows["path"], weights=count, minlength=3)
    if (lines > MOST).any() or (per_path > MOST).any():
        raise ViewError(
            f"tiles: a row of {lines.max():.0f} lines, a path of {per_path.max():.0f} tiles; at most {MOST}"
        )
    ends = np.cumsum(count)
    rows["first_tile"] = ends - count
    owner = np.repeat(np.arange(len(rows), dtype=np.uint32), count)
    borders = np.concatenate([[0], np.cumsum(per_path)]).astype(np.int64).tolist()
    base = np.uint64(_BASE - 1)
    bases = sources & ~base, destinations & ~base
    return Tiles(rows, owner, (borders[0], borders[1], borders[2], borders[3]), *bases)


def _choose(rows: Table) -> None:
    """Name each row's path as the kernels have it."""
    classify(rows)
    same = (rows["src_dtype"] == rows["dst_dtype"]) | (rows["src_buffer"] == NOTHING)
    s, d = item_sizes(rows["src_dtype"]), item_sizes(rows["dst_dtype"])
    fast = same | _FAST[rows["src_dtype"], rows["dst_dtype"]]
    shape = rows["shape"]
    short = (shape[:, :-1].max(axis=1, initial=1) > 1) & (shape[:, -1] * np.minimum(s, d) < SHORT)
    turned = rows["path"] == TRANSPOSE
    small = (shape[:, -2:] < LEAST).any(axis=1) | (np.maximum(s, d) > 4)
    rows["path"][~fast | (turned & small) | ((rows["path"] == ROWS) & short)] = GENERAL
