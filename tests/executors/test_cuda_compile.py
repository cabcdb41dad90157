"""What nvcc says of the kernels: no local memory, no spills. Skipped where there is no nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = (sys.executable, "setup.py", "build_ext")
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: the kernels are not compiled here"
)


def report(folder: Path, architecture: str, source: str, kernels: int) -> list[dict[str, int]]:
    """For each function of a .cu file: stack and spills in bytes, registers of the kernels."""
    done = subprocess.run(
        [
            "nvcc", "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", f"-arch=sm_{architecture}",
            "-cubin", "-o", str(folder / f"{architecture}.cubin"), f"csrc/{source}",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == kernels <= len(sizes), done.stderr
    return [
        {"stack": int(a), "stores": int(b), "loads": int(c), "registers": r}
        for (a, b, c), r in zip(sizes, registers + [0] * (len(sizes) - kernels), strict=True)
    ]


def check(folder: Path, architecture: str) -> None:
    """No local memory; four blocks of 256 threads fit a multiprocessor, eight of the 64 of digests, three of
    the 256 of quantising."""
    for source, kernels, registers in (
        ("copy_cuda.cu", 3, 64), ("digest_cuda.cu", 1, 128), ("quant_cuda.cu", 1, 80)
    ):  # fmt: skip
        for f in report(folder, architecture, source, kernels):
            assert (f["stack"], f["stores"], f["loads"]) == (0, 0, 0), f"sm_{architecture}: {f}"
            assert f["registers"] <= registers, f"sm_{architecture}: {f}"


@needs_nvcc
def test_no_local_memory(tmp_path: Path) -> None:
    check(tmp_path, "90")


@needs_nvcc
@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_local_memory_anywhere(tmp_path: Path, architecture: str) -> None:
    check(tmp_path, architecture)


@needs_nvcc
@pytest.mark.parametrize("source", ["copy_cuda.cu", "quant_cuda.cu"])
def test_arithmetic_is_that_of_a_cpu(tmp_path: Path, source: str) -> None:
    """Every product, sum and quotient is rounded to nearest by itself, and none flushes denormals."""
    assert '"-fmad=false"' in (ROOT / "setup.py").read_text()
    ptx = tmp_path / "out.ptx"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-arch=compute_90", "-ptx", "-o", ptx, f"csrc/{source}"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    found = set(
        re.findall(r"\b(?:add|sub|mul|fma|mad|div|rcp|sqrt|ex2|lg2)\.[a-z.]*f(?:16|32|64)", ptx.read_text())
    )
    assert found and all(re.fullmatch(r"[a-z0-9]+\.rn\.f(32|64)", x) for x in found), found
    assert ".ftz" not in ptx.read_text()


def test_a_toolkit_that_must_be_there_is_missed(tmp_path: Path) -> None:
    env = {**os.environ, "FASTCKPT_BUILD": "1", "FASTCKPT_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [*BUILD, "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and f"no nvcc at {tmp_path / 'bin' / 'nvcc'}" in done.stdout + done.stderr


@needs_nvcc
@pytest.mark.nightly
def test_the_build_with_cuda_loads_where_there_is_no_driver(tmp_path: Path) -> None:
    env = {**os.environ, "FASTCKPT_BUILD": "1", "FASTCKPT_CUDA": "1"}
    subprocess.run(
        [*BUILD, "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT, env=env, capture_output=True, check=True,
    )  # fmt: skip
    (made,) = (tmp_path / "fastckpt").glob("_C*.so")
    ask = "import _C; print(_C.built_with_cuda, _C.cuda_archs, _C.device_state()['devices'] >= 0)"
    said = subprocess.run(
        [sys.executable, "-c", ask], cwd=made.parent, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[0] == said[-1] == "True" and set(said[1:-1]) >= {"sm_80", "sm_90"}
    assert len(zlib.compress(made.read_bytes())) < 1_700_000  # of the wheel's 2 MB
