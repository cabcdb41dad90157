"""Qwen2-MoE and Qwen3-MoE: experts in the layers config says, in Qwen2 beside a shared one with a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Experts, HubCuts, Mlp, Model
from .claims import Claims, Dim, dim, flag, integer
from .decoder import ANCHOR, Kind, decoder, dense, gated
from .moe import BLOCK, experts, with_shared
from .quantised import quantised

QWEN2_MOE = Kind(
    "qwen2_moe",
    qkv_bias=True,
    o_bias=False,
    cuts=HubCuts(whole=frozenset({"shared", "shared_expert_intermediate_size"})),
)
QWEN3_MOE = Kind("qwen3_moe", qk_norm=True)


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, kind: Kind = QWEN3_MOE
) -> Model:
    """The model of a Qwen MoE checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, ANCHOR, form=quantised(config))
    hidden = dim(config, "hidden_size")
    count = dim(config, "num_experts", "num_local_experts")
    width = dim(config, "moe_intermediate_size")
    sparse = _sparse_layers(config, claims.most)
    widths = {width.key: width.size} if any(sparse) else {}
    gated_shared = kind is QWEN2_MOE
    if gated_shared:
        kind = replace(kind, qkv_bias=flag(config, "qkv_bias", True))
        shared = dim(config, "shared_expert_intermediate_size")
        widths |= {shared.key: shared.size}
    if not all(sparse):
        plain = dim(config, "intermediate_size")
        widths |= {plain.key: plain.size}
        block = dense(kind, claims, config, plain)

    def feed_forward(layer: str) -> Callable[[], Mlp | Experts]:
        if not sparse[int(layer.rpartition(".")[2])]:
            return block(layer)
        routed = experts(claims, layer, BLOCK, count, width, hidden)
        if not gated_shared:
            return routed
        beside = gated(claims, f"{layer}.mlp.shared_expert", shared, hidden)
        gate = claims.linear(f"{layer}.mlp.shared_expert_gate", Dim(1, "1"), hidden)
        return with_shared(routed, beside, gate)

    return decoder(
        kind,
        claims,
        config,
        vocab_size,
        feed_forward,
        widths,
        experts=count.size,
        expert_width=width.key,
        shared_width=shared.key if gated_shared else "",
    )


def _sparse_layers(config: Mapping[str, JSON], tensors: int) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    count = integer(config, "num_hidden_layers")
    if count > tensors:
        raise RecipeError(f"config: num_hidden_layers {count}, and the checkpoint has {tensors} tensors")
    step = integer(config, "decoder_sparse_step", 1)
    only = config.get("mlp_only_layers") or []
    if not isinstance(only, list):
        raise RecipeError(f"config: mlp_only_layers must be a list of numbers, got {only!r}")
    return [i not in only and (i + 1) % step == 0 for i in range(count)]
