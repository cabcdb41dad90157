"""Decoders with mixtures of experts: in which layers, how many, how wide, and what stands beside them.

A family is a Mixture, beside the Kind that says how the rest of it differs from the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Experts, Mlp, Model
from .claims import Claims, Dim, absent, dim, integer
from .decoder import ANCHOR, Kind, decoder, dense, gated
from .latent import heads_of, latent, rope
from .moe import BLOCK, Block, experts, with_shared
from .quantised import quantised

Rule = Callable[[Mapping[str, JSON]], Callable[[int], bool]]
"""Of a config, which layers have experts. Raises RecipeError."""


def every(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    """All layers have experts."""
    return lambda layer: True


def after_dense(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    """Layers have experts after the first `first_k_dense_replace`."""
    first = integer(config, "first_k_dense_replace", 0, least=0)
    return lambda layer: layer >= first


def stepped(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    """Every `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers`."""
    step, only = integer(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(only, list):
        raise RecipeError(f"config: mlp_only_layers must be a list of numbers, got {only!r}")
    return lambda layer: layer not in only and (layer + 1) % step == 0


@dataclass(frozen=True, slots=True)
class Shared:
    """The block of a layer that every token passes. `name`: the hub's module within the layer; `width`:
    config's key of how wide it is, or `count`, of how many experts that is; `gate`: the module of its
    gate."""

    name: str = "mlp.shared_experts"
    count: str = "n_shared_experts"
    width: str = ""
    gate: str = ""


@dataclass(frozen=True, slots=True)
class Mixture:
    """How a family's mixtures differ. `count`: config's keys of how many experts there are, `width`, of how
    wide one is; `sparse`: which layers have them; `latent`: attention is latent."""

    kind: Kind
    block: Block = BLOCK
    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    width: str = "moe_intermediate_size"
    sparse: Rule = every
    shared: Shared | None = None
    latent: bool = False


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, mixture: Mixture
) -> Model:
    """The model of a checkpoint of that family; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, ANCHOR, form=quantised(config))
    kind = mixture.kind
    hidden, width = dim(config, "hidden_size"), dim(config, mixture.width)
    count = dim(config, *mixture.count)
    sparse = _layers(config, mixture.sparse, claims.most)
    shared = _shared(config, mixture.shared, width)
    widths = {d.key: d.size for d in (width, shared) if d.size and any(sparse)}
    block = None
    if not all(sparse):
        plain = dim(config, "intermediate_size")
        block = dense(kind, claims, config, plain)
        widths = {plain.key: plain.size} | widths

    def feed_forward(layer: str) -> Callable[[], Mlp | Experts]:
        number = int(layer.rpartition(".")[2])
        if block is not None and number < len(sparse) and not sparse[number]:
            return block(layer)
        build = experts(claims, layer, mixture.block, count, width, hidden)
        if mixture.shared is None or not shared.size:
            return build
        gate = mixture.shared.gate
        return with_shared(
            build,
            gated(claims, f"{layer}.{mixture.shared.name}", shared, hidden),
            claims.linear(f"{layer}.{gate}", Dim(1, "1"), hidden) if gate else absent,
        )

    model = decoder(
        kind,
        claims,
        config,
        vocab_size,
        feed_forward,
        widths,
        attends=partial(latent, claims, config) if mixture.latent else None,
        heads=heads_of(config) if mixture.latent else None,
        experts=count.size,
        expert_width=width.key,
        shared_width=shared.key,
        predictions=integer(config, "num_nextn_predict_layers", 0, least=0),
    )
    return replace(model, rope=rope(config)) if mixture.latent else model


def _layers(config: Mapping[str, JSON], rule: Rule, tensors: int) -> list[bool]:
    """Which layers have experts."""
    count = integer(config, "num_hidden_layers")
    if count > tensors:
        raise RecipeError(f"config: num_hidden_layers {count}, and the checkpoint has {tensors} tensors")
    has = rule(config)
    return [has(i) for i in range(count)]


def _shared(config: Mapping[str, JSON], shared: Shared | None, width: Dim) -> Dim:
    """How wide the shared block is; 0 where there is none."""
    if shared is None:
        return Dim(0, "")
    if shared.width:
        return dim(config, shared.width)
    beside = integer(config, shared.count, 0, least=0)
    return Dim(beside * width.size, f"{shared.count} * {width.key}")
