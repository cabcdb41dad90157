"""OLMo Hybrid: layers with linear attention are normed before their blocks, those with attention as OLMo 3's.

Read by the names that transformers and vLLM load, in which the kernels of q, k and v are apart; by those that
transformers trains with; by those that its save_pretrained writes, where norms have OLMo-core's names and the
kernels are cut in three equal parts. Written by the first. Source: transformers'
configuration_olmo_hybrid.py, modeling_olmo_hybrid.py and conversion_mapping.py; vLLM's olmo_hybrid.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..model import Model
from .claims import Claims, integer
from .decoder import recipe as dense_recipe
from .delta import StoredDelta, delta_net
from .kind import IGNORED, Norms
from .known import Known
from .olmo import OLMO3
from .renaming import as_the_hub

_LINEAR = StoredDelta(
    {"q_proj": "q", "k_proj": "k", "v_proj": "v", "g_proj": "z", "b_proj": "b", "a_proj": "a"},
    conv=("q_conv1d", "k_conv1d", "v_conv1d"),
    norm="o_norm",
    o="o_proj",
)
OLMO_HYBRID = replace(
    OLMO3,
    family="olmo_hybrid",
    mixer=delta_net(_LINEAR, norms=Norms()),
    ignored=(*IGNORED, "mtp*"),
)

_SPELLINGS = (
    (r"\.attention_layer_norm\.", ".input_layernorm."),
    (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of an OLMo Hybrid checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    hub = as_the_hub(ckpt, _SPELLINGS)
    told = _told(config, Claims(hub, "").layers(config))
    return dense_recipe(hub, told, vocab_size=vocab_size, kind=OLMO_HYBRID)


def _told(config: Mapping[str, JSON], count: int) -> dict[str, JSON]:
    """The config with what transformers' class makes of what it leaves out. Raises RecipeError."""
    told = dict(config)
    if config.get("layer_types") is None:
        types: list[JSON] = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(count)]
        told["layer_types"] = [*types[:-1], "full_attention"] if count < 4 else types
    heads = integer(config, "num_attention_heads")
    keys = integer(config, "linear_num_key_heads", heads)
    size = integer(config, "linear_key_head_dim", int(0.75 * integer(config, "hidden_size") / keys))
    told |= {"linear_num_key_heads": keys, "linear_key_head_dim": size}
    told["linear_num_value_heads"] = integer(config, "linear_num_value_heads", heads)
    told["linear_value_head_dim"] = integer(config, "linear_value_head_dim", 2 * size)
    told["linear_conv_kernel_dim"] = integer(config, "linear_conv_kernel_dim", 4)
    return told


FAMILIES = {"olmo_hybrid": Known(recipe, OLMO_HYBRID.ignored)}
