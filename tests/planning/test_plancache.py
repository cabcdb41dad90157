"""Kept plans are those of one version of the package: any room's source is part of their key."""

from __future__ import annotations

import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt.errors import ManagerError, WriteError
from fastckpt.manager.remote import default_scratch
from fastckpt.planning import plancache


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


def test_a_user_without_a_home_keeps_no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as any number: "~" is then no directory but a name."""

    def unknown(user: int) -> None:
        raise KeyError(user)

    for name in ("FASTCKPT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert plancache.folder() is None
    with pytest.raises(ManagerError, match="this user has no cache directory to make commits in"):
        default_scratch("memory://x")


def test_a_cache_that_begins_with_a_tilde_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It was made as a directory of that name, wherever the run happened to be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTCKPT_CACHE", "~/plans")
    with pytest.raises(WriteError, match=r"FASTCKPT_CACHE=~/plans: begins with ~; only a shell .* or \./~"):
        fastckpt.reshard({"w": torch.ones(2)}, layout="same", out=tmp_path / "out", durable=False)
    assert not list(tmp_path.iterdir())


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
