"""Small models of the families that vLLM serves, as the hub has them, of sizes that its CPU kernels take.

Needs transformers; imported by the tests here and by scripts that run under vLLM's own Python.
"""

from __future__ import annotations

import json
import os
import zlib

import torch
import transformers
from safetensors.torch import save_file

_SIZES = dict(
    vocab_size=331, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_OLD = {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True)
_LATENT = _OLD | dict(
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, n_routed_experts=4,
    moe_intermediate_size=128, first_k_dense_replace=1, num_key_value_heads=4, num_experts_per_tok=2,
    n_group=1, topk_group=1, norm_topk_prob=True,
)  # fmt: skip
_FALCON = dict(
    vocab_size=331, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
    eos_token_id=2, max_position_embeddings=128,
)  # fmt: skip


def _sizes(base=_SIZES, drop=(), **changes):
    return {k: v for k, v in (base | changes).items() if k not in drop}


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
    "gpt_oss": (
        "GptOss",
        _sizes(num_local_experts=4, num_experts_per_tok=2, head_dim=64, layer_types=None),
    ),
    "gpt2": (
        "GPT2",
        dict(
            vocab_size=331, n_embd=128, n_layer=2, n_head=4, n_positions=128, n_inner=256, bos_token_id=1,
            eos_token_id=2,
        ),
    ),
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
}  # fmt: skip
"""name -> (transformers' class prefix, the config's arguments)."""


def write(name: str, folder: str, *, counted: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    """The model `name` in `folder`, as save_pretrained writes it: random, or `counted`: every tensor holds a
    sequence of its own of small numbers that bfloat16 has exactly, the same on every machine."""
    if name == "chatglm":
        return _write_chatglm(folder, dtype)
    prefix, sizes = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    head = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    torch.manual_seed(zlib.crc32(name.encode()))
    model = getattr(transformers, prefix.removesuffix("Text") + head)(config).to(dtype)
    if counted:
        for key, tensor in model.state_dict().items():
            count(key, tensor)
    model.save_pretrained(folder)


def count(name: str, tensor: torch.Tensor) -> None:
    """Fills a tensor with multiples of 1/64 in [-2, 2) that its name and each element's index choose."""
    index = torch.arange(tensor.numel(), dtype=torch.int64) + zlib.crc32(name.encode())
    mixed = (index * 2654435761) >> 13
    tensor.copy_(((mixed % 256 - 128) / 64).view(tensor.shape))


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
