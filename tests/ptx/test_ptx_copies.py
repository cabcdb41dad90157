"""The PTX of the copies, run on the CPU, writes the bytes of the torch executor and no others.

Accesses that are outside of an allocation or not aligned, races, and barriers that not all come to are faults
of the machine that runs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import chain

import numpy as np
import pytest
from executors import test_copy_rows as copy_rows
from executors.test_copy_rows import EVEN, PAIRS, TRANSPOSED, buffer, noise, random_row, row
from fastckpt.dtypes import BY_NAME, DType
from fastckpt.executors import tiles
from fastckpt.executors.torch import Torch
from ptx.compiled import DEFAULT, Target
from ptx.launches import copies
from ptx.memory import Global

pytest.importorskip("fastckpt._C", reason="the compiled module is not built")
pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: the kernels are not compiled here"
)


def same(cases: Iterable[copy_rows.Case], target: Target = DEFAULT) -> Global:
    """Runs rows as one table, each with its own part of two buffers; every byte of them must be torch's."""
    rng = np.random.default_rng(1)
    rows, sources, ends, at = [], [], [0], 0
    for r, source, nbytes in cases:
        r["src"] += at
        r["dst"] += ends[-1]
        rows.append(r)
        sources.append(source)
        at += len(source)
        ends.append(ends[-1] + nbytes)
    table, source, out = np.concatenate(rows), np.concatenate(sources), noise(rng, ends[-1])
    wanted = out.copy()
    Torch().bind([buffer(source)]).run(table, [buffer(wanted)])
    memory = Global()
    a, b = memory.put("source", source), memory.put("destination", out, written="once")
    made = tiles.tile(table.copy(), np.array([a], np.uint64), np.array([b], np.uint64))
    copies(memory, made, target)
    got = memory.get(b, len(out))
    bad = np.flatnonzero(got != wanted)[:1]
    copy_rows.require_equal(got, wanted, table[np.searchsorted(ends, bad, "right") - 1])
    return memory


def random_rows(target: Target = DEFAULT) -> None:
    rng = np.random.default_rng(21)
    cases = []
    for src, dst in PAIRS:
        for budget in (1, 40, 700, 6000):
            r, n, m = random_row(rng, src, dst, budget)
            cases.append((r, noise(rng, n), m + 64))
    same(cases, target)


def test_random_rows() -> None:
    random_rows()


@pytest.mark.parametrize("names", TRANSPOSED)
def test_transposes(names: str) -> None:
    """Sides around those of a tile, cut along either axis; sources and destinations aligned and not."""
    src, dst = (BY_NAME[n] for n in names.split())
    rng = np.random.default_rng(22)
    sides = [(16, 300), (8, 1152), (11, 200), (16, 16), (63, 65), (128, 128), (129, 160), (300, 17)]
    places = [(0, 0), (3, 1), (64, 16), (16, src.itemsize * 5)]
    same(chain(*(copy_rows.transposes(rng, src, dst, sides[k::2], places[k::2]) for k in (0, 1))))


@pytest.mark.parametrize(
    "names", ["float32 bfloat16", "bfloat16 float32", "int8 int8", "bfloat16 float8_e4m3fn"]
)
def test_lines(names: str) -> None:
    """Lines around a unit and a tile long, one or many, at every alignment of both sides."""
    src, dst = (BY_NAME[n] for n in names.split())
    sizes = [(1, 1), (1, 31), (1, 4001), (3, 1024), (2, 1025), (70, 129)]
    places = sorted({0, 1, src.itemsize, dst.itemsize, 8, 15, 24})
    same(copy_rows.lines(np.random.default_rng(23), src, dst, sizes, places))


@pytest.mark.parametrize("names", EVEN)
def test_even_lines(names: str) -> None:
    src, dst = (BY_NAME[n] for n in names.split())
    same(copy_rows.even_lines(np.random.default_rng(26), src, dst))


