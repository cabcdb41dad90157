"""Signals on each other's heels: nothing of the run stays, and handlers are as before."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from fastckpt.output import signals
from fastckpt.output.writer import Output

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def handlers():
    """Those of the command line, under which no signal ends the process itself."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are heard in the main thread")
    before = [signal.getsignal(number) for number in ALL]
    found = [signal.default_int_handler, signals.unwind, signals.unwind]
    for number, handler in zip(ALL, found, strict=True):
        signal.signal(number, handler)
    yield found
    for number, handler in zip(ALL, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("third", [*ALL, None])
@pytest.mark.parametrize("second", ALL)
@pytest.mark.parametrize("call", range(7))
def test_three_signals(tmp_path, monkeypatch, handlers, second, third, call):
    """The first ends the run; the others come as it leaves, right after changes of handlers."""
    coming = [s for s in (second, third) if s is not None]
    done, change = [], signal.signal

    def changed(number, handler):
        before = change(number, handler)
        done.append(number)
        if len(done) > call and coming:
            signal.raise_signal(coming.pop(0))
        return before

    raised = pytest.raises((SystemExit, KeyboardInterrupt))
    with raised, Output(tmp_path / "out", key="k", durable=False) as out:
        out.text("a", b"1")
        monkeypatch.setattr(signals.signal, "signal", changed)
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.undo()
    assert len(done) >= 4
    assert [signal.getsignal(number) for number in ALL] == handlers
    assert os.listdir(tmp_path) == []
