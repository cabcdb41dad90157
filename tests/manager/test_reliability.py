"""The real program under real failures (benchmarks/reliability): no commit lost, no torn one believed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks/reliability"

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux", reason="the shim needs cc and Linux"
)


def run(*words: str, program: Path = HERE / "run.py") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in [str(HERE), *sys.path] if p)}
    env |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=7000, check=False)


def results(out: Path, size: str) -> dict[str, dict[str, object]]:
    done = run("--size", size, "--json", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found: dict[str, dict[str, object]] = json.loads(out.read_text())
    for part, faults in (
        ("kills", ("lost", "torn", "restart")),
        ("crashes", ("lost", "torn", "restart")),
        ("damage", ("missed", "wrong", "alarms")),
    ):
        assert found[part]["ended"] is True
        assert [found[part][fault] for fault in faults] == [0, 0, 0]
    return found


def test_some_points(tmp_path: Path) -> None:
    found = results(tmp_path / "found.json", "ci")
    assert found["kills"]["by_group"] == {"1 rank": 60, "2 ranks": 8, "4 ranks": 2}
    assert found["crashes"]["by_group"] == {"1 rank": 120, "2 ranks": 40}
    assert found["damage"]["by_group"] == {"damages": 200, "clean loads": 100}


@pytest.mark.nightly
def test_many_points(tmp_path: Path) -> None:
    found = results(tmp_path / "found.json", "nightly")
    assert int(str(found["kills"]["points"])) >= 5000 and int(str(found["crashes"]["points"])) >= 6000
    assert found["damage"]["by_group"] == {"damages": 10_000, "clean loads": 10_000}


CARELESS = """
import sys, tempfile
from pathlib import Path
import faults
faults.preloaded(Path(sys.argv[1]))
from durability import crashes, logged
from program import Job, Roots, warm
warm()
with tempfile.TemporaryDirectory() as work:
    roots = Roots(Path(work))
    run = logged(faults.Shim(), roots, Job(durable=False))
    tries = [(k, seed) for k in run.places[:75] for seed in (0, k + 1)]
    print(sum(any(outcome.wrong.values()) for outcome in crashes(run, roots, tries)))
"""


def test_what_is_not_synced_is_seen_to_be_lost(tmp_path: Path) -> None:
    """The judge does judge: a manager that does not wait for the disk loses commits in a crash."""
    program = tmp_path / "careless.py"
    program.write_text(CARELESS)
    done = run(str(tmp_path), program=program)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) > 10, done.stdout
