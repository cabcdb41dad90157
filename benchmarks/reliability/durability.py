"""Crashes of the machine at every call of a real save: what was not synced is lost, what stands is judged."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from crashes import Call, Disk, read_log
from fastckpt.errors import FastckptError
from faults import Mode, Shim
from program import Job, Roots, Save, clear, gather, judge, resume, spawn, train
from tally import Outcome


def logged(shim: Shim, roots: Roots, job: Job) -> Run:
    """An undisturbed run and the calls of all its ranks.

    A note "STEP VERSION" stands where a save was reported."""
    root, standing = roots.make(job)
    log = root.with_suffix(".log")

    def work(rank: int) -> None:
        shim.log(log)
        shim.arm(root, 0, Mode.NEVER)
        train(job, root, rank, job.saves, lambda save: shim.note("{} {}".format(*save)))

    codes = gather([spawn(lambda r=r: work(r)) for r in range(job.world)], None)  # type: ignore[misc]
    if any(codes):
        raise RuntimeError(f"{job}, undisturbed: exit codes {codes}")
    found = list(read_log(log))
    log.unlink()
    roots.make(job)
    return Run(job, Disk.of(root), standing, found)


@dataclass(frozen=True, slots=True)
class Run:
    """An undisturbed run: the disk before it, what was reported to stand there, and its calls."""

    job: Job
    begun: Disk
    standing: list[Save]
    calls: list[Call]

    @property
    def places(self) -> list[int]:
        """The calls after which a crash is a point of its own."""
        return [k for k, c in enumerate(self.calls) if c.kind != "n" and "/.fastckpt-meeting" not in c.path]


def shares(
    shim: Shim, work: Path, wanted: Mapping[int, int], seed: int, parts: int
) -> list[Iterator[Outcome]]:
    """The part in so many shares, each to be run in a process of its own.

    After every call once (after some, where few are `wanted`) what was synced and no more; at random calls
    that and a random part of the rest, until there are `wanted` crashes for each number of ranks."""
    chance = random.Random(seed)
    made: list[tuple[Run, list[tuple[int, int]]]] = []
    for world, n in wanted.items():
        jobs = (Job(world), Job(world, background=True), Job(world, fresh=True))
        for at, job in enumerate(jobs):
            run = logged(shim, Roots(work / "calls"), job)
            mine = len(range(at, n, len(jobs)))
            places = run.places
            sure = chance.sample(places, min(len(places), mine // 2))
            rest = [(chance.choice(places), chance.randrange(1, 1 << 30)) for _ in range(mine - len(sure))]
            made.append((run, sorted([*((k, 0) for k in sure), *rest])))

    def share(k: int) -> Iterator[Outcome]:
        for run, tries in made:
            yield from crashes(run, Roots(work / f"share-{k}"), tries[k::parts])

    return [share(k) for k in range(parts)]


def crashes(run: Run, roots: Roots, tries: list[tuple[int, int]]) -> Iterator[Outcome]:
    """Crashes after calls, in order of the calls; with each the seed of what else is left, 0 for nothing."""
    disk, at, job, root = deepcopy(run.begun), 0, run.job, roots.place
    reported: list[Save] = []
    for number, (k, seed) in enumerate(tries):
        for call in run.calls[at : k + 1]:
            if call.kind == "n":
                step, version = map(int, call.path.split())
                reported.append((step, version))
            else:
                disk.apply(call)
        at = k + 1
        clear(root)
        disk.crash(root, random.Random(seed) if seed else None)
        verdict = judge(job, root, run.standing + reported, job.known)
        restart = verdict.restart
        if verdict.good and number % 10 == 0:
            try:
                restart = resume(job, root)
            except (FastckptError, OSError) as e:
                restart = (f"{type(e).__name__}: {e}",)
        call = run.calls[k]
        yield Outcome(
            f"{job}: crash after call {k} ({call.kind} {os.path.basename(call.path)}), seed {seed}",
            job.ranks, "and some of the rest" if seed else "only what was synced",
            {"lost": verdict.lost, "torn": verdict.torn, "restart": restart},
        )  # fmt: skip
