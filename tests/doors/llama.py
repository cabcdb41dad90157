"""A small llama, and what a directory holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
    "vocab_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def llama() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"model.embed_tokens": (36, 16)}
    for i in range(2):
        parts = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)}
        parts |= {"self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16)}
        parts |= {"mlp.down_proj": (16, 24), "input_layernorm": (16,), "post_attention_layernorm": (16,)}
        shapes |= {f"model.layers.{i}.{n}": s for n, s in parts.items()}
    shapes |= {"model.norm": (16,), "lm_head": (36, 16)}
    return {f"{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}


def left(path: Path) -> list[str]:
    return sorted(os.listdir(path))
