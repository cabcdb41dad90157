"""A call of the C library that fails below Python: the whole output, or an error; never a wrong byte.

The mapped road (compiled module) and the one by position (torch), with three threads, each call of
`hostile/failing_calls.py` once: open, mmap, munmap, madvise and preadv fail, are interrupted, read one byte,
or find their file halved, which mapped is a SIGBUS.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from zero_writer import write_zero

pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

HOSTILE = Path(__file__).parent / "hostile"
SHORT, TRUNCATE = -1, -2
HARMLESS = {("open", errno.EINTR), ("preadv", errno.EINTR), ("preadv", SHORT)}
"""What a run must get over; the others of these calls may be needed, or not."""


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(save(tensors, {"format": "pt"})).hexdigest()


@pytest.mark.skipif(shutil.which("cc") is None, reason="the shim needs cc")
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.nightly)])
def test_calls_that_fail(tmp_path: Path, step: int) -> None:
    shim, work, source = tmp_path / "shim.so", tmp_path / "work", tmp_path / "source"
    compile = ["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(shim)]
    subprocess.run([*compile, str(HOSTILE / "failing_calls.c"), "-ldl"], check=True)
    torch.manual_seed(0)
    params = {"a": torch.randn(1100, 1024), "b": torch.randn(7), "c": torch.randn(513, 257)}
    write_zero(source, params, stage=2, world=2)
    whole = {None: digest(params), "bfloat16": digest({n: t.bfloat16() for n, t in params.items()})}
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(HOSTILE / "failing_calls.py"), str(work), str(source), str(step)],
        env={**os.environ, "LD_PRELOAD": str(shim), "FAULT_ROOT": str(work / "source")},
        capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    failed = set()
    for told in runs:
        where = (told["call"], told["code"])
        assert told["left"] == ["source"], told
        if "kind" not in told:
            assert told["digest"] == whole[told["dtype"]], told
            continue
        assert told["kind"] in ("SourceError", "WriteError") and str(work / "source") in told["error"], told
        assert where not in HARMLESS and told["call"] not in ("none", "munmap", "madvise"), told
        failed.add((told["built"], told["dtype"], *where))
    mapped, placed = ("mmap", TRUNCATE), ("preadv", TRUNCATE)
    assert failed >= {(True, "bfloat16", *mapped), (True, None, *placed), (False, "bfloat16", *placed)}
