"""Kept plans: another version of the package, whatever changed in it, finds none of this one's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastckpt

SOURCE = Path(str(fastckpt.__file__)).parent
SHAPING = ("views.py", "inverse.py", "layouts/cuts.py", "recipes/claims.py", "quantisation/schemes.py")


def code(package: Path) -> str:
    """What another process takes for the version of the package that lies there."""
    asked = "from fastckpt.planning.plancache import code; print(code())"
    env = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", asked], env=env, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def test_a_change_in_any_room_plans_anew(tmp_path: Path) -> None:
    package = tmp_path / "fastckpt"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__", "_C*"))
    seen = [code(package), code(package)]
    assert seen[0] == seen[1]
    for name in SHAPING:
        with open(package / name, "a") as f:
            f.write("# changed\n")
        seen.append(code(package))
    assert len({*seen}) == 1 + len(SHAPING)
