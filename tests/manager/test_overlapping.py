"""Calls of one manager that overlap, by threads or an interrupt: each commit holds its own step's values."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from fastckpt.manager import saving
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.metadata import Took
from fastckpt.manager.pieces import Snapshots, raw


@pytest.fixture(autouse=True)
def hurried() -> Iterator[None]:
    """Threads take turns often, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def state(step: int) -> dict[str, object]:
    return {"step": step, "w": {str(k): torch.full((3000 + k,), float(step)) for k in range(4)}}


def is_of(step: int, found: object) -> bool:
    assert isinstance(found, dict)
    wanted = state(step)["w"]
    assert isinstance(wanted, dict)
    return found["step"] == step and all(torch.equal(found["w"][k], w) for k, w in wanted.items())


@pytest.mark.filterwarnings("ignore:step .* is older than")
@pytest.mark.parametrize("behind", [False, True], ids=["sync", "async"])
def test_threads_save_with_one_manager(tmp_path: Path, behind: bool) -> None:
    failed: list[BaseException] = []

    def work(manager: CheckpointManager, first: int) -> None:
        try:
            for step in range(first, first + 6):
                assert manager.save(step, state(step))
                found = manager.restore()
                assert isinstance(found, dict) and is_of(found["step"], found)
        except BaseException as e:
            failed.append(e)

    with CheckpointManager(tmp_path, async_save=behind, durable=False) as manager:
        threads = [threading.Thread(target=work, args=(manager, 100 * k)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed, failed
    with CheckpointManager(tmp_path) as manager:
        assert len(manager.steps()) == 18
        assert all(is_of(step, manager.restore(step)) for step in manager.steps())


def test_an_interrupt_ends_the_waiting_and_not_the_save(tmp_path: Path, held: threading.Event) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with CheckpointManager(tmp_path, async_save=True) as manager:
        manager.save(1, state(1))
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                manager.wait()
        finally:
            signal.signal(signal.SIGALRM, before)
        assert manager.in_flight and manager.steps() == []
        threading.Timer(0.1, held.set).start()
        manager.save(2, state(2))
        manager.wait()
        assert not manager.in_flight
        assert is_of(1, manager.restore(1)) and is_of(2, manager.restore(2))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Saves begin once this is set."""
    release = threading.Event()
    real: Callable[..., Took] = saving.save

    def late(*args: object) -> Took:
        assert release.wait(60)
        return real(*args)

    monkeypatch.setattr(saving, "save", late)
    yield release
    release.set()


def test_a_buffer_is_used_again_only_when_it_was_given_back() -> None:
    snapshots, a, b = Snapshots(), torch.zeros(5), torch.ones(5)
    first = snapshots.take({"w": a}, copy=True)
    second = snapshots.take({"w": b}, copy=True)
    at = [taken.pieces["w"].data.data_ptr() for taken in (first, second)]
    assert at[0] != at[1] and a.data_ptr() not in at and b.data_ptr() not in at
    assert raw(first.pieces["w"].data).tobytes() == raw(a).tobytes()
    snapshots.give_back(second)
    assert snapshots.take({"w": a}, copy=True).pieces["w"].data.data_ptr() == at[1]
