"""The program under test: a job that saves, overwrites and cleans; and the judge of what it left behind.

The judge shares nothing with the manager but the manager's own reading: what must stand it knows from what
the program reported and from the names of directories.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fastckpt.errors import FastckptError
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.metadata import JsonMetadata
from fastckpt.verification.outputs import verify

Save = tuple[int, int]
"""Step and version; a second version of a step overwrites the first."""
STANDING: tuple[Save, ...] = ((0, 0), (1, 0))
"""What stands before the run, unless it starts on nothing."""
KEEP = 2
"""Commits that stay: the run removes others."""


def state(step: int, version: int, rank: int) -> dict[str, object]:
    """A tensor that all ranks share, one of each rank's own, and values."""
    seed = 1000 * step + 100 * version
    return {
        "all": torch.arange(9, dtype=torch.float32) + seed,
        "own": torch.full((70,), seed + rank, dtype=torch.int32),
        "step": step,
        "version": version,
    }


@dataclass(frozen=True, slots=True)
class Job:
    """How the program saves. `fresh`: on nothing. `patience`: seconds a rank waits for the others."""

    world: int = 1
    background: bool = False
    fresh: bool = False
    patience: float = 30.0
    durable: bool = True

    def __str__(self) -> str:
        how = "async" if self.background else "sync"
        return f"{self.ranks}, {how}{', first save' if self.fresh else ''}"

    @property
    def ranks(self) -> str:
        """How many there are, in words."""
        return f"{self.world} rank{'s' * (self.world > 1)}"

    @property
    def saves(self) -> tuple[Save, ...]:
        """What the run saves, in order."""
        return ((0, 0),) if self.fresh else ((2, 0), (2, 1))

    @property
    def known(self) -> tuple[Save, ...]:
        """Every save that there may be something of."""
        return self.saves if self.fresh else STANDING + self.saves

    def manager(self, root: Path, rank: int) -> CheckpointManager:
        """The manager of one rank."""
        return CheckpointManager(
            root, rank=rank, world=self.world, timeout=self.patience, max_to_keep=KEEP,
            async_save=self.background, durable=self.durable, metadata=JsonMetadata(root / "told.json"),
        )  # fmt: skip


def train(job: Job, root: Path, rank: int, saves: Sequence[Save], say: Callable[[Save], object]) -> None:
    """Save again and again as a training loop does: a save that fails is no reason to stop. Rank 0 says what
    was reported to it as standing."""
    warnings.simplefilter("ignore")
    with job.manager(root, rank) as manager:
        for step, version in saves:
            try:
                done = manager.save(step, state(step, version, rank), {"loss": 1.0}, overwrite=True)
                manager.wait()
            except FastckptError:
                continue
            if done and rank == 0:
                say((step, version))


def spawn(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this warm process; its id."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            work()
            code = 0
        except FastckptError:  # the ranks lost each other: nothing more to save
            code = 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def gather(pids: Sequence[int], grace: float | None) -> list[int]:
    """Wait for all; when one is killed, the others are after `grace` seconds, as a launcher does (None: they
    find out themselves). Exit codes, negative for signals."""
    codes: dict[int, int] = {}
    left = list(pids)
    while left:
        pid, status = os.waitpid(-1, 0)
        if pid not in left:
            continue
        left.remove(pid)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] == -signal.SIGKILL and left and grace is not None:
            time.sleep(grace)
            for other in left:
                os.kill(other, signal.SIGKILL)
            grace = None
    return [codes[p] for p in pids]


def warm() -> None:
    """Import what a save and a restore need, so that no fork has to."""
    with tempfile.TemporaryDirectory() as root, CheckpointManager(root, rank=0, world=1) as manager:
        manager.save(0, state(0, 0, 0))
        manager.restore()
        verify(manager.path(0), threads=1)


class Reports:
    """A pipe through which the program says which saves it was told stand."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()
        os.set_blocking(self.out, False)

    def say(self, save: Save) -> None:
        """Tell of one."""
        os.write(self.into, bytes(save))

    def read(self) -> list[Save]:
        """All that was said, and the end of it."""
        data = b""
        try:
            while piece := os.read(self.out, 4096):
                data += piece
        except BlockingIOError:
            pass
        os.close(self.out)
        os.close(self.into)
        return list(zip(data[::2], data[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was wrong with what a run left: lost commits, torn ones that pass for good, a failed restart."""

    lost: tuple[str, ...] = ()
    torn: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return not (self.lost or self.torn or self.restart)


