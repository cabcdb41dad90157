"""What a run holds at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastckpt.running.limits import FIXED_MEMORY, recent
from zero_writer import write_zero

MIB = 1 << 20

RUN = """
import sys
import fastckpt.road
from fastckpt.layouts.same import Same

def peak():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))

before = peak()
fastckpt.reshard(sys.argv[1], layout=Same(), dtype="bfloat16", out=sys.argv[2], durable=False, threads=2)
print(peak() - before)
"""


def test_names_take_the_place_of_mapped_pages() -> None:
    assert [recent(n) // MIB for n in (0, 1000, 100_000, 10**9)] == [32, 31, 12, 8]


@pytest.mark.nightly
def test_the_memory_of_very_many_tensors(tmp_path: Path) -> None:
    """The promise of docs/architecture.md at 10^5 tensors of 1 KiB, two threads."""
    values = torch.zeros(100_000, 16, 16)
    weights = {f"model.layers.{k // 100}.part.{k % 100}.weight": values[k] for k in range(len(values))}
    write_zero(tmp_path / "checkpoint", weights, stage=3, world=2)
    command = [sys.executable, "-c", RUN, str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= FIXED_MEMORY + 2 * 4 * MIB
