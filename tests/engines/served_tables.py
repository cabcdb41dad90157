"""Small models of the families that vLLM serves, of sizes that its CPU kernels take: classes and configs."""

from __future__ import annotations

_SIZES = dict(
    vocab_size=331, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_OLD = {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
_BLOCKS = dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=8)
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
_DELTA_WIDE = _DELTA | dict(
    hidden_size=256, num_key_value_heads=2, head_dim=128, linear_key_head_dim=128, linear_value_head_dim=128
)
_MOE_WIDE = _MOE | dict(moe_intermediate_size=256, shared_expert_intermediate_size=256)
_GEMMA4 = _SIZES | dict(
    global_head_dim=64, num_hidden_layers=4, vocab_size_per_layer_input=320, hidden_size_per_layer_input=32,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
)  # fmt: skip
_MAMBA = _SIZES | dict(
    mamba_n_heads=8, mamba_d_head=32, mamba_n_groups=4, mamba_d_state=16, num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)  # fmt: skip
_NEMOTRON_H = _SIZES | dict(
    mamba_num_heads=8, mamba_head_dim=32, n_groups=4, ssm_state_size=16, n_routed_experts=4,
    layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe", "linear_attention"],
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
_LLAMA4 = _SIZES | dict(
    num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=192, interleave_moe_layer_step=2
)


def _sizes(base=_SIZES, drop=(), **changes):
    return {k: v for k, v in (base | changes).items() if k not in drop}


_INDEXED = _sizes(
    _LATENT, q_lora_rank=48, n_shared_experts=1, mlp_layer_types=["dense", "sparse"], index_topk=16,
    index_head_dim=128, index_n_heads=4, topk_method="noaux_tc", scoring_func="sigmoid",
)  # fmt: skip
_WIDE_LATENT = _sizes(
    _LATENT, hidden_size=256, q_lora_rank=128, kv_lora_rank=64, v_head_dim=64, qk_nope_head_dim=64,
    qk_rope_head_dim=64, moe_intermediate_size=256, n_shared_experts=1, topk_method="noaux_tc",
    scoring_func="sigmoid",
)  # fmt: skip
_PHIMOE = _sizes(
    num_local_experts=4, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True, drop=("head_dim",)
)
_ROUTED = _SIZES | dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, n_shared_experts=1,
    first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip

_AFMOE = _sizes(
    num_hidden_layers=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    num_shared_experts=1, global_attn_every_n_layers=2,
)  # fmt: skip
_CONVOLVED = _sizes(
    num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "full_attention"], drop=("head_dim",)
)
_MIMO = _sizes(
    _ROUTED, num_hidden_layers=3, v_head_dim=16, mlp_layer_types=["dense", "sparse", "sparse"],
    layer_types=["full_attention", "sliding_attention", "full_attention"],
    drop=("first_k_dense_replace", "n_shared_experts"),
)  # fmt: skip

_IMAGES = dict(image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303)
_TOWER = dict(depth=2, hidden_size=128, intermediate_size=192, num_heads=4, out_hidden_size=128, patch_size=4)
_CLIP = dict(
    hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=16,
    patch_size=4,
)  # fmt: skip
_SIGLIP = _CLIP | dict(model_type="siglip_vision_model", vision_use_head=False)
_SIGLIP2 = {k: v for k, v in _SIGLIP.items() if k != "image_size"} | dict(
    model_type="siglip2_vision_model", num_patches=20
)
_PIXTRAL = _CLIP | dict(model_type="pixtral", head_dim=32)


_GEMMA4_IMAGES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    head_dim=16, patch_size=4, position_embedding_size=20,
)  # fmt: skip


def _seeing(tower, *, drop=("head_dim",), text=(), **changes):
    """The arguments of a wrapper's config: a text model that may have rotary sections, and a tower."""
    return dict(text_config=_sizes(drop=drop, **dict(text)), vision_config=dict(tower)) | changes


