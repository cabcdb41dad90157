"""What quantised values mean: unpacked, less their zero point, times their scale.

Law: the compiled kernels and numpy give the same numbers: (q - offset - zero) * scale in fp32, rounded once
to the dtype that was asked for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType, float32
from ..native import _C

Floats = NDArray[np.float32]
Elements = NDArray[np.generic]

KINDS = {
    "int8": 0, "float8_e4m3fn": 1, "float8_e5m2": 2, "across8": 3, "across4": 4, "awq4": 5, "down4": 6,
    "down8": 7, "pairs4": 8,
}  # fmt: skip
"""The dtype of values, or how they are packed (`schemes.Packed`) with so many bits each -> the number of
csrc/isa.h's kind."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns stands in each four bits of an int32, from the lowest (AutoAWQ)."""


def per_element(kind: str) -> tuple[int, int]:
    """Rows and columns of values that one stored element holds."""
    if kind == "pairs4":
        return (1, 2)
    many = 32 // int(kind[-1]) if kind.startswith(("across", "awq", "down")) else 1
    return (many, 1) if kind.startswith("down") else (1, many)


def unrounded(
    values: Elements,
    kind: str,
    scales: Floats,
    zeros: Floats | None,
    row: NDArray[np.int32],
    group: int,
    *,
    first: int = 0,
    offset: int = 0,
    dtype: DType = float32,
    isa: int = -1,
    native: bool = True,
) -> Elements:
    """What values of a kind of KINDS mean, [rows, columns], in `dtype` where native, else in fp32.

    `values`: the elements as they lie. Value (r, c) goes with scale and zero [row[r], (first + c) // group],
    with [row[r], 0] for group 0. `dtype`: fp32, bf16 (as uint16) or fp16."""
    tall, wide = per_element(kind)
    rows, columns = values.shape[0] * tall, values.shape[1] * wide
    if native and _C is not None:
        out = np.empty((rows, columns), MADE[dtype.name])
        _C.dequantise(
            values, KINDS[kind], rows, columns, scales, zeros, row, group, first, offset, dtype.code, out, isa
        )
        return out
    column = (first + np.arange(columns)) // group if group else np.zeros(columns, np.int64)
    whole = unpacked(values, kind) - np.float32(offset)
    if zeros is not None:
        whole -= zeros[row][:, column]
    with np.errstate(over="ignore", invalid="ignore"):  # as C++, which warns of nothing
        return np.asarray(whole * scales[row][:, column], np.float32)


MADE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
"""What `unrounded` makes, as numpy has it."""


def unpacked(values: Elements, kind: str) -> Floats:
    """The values [rows, columns] that elements hold, in fp32; those that are packed are unsigned."""
    if kind in _CODES:
        return np.asarray(_CODES[kind][values.view(np.uint8)], np.float32)
    if kind == "pairs4":
        pairs = np.stack([values & np.uint8(15), values >> np.uint8(4)], -1)
        return np.asarray(E2M1[pairs].reshape(values.shape[0], -1), np.float32)
    tall, wide = per_element(kind)
    if tall == wide == 1:
        return values.astype(np.float32)
    bits = int(kind[-1])
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    if kind == "awq4":
        shifts = shifts[np.argsort(AWQ_ORDER)]
    lanes = values.view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    if tall > 1:
        lanes = lanes.transpose(0, 2, 1)
    return np.asarray(lanes.reshape(values.shape[0] * tall, values.shape[1] * wide), np.float32)


E2M1 = np.array([sign * x for sign in (1.0, -1.0) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], np.float32)
"""What the sixteen codes of e2m1 mean."""


def _e4m3() -> Floats:
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, np.ldexp(fraction / 8, -6), np.ldexp(1 + fraction / 8, exponent - 7))
    size[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -size, size).astype(np.float32)


def _e5m2() -> Floats:
    code = np.arange(256, dtype=np.uint16)
    size = (np.minimum(code & 0x7F, 0x7C) << np.uint16(8)).view(np.float16).astype(np.float32)
    size[(code & 0x7F) > 0x7C] = np.nan
    return np.asarray(np.where(code & 0x80, -size, size), np.float32)


_CODES = {"float8_e4m3fn": _e4m3(), "float8_e5m2": _e5m2()}
"""What the 256 codes mean."""
