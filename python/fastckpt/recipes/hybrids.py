"""Decoders with Mamba-2 mixers: in place of most attention, beside it, or each block a layer of its own.

transformers' plans for them leave the mixers, attention and dense blocks whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..model import HubCuts, Model
from .claims import each_layer, integer
from .decoder import decoders
from .granite_moe import GRANITEMOESHARED
from .kind import (
    IGNORED,
    MLP_BIAS,
    UNBIASED,
    UNGATED,
    FeedForward,
    Kind,
    Norms,
    Vocabulary,
)
from .known import Known
from .mamba import KINDS, Blocks, StoredMamba, every, listed, typed
from .mixture import Mixture, Shared, mixtures
from .mixture import recipe as mixture_recipe
from .moe import Block

_WHOLE = frozenset({"attention", "mlp", "intermediate_size"})

BAMBA = Kind(
    "bamba",
    mlp=FeedForward("feed_forward", bias=MLP_BIAS),
    norms=Norms(mlp="pre_ff_layernorm", last="model.final_layernorm"),
    mamba=StoredMamba(listed),
    cuts=HubCuts(whole=_WHOLE | {"embedding"}),
)
FALCON_H1 = replace(
    BAMBA,
    family="falcon_h1",
    mamba=StoredMamba(every, out_bias="projectors_bias", norm="mamba_rms_norm"),
)


def _some(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    """All layers have experts, or none where config counts 0."""
    return lambda layer: config.get("num_local_experts") != 0


GRANITE = replace(
    GRANITEMOESHARED,
    kind=replace(
        GRANITEMOESHARED.kind,
        family="granitemoehybrid",
        mlp=replace(GRANITEMOESHARED.kind.mlp, at="shared_mlp", width=("shared_intermediate_size",)),
        mamba=StoredMamba(typed),
        cuts=HubCuts(whole=frozenset({"attention", "mlp", "shared", "shared_intermediate_size"})),
    ),
    sparse=_some,
)

_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_ALONE = KINDS | {"mlp": "mlp", "moe": "moe"}


def _kinds(config: Mapping[str, JSON]) -> list[str]:
    """What each layer of Nemotron-H is, by `layers_block_type` or its older `hybrid_override_pattern`."""
    by_name = config.get("layers_block_type") is not None
    key, known = ("layers_block_type", _ALONE) if by_name else ("hybrid_override_pattern", _LETTERS)
    said = config.get(key)
    there = len(said) if isinstance(said, list | str) and said else 1
    count = integer(config, "num_hidden_layers", there)
    return [known[kind] for kind in each_layer(config, key, count, [*known])]


def _alone(config: Mapping[str, JSON], count: int) -> list[Blocks]:
    return [frozenset({"mlp" if kind == "moe" else kind}) for kind in _kinds(config)]


def _routed(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    found = _kinds(config)
    return lambda layer: found[layer] == "moe"


NEMOTRON_H = Mixture(
    Kind(
        "nemotron_h",
        replace(UNBIASED, at="mixer"),
        FeedForward("mixer", UNGATED, bias=MLP_BIAS),
        Norms("norm", "norm", last="backbone.norm_f"),
        Vocabulary("embeddings"),
        mamba=StoredMamba(
            _alone,
            at="mixer",
            heads="mamba_num_heads",
            dim="mamba_head_dim",
            groups="n_groups",
            state="ssm_state_size",
            kernel="conv_kernel",
            conv_bias="use_conv_bias",
            in_bias="use_bias",
            out_bias="use_bias",
        ),
        root="backbone.",
        cuts=HubCuts(whole=_WHOLE | {"head", "shared", "moe_shared_expert_intermediate_size"}),
        ignored=(*IGNORED, "mtp.*"),
    ),
    Block(
        hub="mixer",
        gate="",
        correction="gate.e_score_correction_bias",
        latent=("fc1_latent_proj", "fc2_latent_proj", "moe_latent_size"),
        trained="mixer",
    ),
    count=("n_routed_experts",),
    sparse=_routed,
    shared=Shared("mixer.shared_experts", width="moe_shared_expert_intermediate_size"),
)


def nemotron_h(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a checkpoint of Nemotron-H, whose config need not count its layers. Raises RecipeError."""
    counted = {**config, "num_hidden_layers": len(_kinds(config))}
    return mixture_recipe(ckpt, counted, vocab_size=vocab_size, mixture=NEMOTRON_H)


FAMILIES = (
    decoders(BAMBA, FALCON_H1)
    | mixtures(GRANITE)
    | {"nemotron_h": Known(nemotron_h, NEMOTRON_H.kind.ignored)}
)
