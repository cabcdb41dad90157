"""Fresh tensors: what they are, and what large ones ask of the kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fastckpt import tensors


def flags(address: int) -> set[str]:
    """The kernel's flags of the mapping that holds an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (head := line.split(" ")[0]) and not head.endswith(":"):
            low, high = (int(x, 16) for x in head.split("-"))
            found = low <= address < high
        elif found and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    return set()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's flags are read from /proc")
@pytest.mark.parametrize("count", [0, 5, 3 << 20])
def test_large_ones_ask_for_huge_pages(count: int) -> None:
    made = tensors.fresh((count, 1), torch.bfloat16)
    assert made.shape == (count, 1) and made.dtype is torch.bfloat16 and made.is_contiguous()
    made.fill_(3)
    assert bool((made == 3).all())
    if made.nbytes >= tensors.HUGE and Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags(made.data_ptr() + made.nbytes // 2)
