"""The cycle collector's pause: it ends, for threads together and in forked processes too."""

from __future__ import annotations

import gc
import os
import warnings
from threading import Event, Thread

import pytest
from fastckpt.collector import paused


def in_a_fork() -> bool:
    """Whether a process forked here collects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which this is about
        child = os.fork()
    if not child:
        os._exit(int(gc.isenabled()))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("was", [True, False])
def test_it_is_after_as_it_was_before(was: bool) -> None:
    (gc.enable if was else gc.disable)()
    try:
        with paused(), paused():
            assert not gc.isenabled()
        assert gc.isenabled() == was == in_a_fork()
    finally:
        gc.enable()


def test_a_fork_beside_a_thread_that_pauses_collects() -> None:
    """As DataLoader forks its workers while another thread loads: they would never collect again."""
    began, end = Event(), Event()

    def pause() -> None:
        with paused():
            began.set()
            end.wait()

    thread = Thread(target=pause)
    thread.start()
    try:
        began.wait()
        assert not gc.isenabled()
        assert in_a_fork()
    finally:
        end.set()
        thread.join()
    assert gc.isenabled()
