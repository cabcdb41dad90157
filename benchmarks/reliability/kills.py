"""Points of a real save at which a call kills the process, fails or falls short; what stands is judged.

A point is one process tree: the warm process forks, one of its ranks is armed, and the calls (write, rename,
fsync, ...) are the C library's own, met on their way to the kernel.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from faults import Mode, Shim, matters
from program import Job, Reports, Roots, gather, judge, resume, spawn, train
from tally import Outcome

PATIENCE = 4.0
"""Seconds that ranks wait for each other: enough that a busy machine does not part them before the point."""
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


def points(shim: Shim, roots: Roots, world: int, seed: int, *, few: bool = False) -> list[Point]:
    """Every point of jobs of `world` ranks, shuffled: each call of each rank, each mode, each way of saving;
    of the calls by which ranks meet one in ten. `few`: of half the ways of saving."""
    chance = random.Random(f"{seed} {world}")
    every = []
    ways = [Job(world, background, fresh) for background in (False, True) for fresh in (False, True)]
    for job in ways[:: 2 if few else 1]:
        for victim in range(world):
            kinds = calls(shim, roots, job, victim)
            every += [
                Point(
                    replace(job, patience=30.0 if world == 1 else PATIENCE), victim, mode, k + 1,
                    None if chance.random() < 0.1 else chance.random() * 0.05,
                )
                for mode in MODES
                for k, kind in enumerate(kinds)
                if matters(mode, kind) and (chr(kind).islower() or chance.random() < 0.1)
            ]  # fmt: skip
    chance.shuffle(every)
    return every


def shares(
    shim: Shim, work: Path, wanted: Mapping[int, int], seed: int, parts: int
) -> list[Iterator[Outcome]]:
    """The part in so many shares, each to be run in a process of its own; no point is run twice.

    `wanted`: points for each number of ranks; those that were not reached are replaced by others."""
    found = {}
    for world, n in wanted.items():
        found[world] = points(shim, Roots(work / "calls"), world, seed, few=n < 20)
        if n > len(found[world]):
            raise ValueError(f"{n} points of {world} ranks were asked for, there are {len(found[world])}")

    def share(k: int) -> Iterator[Outcome]:
        roots = Roots(work / f"share-{k}")
        for world, every in found.items():
            left = len(range(k, wanted[world], parts))
            for at, point in enumerate(every[k::parts]):
                if left <= 0:
                    break
                outcome = run(shim, roots, point, started_again=world == 1 or at % 4 == 0)
                left -= outcome.reached
                yield outcome

    return [share(k) for k in range(parts)]


def run(shim: Shim, roots: Roots, point: Point, *, started_again: bool) -> Outcome:
    """One point: the run, the judgement, the restart."""
    job, said, met = point.job, Reports(), Reports()
    root, standing = roots.make(job)

    def work(rank: int) -> None:
        if rank != point.victim:
            return train(job, root, rank, job.saves, said.say)
        shim.arm(root, point.nth, point.mode)
        try:
            train(job, root, rank, job.saves, said.say)
        finally:
            if len(shim.kinds()) >= point.nth:
                met.say((0, 0))

    codes = gather([spawn(lambda r=r: work(r)) for r in range(job.world)], point.grace)  # type: ignore[misc]
    verdict = judge(job, root, standing + said.read(), job.known)
    restart = verdict.restart
    if verdict.good and started_again:
        restart = resume(job, root)
    strange = [f"exit codes {codes}"] if any(c not in (0, 1, -signal.SIGKILL) for c in codes) else []
    kind = point.mode.name.lower().replace("_", " ")
    return Outcome(
        str(point), job.ranks, kind,
        {"lost": verdict.lost, "torn": verdict.torn, "restart": [*restart, *strange]},
        reached=bool(met.read()) or codes[point.victim] == -signal.SIGKILL,
    )  # fmt: skip
