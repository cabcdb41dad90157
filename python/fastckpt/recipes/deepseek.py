"""DeepSeek V2 and V3, and GLM-4 MoE: routed experts beside shared ones, after some dense layers.

The DeepSeeks have latent attention, with or without a low-rank query. V3 adds a correction to each expert's
score when it selects, which is never rounded, and may carry layers for multi-token prediction after the last,
as GLM-4 MoE may; transformers leaves those out, so a checkpoint it trained has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..model import Experts, HubCuts, Mla, Mlp, Model, Rope, Yarn
from .claims import Claims, Dim, Heads, dim, flag, integer
from .decoder import ANCHOR, MLP_BIAS, Kind, decoder, dense, gated
from .moe import BLOCK, experts, with_shared
from .quantised import quantised


@dataclass(frozen=True, slots=True)
class Family:
    """The `kind` of decoder; `latent`: its attention is latent; `corrected`: its router has a correction."""

    kind: Kind
    latent: bool = True
    corrected: bool = True


V2 = Family(Kind("deepseek_v2", mlp_bias=MLP_BIAS), corrected=False)
V3 = Family(Kind("deepseek_v3", cuts=HubCuts(whole=frozenset({"attention"}))))
GLM4_MOE = Family(Kind("glm4_moe", o_bias=False), latent=False)


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, family: Family = V3
) -> Model:
    """The model of a checkpoint of that family; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, ANCHOR, form=quantised(config))
    hidden = dim(config, "hidden_size")
    layers = integer(config, "num_hidden_layers")
    first = integer(config, "first_k_dense_replace", least=0)
    count = dim(config, "n_routed_experts")
    width = dim(config, "moe_intermediate_size")
    beside = integer(config, "n_shared_experts", 0, least=0)
    shared = Dim(beside * width.size, f"n_shared_experts * {width.key}")
    plain = dim(config, "intermediate_size")
    extra = integer(config, "num_nextn_predict_layers", 0, least=0)
    kind = replace(family.kind, qk_norm=not family.latent and flag(config, "use_qk_norm", False))
    block = dense(kind, claims, config, plain)
    widths = {plain.key: plain.size} if first else {}
    if first < layers:
        widths |= {d.key: d.size for d in (width, shared) if d.size}

    def feed_forward(layer: str) -> Callable[[], Mlp | Experts]:
        if int(layer.rpartition(".")[2]) < first:
            return block(layer)
        build = experts(claims, layer, BLOCK, count, width, hidden)
        if family.corrected:
            build = _corrected(claims, f"{layer}.mlp.gate.e_score_correction_bias", count, build)
        if not beside:
            return build
        return with_shared(build, gated(claims, f"{layer}.mlp.shared_experts", shared, hidden))

    attends, heads = None, None
    if family.latent:
        each = integer(config, "num_attention_heads")
        heads = Heads(each, each, integer(config, "v_head_dim"))
        attends = partial(_latent, claims, config, each, hidden)
    model = decoder(
        kind,
        claims,
        config,
        vocab_size,
        feed_forward,
        widths,
        attends=attends,
        heads=heads,
        experts=count.size,
        expert_width=width.key,
        shared_width=shared.key,
        predictions=extra,
    )
    return replace(model, rope=_rope(config)) if family.latent else model


def _rope(config: Mapping[str, JSON]) -> Rope | None:
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


def _corrected(claims: Claims, name: str, count: Dim, build: Callable[[], Experts]) -> Callable[[], Experts]:
    correction = claims.parameter(name, count, kept=True)
    return lambda: replace(build(), correction=correction())


def _latent(
    claims: Claims, config: Mapping[str, JSON], heads: int, hidden: Dim, layer: str
) -> Callable[[], Mla]:
    at = f"{layer}.self_attn"
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