def judge(job: Job, root: Path, reported: Sequence[Save], known: Sequence[Save]) -> Verdict:
    """What stands, against what was reported; `known`: every (step, version) that was ever tried."""
    lost, torn, restart = [], [], []
    listing = os.listdir(root) if root.is_dir() else []
    named = sorted(int(e.removeprefix("step-")) for e in listing if e.startswith("step-"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with CheckpointManager(root, rank=0, world=1, durable=False) as manager:
                steps = manager.steps()
                if steps != named:
                    torn.append(f"directories of steps {named}, whole are {steps}")
                versions = {s: _version(manager, s, job.world, known, torn) for s in steps}
                newest = manager.resume_step()
                if newest != (named[-1] if named else None):
                    restart.append(f"resumes {newest} of {named}")
                if job.world == 1 and newest is not None and not torn:
                    found = manager.restore()
                    if not isinstance(found, dict) or found["step"] != newest:
                        restart.append(f"restored {found!r}, wanted step {newest}")
        except (FastckptError, OSError, Warning) as e:
            return Verdict(tuple(lost), tuple(torn), (f"{type(e).__name__}: {e}",))
    last = dict(reported)  # the last version that was reported of each step
    for step, version in last.items():
        newer = sum(s > step for s in steps)
        if step not in steps and newer < KEEP:
            lost.append(f"step {step} was reported, {steps} stand")
        elif step in steps and versions[step] < version:
            lost.append(f"version {version} of step {step} was reported, {versions[step]} stands")
    return Verdict(tuple(lost), tuple(torn), tuple(restart))


def _version(
    manager: CheckpointManager, step: int, world: int, known: Sequence[Save], torn: list[str]
) -> int:
    """Which version of a step stands; every rank's part of it must be that one, to the last byte."""
    report = verify(manager.path(step), threads=1)
    torn += [f"step {step}: {p}" for p in report.problems]
    found: set[int] = set()
    for rank in range(world):
        opened = manager.open(step, rank)
        held = {name: opened.read(name) for name in opened.names}
        fits = [v for s, v in known if s == step and _equal(held, state(s, v, rank))]
        found |= set(fits)
        if len(fits) != 1:
            torn.append(f"step {step}: rank {rank} has the bytes of versions {fits}")
    if len(found) != 1:
        torn.append(f"step {step}: the ranks have versions {sorted(found)}")
    return max(found, default=-1)


def _equal(held: dict[str, torch.Tensor], want: dict[str, object]) -> bool:
    tensors = {n: t for n, t in want.items() if isinstance(t, torch.Tensor)}
    return held.keys() == tensors.keys() and all(torch.equal(held[n], t) for n, t in tensors.items())


def resume(job: Job, root: Path) -> tuple[str, ...]:
    """Start the program again and let it save once more; what was wrong."""
    before = sorted(int(e.removeprefix("step-")) for e in os.listdir(root) if e.startswith("step-"))
    step = before[-1] + 1 if before else 0
    again, said = Job(job.world, job.background), Reports()
    pids = [spawn(lambda r=r: train(again, root, r, [(step, 0)], said.say)) for r in range(job.world)]  # type: ignore[misc]
    codes, reported = gather(pids, None), said.read()
    if any(codes) or reported != [(step, 0)]:
        return (f"started again to save step {step}: exit codes {codes}, reported {reported}",)
    verdict = judge(again, root, reported, [*dict.fromkeys((*STANDING, *job.known, (step, 0)))])
    out = [*verdict.lost, *verdict.torn, *verdict.restart]
    left = [e for e in os.listdir(root) if e.startswith((".saving", ".trash"))]
    if left:
        out.append(f"left behind: {left}")
    steps = [e for e in os.listdir(root) if e.startswith("step-")]
    if len(steps) > KEEP:
        out.append(f"{len(steps)} commits stay, {KEEP} were asked for")
    return tuple(out)


class Roots:
    """Directories for runs: empty, or with what stands before one, which was made once and is copied."""

    def __init__(self, work: Path) -> None:
        work.mkdir(exist_ok=True)
        self._work, self.place = work, work / "ck"

    def make(self, job: Job) -> tuple[Path, list[Save]]:
        """A new root for a job, and what was reported to stand in it."""
        root = self.place
        clear(root)
        if job.fresh:
            root.mkdir()
            return root, []
        made = self._work / f"standing-{job.world}"
        if not made.exists():
            first = Job(job.world)
            made.mkdir()
            pids = [
                spawn(lambda r=r: train(first, made, r, STANDING, lambda save: None))  # type: ignore[misc]
                for r in range(job.world)
            ]
            if any(gather(pids, None)):
                raise RuntimeError(f"{job}: what is to stand before it could not be saved")
        shutil.copytree(made, root)
        return root, list(STANDING)


def clear(root: Path) -> None:
    """Remove a root."""
    shutil.rmtree(root, ignore_errors=True)
