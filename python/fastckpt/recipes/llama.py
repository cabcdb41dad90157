"""Llama and those that differ from it in biases and per-head norms: the decoder as it is."""

from __future__ import annotations

from .decoder import MLP_BIAS, Kind

LLAMA = Kind("llama", mlp_bias=MLP_BIAS)
MISTRAL = Kind("mistral", qkv_bias=False, o_bias=False)
MINISTRAL = Kind("ministral", qkv_bias=False, o_bias=False)
GRANITE = Kind("granite", mlp_bias=MLP_BIAS)
SMOLLM3 = Kind("smollm3", mlp_bias=MLP_BIAS, tied=True)
QWEN2 = Kind("qwen2", qkv_bias=True, o_bias=False)
QWEN3 = Kind("qwen3", qk_norm=True)
