"""The shim (shim.c) from Python: compiled once, preloaded by starting this program again, then armed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
_MOST = 1 << 16


class Mode(IntEnum):
    """What happens at the n-th call; the numbers are shim.c's."""

    NEVER = 0
    KILL_BEFORE = 1
    KILL_AFTER = 2
    KILL_HALFWAY = 3
    EIO = 4
    ENOSPC = 5
    SHORT = 6
    FULL_FROM_HERE = 7
    GONE_FROM_HERE = 8


_ONLY = {Mode.KILL_HALFWAY: b"w", Mode.SHORT: b"wost", Mode.FULL_FROM_HERE: b"owtmyl"}
"""Modes that do something of their own only at calls of these kinds."""


def matters(mode: Mode, kind: int) -> bool:
    """Whether this mode at a call of this kind is a point of its own."""
    return chr(kind).lower().encode() in _ONLY.get(mode, bytes(range(256)))


def build(out: Path) -> Path:
    """The compiled shim, named by its source; whoever is first makes it, whole or not at all."""
    made = out / f"shim-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not made.exists():
        out.mkdir(parents=True, exist_ok=True)
        staged = out / f"{made.name}.{os.getpid()}"
        flags = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", str(staged), str(SOURCE), "-ldl"], check=True)
        staged.replace(made)
    return made


def preloaded(out: Path) -> None:
    """Start this program again with the shim before everything else, where that is not so already."""
    shim = str(build(out))
    if shim not in os.environ.get("LD_PRELOAD", "").split(":"):
        os.environ["LD_PRELOAD"] = ":".join(filter(None, [shim, os.environ.get("LD_PRELOAD", "")]))
        os.execv(sys.executable, [sys.executable, *sys.argv])


class Shim:
    """The preloaded library, in this process."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(None)

    def arm(self, root: Path, point: int, mode: Mode) -> None:
        """Count the calls below `root` from now on, and let the `point`-th (from 1) meet its fate."""
        self._lib.fault_arm(os.fsencode(root), ctypes.c_long(point), int(mode))

    def log(self, path: Path) -> None:
        """Append a record of every call below the root to a file."""
        if self._lib.fault_log(os.fsencode(path)):
            raise OSError(f"{path}: cannot be written")

    def note(self, word: str) -> None:
        """Put a word into the log."""
        self._lib.fault_note(word.encode())

    def kinds(self) -> bytes:
        """The kind of each call that was counted, in order; shim.c names the letters. Calls by which ranks
        meet on the file system have capitals."""
        out = ctypes.create_string_buffer(_MOST)
        n = self._lib.fault_kinds(out, ctypes.c_long(_MOST))
        return out.raw[:n]
