"""The PTX of the copies makes what a plan says of a whole model in ZeRO-3 partitions."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
from fastckpt.extents import Buffer
from ptx.launches import copies
from ptx.memory import Global
from running.test_gpu_sources import cut, launched

pytest.importorskip("fastckpt._C", reason="the compiled module is not built")
pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: the kernels are not compiled here"
)


def held(buffer: Buffer) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address), np.uint8)


def by_ptx(rows: np.ndarray, sources: Sequence[Buffer], destinations: Sequence[Buffer]) -> None:
    """Over copies of these buffers, which lie as they do past a multiple of 16."""
    memory = Global()
    given = [memory.put("source", held(b), b.address % 16) for b in sources]
    made = [memory.put("destination", held(b), b.address % 16, "once") for b in destinations]
    counted = copies(memory, cut(rows, given, made))
    assert set(counted) >= {"rows"}
    for b, at in zip(destinations, made, strict=True):
        held(b)[:] = memory.get(at, b.nbytes)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["vllm", "rtp_llm"])
def test_a_mixture_of_experts(layout: str) -> None:
    launched(2, layout, by_ptx)
