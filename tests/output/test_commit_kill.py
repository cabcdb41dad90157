"""Killed at every call that changes the disk: afterwards the old output, the new one, or none; never a mix.

Each run is a forked child that kills itself (SIGKILL) before or after its n-th call, or halfway
through a write. What a crash of the machine loses of unsynced data is not simulated here; that files
are synced before they count is held by test_writer.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fastckpt.output import syscalls
from fastckpt.output.manifest import Manifest
from fastckpt.verification.outputs import verify
from outputs import contents, write_part, write_whole

CALLS = {
    os: ("pwrite", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "open", "close"),
    syscalls: ("allocate", "exchange"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that was not synced, so syncing only has to be counted."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(syscalls, "start_writeback", lambda fd, offset, nbytes: None)


def killed_at(point: int, how: str, work: Callable[[], object]) -> bool:
    """Run `work` in a child killed at its `point`-th call; whether it was (else it had finished)."""
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        assert status == 0 or os.WIFSIGNALED(status), "the child failed otherwise"
        return status != 0
    code = 1
    try:
        count = 0

        def counted(real: Callable[..., object], name: str) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count != point:
                    return real(*args, **kwargs)
                with suppress(OSError):  # a call that fails on purpose, such as mkdir of what is there
                    if how == "after":
                        real(*args, **kwargs)
                    elif how == "half" and name in ("pwrite", "write"):
                        fd, data, *offset = args
                        real(fd, data[: len(data) // 2], *offset)  # type: ignore[index,arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
                return None

            return call

        for module, names in CALLS.items():
            for name in names:
                setattr(module, name, counted(getattr(module, name), name))
        work()
        code = 0
    finally:
        os._exit(code)


def points(how: str, work: Callable[[], object], step: int) -> Iterator[int]:
    """Every `step`-th kill point, until the work finishes unkilled."""
    point = 1
    while killed_at(point, how, work):
        yield point
        point += step
    assert point > 50, "hardly any call was seen"


def key_of(path: Path) -> str | None:
    """The key of the output there, which must then be sound; None where there is none that claims to be."""
    if not (path / "fastckpt.json").exists():
        return None
    report = verify(path)
    assert report.problems == ()
    return Manifest.read(path).key


STEPS = [pytest.param(23, id="some"), pytest.param(1, id="all", marks=pytest.mark.nightly)]
HOWS = ["before", "after", "half"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", HOWS)
def test_all_ranks_into_nothing(tmp_path: Path, how: str, step: int) -> None:
    out = tmp_path / "out"
    for _ in points(how, lambda: write_whole(out, 1), step):
        if key_of(out) is None:
            assert not out.exists()
        else:
            shutil.rmtree(out)  # only at the last points: make room for the next
    write_whole(tmp_path / "again", 1)
    assert key_of(out) == "key1" and sorted(os.listdir(tmp_path)) == ["again", "out"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", HOWS)
def test_all_ranks_over_an_output(tmp_path: Path, how: str, step: int) -> None:
    """The output is there at every moment, the old or the new."""
    out = tmp_path / "out"
    write_whole(out, 0)
    seen = {"key0"}
    for point in points(how, lambda: write_whole(out, 1, overwrite=True), step):
        key = key_of(out)
        assert key in ("key0", "key1"), point
        seen.add(key)
        if key == "key1":
            write_whole(out, 0, overwrite=True)
    assert key_of(out) == "key1" and os.listdir(tmp_path) == ["out"]
    assert step > 1 or seen == {"key0", "key1"}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("first", [False, True], ids=["last rank", "first rank"])
@pytest.mark.parametrize("over", [None, "whole", "parts"])
def test_a_rank(tmp_path: Path, how: str, step: int, first: bool, over: str | None) -> None:
    """Rank 1 of 2 is killed, before or after rank 0 ran; never whole by mistake; a rerun makes it so."""
    work = tmp_path / "work"

    def fresh() -> Path:
        """Another directory, in the state before."""
        out = work / str(len(os.listdir(work)))
        if over == "whole":
            write_whole(out, 0, world=3)
        elif over == "parts":
            for rank in range(3):
                write_part(out, rank, 0, world=3)
        if not first:
            write_part(out, 0, 1, overwrite=over is not None)
        return out

    work.mkdir()
    (tmp_path / "want").mkdir()
    write_whole(tmp_path / "want", 1)
    want = {n: d for n, d in contents(tmp_path / "want").items() if n != "fastckpt.json"}
    out = fresh()

    def rank_1() -> None:
        write_part(out, 1, 1, overwrite=over is not None)

    for point in points(how, rank_1, step):
        key = key_of(out)
        assert key in (None, "key0", "key1"), point
        if key == "key0":
            assert over is not None and first
        if key is None and out.exists() and contents(out):
            assert not verify(out).ok
        rank_1()
        write_part(out, 0, 1, overwrite=over is not None)
        got = contents(out)
        assert key_of(out) == "key1"
        assert {n: d for n, d in got.items() if not n.startswith("fastckpt")} == want, point
        out = fresh()
