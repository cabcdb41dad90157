"""How reliable the manager is: calls that kill or fail, crashes that lose what was not synced, damaged bytes.

    python benchmarks/reliability/run.py [--size ci|nightly] [--only kills crashes damage]
        [--ranks 1 2 4] [--json OUT]

Exit code 1 where a commit was lost, a torn or damaged one passed for good, a restart did not find the newest,
or a sound one was refused. Ctrl-C ends a part and tells what was done by then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

import faults

if TYPE_CHECKING:
    from corruption import Found
    from tally import Tally

PARTS = ("kills", "crashes", "damage")
SIZES = {
    "ci": {"kills": {1: 60, 2: 8, 4: 2}, "crashes": {1: 120, 2: 40}, "damage": 200, "loads": 100},
    "nightly": {
        "kills": {1: 4000, 2: 800, 4: 200},
        "crashes": {1: 4000, 2: 1500, 4: 500},
        "damage": 10_000,
        "loads": 10_000,
    },
}
"""Points for each number of ranks; damages; clean loads."""


def kills(size: dict, work: Path, seed: int, tally: Tally) -> None:
    import kills as part
    from program import Roots

    shim, roots = faults.Shim(), Roots(work)
    for world, wanted in size["kills"].items():
        for point in part.points(shim, roots, world, wanted, seed):
            part.run(shim, roots, point, tally)


def crashes(size: dict, work: Path, seed: int, tally: Tally) -> None:
    import durability as part
    from program import Job, Roots

    shim, roots = faults.Shim(), Roots(work)
    for world, wanted in size["crashes"].items():
        for job in (Job(world), Job(world, background=True), Job(world, fresh=True)):
            part.run(shim, roots, job, wanted // 3, seed, tally)


def damage(size: dict, work: Path, seed: int, found: Found) -> None:
    import corruption as part

    part.run(work / "ck", size["damage"], size["loads"], seed, found)


def main() -> int:
    parser = argparse.ArgumentParser(description="How reliable the manager is, seen.")
    parser.add_argument("--size", choices=SIZES, default="ci")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--ranks", nargs="+", type=int, choices=(1, 2, 4), help="only kills and crashes of these"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where the commits are made (default: in memory)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    faults.preloaded(Path(tempfile.gettempdir()) / f"fastckpt-shim-{os.getuid()}")
    import torch
    from corruption import Found
    from program import warm
    from tally import Tally

    torch.set_num_threads(1)
    warm()
    memory = Path("/dev/shm")
    place = args.dir or (memory if memory.is_dir() else None)
    size = dict(SIZES[args.size])
    for name in ("kills", "crashes"):
        size[name] = {n: k for n, k in size[name].items() if args.ranks is None or n in args.ranks}
    results: dict[str, dict[str, object]] = {}
    for name in args.only:
        began, found = time.perf_counter(), Found() if name == "damage" else Tally()
        with tempfile.TemporaryDirectory(dir=place) as work:
            try:
                globals()[name](size, Path(work), args.seed, found)
                stopped = False
            except KeyboardInterrupt:  # what was done by then is told
                stopped = True
        seconds = round(time.perf_counter() - began, 1)
        results[name] = {**found.json(), "good": found.good, "stopped": stopped, "seconds": seconds}
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"size": args.size, "seed": args.seed, **results}, indent=1) + "\n")
    return 0 if all(r["good"] for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
