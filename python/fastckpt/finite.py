"""Counts NaN and infinity in the bytes of a tensor."""

from __future__ import annotations

import numpy as np

from .digest import Bytes
from .dtypes import DType

try:
    from . import _C as _native
except ImportError:  # not built: numpy does the same
    _native = None  # type: ignore[assignment]


def nonfinite(data: Bytes, dtype: DType) -> int:
    """How many elements of `dtype` in `data` are NaN or infinite; 0 for integers and bools.

    A float is neither finite when its exponent bits are all ones, but for float8_e4m3fn, whose only such
    values are the NaNs 0x7f and 0xff."""
    if dtype.kind != "float":
        return 0
    if _native is not None:
        return _native.nonfinite(data, dtype.code)
    bits = np.frombuffer(data, f"<u{dtype.itemsize}")
    if dtype.name == "float8_e4m3fn":
        return int(((bits & 0x7F) == 0x7F).sum())
    ones = ((1 << dtype.exponent) - 1) << (dtype.digits - 1)
    return int(((bits & np.array(ones, bits.dtype)) == ones).sum())
