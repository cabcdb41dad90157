"""What nvcc makes of the kernels with the flags of setup.py: PTX, and what the assembler says of it."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .program import Program, parse

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++17", "-O3", "-fmad=false")


@dataclass(frozen=True, slots=True)
class Compiled:
    """The PTX of a .cu file, and the compiler's report."""

    ptx: str
    program: Program
    report: str


@dataclass(frozen=True, slots=True)
class Target:
    """What a file is compiled for; "FLIGHT=4" of `defines` defines FASTCKPT_FLIGHT."""

    architecture: str = "90"
    defines: tuple[str, ...] = ()


DEFAULT = Target()


def compiled(source: str, target: Target = DEFAULT) -> Compiled:
    """A file of csrc/, made once in a process."""
    return _compiled(source, target)


@cache
def _compiled(source: str, target: Target) -> Compiled:
    asked = [f"-DFASTCKPT_{d}" for d in target.defines]
    with tempfile.TemporaryDirectory() as folder:
        made = ("-Xptxas", "-v", "-cubin", "--keep", "--keep-dir", folder, "-o", f"{folder}/made.cubin")
        done = subprocess.run(
            ["nvcc", *FLAGS, *asked, f"-arch=sm_{target.architecture}", *made, f"csrc/{source}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ValueError(f"{source}: {done.stderr[-3000:]}")
        (ptx,) = Path(folder).glob("*.ptx")
        text = ptx.read_text()
    return Compiled(text, parse(text), done.stderr)
