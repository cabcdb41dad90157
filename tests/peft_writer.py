"""Writes PEFT adapters as peft 0.21 names and stores them, and merges them in torch, element by element."""

from __future__ import annotations

import json
import math

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def settings(**changes):
    """An adapter_config.json of LoraConfig's fields."""
    plain = dict(
        peft_type="LORA", task_type="CAUSAL_LM", peft_version="0.21.2", base_model_name_or_path="base", r=4,
        lora_alpha=6, lora_dropout=0.1, bias="none", fan_in_fan_out=False, use_rslora=False, use_dora=False,
        init_lora_weights=True, inference_mode=True, target_modules=["q_proj"], modules_to_save=None,
        rank_pattern={}, alpha_pattern={}, layer_replication=None, lora_bias=False,
        megatron_core="megatron.core",
        loftq_config={}, runtime_config={"ephemeral_gpu_offload": False}, target_parameters=None,
    )  # fmt: skip
    return plain | changes


def thin(weights, modules, rank=4, dtype=torch.float32, flipped=False, ranks=None):
    """{module: (A, B)} of random numbers for these modules of a base."""
    torch.manual_seed(len(modules))
    out = {}
    for m in modules:
        rows, columns = weights[f"{m}.weight"].shape
        outputs, inputs = (columns, rows) if flipped else (rows, columns)
        r = (ranks or {}).get(m, rank)
        out[m] = torch.randn(r, inputs, dtype=dtype), torch.randn(outputs, r, dtype=dtype)
    return out


def write(folder, config, pairs, saved=None, tables=()):
    """An adapter's directory."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"{PREFIX}{n}": x for n, x in (saved or {}).items()}
    for module, (a, b) in pairs.items():
        form = "lora_embedding_{}" if module in tables else "lora_{}.weight"
        tensors[f"{PREFIX}{module}.{form.format('A')}"] = a
        tensors[f"{PREFIX}{module}.{form.format('B')}"] = b
    save_file({n: x.contiguous() for n, x in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def merged(weight, a, b, alpha, *, rslora=False, flipped=False):
    """float32 of weight + scale * B @ A, sums in float64 and in order."""
    rank = a.shape[0]
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    total = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    for k in range(rank):
        total = total + b[:, k].double()[:, None] * a[k].double()[None, :]
    total = total.T if flipped else total
    return (total * scale + weight.double()).float()


DECLARED = ("gate_up_proj", "up_proj", "down_proj")


def stacked(weights, turned, rank=4):
    """{wrapper: (A, B)}, {stack: wrapper} for all stacks of experts of a model in training; `turned`: the
    version of PEFT takes them for [experts, inputs, outputs]."""
    torch.manual_seed(rank)
    pairs, wrappers = {}, {}
    for module in sorted({n.rpartition(".")[0] for n in weights if n.endswith(".experts.down_proj")}):
        declared = [f"{module}.{p}" for p in DECLARED if f"{module}.{p}" in weights]
        for depth, name in enumerate(reversed(declared)):
            experts, *sizes = weights[name].shape
            outputs, inputs = sizes[::-1] if turned else sizes
            wrappers[name] = module + ".base_layer" * depth
            pairs[wrappers[name]] = torch.randn(experts * rank, inputs), torch.randn(outputs, rank * experts)
    return pairs, wrappers


def merged_stack(stack, a, b, alpha, turned):
    """The merged stack in float32: rows of A lie by expert, columns of B by rank and then by expert."""
    count = len(stack)
    each = zip(stack, a.chunk(count), (b[:, e::count] for e in range(count)), strict=True)
    return torch.stack([merged(w, x, y, alpha, flipped=turned) for w, x, y in each])
