"""The example runs, and what it claims is so."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from fastckpt.manager.manager import CheckpointManager
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[2] / "examples/jobrunner/train.py"


def test_jobrunner(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.Popen(
        [sys.executable, str(EXAMPLE), "--smoke", "--out", str(tmp_path)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = done.communicate(timeout=900)
    finally:
        with suppress(ProcessLookupError):  # its ranks too, where it did not end
            os.killpg(done.pid, signal.SIGKILL)
    assert done.returncode == 0, said
    assert "rank 1 was killed while it saved epoch 3; step-00000002 stands" in said
    assert said.count("resumed from None, trained to epoch 4") == 2
    assert said.count("resumed from 2, trained to epoch 4") == 2
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("undisturbed", "killed"))
    assert list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)
    with CheckpointManager(tmp_path / "killed", rank=0, world=1) as manager:
        saved = manager.restore(names=[f"model.{n}" for n in one])
        assert isinstance(saved, dict) and all(torch.equal(saved[f"model.{n}"], one[n]) for n in one)
    assert len(ElementTree.parse(tmp_path / "result.svg").findall("{*}polyline")) == 2

    # the first rank, which also commits, dies in the same way
    assert ranks(tmp_path / "first", {}, "--kill-in", "3")[0] == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "first").glob("step-*"))[-1] == "step-00000002"
    assert ranks(tmp_path / "first", {}) == [0, 0]
    want = (tmp_path / "undisturbed.safetensors").read_bytes()
    assert (tmp_path / "first.safetensors").read_bytes() == want


def ranks(root: Path, more: dict[int, dict[str, str]], *first: str) -> list[int]:
    """Both ranks of the example's training, as its launcher starts them; exit codes. `more`: variables of a
    rank; `first`: further words for rank 0. When one dies, or after minutes, all are killed."""
    meet = root.parent / f".meet-{time.time_ns()}"
    command = [sys.executable, str(EXAMPLE), "--out", str(root.parent), "--smoke", "--rank-of", str(root)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command += ["--meet", str(meet)]
    started = [
        subprocess.Popen([*command, *words], env={**env, "RANK": str(r), **more.get(r, {})})
        for r, words in enumerate((first, ()))
    ]
    end = time.monotonic() + 300
    while any(p.poll() is None for p in started):
        if any(p.poll() not in (None, 0) for p in started) or time.monotonic() > end:
            for p in started:
                p.kill()
        time.sleep(0.05)
    return [p.returncode for p in started]


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("cc") is None, reason="the shim needs cc")
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_any_call(tmp_path: Path, victim: int) -> None:
    """SIGKILL at calls all over the run, of either rank: resumed, the same weights bit for bit."""
    shim = tmp_path / "shim.so"
    source = Path(__file__).parents[2] / "benchmarks/reliability/shim.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
    assert ranks(tmp_path / "undisturbed", {}) == [0, 0]
    want = (tmp_path / "undisturbed.safetensors").read_bytes()
    killed = 0
    for point in range(5, 125, 17):
        root = tmp_path / f"killed-{point}"
        fault = {"LD_PRELOAD": str(shim), "FAULT_ROOT": str(root), "FAULT_POINT": str(point)}
        codes = ranks(root, {victim: {**fault, "FAULT_MODE": "3"}})
        killed += codes[victim] == -signal.SIGKILL
        assert codes == [0, 0] or ranks(root, {}) == [0, 0], point
        assert (tmp_path / f"killed-{point}.safetensors").read_bytes() == want, point
    assert killed > 3
