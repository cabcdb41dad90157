"""How the ranks of a job agree: each says a JSON value and hears what all of them said.

Law: an exchange ends on every rank with the same answers or with an error, and no rank waits longer than
the timeout. `together` makes a failure of one rank the same failure on all of them.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from ..checkpoint import JSON
from ..digest import digest
from ..errors import (
    DeviceError,
    FastckptError,
    LayoutError,
    ManagerError,
    RecipeError,
    SourceError,
    ViewError,
    WriteError,
    expect,
)
from ..output.filesystem import replace_file

Result = TypeVar("Result")

MEETING = ".fastckpt-meeting"
"""The directory below a root in which ranks without torch.distributed meet."""


class Group(Protocol):
    """The ranks of a job; `exchange` is collective: every rank calls it, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def exchange(self, value: JSON) -> list[JSON]: ...

    def close(self) -> None:
        """Let go of the others; there is no exchange after it."""


class Alone:
    """A job of one rank."""

    rank, world = 0, 1

    def close(self) -> None:
        """There is nobody."""

    def exchange(self, value: JSON) -> list[JSON]:
        """What the one rank said."""
        return [value]


class Distributed:
    """Ranks of torch.distributed, over a gloo group of our own: training's collectives are not disturbed.

    Making one is collective. Raises ManagerError where the ranks do not meet."""

    def __init__(self, timeout: float) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        try:
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        except RuntimeError as e:
            raise ManagerError(f"rank {self.rank} of {self.world}: the ranks did not meet: {e}") from e
        self._group: dist.ProcessGroup | None = group
        self._backend: object = group._get_backend(torch.device("cpu"))

    def exchange(self, value: JSON) -> list[JSON]:
        """What every rank said, by rank. Raises ManagerError where a rank is lost."""
        data = bytearray(json.dumps(value).encode())
        sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.world)]
        try:
            dist.all_gather(sizes, torch.tensor([len(data)], device="cpu"), group=self._group)
            mine = torch.zeros(max(int(n) for n in sizes), dtype=torch.uint8, device="cpu")
            mine[: len(data)] = torch.frombuffer(data, dtype=torch.uint8)
            found = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(found, mine, group=self._group)
        except RuntimeError as e:
            raise ManagerError(f"rank {self.rank} of {self.world}: another rank is lost: {e}") from e
        return [json.loads(bytes(t[: int(n)].numpy().tobytes())) for t, n in zip(found, sizes, strict=True)]

    def close(self) -> None:
        """End the group's threads: one that still frees a tensor when Python ends aborts the process.

        The backend is let go last, since that waits for the threads without the GIL, which freeing a tensor
        takes. With torch 2.6 a group that takes its backend with it holds the GIL, and may wait for ever."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
        del group
        self._backend = None


class Meeting:
    """Ranks that share a file system and nothing else.

    They first find each other: every rank writes a fresh nonce and the nonces it sees, until all have
    seen the same ones. A file of a dead run names other nonces and is never taken for an answer."""

    def __init__(self, root: str, rank: int, world: int, timeout: float, name: str) -> None:
        self.rank, self.world = rank, world
        self._directory = os.path.join(root, MEETING)
        self._timeout, self._name, self._round = timeout, name, 0
        try:
            os.makedirs(self._directory, exist_ok=True)
            for entry in os.listdir(self._directory):
                if entry.startswith((f"{name}-", f".{name}-")) and f"-{rank}.json" in entry:
                    with suppress(FileNotFoundError):
                        os.unlink(os.path.join(self._directory, entry))
            self._session = self._meet()
        except OSError as e:
            raise ManagerError(f"{self._directory}: {e.strerror}") from None

    def exchange(self, value: JSON) -> list[JSON]:
        """What every rank said, by rank. Raises ManagerError where a rank does not answer in time."""
        n, self._round = self._round, self._round + 1
        answers: list[JSON] = []
        pause = _Pause(self._timeout)
        try:
            self._write(f"{self._session}-{n}", value)
            while len(answers) < self.world:
                found = self._read(f"{self._session}-{n}", len(answers))
                if isinstance(found, list):
                    answers.append(found[0])
                elif not pause.more():
                    raise ManagerError(
                        f"rank {self.rank} of {self.world}: rank {len(answers)} did not answer in "
                        f"{self._timeout:g} s"
                    )
        except OSError as e:
            raise ManagerError(
                f"rank {self.rank} of {self.world}: cannot reach the others: {self._directory}: {e.strerror}"
            ) from None
        with suppress(OSError):  # all have answered this round, so all have read the one before
            os.unlink(self._path(f"{self._session}-{n - 1}", self.rank))
        return answers

    def close(self) -> None:
        """What is left in the directory is the next run's to remove."""

    def _meet(self) -> str:
        nonce, said = secrets.token_hex(8), ""
        pause = _Pause(self._timeout)
        while True:
            found = [self._read("hello", r) for r in range(self.world)]
            seen = [str(f[0][0]) if isinstance(f, list) and isinstance(f[0], list) else "" for f in found]
            seen[self.rank] = nonce
            hello: list[JSON] = [nonce, list(seen)]
            if json.dumps(hello) != said:
                self._write("hello", hello)
                said = json.dumps(hello)
            others = [f for r, f in enumerate(found) if r != self.rank]
            if all(isinstance(f, list) and isinstance(f[0], list) and f[0][1] == seen for f in others):
                return digest("".join(seen).encode())
            if not pause.more():
                missing = [r for r, s in enumerate(seen) if not s]
                raise ManagerError(
                    f"{self._directory}: rank {self.rank} met {self.world - len(missing)} of {self.world} "
                    f"ranks in {self._timeout:g} s; missing or not alive: {missing or 'unknown'}"
                )

    def _path(self, what: str, rank: int) -> str:
        return os.path.join(self._directory, f"{self._name}-{what}-{rank}.json")

    def _write(self, what: str, value: JSON) -> None:
        replace_file(self._path(what, self.rank), json.dumps([value]).encode())

    def _read(self, what: str, rank: int) -> JSON:
        """The one-element list a rank wrote; None where it did not, or a crash left it torn in a dead run."""
        try:
            with open(self._path(what, rank), encoding="utf-8") as f:
                found: JSON = json.load(f)
        except (FileNotFoundError, ValueError):
            return None
        return found


