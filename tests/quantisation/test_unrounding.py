"""What quantised values mean: every instruction set and numpy against plain torch, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastckpt import dtypes
from fastckpt.executors.cpu import built
from fastckpt.quantisation.unrounding import KINDS, unpacked, unrounded
from quant_oracle import E2M1

if built():
    from fastckpt import _C

    WAYS = [(True, i) for i in range(len(_C.isas()))] + [(False, -1)]
else:
    WAYS = [(False, -1)]

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
SHAPES = [(8, 8), (16, 1032), (40, 2056), (8, 3000)]
TORCH = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8": torch.int8}


def stored(kind, rows, columns):
    """Random elements as they lie, and the values they hold, in fp32."""
    if kind in TORCH:
        codes = torch.randint(-128, 128, (rows, columns)).to(torch.int8)
        return codes, codes.view(TORCH[kind]).float()
    if kind == "pairs4":
        codes = torch.randint(0, 16, (rows, columns)).to(torch.uint8)
        return codes[:, ::2] | codes[:, 1::2] << 4, E2M1[codes.long()]
    bits = int(kind[-1])
    many = 32 // bits
    whole = torch.randint(0, 1 << bits, (rows, columns))
    if kind.startswith("down"):
        parts = [whole[k::many] for k in range(many)]
    else:
        order = AWQ if kind.startswith("awq") else range(many)
        parts = [whole[:, k::many] for k in order]
    words = sum(p << (bits * k) for k, p in enumerate(parts))
    return words.to(torch.uint32).view(torch.int32), whole.float()


def bits_of(x):
    return x.contiguous().view(torch.uint8).numpy()


def same(got, want):
    """Equal bits; of NaN the place alone."""
    nan = want.isnan().numpy()
    got = torch.from_numpy(np.ascontiguousarray(got).view(np.uint8)).view(want.dtype)
    assert np.array_equal(got.isnan().numpy(), nan)
    assert torch.equal(torch.where(want.isnan(), 0, got), torch.where(want.isnan(), 0, want))


@pytest.mark.parametrize("native, isa", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_equal_plain_torch(kind, native, isa):
    for seed, (rows, columns) in enumerate(SHAPES):
        torch.manual_seed(seed)
        elements, x = stored(kind, rows, columns)
        for group, first in ((0, 0), (1, 0), (128, 0), (32, 7), (5000, 3)):
            groups = (first + columns - 1) // group + 1 if group else 1
            row = torch.randint(0, 5, (rows,))
            scales = torch.randn(5, groups) * torch.exp2(torch.randint(-130, 10, (5, groups)).float())
            column = (first + torch.arange(columns)) // (group or 1 << 20)
            each = scales[row][:, column]
            for zeros, offset in ((None, 0), (None, 8), (torch.randint(-9, 17, (5, groups)).float(), 8)):
                less = x - offset if zeros is None else x - offset - zeros[row][:, column]
                for dtype in (torch.float32, torch.bfloat16, torch.float16) if native else (torch.float32,):
                    got = unrounded(
                        elements.numpy(), kind, scales.numpy(), None if zeros is None else zeros.numpy(),
                        row.to(torch.int32).numpy(), group, first=first, offset=offset,
                        dtype=dtypes.dtype(str(dtype)), isa=isa, native=native,
                    )  # fmt: skip
                    same(got, (less * each).to(dtype))


@pytest.mark.parametrize("isa", [isa for native, isa in WAYS if native])
def test_flushed_denormals_of_the_caller_change_nothing(isa):
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    scale, row = np.array([[2.0**-127]], np.float32), np.zeros(1, np.int32)
    want = codes.view(torch.float8_e4m3fn).float() * 2.0**-127
    torch.set_flush_denormal(True)
    try:
        got = unrounded(codes.numpy(), "float8_e4m3fn", scale, None, row, 0, isa=isa)
    finally:
        torch.set_flush_denormal(False)
    same(got, want)


@pytest.mark.skipif(not built(), reason="no compiled module")
def test_sizes_that_do_not_fit_are_refused():
    values, out = np.zeros((8, 8), np.int8), np.zeros((8, 8), np.float32)
    scales, row = np.ones((1, 1), np.float32), np.zeros(8, np.int32)

    fine = {
        "values": values, "kind": 0, "rows": 8, "columns": 8, "scales": scales, "zeros": None, "row": row,
        "group": 0, "first": 0, "offset": 0, "dtype_code": 0, "out": out,
    }  # fmt: skip

    def call(**wrong):
        _C.dequantise(**(fine | wrong))

    call()
    for wrong, match in (
        ({"kind": len(KINDS)}, "no kind"),
        ({"kind": -1}, "no kind"),
        ({"dtype_code": 3}, "is not fp32"),
        ({"rows": 9}, "not 9 x 8"),
        ({"values": values[:4]}, "32 bytes"),
        ({"kind": KINDS["across4"]}, "64 bytes"),
        (
            {"kind": KINDS["down8"], "rows": 6, "out": out[:6], "values": values[:6], "row": row[:6]},
            "not 6 x 8",
        ),
        ({"group": 4}, "another size"),
        ({"group": 4, "scales": np.ones((1, 2), np.float32), "first": 20}, "another size"),
        ({"row": row[:7]}, "another size"),
        ({"row": row + 1}, "no scales"),
        ({"row": row - 1}, "no scales"),
        ({"zeros": np.zeros(2, np.float32)}, "as many"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**wrong)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_every_8_bit_float(name):
    want = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name)).float().numpy()
    got = unpacked(np.arange(256, dtype=np.uint8), name)
    assert np.array_equal(got, want, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(want))
