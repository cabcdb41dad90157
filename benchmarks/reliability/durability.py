"""Crashes of the machine at every call of a real save: what was not synced is lost, what stands is judged."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

from crashes import Call, Disk, read_log
from fastckpt.errors import FastckptError
from faults import Mode, Shim
from program import Job, Roots, Save, clear, gather, judge, resume, spawn, train
from tally import Tally


def logged(shim: Shim, roots: Roots, job: Job) -> tuple[Path, list[Save], list[Call]]:
    """The root, what stands in it, and the calls of an undisturbed run on all its ranks.

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
    return root, standing, found


def run(shim: Shim, roots: Roots, job: Job, wanted: int, seed: int, tally: Tally) -> None:
    """`wanted` crashes of one run, spread over its calls: what is surely left, and chances of what may be."""
    root, standing, calls = logged(shim, roots, job)
    begun = Disk.of(root)
    places = [k for k, c in enumerate(calls) if c.kind != "n" and "/.fastckpt-meeting" not in c.path]
    chance = random.Random(seed)
    tries = sorted([(k, True) for k in places] + [(k, False) for k in places for _ in range(4)])
    if wanted < len(tries):
        tries = sorted(chance.sample(tries, wanted))
    for number, (k, sure, disk, reported) in enumerate(_crashes(begun, calls, tries, wanted)):
        clear(root)
        disk.crash(root, None if sure else chance)
        verdict = judge(job, root, standing + reported, job.known)
        restart = verdict.restart
        if verdict.good and number % 10 == 0:
            try:
                restart = resume(job, root)
            except (FastckptError, OSError) as e:
                restart = (f"{type(e).__name__}: {e}",)
        where = f"{job}: crash after call {k} ({calls[k].kind} {os.path.basename(calls[k].path)})"
        kind = "only what was synced" if sure else "and some of the rest"
        tally.enter(where, job.ranks, kind, verdict, restart)


def _crashes(
    begun: Disk, calls: list[Call], tries: list[tuple[int, bool]], wanted: int
) -> Iterator[tuple[int, bool, Disk, list[Save]]]:
    """The disk after each call that is tried, and what had been reported by then; again until `wanted`."""
    done = 0
    while done < wanted:
        disk, at = deepcopy(begun), 0
        reported: list[Save] = []
        for k, sure in tries[: wanted - done]:
            while at <= k:
                call = calls[at]
                if call.kind == "n":
                    step, version = map(int, call.path.split())
                    reported.append((step, version))
                else:
                    disk.apply(call)
                at += 1
            yield k, sure, disk, reported
            done += 1
