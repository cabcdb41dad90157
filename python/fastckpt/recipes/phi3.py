"""Phi-3: q, k, v stored as one matrix, gate and up as another.

transformers cuts both as runs of rows (colwise_gather_output), since its forward pass slices them.
"""

from __future__ import annotations

from dataclasses import replace

from ..model import HubCuts
from .decoder import decoders
from .kind import UNBIASED, FeedForward, Kind

PHI3 = Kind(
    "phi3",
    replace(UNBIASED, fused=True),
    FeedForward(matrices=("gate_up_proj", "down_proj"), paired=True),
    cuts=HubCuts(rows=True),
)

FAMILIES = decoders(PHI3)
