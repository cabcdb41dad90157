"""The one digest of tensor bytes, that of plain values, and the CRC32 of torch's zip files.

Law: the digest of a run of bytes is xxh3-64 (seed 0) over the little-endian u64 xxh3-64 of its 1 MiB
leaves, so that threads and devices can take leaves apart and the result is the same everywhere.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from .native import _C

LEAF = 1 << 20
"""Bytes of a leaf; the last leaf of a tensor may be shorter."""

Bytes = bytes | bytearray | memoryview | NDArray[np.uint8]


def digest64(data: Bytes) -> int:
    """xxh3-64 with seed 0 of `data`."""
    return _C.digest64(data) if _C is not None else xxhash.xxh3_64_intdigest(data)


def leaf_digests(data: Bytes, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """xxh3-64 of each run [offset, offset + size) of `data`, in bytes: one u64 a run."""
    out = np.empty(len(offsets), np.uint64)
    if _C is not None:
        _C.leaf_digests(data, offsets, sizes, out)
        return out
    view = memoryview(data)
    for k, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        out[k] = xxhash.xxh3_64_intdigest(view[offset : offset + size])
    return out


def combine(leaves: NDArray[np.uint64]) -> str:
    """The digest of a tensor from those of its leaves, in order: 16 hex digits."""
    return f"{digest64(leaves.astype('<u8').tobytes()):016x}"


def combined(leaves: NDArray[np.uint64], counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The digests of many tensors, whose leaves follow one another: the number of each is in `counts`."""
    told = leaves.astype("<u8").view(np.uint8)
    return leaf_digests(told, 8 * (np.cumsum(counts) - counts), 8 * counts)


def digest(data: Bytes) -> str:
    """The digest of bytes at hand: 16 hex digits."""
    offsets = np.arange(0, len(data), LEAF, dtype=np.int64)
    return combine(leaf_digests(data, offsets, np.minimum(len(data) - offsets, LEAF)))


def values_digest(values: object) -> str:
    """xxh3-128 of plain values, as JSON has them with keys in order: 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


class Digesting:
    """The digest of bytes that come in pieces of any size: `add` each, in order."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._leaves: list[int] = []
        self._rest = bytearray()

    @staticmethod
    def of(pieces: Iterable[bytes]) -> Digesting:
        """All of these, one after another."""
        made = Digesting()
        for piece in pieces:
            made.add(piece)
        return made

    def add(self, piece: bytes | bytearray) -> None:
        """Take the bytes that come next."""
        self.nbytes += len(piece)
        if not self._rest and len(piece) == LEAF:
            self._leaves.append(digest64(piece))
            return
        self._rest += piece
        while len(self._rest) >= LEAF:
            self._leaves.append(digest64(self._rest[:LEAF]))
            del self._rest[:LEAF]

    def digest(self) -> str:
        """The digest of all that was added: 16 hex digits."""
        rest = [digest64(self._rest)] if self._rest else []
        return combine(np.array([*self._leaves, *rest], np.uint64))


def crc32(data: Bytes, value: int = 0) -> int:
    """CRC32 (zlib's) of `data`, continuing from `value`."""
    return _C.crc32(data, value) if _C is not None else zlib.crc32(data, value)


def crc32_combine(a: int, b: int, nbytes_b: int) -> int:
    """The CRC32 of two runs one after another from their CRC32s; `nbytes_b`: the bytes of the second.

    a * x^(8 n) mod P, added to b: multiplication of bit-reversed polynomials, as zlib's crc32_combine."""
    if _C is not None:
        return _C.crc32_combine(a, b, nbytes_b)
    return _multiply(_power(nbytes_b), a) ^ b


@lru_cache(256)  # most runs are whole leaves
def _power(nbytes: int) -> int:
    """x^(8 nbytes) modulo the CRC32 polynomial, bit-reversed: the highest bit is x^0."""
    power, square = 1 << 31, 1 << 23
    while nbytes:
        if nbytes & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        nbytes >>= 1
    return power


def _multiply(a: int, b: int) -> int:
    """a * b modulo the CRC32 polynomial, both bit-reversed."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product
