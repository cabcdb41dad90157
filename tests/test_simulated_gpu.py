"""The GPU's tests on the simulation: whatever of them is not the hardware's runs in every run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

TESTS = Path(__file__).parent
LARGE = "four_gib or many_rows or lines or transposes or every_value"
"""Those of rows that test_tiles.py and test_casts.py run on the host in other sizes."""


def simulated(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in (str(TESTS), *sys.path) if p)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def run(chosen: str) -> None:
    done = simulated(
        "-m", "pytest", "-q", "-p", "simulated_gpu", "-p", "no:cacheprovider", "tests/gpu", "-k", chosen
    )
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_gpus_tests() -> None:
    run(f"not ({LARGE})")


@pytest.mark.nightly
def test_the_gpus_tests_of_many_rows() -> None:
    run(f"({LARGE}) and not four_gib")
