"""Phi-3: q, k, v stored as one matrix, gate and up as another.

transformers cuts both as runs of rows (colwise_gather_output), since its forward pass slices them.
"""

from __future__ import annotations

from ..model import HubCuts
from .decoder import Kind
from .decoder import families as kinds

PHI3 = Kind(
    "phi3",
    qkv_bias=False,
    o_bias=False,
    fused_qkv=True,
    paired=("gate_up_proj", "down_proj"),
    cuts=HubCuts(rows=True),
)

FAMILIES = kinds(PHI3)
