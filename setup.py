"""Builds `fastckpt._C` from csrc/; everything else about the package stands in pyproject.toml.

Law: the extension is optional. Without a compiler one loud line is printed and the package stays pure Python.
FASTCKPT_BUILD: 0 skips the extension, 1 makes a failure to build it fatal, unset tries.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

WANTED = os.environ.get("FASTCKPT_BUILD", "auto")
CSRC = Path("csrc")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
LINK = ["-Wl,-s", "-pthread"] if sys.platform == "linux" else []
SOURCES = ["module.cpp", "read.cpp", "digest.cpp", "copy_cpu.cpp", "isa_portable.cpp"]
X86 = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mbmi2"],
    "isa_avx512.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mbmi2",
        "-mprefer-vector-width=512",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
}
"""The translation units of one instruction set each, with the only flags that name one: the module runs on
any x86-64. (gcc 12 warns of its own AVX-512 headers.)"""


def units() -> dict[str, list[str]]:
    """Every source file of the CPU build and the flags it needs beyond FLAGS."""
    extra = X86 if platform.machine().lower() in ("x86_64", "amd64") else {}
    return {name: [] for name in SOURCES} | extra


class Build(build_ext):
    """Compiles each unit with its own flags, all at once, and links them."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_units(ext)
        except (BaseError, CCompilerError, OSError, ImportError) as error:
            if WANTED == "1":
                raise
            line = (
                f"*** fastckpt: NO COMPILED MODULE ({error}); the package stays pure Python, far slower. ***"
            )
            print(line, file=sys.stderr)

    def build_units(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name))
        changed = max(Path(p).stat().st_mtime for p in ext.depends)
        if not self.force and target.exists() and target.stat().st_mtime > changed:
            return
        objects: list[str] = []

        def compile_one(unit: tuple[str, list[str]]) -> list[str]:
            name, extra = unit
            made: list[str] = self.compiler.compile(
                [str(CSRC / name)],
                output_dir=self.build_temp,
                include_dirs=[pybind11.get_include(), *self.compiler.include_dirs],
                extra_postargs=[*FLAGS, *extra],
                depends=ext.depends,
            )
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for made in pool.map(compile_one, units().items()):
                objects += made
        # A CUDA build adds the objects of nvcc and libcudart_static.a here.
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=LINK, target_lang="c++")


EXTENSION = Extension(
    "fastckpt._C",
    sources=[str(CSRC / name) for name in units()],
    depends=[*(str(p) for p in sorted(CSRC.iterdir())), "setup.py"],
    language="c++",
    optional=WANTED != "1",
)

setup(ext_modules=[] if WANTED == "0" else [EXTENSION], cmdclass={"build_ext": Build})
