"""What each arithmetic instruction of PTX makes of its operands, of many threads at once.

The rules are those of NVIDIA's "PTX ISA" 9.0, section 9.7. An opcode or a type that is not in the tables is
refused. A NaN that an operation on floats makes is 0x7fffffff, whatever its operands were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

TYPES = {
    "pred": np.dtype(bool),
    **{f"{k}{8 * n}": np.dtype(f"{c}{n}") for k, c in zip("ubs", "uui", strict=True) for n in (1, 2, 4, 8)},
    **{f"f{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    "u16x2": np.dtype("u4"),
}
BITS = ("b16", "b32", "b64")
UNSIGNED = ("u16", "u32", "u64")
SIGNED = ("s16", "s32", "s64")
WHOLE = (*UNSIGNED, *SIGNED)
FLOATS = ("f32", "f64")
ANY = (*BITS, *WHOLE, *FLOATS)
NAN = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}


@dataclass(frozen=True, slots=True)
class Operation:
    """`types`: of the instruction. `takes`, for each operand: t that type, u a u32, p a predicate."""

    types: tuple[str, ...]
    takes: str
    run: Callable[..., Array]


def canonical(x: Array) -> Array:
    """The same floats with the NaN that a GPU makes."""
    bits = x.view(f"u{x.itemsize}")
    return np.where(np.isnan(x), bits.dtype.type(NAN[x.itemsize]), bits).view(x.dtype)


def float_of(run: Callable[..., Array]) -> Callable[..., Array]:
    """An operation on floats whose NaN is canonical."""

    def once(*operands: Array) -> Array:
        with np.errstate(all="ignore"):
            return canonical(np.atleast_1d(run(*operands)))

    return once


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of f32, rounded once: exact in f64 but for the sum, which is rounded to odd, and that to f32.
    (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, IEEE Trans. Computers 57, 2008.)"""
    p, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = p + c
    part = s - p
    rest = (p - (s - part)) + (c - part)  # Knuth's sum: s + rest is p + c
    even = s.view(np.uint64) & 1 == 0
    inexact = np.isfinite(s) & (rest != 0) & even
    toward = np.where(rest > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(s, toward), s).astype(np.float32)


def least(a: Array, b: Array) -> Array:
    """min of floats: a number beats a NaN, -0 is less than +0."""
    first = np.isnan(b) | (a < b) | (np.signbit(a) & (a == b))
    return np.where(first, a, b)


def most(a: Array, b: Array) -> Array:
    """max of floats: a number beats a NaN, +0 is more than -0."""
    first = np.isnan(b) | (a > b) | (~np.signbit(a) & (a == b))
    return np.where(first, a, b)


def or_nan(run: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """The .NaN form of min or max: a NaN beats a number."""
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), run(a, b))


def shifted_left(x: Array, by: Array) -> Array:
    width = 8 * x.itemsize
    return np.where(by < width, x << np.minimum(by, width - 1).astype(x.dtype), x.dtype.type(0))


def shifted_right(x: Array, by: Array) -> Array:
    """By the width or more: zeros, or the sign."""
    width = 8 * x.itemsize
    kept = x >> np.minimum(by, width - 1).astype(x.dtype)
    return kept if x.dtype.kind == "i" else np.where(by < width, kept, x.dtype.type(0))


