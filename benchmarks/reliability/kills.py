"""Points of a real save at which a call kills the process, fails or falls short; what stands is judged.

A point is one process tree: the warm process forks, one of its ranks is armed, and the calls (write, rename,
fsync, ...) are the C library's own, met on their way to the kernel.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

from faults import KILLS, Mode, Shim, matters
from program import Job, Reports, Roots, gather, judge, resume, spawn, train
from tally import Tally

MODES = tuple(m for m in Mode if m is not Mode.NEVER)


@dataclass(frozen=True, slots=True)
class Point:
    """Rank `victim` of a job meets `mode` at its `nth` call. `grace`: seconds after a rank's death until its
    launcher kills the others; None lets them find out."""

    job: Job
    victim: int
    mode: Mode
    nth: int
    grace: float | None

    def __str__(self) -> str:
        return f"{self.job}: {self.mode.name} at call {self.nth} of rank {self.victim}"


def calls(shim: Shim, roots: Roots, job: Job, victim: int) -> bytes:
    """The kinds of the calls that a rank makes in an undisturbed run."""
    root, standing = roots.make(job)
    out, said = root.with_suffix(".kinds"), Reports()

    def work(rank: int) -> None:
        shim.arm(root, 0, Mode.NEVER)
        train(job, root, rank, job.saves, said.say)
        if rank == victim:
            out.write_bytes(shim.kinds())

    codes = gather([spawn(lambda r=r: work(r)) for r in range(job.world)], None)  # type: ignore[misc]
    reported = said.read()
    verdict = judge(job, root, standing + reported, job.known)
    if any(codes) or reported != list(job.saves) or not verdict.good:
        raise RuntimeError(f"{job}, undisturbed: exit codes {codes}, reported {reported}, {verdict}")
    return out.read_bytes()


def points(shim: Shim, roots: Roots, world: int, wanted: int, seed: int) -> Iterator[Point]:
    """`wanted` points of jobs of `world` ranks, spread evenly over calls, modes, ranks and ways of saving; of
    the calls by which ranks meet one in ten."""
    chance = random.Random(seed)
    every = []
    ways = [Job(world, background, fresh) for background in (False, True) for fresh in (False, True)]
    for job in ways[:: 1 if wanted > 20 else 2]:
        for victim in range(world):
            kinds = calls(shim, roots, job, victim)
            every += [
                (replace(job, patience=30.0 if world == 1 else 0.5), victim, mode, k + 1)
                for mode in MODES
                for k, kind in enumerate(kinds)
                if matters(mode, kind) and (chr(kind).islower() or chance.random() < 0.1)
            ]
    chance.shuffle(every)
    for k in range(wanted):
        job, victim, mode, nth = every[k % len(every)]
        grace = None if chance.random() < 0.1 else chance.random() * 0.05
        yield Point(job, victim, mode, nth, grace)


def run(shim: Shim, roots: Roots, point: Point, tally: Tally) -> None:
    """One point: the run, the judgement, the restart (of several ranks at every fourth point)."""
    job, said = point.job, Reports()
    root, standing = roots.make(job)

    def work(rank: int) -> None:
        if rank == point.victim:
            shim.arm(root, point.nth, point.mode)
        train(job, root, rank, job.saves, said.say)

    codes = gather([spawn(lambda r=r: work(r)) for r in range(job.world)], point.grace)  # type: ignore[misc]
    verdict = judge(job, root, standing + said.read(), job.known)
    restart = verdict.restart
    if verdict.good and (job.world == 1 or tally.points % 4 == 0):
        restart = resume(job, root)
    strange = [f"exit codes {codes}"] if any(c not in (0, 1, -signal.SIGKILL) for c in codes) else []
    if point.mode in KILLS and -signal.SIGKILL not in codes:
        tally.by_kind["of these, not reached"] += 1
    kind = point.mode.name.lower().replace("_", " ")
    tally.enter(str(point), job.ranks, kind, verdict, [*restart, *strange])
