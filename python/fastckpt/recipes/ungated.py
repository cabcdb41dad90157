"""Decoders whose feed-forward block has no gate: a matrix up, an activation, a matrix down."""

from __future__ import annotations

from dataclasses import replace

from .decoder import decoders
from .kind import (
    MLP_BIAS,
    NORMED,
    TIED,
    UNGATED,
    FeedForward,
    Kind,
    Norms,
    Said,
    SelfAttention,
    Vocabulary,
)

_LAYER_NORMS = Norms(bias=True)
_USE_BIAS, _BIASED = Said("use_bias", default=True), Said("attention_bias", default=True)

STARCODER2 = Kind(
    "starcoder2",
    SelfAttention(qkv_bias=_USE_BIAS, o_bias=_USE_BIAS),
    FeedForward(matrices=("c_fc", "c_proj"), bias=_USE_BIAS),
    _LAYER_NORMS,
    TIED,
)
PHI = Kind(
    "phi",
    SelfAttention(qkv_bias=True, o_bias=True, o="dense"),
    FeedForward(matrices=("fc1", "fc2"), bias=True),
    Norms(last="model.final_layernorm", bias=True),
    Vocabulary(head_bias=True),
    parallel=True,
)
ARCEE = Kind("arcee", mlp=FeedForward(matrices=UNGATED, bias=MLP_BIAS))
NEMOTRON = replace(ARCEE, family="nemotron", norms=Norms(bias=True, plus_one=True))
JAIS2 = Kind(
    "jais2",
    SelfAttention(qkv_bias=_BIASED, o_bias=_BIASED),
    FeedForward(matrices=UNGATED, bias=Said("mlp_bias", default=True)),
    _LAYER_NORMS,
)
APERTUS = Kind(
    "apertus",
    NORMED,
    FeedForward(
        matrices=UNGATED,
        scalars=(("act_fn.alpha_p", (1,)), ("act_fn.alpha_n", (1,)), ("act_fn.beta", ()), ("act_fn.eps", ())),
    ),
    Norms("attention_layernorm", "feedforward_layernorm"),
)

FAMILIES = decoders(STARCODER2, PHI, NEMOTRON, ARCEE, JAIS2, APERTUS)
