"""The digest against its definition with the xxhash package; CRC combination against zlib."""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np
import pytest
import xxhash
from fastckpt import digest as d


def definition(data: bytes) -> str:
    leaves = [xxhash.xxh3_64_intdigest(data[k : k + (1 << 20)]) for k in range(0, len(data), 1 << 20)]
    return xxhash.xxh3_64_hexdigest(struct.pack(f"<{len(leaves)}Q", *leaves))


@pytest.fixture(params=["as built", "pure Python"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pure Python":
        monkeypatch.setattr(d, "_C", None)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("n", [0, 1, 17, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_digest_is_its_definition(n: int) -> None:
    data = random.Random(n).randbytes(n)
    assert d.digest(data) == definition(data)
    assert d.digest64(data) == xxhash.xxh3_64_intdigest(data)


def test_digest_of_nothing_is_a_constant() -> None:
    assert d.digest(b"") == "2d06800538d394c2"  # xxh3-64 of no bytes, from xxHash's own test vectors


@pytest.mark.usefixtures("_either")
def test_leaf_digests_take_any_runs() -> None:
    data = random.Random(0).randbytes(5000)
    offsets, sizes = np.array([0, 7, 4999, 100]), np.array([5000, 0, 1, 333])
    got = d.leaf_digests(data, offsets, sizes)
    assert got.tolist() == [
        xxhash.xxh3_64_intdigest(data[o : o + s]) for o, s in zip(offsets, sizes, strict=True)
    ]


@pytest.mark.usefixtures("_either")
def test_many_digests_are_those_of_each_alone() -> None:
    data = [random.Random(n).randbytes(n) for n in (5, 0, 0, (2 << 20) + 1, 1 << 20, 7)]
    pieces = [raw[k : k + (1 << 20)] for raw in data for k in range(0, len(raw), 1 << 20)]
    leaves = np.array([xxhash.xxh3_64_intdigest(piece) for piece in pieces], np.uint64)
    found = d.combined(leaves, np.array([1, 0, 0, 3, 1, 1]))
    assert [f"{n:016x}" for n in found.tolist()] == [definition(raw) for raw in data]


@pytest.mark.usefixtures("_either")
def test_crc_combines() -> None:
    rng = random.Random(1)
    for _ in range(50):
        a, b = rng.randbytes(rng.randrange(300)), rng.randbytes(rng.choice([0, 1, 2, 255, 70000]))
        assert d.crc32(a) == zlib.crc32(a)
        assert d.crc32(b, d.crc32(a)) == zlib.crc32(a + b)
        assert d.crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@pytest.mark.usefixtures("_either")
def test_crc_combines_beyond_32_bits() -> None:
    """The CRC of 7 * 2^32 zero bytes, put together in three ways from that of 2^20."""
    of = {20: zlib.crc32(bytes(1 << 20))}
    for k in range(20, 36):
        of[k + 1] = d.crc32_combine(of[k], of[k], 1 << k)
    a = d.crc32_combine(d.crc32_combine(of[32], of[33], 1 << 33), of[34], 1 << 34)
    b = d.crc32_combine(d.crc32_combine(of[34], of[33], 1 << 33), of[32], 1 << 32)
    c = d.crc32_combine(of[34], d.crc32_combine(of[33], of[32], 1 << 32), 3 << 32)
    assert a == b == c
    assert d.crc32_combine(of[36], 0, 0) == of[36]
