"""compressed-tensors' packed integers in every layout that has a place for them.

What vLLM itself holds of such models: `engines/test_vllm_names.py`.
"""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import quantised
from layouts.quantised import GROUP, HEADS, HIDDEN, KV, WIDTH, D
from layouts.test_rtp_quantised import cut, halves, heads, model_of
from reading import memory, same, shard

ENGINE = {"engine": "vllm==0.32"}
AT = "model.layers.0."
PAIR = ("gate", "up")
EXPERTS = 4


def leaves(scheme):
    """Leaf -> how many outputs and inputs one of its elements stands for."""
    each = 4 if scheme == "int8-packed" else 8
    found = {"weight_packed": (1, each), "weight_scale": (1, 0 if scheme == "int4-row" else GROUP)}
    return found | ({"weight_zero_point": (each, GROUP)} if scheme == "int4-zero" else {})


def dense(t, scheme, tp, r):
    """Rank r's part of attention, and of a dense block, as vLLM has them."""
    a, m, out = f"{AT}self_attn.", f"{AT}mlp.", {}
    for leaf, (down, across) in leaves(scheme).items():
        out[f"{a}qkv_proj.{leaf}"] = heads(t, a, leaf, tp, r, 0, D // down)
        o = t[f"{a}o_proj.{leaf}"]
        out[f"{a}o_proj.{leaf}"] = cut(o, 1, tp, r) if across else o
        if f"{m}up_proj.{leaf}" in t:
            out[f"{m}gate_up_proj.{leaf}"] = halves(t, m, PAIR, leaf, 0, tp, r)
            down_proj = t[f"{m}down_proj.{leaf}"]
            out[f"{m}down_proj.{leaf}"] = cut(down_proj, 1, tp, r) if across else down_proj
    sizes = {f"{a}qkv_proj": (KV * D, HIDDEN), f"{a}o_proj": (HIDDEN, HEADS * D)}
    if f"{m}up_proj.weight_shape" in t:
        sizes |= {f"{m}gate_up_proj": (WIDTH, HIDDEN), f"{m}down_proj": (HIDDEN, WIDTH)}
    return out | {f"{n}.weight_shape": torch.tensor(x) for n, x in sizes.items()}


def stacked(t, scheme, mine, tp, r):
    """Experts `mine`, their widths cut."""
    out, at = {}, f"{AT}mlp.experts."
    for leaf, (_, across) in leaves(scheme).items():
        pairs = [halves(t, f"{at}{e}.", PAIR, leaf, 0, tp, r) for e in mine]
        downs = [t[f"{at}{e}.down_proj.{leaf}"] for e in mine]
        out[f"{at}w13_{leaf}"] = torch.stack(pairs)
        out[f"{at}w2_{leaf}"] = torch.stack([cut(x, 1, tp, r) if across else x for x in downs])
    out[f"{at}w13_weight_shape"] = torch.tensor([[WIDTH, HIDDEN]] * len(mine)).float()
    out[f"{at}w2_weight_shape"] = torch.tensor([[HIDDEN, WIDTH]] * len(mine)).float()
    return out


def matrices(got):
    return {n: x for n, x in got.items() if "_proj" in n or "experts" in n}


@pytest.mark.parametrize("scheme", quantised.PACKED)
def test_each_rank_of_the_hub_says_its_own_sizes(scheme):
    model, t = model_of(scheme)
    got = shard(layout("hf").targets(model, Placement(tp=2, rank=1)))
    a, want = f"{AT}self_attn.", {}
    for name, axis in (("q", 0), ("o", 1)):
        want[f"{a}{name}_proj.weight_packed"] = cut(t[f"{a}{name}_proj.weight_packed"], axis, 2, 1)
        want[f"{a}{name}_proj.weight_shape"] = torch.tensor([HEADS * D // 2, HIDDEN])
    same({n: got[n] for n in want}, want)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("scheme", ["int4", "int8-packed", "int4-row"])
def test_vllm(scheme, tp):
    model, t = model_of(scheme)
    for p in Placement(tp=tp).ranks():
        same(matrices(shard(layout("vllm").targets(model, p))), dense(t, scheme, tp, p.rank))


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("scheme", ["int4", "int4-zero", "int8-packed", "int4-row"])
def test_vllm_experts(scheme, tp, ep):
    model, t = model_of(scheme, EXPERTS)
    for p in Placement(tp=tp, ep=ep).ranks():
        per = EXPERTS // ep
        mine = range(p.rank * per, (p.rank + 1) * per) if ep > 1 else range(EXPERTS)
        moe = stacked(t, scheme, mine, 1 if ep > 1 else tp, 0 if ep > 1 else p.rank)
        want = dense(t, scheme, tp, p.rank) | moe
        same(matrices(shard(layout("vllm").targets(model, p))), want)


@pytest.mark.parametrize("scheme", ["int4", "int4-zero", "awq", "gptq", "gptq-8"])
def test_what_the_hub_fuses_is_cut_in_its_parts(scheme):
    """As Phi-3 has it: q, k and v one matrix, gate and up another."""
    config, t = quantised.made(scheme)
    a, m, d = f"{AT}self_attn.", f"{AT}mlp.", quantised.Draw(7)
    t = {n: x for n, x in t.items() if not any(f".{p}_proj." in n for p in ("q", "k", "v", *PAIR))}
    for name, rows in ((f"{a}qkv_proj.", (HEADS + 2 * KV) * D), (f"{m}gate_up_proj.", 2 * WIDTH)):
        t |= {name + leaf: x for leaf, x in quantised.matrix(d, scheme, rows, HIDDEN, "").items()}
    config = config | {"model_type": "phi3", "pad_token_id": None}
    model = recipes.find(config)(memory(t, 2), config)
    same(shard(layout("hf").targets(model, Placement())), t)
    each = 4 if scheme == "gptq-8" else 8
    axis = 0 if scheme.startswith("int4") else 1
    by = {"qweight": each if scheme == "awq" else 1, "qzeros": each, "weight_zero_point": each}
    for r in range(2):
        want = {}
        for leaf in ("weight_packed", "weight_scale", "weight_zero_point", "qweight", "scales", "qzeros"):
            unit = D // by.get(leaf, 1)
            if (whole := t.get(f"{a}qkv_proj.{leaf}")) is not None:
                parts = whole.split([HEADS * unit, KV * unit, KV * unit], axis)
                want[f"{a}qkv_proj.{leaf}"] = torch.cat([cut(x, axis, 2, r) for x in parts], axis)
                gate, up = t[f"{m}gate_up_proj.{leaf}"].chunk(2, axis)
                want[f"{m}gate_up_proj.{leaf}"] = torch.cat([cut(x, axis, 2, r) for x in (gate, up)], axis)
        got = shard(layout("vllm").targets(model, Placement(tp=2, rank=r)))
        same({n: got[n] for n in want}, want)


def experts_alone(scheme):
    """A model whose attention is plain, and its tensors; scales are bfloat16."""
    config, t = quantised.made(scheme, EXPERTS)
    a = f"{AT}self_attn."
    t = {n: x for n, x in t.items() if not n.startswith(a) or "_norm" in n}
    t = {n: x.bfloat16() if "scale" in n else x for n, x in t.items()}
    for p, n in (("q", HEADS), ("k", KV), ("v", KV)):
        t[f"{a}{p}_proj.weight"] = torch.randn(n * D, HIDDEN)
    t[f"{a}o_proj.weight"] = torch.randn(HIDDEN, HEADS * D)
    return recipes.find(config)(memory(t, 2), config), t


@pytest.mark.parametrize(("tp", "dp", "ep"), [(1, 1, 1), (2, 1, 2), (2, 2, 4)])
def test_rtp_llm_experts(tp, dp, ep):
    """Whole experts, up before gate."""
    model, t = experts_alone("int4")
    for p in Placement(tp=tp, dp=dp, ep=ep).ranks():
        index = p.rank % ep
        mine = [f"{AT}mlp.experts.{e}." for e in range(index * EXPERTS // ep, (index + 1) * EXPERTS // ep)]
        at = f"rank_{p.tp_rank:02d}_{p.dp_rank:02d}_{index:02d}.layers.0."
        moe, want = f"{at}partial_moe_weights.intermediate_weight", {}
        for leaf, name in (("weight_packed", "kernel"), ("weight_scale", "weight_only_quant_scale")):
            pairs = [halves(t, e, ("up", "gate"), leaf, 0, 1, 0) for e in mine]
            want[f"{moe}.{name}"] = torch.stack(pairs)
            want[f"{moe}2.{name}"] = torch.stack([t[f"{e}down_proj.{leaf}"] for e in mine])
        got = shard(layout("rtp_llm").targets(model, p))
        same({n: x for n, x in got.items() if "moe_weights.intermediate" in n}, want)


# ---- what is refused ----


def refused(match, to, model, tp=1, **options):
    with pytest.raises(LayoutError, match=match):
        list(layout(to, options).targets(model, Placement(tp=tp)))


def test_what_rtp_llm_does_not_read():
    attention = r"[qkv]_proj is compressed-tensors' packed .* of experts alone"
    refused(attention, "rtp_llm", model_of("int4")[0])
    refused(r"no place for .*up_proj\.weight_zero_point", "rtp_llm", experts_alone("int4-zero")[0])
    for scheme in ("int8-packed", "int4-row"):
        refused("wanted four bits by groups", "rtp_llm", experts_alone(scheme)[0])
    whole = "repacks whole experts .* so 2 ranks do not cut one"
    refused(whole, "rtp_llm", experts_alone("int4")[0], tp=2)
    list(layout("rtp_llm", {"use_stack_weight": "false"}).targets(experts_alone("int4")[0], Placement(tp=2)))


def test_experts_unlike_one_another_are_refused():
    config, t = quantised.made("int4", EXPERTS)
    e = f"{AT}mlp.experts.1."
    t = {n: x for n, x in t.items() if not n.startswith(e)}
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    t |= {f"{e}{p}_proj.weight": torch.zeros(s) for p, s in shapes.items()}
    refused("experts are stored unlike one another", "vllm", recipes.find(config)(memory(t), config))


def test_what_ranks_would_share_is_refused():
    config, t = quantised.made("int4")
    said = quantised.integers(group_size=32)
    t = {n: x[:, ::2] if n.endswith("weight_scale") else x for n, x in t.items()}
    model = recipes.find(config)(memory(t), config | {"quantization_config": said})
    for to, options in (("vllm", {}), ("hf", {"replicate_kv": "true"})):
        refused("o_proj.* cuts a block of 32", to, model, tp=8, **options)


@pytest.mark.parametrize("scheme", ["awq", "gptq"])
def test_experts_that_vllm_holds_otherwise_are_refused(scheme):
    """Its Marlin kernel takes hidden sizes that 128 divides."""
    refused("of 64 inputs in groups of 16: how vLLM holds", "vllm", model_named(scheme, EXPERTS), **ENGINE)


@pytest.mark.parametrize(
    ("scheme", "more", "told"),
    [
        ("gptq", {"sym": False}, "gptq with sym false"),
        ("awq", {}, "awq with 8 bits"),
        ("int4", {"kv_cache_scheme": {"num_bits": 8}}, "pack-quantized with kv_cache_scheme"),
    ],
)
def test_forms_that_were_not_compared_are_refused(scheme, more, told):
    config, t = quantised.made(scheme)
    said = config["quantization_config"] | more
    if told == "awq with 8 bits":
        said["bits"] = 8
        t = {n: torch.cat([x, x], 1) if "qweight" in n or "qzeros" in n else x for n, x in t.items()}
    config = config | {"quantization_config": said}
    model = recipes.model(recipes.find(config), memory(t), config, None)
    refused(f"llama quantised by {told} is not known", "vllm", model, **ENGINE)


def model_named(scheme, count):
    """The model with the config's word for how it is quantised."""
    config, t = quantised.made(scheme, count)
    return recipes.model(recipes.find(config), memory(t, 2), config, None)


@pytest.mark.parametrize(
    "more",
    [
        {"actorder": "group"}, {"num_bits": 3}, {"type": "float"}, {"strategy": "tensor"}, {"group_size": 0},
        {"symmetric": None}, {"group_size": None},
    ],
)  # fmt: skip
def test_other_integers_are_not_read(more):
    config, t = quantised.made("int4")
    with pytest.raises(RecipeError, match="is not read; read are"):
        recipes.find(config)(memory(t), config | {"quantization_config": quantised.integers(**more)})


@pytest.mark.parametrize(
    ("leaf", "change", "match"),
    [
        ("weight_packed", lambda x: x[:, ::2], r"weight_packed: got shape \(128, 4\), wanted \(128, 8\)"),
        ("weight_scale", lambda x: x[:, ::2], r"weight_scale: got shape \(128, 2\), wanted \(128, 4\)"),
        ("weight_zero_point", lambda x: x[::2], r"weight_zero_point: got shape \(8, 4\), wanted \(16, 4\)"),
        ("weight_shape", lambda x: x[:1], r"weight_shape: got shape \(1,\), wanted \(2,\)"),
        ("weight_zero_point", lambda x: None, "needs .*q_proj.weight, which is not there"),
        ("weight_packed", lambda x: x.to(torch.int64), "so it must be int32, got int64"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(leaf, change, match):
    config, t = quantised.made("int4-zero")
    name = f"{AT}self_attn.q_proj.{leaf}"
    changed = t | {name: change(t[name])}
    with pytest.raises(RecipeError, match=match):
        recipes.find(config)(memory({n: x for n, x in changed.items() if x is not None}), config)


def test_an_order_of_inputs_is_refused():
    config, t = quantised.made("int4")
    more = {f"{AT}self_attn.q_proj.weight_g_idx": torch.arange(HIDDEN, dtype=torch.int32)}
    with pytest.raises(RecipeError, match=r"no place for .*q_proj\.weight_g_idx"):
        recipes.find(config)(memory(t | more), config)
