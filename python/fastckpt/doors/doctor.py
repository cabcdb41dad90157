"""What this machine and this build offer: the facts a bug report needs.

Law: looking changes nothing; neither torch nor the CUDA runtime is imported or initialised.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module, metadata

from .. import __version__
from ..checkpoint import JSON
from ..output.filesystem import real
from ..pipeline import cores
from .text import size, spelled

PACKAGES = ("numpy", "torch", "safetensors", "huggingface_hub", "xxhash", "rich")
FLAGS = (
    "sse4_2", "pclmulqdq", "f16c", "fma", "bmi2", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq",
    "avx512_bf16", "vpclmulqdq", "asimd", "bf16", "sve",
)  # fmt: skip
"""CPU features worth naming: what the compiled paths use or could use (Linux' spelling)."""


@dataclass(frozen=True, slots=True)
class Checkup:
    """Sections of facts, each a name and its (key, value) pairs; sizes in bytes."""

    sections: dict[str, dict[str, JSON]]

    def text(self) -> str:
        """The facts as aligned lines under their section's name."""
        lines: list[str] = []
        for section, facts in self.sections.items():
            lines.append(section)
            width = max((len(k) for k in facts), default=0)
            lines += [f"  {k:<{width}}  {_shown(v)}" for k, v in facts.items()]
        return "\n".join(lines)

    def json(self) -> dict[str, JSON]:
        """The facts as JSON values."""
        return {name: dict(facts) for name, facts in self.sections.items()}


def examine(path: str = ".") -> Checkup:
    """Build, toolkit, driver, CPU, Python packages and the file system that holds `path`."""
    return Checkup(
        {
            "fastckpt": _build(),
            "cuda": _cuda(),
            "cpu": _cpu(),
            "python": _python(),
            "system": _system(),
            "output": _storage(path),
        }
    )


def _build() -> dict[str, JSON]:
    facts: dict[str, JSON] = {"version": __version__}
    try:
        module = import_module("fastckpt._C")
    except ModuleNotFoundError:
        return facts | {"compiled": False, "note": "pure Python: every result is the same, far slower"}
    except ImportError as e:
        return facts | {"compiled": False, "note": f"the compiled module does not load: {e}"}
    facts |= {"compiled": True, "module": str(module.__file__)}
    for name in ("compiler", "isas", "built_with_cuda", "cuda_archs"):
        value = getattr(module, name, None)
        value = value() if callable(value) else value
        if value is not None:
            facts[name] = [str(v) for v in value] if isinstance(value, (list, tuple)) else _plain(value)
    return facts


def _cuda() -> dict[str, JSON]:
    nvcc, smi = shutil.which("nvcc"), shutil.which("nvidia-smi")
    facts: dict[str, JSON] = {"nvcc": nvcc, "nvidia-smi": smi}
    if nvcc:
        lines = _output(nvcc, "--version")
        facts["toolkit"] = next((x for x in lines if "release" in x), lines[-1])
    try:
        ctypes.CDLL("libcuda.so.1")  # loads the driver's library; nothing is initialised until a call
        facts["libcuda"] = True
    except OSError:
        facts["libcuda"] = False
    facts["driver"] = _first_line("/proc/driver/nvidia/version") or None
    if smi:
        query = "--query-gpu=name,driver_version,memory.total"
        facts["gpus"] = [*_output(smi, query, "--format=csv,noheader")]
    return facts


def _cpu() -> dict[str, JSON]:
    info = _key_values("/proc/cpuinfo")
    flags = set((info.get("flags") or info.get("Features") or "").split())
    facts: dict[str, JSON] = {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "usable cores": cores(),
        "features": [f for f in FLAGS if f in flags],
    }
    total = _key_values("/proc/meminfo").get("MemTotal", "").split()
    if total:
        facts["memory"] = int(total[0]) * 1024
    limit = _first_line("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        facts["memory limit"] = int(limit)
    return facts


def _python() -> dict[str, JSON]:
    facts: dict[str, JSON] = {"python": platform.python_version(), "executable": sys.executable}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def _system() -> dict[str, JSON]:
    return {
        "system": platform.system(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "page size": os.sysconf("SC_PAGE_SIZE"),
        "byte order": sys.byteorder,
    }


def _storage(path: str) -> dict[str, JSON]:
    """Free space and file system of the nearest directory above `path` that exists. Raises WriteError for no
    path of an output."""
    here = real(path)
    while not os.path.isdir(here) and here != os.path.dirname(here):
        here = os.path.dirname(here)
    facts: dict[str, JSON] = {"path": here, "writable": os.access(here, os.W_OK)}
    usage = shutil.disk_usage(here)
    facts |= {"free": usage.free, "total": usage.total}
    return facts | {"file system": _file_system(here)}


def _file_system(path: str) -> str | None:
    """The type of the mount that holds `path` (proc(5), mountinfo: the fifth field and the one after "-")."""
    best, found = -1, None
    for line in _lines("/proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, found = len(point), right.split()[0]
    return found


def _output(*command: str) -> list[str]:
    """The lines a command prints, at least one: that it did not run, where it did not."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return [f"did not run: {e}"]
    lines = [x.strip() for x in (done.stdout or done.stderr).splitlines() if x.strip()]
    return lines or [f"exit status {done.returncode}, no output"]


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read().splitlines()
    except OSError:
        return []


def _first_line(path: str) -> str:
    return next(iter(_lines(path)), "").strip()


def _key_values(path: str) -> dict[str, str]:
    """The first value of each `key : value` line."""
    out: dict[str, str] = {}
    for line in _lines(path):
        key, colon, value = line.partition(":")
        if colon:
            out.setdefault(key.strip(), value.strip())
    return out


def _plain(value: object) -> JSON:
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _shown(fact: JSON) -> str:
    if isinstance(fact, int) and fact >= 1 << 20:
        return f"{fact} ({size(fact)})"
    return spelled(fact)
