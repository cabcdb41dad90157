"""Batches run by several workers at once.

Law: a worker's error stops all workers and is raised once, in the caller's thread; so does Ctrl-C. The
threads are our own: the standard library's pools refuse work once the main thread has ended, and a run in
another thread, or a save behind the training, is to be finished all the same.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from .errors import WriteError


class Work(Protocol):
    """What a worker does at once: output bytes [start, stop)."""

    @property
    def start(self) -> int:
        """The first byte."""

    @property
    def stop(self) -> int:
        """One past the last."""


Item = TypeVar("Item", bound=Work)
Given = TypeVar("Given")
Made = TypeVar("Made")


AHEAD = 4
"""Batches made ahead of each worker."""


def cores() -> int:
    """How many cores this process may use; those of the machine where the system does not say."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux; a sandbox
        return os.cpu_count() or 1


class _Waiting(Generic[Item]):
    """Batches between the caller that makes them and the workers that run them, by the place they go to.

    A signal may end what the caller does at any moment: it never holds a lock that a worker wants."""

    def __init__(self, room: int, place: Callable[[Item], int]) -> None:
        self._room, self._place = room, place
        # (turn, place, item); None at the end
        self._new: SimpleQueue[tuple[int, int, Item] | None] = SimpleQueue()
        self._less = threading.Lock()  # held, except when there is room again
        self._less.acquire()
        self._workers = threading.Lock()  # of what follows
        self._queues: dict[int, deque[tuple[int, Item]]] = {}  # by place
        self._busy: list[int] = []  # the places of the items that run
        self._made = self._taken = 0

    def put(self, item: Item) -> None:
        """Add one; waits while there is no room. Raises what `place` raises."""
        place = self._place(item)
        while self._made - self._taken >= self._room:
            self._less.acquire()
        self._new.put((self._made, place, item))
        self._made += 1

    def end(self) -> None:
        """No more will come."""
        self._new.put(None)

    def take(self) -> tuple[int, Item] | None:
        """The next item and its place: of those whose place nobody works on, if there are any; None at the
        end. To be followed by `done`."""
        with self._workers:
            while not self._queues or not self._new.empty():
                if (new := self._new.get()) is None:
                    self.end()  # the other workers are to hear it too
                    if not self._queues:
                        return None
                    break
                turn, place, item = new
                self._queues.setdefault(place, deque()).append((turn, item))
            free = [p for p in self._queues if p not in self._busy]
            place = min(free or self._queues, key=lambda p: self._queues[p][0][0])
            _, item = self._queues[place].popleft()
            if not self._queues[place]:
                del self._queues[place]
            self._busy.append(place)
            self._taken += 1
            if self._made - self._taken <= self._room // 2 and self._less.locked():
                self._less.release()  # the caller is not woken for each
            return place, item

    def done(self, place: int) -> None:
        """An item of that place has run."""
        with self._workers:
            self._busy.remove(place)

    def leave(self) -> None:
        """A worker takes no more: from here on there is room for all, since nobody may be left to make it."""
        with self._workers:
            self._room = sys.maxsize
            if self._less.locked():
                self._less.release()


