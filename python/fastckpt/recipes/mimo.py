"""MiMo-V2: sliding layers have other kv heads and sinks, value heads are of another size than those of keys;
experts with corrected routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..checkpoint import JSON
from .attention import heads_of
from .claims import Heads, each_layer, integer
from .deepseek import CORRECTED
from .kind import IGNORED, Kind, Own, SelfAttention
from .mixture import Mixture, mixtures, typed


def _own(config: Mapping[str, JSON], count: int) -> list[Own]:
    """Sliding layers are those that `layer_types` says, without it all but the first and every sixth one."""
    heads, values = heads_of(config), integer(config, "v_head_dim")
    full = Own(heads, values)
    kv = integer(config, "swa_num_key_value_heads", 2 * heads.kv)
    sliding = Own(Heads(heads.q, kv, heads.dim), values, sinks=True)
    return [full if kind == "full_attention" else sliding for kind in _types(config, count)]


def _types(config: Mapping[str, JSON], count: int) -> Sequence[str]:
    if config.get("layer_types") is not None:
        return each_layer(config, "layer_types", count, ("full_attention", "sliding_attention"))
    full = [i == 0 or (i + 1) % 6 == 0 for i in range(count)]
    return ["full_attention" if each else "sliding_attention" for each in full]


MIMO_V2_FLASH = Mixture(
    Kind(
        "mimo_v2_flash",
        SelfAttention(o_bias=False, sinks="attention_sink_bias", trained_sinks="sinks", own=_own),
        ignored=(*IGNORED, "model.mtp.*"),
    ),
    CORRECTED,
    count=("n_routed_experts",),
    sparse=typed(1),
)

FAMILIES = mixtures(MIMO_V2_FLASH)
