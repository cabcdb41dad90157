"""ERNIE 4.5 MoE: routed experts beside shared ones, in a range of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON
from .claims import integer
from .kind import IGNORED, FeedForward, Kind, Said, SelfAttention, Vocabulary
from .mixture import Mixture, Shared, mixtures
from .moe import Block


def ranged(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    """Every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index` has experts
    (-1: to the last)."""
    start = integer(config, "moe_layer_start_index", 1, least=0)
    end, step = integer(config, "moe_layer_end_index", -1, least=-1), integer(config, "moe_layer_interval", 1)
    return lambda layer: (layer + 1) % step == 0 and layer >= start and (end == -1 or layer <= end)


_BIAS = Said("use_bias")
ERNIE4_5_MOE = Mixture(
    Kind(
        "ernie4_5_moe",
        SelfAttention(qkv_bias=_BIAS, o_bias=_BIAS),
        FeedForward(bias=_BIAS),
        vocabulary=Vocabulary(head_bias=_BIAS, tied=True),
        ignored=(*IGNORED, "model.mtp_*"),
    ),
    Block(
        correction="moe_statics.e_score_correction_bias",
        row=True,
        exact=True,  # transformers and vLLM hold it in float32, the hub stores it so
        trained_correction="gate.moe_statics.e_score_correction_bias",
    ),
    count=("moe_num_experts",),
    sparse=ranged,
    shared=Shared(count="moe_num_shared_experts"),
)

FAMILIES = mixtures(ERNIE4_5_MOE)
