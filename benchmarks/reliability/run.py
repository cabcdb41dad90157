"""How reliable the manager is: calls that kill or fail, crashes that lose what was not synced, damaged bytes.

    python benchmarks/reliability/run.py [--size ci|nightly] [--only kills crashes damage]
        [--ranks 1 2 4] [--workers N] [--json OUT]

Exit code 1 where a commit was lost, a torn or damaged one passed for good, a restart did not find the newest,
or a sound one was refused. OUT is written anew every few seconds: a run that is stopped leaves what it saw,
with the parts that did not end marked as such.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import faults  # noqa: E402
from machine import commit, machine  # noqa: E402
from table import FAULTS  # noqa: E402
from tally import Outcome, Tally  # noqa: E402

SIZES = {
    "ci": {"kills": {1: 60, 2: 8, 4: 2}, "crashes": {1: 120, 2: 40}, "damage": 200, "loads": 100},
    "nightly": {
        "kills": {1: 2000, 2: 2400, 4: 800},
        "crashes": {1: 3000, 2: 2000, 4: 1000},
        "damage": 10_000,
        "loads": 10_000,
    },
}
"""Points for each number of ranks; damages; clean loads."""
_EVERY = 5.0
"""Seconds between two writes of the results."""


def shares(name: str, size: dict, work: Path, seed: int, parts: int) -> list[Iterator[Outcome]]:
    """A part of the run, cut for so many processes."""
    if name == "damage":
        import corruption

        return corruption.shares(work, size["damage"], size["loads"], seed, parts)
    shim = faults.Shim()
    if name == "kills":
        import kills

        return kills.shares(shim, work, size["kills"], seed, parts)
    import durability

    return durability.shares(shim, work, size["crashes"], seed, parts)


def at_once(every: Sequence[Iterator[Outcome]], enter: Callable[[Outcome], None]) -> None:
    """Run each share in a fork of this process and enter what they tell, as it comes."""
    pids, told = [], selectors.DefaultSelector()
    for share in every:
        out, into = os.pipe()
        pid = os.fork()
        if not pid:
            code = 70
            try:
                os.setpgid(0, 0)
                os.close(out)
                for outcome in share:
                    line = outcome.line()
                    while line:
                        line = line[os.write(into, line) :]
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(into)
        pids.append(pid)
        told.register(out, selectors.EVENT_READ, bytearray())
    try:
        while told.get_map():
            for key, _ in told.select():
                piece, held = os.read(key.fd, 1 << 16), key.data
                if not piece:
                    told.unregister(key.fd)
                    os.close(key.fd)
                held += piece
                *lines, rest = held.split(b"\n")
                held[:] = rest
                for line in lines:
                    enter(Outcome.of(line))
    except BaseException:
        for pid in pids:
            with suppress(ProcessLookupError):  # before it made its group
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        raise RuntimeError(f"the processes that ran the points ended with {codes}")


class Results:
    """What was seen so far, in a file that is whole at any moment."""

    def __init__(self, out: Path | None, options: dict[str, object]) -> None:
        self.out, self.good = out, True
        self.parts: dict[str, dict[str, object]] = {}
        self.head = {
            "date": datetime.now(timezone.utc).isoformat()[:16], "commit": commit(), "machine": machine(),
            "options": options,
        }  # fmt: skip

    def begin(self, name: str) -> None:
        """The next part."""
        self.name, self.began, self.kept = name, time.perf_counter(), time.perf_counter()
        self.tally = Tally(FAULTS[name])

    def enter(self, outcome: Outcome) -> None:
        """A point of it."""
        self.tally.enter(outcome)
        if time.perf_counter() - self.kept > _EVERY:
            self.keep()

    def keep(self, *, ended: bool = False) -> None:
        """Write what there is."""
        self.kept = time.perf_counter()
        self.parts[self.name] = {
            **self.tally.json(), "ended": ended, "seconds": round(self.kept - self.began, 1),
        }  # fmt: skip
        if self.out is not None:
            staged = self.out.with_name(f"{self.out.name}.tmp")
            staged.write_text(json.dumps({**self.head, **self.parts}, indent=1) + "\n")
            staged.replace(self.out)

    def end(self) -> None:
        """The part is done."""
        self.good = self.good and self.tally.good
        self.keep(ended=True)
        print(f"{self.name}: {json.dumps(self.parts[self.name])}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="How reliable the manager is, seen.")
    parser.add_argument("--size", choices=SIZES, default="ci")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument(
        "--ranks", nargs="+", type=int, choices=(1, 2, 4), help="only kills and crashes of these"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2 * len(os.sched_getaffinity(0)))
    parser.add_argument("--dir", type=Path, help="where the commits are made (default: in memory)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    faults.preloaded(Path(tempfile.gettempdir()) / f"fastckpt-shim-{os.getuid()}")
    import torch
    from program import warm

    for number in (signal.SIGINT, signal.SIGTERM):  # also where whoever started this ignores them
        signal.signal(number, signal.default_int_handler)
    torch.set_num_threads(1)
    warm()
    memory = Path("/dev/shm")
    place = args.dir or (memory if memory.is_dir() else None)
    size = dict(SIZES[args.size])
    for name in ("kills", "crashes"):
        size[name] = {n: k for n, k in size[name].items() if args.ranks is None or n in args.ranks}
    options = {"size": args.size, "only": [*args.only], "seed": args.seed, "workers": args.workers}
    options |= {"ranks": args.ranks or [1, 2, 4], "in memory": place == memory}
    results = Results(args.json, options)
    for name in args.only:
        results.begin(name)
        with tempfile.TemporaryDirectory(dir=place) as work:
            try:
                at_once(shares(name, size, Path(work), args.seed, args.workers), results.enter)
            except KeyboardInterrupt:
                return 130
            finally:
                results.keep()
        results.end()
    return 0 if results.good else 1


if __name__ == "__main__":
    sys.exit(main())
