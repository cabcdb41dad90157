"""What the hub's files of the models of served_tables say and call otherwise than transformers' classes."""

from __future__ import annotations

import re

import torch

_SAID_OF_MIMO = dict(
    moe_layer_freq=[0, 1, 1], hybrid_layer_pattern=[0, 1, 0], swa_num_attention_heads=4,
    swa_num_key_value_heads=4, swa_head_dim=32, swa_v_head_dim=16, sliding_window_size=16,
    layernorm_epsilon=1e-5, add_swa_attention_sink_bias=True,
)  # fmt: skip
_SAID_OF_AFMOE = {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}

SAID: dict[str, dict] = {
    "afmoe": _SAID_OF_AFMOE,
    "afmoe-mixed": _SAID_OF_AFMOE,
    "deepseek_v32": {"first_k_dense_replace": 1},
    "glm_moe_dsa": {"first_k_dense_replace": 1, "index_topk_pattern": "FSF"},
    "internlm3": {  # which transformers has not
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "qkv_bias": True,
        "bias": True,
    },
    "hy_v3": {"expert_hidden_dim": 128, "first_k_dense_replace": 1, "qk_norm": True, "route_norm": True},
    "lfm2": {"block_dim": 128, "conv_dim": 128, "block_ff_dim": 384},
    "mimo_v2_flash": _SAID_OF_MIMO,
    "mimo_v2_flash-wide": _SAID_OF_MIMO | {"swa_head_dim": 128, "swa_v_head_dim": 128},
    "kimi_k2": {"model_type": "kimi_k2"},
    "kimi_k25": {"architectures": ["KimiK25ForConditionalGeneration"]},
    "phimoe-hub": {"architectures": ["PhiMoEForCausalLM"]},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
}
"""name -> what the hub's config.json says besides, or otherwise than transformers' class."""

INSIDE = (
    "gemma3",
    "llava",
    "llava_next",
    "llava_onevision",
    "llava_onevision-wide",
    "cohere2_vision",
    "lfm2_vl",
)
"""Models whose tower vLLM reads by the hub's older names alone, below `vision_model`."""


HUBS: dict[str, tuple[tuple[str, str], ...]] = {
    "kimi_k25": (
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"^model\.mm_projector\.", "mm_projector."),
        (r"^vision_tower\.encoder\.patch_embed\.", "vision_tower.patch_embed."),
    ),
    "kimi_linear": ((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
    "olmo_hybrid": (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
    "deepseek_v4": (
        (r"^model\.(layers|norm)\.", r"\1."),
        (r"^model\.embed_tokens\.", "embed."),
        (r"^model\.hc_head\.hc_", "hc_head_"),
        (r"(\d\.attn)\.norm\.", r"\1.kv_norm."),
    ),
}
"""model_type -> what transformers 5.23 writes in a name, and the hub's words for it, where they differ."""


def hubs(tensors, model_type):
    """Tensors by the names that transformers writes -> the same as the hub has them."""
    out = {}
    for name, x in tensors.items():
        for written, hub in HUBS.get(model_type, ()):
            name = re.sub(written, hub, name)
        out[name] = x
    for at in [n.removesuffix("q_conv1d.weight") for n in out if n.endswith("q_conv1d.weight")]:
        three = [f"{at}{part}_conv1d.weight" for part in "qkv"]  # which it cuts in three, whatever they are
        rows = [len(out[f"{at}{part}_proj.weight"]) for part in "qkv"]
        out |= zip(three, torch.cat([out[n] for n in three]).split(rows), strict=True)
    return {n: x.contiguous() for n, x in out.items()}
