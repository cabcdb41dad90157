"""Llama and those that differ from it in biases and norms: the decoder as it is."""

from __future__ import annotations

from .decoder import decoders
from .kind import MLP_BIAS, NORMED, TIED, UNBIASED, FeedForward, Kind, Norms, QkNorm, Said, SelfAttention
from .meta import HEAD_NORMS, Meta

_MLP = FeedForward(bias=MLP_BIAS)

LLAMA = Kind("llama", mlp=_MLP, meta=Meta(pairs=True))
MISTRAL = Kind("mistral", UNBIASED, meta=Meta(pairs=True))
MINISTRAL = Kind("ministral", UNBIASED)
GRANITE = Kind("granite", mlp=_MLP)
SMOLLM3 = Kind("smollm3", mlp=_MLP, vocabulary=TIED)
QWEN2 = Kind("qwen2", SelfAttention(qkv_bias=True, o_bias=False))
QWEN3 = Kind("qwen3", NORMED, meta=Meta(names=HEAD_NORMS))
MINISTRAL3 = Kind("ministral3", UNBIASED)
CWM = Kind("cwm", UNBIASED, _MLP)
HELIUM = Kind("helium", SelfAttention(o_bias=False), _MLP)
SEED_OSS = Kind(
    "seed_oss",
    SelfAttention(qkv_bias=Said("attention_bias", default=True), o_bias=Said("attention_out_bias")),
    _MLP,
)
_BIAS = Said("use_bias")
ERNIE4_5 = Kind(
    "ernie4_5", SelfAttention(qkv_bias=_BIAS, o_bias=_BIAS), FeedForward(bias=_BIAS), vocabulary=TIED
)
HUNYUAN = Kind(
    "hunyuan_v1_dense",
    SelfAttention(qk_norm=QkNorm(q="query_layernorm", k="key_layernorm", rotated=True)),
)
_OLDER = Said("mlp_bias", older="bias")
INTERNLM3 = Kind(
    "internlm3",
    SelfAttention(qkv_bias=Said("attention_bias", older="qkv_bias"), o_bias=_OLDER),
    FeedForward(bias=_OLDER),
)
STABLELM = Kind(
    "stablelm",
    SelfAttention(qkv_bias=Said("use_qkv_bias"), o_bias=False),
    norms=Norms(bias=True),
    parallel=Said("use_parallel_residual"),
)
HYPERCLOVAX = Kind(
    "hyperclovax",
    mlp=_MLP,
    norms=Norms(
        attention_after="post_norm1", mlp_after="post_norm2", after=Said("use_post_norm", default=True)
    ),
)

FAMILIES = decoders(
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
