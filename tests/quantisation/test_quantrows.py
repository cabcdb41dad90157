"""The GPU's quantising body, run on the host, makes numpy's bytes, scales and zero points of every scheme."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import quant_oracle
import torch
from fastckpt import dtypes
from fastckpt.errors import ViewError
from fastckpt.quantisation import rounding
from fastckpt.quantisation.quantrows import QUANT_ROWS, There, counts, covered, tiled
from fastckpt.quantisation.schemes import SCHEMES, Scheme

_C = pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"bytes": [(1, 1), (1, 130), (3, 256), (130, 384), (257, 136), (5, 203), (40, 2100)],
          "across": [(1, 128), (9, 256), (17, 2304), (130, 384)],
          "turned": [(128, 8), (256, 136), (128, 1040)]}  # fmt: skip
GUARD = 64


def matrices(rows, columns, dtype):
    """Those of the oracle, and huge ones."""
    yield from quant_oracle.matrices(rows, columns, dtype)
    if dtype is not torch.float16:
        yield (torch.randn(rows, columns) * 2.0**100).to(dtype)


def shapes(scheme: Scheme):
    return SHAPES["turned" if scheme.turned else "across" if scheme.packed or scheme.microscaled else "bytes"]


class Held:
    """Bytes in main memory that stand for a GPU's, `at` past a multiple of 16, with guards on both sides."""

    def __init__(self, nbytes: int, at: int = 0) -> None:
        self.whole = np.full(nbytes + 2 * GUARD + 32, 0xA5, np.uint8)
        start = -self.whole.ctypes.data % 16 + GUARD + at
        self.bytes = self.whole[start : start + nbytes]
        self.address = self.bytes.ctypes.data
        self.rest = np.ones(len(self.whole), bool)
        self.rest[start : start + nbytes] = False

    def untouched(self) -> bool:
        return bool((self.whole[self.rest] == 0xA5).all())


def by_the_body(shuffle: int):
    """Runs a table over buffers in main memory by the GPU's body."""
    return lambda table, owner, buffers: _C.run_quantise_on_host(table.view(np.uint8), owner, shuffle)


