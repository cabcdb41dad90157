"""The example runs, and what it claims is so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import torch
from fastckpt.manager.manager import CheckpointManager
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[2] / "examples/jobrunner/train.py"


def test_jobrunner(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--smoke", "--out", str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 1 was killed while it saved epoch 3; step-00000002 stands" in done.stdout
    assert done.stdout.count("resumed from None, trained to epoch 4") == 2
    assert done.stdout.count("resumed from 2, trained to epoch 4") == 2
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("undisturbed", "killed"))
    assert list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)
    with CheckpointManager(tmp_path / "killed", rank=0, world=1) as manager:
        saved = manager.restore(names=[f"model.{n}" for n in one])
        assert isinstance(saved, dict) and all(torch.equal(saved[f"model.{n}"], one[n]) for n in one)
    assert len(ElementTree.parse(tmp_path / "result.svg").findall("{*}polyline")) == 2
