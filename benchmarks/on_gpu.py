"""`make gpu`: build, test, check and measure on a machine with a GPU and its own CUDA torch; no network.

python benchmarks/on_gpu.py [--seconds N] [--only PART...] [--keep-build]      # make gpu GPU="--seconds 570"

Parts run one after the other, each in processes of its own and within its share of the time; whatever one of
them meets, the next ones run. Nothing is installed: the package is built into build/gpu, which goes before
what the environment has. At the same time kernels with other constants are built; their rows end in what they
are, and decide between them. The rows are in benchmarks/results/GPU-DATE.json from the moment each is
measured, and what became of the parts stands there at the end. Exit status 1 when a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
SITE = BUILD / "gpu"
RESULTS = ROOT / "benchmarks" / "results"

ROWS = (
    "gather_cast", "transpose", "model llama-8b", "model moe", "files_to_gpu", "digest", "quantise", "peer"
)  # fmt: skip
"""Rows that share a process, what is asked first of a GPU before the others."""

TESTS = tuple(f"tests/gpu/test_gpu_{name}.py" for name in ("rows", "road", "quant", "manager", "refusals"))
"""What all else stands on comes first: the time may be up."""

OTHERS = {
    "FLIGHT=4 AHEAD=0": ("gather_cast", "digest"),
    "TEAM=256 AHEAD=4": ("gather_cast", "digest"),
    'HINT=".L1::no_allocate"': ("gather_cast", "quantise"),
}
"""Constants of the kernels (csrc) that only a GPU can choose between, and the rows that show it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A command that shows one thing, and the most seconds it may take."""

    name: str
    seconds: float
    command: tuple[str, ...]
    site: Path = SITE


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a part."""

    name: str
    seconds: float
    said: str


def parts(rows_seconds: float) -> list[Part]:
    """All of them, in order."""
    python = sys.executable
    # A test that hangs is shown where it stands before its part is stopped.
    hung = ("-o", "faulthandler_timeout=60")
    test = (python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *hung, *TESTS)
    # Errors that CUDA returns are no finding: torch asks for what there may not be.
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no")
    bench = (python, "benchmarks/gpu.py")
    made = [
        Part("gpu", 60, (python, "-c", GPU)),
        Part("build", 300, (python, "benchmarks/on_gpu.py", "--build")),
        Part("look", 60, (python, "-c", LOOK)),
        Part("tests", 150, test),
    ]
    for row in ROWS:
        made.append(Part(f"rows: {row}", rows_seconds, (*bench, "--seconds", str(int(rows_seconds)), row)))
    checks = [
        Part(tool, 120, (*sanitizer, "--tool", tool, *test, "-k", SMALL))
        for tool in ("memcheck", "racecheck")
    ]
    others = [
        Part(f"rows: {other}", 45, (*bench, "--as", other, *rows), site_of(other))
        for other, rows in OTHERS.items()
    ]
    return [*made, checks[0], *others, checks[1]]


def site_of(other: str) -> Path:
    return BUILD / "others" / "".join(c if c.isalnum() else "-" for c in other)


def build() -> int:
    """The package, and beside it the same with other constants, which wait for it where processors are few.
    0 where the package is there; the others have as long again as it took."""
    python, install = sys.executable, ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    packages = [(python, *install, "--no-build-isolation", "--no-deps", "--target", str(SITE), ".")]
    shutil.rmtree(BUILD, ignore_errors=True)
    for other in OTHERS:
        to, temp = (str(site_of(other)) + end for end in (".made", ".temp"))
        command = (python, "setup.py", "-q", "build_ext", "--build-lib", to, "--build-temp", temp)
        packages.append(("nice", "-n", "19", *command))
    began = time.monotonic()
    package, *others = (
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, "FASTCKPT_DEFINES": defines})
        for command, defines in zip(packages, ("", *OTHERS), strict=True)
    )
    status = package.wait()
    until = 2 * time.monotonic() - began
    for other, process in zip(OTHERS, others, strict=True):
        with suppress(subprocess.TimeoutExpired):
            if process.wait(timeout=max(0.0, until - time.monotonic())) == 0:
                made = Path(f"{site_of(other)}.made") / "fastckpt"
                shutil.copytree(ROOT / "python" / "fastckpt", site_of(other) / "fastckpt", ignore=COMPILED)
                shutil.copytree(made, site_of(other) / "fastckpt", dirs_exist_ok=True)
    return status


COMPILED = shutil.ignore_patterns("*.so", "__pycache__")


NEEDED = ("gpu", "build", "look")
"""Parts without which no other runs."""

LEAST = 15.0
"""Seconds under which no part begins: torch is imported for so long."""

GRACE = 10.0
"""Seconds that a part has after it was interrupted."""

SMALL = "small or every_scheme or digests"
"""The tests under compute-sanitizer: every kernel, little data."""

GPU = """
import torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU here")
print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_device_name())
"""


