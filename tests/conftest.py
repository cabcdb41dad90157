"""What every test may use: real checkpoints, made once and kept."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from fastckpt.running import runs
from skips import by_reason

TESTS = Path(__file__).parent
MAKER = TESTS / "real" / "make_zero.py"
TRIES = 3
"""How often it is run: its processes meet at a port that another program may take, or abort as they end."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every program that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

runs.SMALL = 0  # small tensors take the road of large ones

skipped_without_deepspeed: list[str] = []


def version(package: str) -> str | None:
    """The installed version of a package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@pytest.fixture(scope="session", autouse=True)
def plans_kept_here(tmp_path_factory):
    """Plans are kept for the tests that run now, and not among the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCKPT_CACHE", str(tmp_path_factory.mktemp("plans")))
        yield


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """(folder, name) -> where what tests/fixtures/FOLDER/NAME.tar.xz holds lies."""
    root = tmp_path_factory.mktemp("packed")

    @functools.cache
    def at(folder, name):
        with tarfile.open(TESTS / "fixtures" / folder / f"{name}.tar.xz") as tar:
            tar.extractall(root / folder)
        return root / folder / name

    return at


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The directory of "kept/NAME" or "made/NAME" (see real/checkpoints.py); making needs DeepSpeed.

    Everything that the selected tests will ask for is made in one go."""
    key = hashlib.sha256(MAKER.read_bytes())
    for package in ("torch", "transformers", "deepspeed"):
        key.update(f"{package}=={version(package)};".encode())
    cache = Path(request.config.cache.mkdir(f"zero-{key.hexdigest()[:12]}"))
    asked: set[str] = set()
    for item in request.session.items:
        call = getattr(item, "callspec", None)
        names = call.params.values() if call else ()
        asked.update(n.removeprefix("made/") for n in names if isinstance(n, str) and n.startswith("made/"))

    def find(name: str) -> Path:
        kind, _, run = name.partition("/")
        if kind == "kept":
            return TESTS / "fixtures" / run
        if version("deepspeed") is None:
            skipped_without_deepspeed.append(name)
            pytest.skip("deepspeed is not installed")
        if (cache / run).exists():
            return cache / run
        with open(cache / ".lock", "wb") as lock:  # another worker of these tests makes them for us
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in reversed(range(TRIES)):
                missing = sorted(n for n in asked | {run} if not (cache / n).exists())
                if not missing:
                    break
                env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
                command = [sys.executable, str(MAKER), "--out", str(cache), *missing]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                if done.returncode and not left:
                    raise RuntimeError(f"{MAKER.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        return cache / run

    return find


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not proved is said aloud: the skips by reason, and those that weaken the run most."""
    if folded := by_reason(terminalreporter.stats.get("skipped", ())):
        terminalreporter.section("not run here: tests or whole files, and why")
        for line in folded:
            terminalreporter.line(line)
    if skipped_without_deepspeed:
        count = len(skipped_without_deepspeed)
        terminalreporter.section("deepspeed is not installed", sep="!", red=True, bold=True)
        terminalreporter.line(f"{count} tests on checkpoints of this machine's DeepSpeed were skipped.")
        terminalreporter.line("Those on the committed ones (tests/fixtures) ran.")
