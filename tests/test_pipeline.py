"""Workers end before `feed` does, whatever is raised in between."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastckpt import pipeline
from fastckpt.errors import SourceError, WriteError
from fastckpt.pipeline import each, feed

BATCHES = [SimpleNamespace(start=0, stop=n) for n in range(1, 9)]


def workers(state, count=2):
    """Workers that note when they run, and fail if the caller is gone."""

    def run(batch):
        state["running"] += 1
        time.sleep(0.4 if batch.stop == 2 else 0.05)
        state["late"] += state["over"]
        state["running"] -= 1

    return [run] * count


@pytest.fixture
def state():
    return {"running": 0, "late": 0, "over": False}


def test_every_batch_is_run_and_told(state):
    told = []
    feed(BATCHES, workers(state, 3), told.append)
    assert sorted(told) == list(range(1, 9))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_the_last_batches_run_waits_for_them(state, error):
    """A worker that outlived `feed` would read closed mappings and write to descriptors of others."""
    heard = []

    def interrupted(nbytes):
        heard.append(nbytes)
        raise error

    with pytest.raises(error):
        feed(BATCHES[:2], workers(state), interrupted)
    state["over"] = True
    assert heard and state["running"] == 0
    time.sleep(0.5)
    assert state["late"] == 0


def test_an_error_of_a_worker_is_raised_once(state):
    def broken(batch):
        raise SourceError(f"batch {batch.stop}")

    with pytest.raises(SourceError, match="batch"):
        feed(BATCHES, [broken, *workers(state)], lambda n: None)
    assert state["running"] == 0


def test_each_keeps_the_order_and_raises_the_first_items_error():
    ran = []

    def work(n):
        time.sleep(0.05 if n == 3 else 0)
        ran.append(n)
        if n in (3, 4):
            raise SourceError(f"item {n}")
        return -n

    assert each(work, range(3), 7) == [0, -1, -2]
    assert each(work, [], 2) == []
    ran.clear()
    with pytest.raises(SourceError, match="item 3"):  # 4 fails before it, in time
        each(work, range(200), 4)
    assert {0, 1, 2, 3} <= {*ran}


AFTER = """
import sys, threading, time
import fastckpt
import torch  # needed without the compiled module, and cannot be imported so late

def late(source, out):
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    fastckpt.reshard(source, out=out, tp=2, threads=2)
    print(fastckpt.verify(out).ok)

threading.Thread(target=late, args=sys.argv[1:]).start()
"""


def test_a_run_may_end_after_the_main_thread(tmp_path):
    source = Path(__file__).parent / "fixtures" / "z3-llama-w2-even"
    command = [sys.executable, "-c", AFTER, source, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_threads_that_do_not_start(state, monkeypatch):
    start, left = threading.Thread.start, [1]

    def few(thread):
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    before = threading.active_count()
    with pytest.raises(WriteError, match="3 wanted"):
        feed(BATCHES, workers(state, 3), lambda n: None)
    assert threading.active_count() == before


def test_a_place_that_is_not_told_ends_the_run(state):
    def place(batch):
        if batch.stop > 4:
            raise SourceError(f"no place for {batch.stop}")
        return 0

    with pytest.raises(SourceError, match="no place for 5"):
        feed(BATCHES, workers(state), lambda n: None, place)
    assert state["running"] == 0


@pytest.mark.parametrize("left", [0, 1])
def test_workers_that_end_by_themselves_end_the_run(state, monkeypatch, left):
    """Whoever makes more batches than there is room for waited for ever, with nobody to make room."""
    take, going = pipeline._Waiting.take, [None] * (2 - left)

    def ending(waiting):
        if going:
            going.pop()
            raise MemoryError("a worker's own")
        return take(waiting)

    monkeypatch.setattr(pipeline._Waiting, "take", ending)
    many = [SimpleNamespace(start=0, stop=n) for n in range(1, 40)]
    with pytest.raises(MemoryError, match="a worker's own"):
        feed(many, workers(state), lambda n: None)
    assert state["running"] == 0


def test_workers_keep_to_files_of_their_own():
    """Two writers of one file wait for each other; where only one file is left, they share it."""
    waiting = pipeline._Waiting(8, lambda item: ord(item[0]))
    for item in ["a1", "a2", "b1", "a3"]:
        waiting.put(item)
    waiting.end()
    (first, a1), (_, b1) = waiting.take(), waiting.take()
    assert (a1, b1) == ("a1", "b1")
    waiting.done(first)
    assert [waiting.take()[1] for _ in range(2)] == ["a2", "a3"]
    assert waiting.take() is None


class Stop(BaseException):
    """What a handler raises."""


@pytest.fixture
def alarm():
    """`alarm(seconds)` raises Stop in the main thread, once; seconds are real time."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are heard in the main thread")

    def heard(number, frame):
        raise Stop

    before, interval = signal.signal(signal.SIGALRM, heard), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.setswitchinterval(interval)


