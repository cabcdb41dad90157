"""Laguna: output gates, layers of different heads, experts with corrected routing beside a shared one."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import JSON
from ..errors import RecipeError
from .claims import Heads, integer
from .decoder import Kind, Own, heads_of
from .mixture import Mixture, Shared, typed
from .mixture import families as mixtures
from .moe import Block


def _own(config: Mapping[str, JSON], count: int) -> list[Own]:
    """Layers have as many query heads as `num_attention_heads_per_layer` says, if it does."""
    heads, key = heads_of(config), "num_attention_heads_per_layer"
    said = config.get(key)
    if said is None:
        return [Own(heads)] * count
    if not isinstance(said, list) or len(said) != count:
        raise RecipeError(f"config: {key} must be {count} numbers, got {said!r}")
    return [Own(Heads(integer({key: n}, key), heads.kv, heads.dim)) for n in said]


LAGUNA = Mixture(
    Kind("laguna", qk_norm=True, output_gate="g_proj", head_gates=True, own=_own),
    Block(correction="experts.e_score_correction_bias", trained_correction="gate.e_score_correction_bias"),
    count=("num_experts",),
    sparse=typed(1),
    shared=Shared("mlp.shared_expert", width="shared_expert_intermediate_size", trained="mlp.shared_experts"),
)

FAMILIES = mixtures(LAGUNA)
