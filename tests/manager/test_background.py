"""Saves behind the training: what they hold, when they end, and who hears of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.errors import ManagerError, WriteError
from fastckpt.manager import policies, saving
from fastckpt.manager.commits import Store
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.pieces import Snapshots


def test_async_saves_what_was_there_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    real = saving._Save._claim

    def held(self: saving._Save) -> Any:
        assert go.wait(60)
        return real(self)

    monkeypatch.setattr(saving._Save, "_claim", held)
    x = torch.zeros(1000)
    with CheckpointManager(tmp_path, async_save=True) as manager:
        assert manager.save(0, {"x": x})
        x += 1
        assert manager.steps() == []  # still in flight
        go.set()
        manager.wait()
        assert manager.steps() == [0]
        manager.save(1, {"x": x})
        x += 1
        assert manager.restore(0)["x"].unique().tolist() == [0.0]  # type: ignore[index]
        assert manager.restore(1)["x"].unique().tolist() == [1.0]  # type: ignore[index]


def test_saves_in_and_out_of_inference_mode(tmp_path: Path) -> None:
    """Host buffers are used again, whatever mode they were made in."""
    with CheckpointManager(tmp_path, async_save=True) as manager:
        for step in range(3):
            with torch.inference_mode(step % 2 == 0):
                manager.save(step, {"x": torch.full((1000,), step)})
            manager.wait()
        assert [manager.restore(k)["x"].unique().tolist() for k in range(3)] == [[0], [1], [2]]  # type: ignore[index]


class On0(torch.Tensor):
    """A tensor that says it lies on an accelerator."""

    device = torch.device("xpu", 0)


class On1(torch.Tensor):
    """One on another."""

    device = torch.device("xpu", 1)


def test_a_snapshot_waits_for_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one need not be where a tensor lies: what is on its way from there would be saved."""
    waited: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: waited.append(str(device)))
    held = {"a": torch.ones(3).as_subclass(On1), "b": torch.ones(4).as_subclass(On0), "c": torch.ones(5)}
    taken = Snapshots().take(held, copy=True)
    assert sorted(waited) == ["xpu:0", "xpu:1"] and set(taken.buffers) == {"a", "b", "c"}


FORGETFUL = """
import sys, time, torch
from concurrent.futures import thread
from fastckpt import CheckpointManager
from fastckpt.manager import saving

def late(pieces):
    while not thread._shutdown:  # Python waits for us from here on
        time.sleep(0.01)
    if sys.argv[2] == "fail":
        raise OSError("the disk is gone")
    return [[piece] for piece in pieces]  # files of their own, written by several threads

saving._groups = late
CheckpointManager(sys.argv[1], async_save=True).save(3, {"a": torch.arange(9), "b": torch.ones(3)})
"""


@pytest.mark.parametrize("how", ["whole", "fail"])
def test_a_save_that_nobody_waited_for_is_finished_or_told(tmp_path: Path, how: str) -> None:
    """The program ends right after `save`; the standard library's pools take no more work by then."""
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL, tmp_path, how], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    with CheckpointManager(tmp_path) as manager:
        if how == "fail":
            assert "CheckpointWarning: in the background: save of step 3: the disk is gone" in done.stderr
            assert manager.steps() == []
        else:
            assert done.stderr == "" and manager.restore()["a"].tolist() == list(range(9))  # type: ignore[index]


def test_saves_as_often_as_the_disk_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that goes on is no reason to wait: the steps meanwhile are not saved."""
    go, real = threading.Event(), saving.save

    def slow(*args: Any) -> Any:
        assert go.wait(60)
        return real(*args)

    monkeypatch.setattr(saving, "save", slow)
    with CheckpointManager(tmp_path, async_save=True, save_when=policies.idle()) as manager:
        assert [manager.save(step, {"n": step}) for step in range(3)] == [True, False, False]
        go.set()
        while manager._background.busy:
            time.sleep(0.01)
        assert manager.save(3, {"n": 3}) and manager.wait() is None
        assert manager.steps() == [0, 3]


def test_a_fork_has_neither_the_lock_nor_the_save_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may read, is refused while its parent saves, and saves once the parent is done."""

    def fork(work: Callable[[], None]) -> int:
        pid = os.fork()
        if not pid:
            signal.alarm(120)  # a child that waits for a thread it does not have
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    manager = CheckpointManager(tmp_path, async_save=True)
    manager.save(0, {"w": torch.zeros(3)})
    manager.wait()
    reached, go = threading.Event(), threading.Event()
    seal = Store.seal

    def late(*args: Any, **options: Any) -> object:
        reached.set()
        assert go.wait(120)
        return seal(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "seal", late)
        manager.save(1, {"w": torch.ones(3)})
        assert reached.wait(120)  # the thread that is forked away holds nothing now

    def refused() -> None:
        assert manager.restore(0) is not None
        with pytest.raises(ManagerError, match="another process saves here"):
            manager.save(2, {})
            manager.wait()
        manager.close()

    def alone() -> None:
        with CheckpointManager(tmp_path) as another:
            another.save(2, {})

    assert fork(refused) == 0
    go.set()
    manager.close()
    assert manager.steps() == [0, 1]
    assert fork(alone) == 0 and manager.steps() == [0, 1, 2]


def test_async_errors_come_with_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path, async_save=True) as manager:
        with monkeypatch.context() as patch:

            def broken(*args: object) -> None:
                raise OSError(5, "Input/output error")

            patch.setattr(os, "pwrite", broken)
            assert manager.save(0, {"x": torch.ones(1)})
            with pytest.raises(WriteError, match="Input/output error"):
                manager.save(1, {"x": torch.ones(1)})
        assert manager.save(2, {"x": torch.ones(1)})
        manager.wait()
        assert manager.steps() == [2]


def test_without_a_thread_a_save_is_not_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refusals = threading.Thread.start, [9]

    def few(thread: threading.Thread) -> None:
        refusals[0] -= 1
        if refusals[0] >= 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    with CheckpointManager(tmp_path, async_save=True) as manager:
        with pytest.raises(WriteError, match="the system starts no more"):
            manager.save(1, {"w": torch.ones(2)})
        assert manager.steps() == []
        refusals[0] = 1
        assert manager.save(1, {"w": torch.ones(2)}) and not manager.in_flight
        assert manager.steps() == [1]
        assert manager.save(2, {"w": torch.zeros(2)}) and manager.in_flight
        assert manager.restore()["w"].tolist() == [0.0, 0.0]  # type: ignore[index]
        assert manager.restore(1)["w"].tolist() == [1.0, 1.0]  # type: ignore[index]
