"""Laguna and AFMoE: gates of attention's output, experts with corrected routing beside shared ones; layers of
Laguna differ in heads, AFMoE has norms after each block too."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import JSON
from ..errors import RecipeError
from ..model import HubCuts
from .attention import heads_of
from .claims import Heads, integer
from .kind import Kind, Norms, Own, QkNorm, SelfAttention
from .mixture import Mixture, Shared, after, mixtures, typed
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
    Kind("laguna", SelfAttention(qk_norm=QkNorm(), output_gate="g_proj", head_gates=True, own=_own)),
    Block(correction="experts.e_score_correction_bias", trained_correction="gate.e_score_correction_bias"),
    count=("num_experts",),
    sparse=typed(1),
    shared=Shared("mlp.shared_expert", width="shared_expert_intermediate_size", trained="mlp.shared_experts"),
)
_WHOLE = frozenset(
    {"attention", "mlp", "intermediate_size", "shared", "num_shared_experts * moe_intermediate_size"}
)
AFMOE = Mixture(
    Kind(
        "afmoe",
        SelfAttention(qk_norm=QkNorm(), output_gate="gate_proj"),
        norms=Norms(
            mlp="pre_mlp_layernorm",
            attention_after="post_attention_layernorm",
            mlp_after="post_mlp_layernorm",
        ),
        cuts=HubCuts(whole=_WHOLE),
    ),
    Block(router="router.gate", correction="expert_bias"),
    count=("num_experts",),
    sparse=after("num_dense_layers", 1),
    shared=Shared(count="num_shared_experts", default=2),
)

FAMILIES = mixtures(LAGUNA, AFMOE)
