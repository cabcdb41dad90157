"""GLM and GLM-4 (transformers' own form): gate and up stored as one; GLM-4 has norms after each block too."""

from __future__ import annotations

from ..model import HubCuts
from .decoder import Kind, Norms
from .decoder import families as kinds

GLM = Kind("glm", o_bias=False, paired=("gate_up_proj", "down_proj"), cuts=HubCuts(rows=True))
GLM4 = Kind(
    "glm4",
    o_bias=False,
    paired=("gate_up_proj", "down_proj"),
    norms=Norms(attention_after="post_self_attn_layernorm", mlp_after="post_mlp_layernorm"),
    cuts=HubCuts(rows=True),
)

FAMILIES = kinds(GLM, GLM4)