def quantised(x, scheme, *, tall=0, given=None, pad=0, at=0, bands=(), run=None):
    """Values, scales, packed zeros, whether bad, by what `run` runs; `pad`: values between rows."""
    rows, columns = x.shape
    item = x.element_size()
    wide = torch.full((rows, columns + pad), 7.0, dtype=x.dtype)
    wide[:, :columns] = x
    source = Held(wide.nbytes, at)
    source.bytes[:] = wide.view(torch.uint8).numpy().reshape(-1)
    tall = tall or rows
    lead = rows // tall
    down, across = scheme.grid(tall, columns) if scheme.block != (128, 128) else scheme.grid(rows, columns)
    blocks = (lead if scheme.block[0] == 0 or (scheme.block == (1, 0)) else 1) * down * across
    out = Held(rows * columns * scheme.bits // 8)
    scales = Held(blocks * scheme.scale_dtype.itemsize)
    zeros = (
        Held(4 * np.prod(scheme.zero_shape((rows, columns)), dtype=int))
        if scheme.packed and scheme.zero
        else None
    )
    bad = Held(4)
    bad.bytes[:] = 0
    found = None
    if scheme.block[0] == 0 or given is not None:
        found = Held(4 * (lead if scheme.block[0] == 0 else rows))
        found.bytes[:] = 0 if given is None else given.view(np.uint8)
    buffers = [h for h in (source, out, scales, zeros, found, bad) if h is not None]
    there = There(
        scheme, dtypes.dtype(str(x.dtype)), rows, columns, tall, out.address, scales.address,
        0 if zeros is None else zeros.address, 0 if found is None else found.address, bad.address,
    )  # fmt: skip
    pitch = (columns + pad) * item
    edges = [0, *bands, rows]
    spans = [(a, b - a, source.address + a * pitch, pitch) for a, b in pairwise(edges)]
    todo = [[there.part(*span) for span in spans]]
    if scheme.block[0] == 0 and given is None:
        todo.insert(0, [there.part(*span, largest=True) for span in spans])
    for parts in todo:
        table, owner, borders = tiled(parts)
        counted = np.zeros(len(table), np.uint64)
        _C.tiles_of_quant_rows(table.view(np.uint8), counted)
        assert counted.tolist() == counts(table).tolist() == np.diff(borders).tolist()
        (run or by_the_body(0))(table, owner, buffers)
    assert all(held.untouched() for held in buffers)
    return out.bytes, scales.bytes, None if zeros is None else zeros.bytes, bool(bad.bytes[0])


def wanted(x, scheme, *, tall=0, given=None):
    """The same by numpy, and as `quantising` lays scales and zero points."""
    rows, columns = x.shape
    raw = x.contiguous().view(torch.uint8).numpy().reshape(-1)
    out = np.zeros(rows * columns * scheme.bits // 8, np.uint8)
    if scheme.block[0] == 0 and given is None:
        given = x.float().abs().reshape(rows // (tall or rows), -1).amax(1).numpy()
    largest = given if given is None else np.repeat(given, rows // len(given))
    found = rounding.quantise(
        raw, dtypes.dtype(str(x.dtype)), rows, columns, scheme, largest, out, native=False
    )
    if found is None:
        return None
    scales = found.scales
    if scheme.block[0] == 0:
        scales = np.ascontiguousarray(scales[:: tall or rows])
    scales = rounding.stored_scales(scales, scheme)
    zeros = rounding.stored_zeros(found.zeros, scheme) if scheme.packed and scheme.zero else None
    return out, scales.reshape(-1).view(np.uint8), None if zeros is None else zeros.reshape(-1).view(np.uint8)


def compare(x, scheme, **how):
    expected = wanted(x, scheme, **{k: how[k] for k in ("tall", "given") if k in how})
    values, scales, zeros, bad = quantised(x, scheme, **how)
    assert bad == (expected is None), (x.shape, x.dtype)
    if expected is None:
        return
    assert np.array_equal(scales, expected[1]), (x.shape, x.dtype, how)
    assert (zeros is None) == (expected[2] is None)
    assert zeros is None or np.array_equal(zeros, expected[2]), (x.shape, x.dtype, how)
    assert np.array_equal(values, expected[0]), (x.shape, x.dtype, how)


@pytest.mark.parametrize("name", ["int8", "fp8-channel"])
def test_values_beside_those_halfway_between_two_codes(name: str) -> None:
    """The sides that one correction of a quotient must tell apart; and zeros of both signs, denormals."""
    scheme = SCHEMES[name]
    largest = np.random.default_rng(3).uniform(1, 2, 200).astype(np.float32)
    scales = largest / np.float32(scheme.reach)
    last = 127.5 if name == "int8" else 15.5  # fp8's beyond are these times powers of two
    halfway = np.arange(0.5, last + 1, dtype=np.float32)[None] * scales[:, None]
    beside = (halfway.view(np.int32)[:, :, None] + np.arange(-3, 4, dtype=np.int32)).view(np.float32)
    beside = np.minimum(beside.reshape(len(largest), -1), largest[:, None])
    if name == "fp8-channel":
        beside = np.concatenate([beside * np.float32(2.0**e) for e in (-10, -9, -8, -4, 0, 4)], 1)
        beside = np.minimum(beside, largest[:, None])
    small = np.tile(np.array([0.0, -0.0, 1e-45, -1e-45, 3e-39], np.float32), (len(largest), 1))
    values = np.concatenate([largest[:, None], -beside, beside, small], 1)
    compare(torch.from_numpy(values[:, : values.shape[1] // 8 * 8].copy()), scheme)
    compare(torch.from_numpy(values), scheme)


def test_the_table_is_the_kernels() -> None:
    assert QUANT_ROWS.itemsize == _C.quant_rows_bytes
    assert all(covered(s) for s in SCHEMES.values())


@pytest.mark.parametrize("name", list(SCHEMES))
def test_bytes_equal_numpys(name: str) -> None:
    scheme = SCHEMES[name]
    for k, (rows, columns) in enumerate(shapes(scheme)):
        for j, x in enumerate(matrices(rows, columns, DTYPES[k % 3])):
            compare(x, scheme, run=by_the_body(k * j))


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(SCHEMES))
def test_bytes_equal_numpys_of_every_type(name: str) -> None:
    scheme = SCHEMES[name]
    for rows, columns in shapes(scheme):
        for dtype in DTYPES:
            for x in matrices(rows, columns, dtype):
                compare(x, scheme)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_rows_where_they_lie(name: str) -> None:
    """Part of wider rows, at an odd place, and in bands."""
    scheme = SCHEMES[name]
    rows, columns = 384, 264 if scheme.bits == 8 and not scheme.microscaled else 256
    unit = max(8, scheme.block[0])
    x = torch.randn(rows, columns)
    for dtype, pad, at in ((torch.float32, 3, 4), (torch.bfloat16, 8, 0), (torch.float16, 1, 2)):
        bands = (unit, 3 * unit) if unit < 128 else (128,)
        compare(x.to(dtype), scheme, pad=pad, at=at, run=by_the_body(5), bands=bands)


@pytest.mark.parametrize("name", ["fp8", "int8-dynamic"])
def test_a_scale_for_each_matrix_of_a_stack(name: str) -> None:
    x = torch.randn(3 * 40, 72) * torch.tensor([1.0, 8.0, 0.0]).repeat_interleave(40)[:, None]
    compare(x, SCHEMES[name], tall=40, bands=(8, 64))


@pytest.mark.parametrize("name", ["int8", "fp8-channel", "fp8"])
def test_a_given_largest_is_taken(name: str) -> None:
    x = torch.randn(64, 200)
    largest = x.abs().amax(1).numpy() * 2
    compare(x, SCHEMES[name], given=largest[:1] * 8 if SCHEMES[name].block[0] == 0 else largest)


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_told(name: str, bad: float) -> None:
    scheme = SCHEMES[name]
    for dtype in DTYPES:
        for row, column in ((0, 0), (127, 31), (128, 255), (255, 130)):
            x = torch.randn(256, 256).to(dtype)
            x[row, column] = bad
            assert quantised(x, scheme)[3], (dtype, row, column)


@pytest.mark.parametrize("name", ["int4-group-zero", "awq-group", "gptq-group", "gptq-group-zero"])
def test_a_range_beyond_its_scale_is_told(name: str) -> None:
    x = torch.randn(128, 128)
    x[3, 5], x[4, 5], x[3, 6] = 3e38, -3e38, -3e38
    compare(x, SCHEMES[name])


def test_refusals() -> None:
    tall, wide = ((1 << 31, 8), (8, 1 << 31))
    for rows, columns in (tall, wide):
        there = There(SCHEMES["int8"], dtypes.float32, rows, columns, rows)
        with pytest.raises(ViewError, match=f"{rows} rows or {columns} columns"):
            tiled([there.part(0, rows, 0, 4 * columns)])
    table, owner, borders = tiled([])
    assert len(table) == len(owner) == 0 and borders.tolist() == [0]


def test_odd_sizes_at_random() -> None:
    rng = np.random.default_rng(5)
    for k in range(60):
        scheme = list(SCHEMES.values())[k % len(SCHEMES)]
        down, across = max(1, scheme.block[0]), max(1, scheme.block[1])
        rows, columns = int(rng.integers(1, 300)), int(rng.integers(1, 700))
        if scheme.turned:
            rows, columns = (rows // down + 1) * down, (columns // 8 + 1) * 8
        elif scheme.packed or scheme.microscaled:
            columns = (columns // across + 1) * across
        x = torch.from_numpy(rng.standard_normal((rows, columns), np.float32)).to(DTYPES[k % 3])
        compare(x, scheme, pad=int(rng.integers(0, 3)), run=by_the_body(k))