_SECTIONS = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]))
_QWEN2_5_VL = _TOWER | dict(fullatt_block_indexes=[1], window_size=16)
_QWEN3_VL = _TOWER | dict(depth=3, num_position_embeddings=16, deepstack_visual_indexes=[0, 2])
_QWEN3_5 = _TOWER | dict(num_position_embeddings=16)
_QUARTER = dict(_SECTIONS["rope_parameters"], mrope_section=[2, 1, 1], partial_rotary_factor=0.25)
_QUARTER_WIDE = _QUARTER | dict(mrope_section=[6, 5, 5])
_DEEP = _SECTIONS | dict(num_hidden_layers=3)  # the first stage of two reads the tower's layers
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
    "gemma4_text": (
        "Gemma4Text",
        _sizes(_GEMMA4, num_kv_shared_layers=2, use_double_wide_mlp=True, tie_word_embeddings=True),
    ),
    "gemma4_text-mixed": (
        "Gemma4Text",
        _sizes(
            _GEMMA4, hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1,
            enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=128,
        ),
    ),
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
    "qwen3_next-wide": ("Qwen3Next", _sizes(_DELTA_WIDE, **_MOE_WIDE)),
    "qwen3_5_text": ("Qwen3_5Text", _sizes(_DELTA)),
    "qwen3_5_text-wide": ("Qwen3_5Text", _sizes(_DELTA_WIDE)),
    "qwen3_5_text-mixed": ("Qwen3_5Text", _sizes(_DELTA, tie_word_embeddings=True)),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", _sizes(_DELTA, **_MOE, shared_expert_intermediate_size=192)),
    "qwen3_5_moe_text-wide": ("Qwen3_5MoeText", _sizes(_DELTA_WIDE, **_MOE_WIDE)),
    "glm4_moe": (
        "Glm4Moe",
        _sizes(
            num_hidden_layers=3, attention_bias=True, use_qk_norm=True, n_shared_experts=1,
            n_routed_experts=4, moe_intermediate_size=128, first_k_dense_replace=1, n_group=1, topk_group=1,
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
    "deepseek_v32": ("DeepseekV32", _INDEXED),
    "glm_moe_dsa": (
        "GlmMoeDsa",
        _sizes(
            _INDEXED, num_hidden_layers=3, mlp_layer_types=["dense", "sparse", "sparse"],
            indexer_types=["full", "shared", "full"],
        ),
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        _sizes(
            _LATENT, num_hidden_layers=3, q_lora_rank=48, n_shared_experts=1,
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
    ),
    "mistral4": ("Mistral4", _sizes(_LATENT, q_lora_rank=48, n_shared_experts=1)),
    "minicpm3": (
        "MiniCPM3",
        _sizes(
            drop=("head_dim",), kv_lora_rank=64, q_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=32,
            num_key_value_heads=4, tie_word_embeddings=True,
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
    "hy_v3": (
        "HYV3",
        _sizes(num_hidden_layers=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128),
    ),
    "mimo_v2_flash": ("MiMoV2Flash", _MIMO),
    "mimo_v2_flash-wide": (
        "MiMoV2Flash", _MIMO | dict(hidden_size=256, head_dim=128, v_head_dim=128, moe_intermediate_size=256)
    ),
    "lfm2": (
        "Lfm2", _sizes(_CONVOLVED, intermediate_size=384, block_multiple_of=64, tie_word_embeddings=True)
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        _sizes(
            _CONVOLVED, num_dense_layers=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
            tie_word_embeddings=True,
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
    "phimoe": ("Phimoe", _PHIMOE),
    "phimoe-hub": ("Phimoe", _PHIMOE),  # of Microsoft's class
    "minimax_m2": (
        "MiniMaxM2",
        _sizes(
            _WIDE, num_attention_heads=8, num_local_experts=4, num_experts_per_tok=2, rotary_dim=32,
            use_routing_bias=True, scoring_func="sigmoid",
        ),
    ),
    "afmoe": ("Afmoe", _AFMOE),
    "afmoe-mixed": ("Afmoe", _AFMOE),
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
    "granitemoehybrid-mixed": (
        "GraniteMoeHybrid",
        _sizes(_MAMBA, num_local_experts=0, shared_intermediate_size=192, drop=("head_dim",)),
    ),
    "nemotron_h": ("NemotronH", _sizes(_NEMOTRON_H, drop=("num_hidden_layers",))),
    "nemotron_h-latent": (
        "NemotronH", _sizes(_NEMOTRON_H, moe_latent_size=64, n_groups=1, drop=("num_hidden_layers",))
    ),
    "falcon_h1": ("FalconH1", _sizes(_MAMBA, mamba_d_ssm=256, mamba_rms_norm=True, drop=("layer_types",))),
    "falcon_h1-plain": (
        "FalconH1", _sizes(_MAMBA, mamba_d_ssm=256, mamba_n_groups=1, drop=("layer_types",))
    ),
    "jamba": (
        "Jamba",
        _sizes(
            num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, attn_layer_period=3,
            attn_layer_offset=1, drop=("head_dim",),
        ),
    ),
    "llama4_text": ("Llama4Text", _sizes(_LLAMA4)),
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
    "internlm3": ("Llama", _sizes(attention_bias=True, mlp_bias=True)),
    "cwm": ("Cwm", _sizes(rope_parameters=_PLAIN, sliding_window=64)),
    "helium": ("Helium", _sizes()),
    "hyperclovax": ("HyperCLOVAX", _sizes(attention_multiplier=0.1)),
    "hyperclovax-before": ("HyperCLOVAX", _sizes(use_post_norm=False, attention_multiplier=0.1)),
    "olmo": ("Olmo", _sizes(drop=("head_dim",))),
    "olmo2": ("Olmo2", _sizes(drop=("head_dim",))),
    "olmo3": ("Olmo3", _sizes(drop=("head_dim",))),
    "exaone4": ("Exaone4", _sizes()),
    "cohere": ("Cohere", _sizes(drop=("head_dim",), tie_word_embeddings=True)),
    "cohere-normed": ("Cohere", _sizes(drop=("head_dim",), tie_word_embeddings=True, use_qk_norm=True)),
    "cohere2": ("Cohere2", _sizes(drop=("head_dim",), tie_word_embeddings=True)),
    "cohere2_moe": (
        "Cohere2Moe",
        _sizes(
            tie_word_embeddings=True, num_experts=4, num_shared_experts=1, layer_types=None,
            mlp_layer_types=["dense", "sparse"], prefix_dense_intermediate_size=192,
        ),
    ),
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
    "qwen3_vl": ("Qwen3VL", _seeing(_QWEN3_VL, drop=(), text=_DEEP, **_IMAGES)),
    "qwen3_vl-wide": (
        "Qwen3VL",
        _seeing(_QWEN3_VL | dict(out_hidden_size=256), drop=(), text=_DEEP | _BLOCKS, **_IMAGES),
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        _seeing(_QWEN3_VL, drop=(), text=_DEEP | dict(_MOE, moe_intermediate_size=192), **_IMAGES),
    ),
    "qwen3_vl_moe-wide": (
        "Qwen3VLMoe",
        _seeing(
            _QWEN3_VL | dict(out_hidden_size=256), drop=(), **_IMAGES,
            text=_DEEP | _BLOCKS | dict(_MOE, moe_intermediate_size=512),
        ),
    ),
    "qwen3_5": (
        "Qwen3_5",
        _seeing(_QWEN3_5, drop=(), text=_DELTA | dict(rope_parameters=_QUARTER), **_IMAGES),
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        _seeing(
            _QWEN3_5, drop=(), **_IMAGES,
            text=_DELTA | _MOE | dict(shared_expert_intermediate_size=192, rope_parameters=_QUARTER),
        ),
    ),
    "qwen3_5-wide": (
        "Qwen3_5",
        _seeing(
            _QWEN3_5 | dict(out_hidden_size=256), drop=(), **_IMAGES,
            text=_DELTA_WIDE | dict(rope_parameters=_QUARTER_WIDE),
        ),
    ),
    "qwen3_5_moe-wide": (
        "Qwen3_5Moe",
        _seeing(
            _QWEN3_5 | dict(out_hidden_size=256), drop=(), **_IMAGES,
            text=_DELTA_WIDE | _MOE_WIDE | dict(rope_parameters=_QUARTER_WIDE),
        ),
    ),
    "glm4v": (
        "Glm4v",
        _seeing(_TOWER | dict(image_size=16), text=dict(attention_bias=True, rope_parameters=_HALF)),
    ),
    "glm4v_moe": (
        "Glm4vMoe",
        _seeing(
            _TOWER | dict(image_size=16), drop=(), tie_word_embeddings=False,
            text=_ROUTED | dict(num_hidden_layers=3, rope_parameters=_HALF, use_qk_norm=False),
        ),
    ),
    "gemma3": (
        "Gemma3",
        _seeing(
            _SIGLIP, drop=(), text=dict(tie_word_embeddings=True), mm_tokens_per_image=4,
            image_token_index=300,
        ),
    ),
    "gemma4": (
        "Gemma4",
        _seeing(
            _GEMMA4_IMAGES, drop=(), text=_GEMMA4 | dict(num_kv_shared_layers=2), tie_word_embeddings=True,
            audio_config=dict(
                hidden_size=64, num_hidden_layers=2, num_attention_heads=4, output_proj_dims=96,
                subsampling_conv_channels=[16, 12],
            ),
        ),
    ),
    "gemma4-images": (
        "Gemma4",
        _seeing(
            _GEMMA4_IMAGES | dict(use_clipped_linears=True, standardize=True), drop=(),
            text=_GEMMA4 | dict(
                enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=128
            ),
            tie_word_embeddings=False,
        ),
    ),
    "gemma4_unified": (
        "Gemma4Unified",
        _seeing(
            dict(patch_size=2, pooling_kernel_size=2, mm_embed_dim=128, mm_posemb_size=10,
                 output_proj_dims=128),
            drop=(), text={k: v for k, v in _GEMMA4.items() if "per_layer" not in k},
            audio_config=dict(audio_embed_dim=20), tie_word_embeddings=True,
        ),
    ),
    "exaone4_5": (
        "Exaone4_5_",
        _seeing(_QWEN2_5_VL | dict(num_key_value_heads=2), drop=(), text=dict(model_type="exaone4")),
    ),
    "kimi_k25": (
        "Kimi_K25",
        _seeing(
            dict(patch_size=4, pos_emb_height=3, pos_emb_width=5, num_attention_heads=4, num_hidden_layers=2,
                 hidden_size=128, intermediate_size=192),
            text=_WIDE_LATENT | dict(model_type="deepseek_v3"), projection_hidden_size=128,
            tie_word_embeddings=False,
        ),
    ),
    "mistral3": (
        "Mistral3",
        _seeing(
            _PIXTRAL, drop=(), text=dict(model_type="mistral"), image_token_index=300,
            tie_word_embeddings=False,
        ),
    ),
    "mistral3-ministral": (
        "Mistral3",
        _seeing(
            _PIXTRAL, drop=(), text=dict(model_type="ministral3", rope_parameters=_PLAIN),
            image_token_index=300, tie_word_embeddings=False,
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
    "llava_next": (
        "LlavaNext",
        _seeing(
            _CLIP | dict(model_type="clip_vision_model"), text=dict(model_type="llama"),
            image_token_index=300,
        ),
    ),
    "llava_onevision": (
        "LlavaOnevision",
        _seeing(_SIGLIP, text=dict(model_type="qwen2"), image_token_index=300, video_token_index=301),
    ),
    "llava_onevision-wide": (
        "LlavaOnevision",
        _seeing(
            _SIGLIP, text=dict(_BLOCKS, model_type="qwen2"), image_token_index=300, video_token_index=301
        ),
    ),
    "internvl": (
        "InternVL",
        _seeing(
            _CLIP | dict(image_size=[16, 16], patch_size=[4, 4]), text=dict(model_type="qwen2"),
            image_token_id=300, tie_word_embeddings=False,
        ),
    ),
    "cohere2_vision": (
        "Cohere2Vision",
        _seeing(
            _SIGLIP, text=dict(model_type="cohere2", tie_word_embeddings=True),
            alignment_intermediate_size=384, image_token_id=300, tie_word_embeddings=True,
        ),
    ),
    "lfm2_vl": (
        "Lfm2Vl",
        _seeing(
            _SIGLIP2, projector_hidden_size=192, image_token_id=300, tie_word_embeddings=True,
            text=dict(
                _CONVOLVED, model_type="lfm2", intermediate_size=384, block_multiple_of=64, block_dim=128,
                conv_dim=128, block_ff_dim=384, tie_word_embeddings=True,
            ),
        ),
    ),
    "llama4": (
        "Llama4",
        _seeing(
            _CLIP | dict(intermediate_size=512, projector_input_dim=192, projector_output_dim=192,
                         vision_output_dim=192),
            drop=(), text=_LLAMA4, tie_word_embeddings=False,
        ),
    ),
    "idefics3": ("Idefics3", _seeing(_CLIP, text=dict(model_type="llama"), image_token_id=300)),
    "smolvlm": (
        "SmolVLM",
        _seeing(
            _CLIP, text=dict(model_type="llama", tie_word_embeddings=True), image_token_id=300,
            tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip
"""name -> (transformers' class prefix, the config's arguments)."""
