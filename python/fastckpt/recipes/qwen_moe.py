"""Qwen2-MoE and Qwen3-MoE: experts in the layers config says, in Qwen2 beside a shared one with a gate."""

from __future__ import annotations

from ..model import HubCuts
from .decoder import Kind, Said
from .mixture import Mixture, Shared, stepped

SHARED = Shared("mlp.shared_expert", width="shared_expert_intermediate_size", gate="mlp.shared_expert_gate")
QWEN2_MOE = Mixture(
    Kind(
        "qwen2_moe",
        qkv_bias=Said("qkv_bias", True),
        o_bias=False,
        cuts=HubCuts(whole=frozenset({"shared", "shared_expert_intermediate_size"})),
    ),
    sparse=stepped,
    shared=SHARED,
)
QWEN3_MOE = Mixture(Kind("qwen3_moe", qk_norm=True), sparse=stepped)
