"""A run ends with what it left out, by reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SKIPS = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_skips(n):
    pytest.skip("no such tool" if n else "another reason")

def test_runs():
    pass
"""


def test_a_run_ends_with_its_skips_by_reason(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SKIPS)
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", ".", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    start = next(k for k, line in enumerate(lines) if "not run here" in line)
    assert [line.split(maxsplit=1) for line in lines[start + 1 : start + 3]] == [
        ["2", "no such tool"],
        ["1", "another reason"],
    ]
