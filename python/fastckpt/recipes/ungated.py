"""Decoders whose feed-forward block has no gate: a matrix up, an activation, a matrix down."""

from __future__ import annotations

from .decoder import MLP_BIAS, Kind, Norms, Said
from .decoder import families as kinds

_LAYER_NORMS = Norms(bias=True)
_BIAS = Said("use_bias", default=True)
_UP_DOWN = ("up_proj", "down_proj")

STARCODER2 = Kind(
    "starcoder2",
    qkv_bias=_BIAS,
    o_bias=_BIAS,
    mlp_bias=_BIAS,
    norms=_LAYER_NORMS,
    ungated=("c_fc", "c_proj"),
    tied=True,
)
PHI = Kind(
    "phi",
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    head_bias=True,
    norms=Norms(last="model.final_layernorm", bias=True),
    o="dense",
    ungated=("fc1", "fc2"),
    parallel=True,
)
NEMOTRON = Kind("nemotron", mlp_bias=MLP_BIAS, norms=_LAYER_NORMS, plus_one=True, ungated=_UP_DOWN)
ARCEE = Kind("arcee", mlp_bias=MLP_BIAS, ungated=_UP_DOWN)
JAIS2 = Kind(
    "jais2",
    qkv_bias=Said("attention_bias", default=True),
    o_bias=Said("attention_bias", default=True),
    mlp_bias=Said("mlp_bias", default=True),
    norms=_LAYER_NORMS,
    ungated=_UP_DOWN,
)
APERTUS = Kind(
    "apertus",
    qk_norm=True,
    norms=Norms("attention_layernorm", "feedforward_layernorm"),
    ungated=_UP_DOWN,
    scalars=(("act_fn.alpha_p", (1,)), ("act_fn.alpha_n", (1,)), ("act_fn.beta", ()), ("act_fn.eps", ())),
)

FAMILIES = kinds(STARCODER2, PHI, NEMOTRON, ARCEE, JAIS2, APERTUS)
