"""The machine and the commit of a run, as its results keep them: no names, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def deepspeed() -> str | None:
    """DeepSpeed's version, without importing it."""
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, str | int]:
    """What a reader of the figures must know of the machine."""
    try:
        from fastckpt import _C

        instructions, compiler = _C.isas()[-1], _C.compiler
    except ImportError:
        instructions = compiler = "none: torch's executor"
    cpu, memory = platform.machine(), 0
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    with open("/proc/meminfo") as f:
        memory = int(f.readline().split()[1]) >> 20
    return {
        "cpu": cpu, "cpus": len(os.sched_getaffinity(0)), "memory_gib": memory,
        "best_instructions": instructions, "compiler": compiler,
        "system": f"{platform.system()} {platform.release()}", "python": platform.python_version(),
        "torch": metadata.version("torch"), "numpy": metadata.version("numpy"),
        "deepspeed": deepspeed() or "none",
    }  # fmt: skip


def commit() -> dict[str, str | bool | None]:
    """The commit that is measured, and whether files differ from it; None where git does not know."""

    def git(*words: str) -> str | None:
        where = Path(__file__).parent
        try:
            done = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"id": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}
