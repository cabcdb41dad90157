"""A matrix plus a product of two thin ones (LoRA), computed when it is read.

Law: an element is the same number however it is asked for: `float32(base + scale * (left[i, 0] * right[0, j]
+ left[i, 1] * right[1, j] + ...))` in float64, summed in that order. The product of two float32 is exact in
float64, so that fused multiplications cannot change a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..views import View
from .nowhere import Floats

_BLOCK = 1 << 15
"""Elements made at once: what they need stays in cache."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`base` [rows, columns] + `scale` * `left` [rows, rank] @ `right` [rank, columns], all floats."""

    base: View
    left: View
    right: View
    scale: float


def added(base: Floats, left: Floats, right: Floats, scale: float) -> Floats:
    """`base` + `scale` * `left` @ `right` as the law says; [rows, columns], [rows, rank], [rank, columns]."""
    out = np.empty_like(base)
    step = max(1, _BLOCK // max(1, base.shape[1]))
    wide = right.astype(np.float64)
    for at in range(0, len(base), step):
        rows = slice(at, at + step)
        sums, product = np.zeros(base[rows].shape), np.empty(base[rows].shape)
        with np.errstate(over="ignore", invalid="ignore"):  # the road refuses what is not finite
            for column, row in zip(left[rows].astype(np.float64).T, wide, strict=True):
                sums += np.multiply(column[:, None], row, out=product)
            sums *= scale
            sums += base[rows]
            out[rows] = sums
    return out
