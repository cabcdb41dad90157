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
from ..roles import Linear
from .attention import attention
from .claims import Claims, Dim, absent, dim, each_layer, integer, layer_index
from .decoder import blocks_of, claimed, decoder
from .dense import Feeding, dense
from .kind import Kind
from .known import Known
from .latent import Latent, attending, rope
from .moe import (
    AUTOEP_SHARED,
    AUTOEP_SHARED_GATE,
    BLOCK,
    Block,
    experts,
    has_autoep,
    saved_as,
    with_shared,
)

Rule = Callable[[Mapping[str, JSON]], Callable[[int], bool]]
"""Of a config, which layers have experts. Raises RecipeError."""


def every(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    """All layers have experts."""
    return lambda layer: True


def after(key: str, default: int | None = None) -> Rule:
    """Layers have experts after as many as config's `key` says."""

    def rule(config: Mapping[str, JSON]) -> Callable[[int], bool]:
        first = integer(config, key, default, least=0)
        return lambda layer: layer >= first

    return rule


def typed(default: int | None = None) -> Rule:
    """Layers have experts that `mlp_layer_types` calls sparse; without it, as `after_dense`, of which config
    may mean `default`."""

    def rule(config: Mapping[str, JSON]) -> Callable[[int], bool]:
        if config.get("mlp_layer_types") is None:
            return after(DENSE, default)(config)
        count = integer(config, "num_hidden_layers")
        types = each_layer(config, "mlp_layer_types", count, ("dense", "sparse"))
        return lambda layer: types[layer] == "sparse"

    return rule


DENSE = "first_k_dense_replace"
after_dense = after(DENSE)


def stepped(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    """Every `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers`."""
    step, only = integer(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(only, list):
        raise RecipeError(f"config: mlp_only_layers must be a list of numbers, got {only!r}")
    return lambda layer: layer not in only and (layer + 1) % step == 0


@dataclass(frozen=True, slots=True)
class Shared:
    """The block of a layer that every token passes. `name`: the hub's module within the layer, `trained`:
    what transformers calls it in training ("": likewise); `width`: config's key of how wide it is, or
    `count`, of how many experts that is, which may be said of each layer; `default`: how many where the
    config does not say; `gate`: the module of its gate. Its matrices have the names of a block without
    experts."""

    name: str = "mlp.shared_experts"
    count: str = "n_shared_experts"
    default: int = 0
    width: str = ""
    gate: str = ""
    trained: str = ""


@dataclass(frozen=True, slots=True)
class Mixture:
    """How a family's mixtures differ. `count`: config's keys of how many experts there are, `width`, of how
    wide one is; `sparse`: which layers have them, where the others have the kind's own block; `latent`: what
    claims its latent attention, None where it has none."""

    kind: Kind
    block: Block = BLOCK
    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    width: str = "moe_intermediate_size"
    sparse: Rule = every
    shared: Shared | None = None
    latent: Latent | None = None


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, mixture: Mixture
) -> Model:
    """The model of a checkpoint of that family; `vocab_size` overrides config's. Raises RecipeError."""
    kind = mixture.kind
    claims = claimed(kind, ckpt, config)
    model = decoder(
        kind,
        claims,
        config,
        vocab_size,
        attending(claims, config, mixture.latent) if mixture.latent else attention(kind, claims, config),
        _feeding(mixture, claims, config),
        predictions=integer(config, "num_nextn_predict_layers", 0, least=0),
    )
    return replace(model, rope=rope(config)) if mixture.latent else model


def _feeding(mixture: Mixture, claims: Claims, config: Mapping[str, JSON]) -> Feeding:
    kind, hidden, chosen = mixture.kind, dim(config, "hidden_size"), mixture.sparse(config)
    held = blocks_of(kind, config, claims.layers(config))
    sparse = {i: chosen(i) for i, blocks in enumerate(held) if "mlp" in blocks}
    count = width = shared = Dim(0, "")
    if any(sparse.values()):
        count, width = dim(config, *mixture.count), dim(config, mixture.width)
        shared = _shared(config, mixture.shared, width)
    widths = {d.key: d.size for d in (width, shared) if d.size}
    block = None
    if not all(sparse.values()):
        plain = dim(config, *kind.mlp.width)
        if plain.key == width.key:  # Jamba: ranks cut it otherwise than an expert's
            plain = plain.times(1)
        block = dense(kind.mlp, claims, config, plain)
        widths = {plain.key: plain.size} | widths

    def claim(layer: str) -> Callable[[], Mlp | Experts]:
        if block is not None and not sparse.get(layer_index(layer), True):
            return block(layer)
        build = experts(claims, config, layer, mixture.block, (count, width, hidden))
        if mixture.shared is None or not shared.size:
            return build
        return with_shared(build, *_shared_block(mixture, mixture.shared, claims, config, layer, shared))

    return Feeding(claim, widths, count.size, width.key, shared.key)


def _shared_block(
    mixture: Mixture, named: Shared, claims: Claims, config: Mapping[str, JSON], layer: str, width: Dim
) -> tuple[Callable[[], Mlp], Callable[[], Linear | None]]:
    """Claims the block that every token passes, and its gate."""
    trained, gate = named.trained, named.gate
    if has_autoep(claims, layer, mixture.block):
        at = mixture.block.trained
        trained, gate = f"{at}.{AUTOEP_SHARED}", f"{at}.{AUTOEP_SHARED_GATE}"
    block = dense(mixture.kind.mlp, claims, config, width, named.name, trained)(layer)
    if not named.gate:
        return block, absent
    hidden, stored = dim(config, "hidden_size"), f"{layer}.{gate}"
    return block, claims.linear(f"{layer}.{named.gate}", Dim(1, "1"), hidden, stored=stored)


def _shared(config: Mapping[str, JSON], shared: Shared | None, width: Dim) -> Dim:
    """How wide the shared block is; 0 where there is none."""
    if shared is None:
        return Dim(0, "")
    if shared.width:
        return Dim(integer(config, shared.width, 0, least=0), shared.width)
    said = config.get(shared.count)
    if isinstance(said, list) and said and all(n == said[0] for n in said):
        said = said[0]
    beside = integer({shared.count: said}, shared.count, shared.default, least=0)
    return Dim(beside * width.size, f"{shared.count or beside} * {width.key}")


def mixtures(*families: Mixture) -> dict[str, Known]:
    """What reads each of these, by its family."""
    return {
        m.kind.family: Known(partial(recipe, mixture=m), m.kind.ignored, partial(saved_as, m.block))
        for m in families
    }
