"""fp8 with a scale a matrix, of weights and of inputs: hf carries it, vLLM has vectors for what it fuses."""

from __future__ import annotations

import fastckpt
import pytest
import torch
from fastckpt.errors import LayoutError, RecipeError
from layouts import families, tiny

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantised(name, made, static=True):
    """The model with bytes for matrices, and scales that are other numbers each: (config, tensors)."""
    config, hub, _ = made.made(name)
    said = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}
    out = {}
    for i, (n, x) in enumerate(hub.items()):
        module = n.removesuffix(".weight")
        if not module.endswith(PARTS):
            out[n] = x.bfloat16()
            continue
        out[n] = torch.randint(0, 120, x.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        out[f"{module}.weight_scale"] = torch.tensor(i + 0.25)
        if static:
            out[f"{module}.input_scale"] = torch.tensor(i + 0.5)
    return config | {"quantization_config": said}, out


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


@pytest.mark.parametrize("tp", [1, 2])
def test_hf_carries_scales_whole(tp):
    config, hub = quantised("qwen3", tiny)
    ranks = fastckpt.reshard(hub, tp=tp, config=config)
    for name, x in hub.items():
        for r, got in enumerate(ranks):
            if name.endswith("_scale"):
                same(got[name], x)
            elif name.endswith(("q_proj.weight", "up_proj.weight")):
                same(got[name], x.chunk(tp)[r])
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                same(got[name], x.chunk(tp, 1)[r])
    assert all(sorted(got) == sorted(hub) for got in ranks)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_vllm_keeps_one_a_fused_matrix(tp):
    """Source: vLLM's Fp8LinearMethod, whose scales are vectors of as many as its matrices are fused of."""
    config, hub = quantised("qwen3", tiny)
    for r, got in enumerate(fastckpt.reshard(hub, tp=tp, config=config, layout="vllm")):
        for i in range(2):
            at = f"model.layers.{i}."
            for fused, parts in (
                ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
                ("self_attn.o_proj", ("self_attn.o_proj",)),
                ("mlp.down_proj", ("mlp.down_proj",)),
            ):
                for leaf in ("weight_scale", "input_scale"):
                    same(got[f"{at}{fused}.{leaf}"], torch.stack([hub[f"{at}{p}.{leaf}"] for p in parts]))
            both = [hub[f"{at}mlp.{p}_proj.weight"].view(torch.uint8).chunk(tp)[r] for p in ("gate", "up")]
            same(got[f"{at}mlp.gate_up_proj.weight"].view(torch.uint8), torch.cat(both))


def test_vllm_experts():
    """Source: vLLM's Fp8MoEMethod: a scale an expert and matrix, and one input scale an expert."""
    config, hub = quantised("qwen3_moe", families, static=False)
    for got in fastckpt.reshard(hub, tp=2, config=config, layout="vllm"):
        at = "model.layers.1.mlp.experts."
        each = [[hub[f"{at}{e}.{p}_proj.weight_scale"] for p in ("gate", "up", "down")] for e in range(5)]
        same(got[f"{at}w13_weight_scale"], torch.tensor([[g, u] for g, u, _ in each]))
        same(got[f"{at}w2_weight_scale"], torch.tensor([d for _, _, d in each]))
    config, hub = quantised("qwen3_moe", families)
    with pytest.raises(LayoutError, match="w13_input_scale: vLLM keeps one for gate and up"):
        fastckpt.reshard(hub, tp=2, config=config, layout="vllm")


def test_bytes_without_a_scale_and_other_dtypes_are_refused():
    config, hub = quantised("qwen3", tiny)
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(RecipeError, match="has no weight_scale beside it"):
        fastckpt.reshard({n: x for n, x in hub.items() if n != f"{name}.weight_scale"}, config=config)
    with pytest.raises(LayoutError, match="its bytes cannot become bfloat16"):
        fastckpt.reshard(hub, config=config, dtype="bfloat16")
