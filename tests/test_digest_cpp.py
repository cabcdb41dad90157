"""The compiled digests against the xxhash package and zlib."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import xxhash

_C = pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

DATA = np.random.default_rng(1).integers(0, 256, (5 << 20) + 77, dtype=np.uint8).tobytes()
LENGTHS = [*range(5001), 65_535, 65_536, 1 << 20, (1 << 20) + 1, len(DATA)]


def test_digest64_and_crc32_of_every_length() -> None:
    for n in LENGTHS:
        part = DATA[n % 3 :][:n]
        assert _C.digest64(part) == xxhash.xxh3_64_intdigest(part), n
        assert _C.crc32(part) == zlib.crc32(part), n
        assert _C.crc32(part, 0x12345678) == zlib.crc32(part, 0x12345678), n


def test_leaf_digests() -> None:
    sizes = np.array([0, 1, 300, 1 << 20, 5000], np.int64)
    offsets = np.array([9, 0, 77, 12_345, 1], np.int64)
    out = np.zeros(5, np.uint64)
    _C.leaf_digests(DATA, offsets, sizes, out)
    assert out.tolist() == [
        xxhash.xxh3_64_intdigest(DATA[o : o + s]) for o, s in zip(offsets, sizes, strict=True)
    ]
    with pytest.raises(ValueError, match="outside a buffer"):
        _C.leaf_digests(DATA, offsets + len(DATA), sizes, out)
    with pytest.raises(ValueError, match="differ in length"):
        _C.leaf_digests(DATA, offsets[1:], sizes, out)


def test_crc32_combine() -> None:
    for n in (0, 1, 7, 64, 1000, 1 << 20, 3_000_001):
        a, b = DATA[:12_345], DATA[12_345:][:n]
        assert _C.crc32_combine(zlib.crc32(a), zlib.crc32(b), n) == zlib.crc32(a + b)
    zeros = 6 << 30  # more than 32 bits of length: the combination of six halves of a tail of zeros
    step = zlib.crc32(bytes(1 << 20))
    total, tail, length = zlib.crc32(DATA), step, 1 << 20
    while length < zeros:
        tail, length = _C.crc32_combine(tail, tail, length), 2 * length
    once = _C.crc32_combine(total, tail, length)
    half = 1 << 20
    piece = step
    by_parts = total
    while half < length:
        by_parts = _C.crc32_combine(by_parts, piece, half)
        piece, half = _C.crc32_combine(piece, piece, half), 2 * half
    assert _C.crc32_combine(by_parts, step, 1 << 20) == once
