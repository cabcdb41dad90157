"""Reshards in which a call of the C library fails, of every STEP-th there is; failing_calls.c is preloaded.

    FAULT_ROOT=WORK/source python failing_calls.py WORK SOURCE STEP

Each run reads a copy of SOURCE. Prints a JSON line for it: which call, which errno (-1: it reads one byte;
-2: the file is halved), with the compiled module or not, the error, or the digest of what was made.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import fastckpt
from fastckpt import executors
from fastckpt.errors import FastckptError
from fastckpt.executors import cpu
from fastckpt.running import runs

SHORT, TRUNCATE = -1, -2
CASES = [
    *(("open", code) for code in (errno.EIO, errno.EINTR, errno.EMFILE)),
    *(("mmap", code) for code in (errno.EIO, errno.ENOMEM, TRUNCATE)),
    ("munmap", errno.ENOMEM),
    ("madvise", errno.EINVAL),
    *(("preadv", code) for code in (errno.EIO, errno.EINTR, SHORT, TRUNCATE)),
]
NAMES = {name: name.encode() for name in ("none", *(name for name, _ in CASES))}

executors.EXECUTORS["cpu"] = lambda _: cpu.Cpu(recent_bytes=1 << 20)  # so that pages are given back


def run(work: Path, source: Path, dtype: str | None, name: str, code: int, point: int) -> dict[str, object]:
    """One run; `hit`: it came to that call."""
    library = ctypes.CDLL(None)
    taken, out = work / "source", work / "out"
    shutil.rmtree(taken, ignore_errors=True)
    shutil.copytree(source, taken)
    told: dict[str, object] = {"call": name, "code": code, "point": point, "dtype": dtype}
    library.fault_arm(NAMES[name], point, code)
    try:
        fastckpt.reshard(taken, out=out, layout="same", dtype=dtype, threads=3, durable=False)
    except FastckptError as e:
        told |= {"kind": type(e).__name__, "error": str(e)}
    told["hit"] = bool(library.fault_hit())
    library.fault_arm(NAMES["none"], 0, 0)
    if "kind" not in told:
        told["digest"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
        shutil.rmtree(out)
    told["left"] = sorted(os.listdir(work))
    return told


def main() -> None:
    work, source, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for built in (True, False):
        if not built:
            executors.built = runs.built = lambda: False
        for dtype in (None, "bfloat16"):
            print(json.dumps(run(work, source, dtype, "none", 0, 1) | {"built": built}), flush=True)
            for name, code in CASES:
                for point in range(min(step, 2), 1000, step):
                    told = run(work, source, dtype, name, code, point)
                    if not told["hit"]:
                        break
                    print(json.dumps(told | {"built": built}), flush=True)


if __name__ == "__main__":
    main()
