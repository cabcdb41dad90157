"""DeepSeek V2 and V3, and GLM-4 MoE: routed experts beside shared ones, after some dense layers.

The DeepSeeks have latent attention. V3 adds a correction to each expert's score when it selects, which is
never rounded, and may carry layers for multi-token prediction after the last, as GLM-4 MoE may; transformers
leaves those out, so a checkpoint it trained has none.
"""

from __future__ import annotations

from dataclasses import replace

from ..model import HubCuts
from .decoder import MLP_BIAS, Kind, Said
from .mixture import Mixture, Shared, after_dense
from .moe import Block

CORRECTED = Block(correction="gate.e_score_correction_bias")
V2 = Mixture(
    Kind("deepseek_v2", mlp_bias=MLP_BIAS),
    count=("n_routed_experts",),
    sparse=after_dense,
    shared=Shared(),
    latent=True,
)
V3 = replace(V2, kind=Kind("deepseek_v3", cuts=HubCuts(whole=frozenset({"attention"}))), block=CORRECTED)
GLM4_MOE = replace(V3, kind=Kind("glm4_moe", o_bias=False, qk_norm=Said("use_qk_norm")), latent=False)
