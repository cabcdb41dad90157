"""Rows cut into tiles for a GPU: which path each row takes, and which row each block works on.

Law: the tiles of a row cover it exactly; a count here is the count of `tiles_of` in csrc/tiles_cuda.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES
from .errors import ViewError
from .planning.axes import classify
from .planning.copies import GENERAL, NOTHING, ROWS, TRANSPOSE, Ints, Table, item_sizes

THREADS = 256
FLIGHT = 64
STEPS = 2
WORDS = 32
GENERAL_TILE = THREADS * 8
"""The constants of csrc/tiles_cuda.h."""

LEAST = 16
"""A transpose with a shorter side goes the general way."""
SHORT = 32
"""Bytes of the narrower side under which a line among several goes the general way."""
MOST = (1 << 31) - 1
"""Lines of a row, and tiles of a path."""

_FAST = np.array([d.name in ("float32", "bfloat16", "float16") for d in DTYPES])
_FAST_TO = np.array([d.name in ("float32", "bfloat16", "float16", "float8_e4m3fn") for d in DTYPES])
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
    count = counts(rows)
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
    fast = same | (_FAST[rows["src_dtype"]] & _FAST_TO[rows["dst_dtype"]])
    shape = rows["shape"]
    short = (shape[:, :-1].max(axis=1, initial=1) > 1) & (shape[:, -1] * np.minimum(s, d) < SHORT)
    turned = rows["path"] == TRANSPOSE
    small = (shape[:, -1] < LEAST) | (shape[:, -2] < LEAST) | (np.maximum(s, d) > 4)
    rows["path"][~fast | (turned & small) | ((rows["path"] == ROWS) & short)] = GENERAL


def counts(rows: Table) -> Ints:
    """The tiles of each row, whose path is chosen."""
    zero = rows["src_buffer"] == NOTHING
    same = (rows["src_dtype"] == rows["dst_dtype"]) | zero
    s, d = item_sizes(rows["src_dtype"]), item_sizes(rows["dst_dtype"])
    shape = rows["shape"].astype(np.int64)
    planes = shape[:, 0] * shape[:, 1]
    lines = planes * shape[:, 2]
    general = _up(lines * shape[:, 3], GENERAL_TILE)

    # Lines: equal types are bytes.
    length = shape[:, 3] * np.where(same, d, 1)
    narrow, wide = np.where(same, 1, np.minimum(s, d)), np.where(same, 1, np.maximum(s, d))
    unit = 16 // narrow
    into = np.where(same, 1, d)
    dst = rows["dst"].astype(np.int64)
    outer = np.where(shape[:, :-1] > 1, rows["dst_stride"][:, :-1], 0)
    steady = (outer % _BASE == 0).all(axis=1)
    head = np.where(steady, dst % _BASE // into, 16 // into - 1)
    per_tile = THREADS * STEPS * np.maximum(1, FLIGHT // (unit * wide))
    in_rows = _up(lines * _up(length + head, unit), per_tile)

    # Sheets of WORDS words by columns.
    src = rows["src"].astype(np.int64)
    dst_steady = (rows["dst_stride"][:, :-1] % _BASE == 0).all(axis=1) & (dst % d == 0)
    src_steady = (rows["src_stride"][:, [0, 1, 3]] % _BASE == 0).all(axis=1) & (src % s == 0)
    row_head = np.where(dst_steady, dst % _BASE // d, 0)
    column_head = np.where(src_steady, src % _BASE // s, 0)
    high = _up(shape[:, 3] + row_head, WORDS * 4 // np.minimum(d, 4))
    across = _up(shape[:, 2] + column_head, np.minimum(128, 128 * d // s))
    in_sheets = planes * high * across
    made = np.select([rows["path"] == ROWS, rows["path"] == TRANSPOSE], [in_rows, in_sheets], general)
    return np.where(lines * shape[:, 3] == 0, 0, made)


def _up(a: Ints, b: Ints | int) -> Ints:
    return -(-a // b)
