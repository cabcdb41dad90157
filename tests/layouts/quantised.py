"""Tiny quantised checkpoints, as the hub stores them: a Llama or a Qwen3-MoE of random elements."""

from __future__ import annotations

import functools

import torch

HIDDEN, HEADS, KV, D, WIDTH, GROUP = 64, 8, 4, 16, 128, 16
SIZES = dict(
    hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=D, vocab_size=32,
    num_hidden_layers=1, tie_word_embeddings=False, intermediate_size=WIDTH, rms_norm_eps=1e-6,
)  # fmt: skip


def compressed(kind, strategy, **more):
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights | more}}}


CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False},
    "gptq-8": {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": False},
    "int8": compressed("int", "channel"),
    "smooth": compressed("int", "channel"),
    "fp8-channel": compressed("float", "channel"),
    "fp8-tensor": {"quant_method": "fp8"},
    "fp8-tensor-1": compressed("float", "tensor"),
    "int8-static": compressed("int", "channel"),
    "fp8-static": {"quant_method": "fp8", "activation_scheme": "static"},
    "fp8-static-1": compressed("float", "tensor"),
}


def integers(symmetric=True, **more):
    said = compressed("int", "group", group_size=GROUP)
    weights = said["config_groups"]["group_0"]["weights"]
    weights |= {"num_bits": 4, "symmetric": symmetric} | more
    return said | {"format": "pack-quantized"}


PACKED = {
    "int4": integers(),
    "int4-zero": integers(symmetric=False),
    "int8-packed": integers(num_bits=8),
    "int4-row": integers(strategy="channel", group_size=None),
}
"""compressed-tensors' packed integers."""


class Draw:
    def __init__(self, seed):
        self.g = torch.Generator().manual_seed(seed)

    def of(self, dtype, *shape):
        raw = torch.randint(0, 120, (*shape, dtype.itemsize), dtype=torch.uint8, generator=self.g)
        return raw.view(dtype).reshape(shape)

    def scale(self, *shape):
        return torch.rand(shape, generator=self.g) + 0.5


def matrix(d, scheme, out, into, smooth):
    """What the hub has below the module of a matrix [out, into]."""
    if scheme in ("awq", "gptq", "gptq-8"):
        each = 4 if scheme == "gptq-8" else 8
        shape = (into, out // each) if scheme == "awq" else (into // each, out)
        made = {
            "qweight": d.of(torch.int32, *shape),
            "qzeros": d.of(torch.int32, into // GROUP, out // each),
            "scales": d.scale(into // GROUP, out).half(),
        }
        if scheme != "awq":
            made["g_idx"] = torch.arange(into, dtype=torch.int32) // GROUP
        return made
    if scheme in PACKED:
        each, group = 4 if scheme == "int8-packed" else 8, into if scheme == "int4-row" else GROUP
        made = {
            "weight_packed": d.of(torch.int32, out, into // each),
            "weight_scale": d.scale(out, into // group),
            "weight_shape": torch.tensor([out, into]),
        }
        if scheme == "int4-zero":
            made["weight_zero_point"] = d.of(torch.int32, out // each, into // group)
        return made
    dtype = torch.int8 if scheme.startswith(("int8", "smooth")) else torch.float8_e4m3fn
    made = {"weight": d.of(dtype, out, into)}
    forms = {"fp8-tensor": (), "fp8-tensor-1": (1,), "fp8-static": (), "fp8-static-1": (1,)}
    made["weight_scale"] = d.scale(*forms.get(scheme, (out, 1)))
    if "static" in scheme:
        made["input_scale"] = d.scale(*forms.get(scheme, ()))
    if scheme == "smooth" and smooth:
        made |= (
            {"smoother": d.scale(into), "shift": d.scale(into)}
            if smooth == "both"
            else {"smoother": d.scale(into)}
        )
    return made


def bytes_of(hub, block, keep=()):
    """(tensors, quantization_config) of matrices as bytes, but for those whose name has one of `keep`: fp8
    with a scale for each output ("row"), each matrix ("all") or blocks of so many outputs and inputs, or
    "int8" with one for each output."""
    keep, out = ("embed", "lm_head", "mlp.gate.", "conv1d", *keep), dict(hub)
    dtype = torch.int8 if block == "int8" else torch.float8_e4m3fn
    for name, x in hub.items():
        if x.ndim == 2 and name.endswith(".weight") and not any(part in name for part in keep):
            out[name] = x.to(dtype)
            if isinstance(block, int):
                out[f"{name}_scale_inv"] = torch.ones([-(-n // block) for n in x.shape])
            else:
                out[f"{name}_scale"] = torch.ones(() if block == "all" else (x.shape[0], 1))
    if isinstance(block, int):
        return out, {"quant_method": "fp8", "weight_block_size": [block, block]}
    kinds = {"row": compressed("float", "channel"), "int8": compressed("int", "channel")}
    return out, kinds.get(block, {"quant_method": "fp8"})


@functools.cache
def made(scheme, experts=0):
    """(config, tensors)."""
    d, at = Draw(sum(map(ord, scheme)) + experts), "model.layers.0."
    t = {n: d.scale(32, HIDDEN).half() for n in ("model.embed_tokens.weight", "lm_head.weight")}
    norms = ["model.norm.", at + "input_layernorm.", at + "post_attention_layernorm."]
    t |= {n + "weight": d.scale(HIDDEN).half() for n in norms}
    shapes = {f"{at}self_attn.{p}_proj.": (n * D, HIDDEN) for p, n in (("q", HEADS), ("k", KV), ("v", KV))}
    shapes[f"{at}self_attn.o_proj."] = (HIDDEN, HEADS * D)
    config = SIZES | {"model_type": "llama", "quantization_config": (CONFIGS | PACKED)[scheme]}
    blocks = [f"{at}mlp.experts.{e}." for e in range(experts)] or [at + "mlp."]
    for block in blocks:
        shapes |= {f"{block}{p}_proj.": (WIDTH, HIDDEN) for p in ("gate", "up")}
        shapes[f"{block}down_proj."] = (HIDDEN, WIDTH)
    if experts:
        t[at + "mlp.gate.weight"] = d.scale(experts, HIDDEN).half()
        t |= {f"{at}self_attn.{p}_norm.weight": d.scale(D).half() for p in "qk"}
        config |= {"model_type": "qwen3_moe", "num_experts": experts, "moe_intermediate_size": WIDTH,
                   "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
    for name, (out, into) in shapes.items():
        smooth = "both" if "o_proj" in name else "one" if "mlp.down_proj" in name or "attn" in name else ""
        t |= {name + leaf: x for leaf, x in matrix(d, scheme, out, into, smooth).items()}
    shared = {f"{at}self_attn.{p}_proj.smoother": f"{at}self_attn.q_proj.smoother" for p in "kv"}
    shared |= {f"{b}up_proj.input_scale": f"{b}gate_proj.input_scale" for b in blocks if not experts}
    t |= {n: t[first].clone() for n, first in shared.items() if n in t}  # what reads one input shares these
    return config, t
