"""DeepSeek V2 and V3 and those like them: routed experts beside shared ones, after some dense layers.

The DeepSeeks have latent attention. V3 adds a correction to each expert's score when it selects, which is
never rounded, and may carry layers for multi-token prediction after the last, as GLM-4 MoE may; transformers
leaves those out, so a checkpoint it trained has none.
"""

from __future__ import annotations

from dataclasses import replace

from ..model import HubCuts, Stacked
from .kind import IGNORED, MLP_BIAS, NORMED, UNBIASED, FeedForward, Kind, QkNorm, Said, SelfAttention
from .latent import latent, sparse
from .meta import CORRECTIONS, GATED, ROUTED, STACKS, Meta
from .mixture import Mixture, Shared, after_dense, every, mixtures, typed
from .moe import Block

_ROUTED_ONLY = HubCuts(whole=frozenset({"shared", "n_shared_experts * moe_intermediate_size"}))

CORRECTED = Block(correction="gate.e_score_correction_bias")
V2 = Mixture(
    Kind("deepseek_v2", mlp=FeedForward(bias=MLP_BIAS)),
    count=("n_routed_experts",),
    sparse=after_dense,
    shared=Shared(),
    latent=latent,
)
META = Meta(
    names=ROUTED
    | {
        "attention.wq_a.weight": "self_attn.q_a_proj.weight",
        "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
        "attention.wq_b.weight": "self_attn.q_b_proj.weight",
        "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
        "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
    }
    | {f"moe.shared_experts.{name}.weight": f"mlp.shared_experts.{hub}.weight" for name, hub in GATED.items()}
    | dict.fromkeys(CORRECTIONS, "mlp.gate.e_score_correction_bias"),
    stacks=STACKS,
)
"""torchtitan's: rotary positions turn neighbouring rows, as they do in the hub's model."""
V3 = replace(
    V2,
    kind=Kind("deepseek_v3", cuts=HubCuts(whole=frozenset({"attention"})), meta=META),
    block=CORRECTED,
)
MISTRAL4 = replace(
    V2,
    kind=Kind("mistral4", cuts=HubCuts(whole=frozenset({"attention"}))),
    block=Block(stacked=Stacked("experts.gate_up_proj", "experts.down_proj")),
)
GLM4_MOE = replace(
    V3,
    kind=Kind("glm4_moe", SelfAttention(o_bias=False, qk_norm=QkNorm(Said("use_qk_norm")))),
    latent=None,
)
GLM4V_MOE_TEXT = replace(
    GLM4_MOE,
    kind=Kind("glm4v_moe_text", SelfAttention(qkv_bias=Said("attention_bias", True), o_bias=False)),
    shared=Shared(default=1),
)
GLM4_MOE_LITE = replace(V3, kind=Kind("glm4_moe_lite", cuts=_ROUTED_ONLY), sparse=typed())
KIMI_K2 = replace(V3, kind=replace(V3.kind, family="kimi_k2", meta=None))
DOTS1 = replace(GLM4_MOE, kind=Kind("dots1", NORMED))
SOLAR_OPEN = replace(
    GLM4_MOE, kind=Kind("solar_open", SelfAttention(o_bias=False), cuts=_ROUTED_ONLY), sparse=every
)
EXAONE_MOE = replace(
    GLM4_MOE,
    kind=Kind(
        "exaone_moe",
        replace(UNBIASED, qk_norm=QkNorm()),
        cuts=HubCuts(whole=frozenset({"shared", "num_shared_experts * moe_intermediate_size"})),
        ignored=(*IGNORED, "mtp.*"),
    ),
    block=replace(
        CORRECTED, correction="e_score_correction_bias", trained_correction="gate.e_score_correction_bias"
    ),
    count=("num_experts",),
    sparse=typed(),
    shared=Shared(count="num_shared_experts"),
)
HY_V3 = replace(
    GLM4_MOE,
    kind=Kind("hy_v3", NORMED, FeedForward(bias=MLP_BIAS), ignored=(*IGNORED, "model.layers.80.*")),
    block=Block(
        router="router.gate",
        correction="expert_bias",
        trained_router="gate",
        trained_correction="e_score_correction_bias",
    ),
    count=("num_experts",),
    sparse=typed(1),
    shared=Shared("mlp.shared_mlp", count="num_shared_experts", default=1, trained="mlp.shared_experts"),
)
"""Its 81st layer predicts one more token: transformers leaves it out."""
DEEPSEEK_V32 = replace(V3, kind=Kind("deepseek_v32"), sparse=typed(), latent=sparse)
GLM_MOE_DSA = replace(DEEPSEEK_V32, kind=Kind("glm_moe_dsa"))

FAMILIES = mixtures(
    GLM4_MOE,
    V2,
    V3,
    KIMI_K2,
    DEEPSEEK_V32,
    GLM_MOE_DSA,
    GLM4_MOE_LITE,
    DOTS1,
    SOLAR_OPEN,
    EXAONE_MOE,
    MISTRAL4,
    HY_V3,
)