@pytest.fixture
def several(alarm, monkeypatch):
    """`several(seconds, between)` raises Stop three times at most, and in `feed` alone."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)  # also in destructors
    left = [0]

    def heard(number, frame):
        while frame is not None and frame.f_code is not feed.__code__:
            frame = frame.f_back
        if frame is not None and left[0]:
            left[0] -= 1
            if left[0] == 0:
                signal.setitimer(signal.ITIMER_REAL, 0)
            raise Stop

    def ring(seconds, between):
        left[0] = 3
        signal.setitimer(signal.ITIMER_REAL, seconds, between)

    signal.signal(signal.SIGALRM, heard)
    return ring


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # heard in a destructor
def test_a_signal_at_any_moment(alarm):
    """What its handler raises comes out as it is, no worker runs on, and none waits for ever."""
    dice, ended = random.Random(5), 0
    many = [SimpleNamespace(start=0, stop=n) for n in range(1, 3000)]
    for _ in range(100):
        running = [0]

        def run(batch, running=running):
            running[0] += 1
            running[0] -= 1

        try:
            alarm(dice.uniform(1e-4, 0.02))
            feed(many, [run], lambda n: None)
            time.sleep(0.1)  # a late one is heard here
        except Stop:
            ended += 1
        assert running == [0]
        for thread in [t for t in threading.enumerate() if t.name.startswith("fastckpt-") and t.is_alive()]:
            thread.join(60)  # was just being started; it finds nothing to do
            assert not thread.is_alive()
    assert ended > 50


@pytest.mark.nightly
def test_three_signals_on_each_others_heels(several):
    """A terminal that closes sends several: the next handler may raise between the lines of an `except`."""
    dice, ended = random.Random(7), 0
    many = [SimpleNamespace(start=0, stop=n) for n in range(1, 3000)]
    for _ in range(100):
        running = [False, False]

        def run(batch, k, running=running):
            running[k] = True
            time.sleep(1e-4)
            running[k] = False

        several(dice.uniform(1e-4, 0.02), dice.uniform(2e-4, 1e-3))
        try:
            feed(many, [partial(run, k=0), partial(run, k=1)], lambda n: None)
        except Stop:
            ended += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert running == [False, False]
    assert ended > 50


def test_a_signal_heard_while_a_thread_is_started_comes_out_as_it_is(monkeypatch):
    """Thread.start waits for the new thread; a handler that raises there leaves its lock released."""

    def interrupted(thread):
        try:
            raise Stop
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(Stop):
        feed([SimpleNamespace(start=0, stop=1)], [lambda batch: None], lambda n: None)


def test_a_system_that_tells_no_cores(monkeypatch):
    def refused(pid):
        raise PermissionError

    assert pipeline.cores() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", refused)
    assert pipeline.cores() == os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert pipeline.cores() == os.cpu_count()