POSITIVE = (
    0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000,
    0x7FFFFFFF,
    0x33000000, 0x33000001, 0x33800000, 0x387FE000, 0x387FF000, 0x38800000,  # fp16
    0x3F801000, 0x3F803000, 0x477FE000, 0x477FEFFF, 0x477FF000,
    0x3A800000, 0x3A800001, 0x3B000000, 0x3C7FFFFF, 0x43E00000, 0x43E7FFFF, 0x43E80000, 0x43F00000,  # e4m3fn
    0x00008000, 0x00018000, 0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000,  # bf16
)  # fmt: skip
EDGES = np.array([sign | x for sign in (0, 1 << 31) for x in POSITIVE], np.uint32)
"""fp32 where a narrower type rounds up or down, has a tie, a denormal, its largest value or none."""


def values(rng: np.random.Generator, dtype: DType) -> np.ndarray:
    """All values there are of up to 16 bits; of wider types 4,096, the edges among them."""
    if dtype.itemsize < 4:
        every = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}")
        return every.repeat(max(1, 4096 // len(every)))
    some = rng.integers(0, 1 << 32, 4096, dtype=np.uint32)
    some[: len(EDGES)] = EDGES
    if dtype.itemsize == 4:
        return some
    with np.errstate(all="ignore"):
        wide = some.view(np.float32).astype(np.float64).view(np.uint64)
    wide[1::2] ^= rng.integers(0, 1 << 30, len(wide) // 2, dtype=np.uint64)  # between two values of fp32
    return wide


def every_value(turned: bool, target: Target = DEFAULT) -> None:
    """Every pair of floats: each value of up to 16 bits, each edge of wider ones."""
    rng = np.random.default_rng(24)
    cases = []
    for src, dst in PAIRS:
        if src.code == dst.code:
            continue
        source = values(rng, src)
        s, d, n = src.itemsize, dst.itemsize, len(source) // 256
        strides = ((s, n * s) if turned else (256 * s, s)), (256 * d, d)
        cases.append((row(src, dst, (n, 256), *strides), source.view(np.uint8), n * 256 * d))
    same(cases, target)


@pytest.mark.parametrize("turned", [False, True], ids=["straight", "turned"])
def test_every_value(turned: bool) -> None:
    every_value(turned)


def test_long_lines() -> None:
    """Tiles of whole units of one line, at every alignment of either side; some hold a NaN, most do not."""
    rng = np.random.default_rng(25)
    cases = []
    for names in (
        "float32 bfloat16",
        "bfloat16 float16",
        "float16 float32",
        "bfloat16 float8_e4m3fn",
        "int8 int8",
    ):
        src, dst = (BY_NAME[n] for n in names.split())
        s, d = src.itemsize, dst.itemsize
        n = 3 * (4096 // max(s, d)) + 5
        for at in range(16):
            raw = noise(rng, at + n * s)
            if at % 2 == 0:
                raw[at + s - 1 :: s] &= 0x3F  # no exponent of ones
            cases.append((row(src, dst, (n,), (s,), (d,), (at, 3 * at % 16)), raw, 16 + n * d))
    same(cases)


def test_a_line_of_zeros() -> None:
    src = BY_NAME["bfloat16"]
    same([(row(src, src, (9000,), (0,), (2,), (0, 6), zero=True), np.zeros(16, np.uint8), 18_100)])


OTHERS = {
    "sm_80": Target("80"),
    "sm_120": Target("120"),
    "flight": Target(defines=("FLIGHT=4",)),
    "team": Target(defines=("TEAM=256",)),
    "hint": Target(defines=('HINT=".L1::no_allocate"',)),
}
"""Other branches of the device's code, and the constants that `make gpu` tries."""


@pytest.mark.nightly
@pytest.mark.parametrize("name", OTHERS)
def test_other_targets(name: str) -> None:
    random_rows(OTHERS[name])
    for names in EVEN:
        src, dst = (BY_NAME[n] for n in names.split())
        same(copy_rows.even_lines(np.random.default_rng(27), src, dst), OTHERS[name])
    for turned in (False, True):
        every_value(turned, OTHERS[name])