class _Pause:
    """Waits longer each time, until the timeout: always about a tenth of what was waited already."""

    def __init__(self, timeout: float) -> None:
        self._end, self._next = time.monotonic() + timeout, 0.001

    def more(self) -> bool:
        """Wait a little; whether there is time left."""
        time.sleep(self._next)
        self._next = min(self._next * 1.1, 0.1)
        return time.monotonic() < self._end


def join(root: str, rank: int | None, world: int | None, timeout: float) -> tuple[Group, Group]:
    """The ranks of this job, twice: for the calling thread, and for saves in the background.

    torch.distributed where it is initialised; else `rank` of `world`, or torchrun's RANK and WORLD_SIZE,
    over the file system; else one rank alone. Raises ManagerError where the ranks do not meet, or there can
    be no such rank, FastckptError for an argument of another type."""
    for name, number in (("rank", rank), ("world", world)):
        expect(name, number, int, type(None))
    expect("timeout", timeout, int, float)
    if not timeout > 0:
        raise ManagerError(f"timeout: wanted seconds above 0, got {timeout}")
    if dist.is_available() and dist.is_initialized():
        if rank not in (None, dist.get_rank()) or world not in (None, dist.get_world_size()):
            raise ManagerError(
                f"rank {rank} of {world} was asked for, torch.distributed says {dist.get_rank()} of "
                f"{dist.get_world_size()}"
            )
        return _twice(lambda name: Distributed(timeout) if dist.get_world_size() > 1 else Alone())
    if world is None and rank is None:
        rank, world = _launched()
    if rank is None or world is None:
        raise ManagerError(f"rank {rank} of {world}: give both or none")
    if not 0 <= rank < world:
        raise ManagerError(f"rank {rank} of {world}: wanted a rank from 0 on and below the world")
    if world == 1:
        return Alone(), Alone()
    return _twice(partial(Meeting, root, rank, world, timeout))


def _twice(make: Callable[[str], Group]) -> tuple[Group, Group]:
    """Two groups, or none: one that is left over would keep its threads and sockets."""
    first = make("main")
    try:
        return first, make("save")
    except BaseException:
        first.close()
        raise


def _launched() -> tuple[int, int]:
    """torchrun's RANK and WORLD_SIZE; one rank alone where neither is set. Raises ManagerError."""
    rank, world = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
    if rank is None and world is None:
        return 0, 1
    if rank is None or world is None or not rank.isdecimal() or not world.isdecimal():
        raise ManagerError(
            f"RANK={rank}, WORLD_SIZE={world} in the environment: wanted two numbers or neither"
        )
    return int(rank), int(world)


_KINDS: tuple[type[FastckptError], ...] = (
    ManagerError, WriteError, LayoutError, RecipeError, ViewError, DeviceError, SourceError,
)  # fmt: skip
"""Errors that keep their class across ranks. Of several ranks' errors, the first class here is raised."""


def together(group: Group, what: str, work: Callable[[], JSON], *, at: str = "") -> list[JSON]:
    """Do `work` on every rank; its results by rank, or the same class of error on all of them.

    `what` names the work in messages. With `at` it also says where a rank is: the answer of a rank that is
    elsewhere is not taken, and is an error. Raises the first class of _KINDS that a rank failed with; an
    error of another kind is a ManagerError."""
    value: JSON = None
    error: Exception | None = None
    try:
        value = work()
    except Exception as e:  # of the job's own state_dict too: whatever it is, the others wait to hear it
        error = e
    kind = None if error is None else next((k for k, c in enumerate(_KINDS) if isinstance(error, c)), 0)
    here = f"{what} {at}"
    said = None if error is None else str(error)
    if not isinstance(error, (FastckptError, OSError, type(None))):
        said = f"{type(error).__name__}: {error}"  # its text alone may say little
    answers = group.exchange([here, value, kind, said])
    values: list[JSON] = []
    failed: list[tuple[int, int, str]] = []
    for rank, answer in enumerate(answers):
        match answer:
            case [there, answered, None, None] if there == here:
                values.append(answered)
            case [there, _, int(k), str(message)] if there == here:
                failed.append((k, rank, message))
            case [str(there), *_]:
                raise ManagerError(f"rank {group.rank} is at {here.strip()}, rank {rank} at {there.strip()}")
            case _:
                raise ManagerError(f"{what}: rank {rank} answered {answer!r}")
    if failed:
        k, rank, message = min(failed)
        where = f"rank {rank}: " if group.world > 1 else ""
        raise _KINDS[k](f"{what}: {where}{message}") from error
    return values


def by_some(group: Group, what: str, mine: bool, work: Callable[[], Result]) -> Result | None:
    """Do `work` on the ranks whose `mine` is true; the others wait for it, and share its error as in
    `together`. This rank's result, None where it did nothing."""
    result: Result | None = None

    def part() -> JSON:
        nonlocal result
        if mine:
            result = work()
        return None

    together(group, what, part)
    return result
