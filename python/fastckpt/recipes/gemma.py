"""Gemma 1, 2, 3 (text) and VaultGemma: norms that multiply by 1 + weight, in 2 and 3 after each block too."""

from __future__ import annotations

from dataclasses import replace

from .decoder import decoders
from .kind import NORMED, TIED, Kind, Norms

AROUND = Norms(
    mlp="pre_feedforward_layernorm",
    attention_after="post_attention_layernorm",
    mlp_after="post_feedforward_layernorm",
)
GEMMA = Kind("gemma", norms=Norms(plus_one=True), vocabulary=TIED)
GEMMA2 = Kind("gemma2", norms=replace(AROUND, plus_one=True), vocabulary=TIED)
GEMMA3 = replace(GEMMA2, family="gemma3_text", attention=NORMED)
VAULTGEMMA = Kind("vaultgemma", norms=Norms(mlp="pre_feedforward_layernorm", plus_one=True), vocabulary=TIED)

FAMILIES = decoders(GEMMA, GEMMA2, GEMMA3, VAULTGEMMA)
