"""Counts NaN and infinity in the bytes of a tensor."""

from __future__ import annotations

import numpy as np

from .digest import Bytes
from .dtypes import DType, float16, float32, float64
from .native import _C

_PARTS: dict[str, DType] = {"complex32": float16, "complex64": float32, "complex128": float64}
_NAN_BYTE: dict[str, int] = {"float8_e8m0fnu": 0xFF, "float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80}


def nonfinite(data: Bytes, dtype: DType) -> int:
    """How many values of `dtype` in `data` are NaN or infinite, a complex number being two; 0 for integers
    and bools.

    A float is neither finite when its exponent bits are all ones, but for float8_e4m3fn, whose only such
    values are the NaNs 0x7f and 0xff, and those whose one NaN is a byte of their own."""
    if dtype.name in _NAN_BYTE:
        return int(np.count_nonzero(np.frombuffer(data, np.uint8) == _NAN_BYTE[dtype.name]))
    dtype = _PARTS.get(dtype.name, dtype)
    if dtype.kind != "float":
        return 0
    if _C is not None:
        return _C.nonfinite(data, dtype.code)
    bits = np.frombuffer(data, f"<u{dtype.itemsize}")
    if dtype.name == "float8_e4m3fn":
        return int(((bits & 0x7F) == 0x7F).sum())
    ones = ((1 << dtype.exponent) - 1) << (dtype.digits - 1)
    return int(((bits & np.array(ones, bits.dtype)) == ones).sum())
