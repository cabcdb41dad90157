"""Latent attention (DeepSeek's), with or without a low-rank query, its rotary positions, and what makes it
sparse: an indexer in some layers, which chooses the tokens that they and those after them read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from ..checkpoint import JSON
from ..mixers import Indexer, Mla
from ..model import Rope, Yarn
from .attention import Attending
from .claims import Claims, Dim, Heads, dim, each_layer, flag, integer, layer_index, number

Latent = Callable[[Claims, Mapping[str, JSON], str], Callable[[], Mla]]
"""Claims the latent attention of a layer by the layer's name."""


def attending(claims: Claims, config: Mapping[str, JSON], claim: Latent) -> Attending:
    """Latent attention in every layer. Raises RecipeError."""
    keys = "num_attention_heads", "num_key_value_heads", ""
    return Attending(partial(claim, claims, config), heads_of(config), keys)


def heads_of(config: Mapping[str, JSON]) -> Heads:
    """The heads a config says: one for keys and values to each for queries, of a value's size."""
    heads = integer(config, "num_attention_heads")
    return Heads(heads, heads, integer(config, "v_head_dim"))


def latent(claims: Claims, config: Mapping[str, JSON], layer: str) -> Callable[[], Mla]:
    """Claims the latent attention of a layer."""
    at, hidden = f"{layer}.self_attn", dim(config, "hidden_size")
    heads = integer(config, "num_attention_heads")
    nope, rope = integer(config, "qk_nope_head_dim"), integer(config, "qk_rope_head_dim")
    value, rank = integer(config, "v_head_dim"), dim(config, "kv_lora_rank")
    bias = flag(config, "attention_bias", False)
    # null is no to transformers
    halves = not flag(config, "rope_interleave", "rope_interleave" not in config)
    q_rows = Dim(heads * (nope + rope), "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)")
    a_rows = Dim(rank.size + rope, "kv_lora_rank + qk_rope_head_dim")
    b_rows = Dim(heads * (nope + value), "num_attention_heads * (qk_nope_head_dim + v_head_dim)")
    values = Dim(heads * value, "num_attention_heads * v_head_dim")

    kv_a = claims.linear(f"{at}.kv_a_proj_with_mqa", a_rows, hidden, bias=bias)
    kv_norm = claims.norm(f"{at}.kv_a_layernorm", rank)
    kv_b = claims.linear(f"{at}.kv_b_proj", b_rows, rank)
    o = claims.linear(f"{at}.o_proj", hidden, values, bias=bias)
    if config.get("q_lora_rank") is None:
        q = claims.linear(f"{at}.q_proj", q_rows, hidden)
        return lambda: Mla(q(), kv_a(), kv_norm(), kv_b(), o(), halves=halves)
    low = dim(config, "q_lora_rank")
    q_a = claims.linear(f"{at}.q_a_proj", low, hidden, bias=bias)
    q_norm = claims.norm(f"{at}.q_a_layernorm", low)
    q_b = claims.linear(f"{at}.q_b_proj", q_rows, low)
    return lambda: Mla(q_b(), kv_a(), kv_norm(), kv_b(), o(), q_a(), q_norm(), halves=halves)


def sparse(claims: Claims, config: Mapping[str, JSON], layer: str) -> Callable[[], Mla]:
    """Claims the latent attention of a layer, and its indexer where it has one."""
    build = latent(claims, config, layer)
    if not _indexes(config, layer_index(layer)):
        return build
    at, hidden = f"{layer}.self_attn.indexer", dim(config, "hidden_size")
    heads, features = dim(config, "index_n_heads"), dim(config, "index_head_dim")
    rows = Dim(heads.size * features.size, f"{heads.key} * {features.key}")
    q = claims.linear(f"{at}.wq_b", rows, dim(config, "q_lora_rank"))
    k, k_norm = claims.linear(f"{at}.wk", features, hidden), claims.norm(f"{at}.k_norm", features, bias=True)
    weights = claims.linear(f"{at}.weights_proj", heads, hidden)
    return lambda: replace(build(), indexer=Indexer(q(), k(), k_norm(), weights()))


def _indexes(config: Mapping[str, JSON], layer: int) -> bool:
    """Whether a layer has an indexer of its own; one that predicts more tokens always has. Raises
    RecipeError."""
    count = integer(config, "num_hidden_layers")
    if layer >= count:
        return True
    key = next((k for k in ("indexer_types", "index_topk_pattern") if config.get(k) is not None), None)
    if key is not None:
        kinds = each_layer(config, key, count, ("full", "shared", "F", "S"))
        return kinds[layer] in ("full", "F")
    step = integer(config, "index_topk_freq", 1)
    offset = integer(config, "index_skip_topk_offset", 2, least=0)
    return max(layer - offset + 1, 0) % step == 0


def rope(config: Mapping[str, JSON]) -> Rope | None:
    """The rotary positions in the config, under transformers 5's key or older ones; None for a kind that
    DeepSeek's own model does not have, where the config says nothing, and where both keys say other things:
    transformers goes by the older one. Raises RecipeError."""
    new, old = (config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    said = old or new
    if not isinstance(said, dict) or (new and said != new) or not (said or config.get("rope_theta")):
        return None
    kind = said.get("rope_type") or said.get("type") or "default"
    if kind not in ("default", "yarn"):
        return None
    features = integer(config, "qk_rope_head_dim")
    base = number(said, "rope_theta", number(config, "rope_theta", 10000.0, least=2), least=2)
    if kind == "default":
        return Rope(features, base)
    if said.get("factor") is None or said.get("original_max_position_embeddings") is None:
        return None
    if said.get("attention_factor") is not None or said.get("truncate") is False:
        return None
    original, factor = integer(said, "original_max_position_embeddings"), number(said, "factor", 1, least=1)
    given = {key: number(said, key, 0, least=n) for key, n in _YARN.items() if said.get(key) is not None}
    return Rope(features, base, Yarn(factor, original, **given))


_YARN = {"beta_fast": 0.001, "beta_slow": 0.001, "mscale": 0, "mscale_all_dim": 0}
"""The numbers of YaRN that a config may leave out, and the least each can be."""
