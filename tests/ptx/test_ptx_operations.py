"""The arithmetic of PTX against dull integers and fractions, one value at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.operations import CONVERSIONS, OPERATIONS, TYPES

WORDS = [0, 1, 2, 7, 31, 32, 33, 63, 64, 255, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF]
LONGS = [*WORDS, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, 0x9E3779B185EBCA87]


def run(name: str, kind: str, *columns: list[int]) -> list[int]:
    operation = OPERATIONS[name]
    kinds = [{"t": kind, "u": "u32", "p": "pred"}[x] for x in operation.takes]
    operands = [
        np.array(c, f"u{TYPES[k].itemsize}").view(TYPES[k]) for c, k in zip(columns, kinds, strict=True)
    ]
    out = operation.run(*operands)
    return out.view(f"u{out.itemsize}").tolist()


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def shift_left(x: int, by: int, bits: int) -> int:
    return x << min(by, bits) & (1 << bits) - 1


def insert(a: int, b: int, at: int, count: int, bits: int) -> int:
    for i in range(count & 255):
        if (at & 255) + i < bits:
            place = 1 << (at & 255) + i
            b = b & ~place | (place if a >> i & 1 else 0)
    return b


def permute(a: int, b: int, how: int, bits: int) -> int:
    held = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    chosen = [how >> 4 * i & 15 for i in range(4)]
    return int.from_bytes(
        bytes((255 if held[c & 7] >> 7 else 0) if c & 8 else held[c & 7] for c in chosen), "little"
    )


WHOLE = {
    "add": (2, lambda a, b, n: a + b),
    "sub": (2, lambda a, b, n: a - b),
    "mul.lo": (2, lambda a, b, n: a * b),
    "mul.hi": (2, lambda a, b, n: a * b >> n),
    "min": (2, lambda a, b, n: min(a, b)),
    "max": (2, lambda a, b, n: max(a, b)),
    "mad.lo": (3, lambda a, b, c, n: a * b + c),
    "setp.lt": (2, lambda a, b, n: int(a < b)),
    "setp.ge": (2, lambda a, b, n: int(a >= b)),
}
BITS = {
    "shl": (2, shift_left),
    "bfi": (4, insert),
    "xor": (2, lambda a, b, n: a ^ b),
    "not": (1, lambda a, n: ~a),
    "shf.r.wrap": (3, lambda a, b, c, n: (b << 32 | a) >> (c & 31)),
    "shf.l.wrap": (3, lambda a, b, c, n: (b << 32 | a) << (c & 31) >> 32),
    "bfe": (3, lambda a, b, c, n: a >> (b & 255) & (1 << (c & 255)) - 1),
    "prmt": (3, permute),
}


@pytest.mark.parametrize("name", [*WHOLE, *BITS])
def test_integers(name: str) -> None:
    count, formula = (WHOLE | BITS)[name]
    rng = np.random.default_rng(1)
    for kind in OPERATIONS[name].types:
        if kind[0] not in "usb" or kind[-2:] == "16":
            continue
        bits = int(kind[1:])
        pool = LONGS if bits == 64 else WORDS
        words = [[pool[i] for i in rng.integers(len(pool), size=500)] for _ in range(count)]
        takes = OPERATIONS[name].takes
        words = [[x & 0xFFFFFFFF for x in c] if t == "u" else c for c, t in zip(words, takes, strict=True)]
        for got, row in zip(run(name, kind, *words), zip(*words, strict=True), strict=True):
            values = [
                signed(x, bits) if kind[0] == "s" and t == "t" else x for x, t in zip(row, takes, strict=True)
            ]
            assert got == formula(*values, bits) & (1 << bits) - 1, (kind, row)


def test_shifts_to_the_right() -> None:
    for by in (0, 1, 31, 32, 33, 255, 1 << 31):
        for x in WORDS:
            assert run("shr", "u32", [x], [by]) == [x >> by if by < 32 else 0]
            assert run("shr", "s32", [x], [by]) == [signed(x, 32) >> min(by, 31) & 0xFFFFFFFF]


def test_halves() -> None:
    for a in WORDS:
        for b in WORDS:
            wanted = max(a >> 16, b >> 16) << 16 | max(a & 0xFFFF, b & 0xFFFF)
            assert run("max.u16x2", "u16x2", [a], [b]) == [wanted]


def test_wide_products_and_quotients() -> None:
    for a in WORDS:
        for b in WORDS[1:]:
            assert run("mul.wide", "u32", [a], [b]) == [a * b]
            assert run("mul.wide", "s32", [a], [b]) == [signed(a, 32) * signed(b, 32) & (1 << 64) - 1]
            assert run("div", "u32", [a], [b]) == [a // b] and run("rem", "u32", [a], [b]) == [a % b]
    with pytest.raises(ZeroDivisionError):
        run("div", "u32", [1], [0])


def exact(bits: int) -> Fraction:
    """The value of a finite fp32."""
    sign, exponent, fraction = bits >> 31, bits >> 23 & 255, bits & 0x7FFFFF
    value = Fraction(fraction | (0x800000 if exponent else 0)) * Fraction(2) ** (max(exponent, 1) - 150)
    return -value if sign else value


def rounded(x: Fraction) -> int:
    """The bits of the fp32 nearest to it, ties to even; x is not 0."""
    sign, x = (1 << 31, -x) if x < 0 else (0, x)
    exponent = max(math.floor(math.log2(x.numerator) - math.log2(x.denominator)) - 1, -126)
    while x >= Fraction(2) ** (exponent + 1):
        exponent += 1
    units = round(x / Fraction(2) ** (exponent - 23))  # Python rounds a Fraction to even
    return sign | min((exponent + 126 << 23) + units, 0x7F800000)


def test_fma_rounds_once() -> None:
    """Also where a sum in fp64 is rounded onto a tie of fp32, and where denormals are made."""
    rng = np.random.default_rng(2)
    a, b, c = (rng.integers(0, 1 << 32, 4000, dtype=np.uint32) & 0x83FFFFFF | 0x3C000000 for _ in range(3))
    c[:1000] = (-(a[:1000].view("f4") * b[:1000].view("f4"))).view("u4")  # what remains is the product's rest
    c[1000:2000] = a[1000:2000] & 0xFF800000 | 1  # a tie and a little more
    b[1000:2000] = 0x33800000 | (b[1000:2000] & 1)
    a[2000:3000], b[2000:3000] = (
        a[2000:3000] & 0x83FFFFFF | 0x20000000,
        b[2000:3000] & 0x83FFFFFF | 0x20000000,
    )
    c[2000:3000] &= 0x807FFFFF
    for x, y, z, got in zip(*(v.tolist() for v in (a, b, c)), run("fma.rn", "f32", a, b, c), strict=True):
        wanted = exact(x) * exact(y) + exact(z)
        assert (got & 0x7FFFFFFF == 0) if wanted == 0 else got == rounded(wanted), (x, y, z)


def test_nan_is_the_same_whatever_made_it() -> None:
    nan, other, one, inf = 0xFFC12345, 0x7F800001, 0x3F800000, 0x7F800000
    for x in (nan, other):
        for name in ("add.rn", "sub.rn", "mul.rn", "div.rn"):
            assert run(name, "f32", [x], [one]) == run(name, "f32", [one], [x]) == [0x7FFFFFFF]
        assert run("min.f32", "f32", [x], [one]) == run("max.f32", "f32", [one], [x]) == [one]
        assert run("min.f32", "f32", [x], [nan]) == [0x7FFFFFFF]
        assert run("min.NaN", "f32", [x], [one]) == run("max.NaN", "f32", [one], [x]) == [0x7FFFFFFF]
        assert run("setp.lt", "f32", [x], [one]) == run("setp.ne", "f32", [x], [one]) == [0]
        assert run("setp.leu", "f32", [x], [one]) == run("setp.nan", "f32", [x], [one]) == [1]
    assert run("sub.rn", "f32", [inf], [inf]) == run("div.rn", "f32", [0], [0]) == [0x7FFFFFFF]
    for name in ("min.f32", "max.f32", "min.NaN", "max.NaN"):
        assert (
            run(name, "f32", [0], [1 << 31])
            == run(name, "f32", [1 << 31], [0])
            == [name[1] == "i" and 1 << 31]
        )


def test_conversions() -> None:
    def convert(name: str, *values: float) -> list[float]:
        to, source = (TYPES[x] for x in name.split(".")[-2:])
        return CONVERSIONS[name](np.array(values, source), to).tolist()

    nan, inf = math.nan, math.inf
    assert convert("cvt.rzi.s32.f32", 1.9, -1.9, nan, inf, -inf, 3e9) == [
        1,
        -1,
        0,
        2**31 - 1,
        -(2**31),
        2**31 - 1,
    ]
    assert convert("cvt.rn.f16.f32", 65519.0, 65520.0, 2**-25, 2**-25 * 1.5) == [65504.0, inf, 0.0, 2**-24]
    assert convert("cvt.rn.f32.f64", 1 + 2**-24, 1 + 3 * 2**-24, 1e300) == [1.0, 1 + 2**-22, inf]
    assert convert("cvt.u64.u32", 0xFFFFFFFF) == [0xFFFFFFFF] and convert("cvt.s64.s32", -1) == [-1]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cvt.rn.bf16x2", torch.bfloat16),
        ("cvt.rn.f16x2", torch.float16),
        ("cvt.rn.satfinite.e4m3x2", torch.float8_e4m3fn),
    ],
)
def test_pairs(name: str, dtype: torch.dtype) -> None:
    """Every value of the type, what lies between two, what a little beside: as torch rounds it."""
    bits = 8 * dtype.itemsize
    codes = torch.arange(1 << bits, dtype=torch.int32).to(torch.uint8 if bits == 8 else torch.uint16)
    every = codes.view(dtype).float()
    x = torch.cat(
        [
            every,
            *(
                (every.view(torch.int32) + d).view(torch.float32)
                for d in (1, -1, 0x7FFF, 0x8000, 0x8001, 1 << 19, 1 << 12)
            ),
        ]
    )
    wanted = x.to(dtype).view(torch.uint8 if bits == 8 else torch.uint16).numpy().astype(np.uint32)
    beyond = x.abs() > 448.0 if bits == 8 else torch.zeros(len(x), dtype=torch.bool)
    wanted[beyond.numpy()] = (x[beyond].view(torch.int32).numpy() >> 31 & 0x80) | 0x7E
    wanted[x.isnan().numpy()] = (1 << bits - 1) - 1
    held = x.numpy().view(np.uint32)
    got = np.array(run(name, "f32", held[::-1], held))
    assert np.array_equal(got & (1 << bits) - 1, wanted) and np.array_equal(got >> bits, wanted[::-1])
