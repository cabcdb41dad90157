"""The kernels under AddressSanitizer and UBSan: built apart, the row tests run on that build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_rows_under_sanitizers(tmp_path: Path) -> None:
    package = tmp_path / "lib"
    shutil.copytree(ROOT / "python" / "fastckpt", package / "fastckpt", ignore=shutil.ignore_patterns("*.so"))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(package), "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CFLAGS": flags, "LDFLAGS": flags, "FASTCKPT_BUILD": "1", "FASTCKPT_CUDA": "0"},
        check=True,
        capture_output=True,
    )
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )

    assert str(package) in python("-c", "import fastckpt._C as c; print(c.__file__)").stdout
    files = (
        "tests/executors/test_copy_rows.py",
        "tests/executors/test_tiles.py",
        "tests/quantisation/test_quantrows.py",
        "tests/computed/test_lowrank.py",
    )
    chosen = (
        "random_rows or transposes or small or lines or table or where_they_lie or odd_sizes or numpys_bits"
    )
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
