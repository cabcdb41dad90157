"""Killed at every call that changes the disk: the newest commit that was reported stands and is resumed.

Each run is a forked child that kills itself (SIGKILL) before or after its n-th call, or halfway through a
write, while old commits are being removed. What a crash of the machine loses is not simulated."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fastckpt import syscalls
from fastckpt.manager.manager import CheckpointManager
from fastckpt.verification import verify

CALLS = {
    os: ("pwrite", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "open", "close"),
    shutil: ("rmtree",),
    syscalls: ("allocate", "exchange"),
}
HOWS = ["before", "after", "half"]
STEPS = 4


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that was not synced, so syncing only has to be counted."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def state(step: int, rank: int = 0) -> dict[str, object]:
    return {
        "x": torch.full((50,), step * 2 + rank, dtype=torch.int32),
        "all": torch.arange(9) + step,
        "step": step,
    }


def train(
    root: Path,
    said: int,
    *,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
    background: bool = False,
    timeout: float = 60.0,
) -> None:
    """Save STEPS steps, telling `said` of each that `save` (or `wait`) reported."""
    manager = CheckpointManager(
        root, rank=rank, world=world, timeout=timeout, max_to_keep=2, async_save=background
    )
    with manager:
        for step in range(first, first + STEPS):
            manager.save(step, state(step, rank))
            if background:
                manager.wait()
            os.write(said, bytes([step]))


def kill_at(point: int, how: str) -> None:
    """Let this process die at its `point`-th call."""
    count = 0

    def counted(real: Callable[..., object], name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count != point:
                return real(*args, **kwargs)
            if how == "after":
                with suppress(OSError):
                    real(*args, **kwargs)
            elif how == "half" and name == "pwrite":
                fd, data, offset = args
                real(fd, data[: len(data) // 2], offset)  # type: ignore[index,arg-type]
            elif how == "half" and name == "rmtree":
                path = Path(str(args[0]))
                for file in sorted(p for p in path.rglob("*") if p.is_file())[:2]:
                    os.remove(file)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return call

    for module, names in CALLS.items():
        for name in names:
            setattr(module, name, counted(getattr(module, name), name))


def child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its id."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def reported(pipe: int) -> int:
    """The last step that was told of; -1: none."""
    os.set_blocking(pipe, False)
    last = -1
    try:
        while data := os.read(pipe, 64):
            last = max(last, *data)
    except BlockingIOError:
        pass
    return last


def judge(root: Path, last: int, point: int, rank: int = 0, world: int = 1) -> int:
    """What stands is whole and the newest is at least what was reported; the newest step, -1: none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with CheckpointManager(root, rank=0, world=1) as manager:
            steps = manager.steps()
            assert steps == manager.listed(), point  # nothing that is named a step is broken
            for step in steps:
                assert verify(manager.path(step)).problems == (), point
            newest = steps[-1] if steps else -1
            assert newest >= last and len(steps) <= 3, point
            if world == 1 and newest >= 0:
                found = manager.restore()
                assert isinstance(found, dict) and found["step"] == newest
                assert torch.equal(found["x"], state(newest)["x"]), point  # type: ignore[arg-type]
                assert torch.equal(found["all"], state(newest)["all"]), point  # type: ignore[arg-type]
    return newest


@pytest.mark.parametrize(
    "stride", [pytest.param(23, id="some"), pytest.param(1, id="all", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("how", HOWS)
def test_one_rank(tmp_path: Path, how: str, background: bool, stride: int) -> None:
    point, lost = 1, 0
    while True:
        root = tmp_path / str(point)
        out, said = os.pipe()

        def work(point: int = point, root: Path = root, said: int = said) -> None:
            kill_at(point, how)
            train(root, said, background=background)

        status = os.waitpid(child(work), 0)[1]
        last = reported(out)
        os.close(out)
        os.close(said)
        if status == 0:
            break
        assert os.WIFSIGNALED(status), "the child failed otherwise"
        newest = judge(root, last, point)
        lost += newest > last
        with CheckpointManager(root, max_to_keep=2) as manager:  # goes on, and leaves nothing torn
            manager.save(newest + 1, state(newest + 1))
            assert manager.latest() == newest + 1
            assert len(manager.steps()) <= 2
        hidden = {e for e in os.listdir(root) if e.startswith((".saving", ".trash"))}
        assert not hidden, point
        shutil.rmtree(root)
        point += stride
    assert point > 100, "hardly any call was seen"
    assert stride > 1 or lost, "no kill fell between a commit and its report"


@pytest.mark.parametrize(
    "stride", [pytest.param(101, id="some"), pytest.param(5, id="many", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_ranks(tmp_path: Path, victim: int, stride: int) -> None:
    point = 7
    while True:
        root = tmp_path / str(point)
        out, said = os.pipe()

        def work(rank: int, point: int = point, root: Path = root, said: int = said) -> None:
            if rank == victim:
                kill_at(point, "before")  # and the other waits a second for it
            train(root, said, rank=rank, world=2, timeout=1.0)

        pids = [child(lambda rank=rank: work(rank)) for rank in range(2)]  # type: ignore[misc]
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        last = reported(out)
        os.close(out)
        os.close(said)
        if statuses == [0, 0]:
            break  # else one was killed; or, on a busy machine, they gave up on each other: judged alike
        newest = judge(root, last, point, world=2)
        out, said = os.pipe()
        again = [
            child(lambda rank=rank: train(root, said, first=newest + 1, rank=rank, world=2))  # type: ignore[misc]  # noqa: B023
            for rank in range(2)
        ]
        assert [os.waitpid(pid, 0)[1] for pid in again] == [0, 0], point
        os.close(out)
        os.close(said)
        assert judge(root, newest + STEPS, point, world=2) == newest + STEPS
        point += stride
    assert point > 60, "hardly any call was seen"
