"""Quantise the rows of a dense matrix that lie in memory: amax, scale, round, pack.

Law: the compiled kernels and numpy give the same bytes; all arithmetic is fp32, in one order. Only the
figures of an Error may differ in their last digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType, bfloat16, float16, float32, int32
from ..errors import LayoutError, SourceError
from ..native import _C
from .schemes import Packed, Scheme
from .unrounding import AWQ_ORDER, per_element, unrounded

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Zeros = NDArray[np.int8]

DENSE = (float32, bfloat16, float16)
"""What a matrix may be before it is quantised."""


@dataclass(frozen=True, slots=True)
class Error:
    """How far the quantised values lie from the dense ones: the largest difference, and sums in double
    over all values (x dense, y quantised)."""

    values: int = 0
    biggest: float = 0.0
    difference: float = 0.0  # of (x - y) ** 2
    dense: float = 0.0  # of x ** 2
    quantised: float = 0.0  # of y ** 2
    both: float = 0.0  # of x * y

    def __add__(self, other: Error) -> Error:
        return Error(
            self.values + other.values,
            max(self.biggest, other.biggest),
            self.difference + other.difference,
            self.dense + other.dense,
            self.quantised + other.quantised,
            self.both + other.both,
        )

    @property
    def rms(self) -> float:
        """The root of the mean squared difference."""
        return math.sqrt(self.difference / self.values) if self.values else 0.0

    @property
    def snr(self) -> float | None:
        """Signal over noise in decibels; None where nothing differs, all is zero, or a square overflowed."""
        ratio = self.dense / self.difference if self.difference else 0.0
        return 10 * math.log10(ratio) if ratio > 0 else None

    @property
    def cosine(self) -> float:
        """The cosine of the angle between dense and quantised; 1 where both are zero."""
        size = math.sqrt(self.dense) * math.sqrt(self.quantised)
        return self.both / size if size else 1.0 if self.dense == self.quantised else 0.0


@dataclass(frozen=True, slots=True)
class Rounded:
    """What became of some rows: their scales and zero points, both [blocks down, blocks across], and their
    error."""

    scales: Floats
    zeros: Zeros
    error: Error


def amax(dense: Bytes, dtype: DType, rows: int, columns: int, *, native: bool = True) -> Floats:
    """The largest magnitude of each row, in fp32; not finite where a value of the row is not."""
    if native and _C is not None:
        out = np.empty(rows, np.float32)
        _C.row_amax(dense, dtype.code, rows, columns, out)
        return out
    return np.asarray(_magnitudes(_values(dense, dtype, rows, columns)).max(axis=1), np.float32)


def scale_of(span: Floats, scheme: Scheme) -> Floats:
    """The scale of values whose largest magnitude, or whole range, is given; infinite beyond its dtype."""
    if scheme.microscaled:
        most = math.frexp(scheme.reach)[1] - 1
        power = (span.view(np.uint32) + np.uint32(1 << 21) >> np.uint32(23)).astype(np.int32) - most
        return np.asarray(np.ldexp(np.float32(1), np.maximum(power, 0) - 127), np.float32)
    scale = np.maximum(span / np.float32(scheme.reach), np.float32(scheme.floor))
    if scheme.scale_dtype is float16:
        with np.errstate(over="ignore"):
            scale = scale.astype(np.float16).astype(np.float32)
    return np.asarray(np.where(scale == 0, np.float32(1), scale), np.float32)


def quantise(
    dense: Bytes,
    dtype: DType,
    rows: int,
    columns: int,
    scheme: Scheme,
    largest: Floats | None,
    out: Bytes,
    *,
    pitch: int = 0,
    isa: int = -1,
    native: bool = True,
) -> Rounded | None:
    """Quantise `rows` x `columns` dense values that begin on a block into the bytes `out`.

    `dense`: row after row; with `pitch`, for a scheme that stores the matrix turned, column after column,
    `pitch` bytes from one to the next. `largest`: the amax of each row, where a scale is shared beyond these
    rows or columns; else it is found here. `isa`, `native`: for tests, a kernel's instruction set, and
    whether kernels are used. Returns None, with `out` undefined, where a value or a scale is NaN or
    infinite."""
    if dtype not in DENSE:
        raise LayoutError(f"quant: wanted values of {', '.join(d.name for d in DENSE)}, got {dtype}")
    down, across = scheme.block if largest is None else (1, 0)
    down, across = down or rows, across or columns
    if not native or _C is None:
        return _in_numpy(_as_stored(dense, dtype, rows, columns, pitch), scheme, down, across, largest, out)
    if scheme.turned and not pitch:
        turned = dense.reshape(rows, columns, dtype.itemsize).transpose(1, 0, 2)
        dense, pitch = np.ascontiguousarray(turned).reshape(-1), rows * dtype.itemsize
    scales, zeros = _blocks(rows, columns, down, across)
    sums = np.zeros(5, np.float64)
    half = scheme.scale_dtype is float16
    if not _C.quantise(
        dense, dtype.code, rows, columns, pitch, down, across,
        scheme.reach, scheme.floor, -scheme.zero_offset, scheme.reciprocal, half, scheme.microscaled,
        KINDS[scheme.dtype.name + scheme.packed], largest, out,
        scales, zeros if scheme.asymmetric else None, sums, isa,
    ):  # fmt: skip
        return None
    return Rounded(scales, zeros, Error(rows * columns, *(float(s) for s in sums)))


def _blocks(rows: int, columns: int, down: int, across: int) -> tuple[Floats, Zeros]:
    """Room for the scales and zero points of blocks of `down` x `across` values; zero points are 0."""
    scales = np.empty((-(-rows // down), -(-columns // across)), np.float32)
    return scales, np.zeros(scales.shape, np.int8)


def _in_numpy(
    x: Floats, scheme: Scheme, down: int, across: int, largest: Floats | None, out: Bytes
) -> Rounded | None:
    """`quantise` of the values x [rows, columns], in numpy."""
    rows, columns = x.shape
    scales, zeros = _blocks(rows, columns, down, across)

    def over(ufunc: np.ufunc, values: Floats) -> Floats:
        """What a block's values come to, block by block."""
        tall = ufunc.reduceat(values, np.arange(0, rows, down), axis=0)
        return np.asarray(ufunc.reduceat(tall, np.arange(0, columns, across), axis=1), np.float32)

    if not np.isfinite(x).all():
        return None
    if scheme.asymmetric:
        low = np.minimum(over(np.minimum, x), np.float32(0))
        with np.errstate(over="ignore"):
            scales[:] = scale_of(np.maximum(over(np.maximum, x), np.float32(0)) - low, scheme)
        least = np.float32(-scheme.zero_offset)
        zeros[:] = np.rint(np.clip(np.float32(-8) - low / scales, least, np.float32(7)))
    else:
        found = over(np.maximum, _magnitudes(x)) if largest is None else largest.reshape(rows, 1)
        scales[:] = scale_of(found, scheme)
    if not np.isfinite(scales).all():
        return None
    scale = _each(scales, down, across, x)
    with np.errstate(over="ignore"):
        scaled = x * (np.float32(1) / scale) if scheme.reciprocal else x / scale
    if scheme.dtype.name == "float8_e4m3fn":
        out[:] = _e4m3(scaled).reshape(-1)
    elif scheme.packed == "pairs":
        codes = _e2m1(scaled)
        out[:] = (codes[:, ::2] | codes[:, 1::2] << np.uint8(4)).reshape(-1)
    else:
        high = (1 << (scheme.bits - 1)) - 1
        point = _each(zeros.astype(np.float32), down, across, x)
        whole = np.rint(np.clip(scaled + point, np.float32(-high - 1), np.float32(high))).astype(np.int8)
        out[:] = (packed(whole + 8, scheme.packed) if scheme.packed else whole).reshape(-1).view(np.uint8)
    return Rounded(scales, zeros, _error(x, _meant(out, scheme, scales, zeros, x, native=False)))


