"""Kept plans are those of one version of the package: any room's source is part of their key."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest


def code_of(folder: Path) -> str:
    """`plancache.code()` of the copy of the package in `folder`."""
    said = "from fastckpt.planning import plancache; print(plancache.__file__, plancache.code())"
    made = subprocess.run(
        [sys.executable, "-c", said],
        env={"PYTHONPATH": str(folder)},
        text=True,
        capture_output=True,
        check=True,
    )
    where, code = made.stdout.split()
    assert Path(where).is_relative_to(folder)
    return code


@pytest.mark.parametrize("room", ["layouts/cuts.py", "recipes/llama.py", "views.py", "planning/compiling.py"])
def test_a_change_in_any_room_makes_other_plans(tmp_path: Path, room: str) -> None:
    package = tmp_path / "fastckpt"
    shutil.copytree(
        Path(fastckpt.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "_C*")
    )
    before = code_of(tmp_path)
    assert code_of(tmp_path) == before
    with open(package / room, "a") as f:
        f.write("# changed\n")
    assert code_of(tmp_path) != before
