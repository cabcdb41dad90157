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
FILES = tuple(f"tests/gpu/test_gpu_{name}.py" for name in ("rows", "road", "quant", "manager", "refusals"))
LARGE = "four_gib or many_rows or lines or transposes or every_value"
"""Those of rows that test_tiles.py and test_casts.py run on the host in other sizes."""


def simulated(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in (str(TESTS), *sys.path) if p)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path, **more},
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
def test_every_row_of_the_gpus_benchmarks(tmp_path: Path) -> None:
    script = "import runpy, sys, simulated_gpu; sys.path.insert(0, 'benchmarks'); "
    script += "sys.argv = ['gpu.py', '--small']; "
    script += "runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    done = simulated("-c", script, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0 and "every row ran" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert not list(tmp_path.iterdir())  # each plans anew


def test_torch_copies_where_ours_does() -> None:
    """`to` gives the same tensor again where it has the dtype already: nothing to be compared with."""
    script = "import sys, simulated_gpu, torch; sys.path.insert(0, 'benchmarks'); import gpu_rows; "
    script += "case = gpu_rows.straight(torch.bfloat16, torch.bfloat16, 0, 1 << 12); "
    script += "a, b = case.eager(), case.eager(); assert a.data_ptr() != b.data_ptr()"
    done = simulated("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_goals_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is some row's; one that was not measured meets none."""
    monkeypatch.syspath_prepend(TESTS.parent / "benchmarks")
    gpu = importlib.import_module("gpu")
    models = [gpu.gpu_models.cases(kind, False) for kind in ("llama-8b", "moe")]
    names = [name for made in (gpu.gpu_rows.cases(False), *models) for name, _ in made]
    assert all(any(name.startswith(begin) for name in names) for begin in gpu.GOALS)
    assert gpu.judged("model moe vllm", 0.85, 30.0) == (">= 0.85 of copy, >= 30 x eager", "yes")
    assert gpu.judged("model moe vllm", 0.99, 29.0)[1] == gpu.judged("transpose x", 0.8, 99.0)[1] == "no"
    assert gpu.judged("peer cat 1024 B", 0.1, 0.1) == ("", "")
    assert gpu.unmeasured("gather_cast fp32->bf16", "failed: x").met == "no"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_gpu", TESTS.parent / "benchmarks" / "on_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_gpu", module)
    spec.loader.exec_module(module)
    return module


def test_make_gpu_runs_every_test(on_gpu: ModuleType) -> None:
    """Those of the kernels before those of what is built on them."""
    assert set(on_gpu.TESTS) == {f"tests/gpu/{p.name}" for p in (TESTS / "gpu").glob("test_*.py")}
    assert on_gpu.TESTS[0] == "tests/gpu/test_gpu_rows.py"


def test_the_constants_that_make_gpu_tries_are_the_kernels(on_gpu: ModuleType) -> None:
    source = "".join(p.read_text() for p in (TESTS.parent / "csrc").iterdir())
    for other in on_gpu.OTHERS:
        for define in other.split():
            assert f"#ifndef FASTCKPT_{define.partition('=')[0]}\n" in source, define
    assert len({on_gpu.site_of(other) for other in on_gpu.OTHERS}) == len(on_gpu.OTHERS)


STUCK = """
import pathlib, sys, time
try:
    time.sleep(1000)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1]).write_text("interrupted")
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(1000)"


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
        "goal": ">= 0.95 of copy",
        "met": "no",
    }
    about = {"gpu": "g", "driver": "d", "torch": "t", "commit": "c" * 40, "kernels": []}
    held = json.dumps({**about, "rows": [row, {**row, "name": "s", "error": "failed: x"}]})
    write = f"import pathlib; pathlib.Path({str(results / 'new.json')!r}).write_text({held!r})"
    python, told = sys.executable, tmp_path / "told"
    monkeypatch.setattr(on_gpu, "RESULTS", results)
    monkeypatch.setattr(on_gpu, "GRACE", 2.0)
    monkeypatch.setattr(on_gpu, "architectures", lambda: "")
    monkeypatch.setattr(
        on_gpu,
        "parts",
        lambda seconds: [
            on_gpu.Part("build", 100, (python, "-c", "pass")),
            on_gpu.Part("bad", 100, (python, "-c", "raise SystemExit(3)")),
            on_gpu.Part("stuck", 2, (python, "-c", STUCK, str(told))),
            on_gpu.Part("stubborn", 1, (python, "-c", STUBBORN)),
            on_gpu.Part("missing", 100, ("no-such-tool",)),
            on_gpu.Part("rows", 100, (python, "-c", write)),
        ],
    )
    monkeypatch.setattr(sys, "argv", ["on_gpu.py"])
    assert on_gpu.main() == 1
    said = capsys.readouterr().out
    made = json.loads((results / "new.json").read_text())
    assert [p["said"] for p in made["parts"]] == [
        "ok", "failed, status 3", "stopped after 2 s", "stopped after 1 s",
        "not run: there is no no-such-tool here", "ok",
    ]  # fmt: skip
    assert told.read_text() == "interrupted"
    assert len(made["rows"]) == 2 and "failed: x" in said and "0.500" in said
    assert "0 of 2 goals are met" in said
    assert json.loads((results / "old.json").read_text()) == {"kernels": []}
    monkeypatch.setattr(
        on_gpu,
        "parts",
        lambda seconds: [
            on_gpu.Part("build", 100, (python, "-c", "raise SystemExit(1)")),
            on_gpu.Part("rows", 100, (python, "-c", "pass")),
        ],
    )
    assert on_gpu.main() == 1 and "not run: part build did not go well" in capsys.readouterr().out


def test_what_the_time_cuts_short_is_no_failure(
    on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parts = [on_gpu.Part(name, 100, (sys.executable, "-c", STUBBORN)) for name in ("one", "two")]
    monkeypatch.setattr(on_gpu, "parts", lambda seconds: parts)
    monkeypatch.setattr(on_gpu, "architectures", lambda: "")
    monkeypatch.setattr(on_gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(on_gpu, "GRACE", 0.5)
    monkeypatch.setattr(on_gpu, "LEAST", 1.0)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--seconds", "2"])
    assert on_gpu.main() == 0
    said = capsys.readouterr().out
    assert "cut short after 2 s: the time was up" in said and "not run: the time was up" in said
