"""The rows of a plan's table: one strided copy each.

Rows live in one numpy array whose dtype IS `struct Copy` of `csrc/copy.h`. They hold offsets, never
addresses: a compiled row counts source bytes from the start of its extent and destination bytes from the
start of its tensor; `Binding.bind` moves the first to files and `batches` the second to batches. So compiled
rows are data that can be kept, hashed, sent away and bound again to files whose headers moved.

Law: the rows of a tensor write each of its bytes exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..extents import Buffer

Ints = NDArray[np.int64]

Table = NDArray[np.void]

AXES = 4
"""Axes of a Copy row."""

COPY = np.dtype(
    [
        ("src", "<u8"),
        ("dst", "<u8"),
        ("src_stride", "<i8", (AXES,)),
        ("dst_stride", "<i8", (AXES,)),
        ("shape", "<u4", (AXES,)),
        ("src_buffer", "<u4"),
        ("dst_buffer", "<u4"),
        ("first_tile", "<u8"),
        ("src_dtype", "u1"),
        ("dst_dtype", "u1"),
        ("path", "u1"),
        ("reserved", "u1", (13,)),
    ]
)
"""`struct Copy`, field by field (docs/formats.md)."""

WORDS = COPY.itemsize // 8
"""Words of eight bytes of a row."""

NOTHING = 0xFFFFFFFF
"""The source buffer of a row that writes zeros."""

LONGEST = (1 << 32) - 1
"""Elements of one axis of a Copy row."""

ROWS, TRANSPOSE, GENERAL = 0, 1, 2
"""Values of a row's `path`."""

_ITEM = np.array([d.itemsize for d in DTYPES], np.int64)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of `count` consecutive targets: `tensor` is each row's target, counted from the first.

    `src` counts from the start of extent `src_buffer`, `dst` from the start of the target."""

    count: int
    rows: Table
    tensor: Ints


@dataclass(frozen=True, slots=True)
class Kept:
    """A Chunk put away: of the 8-byte words of its rows only those that differ between rows.

    Rows of many small tensors agree in all but a few words, so they take a quarter of the place and less."""

    first: NDArray[np.uint64]
    which: NDArray[np.intp]
    words: NDArray[np.uint64]
    count: int
    tensor: NDArray[np.uint32]

    @staticmethod
    def of(chunk: Chunk) -> Kept:
        """The chunk put away."""
        words = np.ascontiguousarray(chunk.rows).view(np.uint64).reshape(-1, WORDS)
        first = words[0].copy() if len(words) else np.zeros(WORDS, np.uint64)
        which = np.flatnonzero((words != first).any(axis=0))
        return Kept(first, which, words[:, which], chunk.count, chunk.tensor.astype(np.uint32))

    def chunk(self) -> Chunk:
        """The chunk as it was."""
        words = np.empty((len(self.tensor), WORDS), np.uint64)
        words[:] = self.first
        words[:, self.which] = self.words
        return Chunk(self.count, words.reshape(-1).view(COPY), self.tensor.astype(np.int64))

    @property
    def nbytes(self) -> int:
        """The bytes it takes."""
        return self.words.nbytes + self.tensor.nbytes


def item_sizes(codes: Sequence[int] | NDArray[np.uint8] | Ints) -> Ints:
    """Bytes of an element of each dtype code."""
    return _ITEM[np.asarray(codes, np.int64)]


def nbytes(rows: Table, side: str) -> Ints:
    """The bytes each row moves on `side`; zero rows read none."""
    moved = rows["shape"].astype(np.int64).prod(axis=1) * _ITEM[rows[f"{side}_dtype"]]
    return np.where(rows["src_buffer"] == NOTHING, 0, moved) if side == "src" else moved


def span(rows: Table, side: str) -> tuple[Ints, Ints]:
    """The first and one past the last byte each row touches on `side` ("src" or "dst")."""
    item = _ITEM[rows[f"{side}_dtype"]]
    start = rows[side].astype(np.int64)
    reach = ((rows["shape"].astype(np.int64) - 1) * rows[f"{side}_stride"]).sum(axis=1)
    return start, start + reach + item


class Runner(Protocol):
    """An executor bound to its source buffers."""

    def run(self, rows: Table, destinations: Sequence[Buffer], threads: int = 1) -> None:
        """Run every row: `src_buffer` indexes the bound sources, `dst_buffer` the destinations."""


class Executor(Protocol):
    """Whatever runs rows: the reference in torch, threads in C++, a GPU."""

    @property
    def name(self) -> str:
        """Its name in `executors.EXECUTORS`."""

    def bind(self, sources: Sequence[Buffer]) -> Runner:
        """Fix the source buffers, so that running a batch converts none of them again."""
