"""A model whose attention has output gates: transformers' Qwen3-Next with full attention in every layer, and
the names that a user's own recipe would read it by."""

from __future__ import annotations

import functools
import inspect
import json
import sys

from fastckpt.recipes.names import Names
from layouts.families import number, transformers

CONFIG = dict(
    vocab_size=208, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=32, tie_word_embeddings=False,
    layer_types=["full_attention"] * 2, mlp_only_layers=[0, 1], num_experts=0,
)  # fmt: skip
AT = "model.layers.{i}."
RECIPE = Names(
    family="gated",
    embedding="model.embed_tokens.weight",
    attention_norm=AT + "input_layernorm.weight",
    q=AT + "self_attn.q_proj.weight",
    k=AT + "self_attn.k_proj.weight",
    v=AT + "self_attn.v_proj.weight",
    gated_q=True,
    q_norm=AT + "self_attn.q_norm.weight",
    k_norm=AT + "self_attn.k_norm.weight",
    o=AT + "self_attn.o_proj.weight",
    mlp_norm=AT + "post_attention_layernorm.weight",
    gate=AT + "mlp.gate_proj.weight",
    up=AT + "mlp.up_proj.weight",
    down=AT + "mlp.down_proj.weight",
    norm="model.norm.weight",
    lm_head="lm_head.weight",
    plus_one=True,
)


def model():
    """transformers' model."""
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**CONFIG)).float().eval()


def written():
    """The recipe as a user's own file has it."""
    text = inspect.getsource(sys.modules[__name__])
    return "from fastckpt.recipes.names import Names\n" + text[text.index("AT =") : text.index("def model")]


@functools.cache
def made():
    """(config, tensors): every element another number."""
    source = model()
    number(source.state_dict())
    config = json.loads(source.config.to_json_string())
    return config, {n: x.detach().clone() for n, x in source.state_dict().items()}
