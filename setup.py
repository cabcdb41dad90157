"""Builds `fastckpt._C` from csrc/; everything else about the package stands in pyproject.toml.

Law: the extension is optional, and so is its CUDA part. Without a compiler one loud line is printed and the
package stays pure Python; without nvcc one is printed and it runs on the CPU only.
FASTCKPT_BUILD: 0 skips the extension, 1 makes a failure to build it fatal, unset tries.
FASTCKPT_CUDA: the same for the CUDA part. CUDA_HOME or CUDA_PATH names a toolkit, else nvcc is on PATH or in
/usr/local/cuda. FASTCKPT_CUDA_ARCHS: "90" or "80,90" builds for these alone; where nvcc is too old to know
any of them, for the newest below that it knows.
FASTCKPT_DEFINES: "FLIGHT=4 TEAM=256" defines FASTCKPT_FLIGHT and FASTCKPT_TEAM, constants of the kernels.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

WANTED_CUDA = os.environ.get("FASTCKPT_CUDA", "auto")
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
    "-ffp-contract=off",  # products and sums are fused where the source says so, as numpy and torch do not
    "-Wall",
    "-Wextra",
]
LINK = ["-Wl,-s", "-pthread"] if sys.platform == "linux" else []
SOURCES: dict[str, list[str]] = {
    "module.cpp": ["-Os"],
    "mapping.cpp": ["-Os"],
    "recent.cpp": ["-Os"],
    "digest.cpp": [],
    "copy_cpu.cpp": [],
    "isa.cpp": ["-Os"],
    "tiles_host.cpp": ["-Os"],
    "isa_portable.cpp": [],
}
"""The translation units; those that are never hot are made small."""

X86 = {
    "isa_portable.cpp": ["-Os"],  # the last resort there
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

DEFINES = [f"-DFASTCKPT_{x}" for x in os.environ.get("FASTCKPT_DEFINES", "").split()]

CUDA_SOURCES = ("copy_cuda.cu", "digest_cuda.cu", "quant_cuda.cu")

CUDA_ARCHITECTURES = (os.environ.get("FASTCKPT_CUDA_ARCHS") or "80,86,89,90,100,120").split(",")
"""Native code for each of these that the toolkit knows, and PTX of the newest."""


class Toolkit:
    """A CUDA toolkit. Raises OSError with the reason where there is none that works."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        usual = "/usr/local/cuda/bin/nvcc"
        nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc") or usual
        if not os.path.exists(nvcc):
            raise OSError(f"no nvcc at {nvcc}{'' if home else ' and none on PATH'}")
        self.nvcc = nvcc
        with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
            said = self.ask("--dryrun", "-x", "cu", "-E", empty.name)
        # nvcc may be a script that calls the real one elsewhere: only it knows where its toolkit lies.
        top = next((x.split("TOP=", 1)[1].strip() for x in said if "TOP=" in x), None)
        if top is None:
            raise OSError(f"{nvcc} --dryrun names no TOP=")
        self.top = Path(top)
        told = re.search(r"release (\d+)\.", " ".join(self.ask("--version")))
        if told is None:
            raise OSError(f"{nvcc} --version names no release")
        self.release = int(told[1])
        known = {x.strip().removeprefix("sm_") for x in self.ask("--list-gpu-code")}
        self.architectures = [a for a in CUDA_ARCHITECTURES if a in known]
        if not self.architectures:  # a GPU newer than nvcc runs the code, or else the PTX, of an older one
            older = sorted(int(k) for k in known if k.isdigit() and int(k) < int(CUDA_ARCHITECTURES[-1]))
            self.architectures = [str(a) for a in older[-1:]]
        if not self.architectures:
            raise OSError(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
        self.runtime = self.library("libcudart_static.a")

    def ask(self, *arguments: str) -> list[str]:
        """The lines nvcc prints."""
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{self.nvcc} {' '.join(arguments)}: {done.stderr.strip() or done.returncode}")
        return (done.stdout + done.stderr).splitlines()

    def library(self, name: str) -> Path:
        """A library of the toolkit, wherever this kind of toolkit keeps it."""
        for folder in ("lib", "lib64", "targets/*/lib"):
            for found in sorted(self.top.glob(f"{folder}/{name}")):
                return found
        raise OSError(f"{self.top} has no {name} in lib, lib64 or targets/*/lib")

    def compile(self, name: str, folder: str) -> str:
        """The object of a .cu file, with code for every architecture.

        Products and sums are never fused: they give what they give on a CPU."""
        source, made = CSRC / name, Path(folder) / f"{name}.o"
        made.parent.mkdir(parents=True, exist_ok=True)
        newest = self.architectures[-1]
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        names = " ".join([*(f"sm_{a}" for a in self.architectures), f"compute_{newest}"])
        flags = [
            "-std=c++17",
            "-O3",
            "-fmad=false",
            "--threads",
            "0",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden,-g0",
        ]
        # What CUDA 12 makes smaller still, drivers before 12.4 cannot load; they run the rest of it.
        small = "--compress-mode=size" if self.release >= 13 else "-Xfatbin=-compress-all"
        self.ask(
            *flags, *DEFINES, small, *codes, f"-gencode=arch=compute_{newest},code=compute_{newest}",
            f'-DFASTCKPT_ARCHITECTURES="{names}"', "-c", str(source), "-o", str(made),
        )  # fmt: skip
        return str(made)


def toolkit() -> Toolkit | None:
    """The toolkit to build with; none where none was asked for. Raises OSError where it must be there."""
    if WANTED_CUDA == "0":
        return None
    try:
        return Toolkit()
    except OSError as error:
        if WANTED_CUDA == "1":
            raise
        print(f"*** fastckpt: NO CUDA ({error}); this build runs on the CPU only. ***", file=sys.stderr)
        return None


def units() -> dict[str, list[str]]:
    """Every source file of the CPU build and the flags it needs beyond FLAGS."""
    extra = X86 if platform.machine().lower() in ("x86_64", "amd64") else {}
    return SOURCES | extra


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
        cuda = toolkit()
        # What was built with other flags, or without CUDA, is not this build.
        toolkit_of = (cuda.nvcc, *cuda.architectures) if cuda else "no"
        defines = [*DEFINES, f'-DFASTCKPT_VERSION="{self.distribution.get_version()}"']
        asked = f"{os.environ.get('CFLAGS', '')} {os.environ.get('CXXFLAGS', '')} {defines} cuda {toolkit_of}"
        stamp = Path(self.build_temp) / "asked"
        same = stamp.exists() and stamp.read_text() == asked
        changed = max(Path(p).stat().st_mtime for p in ext.depends)
        if same and not self.force and target.exists() and target.stat().st_mtime > changed:
            return
        objects, libraries, cuda_flags = self.build_cuda(cuda)

        def compile_one(unit: tuple[str, list[str]]) -> list[str]:
            name, extra = unit
            made: list[str] = self.compiler.compile(
                [str(CSRC / name)],
                output_dir=self.build_temp,
                include_dirs=[pybind11.get_include(), *self.compiler.include_dirs],
                extra_postargs=[*FLAGS, *defines, *cuda_flags, *extra],
                depends=ext.depends,
            )
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for made in pool.map(compile_one, units().items()):
                objects += made
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=[*libraries, *LINK], target_lang="c++"
        )
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(asked)

    def build_cuda(self, cuda: Toolkit | None) -> tuple[list[str], list[str], list[str]]:
        """The objects of the CUDA part, what is linked with them, and the flags of the other units."""
        if cuda is None:
            return [], [], []
        try:
            with ThreadPoolExecutor(len(CUDA_SOURCES)) as pool:
                made = list(pool.map(lambda name: cuda.compile(name, self.build_temp), CUDA_SOURCES))
        except OSError as error:
            if WANTED_CUDA == "1":
                raise
            print(f"*** fastckpt: NO CUDA ({error}); this build runs on the CPU only. ***", file=sys.stderr)
            return [], [], []
        # The runtime is linked in and hidden: torch brings its own, and both share the driver's context.
        libraries = [str(cuda.runtime), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt"]
        return made, libraries, ["-DFASTCKPT_CUDA"]


EXTENSION = Extension(
    "fastckpt._C",
    sources=[str(CSRC / name) for name in units()],
    depends=[*(str(p) for p in sorted(CSRC.iterdir())), "setup.py"],
    language="c++",
    optional=WANTED != "1",
)

setup(license="Apache-2.0", ext_modules=[] if WANTED == "0" else [EXTENSION], cmdclass={"build_ext": Build})
