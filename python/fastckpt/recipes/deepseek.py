"""DeepSeek V2 and V3, and GLM-4 MoE: routed experts beside shared ones, after some dense layers.

The DeepSeeks have latent attention. V3 adds a correction to each expert's score when it selects, which is
never rounded, and may carry layers for multi-token prediction after the last, as GLM-4 MoE may; transformers
leaves those out, so a checkpoint it trained has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..model import HubCuts, Model
from .claims import flag
from .decoder import Kind
from .mixture import Mixture, Shared, after_dense, recipe
from .moe import Block

CORRECTED = Block(correction="gate.e_score_correction_bias")
V2 = Mixture(
    Kind("deepseek_v2", mlp_bias=True),
    count=("n_routed_experts",),
    sparse=after_dense,
    shared=Shared(),
    latent=True,
)
V3 = replace(V2, kind=Kind("deepseek_v3", cuts=HubCuts(whole=frozenset({"attention"}))), block=CORRECTED)
GLM4_MOE = replace(V3, kind=Kind("glm4_moe", o_bias=False), latent=False)


def glm4_moe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a GLM-4 MoE checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    kind = replace(GLM4_MOE.kind, qk_norm=flag(config, "use_qk_norm", False))
    return recipe(ckpt, config, vocab_size=vocab_size, mixture=replace(GLM4_MOE, kind=kind))
