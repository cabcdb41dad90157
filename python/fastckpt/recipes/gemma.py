"""Gemma 1, 2, 3 (text) and VaultGemma: norms that multiply by 1 + weight, in 2 and 3 after each block too."""

from __future__ import annotations

from .decoder import Kind, Norms
from .decoder import families as kinds

AROUND = Norms(
    mlp="pre_feedforward_layernorm",
    attention_after="post_attention_layernorm",
    mlp_after="post_feedforward_layernorm",
)
GEMMA = Kind("gemma", plus_one=True, tied=True)
GEMMA2 = Kind("gemma2", norms=AROUND, plus_one=True, tied=True)
GEMMA3 = Kind("gemma3_text", norms=AROUND, plus_one=True, tied=True, qk_norm=True)
VAULTGEMMA = Kind("vaultgemma", norms=Norms(mlp="pre_feedforward_layernorm"), plus_one=True, tied=True)

FAMILIES = kinds(GEMMA, GEMMA2, GEMMA3, VAULTGEMMA)
