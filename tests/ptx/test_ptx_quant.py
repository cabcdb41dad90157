"""The PTX that quantises, run on the CPU, makes numpy's bytes, scales and zero points of every scheme."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from fastckpt.quantisation.schemes import SCHEMES
from ptx.compiled import DEFAULT, Target
from ptx.launches import quantise
from ptx.memory import Global
from quantisation.test_quantrows import DTYPES, Held, compare, matrices, quantised, shapes

pytest.importorskip("fastckpt._C", reason="the compiled module is not built")
pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: the kernels are not compiled here"
)

Run = Callable[[np.ndarray, np.ndarray, Sequence[Held]], None]
ADDRESSES = ("src", "out", "scales", "zeros", "amax", "bad")


def by_ptx(table: np.ndarray, owner: np.ndarray, buffers: Sequence[Held], target: Target = DEFAULT) -> None:
    """Runs a table over copies of these buffers, which lie as they do past a multiple of 16."""
    memory, moved, there = Global(), table.copy(), []
    for held in buffers:
        ends = held.address, held.address + len(held.bytes)
        names = [n for n in ADDRESSES if ((table[n] >= ends[0]) & (table[n] < ends[1])).all()]
        written = {"src": "never", "bad": "same"}.get(names[0], "once")
        there.append(memory.put(names[0], held.bytes, held.address % 16, written))
        for name in names:
            moved[name] = table[name] - np.uint64(held.address) + np.uint64(there[-1])
    quantise(memory, moved, owner, target)
    for held, at in zip(buffers, there, strict=True):
        held.bytes[:] = memory.get(at, len(held.bytes))


HOW = ((torch.float32, 3, 4), (torch.bfloat16, 8, 0), (torch.float16, 1, 2))
"""Type, values between rows, bytes past a multiple of 16."""


def parts_of_wider_rows(name: str, *how: tuple[torch.dtype, int, int], run: Run = by_ptx) -> None:
    """A matrix and the same in bands, where there are values beside it, at an odd place."""
    scheme = SCHEMES[name]
    rows, columns = 384, 264 if scheme.bits == 8 and not scheme.microscaled else 256
    unit = max(8, scheme.block[0])
    bands = (unit, 3 * unit) if unit < 128 else (128,)
    x = torch.randn(rows, columns)
    for dtype, pad, at in how:
        compare(x.to(dtype), scheme, pad=pad, at=at, bands=bands, run=run)


@pytest.mark.parametrize(("k", "name"), list(enumerate(SCHEMES)))
def test_bytes_equal_numpys(k: int, name: str) -> None:
    parts_of_wider_rows(name, HOW[k % 3])


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(SCHEMES))
def test_bytes_equal_numpys_of_every_type(name: str) -> None:
    parts_of_wider_rows(name, *HOW)
    for rows, columns in shapes(SCHEMES[name]):
        for k, x in enumerate(matrices(rows, columns, torch.float32)):
            compare(x.to(DTYPES[k % 3]), SCHEMES[name], run=by_ptx)


@pytest.mark.parametrize("name", ["fp8", "fp8-block", "int8", "int4-group", "awq-group", "gptq-group-zero"])
def test_values_that_are_not_finite_are_told(name: str) -> None:
    """Whatever NaN it is, an infinity, and a scale that is one."""
    for k, bad in enumerate((float("nan"), float("-nan"), float("inf"), -3e38)):
        x = torch.randn(128, 128)
        x[127, 31], x[127, 33] = bad, 3e38
        if torch.isfinite(x).all() and "zero" not in name and "awq" not in name:
            continue
        assert quantised(x.to(DTYPES[k % 2]), SCHEMES[name], run=by_ptx)[3], bad


def test_a_scale_for_each_matrix_of_a_stack_and_one_that_is_given() -> None:
    x = torch.randn(3 * 40, 72) * torch.tensor([1.0, 8.0, 0.0]).repeat_interleave(40)[:, None]
    compare(x, SCHEMES["fp8"], tall=40, bands=(8, 64), run=by_ptx)
    largest = x.abs().amax(1).numpy() * 2
    compare(x, SCHEMES["int8"], given=largest, run=by_ptx)
    compare(x, SCHEMES["fp8"], given=largest[40:41], run=by_ptx)


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("architecture", ["80", "120"])
def test_other_targets(architecture: str, name: str) -> None:
    parts_of_wider_rows(name, *HOW, run=partial(by_ptx, target=Target(architecture)))
