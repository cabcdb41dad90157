"""What nvcc says of the kernels: no local memory, no spills. Skipped where there is no nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the kernels are not compiled here")


def report(folder: Path, architecture: str) -> list[dict[str, int]]:
    """For each function of copy_cuda.cu: stack and spills in bytes, registers of the kernels."""
    done = subprocess.run(
        [
            "nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
            "-cubin", "-o", str(folder / f"{architecture}.cubin"), "csrc/copy_cuda.cu",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 3 and len(sizes) >= 3, done.stderr
    return [
        {"stack": int(a), "stores": int(b), "loads": int(c), "registers": r}
        for (a, b, c), r in zip(sizes, registers + [0] * (len(sizes) - 3), strict=True)
    ]


def check(folder: Path, architecture: str) -> None:
    for f in report(folder, architecture):
        assert (f["stack"], f["stores"], f["loads"]) == (0, 0, 0), f"sm_{architecture}: {f}"
        assert f["registers"] <= 64, f"sm_{architecture}: {f}"  # four blocks of 256 threads


@needs_nvcc
def test_no_local_memory(tmp_path: Path) -> None:
    check(tmp_path, "90")


@needs_nvcc
@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_local_memory_anywhere(tmp_path: Path, architecture: str) -> None:
    check(tmp_path, architecture)
