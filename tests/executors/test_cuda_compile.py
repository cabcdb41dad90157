"""What nvcc says of the kernels: no local memory, no spills. Skipped where there is no nvcc."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from ptx.compiled import FLAGS, ROOT, Target, compiled

BUILD = (sys.executable, "setup.py", "build_ext")
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: the kernels are not compiled here"
)


def report(architecture: str, source: str, kernels: int) -> list[dict[str, int]]:
    """For each function of a .cu file: stack and spills in bytes, registers of the kernels."""
    said = compiled(source, Target(architecture)).report
    sizes = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == kernels <= len(sizes), said
    return [
        {"stack": int(a), "stores": int(b), "loads": int(c), "registers": r}
        for (a, b, c), r in zip(sizes, registers + [0] * (len(sizes) - kernels), strict=True)
    ]


def check(architecture: str) -> None:
    """No local memory; four blocks of 256 threads fit a multiprocessor, eight of the 64 of digests, three of
    the 256 of quantising."""
    for source, kernels, registers in (
        ("copy_cuda.cu", 3, 64), ("digest_cuda.cu", 1, 128), ("quant_cuda.cu", 1, 80)
    ):  # fmt: skip
        for f in report(architecture, source, kernels):
            assert (f["stack"], f["stores"], f["loads"]) == (0, 0, 0), f"sm_{architecture}: {f}"
            assert f["registers"] <= registers, f"sm_{architecture}: {f}"


@needs_nvcc
def test_no_local_memory() -> None:
    check("90")


@needs_nvcc
@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_local_memory_anywhere(architecture: str) -> None:
    check(architecture)


@needs_nvcc
@pytest.mark.parametrize("source", ["copy_cuda.cu", "quant_cuda.cu"])
def test_arithmetic_is_that_of_a_cpu(source: str) -> None:
    """Every product, sum and quotient is rounded to nearest by itself, and none flushes denormals."""
    assert all(f'"{flag}"' in (ROOT / "setup.py").read_text() for flag in FLAGS)
    ptx = compiled(source).ptx
    found = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|rcp|sqrt|ex2|lg2)\.[a-z.]*f(?:16|32|64)", ptx))
    assert found and all(re.fullmatch(r"[a-z0-9]+\.rn\.f(32|64)", x) for x in found), found
    assert ".ftz" not in ptx


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: nothing is preprocessed here")
@pytest.mark.parametrize(
    ("architecture", "release", "knows"),
    [
        (800, "13 0", False),
        (890, "11 8", False),
        (890, "12 0", False),
        (890, "12 1", True),
        (900, "11 8", True),
    ],
)
def test_instructions_that_nvcc_knows(architecture: int, release: str, knows: bool) -> None:
    """One that it does not know would leave the build without any kernel."""
    major, minor = release.split()
    defines = {"__CUDA_ARCH__": architecture, "__CUDACC_VER_MAJOR__": major, "__CUDACC_VER_MINOR__": minor}
    asked = [f"-D{name}={value}" for name, value in defines.items()]
    command = ["g++", "-E", "-std=c++17", "-x", "c++", *asked, "csrc/port_cuda.h"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("cvt.rn.satfinite.e4m3x2" in done.stdout) == knows


def test_a_toolkit_that_must_be_there_is_missed(tmp_path: Path) -> None:
    env = {**os.environ, "FASTCKPT_BUILD": "1", "FASTCKPT_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [*BUILD, "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and f"no nvcc at {tmp_path / 'bin' / 'nvcc'}" in done.stdout + done.stderr


def played(home: Path, monkeypatch: pytest.MonkeyPatch, release: str = "13.0") -> None:
    """A toolkit in `home` that knows three GPUs; its nvcc writes what it is asked to compile into `asked`."""
    (home / "bin").mkdir()
    (home / "lib").mkdir()
    (home / "lib" / "libcudart_static.a").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
case $1 in
    --dryrun) echo '#$ TOP={home}' ;;
    --version) echo 'Cuda compilation tools, release {release}, V{release}.88' ;;
    --list-gpu-code) printf 'sm_80\\nsm_90\\nsm_100\\n' ;;
    *) echo "$@" > {home}/asked ;;
esac
"""
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr("setuptools.setup", lambda **given: None)
    monkeypatch.chdir(ROOT)


def toolkit() -> Any:
    """setup.py's, as the environment is now."""
    return runpy.run_path("setup.py")["Toolkit"]()


@pytest.mark.parametrize(
    ("asked", "built"),
    [("", "80 90 100"), ("90,100", "90 100"), ("103", "100"), ("121", "100"), ("87", "80")],
)
def test_a_gpu_newer_than_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, built: str
) -> None:
    """It runs what is built for the newest that nvcc knows below it; one older than all of those, nothing."""
    played(tmp_path, monkeypatch)
    monkeypatch.setenv("FASTCKPT_CUDA_ARCHS", asked)
    assert toolkit().architectures == built.split()
    monkeypatch.setenv("FASTCKPT_CUDA_ARCHS", "70")
    with pytest.raises(OSError, match="knows none of sm_70"):
        toolkit()


@pytest.mark.parametrize(("release", "how"), [("12.9", "-compress-all"), ("13.0", "--compress-mode=size")])
def test_every_driver_of_a_release_loads_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, how: str
) -> None:
    """Drivers of the same major release run newer code, but before 12.4 they unpack no newer compression."""
    played(tmp_path, monkeypatch, release)
    toolkit().compile("copy_cuda.cu", str(tmp_path))
    asked = (tmp_path / "asked").read_text()
    assert how in asked and asked.count("compress") == 1


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
    held = [made, *(ROOT / "python" / "fastckpt").rglob("*.py")]
    assert sum(len(zlib.compress(p.read_bytes())) for p in held) < 2_110_000  # of a wheel of 2.14 MB
