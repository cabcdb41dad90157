"""The GPU's tests on the simulation: whatever of them is not the hardware's runs in every run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

TESTS = Path(__file__).parent
FILES = tuple(f"tests/gpu/test_gpu_{name}.py" for name in ("rows", "road", "quant"))
"""Those that ask no more than the simulation plays: no modules moved there, no saving."""
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
        "-m", "pytest", "-q", "-p", "simulated_gpu", "-p", "no:cacheprovider", *FILES, "-k", chosen
    )
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_gpus_tests() -> None:
    run(f"not ({LARGE})")


@pytest.mark.nightly
def test_the_gpus_tests_of_many_rows() -> None:
    run(f"({LARGE}) and not four_gib")


@pytest.mark.nightly
def test_every_row_of_the_gpus_benchmarks() -> None:
    script = "import runpy, sys, simulated_gpu; sys.path.insert(0, 'benchmarks'); "
    script += "sys.argv = ['gpu.py', '--small']; "
    done = simulated("-c", script + "runpy.run_path('benchmarks/gpu.py', run_name='__main__')")
    assert done.returncode == 0 and "every row ran" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_gpu", TESTS.parent / "benchmarks" / "on_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_gpu", module)
    spec.loader.exec_module(module)
    return module


def test_the_constants_that_make_gpu_tries_are_the_kernels(on_gpu: ModuleType) -> None:
    source = "".join(p.read_text() for p in (TESTS.parent / "csrc").iterdir())
    for other in on_gpu.OTHERS:
        for define in other.split():
            assert f"#ifndef FASTCKPT_{define.partition('=')[0]}\n" in source, define
    assert len({on_gpu.site_of(other) for other in on_gpu.OTHERS}) == len(on_gpu.OTHERS)


def test_a_part_of_make_gpu_that_fails_loses_no_other(
    on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "old.json").write_text('{"kernels": []}')
    os.utime(results / "old.json", (1, 1))
    row = {
        "name": "r",
        "ms": 2.0,
        "bytes": 4_000_000,
        "fraction_of_copy": 0.5,
        "speedup_vs_eager": 3.0,
        "error": "",
    }
    about = {"gpu": "g", "driver": "d", "torch": "t", "commit": "c" * 40, "kernels": []}
    held = json.dumps({**about, "rows": [row, {**row, "name": "s", "error": "failed: x"}]})
    write = f"import pathlib; pathlib.Path({str(results / 'new.json')!r}).write_text({held!r})"
    python = sys.executable
    monkeypatch.setattr(on_gpu, "RESULTS", results)
    monkeypatch.setattr(on_gpu, "architectures", lambda: "")
    monkeypatch.setattr(
        on_gpu,
        "parts",
        lambda seconds: [
            on_gpu.Part("build", 100, (python, "-c", "pass")),
            on_gpu.Part("bad", 100, (python, "-c", "raise SystemExit(3)")),
            on_gpu.Part("stuck", 6, (python, "-c", "import time; time.sleep(1000)")),
            on_gpu.Part("missing", 100, ("no-such-tool",)),
            on_gpu.Part("rows", 100, (python, "-c", write)),
        ],
    )
    monkeypatch.setattr(sys, "argv", ["on_gpu.py"])
    assert on_gpu.main() == 1
    said = capsys.readouterr().out
    made = json.loads((results / "new.json").read_text())
    assert [p["said"] for p in made["parts"]] == [
        "ok", "failed, status 3", "stopped after 6 s", "not run: there is no no-such-tool here", "ok",
    ]  # fmt: skip
    assert len(made["rows"]) == 2 and "failed: x" in said and "0.500" in said
    assert json.loads((results / "old.json").read_text()) == {"kernels": []}
    monkeypatch.setattr(
        on_gpu,
        "parts",
        lambda seconds: [
            on_gpu.Part("build", 100, (python, "-c", "raise SystemExit(1)")),
            on_gpu.Part("rows", 100, (python, "-c", "pass")),
        ],
    )
    assert on_gpu.main() == 1 and "not run: there is no build" in capsys.readouterr().out