def error_of(
    dense: Bytes,
    dtype: DType,
    shape: tuple[int, int],
    scheme: Scheme,
    found: Rounded,
    out: Bytes,
    part: tuple[slice, slice],
) -> Error:
    """The error of a part of a dense matrix of which `quantise` made the bytes `out`."""
    x = _as_stored(dense, dtype, *shape, shape[0] * dtype.itemsize if scheme.turned else 0)
    return _error(x[part], _meant(out, scheme, found.scales, found.zeros, x, native=True)[part])


def _meant(out: Bytes, scheme: Scheme, scales: Floats, zeros: Zeros, like: Floats, native: bool) -> Floats:
    """What the quantised bytes of a matrix of `like`'s shape mean."""
    rows, columns = like.shape
    down, across = scheme.block if scheme.block[1] else (rows // len(scales), columns)
    tall, wide = per_element(scheme.kind)
    values = out.view(f"i{scheme.dtype.itemsize}").reshape(rows // tall, columns // wide)
    row = (np.arange(rows) // down).astype(np.int32)
    points = zeros.astype(np.float32) if scheme.asymmetric else None
    offset = 8 if scheme.dtype is int32 else 0
    made = unrounded(values, scheme.kind, scales, points, row, across, offset=offset, native=native)
    return np.asarray(made, np.float32)


def _error(x: Floats, y: Floats) -> Error:
    wide, other = x.astype(np.float64), y.astype(np.float64)
    off = wide - other
    figures = (
        np.abs(off).max(), (off * off).sum(), (wide * wide).sum(), (other * other).sum(), (wide * other).sum()
    )  # fmt: skip
    return Error(x.size, *(float(s) for s in figures))


def _each(blocks: Floats, down: int, across: int, like: Floats) -> Floats:
    """A block's figure for every value of a matrix of `like`'s shape."""
    rows, columns = like.shape
    return np.repeat(np.repeat(blocks, down, axis=0)[:rows], across, axis=1)[:, :columns]


def not_finite(name: str, start: int, stop: int) -> SourceError:
    """The error for rows of a matrix that cannot be quantised."""
    return SourceError(
        f"{name}: NaN or infinite values, or a scale beyond its type, in rows [{start}, {stop}), which "
        "cannot be quantised"
    )


KINDS = {"int8": 0, "float8_e4m3fn": 1, "int32across": 2, "int32awq": 3, "int32down": 4, "uint8pairs": 5}
"""dtype of the stored elements and how they are packed -> the number of csrc/isa.h's kind."""


def stored_scales(scales: Floats, scheme: Scheme) -> NDArray[np.generic]:
    """Scales as the format has them: fp32, fp16, or exponents of two."""
    if scheme.microscaled:
        return (np.frexp(scales)[1] + 126).astype(np.uint8)
    return scales.astype(np.float16) if scheme.scale_dtype is float16 else scales


def stored_zeros(zeros: Zeros, scheme: Scheme) -> NDArray[np.int32]:
    """Zero points [blocks down, blocks across] as the format packs them: eight outputs an int32.

    Where they are no multiple of eight, zeros follow (compressed-tensors)."""
    whole = zeros.astype(np.int64) + scheme.zero_offset
    if not scheme.turned:
        return packed(np.pad(whole, ((0, -len(whole) % 8), (0, 0))), "down")
    how: Packed = "awq" if scheme.packed == "awq" else "across"
    return packed(np.pad(whole, ((0, 0), (0, -whole.shape[1] % 8))), how)


def packed(whole: NDArray[np.signedinteger], how: Packed) -> NDArray[np.int32]:
    """Values 0 to 15 [rows, columns], eight an int32."""
    rows, columns = whole.shape
    if how == "down":
        eight = whole.reshape(rows // 8, 8, columns).transpose(0, 2, 1)
    else:
        eight = whole.reshape(rows, columns // 8, 8)
    if how == "awq":
        eight = eight[..., AWQ_ORDER]
    words = (eight.astype(np.int64) << np.arange(0, 32, 4)).sum(axis=2)
    return np.asarray(words.astype(np.uint32).view(np.int32))


def _magnitudes(x: Floats) -> Floats:
    return np.asarray(np.abs(x), np.float32)


def _as_stored(dense: Bytes, dtype: DType, rows: int, columns: int, pitch: int) -> Floats:
    """Dense values [rows, columns] that lie as `quantise` says."""
    if not pitch:
        return _values(dense, dtype, rows, columns)
    lines = np.lib.stride_tricks.as_strided(dense, (columns, rows * dtype.itemsize), (pitch, 1))
    return np.asarray(_values(np.ascontiguousarray(lines).reshape(-1), dtype, columns, rows).T, np.float32)


def _values(dense: Bytes, dtype: DType, rows: int, columns: int) -> Floats:
    if dtype is bfloat16:
        wide = dense.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return np.asarray(wide.view(np.float32).reshape(rows, columns))
    values = dense.view(np.float16).astype(np.float32) if dtype is float16 else dense.view(np.float32)
    return np.asarray(values.reshape(rows, columns), np.float32)


def _e4m3(x: Floats) -> Bytes:
    """The codes of fp32 values in float8_e4m3fn: to nearest, ties to even, saturating at 448."""
    size = np.minimum(np.abs(x), np.float32(448))
    _, exponent = np.frexp(size)
    # Eight steps a binade down to 2**-6, the smallest normal; below it steps of 2**-9.
    step = np.where(size == 0, -9, np.maximum(exponent - 4, -9))
    whole = np.rint(np.ldexp(size, -step)).astype(np.int64)
    # 16 steps carry into the next binade by themselves: the code is counted in steps.
    code = np.where(step == -9, whole, whole + (step + 9) * 8)
    return np.asarray(code | (np.signbit(x) * np.int64(0x80)), np.uint8)


def _e2m1(x: Floats) -> Bytes:
    """The codes of fp32 values in e2m1: to nearest, ties to even, saturating at 6."""
    size = np.minimum(np.abs(x), np.float32(6))
    step = np.where(size < 2, 0, np.where(size < 4, 1, 2))
    whole = np.rint(np.ldexp(size, 1 - step)).astype(np.int64) + 2 * step  # steps, of a half, one and two
    return np.asarray(whole | (np.signbit(x) * np.int64(8)), np.uint8)
