"""The GPU's rows: ours against a copy of the same traffic and against plain torch, on whatever GPU is here.

python benchmarks/gpu.py [--small] [--seconds N] [--as WORDS] [NAME...]     # rows whose name begins so

CUDA events around one call, median of at least 20 (of torch, where it takes seconds, at least 5), subject,
floor and peer in turns; random data, working sets past the cache, outputs poisoned first and compared after.
The floor is `copy_` of bytes that make the same traffic (read + written). The GPU is kept busy for a moment
before each call, so that what the host takes to start the first kernels is not counted, for none of them.

Each row is written to benchmarks/results/GPU-DATE.json as soon as it is there, among those that are; a row
that failed says why. `--as`: what kernels these are, where they are not the package's own. `--small` goes
through every row with tiny inputs: no figures, but all that can break.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import fastckpt._C as compiled
import gpu_models
import gpu_rows
import machine
import torch
from fastckpt.errors import FastckptError
from gpu_rows import Act, Case
from measure import Goal

ROUNDS = 21
WALL_ROUNDS = 7
PEER_ROUNDS, PEER_SECONDS = 5, 6.0  # torch where it is slow: so many rounds, then none after so long
WARM = 0.2  # seconds of ours before the rounds: a GPU that did nothing runs at a fraction of its clock
BUSY = 400_000  # cycles

GOALS: dict[str, dict[str, Goal]] = {
    "gather_cast": {"of copy": Goal(0.95, False)},
    "transpose": {"of copy": Goal(0.90, False)},
    "model llama-8b": {"of copy": Goal(0.85, False), "x eager": Goal(5, False)},
    "model moe": {"of copy": Goal(0.85, False), "x eager": Goal(30, False)},
    "quantise fp8-block": {"of copy": Goal(0.80, False)},
    "quantise int8": {"of copy": Goal(0.85, False)},
}
"""By how names of rows begin; other rows have none."""

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Row:
    """`bytes`: read and written; `fraction_of_copy`: the floor's time by ours; `speedup_vs_eager`: torch's by
    ours, 0 where nothing was compared; `spread`: the third quartile of ours by the first. `goal`, `met`: what
    the figures were to be, and whether they are. `error`: why there are no figures."""

    name: str
    shape: str
    ms: float
    bytes: int
    fraction_of_copy: float
    speedup_vs_eager: float
    commit: str
    error: str = ""
    spread: float = 0.0
    goal: str = ""
    met: str = ""


def judged(name: str, fraction: float, speedup: float) -> tuple[str, str]:
    """The goal of a row in words, and whether the figures meet it."""
    goal = next((goal for begin, goal in GOALS.items() if name.startswith(begin)), {})
    found = {"of copy": fraction, "x eager": speedup}
    words = ", ".join(f"{limit} {what}" for what, limit in goal.items())
    return words, ("yes" if all(g.met(found[what]) for what, g in goal.items()) else "no") if goal else ""


def unmeasured(name: str, why: str) -> Row:
    """A row without figures, which meets no goal."""
    goal, met = judged(name, 0.0, 0.0)
    return Row(name, "", 0.0, 0, 0.0, 0.0, commit(), why, goal=goal, met=met)


def on_gpu(act: Act) -> float:
    """Milliseconds of one call on the GPU."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY)
    start.record()
    act()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def on_the_wall(act: Act) -> float:
    """Milliseconds of one call until all is done."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def measure(case: Case) -> Row:
    """All three in turns, once the GPU is warm and after a round that does not count. Raises ValueError for
    wrong bytes."""
    floor = case.floor
    if floor is None:
        half = torch.empty((case.nbytes // 2,), dtype=torch.uint8, device="cuda").random_()
        into = torch.empty_like(half)

        def floor() -> object:
            return into.copy_(half)

    acts: list[Act] = [case.ours, floor, *([] if case.eager is None else [case.eager])]
    timed, rounds = (on_the_wall, WALL_ROUNDS) if case.wall else (on_gpu, ROUNDS)
    case.ours()
    if not case.right():
        raise ValueError("wrong bytes")
    until = time.perf_counter() + WARM
    while time.perf_counter() < until:
        on_the_wall(case.ours)
    times: list[list[float]] = [[] for _ in acts]
    for k in range(rounds + 1):
        for act, seen in zip(acts, times, strict=True):
            if act is case.eager and len(seen) >= PEER_ROUNDS and sum(seen) > 1e3 * PEER_SECONDS:
                continue
            ms = timed(act)
            if k:
                seen.append(ms)
    ours, least, *peer = (statistics.median(t) for t in times)
    speedup = peer[0] / ours if peer else 0.0
    first, _, third = statistics.quantiles(times[0], n=4)
    goal, met = judged(case.name, least / ours, speedup)
    return Row(
        case.name, case.shape, ours, case.nbytes, least / ours, speedup, commit(),
        spread=third / first, goal=goal, met=met,
    )  # fmt: skip


def commit() -> str:
    """The commit that is measured: git's word, else FASTCKPT_COMMIT where the tree came without git."""
    return str(machine.commit()["id"] or os.environ.get("FASTCKPT_COMMIT", "unknown"))