def high(a: Array, b: Array) -> Array:
    """The high half of a product of u32 or u64."""
    if a.itemsize == 4:
        return (a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + (a0 * b1 + (middle & low) >> half)


def wide(a: Array, b: Array) -> Array:
    twice = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    return a.astype(twice) * b.astype(twice)


def quotient(a: Array, b: Array) -> Array:
    if (b == 0).any():
        raise ZeroDivisionError("a division of integers by zero")
    return a // b


def inserted(a: Array, b: Array, at: Array, count: Array) -> Array:
    """bfi: the low `count` bits of a, at bit `at` of b."""
    ones = np.full(np.broadcast(a, b).shape, -1, f"i{a.itemsize}").view(a.dtype)
    at, count = at & 0xFF, count & 0xFF
    mask = shifted_left(~shifted_left(ones, count), at)
    return b & ~mask | shifted_left(a, at) & mask


def permuted(a: Array, b: Array, how: Array) -> Array:
    """prmt: four bytes of b:a, each chosen by a nibble of `how`, whose high bit asks for the sign alone."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    out = np.uint32(0)
    for i in range(4):
        chosen = how >> np.uint32(4 * i)
        byte = (both >> (np.uint64(8) * (chosen & 7)) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(chosen & 8 != 0, (byte >> 7) * np.uint32(0xFF), byte)
        out = out | byte << np.uint32(8 * i)
    return out


def funnelled(low: Array, high: Array, by: Array) -> Array:
    """shf.r.wrap: the low word of high:low >> by % 32."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both >> (by & 31).astype(np.uint64)).astype(np.uint32)


def funnelled_left(low: Array, high: Array, by: Array) -> Array:
    """shf.l.wrap: the high word of high:low << by % 32."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both << (by & 31).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def extracted(x: Array, at: Array, count: Array) -> Array:
    """bfe: `count` bits from bit `at` on."""
    ones = np.full(x.shape, -1, f"i{x.itemsize}").view(x.dtype)
    return shifted_right(x, at & 0xFF) & ~shifted_left(ones, count & 0xFF)


def compared(run: Callable[[Array, Array], Array], unordered: bool) -> Callable[[Array, Array], Array]:
    """A comparison; of floats also what it says where one is a NaN."""

    def once(a: Array, b: Array) -> Array:
        if a.dtype.kind != "f":
            return run(a, b)
        nan = np.isnan(a) | np.isnan(b)
        return np.where(nan, unordered, run(a, b))

    return once


def narrowed(x: Array, fraction: int, least: int, most: float, top: float) -> Array:
    """f32 to nearest even of a type with so many bits of fraction, as f64: 2**least is its smallest normal,
    `most` its largest number, `top` what is beyond. NaN stays."""
    wide = np.abs(x.astype(np.float64))
    exponent = np.maximum(np.frexp(wide)[1] - 1, least)
    unit = np.ldexp(1.0, exponent - fraction)
    y = np.rint(wide / unit) * unit
    return np.copysign(np.where(y > most, top, y), x)


def bf16(x: Array) -> Array:
    y = narrowed(x, 7, -126, 2.0**128 - 2.0**120, np.inf).astype(np.float32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), y.view(np.uint32) >> 16)


def f16(x: Array) -> Array:
    return canonical(x.astype(np.float16)).view(np.uint16).astype(np.uint32)


def e4m3(x: Array) -> Array:
    """With .satfinite: what is beyond becomes 448."""
    y = np.abs(narrowed(x, 3, -6, 448.0, 448.0))
    exponent = np.frexp(np.maximum(y, 2.0**-6))[1] - 1
    code = np.nan_to_num((exponent + 6) * 8 + np.ldexp(y, 3 - exponent)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7F), np.signbit(x).astype(np.uint16) << 7 | code)


def paired(narrow: Callable[[Array], Array], bits: int) -> Callable[[Array, Array], Array]:
    """Two in one register, the first operand high."""

    def once(high: Array, low: Array) -> Array:
        with np.errstate(all="ignore"):
            a, b = narrow(high), narrow(low)
        return a << a.dtype.type(bits) | b

    return once


def larger_halves(a: Array, b: Array) -> Array:
    """max.u16x2: of each half."""
    low, top = np.uint32(0xFFFF), np.uint32(0xFFFF0000)
    return np.maximum(a & low, b & low) | np.maximum(a & top, b & top)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}

OPERATIONS: dict[str, Operation] = {
    "add": Operation(WHOLE, "tt", np.add),
    "sub": Operation(WHOLE, "tt", np.subtract),
    "mul.lo": Operation(WHOLE, "tt", np.multiply),
    "mul.hi": Operation(("u32", "u64"), "tt", high),
    "mul.wide": Operation(("u16", "s16", "u32", "s32"), "tt", wide),
    "mad.lo": Operation(WHOLE, "ttt", lambda a, b, c: a * b + c),
    "div": Operation(UNSIGNED, "tt", quotient),
    "rem": Operation(UNSIGNED, "tt", lambda a, b: a - quotient(a, b) * b),
    "neg": Operation(SIGNED, "t", np.negative),
    "min": Operation(WHOLE, "tt", np.minimum),
    "max": Operation(WHOLE, "tt", np.maximum),
    "and": Operation((*BITS, "pred"), "tt", np.bitwise_and),
    "or": Operation((*BITS, "pred"), "tt", np.bitwise_or),
    "xor": Operation((*BITS, "pred"), "tt", np.bitwise_xor),
    "not": Operation((*BITS, "pred"), "t", np.invert),
    "shl": Operation(BITS, "tu", shifted_left),
    "shr": Operation((*BITS, *WHOLE), "tu", shifted_right),
    "shf.r.wrap": Operation(("b32",), "ttu", funnelled),
    "shf.l.wrap": Operation(("b32",), "ttu", funnelled_left),
    "bfe": Operation(("u32", "u64"), "tuu", extracted),
    "bfi": Operation(("b32", "b64"), "ttuu", inserted),
    "prmt": Operation(("b32",), "ttu", permuted),
    "selp": Operation(ANY, "ttp", lambda a, b, p: np.where(p, a, b)),
    "mov": Operation((*ANY, "pred"), "t", lambda a: a),
    "add.rn": Operation(("f32",), "tt", float_of(np.add)),
    "sub.rn": Operation(("f32",), "tt", float_of(np.subtract)),
    "mul.rn": Operation(("f32",), "tt", float_of(np.multiply)),
    "div.rn": Operation(("f32",), "tt", float_of(np.divide)),
    "rcp.rn": Operation(("f32",), "t", float_of(np.reciprocal)),
    "fma.rn": Operation(("f32",), "ttt", float_of(fma)),
    **{f"setp.{k}": Operation(ANY, "tt", compared(f, False)) for k, f in COMPARISONS.items()},
    **{f"setp.{k}u": Operation(FLOATS, "tt", compared(f, True)) for k, f in COMPARISONS.items()},
    "setp.num": Operation(FLOATS, "tt", lambda a, b: ~(np.isnan(a) | np.isnan(b))),
    "setp.nan": Operation(FLOATS, "tt", lambda a, b: np.isnan(a) | np.isnan(b)),
    "min.f32": Operation(("f32",), "tt", float_of(least)),
    "max.f32": Operation(("f32",), "tt", float_of(most)),
    "min.NaN": Operation(("f32",), "tt", float_of(or_nan(least))),
    "max.NaN": Operation(("f32",), "tt", float_of(or_nan(most))),
    "max.u16x2": Operation(("u16x2",), "tt", larger_halves),
    "cvt.rn.bf16x2": Operation(("f32",), "tt", paired(bf16, 16)),
    "cvt.rn.f16x2": Operation(("f32",), "tt", paired(f16, 16)),
    "cvt.rn.satfinite.e4m3x2": Operation(("f32",), "tt", paired(e4m3, 8)),
    "abs.f32": Operation(("f32",), "t", lambda x: (x.view(np.uint32) & np.uint32(0x7FFFFFFF)).view(x.dtype)),
    "neg.f32": Operation(("f32",), "t", lambda x: (x.view(np.uint32) ^ np.uint32(1 << 31)).view(x.dtype)),
}
"""By all of an opcode but its type, or by all of it."""


def truncated(x: Array, to: np.dtype) -> Array:
    """cvt.rzi: toward zero, what is beyond to the nearest there is, NaN to 0."""
    ends = np.iinfo(to)
    return np.clip(np.trunc(np.where(np.isnan(x), 0, x).astype(np.float64)), ends.min, ends.max).astype(to)


def converted(x: Array, to: np.dtype) -> Array:
    """cvt between floats: to nearest even, denormals kept."""
    with np.errstate(all="ignore"):
        return canonical(np.atleast_1d(x.astype(to)))


def cut_or_extended(x: Array, to: np.dtype) -> Array:
    """cvt between integers."""
    return x.astype(to)


SMALL = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
CONVERSIONS: dict[str, Callable[[Array, np.dtype], Array]] = {
    **{f"cvt.{to}.{x}": cut_or_extended for to in SMALL for x in SMALL},
    "cvt.f32.f16": converted,
    "cvt.f64.f32": converted,
    "cvt.rn.f16.f32": converted,
    "cvt.rn.f32.f64": converted,
    "cvt.rzi.s32.f32": truncated,
}
