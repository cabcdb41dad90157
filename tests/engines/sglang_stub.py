"""The part of SGLang 0.5.23 that our loader touches, with a llama of bare parameters by SGLang's names.

Not SGLang: it shows that the loader speaks the interface, not that SGLang serves what it loads.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

calls: list[str] = []
parallel = SimpleNamespace(tp_size=1, tp_rank=0, pp_size=1, moe_ep_size=1, attn_tp_size=1)


class DefaultModelLoader:
    def __init__(self, load_config) -> None:
        raise AssertionError("refuses extra keys")

    def initialize_model_for_startup(self, *, model_config, device_config) -> nn.Module:
        calls.append("built")
        return llama(model_config.hf_config.to_dict(), parallel.tp_size, torch.bfloat16)

    @staticmethod
    def postprocess_weights(model, target_device) -> None:
        calls.append(f"postprocessed on {target_device}")


def post_load_weights(model: nn.Module) -> None:
    calls.append("post-loaded")


@dataclass
class ModelConfig:
    model_path: str
    hf_config: object
    quantization: str | None = None


@dataclass
class LoadConfig:
    model_loader_extra_config: dict = field(default_factory=dict)


def llama(config: dict, tp: int, dtype: torch.dtype) -> nn.Module:
    """A rank's modules: fused projections, a head that is the embedding where the config ties them."""

    def weight(*shape: int) -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)
        return module

    hidden, width = config["hidden_size"], config["intermediate_size"] // tp
    d = hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * d // tp, max(config["num_key_value_heads"] // tp, 1) * d
    rows = -(-config["vocab_size"] // 64) * 64 // tp
    top, model = nn.Module(), nn.Module()
    model.embed_tokens, model.norm, model.layers = weight(rows, hidden), weight(hidden), nn.ModuleList()
    for _ in range(config["num_hidden_layers"]):
        layer, layer.self_attn, layer.mlp = nn.Module(), nn.Module(), nn.Module()
        layer.self_attn.qkv_proj, layer.self_attn.o_proj = weight(q + 2 * kv, hidden), weight(hidden, q)
        layer.mlp.gate_up_proj, layer.mlp.down_proj = weight(2 * width, hidden), weight(hidden, width)
        layer.input_layernorm, layer.post_attention_layernorm = weight(hidden), weight(hidden)
        model.layers.append(layer)
    top.model = model
    top.lm_head = model.embed_tokens if config["tie_word_embeddings"] else weight(rows, hidden)
    return top


def install(monkeypatch) -> None:
    """Stand where `import sglang` looks."""
    modules = {
        "sglang": {"__version__": "0.5.23"},
        "sglang.srt": {},
        "sglang.srt.model_loader": {},
        "sglang.srt.model_loader.loader": {
            "DefaultModelLoader": DefaultModelLoader, "post_load_weights": post_load_weights,
        },
        "sglang.srt.runtime_context": {"get_parallel": lambda: parallel},
    }  # fmt: skip
    for name, holds in modules.items():
        module = types.ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fastckpt.engines.sglang", raising=False)
