"""Latent attention (DeepSeek's), with or without a low-rank query, and its rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON
from ..model import Mla, Rope, Yarn
from .claims import Claims, Dim, Heads, dim, flag, integer


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
        return lambda: Mla(q(), kv_a(), kv_norm(), kv_b(), o())
    low = dim(config, "q_lora_rank")
    q_a = claims.linear(f"{at}.q_a_proj", low, hidden, bias=bias)
    q_norm = claims.norm(f"{at}.q_a_layernorm", low)
    q_b = claims.linear(f"{at}.q_b_proj", q_rows, low)
    return lambda: Mla(q_b(), kv_a(), kv_norm(), kv_b(), o(), q_a(), q_norm())


def rope(config: Mapping[str, JSON]) -> Rope | None:
    """The rotary positions in the config, under transformers 5's keys or older ones; None for a kind that
    DeepSeek's own model does not have."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(said, dict):
        return None
    dim, base = integer(config, "qk_rope_head_dim"), said.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = said.get("rope_type") or said.get("type") or "default"
    if not isinstance(base, int | float) or kind not in ("default", "yarn"):
        return None
    if kind == "default":
        return Rope(dim, float(base))
    keys = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    given = {k: float(v) for k in keys if isinstance(v := said.get(k), int | float)}
    original = said.get("original_max_position_embeddings")
    if "factor" not in given or not isinstance(original, int):
        return None
    return Rope(dim, float(base), Yarn(original=original, **given))
