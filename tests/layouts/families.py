"""Tiny models of every family that transformers builds and saves; every element of a model is another number.

float32 holds the integers up to 2**24, so a value says which element of which tensor it is.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import dataclass

import pytest
import torch

transformers = pytest.importorskip("transformers")
from engines.served_spellings import hubs  # noqa: E402
from fastckpt import recipes  # noqa: E402
from reading import memory  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

_SIZES = dict(
    vocab_size=208, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip
_MLA = dict(
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=6,
    moe_intermediate_size=24, first_k_dense_replace=1, num_key_value_heads=8, num_experts_per_tok=2,
    n_group=1, topk_group=1,
)  # fmt: skip
_DELTA = dict(
    head_dim=12, num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_num_key_heads=8, linear_num_value_heads=16, linear_key_head_dim=6, linear_value_head_dim=10,
    linear_conv_kernel_dim=3,
)  # fmt: skip
_V4 = dict(
    moe_intermediate_size=24, num_hidden_layers=4, head_dim=8, q_lora_rank=24, o_groups=8, o_lora_rank=10,
    num_experts_per_tok=2, n_routed_experts=6, hc_mult=3, index_n_heads=3, index_head_dim=10,
    index_topk=16, mlp_layer_types=["hash_moe", "moe", "hash_moe", "moe"], layer_types=[
        "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
)  # fmt: skip
_ROUTED = dict(n_routed_experts=6, moe_intermediate_size=24, first_k_dense_replace=1, num_experts_per_tok=2)
_GEMMA4 = dict(
    head_dim=8, global_head_dim=12, num_hidden_layers=4, tie_word_embeddings=True,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    vocab_size_per_layer_input=190, hidden_size_per_layer_input=6,
)  # fmt: skip
_MAMBA = dict(
    mamba_n_heads=16, mamba_d_head=8, mamba_n_groups=8, mamba_d_state=6, mamba_d_conv=3, num_hidden_layers=3,
)  # fmt: skip
_NEMOTRON_H = dict(
    mamba_num_heads=16, mamba_head_dim=10, n_groups=8, ssm_state_size=6, conv_kernel=3, head_dim=12,
    layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=40,
)  # fmt: skip
_OLD = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
_GPT = dict(vocab_size=208, n_embd=64, n_layer=2, n_head=8, n_positions=19, n_inner=88)
_FALCON = dict(vocab_size=208, hidden_size=64, num_hidden_layers=2, num_attention_heads=8)
_BIASED = {"attention_bias": True, "mlp_bias": True}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """The config class and its arguments; `heads`: query heads, kv heads, the size of one; `model`: the
    model's class, where it is another family's; `hub_type`: what the hub's config says as model_type, where
    transformers has no class of it."""

    name: str
    sizes: dict
    heads: tuple[int, int, int]
    architecture: str = "ForCausalLM"
    model: str | None = None
    hub_type: str = ""


def _family(name, heads, sizes=_SIZES, drop=(), hub_type="", **changes):
    sizes = {k: v for k, v in (sizes | changes).items() if k not in drop}
    return Family(name, sizes, heads, hub_type=hub_type)


FAMILIES = {
    "ministral": _family("Ministral", (8, 4, 8), head_dim=8),
    "granite": _family("Granite", (8, 4, 8), attention_bias=True, mlp_bias=True),
    "smollm3": _family("SmolLM3", (8, 4, 8), tie_word_embeddings=True, eos_token_id=1, bos_token_id=2),
    "ministral3": _family("Ministral3", (8, 4, 12), head_dim=12, rope_parameters=_ROPE),
    "seed_oss": _family("SeedOss", (8, 4, 12), head_dim=12, mlp_bias=True),
    "seed_oss-biased": _family(
        "SeedOss", (8, 2, 8), num_key_value_heads=2, head_dim=8, attention_out_bias=True
    ),
    "ernie4_5": _family("Ernie4_5", (8, 4, 8), head_dim=8, tie_word_embeddings=True),
    "ernie4_5-biased": _family("Ernie4_5", (8, 4, 8), head_dim=8, use_bias=True),
    "hunyuan_v1_dense": _family("HunYuanDenseV1", (8, 4, 12), head_dim=12),
    "internlm3": Family("InternLM3", _SIZES | {"head_dim": 8} | _BIASED, (8, 4, 8), model="Llama"),
    "cwm": _family("Cwm", (8, 4, 12), head_dim=12, rope_parameters=_ROPE),
    "helium": _family("Helium", (8, 4, 8), head_dim=8, attention_bias=True, mlp_bias=True),
    "stablelm": _family("StableLm", (8, 4, 8), use_qkv_bias=True),
    "stablelm-parallel": _family("StableLm", (8, 4, 8), use_parallel_residual=True),
    "hyperclovax": _family("HyperCLOVAX", (8, 4, 12), head_dim=12, attention_bias=True, mlp_bias=True),
    "hyperclovax-before": _family("HyperCLOVAX", (8, 4, 8), use_post_norm=False),
    "olmo": _family("Olmo", (8, 4, 8)),
    "olmo2": _family("Olmo2", (8, 4, 8), attention_bias=True),
    "olmo3": _family("Olmo3", (8, 4, 8)),
    "exaone4": _family("Exaone4", (8, 4, 8)),
    "cohere": _family("Cohere", (8, 4, 8), tie_word_embeddings=True, attention_bias=True),
    "cohere-normed": _family("Cohere", (8, 4, 8), tie_word_embeddings=True, use_qk_norm=True),
    "cohere2": _family("Cohere2", (8, 2, 8), tie_word_embeddings=True, num_key_value_heads=2),
    "cohere2_moe": _family(
        "Cohere2Moe", (8, 4, 12), head_dim=12, tie_word_embeddings=True, num_experts=5,
        num_shared_experts=2, mlp_layer_types=["dense", "sparse"], prefix_dense_intermediate_size=80,
        attention_bias=True,
    ),
    "starcoder2": _family("Starcoder2", (8, 2, 8), tie_word_embeddings=True, num_key_value_heads=2),
    "starcoder2-plain": _family("Starcoder2", (8, 4, 8), use_bias=False),
    "phi": _family("Phi", (8, 4, 8)),
    "nemotron": _family("Nemotron", (8, 4, 12), head_dim=12),
    "arcee": _family("Arcee", (8, 4, 12), head_dim=12, mlp_bias=True),
    "jais2": _family("Jais2", (8, 4, 8), head_dim=8),
    "apertus": _family("Apertus", (8, 4, 8), rope_parameters=_ROPE, attention_bias=True),
    "vaultgemma": _family("VaultGemma", (8, 4, 8), head_dim=8, tie_word_embeddings=True),
    "gemma": _family("Gemma", (8, 4, 10), head_dim=10, tie_word_embeddings=True, attention_bias=True),
    "gemma2": _family("Gemma2", (8, 4, 8), head_dim=8, tie_word_embeddings=True),
    "gemma3": _family("Gemma3", (8, 2, 12), head_dim=12, num_key_value_heads=2, tie_word_embeddings=True),
    "gemma4_text": _family(
        "Gemma4Text", (8, 4, 8), _SIZES | _GEMMA4, num_kv_shared_layers=2, use_double_wide_mlp=True
    ),
    "gemma4_text-mixed": _family(
        "Gemma4Text", (8, 4, 8), _SIZES | _GEMMA4, hidden_size_per_layer_input=0, attention_k_eq_v=True,
        num_global_key_value_heads=2, enable_moe_block=True, num_experts=5, moe_intermediate_size=24,
        top_k_experts=2, tie_word_embeddings=False, attention_bias=True,
    ),
    "gemma4_unified_text": _family(
        "Gemma4UnifiedText", (8, 4, 8), _SIZES | _GEMMA4,
        ("vocab_size_per_layer_input", "hidden_size_per_layer_input"), attention_k_eq_v=True,
        num_global_key_value_heads=2,
    ),
    "phi3": _family("Phi3", (8, 4, 8)),
    "glm": _family("Glm", (8, 4, 8), head_dim=8, attention_bias=True),
    "glm4": _family("Glm4", (8, 2, 8), head_dim=8, attention_bias=True, num_key_value_heads=2),
    "qwen2_moe": _family(
        "Qwen2Moe", (8, 4, 8), num_experts=5, moe_intermediate_size=24, shared_expert_intermediate_size=40,
        num_experts_per_tok=2, mlp_only_layers=[0],
    ),
    "qwen3_moe": _family(
        "Qwen3Moe", (8, 4, 12), num_experts=5, moe_intermediate_size=24, head_dim=12, num_experts_per_tok=2,
        num_hidden_layers=3, decoder_sparse_step=2,
    ),
    "qwen3_next": _family(
        "Qwen3Next", (8, 4, 12), _SIZES | _DELTA, num_experts=5, moe_intermediate_size=24,
        shared_expert_intermediate_size=40, num_experts_per_tok=2, mlp_only_layers=[0],
    ),
    "qwen3_5_moe": _family(
        "Qwen3_5MoeText", (8, 4, 12), _SIZES | _DELTA, ("intermediate_size",), num_experts=5,
        moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts_per_tok=2,
    ),
    "qwen3_5": _family("Qwen3_5Text", (8, 4, 12), _SIZES | _DELTA),
    "glm4_moe": _family(
        "Glm4Moe", (8, 4, 8), head_dim=8, attention_bias=True, use_qk_norm=True, n_shared_experts=1,
        n_routed_experts=6, moe_intermediate_size=24, first_k_dense_replace=1, n_group=1, topk_group=1,
        num_experts_per_tok=2,
    ),
    "deepseek_v2": _family("DeepseekV2", (8, 8, 6), _SIZES | _MLA, q_lora_rank=None, n_shared_experts=2),
    "deepseek_v2-lora": _family(
        "DeepseekV2", (8, 8, 6), _SIZES | _MLA, q_lora_rank=24, n_shared_experts=2, attention_bias=True
    ),
    "deepseek_v3": _family("DeepseekV3", (8, 8, 6), _SIZES | _MLA, q_lora_rank=24, n_shared_experts=1),
    "kimi_k2": _family(
        "DeepseekV3", (8, 8, 6), _SIZES | _MLA, q_lora_rank=24, n_shared_experts=1, hub_type="kimi_k2"
    ),
    "deepseek_v32": _family(
        "DeepseekV32", (8, 8, 6), _SIZES | _MLA, q_lora_rank=24, n_shared_experts=1, index_topk=16,
        index_head_dim=10, index_n_heads=3,
    ),
    "glm_moe_dsa": _family(
        "GlmMoeDsa", (8, 8, 6), _SIZES | _MLA, q_lora_rank=24, n_shared_experts=1, index_topk=16,
        index_head_dim=10, index_n_heads=3, mlp_layer_types=["sparse", "dense"],
        indexer_types=["full", "shared"],
    ),
    "glm4_moe_lite": _family(
        "Glm4MoeLite", (8, 8, 6), _SIZES | _MLA, drop=("first_k_dense_replace",), q_lora_rank=24,
        n_shared_experts=1, mlp_layer_types=["sparse", "dense"],
    ),
    "mistral4": _family("Mistral4", (8, 8, 6), _SIZES | _MLA, q_lora_rank=24, n_shared_experts=2),
    "deepseek_v4": _family(
        "DeepseekV4", (8, 1, 8), _SIZES | _V4, ("intermediate_size", "num_key_value_heads")
    ),
    "kimi_linear": _family(
        "KimiLinear", (8, 8, 6), _SIZES | _MLA, ("first_k_dense_replace", "n_routed_experts"),
        num_local_experts=6, num_hidden_layers=3, linear_num_heads=8, linear_head_dim=10,
        linear_conv_kernel_dim=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"], bos_token_id=1, eos_token_id=2,
    ),
    "olmo_hybrid": _family("OlmoHybrid", (8, 4, 8), _SIZES | _DELTA, ("head_dim",), eos_token_id=2),
    "minicpm3": _family(
        "MiniCPM3", (8, 8, 8), kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "dots1": _family("Dots1", (8, 4, 8), _SIZES | _ROUTED, head_dim=8, n_shared_experts=2, n_group=1),
    "solar_open": _family(
        "SolarOpen", (8, 4, 12), _SIZES | _ROUTED, drop=("intermediate_size", "first_k_dense_replace"),
        head_dim=12, n_shared_experts=1, n_group=1, topk_group=1,
    ),
    "exaone_moe": _family(
        "ExaoneMoe", (8, 4, 8), head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24,
        num_shared_experts=2, mlp_layer_types=["sparse", "dense"], sliding_window=16,
    ),
    "hy_v3": _family(
        "HYV3", (8, 4, 12), head_dim=12, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24,
        num_shared_experts=2, mlp_layer_types=["sparse", "dense"], **_BIASED,
    ),
    "mimo_v2_flash": _family(
        "MiMoV2Flash", (8, 2, 12), _SIZES | _ROUTED, drop=("first_k_dense_replace",), head_dim=12,
        v_head_dim=10, num_key_value_heads=2, num_hidden_layers=3, attention_bias=True,
        mlp_layer_types=["sparse", "dense", "sparse"],
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "laguna": _family(
        "Laguna", (8, 4, 12), head_dim=12, attention_bias=True, num_hidden_layers=3, num_experts=5,
        num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=40,
        num_attention_heads_per_layer=[8, 16, 8], mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "laguna-wide": _family(
        "Laguna", (8, 4, 8), head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40, gating="per-element",
    ),
    "afmoe": _family(
        "Afmoe", (8, 4, 12), head_dim=12, attention_bias=True, num_hidden_layers=3, num_experts=5,
        num_experts_per_tok=2, moe_intermediate_size=24, num_dense_layers=2,
    ),
    "lfm2": _family(
        "Lfm2", (8, 4, 8), intermediate_size=145, block_multiple_of=32, num_hidden_layers=3, conv_bias=True,
        tie_word_embeddings=True, layer_types=["conv", "full_attention", "conv"],
    ),
    "lfm2_moe": _family(
        "Lfm2Moe", (8, 2, 8), num_key_value_heads=2, num_hidden_layers=3, num_dense_layers=1, num_experts=5,
        num_experts_per_tok=2, moe_intermediate_size=24, layer_types=["conv", "full_attention", "conv"],
    ),
    "ernie4_5_moe": _family(
        "Ernie4_5_Moe", (8, 4, 8), moe_num_experts=5, moe_k=2, moe_intermediate_size=24,
        moe_num_shared_experts=2, moe_layer_start_index=0, moe_layer_end_index=0, head_dim=8,
    ),
    "olmoe": _family("Olmoe", (8, 4, 8), num_experts=5, num_experts_per_tok=2),
    "hunyuan_v1_moe": _family("HunYuanMoEV1", (8, 4, 8), head_dim=8, num_experts=5, moe_topk=2),
    "phimoe": _family(
        "Phimoe", (8, 4, 8), num_local_experts=5, num_experts_per_tok=2, attention_bias=True,
        lm_head_bias=True,
    ),
    "minimax_m2": _family("MiniMaxM2", (8, 4, 12), head_dim=12, num_local_experts=5, num_experts_per_tok=2),
    "granitemoe": _family("GraniteMoe", (8, 4, 8), num_local_experts=5, num_experts_per_tok=2),
    "granitemoeshared": _family(
        "GraniteMoeShared", (8, 4, 8), num_local_experts=5, num_experts_per_tok=2,
        shared_intermediate_size=40,
    ),
    "granitemoehybrid": _family(
        "GraniteMoeHybrid", (8, 4, 8), _SIZES | _MAMBA, num_local_experts=5, num_experts_per_tok=2,
        shared_intermediate_size=40, mamba_n_groups=1,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "granitemoehybrid-dense": _family(
        "GraniteMoeHybrid", (8, 4, 8), _SIZES | _MAMBA, num_local_experts=0, shared_intermediate_size=40,
        tie_word_embeddings=True, layer_types=["full_attention", "linear_attention", "linear_attention"],
    ),
    "nemotron_h": _family("NemotronH", (8, 4, 12), _SIZES | _NEMOTRON_H, drop=("num_hidden_layers",)),
    "nemotron_h-latent": _family(
        "NemotronH", (8, 4, 12), _SIZES | _NEMOTRON_H, drop=("num_hidden_layers",), moe_latent_size=20,
        n_groups=1, use_bias=True, mlp_bias=True,
    ),
    "falcon_h1": _family(
        "FalconH1", (8, 4, 12), _SIZES | _MAMBA, head_dim=12, mamba_d_ssm=160, mamba_d_head=10,
        attention_bias=True, mlp_bias=True, projectors_bias=True, mamba_rms_norm=True,
    ),
    "falcon_h1-plain": _family(
        "FalconH1", (8, 2, 8), _SIZES | _MAMBA, head_dim=8, num_key_value_heads=2, mamba_d_ssm=128,
        mamba_n_groups=1, mamba_conv_bias=False, mamba_proj_bias=True,
    ),
    "jamba": _family(
        "Jamba", (8, 4, 8), num_hidden_layers=4, num_experts=5, num_experts_per_tok=2, attn_layer_period=3,
        attn_layer_offset=1, mamba_d_state=6, mamba_d_conv=3, mamba_dt_rank=10, mamba_proj_bias=True,
    ),
    "jamba-dense": _family(
        "Jamba", (8, 2, 8), num_hidden_layers=3, num_key_value_heads=2, num_experts=1, attn_layer_period=2,
        attn_layer_offset=0, mamba_conv_bias=False, mamba_d_state=6, tie_word_embeddings=True,
    ),
    "bamba": _family("Bamba", (8, 4, 8), _SIZES | _MAMBA, attn_layer_indices=[1]),
    "llama4_text": _family(
        "Llama4Text", (8, 4, 8), head_dim=8, num_local_experts=5, num_experts_per_tok=1,
        intermediate_size_mlp=80, interleave_moe_layer_step=2,
    ),
    "gpt_oss": _family(
        "GptOss", (8, 4, 8), head_dim=8, num_local_experts=3, num_experts_per_tok=2, layer_types=None
    ),
    "gpt_bigcode": _family("GPTBigCode", (8, 1, 8), _GPT),
    "gpt_bigcode-heads": _family("GPTBigCode", (8, 8, 8), _GPT, multi_query=False),
    "gptj": _family("GPTJ", (8, 8, 8), _GPT, rotary_dim=4),
    "opt": _family("OPT", (8, 8, 8), _OLD, drop=("intermediate_size",), ffn_dim=96, tie_word_embeddings=True),
    "mpt": Family("Mpt", dict(vocab_size=208, d_model=64, n_heads=8, n_layers=2), (8, 8, 8)),
    "gpt_neox": _family("GPTNeoX", (8, 8, 8), _OLD),
    "bloom": Family("Bloom", dict(vocab_size=208, hidden_size=64, n_layer=2, n_head=8), (8, 8, 8)),
    "falcon-mqa": _family("Falcon", (8, 1, 8), _FALCON, multi_query=True, parallel_attn=True, bias=False),
    "falcon-new": _family("Falcon", (8, 4, 8), _FALCON, num_kv_heads=4, new_decoder_architecture=True),
    "falcon-11b": _family(
        "Falcon", (8, 2, 8), _FALCON, num_kv_heads=2, new_decoder_architecture=True,
        num_ln_in_parallel_attn=1, ffn_hidden_size=96, tie_word_embeddings=False,
    ),
    "falcon-rw": _family(
        "Falcon", (8, 8, 8), _FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True
    ),
}  # fmt: skip


_ENCODER = dict(
    vocab_size=208, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
    max_position_embeddings=33, pad_token_id=0,
)  # fmt: skip
_WHISPER = dict(
    vocab_size=208, d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=8,
    decoder_attention_heads=8, encoder_ffn_dim=96, decoder_ffn_dim=104, max_source_positions=21,
    max_target_positions=17, num_mel_bins=10, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip
_T5 = dict(vocab_size=208, d_model=64, d_kv=6, d_ff=96, num_layers=2, num_decoder_layers=1, num_heads=8)
ENCODERS = {
    "bert": Family("Bert", _ENCODER, (8, 8, 8), "ForMaskedLM"),
    "bert-alone": Family("Bert", _ENCODER, (8, 8, 8), "Model"),
    "bert-classes": Family("Bert", _ENCODER | {"num_labels": 3}, (8, 8, 8), "ForSequenceClassification"),
    "roberta": Family("Roberta", _ENCODER, (8, 8, 8), "ForMaskedLM"),
    "xlm_roberta": Family("XLMRoberta", _ENCODER, (8, 8, 8), "ForMaskedLM"),
    "xlm_roberta-alone": Family("XLMRoberta", _ENCODER, (8, 8, 8), "Model"),
    "modernbert": Family("ModernBert", _ENCODER, (8, 8, 8), "ForMaskedLM"),
    "modernbert-alone": Family("ModernBert", _ENCODER | _BIASED | {"norm_bias": True}, (8, 8, 8), "Model"),
    "modernbert-classes": Family(
        "ModernBert", _ENCODER | {"num_labels": 3}, (8, 8, 8), "ForSequenceClassification"
    ),
    "t5": Family("T5", _T5, (8, 8, 6), "ForConditionalGeneration"),
    "t5-gated": Family(
        "T5", _T5 | {"feed_forward_proj": "gated-gelu"}, (8, 8, 6), "ForConditionalGeneration"
    ),
    "whisper": Family("Whisper", _WHISPER, (8, 8, 8), "ForConditionalGeneration"),
}


_CLIP = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8, image_size=16,
    patch_size=4,
)  # fmt: skip
_SIGLIP = _CLIP | dict(model_type="siglip_vision_model", vision_use_head=False)
_SIGLIP2 = {k: v for k, v in _SIGLIP.items() if k != "image_size"} | dict(
    model_type="siglip2_vision_model", num_patches=20
)
_PIXTRAL = _CLIP | dict(model_type="pixtral", head_dim=4)
_GEMMA4_IMAGES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, patch_size=4, position_embedding_size=20,
)  # fmt: skip
_TOWER = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=8, out_hidden_size=64, patch_size=4)
_GRID = _TOWER | dict(num_position_embeddings=16)
_DEEP = _GRID | dict(depth=3, deepstack_visual_indexes=[0, 2])


def _seeing(name, tower, text=(), **changes):
    """A text model beside a tower; `changes`: of the config around both."""
    sizes = dict(text_config=_SIZES | dict(text), vision_config=tower, tie_word_embeddings=False)
    return Family(name, sizes | changes, (8, 4, 8), "ForConditionalGeneration")


WRAPPERS = {
    "qwen2_vl": _seeing(
        "Qwen2VL", dict(depth=2, embed_dim=32, hidden_size=64, num_heads=8, mlp_ratio=2, patch_size=4)
    ),
    "qwen2_5_vl": _seeing("Qwen2_5_VL", _TOWER, tie_word_embeddings=True),
    "qwen3_vl": _seeing("Qwen3VL", _DEEP, dict(head_dim=8)),
    "qwen3_vl_moe": _seeing(
        "Qwen3VLMoe", _DEEP,
        dict(head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24),
    ),
    "qwen3_5-images": _seeing("Qwen3_5", _GRID, _DELTA | dict(head_dim=8)),
    "qwen3_5_moe-images": _seeing(
        "Qwen3_5Moe", _GRID,
        _DELTA | dict(head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32,
                      shared_expert_intermediate_size=96),
    ),
    "glm4v": _seeing("Glm4v", _TOWER | dict(image_size=16)),
    "glm4v_moe": _seeing(
        "Glm4vMoe", _TOWER | dict(image_size=16), _ROUTED | dict(moe_intermediate_size=32)
    ),
    "gemma3-images": _seeing("Gemma3", _SIGLIP, dict(head_dim=8), tie_word_embeddings=True),
    "gemma4": _seeing(
        "Gemma4", _GEMMA4_IMAGES, _GEMMA4 | dict(num_kv_shared_layers=2), tie_word_embeddings=True,
        audio_config=dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, output_proj_dims=24,
            subsampling_conv_channels=[16, 12],
        ),
    ),
    "gemma4-images": _seeing(
        "Gemma4", _GEMMA4_IMAGES | dict(use_clipped_linears=True, standardize=True),
        _GEMMA4 | dict(
            attention_k_eq_v=True, enable_moe_block=True, num_experts=5, moe_intermediate_size=24,
            top_k_experts=2,
        ),
        tie_word_embeddings=True,
    ),
    "gemma4_unified": _seeing(
        "Gemma4Unified",
        dict(patch_size=2, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=10, output_proj_dims=32),
        {k: v for k, v in _GEMMA4.items() if "per_layer" not in k}, tie_word_embeddings=True,
        audio_config=dict(audio_embed_dim=20),
    ),
    "exaone4_5": _seeing(
        "Exaone4_5_", _TOWER | dict(num_key_value_heads=4), dict(model_type="exaone4")
    ),
    "kimi_k25": _seeing(
        "Kimi_K25",
        dict(patch_size=4, pos_emb_height=3, pos_emb_width=5, num_attention_heads=8, num_hidden_layers=2,
             hidden_size=32, intermediate_size=48),
        _MLA | dict(model_type="deepseek_v3", q_lora_rank=64, n_shared_experts=4),
        projection_hidden_size=32,
    ),
    "mistral3": _seeing("Mistral3", _PIXTRAL, dict(model_type="mistral", head_dim=8)),
    "mistral3-mistral4": _seeing(
        "Mistral3", _PIXTRAL, _MLA | dict(model_type="mistral4", q_lora_rank=24, n_shared_experts=4)
    ),
    "mistral3-ministral": _seeing("Mistral3", _PIXTRAL, dict(model_type="ministral3", head_dim=8)),
    "llava": _seeing("Llava", _CLIP | dict(model_type="clip_vision_model"), dict(model_type="llama")),
    "llava-pixtral": _seeing(
        "Llava", _PIXTRAL, dict(model_type="mistral", head_dim=8), vision_feature_layer=-1,
        multimodal_projector_bias=False,
    ),
    "llava-layers": _seeing(
        "Llava", _SIGLIP, dict(model_type="qwen3", head_dim=8), vision_feature_layer=[0, -2]
    ),
    "llava_next": _seeing(
        "LlavaNext", _CLIP | dict(model_type="clip_vision_model"), dict(model_type="llama")
    ),
    "llava_onevision": _seeing("LlavaOnevision", _SIGLIP, dict(model_type="qwen2")),
    "internvl": _seeing(
        "InternVL", _CLIP | dict(image_size=[16, 16], patch_size=[4, 4], attention_bias=True),
        dict(model_type="qwen2"),
    ),
    "cohere2_vision": _seeing(
        "Cohere2Vision", _SIGLIP, dict(model_type="cohere2"), alignment_intermediate_size=112,
        tie_word_embeddings=True,
    ),
    "lfm2_vl": _seeing(
        "Lfm2Vl", _SIGLIP2,
        dict(model_type="lfm2", intermediate_size=145, block_multiple_of=32, num_hidden_layers=3,
             layer_types=["conv", "full_attention", "conv"]),
        projector_hidden_size=40, tie_word_embeddings=True,
    ),
    "lfm2_vl-moe": _seeing(
        "Lfm2Vl", _SIGLIP2,
        dict(model_type="lfm2_moe", num_hidden_layers=3, num_dense_layers=1, num_experts=5,
             num_experts_per_tok=2, moe_intermediate_size=24,
             layer_types=["conv", "full_attention", "conv"]),
        projector_hidden_size=40, projector_use_layernorm=False, tie_word_embeddings=True,
    ),
    "llama4-images": _seeing(
        "Llama4",
        _CLIP | dict(intermediate_size=128, projector_input_dim=48, projector_output_dim=48,
                     vision_output_dim=48),
        dict(head_dim=8, num_local_experts=6, num_experts_per_tok=1, intermediate_size=24,
             intermediate_size_mlp=96, interleave_moe_layer_step=2),
    ),
    "paligemma": _seeing(
        "PaliGemma", _SIGLIP, dict(model_type="gemma", head_dim=8), projection_dim=64,
        tie_word_embeddings=True,
    ),
    "paligemma-2": _seeing(
        "PaliGemma", _SIGLIP, dict(model_type="gemma2", head_dim=8), projection_dim=64,
        tie_word_embeddings=True,
    ),
    "idefics3": _seeing("Idefics3", _CLIP, dict(model_type="llama"), scale_factor=3),
    "smolvlm": _seeing("SmolVLM", _CLIP, dict(model_type="llama"), tie_word_embeddings=True),
}  # fmt: skip
"""Text models beside a tower."""


@functools.cache
def made(name):
    """(config as a dict, tensors of the files save_pretrained writes, the model's own state dict)."""
    if name == "chatglm":
        return chatglm()
    family, model = (FAMILIES | ENCODERS | WRAPPERS)[name], model_of(name)
    number(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with open(os.path.join(folder, "config.json")) as f:
            written = json.load(f)
        written["model_type"] = family.hub_type or written["model_type"]
        files = load_file(os.path.join(folder, "model.safetensors"))
    files = {k: v.clone() for k, v in hubs(files, written["model_type"]).items()}
    return written, files, {k: v.detach().clone() for k, v in model.state_dict().items()}


def config_of(name):
    """A family's config as transformers has it."""
    family = (FAMILIES | ENCODERS | WRAPPERS)[name]
    text = "Text" if name == "gemma3" else ""
    return getattr(transformers, f"{family.name}{text}Config")(**family.sizes)


def model_of(name):
    """A family's model of transformers' own class."""
    family = (FAMILIES | ENCODERS | WRAPPERS)[name]
    model = (family.model or family.name).removesuffix("Text")
    return getattr(transformers, model + family.architecture)(config_of(name))


def blank(name, quantise=None, **changes):
    """A family's model of zeros, its config with `changes`; `quantise`: makes (tensors,
    quantization_config) of its tensors."""
    config = made(name)[0] | changes
    recipe = recipes.find(config)
    hub = {n: torch.zeros(shape) for n, shape in recipes.imagined(recipe, config).items()}
    if quantise is not None:
        hub, said = quantise(hub)
        config = config | {"quantization_config": said}
    return recipe(memory(hub), config)


def number(tensors):
    """Fills tensors with 1, 2, 3, ...; two names on the same bytes keep the later numbers."""
    at = 1
    for tensor in tensors.values():
        tensor.detach().copy_(torch.arange(at, at + tensor.numel(), dtype=torch.float32).view(tensor.shape))
        at += tensor.numel()
    assert at < 2**24


def chatglm():
    """ChatGLM's own form, which transformers does not build: names as modeling_chatglm.py has them."""
    hidden, width, heads, groups, size, vocab = 64, 96, 8, 2, 8, 208
    config = dict(
        model_type="chatglm", hidden_size=hidden, ffn_hidden_size=width, num_attention_heads=heads,
        multi_query_attention=True, multi_query_group_num=groups, kv_channels=size, padded_vocab_size=vocab,
        num_layers=2, add_qkv_bias=True, add_bias_linear=False, rmsnorm=True, post_layer_norm=True,
        tie_word_embeddings=False,
    )  # fmt: skip
    shapes = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    rows = (heads + 2 * groups) * size
    for i in range(2):
        at = f"transformer.encoder.layers.{i}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "self_attention.query_key_value.weight": (rows, hidden),
            at + "self_attention.query_key_value.bias": (rows,),
            at + "self_attention.dense.weight": (hidden, heads * size),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "mlp.dense_h_to_4h.weight": (2 * width, hidden),
            at + "mlp.dense_4h_to_h.weight": (hidden, width),
        }
    shapes |= {
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
    }
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    number(tensors)
    return config, tensors, tensors
