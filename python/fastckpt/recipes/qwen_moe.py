"""Qwen2-MoE and Qwen3-MoE: experts in the layers config says, in Qwen2 beside a shared one with a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..model import HubCuts, Model
from .claims import flag
from .decoder import Kind
from .mixture import Mixture, Shared, recipe, stepped

SHARED = Shared("mlp.shared_expert", width="shared_expert_intermediate_size", gate="mlp.shared_expert_gate")
QWEN2_MOE = Mixture(
    Kind(
        "qwen2_moe",
        o_bias=False,
        cuts=HubCuts(whole=frozenset({"shared", "shared_expert_intermediate_size"})),
    ),
    sparse=stepped,
    shared=SHARED,
)
QWEN3_MOE = Mixture(Kind("qwen3_moe", qk_norm=True), sparse=stepped)


def qwen2_moe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Qwen2-MoE checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    kind = replace(QWEN2_MOE.kind, qkv_bias=flag(config, "qkv_bias", True))
    return recipe(ckpt, config, vocab_size=vocab_size, mixture=replace(QWEN2_MOE, kind=kind))
