"""Tiny random models of every family, saved by transformers itself: hub files, config, state dict."""

from __future__ import annotations

import functools
import json
import os
import tempfile

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402


def _llama(**changes):
    sizes = dict(
        vocab_size=208, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return sizes | changes


_GPT2 = dict(vocab_size=208, n_embd=64, n_layer=2, n_head=8, n_positions=19, n_inner=88)
MODELS = {
    "llama": ("Llama", _llama(vocab_size=211, attention_bias=True, mlp_bias=True), torch.bfloat16),
    "biased": ("Llama", _llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True), torch.float32),
    "tied": ("Llama", _llama(tie_word_embeddings=True), torch.float32),
    "mistral-mqa": ("Mistral", _llama(num_key_value_heads=1, head_dim=6), torch.float16),
    "qwen2": ("Qwen2", _llama(num_key_value_heads=4), torch.bfloat16),
    "qwen3": ("Qwen3", _llama(head_dim=12, num_key_value_heads=8), torch.float32),
    "mixtral": ("Mixtral", _llama(num_local_experts=3, num_key_value_heads=4), torch.bfloat16),
    "mixtral-odd": ("Mixtral", _llama(num_local_experts=5, vocab_size=131), torch.float32),
    "gpt2": ("GPT2", _GPT2, torch.float32),
}  # fmt: skip


@functools.cache
def made(name):
    """(config as a dict, tensors of the files save_pretrained writes, the model's own state dict)."""
    family, sizes, dtype = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    architecture = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, architecture)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # norms are ones and biases zeros otherwise, and a wrong one would not show
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with open(os.path.join(folder, "config.json")) as f:
            written = json.load(f)
        files = {k: v.clone() for k, v in load_file(os.path.join(folder, "model.safetensors")).items()}
    return written, files, {k: v.detach() for k, v in model.state_dict().items()}
