"""Our element types as torch's: float8_e8m0fnu came with torch 2.7, float4_e2m1fn_x2 with 2.8."""

from __future__ import annotations

import pytest
import torch
from fastckpt.dtypes import DTYPES, DType

KNOWN = tuple(d for d in DTYPES if isinstance(getattr(torch, d.name, None), torch.dtype))
"""The types that this torch has."""


def of_torch(dtype: DType) -> torch.dtype:
    """torch's own. Skips the test where this torch has none."""
    if dtype not in KNOWN:
        pytest.skip(f"torch {torch.__version__} has no {dtype}")
    found: torch.dtype = getattr(torch, dtype.name)
    return found
