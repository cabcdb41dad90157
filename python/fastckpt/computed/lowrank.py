"""A matrix plus a product of two thin ones (LoRA), computed when it is read.

Law: an element is the same number however it is asked for: `float32(base + scale * (left[i, 0] * right[0, j]
+ left[i, 1] * right[1, j] + ...))` in float64, summed in that order. The product of two float32 is exact in
float64, so that fused multiplications cannot change a sum: the compiled kernels and numpy give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..native import _C
from ..views import View
from .nowhere import Floats

_BLOCK = 1 << 15
"""Elements that numpy makes at once: what they need stays in cache."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`base` [rows, columns] + `scale` * `left` [rows, rank] @ `right` [rank, columns], all floats."""

    base: View
    left: View
    right: View
    scale: float


def add(
    base: Floats, left: Floats, right: Floats, scale: float, *, isa: int = -1, native: bool = True
) -> None:
    """Add `scale` * `left` [rows, rank] @ `right` [rank, columns] to `base` [rows, columns], as the law says.

    `isa`: the number of an instruction set of the compiled module, -1 for the best; `native`: use it."""
    tall, wide = left.astype(np.float64, "C"), right.astype(np.float64, "C")
    if native and _C is not None and base.size:
        _C.add_low_rank(base, tall, wide, len(base), len(right), base.shape[1], scale, isa)
        return
    step = max(1, _BLOCK // max(1, base.shape[1]))
    for at in range(0, len(base), step):
        rows = slice(at, at + step)
        sums, product = np.zeros(base[rows].shape), np.empty(base[rows].shape)
        with np.errstate(over="ignore", invalid="ignore"):  # the road refuses what is not finite
            for column, row in zip(tall[rows].T, wide, strict=True):
                sums += np.multiply(column[:, None], row, out=product)
            sums *= scale
            sums += base[rows]
            base[rows] = sums