def driver() -> str:
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(smi, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


def results() -> Path:
    """Where this GPU's rows of today stand."""
    spelled = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-")
    return HERE / "results" / f"{spelled}-{date.today()}.json"


def keep(row: Row, path: Path, about: dict[str, object]) -> None:
    """Enter a row, in the place of an earlier one of its name."""
    held = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = [r for r in held["rows"] if r["name"] != row.name] + [asdict(row)]
    if row.name.endswith("]"):  # other kernels than the file is about
        about = {**about, **{name: held[name] for name in about if name in held}}
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    fresh.replace(path)


def line(row: Row, small: bool) -> str:
    if row.error or small:
        return f"{row.name:<40} {row.error or 'ran'}"
    rate = row.bytes / row.ms / 1e6
    figures = f"{row.ms:9.3f} {rate:7.0f} {row.fraction_of_copy:8.3f} {row.speedup_vs_eager:8.1f}"
    return f"{row.name:<40} {row.shape:<56} {figures}  {row.goal}{row.met and ': '}{row.met}"


def main() -> int:
    parser = argparse.ArgumentParser(description="The GPU's rows.")
    parser.add_argument("names", nargs="*", help="rows whose name begins so")
    parser.add_argument("--small", action="store_true", help="tiny inputs: every row runs, nothing is kept")
    parser.add_argument("--as", dest="kernels", default="", help="these kernels, as rows name them")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no row begins after so long")
    asked = parser.parse_args()
    os.environ["FASTCKPT_CACHE"] = "off"  # a kept plan would hide planning
    began = time.monotonic()
    makers = list(gpu_rows.cases(asked.small))
    for kind in ("llama-8b", "moe"):
        makers += gpu_models.cases(kind, asked.small)
    path = results()
    about = {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver(),
        "torch": torch.__version__,
        "commit": commit(),
        "kernels": compiled.kernel_facts(),
    }
    print(f"{'row':<40} {'shape':<56} {'ms':>9} {'GB/s':>7} {'of copy':>8} {'x eager':>8}  goal", flush=True)
    failed = 0
    for name, make in makers:
        if asked.names and not any(name.startswith(n) for n in asked.names):
            continue
        if time.monotonic() - began > asked.seconds:
            row = unmeasured(name, "not measured: the time was up")
        else:
            try:
                row = measure(make())
            except (FastckptError, RuntimeError, ValueError, TypeError, LookupError, OSError) as e:
                traceback.print_exc()
                told = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
                row = unmeasured(name, f"failed: {told}")
                failed += 1
        row = replace(row, name=row.name + (f" [{asked.kernels}]" if asked.kernels else ""))
        print(line(row, asked.small), flush=True)
        if not asked.small:
            keep(row, path, about)
        torch.cuda.empty_cache()
    print(f"{failed} rows failed" if failed else "every row ran", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