LOOK = """
import torch, fastckpt, fastckpt._C as c
from fastckpt.executors.cuda import usable
print("fastckpt", fastckpt.__file__, usable("cuda"))
print(torch.cuda.get_device_capability(), "for", c.cuda_archs, c.device_state())
for facts in c.kernel_facts(): print(facts)
"""


def architectures() -> str:
    """The GPUs' own, so that the build takes no longer than it must; "" (all) where nobody says."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = sorted({line.strip().replace(".", "") for line in done.stdout.splitlines()})
    return ",".join(found) if all(a.isdigit() for a in found) else ""


def environment(site: Path) -> dict[str, str]:
    """What the parts run with: our build first, plug-ins of pytest only where they are asked for, and CUDA's
    tools where they usually lie if nobody says."""
    path = [str(site), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]),
        "FASTCKPT_CUDA": "1",
        "FASTCKPT_BUILD": "1",
        "FASTCKPT_CUDA_ARCHS": os.environ.get("FASTCKPT_CUDA_ARCHS", "") or architectures(),
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def run(command: tuple[str, ...], seconds: float, site: Path) -> str:
    """Run it over the build at `site`, its words to ours; "" when it went well, else what did not.

    One that takes too long is interrupted first, and may say what it found and where it is: pytest tells of
    failures at its end. No process of it stays."""
    env = environment(site)
    program = shutil.which(command[0], path=env["PATH"])
    if program is None:
        return f"not run: there is no {command[0]} here"
    if command[0] == "compute-sanitizer":  # every tensor an allocation of its own, so that its ends are seen
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    print(f"\n+ {' '.join(c for c in command if len(c) < 100)}", flush=True)
    process = subprocess.Popen((program, *command[1:]), cwd=ROOT, env=env, start_new_session=True)
    try:
        status = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=GRACE)
        return f"stopped after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "" if status == 0 else f"failed, status {status}"


def enter(done: list[Done], since: float) -> Path | None:
    """What became of the parts, into the results written since then; none where no row was measured."""
    found = [p for p in RESULTS.glob("*.json") if p.stat().st_mtime >= since and '"kernels"' in p.read_text()]
    if not found:
        return None
    path = max(found, key=lambda p: p.stat().st_mtime)
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "parts": [asdict(d) for d in done]}, indent=1) + "\n")
    return path


def table(path: Path) -> None:
    """The rows that were measured, one a line."""
    held = json.loads(path.read_text())
    print(f"\n{held['gpu']}, driver {held['driver']}, torch {held['torch']}, commit {held['commit'][:10]}")
    print(f"{'row':<40} {'ms':>9} {'GB/s':>7} {'of copy':>8} {'x eager':>8}  goal")
    for r in held["rows"]:
        figures = r["error"]
        if not figures:
            rate = r["bytes"] / r["ms"] / 1e6
            figures = f"{r['ms']:9.3f} {rate:7.0f} {r['fraction_of_copy']:8.3f} {r['speedup_vs_eager']:8.1f}"
            figures += f"  {r['goal']}: {r['met']}" if r["goal"] else ""
        print(f"{r['name']:<40} {figures}")
    met = [r["met"] for r in held["rows"] if r["met"] and not r["name"].endswith("]")]
    print(f"{met.count('yes')} of {len(met)} goals are met")
    print(f"written: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test, check and measure on a GPU.")
    parser.add_argument("--seconds", type=float, default=460.0, help="all parts together")
    parser.add_argument("--only", nargs="*", default=[], help="parts whose name begins so")
    parser.add_argument("--keep-build", action="store_true", help="do not build again")
    parser.add_argument("--build", action="store_true", help="only build")
    asked = parser.parse_args()
    if asked.build:
        return build()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no process stays
    began, since = time.monotonic(), time.time()
    done: list[Done] = []
    path, missing = None, ""
    for part in parts(110.0):
        chosen = not asked.only or part.name.startswith(tuple(asked.only))
        if not chosen or (part.name == "build" and asked.keep_build):
            continue
        started = time.monotonic()
        left = asked.seconds - (started - began)
        if missing:
            said = f"not run: part {missing} did not go well"
        elif left < LEAST:
            said = "not run: the time was up"
        elif part.site is not SITE and not part.site.exists():
            said = "not run: it was not built"
        else:
            said = run(part.command, min(part.seconds, left), part.site) or "ok"
            if said.startswith("stopped") and left < part.seconds:
                said = f"cut short after {left:.0f} s: the time was up"
        if part.name in NEEDED and said != "ok" and not missing:
            missing = part.name
        done.append(Done(part.name, round(time.monotonic() - started, 1), said))
        path = enter(done, since)
    if path is not None:
        table(path)
    print(f"\n{'part':<28} {'s':>6}  what became of it")
    for d in done:
        print(f"{d.name:<28} {d.seconds:6.1f}  {d.said}")
    return 1 if any(d.said.startswith(("failed", "stopped")) for d in done) else 0


if __name__ == "__main__":
    sys.exit(main())
