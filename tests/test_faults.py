"""A call of the operating system that fails is an error of ours: what, where, its exit code, nothing left.

Each call on the run's files fails once, with EIO, in a forked child (`hostile/faults.py`). Afterwards the
command either did all of its work, as without the fault, or said so and left what was there before.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest
from fastckpt import CheckpointManager, errors
from hostile import faults

TESTS = Path(__file__).parent
OURS = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, errors.FastckptError)}
RUNS_ON = re.compile(r'"(seconds|peak_memory|phases|plan|copy|sync)": .*\n')
"""What a report says that is another each time."""


@pytest.fixture
def work(tmp_path):
    """A ZeRO and a distributed checkpoint, an output, a cut one, and in `out` what a run finds there."""
    for name, made in (("zero", "z2-llama-w2-robin"), ("dcp", "fsdp-w3")):
        shutil.copytree(TESTS / "fixtures" / made, tmp_path / name)
    fastckpt.reshard(tmp_path / "zero", out=tmp_path / "hub")
    pipeline = fastckpt.Placement(pp=2)
    fastckpt.reshard(tmp_path / "zero", placement=pipeline, layout="vllm", out=tmp_path / "cut")
    kept = tmp_path / "out.kept"
    shutil.copytree(tmp_path / "hub", kept / "old")
    with CheckpointManager(kept / "runs", rank=0, world=1) as manager:
        for step in (4, 5):
            manager.save(step, faults.state(step))
    shutil.copytree(kept, tmp_path / "out")
    return tmp_path


def told_of(work: Path, step: int, *actions: str) -> dict[str, list[dict[str, object]]]:
    """The runs of each action, the one without a fault first."""
    words = [sys.executable, TESTS / "hostile/faults.py", work, str(step), *actions]
    done = subprocess.run(words, check=True, timeout=3600, capture_output=True, text=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {a: [t for t in told if t["action"] == a] for a in actions}


def refused(work: Path, told: dict[str, object]) -> bool:
    """Whether a run ended in an error; then one of ours, that says where, without a traceback."""
    assert "Traceback" not in told["stderr"], told
    if "kind" not in told:
        return False
    assert told["kind"] in OURS and str(work) in told["error"] and told["exit"] in (3, 4), told
    return True


def check(work: Path, runs: list[dict[str, object]], before: dict[str, str]) -> None:
    whole, *others = runs
    assert whole["exit"] == 0 and "kind" not in whole and len(others) > 5
    for told in others:
        if refused(work, told):
            assert told["out"] == before, told
            continue
        assert told["exit"] == 0, told
        said, wanted = (RUNS_ON.sub("", t["stdout"]) for t in (told, whole))
        old = {n for n in told["out"] if n.startswith(".old.fastckpt-")}  # was replaced, and not removed
        assert {n: d for n, d in told["out"].items() if n not in old} == whole["out"], told
        loud = "IS BROKEN and passed over" in told["stderr"]  # for the commit before it
        assert said == wanted or loud or (old and "may not remove" in said) or told["call"] == "rmdir", told


def test_a_call_that_fails(work):
    found = told_of(work, 29, "reshard-hub", "consolidate", "diff", "restore")
    before = found["diff"][0]["out"]
    for runs in found.values():
        check(work, runs, before)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "action",
    ["inspect-zero", "inspect-dcp", "inspect-hub", "inspect-cut", "plan", "reshard-zero", "reshard-hub",
     "reshard-cut", "overwrite", "consolidate", "consolidate-dcp", "diff", "diff-zero", "restore"],
)  # fmt: skip
def test_every_call_that_fails(work, action):
    before = told_of(work, 1000, "restore")["restore"][0]["out"]
    check(work, told_of(work, 1, action)[action], before)


@pytest.mark.parametrize("step", [19, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_save_stands_or_is_not_there(work, step):
    """An error after the rename does not take the commit back; what stands is whole, no less than before."""
    for told in told_of(work, step, "save")["save"][1:]:
        refused(work, told)
        steps = {n.split("/")[1] for n in told["out"] if n.startswith("runs/step-")}
        assert steps & {"step-00000005", "step-00000009"}, told
        for name in steps:
            own = {n.removeprefix(f"runs/{name}/") for n in told["out"] if n.startswith(f"runs/{name}/")}
            assert own >= {"fastckpt.json", "tensors.json", "rank-00000/state.safetensors"}, told


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.nightly)])
def test_verify_calls_nothing_good_that_it_could_not_read(work, step):
    for told in told_of(work, step, "verify")["verify"][1:]:
        if not refused(work, told):
            assert told["exit"] == 1 or told["call"] in ("close", "stat", "lstat", "scandir"), told
