"""OLMo and EXAONE 4: OLMo's norms have no weights; the others norm what a block gives, and q and k."""

from __future__ import annotations

from dataclasses import replace

from .decoder import decoders
from .kind import UNBIASED, Kind, Norms, QkNorm, SelfAttention

_AFTER = Norms(
    attention=None,
    mlp=None,
    attention_after="post_attention_layernorm",
    mlp_after="post_feedforward_layernorm",
)
OLMO = Kind("olmo", norms=Norms(attention=None, mlp=None, last=None))
OLMO2 = Kind("olmo2", SelfAttention(qk_norm=QkNorm(whole=True)), norms=_AFTER)
OLMO3 = replace(OLMO2, family="olmo3")
EXAONE4 = Kind("exaone4", replace(UNBIASED, qk_norm=QkNorm()), norms=_AFTER)

FAMILIES = decoders(OLMO, OLMO2, OLMO3, EXAONE4)
