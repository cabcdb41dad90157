"""Qwen2-MoE, Qwen3-MoE and those like them: experts in the layers config says, some beside a shared one."""

from __future__ import annotations

from ..model import HubCuts
from .kind import IGNORED, NORMED, Kind, QkNorm, Said, SelfAttention
from .llama import HUNYUAN
from .meta import CORRECTIONS, HEAD_NORMS, ROUTED, STACKS, Meta
from .mixture import Mixture, Shared, mixtures, stepped
from .moe import Block

SHARED = Shared("mlp.shared_expert", width="shared_expert_intermediate_size", gate="mlp.shared_expert_gate")
QWEN2_MOE = Mixture(
    Kind(
        "qwen2_moe",
        SelfAttention(qkv_bias=Said("qkv_bias", True), o_bias=False),
        cuts=HubCuts(whole=frozenset({"shared", "shared_expert_intermediate_size"})),
    ),
    sparse=stepped,
    shared=SHARED,
)
QWEN3_MOE = Mixture(
    Kind(
        "qwen3_moe",
        NORMED,
        meta=Meta(names=HEAD_NORMS | ROUTED, stacks=STACKS),
        ignored=(*IGNORED, *(f"layers.*.{name}" for name in CORRECTIONS)),  # the hub's routing has none
    ),
    sparse=stepped,
)
OLMOE = Mixture(
    Kind("olmoe", SelfAttention(qk_norm=QkNorm(whole=True))),
    count=("num_experts",),
    width="intermediate_size",
)
HUNYUAN_V1_MOE = Mixture(
    Kind(
        "hunyuan_v1_moe",
        HUNYUAN.attention,
        cuts=HubCuts(whole=frozenset({"attention", "shared", "num_shared_expert * intermediate_size"})),
    ),
    Block(router="gate.wg"),
    count=("num_experts",),
    width="intermediate_size",
    shared=Shared("mlp.shared_mlp", count="num_shared_expert", default=1),
)

FAMILIES = mixtures(QWEN2_MOE, QWEN3_MOE, OLMOE, HUNYUAN_V1_MOE)
