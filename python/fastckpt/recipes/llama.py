"""Llama and those that differ from it in biases and norms: the decoder as it is."""

from __future__ import annotations

from .decoder import MLP_BIAS, Kind, Norms, Said
from .decoder import families as kinds
from .meta import HEAD_NORMS, Meta

LLAMA = Kind("llama", mlp_bias=MLP_BIAS, meta=Meta(pairs=True))
MISTRAL = Kind("mistral", qkv_bias=False, o_bias=False, meta=Meta(pairs=True))
MINISTRAL = Kind("ministral", qkv_bias=False, o_bias=False)
GRANITE = Kind("granite", mlp_bias=MLP_BIAS)
SMOLLM3 = Kind("smollm3", mlp_bias=MLP_BIAS, tied=True)
QWEN2 = Kind("qwen2", qkv_bias=True, o_bias=False)
QWEN3 = Kind("qwen3", qk_norm=True, meta=Meta(names=HEAD_NORMS))
MINISTRAL3 = Kind("ministral3", qkv_bias=False, o_bias=False)
CWM = Kind("cwm", qkv_bias=False, o_bias=False, mlp_bias=MLP_BIAS)
HELIUM = Kind("helium", o_bias=False, mlp_bias=MLP_BIAS)
SEED_OSS = Kind(
    "seed_oss",
    qkv_bias=Said("attention_bias", default=True),
    o_bias=Said("attention_out_bias"),
    mlp_bias=MLP_BIAS,
)
ERNIE4_5 = Kind(
    "ernie4_5", qkv_bias=Said("use_bias"), o_bias=Said("use_bias"), mlp_bias=Said("use_bias"), tied=True
)
HUNYUAN = Kind(
    "hunyuan_v1_dense", qk_norm=True, rotated=True, norms=Norms(q="query_layernorm", k="key_layernorm")
)
INTERNLM3 = Kind(
    "internlm3",
    qkv_bias=Said("attention_bias", older="qkv_bias"),
    o_bias=Said("mlp_bias", older="bias"),
    mlp_bias=Said("mlp_bias", older="bias"),
)
STABLELM = Kind(
    "stablelm",
    qkv_bias=Said("use_qkv_bias"),
    o_bias=False,
    norms=Norms(bias=True),
    parallel=Said("use_parallel_residual"),
)
HYPERCLOVAX = Kind(
    "hyperclovax",
    mlp_bias=MLP_BIAS,
    norms=Norms(attention_after="post_norm1", mlp_after="post_norm2"),
    norms_after=Said("use_post_norm", default=True),
)

FAMILIES = kinds(
    LLAMA,
    MISTRAL,
    MINISTRAL,
    GRANITE,
    SMOLLM3,
    QWEN2,
    QWEN3,
    MINISTRAL3,
    SEED_OSS,
    ERNIE4_5,
    HUNYUAN,
    INTERNLM3,
    CWM,
    HELIUM,
    STABLELM,
    HYPERCLOVAX,
)
