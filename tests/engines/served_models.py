"""The models of served_tables as the hub has them, and quantised.

Needs transformers; imported by the tests here and by scripts that run under vLLM's own Python.
"""

from __future__ import annotations

import json
import os
import re
import zlib

import torch
import transformers
from engines.served_spellings import HUBS, INSIDE, SAID, hubs
from engines.served_tables import MODELS
from safetensors.torch import load_file, save_file


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

TOWERS = ("visual", "vision_tower", "multi_modal_projector", "mm_projector")
"""Modules beside a decoder, in which all stays as it is."""

BY_ROW = ("int8", "fp8-channel")
"""Those with a scale for every output."""

_DENSE = (  # of which the hub has quantised ones
    "seed_oss", "ernie4_5", "hunyuan_v1_dense", "ministral3", "olmo2", "olmo3", "exaone4", "cohere",
    "cohere2", "apertus", "hyperclovax", "afmoe", "cohere2_moe",
)  # fmt: skip

_SEEING = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3", "mistral3", "llava", "llava_onevision",
    "internvl", "cohere2_vision",
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
        "glm4v": ("int8",),
        "glm4v_moe": ("int8", "fp8-matrix"),
        "qwen2_moe": ("int8", "fp8-matrix"),
        "glm4_moe": ("int8", "fp8-matrix"),
        "deepseek_v2-lora": ("int8", "fp8-matrix"),
        "kimi_k2": ("fp8-block", "int4"),
        "kimi_k25": ("int4",),
        "minimax_m2": ("fp8-block",),
        "hy_v3": ("int8", "fp8-matrix"),
        "mimo_v2_flash-wide": ("fp8-block",),
        **dict.fromkeys((*_DENSE, *_SEEING), ("int8", "fp8-matrix")),
        **dict.fromkeys(
            (
                *("qwen3_vl-wide", "qwen3_vl_moe-wide", "llava_onevision-wide"),
                *("qwen3_5_moe_text-wide", "qwen3_5-wide", "qwen3_5_moe-wide"),
            ),
            ("fp8-block",),
        ),
    }.items()
    for scheme in schemes
}
QUANTISED |= {
    f"{model}+{scheme}": (model, scheme)
    for model in (
        "llama", "llama-biased", "llama-tied", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma",
        "gemma2", "gemma3_text", "phi3", "glm", "glm4", "mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe",
        "deepseek_v2-576", "deepseek_v3-wide", *_DENSE, *_SEEING, "glm4v", "glm4v_moe",
    )
    for scheme in (tuple(PACKED) if model in ("llama", "mixtral") else tuple(PACKED)[:4])
    if scheme != "gptq" or model not in ("glm4", "glm4v")  # which vLLM's own loader does not take
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
    if config.model_type in HUBS:
        path = os.path.join(folder, "model.safetensors")
        save_file(hubs(load_file(path), config.model_type), path, {"format": "pt"})
    if name in SAID:
        _say(folder, SAID[name])
    if name.startswith("qwen3_vl_moe"):
        _as_qwen3_vl_moe(folder)
    if name in INSIDE:
        path = os.path.join(folder, "model.safetensors")
        tensors = load_file(path).items()
        older = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in tensors}
        save_file(older, path, {"format": "pt"})
    if name.endswith("-mixed"):  # as Qwen3.5's own files, and as transformers trains AFMoE
        own = tuple(f".mamba.{leaf}" for leaf in ("A_log", "D", "dt_bias", "norm.weight"))
        norms = ("norm.weight", ".expert_bias") if name.startswith("afmoe") else ()
        _keep_float32(folder, (".linear_attn.A_log", ".linear_attn.norm.weight", *own, *norms))


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
    tensors, told, left = _singly(load_file(path)), SCHEMES[scheme], []
    hub = told["quant_method"] != "compressed-tensors"
    block = scheme.startswith("fp8-block")
    values = torch.int8 if scheme.startswith("int8") else torch.float8_e4m3fn
    for name, tensor in sorted(tensors.items()):
        module = name.removesuffix(".weight")
        if module == name or tensor.dim() != 2:
            continue
        if module.rpartition(".")[2] in DENSE or any(part in TOWERS for part in module.split(".")):
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
    # vLLM does not know of every tower what its fused modules are made of, and takes patterns or their names.
    left += [f"re:.*{tower}.*" for tower in TOWERS] if not hub else []
    left += [*TOWERS] if told["quant_method"] == "awq" else []
    left += [n.replace(".q_proj", ".qkv_proj") for n in left if n.endswith(".q_proj")]
    skipped = {"modules_to_not_convert" if hub else "ignore": left}
    if told["quant_method"] == "gptq":
        skipped = {"dynamic": {f"-:^{re.escape(n)}$": {} for n in left if n != "lm_head"}}
    _say(folder, {"quantization_config": told | skipped})


def _singly(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Places for Qwen3-VL's experts one by one, as its quantised releases have them, not in stacks."""
    for stack in [n for n in tensors if n.endswith(".experts.gate_up_proj")]:
        at = stack.removesuffix("gate_up_proj")
        experts, hidden, width = tensors.pop(stack).shape
        tensors.pop(f"{at}down_proj")
        for e in range(experts):
            tensors |= {
                f"{at}{e}.{n}.weight": torch.empty(width // 2, hidden) for n in ("gate_proj", "up_proj")
            }
            tensors[f"{at}{e}.down_proj.weight"] = torch.empty(hidden, width // 2)
    return tensors


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
