"""Kimi Linear: linear attention of which every channel forgets at a rate of its own, latent attention without
rotary positions in some layers, experts after some dense layers.

Read by the hub's names, which transformers and vLLM load, by those that transformers trains with, and by
those that its save_pretrained writes, which calls dense blocks as those with experts. Written by the hub's.
Source: transformers' configuration_kimi_linear.py, modeling_kimi_linear.py and conversion_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import HubCuts, Model
from .claims import Claims, integer, section
from .delta import StoredDelta, delta_net
from .kind import Kind
from .known import Known
from .latent import latent
from .mixture import Mixture, Shared, typed
from .mixture import recipe as mixture_recipe
from .moe import Block
from .renaming import as_the_hub

_AT = "block_sparse_moe"
_LINEAR = StoredDelta(
    {"q_proj": "q", "k_proj": "k", "v_proj": "v", "b_proj": "b", "f_b_proj": "a", "g_b_proj": "z"},
    at="self_attn",
    low=("f_a_proj", "g_a_proj"),
    conv=("q_conv1d", "k_conv1d", "v_conv1d"),
    rates=lambda heads: (1, 1, heads, 1),
    norm="o_norm",
    o="o_proj",
)
KIMI_LINEAR = Mixture(
    Kind(
        "kimi_linear",
        mixer=delta_net(_LINEAR),
        cuts=HubCuts(whole=frozenset({"attention"})),
    ),
    Block(_AT, gate="w1", up="w3", down="w2", correction="gate.e_score_correction_bias", trained=_AT),
    count=("num_experts", "num_local_experts"),
    sparse=typed(1),
    shared=Shared(f"{_AT}.shared_experts", count="num_shared_experts", default=1),
    latent=latent,
)

_SPELLINGS = (
    (r"\.forget_gate\.", "."),
    (r"\.mlp\.(experts|gate|shared_experts)\.", rf".{_AT}.\1."),
    (rf"\.{_AT}\.(gate|up|down)_proj\.", r".mlp.\1_proj."),
)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Kimi Linear checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    hub = as_the_hub(ckpt, _SPELLINGS)
    told = _told(config, Claims(hub, "").layers(config))
    model = mixture_recipe(hub, told, vocab_size=vocab_size, mixture=KIMI_LINEAR)
    return replace(model, rope=None)


def _told(config: Mapping[str, JSON], count: int) -> dict[str, JSON]:
    """The config by the keys that are read, as transformers' class finds them. Raises RecipeError."""
    told, said = dict(config), section(config, "linear_attn_config", optional=True)
    heads = integer(said, "num_heads", integer(config, "linear_num_heads", 32))
    size = integer(said, "head_dim", integer(config, "linear_head_dim", 128))
    told |= {"linear_num_key_heads": heads, "linear_num_value_heads": heads}
    told |= {"linear_key_head_dim": size, "linear_value_head_dim": size}
    kernel = integer(config, "linear_conv_kernel_dim", 4)
    told["linear_conv_kernel_dim"] = integer(said, "short_conv_kernel_size", kernel)
    if config.get("layer_types") is None:
        told["layer_types"] = _types(said, count)
    return told


def _types(said: Mapping[str, JSON], count: int) -> list[JSON]:
    """The kind of each layer, by the hub's lists, which count from 1, else every fourth one but the first is
    full. Raises RecipeError."""
    full, linear = said.get("full_attn_layers"), said.get("kda_layers")
    if full is None or linear is None:
        return ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(count)]
    if not isinstance(full, list) or not isinstance(linear, list):
        raise RecipeError(
            f"config: full_attn_layers and kda_layers must be lists, got {full!r} and {linear!r}"
        )
    if sorted(map(str, [*full, *linear])) != sorted(str(i) for i in range(1, count + 1)):
        raise RecipeError(
            f"config: full_attn_layers {full} and kda_layers {linear} must name each of {count} layers once"
        )
    return ["full_attention" if i in full else "linear_attention" for i in range(1, count + 1)]


FAMILIES = {"kimi_linear": Known(recipe, KIMI_LINEAR.kind.ignored)}
