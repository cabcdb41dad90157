"""Small models of the families that vLLM serves, as the hub has them, of sizes that its CPU kernels take.

Needs transformers; imported by the tests here and by scripts that run under vLLM's own Python.
"""

from __future__ import annotations

import json
import os
import re
import zlib

import torch
import transformers
from safetensors.torch import load_file, save_file

_SIZES = dict(
    vocab_size=331, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_OLD = {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
_WIDE = _SIZES | dict(hidden_size=256, num_key_value_heads=4, head_dim=64)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True)
_LATENT = _OLD | dict(
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, n_routed_experts=4,
    moe_intermediate_size=128, first_k_dense_replace=1, num_key_value_heads=4, num_experts_per_tok=2,
    n_group=1, topk_group=1, norm_topk_prob=True,
)  # fmt: skip
_DELTA = _SIZES | dict(
    num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=32, linear_value_head_dim=64,
)  # fmt: skip
_MAMBA = _SIZES | dict(
    mamba_n_heads=8, mamba_d_head=32, mamba_n_groups=4, mamba_d_state=16, num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)  # fmt: skip
_NEMOTRON_H = _SIZES | dict(
    mamba_num_heads=8, mamba_head_dim=32, n_groups=4, ssm_state_size=16, n_routed_experts=4,
    layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    num_experts_per_tok=2, moe_intermediate_size=128, moe_shared_expert_intermediate_size=192,
)  # fmt: skip
_FALCON = dict(
    vocab_size=331, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
    eos_token_id=2, max_position_embeddings=128,
)  # fmt: skip
_GPT = dict(
    vocab_size=331, n_embd=128, n_layer=2, n_head=4, n_positions=128, n_inner=256, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def _sizes(base=_SIZES, drop=(), **changes):
    return {k: v for k, v in (base | changes).items() if k not in drop}

_WIDE_LATENT = _sizes(
    _LATENT, hidden_size=256, q_lora_rank=128, kv_lora_rank=64, v_head_dim=64, qk_nope_head_dim=64,
    qk_rope_head_dim=64, moe_intermediate_size=256, n_shared_experts=1, topk_method="noaux_tc",
    scoring_func="sigmoid",
)  # fmt: skip
_ROUTED = _SIZES | dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, n_shared_experts=1,
    first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip

_IMAGES = dict(image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303)
_TOWER = dict(depth=2, hidden_size=128, intermediate_size=192, num_heads=4, out_hidden_size=128, patch_size=4)
_CLIP = dict(
    hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=16,
    patch_size=4,
)  # fmt: skip
_SIGLIP = _CLIP | dict(model_type="siglip_vision_model", vision_use_head=False)
_PIXTRAL = _CLIP | dict(model_type="pixtral", head_dim=32)


def _seeing(tower, *, drop=("head_dim",), text=(), **changes):
    """The arguments of a wrapper's config: a text model that may have rotary sections, and a tower."""
    return dict(text_config=_sizes(drop=drop, **dict(text)), vision_config=dict(tower)) | changes


_SECTIONS = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]))
_QWEN2_5_VL = _TOWER | dict(fullatt_block_indexes=[1], window_size=16)
_QWEN3_VL = _TOWER | dict(depth=3, num_position_embeddings=16, deepstack_visual_indexes=[0, 2])
_HALF = dict(_SECTIONS["rope_parameters"], mrope_section=[2, 3, 3], partial_rotary_factor=0.5)

MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", _sizes()),
    "llama-biased": ("Llama", _sizes(attention_bias=True, mlp_bias=True)),
    "llama-tied": ("Llama", _sizes(tie_word_embeddings=True)),
    "mistral": ("Mistral", _sizes(num_key_value_heads=1)),
    "qwen2": ("Qwen2", _sizes(drop=("head_dim",))),
    "qwen3": ("Qwen3", _sizes(num_key_value_heads=4)),
    "granite": ("Granite", _sizes()),
    "smollm3": ("SmolLM3", _sizes(drop=("head_dim",), tie_word_embeddings=True)),
    "gemma": ("Gemma", _sizes(tie_word_embeddings=True)),
    "gemma2": ("Gemma2", _sizes(tie_word_embeddings=True)),
    "gemma3_text": ("Gemma3Text", _sizes(tie_word_embeddings=True)),
    "phi3": ("Phi3", _sizes(drop=("head_dim",))),
    "glm": ("Glm", _sizes(attention_bias=True)),
    "glm4": ("Glm4", _sizes(attention_bias=True)),
    "mixtral": ("Mixtral", _sizes(num_local_experts=4)),
    "qwen2_moe": (
        "Qwen2Moe",
        _sizes(**_MOE, drop=("head_dim",), shared_expert_intermediate_size=192, mlp_only_layers=[0]),
    ),
    "qwen3_moe": ("Qwen3Moe", _sizes(**_MOE)),
    "qwen3_next": (
        "Qwen3Next",
        _sizes(_DELTA, **_MOE, shared_expert_intermediate_size=192, mlp_only_layers=[0]),
    ),
    "qwen3_next-wide": (
        "Qwen3Next",
        _sizes(
            _DELTA, **_MOE | {"moe_intermediate_size": 256}, shared_expert_intermediate_size=256,
            hidden_size=256, num_key_value_heads=2, head_dim=128, linear_key_head_dim=128,
        ),
    ),
    "qwen3_5_text": ("Qwen3_5Text", _sizes(_DELTA)),
    "qwen3_5_text-wide": (
        "Qwen3_5Text",
        _sizes(
            _DELTA, hidden_size=256, num_key_value_heads=2, head_dim=128, linear_key_head_dim=128,
            linear_value_head_dim=128,
        ),
    ),
    "qwen3_5_text-mixed": ("Qwen3_5Text", _sizes(_DELTA, tie_word_embeddings=True)),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", _sizes(_DELTA, **_MOE, shared_expert_intermediate_size=192)),
    "glm4_moe": (
        "Glm4Moe",
        _sizes(
            attention_bias=True, use_qk_norm=True, n_shared_experts=1, n_routed_experts=4,
            moe_intermediate_size=128, first_k_dense_replace=1, n_group=1, topk_group=1,
            num_experts_per_tok=2,
        ),
    ),
    "deepseek_v2": ("DeepseekV2", _sizes(_LATENT, q_lora_rank=None, n_shared_experts=2)),
    "deepseek_v2-lora": ("DeepseekV2", _sizes(_LATENT, q_lora_rank=48, n_shared_experts=2)),
    "deepseek_v3": (
        "DeepseekV3",
        _sizes(
            _LATENT, q_lora_rank=48, n_shared_experts=1, topk_method="noaux_tc", scoring_func="sigmoid"
        ),
    ),
    "kimi_k2": ("DeepseekV3", _WIDE_LATENT),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        _sizes(
            _LATENT, q_lora_rank=48, n_shared_experts=1, mlp_layer_types=["dense", "sparse"],
        ),
    ),
    "dots1": ("Dots1", _sizes(_ROUTED)),
    "solar_open": (
        "SolarOpen",
        _sizes(_ROUTED, drop=("intermediate_size", "first_k_dense_replace")),
    ),
    "exaone_moe": (
        "ExaoneMoe",
        _sizes(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"], sliding_window=16,
        ),
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        _sizes(
            moe_num_experts=4, moe_k=2, moe_intermediate_size=128, moe_num_shared_experts=1,
            moe_layer_start_index=1,
        ),
    ),
    "olmoe": ("Olmoe", _sizes(num_experts=4, num_experts_per_tok=2, drop=("head_dim",))),
    "hunyuan_v1_moe": ("HunYuanMoEV1", _sizes(num_experts=4, moe_topk=2)),
    "phimoe": (
        "Phimoe",
        _sizes(
            num_local_experts=4, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
            drop=("head_dim",),
        ),
    ),
    "minimax_m2": (
        "MiniMaxM2",
        _sizes(
            _WIDE, num_attention_heads=8, num_local_experts=4, num_experts_per_tok=2, rotary_dim=32,
            use_routing_bias=True, scoring_func="sigmoid",
        ),
    ),
    "granitemoe": (
        "GraniteMoe", _sizes(num_local_experts=4, num_experts_per_tok=2, drop=("head_dim",))
    ),
    "granitemoeshared": (
        "GraniteMoeShared",
        _sizes(
            num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=192, drop=("head_dim",)
        ),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        _sizes(
            _MAMBA, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=192,
            mamba_n_groups=1, drop=("head_dim",),
        ),
    ),
    "granitemoehybrid-dense": (
        "GraniteMoeHybrid",
        _sizes(
            _MAMBA, num_local_experts=0, shared_intermediate_size=192, tie_word_embeddings=True,
            drop=("head_dim",),
        ),
    ),
    "nemotron_h": ("NemotronH", _sizes(_NEMOTRON_H, drop=("num_hidden_layers",))),
    "nemotron_h-latent": (
        "NemotronH", _sizes(_NEMOTRON_H, moe_latent_size=64, n_groups=1, drop=("num_hidden_layers",))
    ),
    "falcon_h1": ("FalconH1", _sizes(_MAMBA, mamba_d_ssm=256, mamba_rms_norm=True, drop=("layer_types",))),
    "falcon_h1-plain": (
        "FalconH1", _sizes(_MAMBA, mamba_d_ssm=256, mamba_n_groups=1, drop=("layer_types",))
    ),
    "llama4_text": (
        "Llama4Text",
        _sizes(
            num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=192,
            interleave_moe_layer_step=2,
        ),
    ),
    "gpt_oss": (
        "GptOss",
        _sizes(num_local_experts=4, num_experts_per_tok=2, head_dim=64, layer_types=None),
    ),
    "gpt2": ("GPT2", _GPT),
    "gpt_neox": ("GPTNeoX", _OLD),
    "bloom": (
        "Bloom",
        dict(vocab_size=331, hidden_size=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    ),
    "falcon-mqa": ("Falcon", _sizes(_FALCON, multi_query=True, parallel_attn=True, bias=False)),
    "falcon-new": ("Falcon", _sizes(_FALCON, num_kv_heads=2, new_decoder_architecture=True)),
    "falcon-11b": (
        "Falcon",
        _sizes(
            _FALCON, num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1,
            tie_word_embeddings=False,
        ),
    ),
    "falcon-rw": (
        "Falcon",
        _sizes(_FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    ),
    "chatglm": ("", {}),
    "seed_oss": ("SeedOss", _sizes(attention_bias=True)),
    "ernie4_5": ("Ernie4_5", _sizes(tie_word_embeddings=True)),
    "hunyuan_v1_dense": ("HunYuanDenseV1", _sizes()),
    "ministral3": ("Ministral3", _sizes(rope_parameters=_PLAIN)),
    "ministral": ("Ministral", _sizes()),
    "cwm": ("Cwm", _sizes(rope_parameters=_PLAIN, sliding_window=64)),
    "helium": ("Helium", _sizes()),
    "olmo": ("Olmo", _sizes(drop=("head_dim",))),
    "olmo2": ("Olmo2", _sizes(drop=("head_dim",))),
    "olmo3": ("Olmo3", _sizes(drop=("head_dim",))),
    "exaone4": ("Exaone4", _sizes()),
    "cohere": ("Cohere", _sizes(drop=("head_dim",), tie_word_embeddings=True)),
    "cohere-normed": ("Cohere", _sizes(drop=("head_dim",), tie_word_embeddings=True, use_qk_norm=True)),
    "cohere2": ("Cohere2", _sizes(drop=("head_dim",), tie_word_embeddings=True)),
    "starcoder2": ("Starcoder2", _sizes(drop=("head_dim",), tie_word_embeddings=True)),
    "stablelm": ("StableLm", _sizes(drop=("head_dim",), use_qkv_bias=True)),
    "phi": ("Phi", _sizes(drop=("head_dim",))),
    "arcee": ("Arcee", _sizes()),
    "apertus": ("Apertus", _sizes(drop=("head_dim",), rope_parameters=_PLAIN)),
    "nemotron": ("Nemotron", _sizes()),
    "jais2": ("Jais2", _sizes()),
    "vaultgemma": ("VaultGemma", _sizes(tie_word_embeddings=True)),
    "gptj": ("GPTJ", _sizes(_GPT, rotary_dim=16)),
    "opt": ("OPT", _sizes(_OLD, drop=("intermediate_size",), ffn_dim=256, tie_word_embeddings=True)),
    "llama-wide": ("Llama", _sizes(_WIDE)),
    "mixtral-wide": ("Mixtral", _sizes(_WIDE, num_local_experts=4)),
    "deepseek_v2-576": (  # the one size of a latent cache that vLLM's CPU kernel has
        "DeepseekV2",
        _sizes(_LATENT, kv_lora_rank=512, qk_rope_head_dim=64, q_lora_rank=None, n_shared_experts=2),
    ),
    "deepseek_v3-wide": ("DeepseekV3", _WIDE_LATENT),
    "qwen2_vl": (
        "Qwen2VL",
        _seeing(
            dict(depth=2, embed_dim=128, hidden_size=128, num_heads=4, mlp_ratio=2, patch_size=4),
            text=_SECTIONS, **_IMAGES,
        ),
    ),
    "qwen2_5_vl": ("Qwen2_5_VL", _seeing(_QWEN2_5_VL, text=_SECTIONS, **_IMAGES)),
    "qwen2_5_vl-tied": (
        "Qwen2_5_VL",
        _seeing(
            _QWEN2_5_VL, text=_SECTIONS | dict(tie_word_embeddings=True), **_IMAGES,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3_vl": ("Qwen3VL", _seeing(_QWEN3_VL, drop=(), text=_SECTIONS, **_IMAGES)),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        _seeing(_QWEN3_VL, drop=(), text=_SECTIONS | dict(_MOE, moe_intermediate_size=192), **_IMAGES),
    ),
    "glm4v": (
        "Glm4v",
        _seeing(_TOWER | dict(image_size=16), text=dict(attention_bias=True, rope_parameters=_HALF)),
    ),
    "gemma3": (
        "Gemma3",
        _seeing(
            _SIGLIP, drop=(), text=dict(tie_word_embeddings=True), mm_tokens_per_image=4,
            image_token_index=300,
        ),
    ),
    "mistral3": (
        "Mistral3",
        _seeing(
            _PIXTRAL, drop=(), text=dict(model_type="mistral"), image_token_index=300,
            tie_word_embeddings=False,
        ),
    ),
    "llava": (
        "Llava",
        _seeing(
            _CLIP | dict(model_type="clip_vision_model"), text=dict(model_type="llama"),
            image_token_index=300,
        ),
    ),
    "llava-pixtral": (
        "Llava",
        _seeing(
            _PIXTRAL, drop=(), text=dict(model_type="mistral"), image_token_index=300,
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        ),
    ),
    "llava_onevision": (
        "LlavaOnevision",
        _seeing(_SIGLIP, text=dict(model_type="qwen2"), image_token_index=300, video_token_index=301),
    ),
    "internvl": (
        "InternVL",
        _seeing(
            _CLIP | dict(image_size=[16, 16], patch_size=[4, 4]), text=dict(model_type="qwen2"),
            image_token_id=300, tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip
"""name -> (transformers' class prefix, the config's arguments)."""

SAID: dict[str, dict] = {
    "kimi_k2": {"model_type": "kimi_k2"},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
}
"""name -> what the hub's config.json says besides, or otherwise than transformers' class."""

INSIDE = ("gemma3", "llava", "llava_onevision")
"""Models whose tower vLLM reads by the hub's older names alone, below `vision_model`."""


def _compressed(kind, strategy, inputs):
    """compressed-tensors' config for matrices of eight bits; `inputs`: the strategy of activations, "static"
    for one stored scale a matrix."""
    activations = (
        {"strategy": "tensor", "dynamic": False} if inputs == "static"
        else {"strategy": inputs, "dynamic": True}
    )  # fmt: skip
    eight = {"num_bits": 8, "type": kind, "symmetric": True}
    weights = eight | {"strategy": strategy, "dynamic": False}
    if strategy == "block":
        weights |= {"block_structure": [128, 128]}
        activations |= {"group_size": 128}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": eight | activations}
    return {
        "quant_method": "compressed-tensors", "format": f"{kind}-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip


GROUP = 32
"""Inputs that share a scale of four bits."""


def _packed(symmetric=True, strategy="group", bits=4):
    """compressed-tensors' config for packed integers."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    weights |= {"group_size": GROUP} if strategy == "group" else {}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip


def _gptq(group=GROUP, bits=4):
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq", "lm_head": False,
    }  # fmt: skip


PACKED: dict[str, dict] = {
    "int4": _packed(),
    "int4-zero": _packed(symmetric=False),
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": _gptq(),
    "int4-row": _packed(strategy="channel"),
    "int8-packed": _packed(bits=8),
    "gptq-row": _gptq(-1),
    "gptq-8": _gptq(bits=8),
}
"""Of these, matrices of integers that are packed in int32."""

SCHEMES: dict[str, dict] = PACKED | {
    "int8": _compressed("int", "channel", "token"),
    "int8-matrix": _compressed("int", "tensor", "token"),
    "fp8-channel": _compressed("float", "channel", "token"),
    "fp8-block-scale": _compressed("float", "block", "group"),
    "fp8-static": _compressed("float", "tensor", "static"),
    "fp8-matrix": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}
"""scheme -> the quantization_config of its files, without the modules that stay as they are."""

DENSE = (
    "embed_tokens", "lm_head", "gate", "shared_expert_gate", "in_proj_ba", "in_proj_b", "in_proj_a",
)  # fmt: skip
"""Modules that stay as they are."""

BY_ROW = ("int8", "fp8-channel")
"""Those with a scale for every output."""

_DENSE = (  # of which the hub has quantised ones
    "seed_oss", "ernie4_5", "hunyuan_v1_dense", "ministral3", "olmo2", "olmo3", "exaone4", "cohere",
    "cohere2", "apertus",
)  # fmt: skip

QUANTISED: dict[str, tuple[str, str]] = {
    f"{model}+{scheme}": (model, scheme)
    for model, schemes in {
        "llama": ("int8", "int8-matrix", "fp8-channel", "fp8-static", "fp8-matrix"),
        "llama-tied": ("int8",),
        "llama-wide": ("fp8-block", "fp8-block-scale"),
        "qwen3_next-wide": ("fp8-block",),
        "qwen3_5_text-wide": ("fp8-block",),
        "mistral": ("int8", "fp8-matrix"),
        "qwen2": ("int8", "fp8-matrix"),
        "qwen3": ("int8", "fp8-matrix"),
        "mixtral": ("int8", "fp8-channel", "fp8-matrix"),
        "mixtral-wide": ("fp8-block", "fp8-block-scale"),
        "qwen3_moe": ("int8", "fp8-channel", "fp8-matrix"),
        "deepseek_v3": ("int8", "fp8-channel"),
        "deepseek_v3-wide": ("fp8-block",),
        "granite": ("int8", "fp8-matrix"),
        "smollm3": ("int8", "fp8-matrix"),
        "gemma": ("int8", "fp8-matrix"),
        "gemma2": ("int8", "fp8-matrix"),
        "gemma3_text": ("int8", "fp8-matrix"),
        "phi3": ("int8",),
        "glm": ("int8",),
        "glm4": ("int8",),
        "qwen2_moe": ("int8", "fp8-matrix"),
        "glm4_moe": ("int8", "fp8-matrix"),
        "deepseek_v2-lora": ("int8", "fp8-matrix"),
        "kimi_k2": ("fp8-block", "int4"),
        "minimax_m2": ("fp8-block",),
        **dict.fromkeys(_DENSE, ("int8", "fp8-matrix")),
    }.items()
    for scheme in schemes
}
QUANTISED |= {
    f"{model}+{scheme}": (model, scheme)
    for model in (
        "llama", "llama-biased", "llama-tied", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma",
        "gemma2", "gemma3_text", "phi3", "glm", "glm4", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe",
        "deepseek_v2-576", "deepseek_v3-wide", *_DENSE,
    )
    for scheme in (tuple(PACKED) if model in ("llama", "mixtral") else tuple(PACKED)[:4])
    if (model, scheme) != ("glm4", "gptq")  # which vLLM's own loader does not take
}  # fmt: skip
"""name -> (the model, the scheme its matrices are stored in)."""


def write(name: str, folder: str, *, counted: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    """The model `name` in `folder`, as save_pretrained writes it: random, or `counted`: every tensor holds a
    sequence of its own of small numbers that bfloat16 has exactly, the same on every machine. Quantised ones
    are always counted."""
    if name in QUANTISED:
        model, scheme = QUANTISED[name]
        write(model, folder, counted=True, dtype=dtype)
        return _quantise(folder, scheme)
    if name == "chatglm":
        return _write_chatglm(folder, dtype)
    prefix, sizes = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    head = "ForConditionalGeneration" if "vision_config" in sizes else head
    torch.manual_seed(zlib.crc32(name.encode()))
    model = getattr(transformers, prefix.removesuffix("Text") + head)(config).to(dtype)
    if counted:
        for key, tensor in model.state_dict().items():
            count(key, tensor)
            if key.endswith((".mamba.A_log", ".mixer.A_log")):  # of which every exp gives the same
                tensor.copy_((tensor * 8).floor() / 8)
    model.save_pretrained(folder)
    if name in SAID:
        _say(folder, SAID[name])
    if name == "qwen3_vl_moe":
        _as_qwen3_vl_moe(folder)
    if name in INSIDE:
        path = os.path.join(folder, "model.safetensors")
        tensors = load_file(path).items()
        older = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in tensors}
        save_file(older, path, {"format": "pt"})
    if name.endswith("-mixed"):  # as Qwen3.5's own files
        _keep_float32(folder, (".linear_attn.A_log", ".linear_attn.norm.weight"))


def _as_qwen3_vl_moe(folder: str) -> None:
    """Qwen3-VL's mixtures as the hub has them: stacks [experts, in, out], and what vLLM wants to be told."""
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    turned = {n: x.transpose(1, 2).contiguous() if ".experts." in n else x for n, x in tensors.items()}
    save_file(turned, path, {"format": "pt"})
    with open(os.path.join(folder, "config.json")) as f:
        text = json.load(f)["text_config"]
    _say(folder, {"text_config": text | {"norm_topk_prob": True}})


def _say(folder: str, said: dict) -> None:
    """Writes these keys into the config.json of a folder."""
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        written = json.load(f)
    with open(path, "w") as f:
        json.dump(written | said, f, indent=2)


def _keep_float32(folder: str, names: tuple[str, ...]) -> None:
    """Stores the tensors whose names end so in float32."""
    path = os.path.join(folder, "model.safetensors")
    tensors = {n: t.float() if n.endswith(names) else t for n, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def count(name: str, tensor: torch.Tensor) -> None:
    """Fills a tensor with multiples of 1/64 in [-2, 2) that its name and each element's index choose."""
    index = torch.arange(tensor.numel(), dtype=torch.int64) + zlib.crc32(name.encode())
    mixed = (index * 2654435761) >> 13
    tensor.copy_(((mixed % 256 - 128) / 64).view(tensor.shape))


def _quantise(folder: str, scheme: str) -> None:
    """Stores the matrices of attention, blocks and experts as `scheme` does: counted values and scales."""
    path = os.path.join(folder, "model.safetensors")
    tensors, told, left = load_file(path), SCHEMES[scheme], []
    hub = told["quant_method"] != "compressed-tensors"
    block = scheme.startswith("fp8-block")
    values = torch.int8 if scheme.startswith("int8") else torch.float8_e4m3fn
    for name, tensor in sorted(tensors.items()):
        module = name.removesuffix(".weight")
        if module == name or tensor.dim() != 2:
            continue
        if module.rpartition(".")[2] in DENSE:
            left.append(module)
            continue
        rows, columns = tensor.shape
        if scheme in PACKED:
            del tensors[name]
            tensors |= {f"{module}.{k}": t for k, t in _stored_packed(name, told, rows, columns).items()}
            continue
        counted = torch.empty(rows, columns)
        count(name, counted)
        tensors[name] = counted.mul(64).to(values) if values is torch.int8 else counted.to(values)
        shape = (-(-rows // 128), -(-columns // 128)) if block else () if hub else (1,)
        shape = (rows, 1) if scheme in BY_ROW else shape
        scales = {"weight_scale_inv" if block and hub else "weight_scale": shape}
        if scheme == "fp8-static":
            scales["input_scale"] = shape
        for leaf, of in scales.items():
            tensors[f"{module}.{leaf}"] = torch.empty(of)
            count(f"{module}.{leaf}", tensors[f"{module}.{leaf}"])
            tensors[f"{module}.{leaf}"].add_(2.125)
    save_file(tensors, path, {"format": "pt"})
    skipped = {"modules_to_not_convert" if hub else "ignore": left}
    if told["quant_method"] == "gptq":
        skipped = {"dynamic": {f"-:^{re.escape(n)}$": {} for n in left if n != "lm_head"}}
    _say(folder, {"quantization_config": told | skipped})


def _stored_packed(name: str, told: dict, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """What is stored of a matrix [rows, columns]: counted values and zero points, scales that bfloat16 has
    not all exactly, and the sizes or the group of every input."""
    method = told["quant_method"]
    weights = told["config_groups"]["group_0"]["weights"] if method == "compressed-tensors" else told
    each = 32 // weights.get("num_bits", weights.get("bits"))
    group = weights.get("group_size", -1)
    group = columns if group == -1 else group
    scales = torch.empty(rows, columns // group)
    count(name, scales)
    scales.add_(2.125)
    if method == "compressed-tensors":
        packed = {"weight_packed": (rows, columns // each)}
        packed |= {} if weights["symmetric"] else {"weight_zero_point": (rows // each, columns // group)}
        made = {"weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}
    else:
        awq = method == "awq"
        packed = {"qweight": (columns, rows // each) if awq else (columns // each, rows)}
        packed |= {"qzeros": (columns // group, rows // each)}
        made = {"scales": scales.T.half().contiguous()}
        made |= {} if awq else {"g_idx": torch.arange(columns, dtype=torch.int32) // group}
    for k, (leaf, shape) in enumerate(packed.items()):
        index = torch.arange(shape[0] * shape[1]) + zlib.crc32(name.encode()) + k
        made[leaf] = ((index * 2654435761) >> 3).to(torch.int32).view(shape)
    return made


def _write_chatglm(folder: str, dtype: torch.dtype) -> None:
    """ChatGLM in THUDM's own names, which transformers does not build; always counted."""
    config = dict(
        architectures=["ChatGLMModel"], model_type="chatglm", hidden_size=128, ffn_hidden_size=256,
        num_attention_heads=4, multi_query_attention=True, multi_query_group_num=2, kv_channels=32,
        padded_vocab_size=331, vocab_size=331, num_layers=2, seq_length=128, add_qkv_bias=True,
        add_bias_linear=False, rmsnorm=True, post_layer_norm=True, tie_word_embeddings=False,
        original_rope=True, layernorm_epsilon=1e-5, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    shapes = {
        "embedding.word_embeddings.weight": (331, 128),
        "encoder.final_layernorm.weight": (128,),
        "output_layer.weight": (331, 128),
    }
    for i in range(2):
        shapes |= {
            f"encoder.layers.{i}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (128,),
                "self_attention.query_key_value.weight": (256, 128),
                "self_attention.query_key_value.bias": (256,),
                "self_attention.dense.weight": (128, 128),
                "post_attention_layernorm.weight": (128,),
                "mlp.dense_h_to_4h.weight": (512, 128),
                "mlp.dense_4h_to_h.weight": (128, 256),
            }.items()
        }
    tensors = {f"transformer.{name}": torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        count(name, tensor)
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
