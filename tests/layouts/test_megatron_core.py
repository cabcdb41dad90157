"""`megatron` against megatron-core itself: names and shapes of every rank as its GPTModel has them.

megatron_core.json is what make_megatron_golden.py wrote; the same script held our values to megatron-core's
logits.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from fastckpt import recipes
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import gated
from reading import memory

transformers = pytest.importorskip("transformers")

GOLDEN = json.loads((Path(__file__).parent / "megatron_core.json").read_text())


@functools.cache
def model_of(name):
    kind, sizes = GOLDEN["cases"][name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        made = getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))(config)
    tensors = {n: torch.zeros(x.shape) for n, x in made.state_dict().items()}
    tied = config.tie_word_embeddings
    tensors = {n: x for n, x in tensors.items() if not (tied and n == "lm_head.weight")}
    said = json.loads(config.to_json_string())
    recipe = gated.RECIPE if name == "gated" else recipes.find(said)
    return recipe(memory(tensors), said)


def held(case, **options):
    name, *grid, rank = case.split()
    tp, dp, ep, expert_tp = map(int, grid)
    place = Placement(tp=tp, dp=dp, ep=ep, rank=int(rank))
    model, fields = model_of(name), dict(options)
    if model.sizes.experts:
        fields = {"experts": "sequential", "expert_tp": str(expert_tp)} | fields
    fields["zero_centered_gamma"] = "true" if name in ("gemma", "gated") else "false"
    return {t.name: list(t.shape) for t in layout("megatron", fields).targets(model, place)}


@pytest.mark.parametrize("case", list(GOLDEN["ranks"]))
def test_names_and_shapes(case):
    assert held(case, spec="local") == GOLDEN["ranks"][case]


def test_our_values_give_its_logits():
    """What the script saw when it ran megatron-core with our tensors against transformers with the hub's."""
    assert GOLDEN["held"] == {"0.16.1": 85, "0.19.2": 76}
    for models in GOLDEN["logits"].values():
        assert len(models) == 11
        assert all(apart < 1e-5 for apart in models.values())


def renamed(name, latent, routed):
    """A parameter of megatron's own modules, as Transformer Engine's hold it (gpt_layer_specs.py)."""
    fused = [("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] if not routed else []
    if latent:
        fused += [("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_")]
        fused += [("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_")]
    else:
        fused += [("input_layernorm.", "self_attention.linear_qkv.layer_norm_")]
    for old, new in fused:
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("case", list(GOLDEN["ranks"]))
def test_names_of_transformer_engine(case):
    """From the documented definition: its modules cannot be built without it."""
    latent, want = case.startswith("deepseek"), {}
    whole = GOLDEN["ranks"][f"{case.split()[0]} 1 1 1 1 0"]
    for name, shape in GOLDEN["ranks"][case].items():
        layer = ".".join(name.split(".")[:3])
        routed = f"{layer}.mlp.router.weight" in whole
        low = name.endswith(("q_down_proj.weight", "kv_down_proj.weight"))
        want[renamed(name, latent, routed)] = whole[name] if low else shape
    assert held(case) == want
