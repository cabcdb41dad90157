"""GLM and GLM-4 (transformers' own form): gate and up stored as one; GLM-4 has norms after each block too."""

from __future__ import annotations

from dataclasses import replace

from ..model import HubCuts
from .decoder import decoders
from .kind import FeedForward, Kind, Norms, SelfAttention

GLM = Kind(
    "glm",
    SelfAttention(o_bias=False),
    FeedForward(matrices=("gate_up_proj", "down_proj"), paired=True),
    cuts=HubCuts(rows=True),
)
GLM4 = replace(
    GLM,
    family="glm4",
    norms=Norms(attention_after="post_self_attn_layernorm", mlp_after="post_mlp_layernorm"),
)

FAMILIES = decoders(GLM, GLM4)
