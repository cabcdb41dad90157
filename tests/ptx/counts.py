"""What a path asks of a GPU, counted while its PTX runs: instructions, sectors, waves of shared memory.

`PYTHONPATH=python:tests python -m ptx.counts` prints the table of benchmarks/kernels.md. PTX is not what a
GPU runs: one of its instructions becomes none, one or, of 64 bits or a division, several."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from fastckpt.dtypes import BY_NAME
from fastckpt.executors import tiles
from fastckpt.planning.copies import COPY
from fastckpt.quantisation.quantrows import There, tiled
from fastckpt.quantisation.schemes import SCHEMES

from .compiled import DEFAULT, Target
from .launches import copies, quantise
from .memory import SECTOR, Global, Traffic


@dataclass(frozen=True, slots=True)
class Case:
    """A copy of [lines, elements] of one type to another; `turned`: the source has them as [elements, lines].

    `at`: bytes past a multiple of 256 at which the source begins. `pitch`: elements between its lines."""

    types: str
    shape: tuple[int, int]
    turned: bool = False
    at: int = 0
    pitch: int = 0


@dataclass(frozen=True, slots=True)
class Count:
    """Of a case: its path, bytes read and written, instructions of warps, traffic, waves and the fewest."""

    path: str
    nbytes: int
    instructions: int
    read: Traffic
    written: Traffic
    waves: int
    least: int

    @property
    def per_instruction(self) -> float:
        """Bytes that an instruction of a warp moves."""
        return self.nbytes / self.instructions


def count(case: Case, target: Target = DEFAULT) -> Count:
    """Runs a case over weights as they are: normal values, none of them NaN."""
    src, dst = (BY_NAME[n] for n in case.types.split())
    lines, n = case.shape
    s, d = src.itemsize, dst.itemsize
    pitch = case.pitch or n
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(lines * pitch, generator=generator).to(getattr(torch, src.name))
    memory = Global()
    source = memory.put("source", values.view(torch.uint8).numpy(), case.at)
    out = memory.put("out", np.zeros(lines * n * d, np.uint8), written="once")
    row = np.zeros(1, COPY)
    row["shape"], row["dst_stride"] = (1, 1, lines, n), (0, 0, n * d, d)
    row["src_stride"] = (0, 0, s, lines * s) if case.turned else (0, 0, pitch * s, s)
    row["src_dtype"], row["dst_dtype"] = src.code, dst.code
    made = tiles.tile(row, np.array([source], np.uint64), np.array([out], np.uint64))
    ((path, counted),) = copies(memory, made, target).items()
    waves = counted.waves["load"] + counted.waves["store"]
    read, written = memory.traffic["source", "read"], memory.traffic["out", "write"]
    issued = int(counted.issued.sum())
    return Count(path, lines * n * (s + d), issued, read, written, waves, counted.waves["least"])


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix [rows, columns] of a type quantised by a scheme."""

    scheme: str
    dtype: str
    shape: tuple[int, int]


def count_quantised(case: Quantised, target: Target = DEFAULT) -> Count:
    """As `count`; bytes are those of the values, before and after, each once."""
    scheme, dtype = SCHEMES[case.scheme], BY_NAME[case.dtype]
    rows, columns = case.shape
    n = rows * columns
    values = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype.name))
    memory = Global()
    source = memory.put("source", values.view(torch.uint8).numpy())
    out = memory.put("out", np.zeros(n, np.uint8), written="once")
    blocks = int(np.prod(scheme.grid(rows, columns)))
    scales = memory.put("scales", np.zeros(blocks, np.float32), written="once")
    bad = memory.put("bad", np.zeros(1, np.uint32), written="same")
    there = There(scheme, dtype, rows, columns, rows, out, scales, bad=bad)
    table, owner, _ = tiled([there.part(0, rows, source, columns * dtype.itemsize)])
    counted = quantise(memory, table, owner, target)
    read, written = memory.traffic["source", "read"], memory.traffic["out", "write"]
    return Count("quantise", n * (dtype.itemsize + 1), int(counted.issued.sum()), read, written, 0, 0)


PAIRS = ("float32 bfloat16", "bfloat16 bfloat16", "bfloat16 float32", "float32 float8_e4m3fn")
LONG, SHORT, SQUARE = (1, 1 << 17), (256, 512), (512, 512)
CASES = {
    **{f"rows {p}": Case(p, LONG) for p in PAIRS},
    **{f"rows {p}, source 2 past": Case(p, LONG, at=2) for p in PAIRS[:2]},
    **{f"rows of 512 {p}": Case(p, SHORT) for p in PAIRS[:2]},
    **{f"rows of 512 {p}, source 2 past": Case(p, SHORT, at=2) for p in PAIRS[:2]},
    **{f"rows of 64 in 512 {p}": Case(p, (1024, 64), pitch=512) for p in PAIRS[:2]},
    **{f"transpose {p}": Case(p, SQUARE, turned=True) for p in PAIRS},
    **{f"transpose to lines of 16 {p}": Case(p, (4096, 16), turned=True) for p in PAIRS[:2]},
}
QUANTISED = {
    f"{scheme} {dtype}": Quantised(scheme, dtype, (256, 1024))
    for scheme in ("fp8-block", "int8")
    for dtype in ("bfloat16", "float32")
}


def main() -> None:
    print("| path | bytes an instruction | sectors read, of the fewest | written | waves of shared memory |")
    print("|---|---|---|---|---|")
    for name, case in CASES.items():
        c = count(case)
        src, dst = (BY_NAME[x].itemsize for x in case.types.split())
        each = case.shape[0] * case.shape[1] // SECTOR
        read, written = c.read.sectors / (each * src), c.written.sectors / (each * dst)
        waves = f"{c.waves / c.least:.2f}" if c.least else ""
        print(f"| {name} | {c.per_instruction:.1f} | {read:.2f} | {written:.2f} | {waves} |")
    for name, quantised in QUANTISED.items():
        c = count_quantised(quantised)
        n, item = quantised.shape[0] * quantised.shape[1], BY_NAME[quantised.dtype].itemsize
        read, written = c.read.sectors * SECTOR / (n * item), c.written.sectors * SECTOR / n
        print(f"| quantise {name} | {c.per_instruction:.1f} | {read:.2f} | {written:.2f} |  |")


if __name__ == "__main__":
    main()