class _Feeding(Generic[Item]):
    """What the workers of one `feed` and its caller tell each other.

    What a signal may interrupt they tell by lists: an Event would keep its lock, and a thread whose join was
    interrupted is taken for one that is over (CPython 3.10 to 3.12)."""

    def __init__(self, waiting: _Waiting[Item], done: Callable[[int], None]) -> None:
        self.waiting, self.done = waiting, done
        self.finished: SimpleQueue[int] = SimpleQueue()  # the bytes of batches that ran
        self.errors: list[BaseException] = []  # of workers
        self.heard: list[BaseException] = []  # by the caller, while the workers end
        self.stop: list[None] = []  # not empty: no batch is run any more
        self.begun: list[None] = []  # one for each worker
        self.ended: list[None] = []
        self.over: SimpleQueue[None] = SimpleQueue()
        self.made = False  # all batches

    def work(self, worker: Callable[[Item], None]) -> None:
        """A worker's thread. Its error is carried to the caller's, which raises it."""
        self.begun.append(None)
        try:
            while (taken := self.waiting.take()) is not None:
                place, batch = taken
                try:
                    if not self.stop:
                        worker(batch)
                        self.finished.put(batch.stop - batch.start)
                except BaseException as error:
                    self.errors.append(error)
                    self.stop.append(None)
                self.waiting.done(place)
        except BaseException as error:  # of the queue itself
            self.errors.append(error)
            self.stop.append(None)
        finally:
            self.waiting.leave()
            self.ended.append(None)
            self.over.put(None)

    def report(self) -> None:
        """Tell `done` of what has run."""
        while not self.finished.empty():
            self.done(self.finished.get())

    def settle(self, threads: int) -> None:
        """Return when no worker runs any more, whatever is raised meanwhile."""
        while True:
            try:
                if self.heard or not self.made:
                    self.stop.append(None)  # from here on one that begins late runs nothing
                self.waiting.end()
                if len(self.ended) == (threads if self.made else len(self.begun)):
                    return
                with suppress(Empty):
                    self.over.get(timeout=0.1)
                self.report()
            except BaseException as error:
                self.heard.append(error)


def feed(
    batches: Iterable[Item],
    workers: Sequence[Callable[[Item], None]],
    done: Callable[[int], None],
    place: Callable[[Item], int] = lambda item: 0,
) -> None:
    """Run every batch on one of the workers; `done` gets each batch's output bytes, in the caller's thread.

    The caller's thread makes the batches (planning) while the workers run them. `place`: where an item is
    written; workers keep to places of their own where they can, since two writers of a file wait for each
    other. Raises the first error of a worker after all have stopped, WriteError where the system starts no
    more threads."""
    feeding = _Feeding(_Waiting(AHEAD * len(workers), place), done)
    threads = [
        threading.Thread(target=feeding.work, args=(w,), name=f"fastckpt-{i}", daemon=True)
        for i, w in enumerate(workers)
    ]
    # No worker may outlive the files and mappings it uses, whatever signals come: one that is raised between
    # the lines of a handler leaves it, so there is a further one for each of Ctrl-C, SIGTERM and SIGHUP.
    try:
        try:
            try:
                for thread in threads:
                    _start(thread, len(threads))
                for batch in batches:
                    if feeding.stop:
                        break
                    feeding.waiting.put(batch)
                    feeding.report()
                feeding.made = True
            finally:
                feeding.settle(len(threads))
        finally:
            feeding.settle(len(threads))
    finally:
        feeding.settle(len(threads))
    for error in (*feeding.heard, *feeding.errors):
        raise error
    feeding.report()


def each(function: Callable[[Given], Made], items: Sequence[Given], threads: int) -> list[Made]:
    """What `function` makes of every item, in order, several at a time.

    Raises the error of the first item that has one, after all have stopped, and else as `feed` does."""
    made: dict[int, Made] = {}
    failed: dict[int, BaseException] = {}

    def work(at: range) -> None:
        if at.start > min(list(failed), default=at.start):
            return
        try:
            made[at.start] = function(items[at.start])
        except BaseException as error:  # carried to the caller's thread, which raises it
            failed[at.start] = error

    feed([range(k, k + 1) for k in range(len(items))], [work] * min(threads, len(items)), lambda _: None)
    if failed:
        raise failed[min(failed)]
    return [made[k] for k in range(len(items))]


def _start(thread: threading.Thread, wanted: int) -> None:
    try:
        thread.start()
    except RuntimeError as e:
        if "start new thread" in str(e):
            raise WriteError(f"threads: {wanted} wanted, the system starts no more ({e})") from None
        # A signal was heard while the new thread was waited for, and its lock is not held any more.
        raise (e.__context__ or e) from None
