"""OLMo and EXAONE 4: OLMo's norms have no weights; the others norm what a block gives, and q and k."""

from __future__ import annotations

from .decoder import Kind, Norms
from .decoder import families as kinds

_AFTER = Norms(
    attention=None,
    mlp=None,
    attention_after="post_attention_layernorm",
    mlp_after="post_feedforward_layernorm",
)
OLMO = Kind("olmo", norms=Norms(attention=None, mlp=None, last=None))
OLMO2 = Kind("olmo2", norms=_AFTER, qk_norm=True, whole_norms=True)
OLMO3 = Kind("olmo3", norms=_AFTER, qk_norm=True, whole_norms=True)
EXAONE4 = Kind("exaone4", qkv_bias=False, o_bias=False, norms=_AFTER, qk_norm=True)

FAMILIES = kinds(OLMO, OLMO2, OLMO3, EXAONE4)
