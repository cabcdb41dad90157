"""One call of the operating system fails, at each call there is: what a command then says and leaves.

    python faults.py WORK STEP ACTION...

prints a JSON line for each run, of every STEP-th call: which failed, the exit code, what was said, and what
lies in WORK/out afterwards. Each run is a forked child. Only calls on files below WORK are counted.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fastckpt.cli
import torch
from fastckpt import CheckpointManager
from fastckpt.errors import FastckptError

CALLS = (
    "open", "stat", "lstat", "fstat", "read", "pread", "preadv", "write", "pwrite", "close", "listdir",
    "scandir", "mkdir", "rmdir", "unlink", "rename", "replace", "fsync", "statvfs", "readlink", "access",
)  # fmt: skip


class Faults:
    """Patches os and open; the `point`-th call named `name` on a file below `root` fails."""

    def __init__(self, root: str, name: str, point: int) -> None:
        self.root, self.name, self.point = root, name, point
        self.count, self.hit = 0, ""
        self.paths: dict[int, str] = {}
        self.lock = threading.Lock()
        self.real = {n: getattr(os, n) for n in CALLS}
        for n in CALLS:
            setattr(os, n, self._call(n))
        builtins.open = self._open

    def fails(self, name: str, path: str) -> bool:
        if name != self.name or not os.path.abspath(path).startswith(self.root):
            return False
        with self.lock:
            self.count += 1
            if self.count != self.point:
                return False
            self.hit = path
            return True

    def _call(self, name: str) -> Callable[..., object]:
        real = self.real[name]

        def call(first: object = ".", *more: object, **named: object) -> object:
            path = self.paths.get(first, "/") if isinstance(first, int) else os.fsdecode(first)
            failing = self.fails(name, path)
            if name == "close":
                self.paths.pop(first, None)
                real(first)
            if failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO), *([] if isinstance(first, int) else [first]))
            found = None if name == "close" else real(first, *more, **named)
            if name == "open":
                self.paths[found] = path
            return found

        return call

    def _open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, opener=None):
        def may_fail(name):
            if self.fails(name, os.fsdecode(file)):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        class Raw(io.FileIO):
            def readinto(self, into):
                may_fail("read")
                return super().readinto(into)

            def readall(self):
                may_fail("read")
                return super().readall()

            def write(self, data):
                may_fail("write")
                return super().write(data)

            def close(self):
                first = not self.closed
                super().close()
                if first:
                    may_fail("close")

        def through(path, flags):
            return os.open(path, flags | os.O_CLOEXEC) if opener is None else opener(path, flags)

        raw = Raw(file, mode.replace("b", "").replace("t", ""), opener=through)
        if buffering == 0:
            return raw
        buffered = (io.BufferedWriter if set(mode) & set("wxa") else io.BufferedReader)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


def contents(path: Path) -> dict[str, str]:
    """Every file and empty directory below, by name, and what tells its bytes."""
    out = {}
    for p in sorted(path.rglob("*")):
        name = str(p.relative_to(path))
        if p.is_symlink():
            out[name] = "-> " + os.readlink(p)
        elif p.is_dir() and not any(p.iterdir()):
            out[name + "/"] = ""
        elif p.is_file():
            same = p.suffix in (".safetensors", ".bin", ".pt")
            out[name] = hashlib.sha256(p.read_bytes()).hexdigest()[:16] if same else ""
    return out


def command(*words: str) -> Callable[[], int]:
    return lambda: fastckpt.cli.main([*words, "--json"])


def state(step: int) -> dict[str, object]:
    return {"w": torch.arange(40.0) + step, "deep": {"b": torch.ones(3, 5), "step": step}}


def saved(root: Path) -> Callable[[], int]:
    def run() -> int:
        with CheckpointManager(root, rank=0, world=1, max_to_keep=1) as manager:
            manager.save(9, state(9))
        return 0

    return run


def restored(root: Path) -> Callable[[], int]:
    def run() -> int:
        with CheckpointManager(root, rank=0, world=1) as manager:
            found = manager.restore()
        print(json.dumps([found["w"].tolist(), found["deep"]["b"].tolist(), found["deep"]["step"]]))
        return 0

    return run


def actions(work: Path) -> dict[str, Callable[[], int]]:
    zero, dcp, hub, cut, out = (str(work / n) for n in ("zero", "dcp", "hub", "cut", "out"))
    return {
        "inspect-zero": command("inspect", zero),
        "inspect-dcp": command("inspect", dcp),
        "inspect-hub": command("inspect", hub),
        "inspect-cut": command("inspect", cut),
        "plan": command("plan", zero, "--pp", "2", "--layout", "vllm"),
        "reshard-zero": command("reshard", zero, out + "/new", "--layout", "same"),
        "reshard-hub": command("reshard", hub, out + "/new", "--pp", "2", "--layout", "vllm"),
        "reshard-cut": command("reshard", cut, out + "/new"),
        "overwrite": command("reshard", hub, out + "/old", "--overwrite"),
        "consolidate": command("consolidate", zero, out + "/new"),
        "consolidate-dcp": command("consolidate", dcp, out + "/new"),
        "verify": command("verify", cut),
        "diff": command("diff", hub, cut),
        "diff-zero": command("diff", zero, zero),
        "save": saved(work / "out/runs"),
        "restore": restored(work / "out/runs"),
    }


def run(work: Path, action: str, name: str, point: int) -> dict[str, object]:
    """One run in a child whose `point`-th call of that name fails."""
    shutil.rmtree(work / "out")
    shutil.copytree(work / "out.kept", work / "out", symlinks=True)
    into, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        told: dict[str, object] = {}
        stdout, stderr = io.StringIO(), io.StringIO()
        try:
            faults = Faults(str(work), name, point)
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                try:
                    told["exit"] = actions(work)[action]()
                except FastckptError as e:
                    told |= {"exit": e.exit_code, "kind": type(e).__name__, "error": str(e)}
                except BaseException as e:  # what is looked for
                    told |= {"exit": 1, "kind": type(e).__name__, "error": repr(e)}
            told |= {"hit": faults.hit, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
            last = (stderr.getvalue().strip().splitlines() or [""])[-1]
            if last.startswith("{") and "kind" not in told:
                told |= {k: v for k, v in json.loads(last).items() if k in ("kind", "error")}
        finally:
            real = faults.real["write"]
            data = json.dumps(told).encode()
            while data:
                data = data[real(end, data) :]
            os._exit(0)
    os.close(end)
    with os.fdopen(into, "rb") as f:
        told = json.loads(f.read())
    os.waitpid(pid, 0)
    return {"action": action, "call": name, "point": point, **told, "out": contents(work / "out")}


def runs(work: Path, action: str, step: int) -> Iterator[dict[str, object]]:
    """The run without a fault, then one for each `step`-th call of each name."""
    yield run(work, action, "none", 0)
    for name in CALLS:
        point = 1
        while (told := run(work, action, name, point))["hit"]:
            yield told
            point += step


def main() -> None:
    work, step = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    os.environ["FASTCKPT_CACHE"] = str(work / "cache")
    for action in sys.argv[3:]:
        for told in runs(work, action, step):
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
