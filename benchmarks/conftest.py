"""Options and inputs of the benchmarks; what a run's JSON keeps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import inputs
import pytest
import table
from fastckpt.output.files import parse_size
from machine import deepspeed, machine
from measure import Bench, Row


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastckpt")
    group.addoption(
        "--size", default="64MiB", help="fp32 masters of the large input (default 64MiB; 1GiB is the table's)"
    )
    group.addoption(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of the file roads"
    )
    group.addoption(
        "--writer",
        choices=("auto", "deepspeed", "formulas"),
        default="auto",
        help="who writes the large input: auto is DeepSpeed from 512 MiB on, where it is installed",
    )
    group.addoption(
        "--dir", type=Path, help="where inputs are kept and outputs made (default: pytest's cache)"
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["FASTCKPT_CACHE"] = "off"  # a kept plan would hide planning; the rows on it turn it on


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> int:
    return parse_size(request.config.getoption("--size"))


@pytest.fixture(scope="session")
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--threads"))


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest) -> Path:
    told = request.config.getoption("--dir")
    out = Path(request.config.cache.mkdir("inputs")) if told is None else told.resolve()
    out.mkdir(parents=True, exist_ok=True)
    return out


@pytest.fixture
def work(folder: Path) -> object:
    """A directory for outputs, on the file system of the inputs, removed after."""
    out = folder / "work"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    yield out
    shutil.rmtree(out)


@pytest.fixture(scope="session")
def large(request: pytest.FixtureRequest, folder: Path, size: int) -> inputs.Input:
    writer = request.config.getoption("--writer")
    if writer == "deepspeed" and deepspeed() is None:
        raise pytest.UsageError("--writer deepspeed: it is not installed")
    real = writer == "deepspeed" or (writer == "auto" and size >= 512 << 20)
    return inputs.large(folder, size, deepspeed() if real else None)


@pytest.fixture(scope="session")
def sharded(folder: Path, size: int) -> inputs.Input:
    return inputs.sharded(folder, size)


@pytest.fixture(scope="session")
def boxes(folder: Path, size: int) -> inputs.Input:
    return inputs.boxes(folder, 64 if size >= 512 << 20 else 8)


@pytest.fixture(scope="session")
def small(folder: Path, size: int) -> inputs.Input:
    return inputs.small(folder, 100_000 if size >= 512 << 20 else 5_000)


@pytest.fixture(scope="session")
def peer() -> None:
    """Skips where DeepSpeed, the peer, is missing; torch.load needs it for the pickles too."""
    if deepspeed() is None:
        pytest.skip("deepspeed is not installed")


@pytest.fixture(params=["large", "small"])
def either(request: pytest.FixtureRequest) -> inputs.Input:
    """Few large tensors, then many small ones."""
    return request.getfixturevalue(request.param)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: object, output_json: dict[str, object]
) -> None:
    """Keep the rows, the machine and the commit: nothing that names a host or a path."""
    commit = output_json["commit_info"]
    assert isinstance(commit, dict)
    kept = {
        "date": str(output_json["datetime"])[:16],
        "commit": {key: commit.get(key) for key in ("id", "dirty")},
        "machine": output_json["machine_info"],
        "options": {name: config.getoption(f"--{name}") for name in ("size", "threads", "writer")},
        "rows": [b["extra_info"] for b in output_json["benchmarks"]],  # type: ignore[attr-defined]
    }
    output_json.clear()
    output_json.update(kept)


@pytest.fixture
def bench(benchmark: object, request: pytest.FixtureRequest) -> Bench:
    """Measures rows and prints each as it comes."""
    plugins = request.config.pluginmanager
    reporter, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")

    def tell(row: Row) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write_line("\n" + table.line(row))

    return Bench(benchmark, tell)
