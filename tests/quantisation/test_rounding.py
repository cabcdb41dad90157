"""amax, scale, round and pack: every instruction set and numpy against plain torch, byte for byte."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import quant_oracle
import torch
from fastckpt import dtypes
from fastckpt.executors.cpu import built
from fastckpt.quantisation import rounding
from fastckpt.quantisation.schemes import SCHEMES

if built():
    from fastckpt import _C

    WAYS = [(True, i) for i in range(len(_C.isas()))] + [(False, -1)]
else:
    WAYS = [(False, -1)]
SHAPES = [(1, 128), (3, 256), (130, 384), (257, 128), (5, 200), (129, 77)]


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


def run(x, name, native, isa, *, given=False):
    scheme = SCHEMES[name]
    rows, columns = x.shape
    dtype = dtypes.dtype(str(x.dtype))
    out = np.full(rows * columns * scheme.bits // 8, 0xAA, np.uint8)
    largest = None
    if given or 0 in (scheme.block[0],):
        largest = x.float().abs().amax(1).numpy()
        if scheme.block[0] == 0:
            largest = np.full(rows, largest.max(), np.float32)
    found = rounding.quantise(raw(x), dtype, rows, columns, scheme, largest, out, isa=isa, native=native)
    return out, found


@pytest.mark.parametrize("native, isa", WAYS)
@pytest.mark.parametrize("name", list(quant_oracle.BLOCKS))
def test_bytes_equal_plain_torch(name, native, isa):
    for rows, columns in SHAPES:
        if columns % (SCHEMES[name].block[1] or 1) and SCHEMES[name].block[0] == 1:
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for x in quant_oracle.matrices(rows, columns, dtype):
                want, scales = quant_oracle.quantised(x, name)
                out, found = run(x, name, native, isa)
                got = found.scales[:1] if SCHEMES[name].block[0] == 0 else found.scales
                assert np.array_equal(got.view(np.uint32), scales.numpy().view(np.uint32))
                assert np.array_equal(out, raw(want)), (rows, columns, dtype)


@pytest.mark.parametrize("isa", [isa for native, isa in WAYS if native])
def test_flushed_denormals_of_the_caller_change_nothing(isa):
    x = torch.arange(1, 1 << 10, dtype=torch.int16).view(torch.float16).reshape(3, -1)  # denormals all
    want, scales = quant_oracle.quantised(x, "fp8-channel")
    largest = x.float().abs().amax(1)
    torch.set_flush_denormal(True)
    try:
        out, found = run(x, "fp8-channel", True, isa)
        rows = np.empty(3, np.float32)
        _C.row_amax(raw(x), dtypes.float16.code, 3, x.shape[1], rows, isa)
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(out, raw(want))
    assert np.array_equal(found.scales.view(np.uint32), scales.numpy().view(np.uint32))
    assert np.array_equal(rows, largest.numpy())


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if not s.stacks])
def test_the_error_of_parts_is_that_of_the_whole(name):
    scheme, (rows, columns) = SCHEMES[name], (256, 384)
    x = torch.randn(rows, columns)
    dense, pitch = (raw(x.t()), 4 * rows) if scheme.turned else (raw(x), 0)
    amax = x.abs().amax(1).numpy()
    most = {0: np.full(rows, amax.max(), np.float32), 1: amax if scheme.block[1] == 0 else None}
    out = np.empty(rows * columns * scheme.bits // 8, np.uint8)
    found = rounding.quantise(
        dense, dtypes.float32, rows, columns, scheme, most.get(scheme.block[0]), out, pitch=pitch
    )
    parts = [(slice(a, b), slice(c, d)) for a, b in ((0, 5), (5, 256)) for c, d in ((0, 200), (200, 384))]
    told = [
        rounding.error_of(dense, dtypes.float32, (rows, columns), scheme, found, out, part) for part in parts
    ]
    total = sum(told, rounding.Error())
    assert total.values == rows * columns
    assert astuple(total) == pytest.approx(astuple(found.error), rel=1e-5)  # fp32 sums of another order


@pytest.mark.parametrize("native, isa", WAYS)
def test_a_given_amax_is_taken(native, isa):
    x = torch.randn(9, 65)
    want, scales = quant_oracle.quantised(x, "int8")
    out, found = run(x[:, :40].contiguous(), "int8", native, isa, given=True)
    part = torch.round(x[:, :40] / (x[:, :40].abs().amax(1, keepdim=True) / 127.5)).clamp(-128, 127)
    assert np.array_equal(out, raw(part.to(torch.int8)))
    dtype, largest = dtypes.float32, x.abs().amax(1).numpy()
    found = rounding.quantise(
        raw(x[:, :40]), dtype, 9, 40, SCHEMES["int8"], largest, out, isa=isa, native=native
    )
    assert np.array_equal(out.reshape(9, 40), want[:, :40].numpy().view(np.uint8))
    assert np.array_equal(found.scales, scales.numpy())


@pytest.mark.parametrize("native, isa", WAYS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_told(native, isa, bad, dtype):
    for name in ("int8", "fp8-block", "int4-group32", "mxfp4", "mxfp8"):
        for at in (0, 31, 33, 159):
            x = torch.randn(2, 160).to(dtype)
            x[1, at] = bad
            assert run(x, name, native, isa)[1] is None
    assert not np.isfinite(rounding.amax(raw(x), dtypes.dtype(str(dtype)), 2, 160, native=native)).all()


@pytest.mark.parametrize("native", [True, False] if built() else [False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_amax(native, dtype):
    for rows, columns in SHAPES:
        x = torch.randn(rows, columns).to(dtype)
        got = rounding.amax(raw(x), dtypes.dtype(str(dtype)), rows, columns, native=native)
        assert np.array_equal(got, x.float().abs().amax(1).numpy())


@pytest.mark.parametrize("native, isa", WAYS)
def test_the_error_is_that_of_the_values(native, isa):
    x = torch.randn(40, 256)
    for name, bound in (("int8", 1e-2), ("fp8-block", 4e-2), ("int4-group", 0.15)):
        _, found = run(x, name, native, isa)
        e = found.error
        values, scales = quant_oracle.quantised(x, name)
        if name == "int4-group":
            words = values.to(torch.int64)
            values = torch.stack([(words >> (4 * k)) % 16 - 8 for k in range(8)], 2).reshape(40, 256)
            y = values * scales.repeat_interleave(128, 1)
        else:
            y = values.float() * (scales.repeat_interleave(128, 1) if name == "fp8-block" else scales)
        off = (x - y).double()
        assert e.values == x.numel()
        assert e.biggest == pytest.approx(float(off.abs().max()), rel=1e-5)
        assert e.rms == pytest.approx(float(off.square().mean().sqrt()), rel=1e-4) and e.rms < bound
        assert e.snr == pytest.approx(
            float(10 * torch.log10(x.double().square().sum() / off.square().sum())), rel=1e-4
        )
        assert e.cosine == pytest.approx(
            float(torch.nn.functional.cosine_similarity(x.double().flatten(), y.double().flatten(), 0)),
            rel=1e-6,
        )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("native, isa", WAYS)
def test_an_error_that_overflows_is_no_figure(native, isa):
    """The largest fp32 there is becomes -128 scales of amax / 127.5, which is more."""
    x = torch.ones(2, 256)
    x[1, 3] = torch.finfo(torch.float32).min
    _, found = run(x, "int8", native, isa)
    assert found.error.snr is None and not np.isfinite(found.error.rms)
