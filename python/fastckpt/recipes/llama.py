"""Llama, Mistral, Qwen2 and Qwen3: the decoder as it is; they differ in biases and per-head norms."""

from __future__ import annotations

from .decoder import Kind

LLAMA = Kind("llama", mlp_bias=True)
MISTRAL = Kind("mistral", qkv_bias=False, o_bias=False)
QWEN2 = Kind("qwen2", qkv_bias=True, o_bias=False)
QWEN3 = Kind("qwen3", qk_norm=True)
