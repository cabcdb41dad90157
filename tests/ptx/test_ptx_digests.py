"""The PTX of the digests, run on the CPU, makes xxhash's XXH3-64 of leaves of every kind."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import xxhash
from ptx.compiled import DEFAULT, Target
from ptx.launches import digests
from ptx.memory import Global

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: the kernels are not compiled here"
)

SIZES = (*range(1, 260), 511, 1023, 1024, 1025, 1039, 1040, 1088, 2049, 2064, 4096, 5000)
"""Around every size at which XXH3 changes its formula."""


def check(sizes: tuple[int, ...], target: Target = DEFAULT) -> None:
    """Leaves of these sizes, each in an allocation that ends with it: aligned, and at some odd place."""
    rng = np.random.default_rng(31)
    memory = Global()
    leaves, wanted = [], []
    for n in sizes:
        for at in (0, 4, 8, int(rng.integers(1, 64))) if n > 240 else (int(rng.integers(0, 64)),):
            data = rng.integers(0, 256, n, dtype=np.uint8)
            leaves.append((memory.put("leaf", data, at), n))
            wanted.append(xxhash.xxh3_64_intdigest(data.tobytes()))
    out = memory.put("out", np.zeros(len(leaves), np.uint64), written="once")
    digests(memory, np.array(leaves, np.uint64), out, target)
    got = memory.get(out, 8 * len(leaves)).view(np.uint64).tolist()
    for (_, n), a, b in zip(leaves, got, wanted, strict=True):
        assert a == b, n


def test_leaves() -> None:
    check(SIZES)


@pytest.mark.nightly
def test_long_leaves() -> None:
    check((65_537, (1 << 20) - 1, 1 << 20))


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ["80", "90", "120"])
@pytest.mark.parametrize("ahead", ["AHEAD=0", "AHEAD=4"])
def test_other_targets(architecture: str, ahead: str) -> None:
    check(SIZES[200:], Target(architecture, (ahead,)))
