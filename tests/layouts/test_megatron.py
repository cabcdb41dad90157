"""`megatron` against torch: interleaved q, k and v, gate and up by rank, padded vocabulary, stages."""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError
from fastckpt.layouts import layout
from fastckpt.layouts.megatron import Megatron
from fastckpt.placement import Placement
from layouts import families, quantised, tiny
from reading import memory, same, shard


def rows(x, tp, r):
    n = x.shape[0] // tp
    assert n * tp == x.shape[0]
    return x[r * n : (r + 1) * n]


def columns(x, tp, r):
    return rows(x.t(), tp, r).t()


def vocabulary(x, tp, r, multiple=128):
    count = -(-x.shape[0] // (multiple * tp)) * multiple * tp
    return rows(torch.cat([x, torch.zeros(count - x.shape[0], x.shape[1], dtype=x.dtype)]), tp, r)


def interleaved(q, k, v, heads, kv, d):
    out = []
    for i in range(kv):
        for h in range(i * heads // kv, (i + 1) * heads // kv):
            out.append(q[h * d : (h + 1) * d])
        out += [k[i * d : (i + 1) * d], v[i * d : (i + 1) * d]]
    return torch.cat(out)


def block(t, at, names, to, tp, r):
    """gate, up, down of a block; None for no gate."""
    gate, up, down = names
    out = {}
    for kind in ("weight", "bias"):
        if f"{at}{up}.{kind}" in t:
            both = [t[f"{at}{n}.{kind}"] for n in (gate, up) if n]
            out[f"{to}linear_fc1.{kind}"] = torch.cat([rows(x, tp, r) for x in both])
    out[to + "linear_fc2.weight"] = columns(t[f"{at}{down}.weight"], tp, r)
    if f"{at}{down}.bias" in t:
        out[to + "linear_fc2.bias"] = t[f"{at}{down}.bias"]
    return out


def llama(t, config, tp, r, *, layers=None, first=True, last=True, experts=None):
    """What rank r of tp holds, named as Transformer Engine's modules name it."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or config["hidden_size"] // heads
    out = {}
    if first:
        out["embedding.word_embeddings.weight"] = vocabulary(t["model.embed_tokens.weight"], tp, r)
    for local, i in enumerate(layers or range(config["num_hidden_layers"])):
        at, to = f"model.layers.{i}.", f"decoder.layers.{local}."
        a, sa = at + "self_attn.", to + "self_attention."
        for kind in ("weight", "bias"):
            if f"{a}q_proj.{kind}" in t:
                q, k, v = (t[f"{a}{p}_proj.{kind}"] for p in "qkv")
                out[f"{sa}linear_qkv.{kind}"] = rows(interleaved(q, k, v, heads, kv, d), tp, r)
        out[sa + "linear_qkv.layer_norm_weight"] = t[at + "input_layernorm.weight"]
        out[sa + "linear_proj.weight"] = columns(t[a + "o_proj.weight"], tp, r)
        if a + "o_proj.bias" in t:
            out[sa + "linear_proj.bias"] = t[a + "o_proj.bias"]
        for p in "qk":
            if f"{a}{p}_norm.weight" in t:
                out[f"{sa}{p}_layernorm.weight"] = t[f"{a}{p}_norm.weight"]
        norm, m = t[at + "post_attention_layernorm.weight"], to + "mlp."
        if at + "mlp.up_proj.weight" in t:
            out[m + "linear_fc1.layer_norm_weight"] = norm
            out |= block(t, at + "mlp.", ("gate_proj", "up_proj", "down_proj"), m, tp, r)
            continue
        out[to + "pre_mlp_layernorm.weight"] = norm
        mixtral = at + "block_sparse_moe.gate.weight" in t
        moe = at + ("block_sparse_moe." if mixtral else "mlp.")
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        out[m + "router.weight"] = t[moe + "gate.weight"]
        count = config.get("num_local_experts") or config["num_experts"]
        for local, e in enumerate(range(count) if experts is None else experts):
            one = block(t, f"{moe}experts.{e}.", names, "", tp, r)
            out |= {f"{m}experts.{n}{local}": x for n, x in one.items()}
        if moe + "shared_expert.up_proj.weight" in t:
            out |= block(t, moe + "shared_expert.", names, m + "shared_experts.", tp, r)
            out[m + "shared_experts.gate_weight"] = t[moe + "shared_expert_gate.weight"]
    if last:
        out["decoder.final_layernorm.weight"] = t["model.norm.weight"]
        if not config["tie_word_embeddings"]:
            out["output_layer.weight"] = vocabulary(t["lm_head.weight"], tp, r)
        elif not first:
            out["output_layer.weight"] = vocabulary(t["model.embed_tokens.weight"], tp, r)
    return out


def gpt2(t, config, tp, r):
    heads, hidden = config["n_head"], config["n_embd"]
    out = {
        "embedding.word_embeddings.weight": vocabulary(t["transformer.wte.weight"], tp, r),
        "embedding.position_embeddings.weight": t["transformer.wpe.weight"],
    }
    for i in range(config["n_layer"]):
        at, to = f"transformer.h.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias"):
            q, k, v = t[f"{at}attn.c_attn.{kind}"].t().split(hidden)
            qkv = interleaved(q, k, v, heads, heads, hidden // heads)
            out[f"{to}self_attention.linear_qkv.{kind}"] = rows(qkv, tp, r)
            out[f"{to}self_attention.linear_qkv.layer_norm_{kind}"] = t[f"{at}ln_1.{kind}"]
            out[f"{to}mlp.linear_fc1.{kind}"] = rows(t[f"{at}mlp.c_fc.{kind}"].t(), tp, r)
            out[f"{to}mlp.linear_fc1.layer_norm_{kind}"] = t[f"{at}ln_2.{kind}"]
            out[f"decoder.final_layernorm.{kind}"] = t[f"transformer.ln_f.{kind}"]
        for hub, name in (("attn", "self_attention.linear_proj"), ("mlp", "mlp.linear_fc2")):
            out[f"{to}{name}.weight"] = columns(t[f"{at}{hub}.c_proj.weight"].t(), tp, r)
            out[f"{to}{name}.bias"] = t[f"{at}{hub}.c_proj.bias"]
    return out


def model_of(name):
    config, hub, *_ = families.made(name) if name in families.FAMILIES else tiny.made(name)
    return recipes.find(config)(memory(hub), config), config, hub


NAMES = [
    "llama",
    "biased",
    "tied",
    "mistral-mqa",
    "qwen2",
    "qwen3",
    "mixtral",
    "mixtral-odd",
    "qwen2_moe",
    "gpt2",
]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_every_rank(name, tp):
    model, config, hub = model_of(name)
    if (name, tp) == ("mistral-mqa", 8):
        with pytest.raises(LayoutError, match="query, key and value rows 60 does not divide by tp 8"):
            layout("megatron").targets(model, Placement(tp=tp))
        return
    for p in Placement(tp=tp).ranks():
        want = (gpt2 if name == "gpt2" else llama)(hub, config, tp, p.rank)
        same(shard(layout("megatron").targets(model, p)), want)


@pytest.mark.parametrize("name", ["tied", "mixtral"])
def test_stages(name):
    model, config, hub = model_of(name)
    for p in Placement(tp=2, pp=2).ranks():
        stage = dict(layers=[p.pp_rank], first=p.pp_rank == 0, last=p.pp_rank == 1)
        same(shard(layout("megatron").targets(model, p)), llama(hub, config, 2, p.tp_rank, **stage))
    assert layout("megatron").naming(Placement(tp=2, pp=2, rank=3)).directory == "mp_rank_01_001"
    assert layout("megatron").naming(Placement(tp=2, rank=1)).directory == "mp_rank_01"


STAGES = [
    ((3, 2, 0, 0), None),
    ((3, 2, 1, 0), [1, 2]),
    ((3, 2, 0, 1), [2, 1]),
    ((3, 2, 2, 1), [2, 1]),
    ((3, 2, 2, 2), None),
    ((3, 3, 0, 0), [1, 1, 1]),
    ((3, 3, 2, 0), None),
    ((3, 2, 3, 0), None),
]
"""(layers, pp, first_stage, last_stage) -> each stage's layers, by get_num_layers_to_build's rule."""


@pytest.mark.parametrize(("sizes", "want"), STAGES)
def test_stages_of_other_sizes(sizes, want):
    _, pp, first, last = sizes
    model, config, hub = model_of("qwen3_moe")  # 3 layers
    options = {"first_stage": str(first), "last_stage": str(last)}
    if want is None:
        with pytest.raises(LayoutError, match=f"3 layers.* do not divide by pp {pp}"):
            layout("megatron", options).targets(model, Placement(tp=2, pp=pp))
        return
    for p in Placement(tp=2, pp=pp).ranks():
        held = range(sum(want[: p.pp_rank]), sum(want[: p.pp_rank + 1]))
        stage = dict(layers=held, first=p.pp_rank == 0, last=p.pp_rank == pp - 1)
        got = shard(layout("megatron", options).targets(model, p))
        same(got, llama(hub, config, 2, p.tp_rank, **stage))


@pytest.mark.parametrize("name", ["expert_tp", "first_stage", "last_stage"])
def test_options_below_zero(name):
    with pytest.raises(LayoutError, match=f"{name} must be at least 0, got -1"):
        Megatron(**{name: -1})


@pytest.mark.parametrize("tp", [1, 2])
def test_experts_by_group(tp):
    """3 experts over 3 groups of tp ranks; all else is held alike."""
    model, config, hub = model_of("mixtral")
    for p in Placement(tp=tp, dp=3, ep=3).ranks():
        want = llama(hub, config, tp, p.rank % tp, experts=[p.rank // tp])
        same(shard(layout("megatron").targets(model, p)), want)
    assert layout("megatron").naming(Placement(tp=2, dp=3, ep=3, rank=5)).directory == "mp_rank_01_002"


def test_other_names():
    model, config, hub = model_of("mixtral")
    got = shard(layout("megatron", {"spec": "local", "experts": "sequential"}).targets(model, Placement()))
    want = {}
    for name, x in llama(hub, config, 1, 0).items():
        name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        for fc in ("linear_fc1", "linear_fc2"):
            part = f"experts.{fc}.weight"
            if part in name:
                e = name.rpartition("weight")[2]
                name = name.replace(f"{part}{e}", f"experts.local_experts.{e}.{fc}.weight")
        want[name] = x
    same(got, want)


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(32001, 2, 32256), (32000, 1, 32000), (1010, 2, 1024)])
def test_vocabulary_sizes_by_hand(vocab, tp, padded):
    table = memory({"x": torch.ones(vocab, 1)})["x"]
    got = [layout("megatron")._rows(table, Placement(tp=tp, rank=r)).shape[0] for r in range(tp)]
    assert got == [padded // tp] * tp


REFUSED = [
    ("qwen3", dict(dp=2), r"wanted tp \* dp equal to expert_tp \* ep 1, got 2"),
    ("mixtral", dict(tp=2, ep=2), r"wanted tp \* dp equal to expert_tp \* ep 4, got 2"),
    ("mixtral", dict(dp=2, ep=2), "3 experts do not divide by ep 2"),
    ("qwen3", dict(dp=2, ep=2), "0 experts do not divide by ep 2"),
    ("qwen3", dict(tp=3), "attention heads 8 does not divide by tp 3"),
    ("qwen3", dict(pp=3), "2 layers do not divide by pp 3"),
    ("deepseek_v2-lora", dict(tp=2), "no place for model.layers.0.self_attn.q_a_proj.bias"),
    ("gemma2", dict(tp=2), "no place for model.layers.0.post_attention_layernorm"),
    ("gemma", dict(tp=2), "layernorm.weight is the factor less 1: wanted zero_centered_gamma=True"),
    ("falcon-new", dict(tp=2), "no blocks side by side, as falcon wants"),
    ("falcon-rw", dict(tp=2), "no ALiBi, as falcon wants"),
    ("qwen3_next", dict(tp=1), "no place for the linear attention of model.layers.0"),
]


@pytest.mark.parametrize(("name", "sizes", "message"), REFUSED)
def test_what_has_no_place(name, sizes, message):
    with pytest.raises(LayoutError, match=message):
        list(layout("megatron").targets(model_of(name)[0], Placement(**sizes)))


def test_norms_around_one():
    """Gemma's norms are stored as megatron's zero-centred ones; others are not."""
    model, _, hub = model_of("gemma")
    got = shard(layout("megatron", {"zero_centered_gamma": "true"}).targets(model, Placement()))
    same({"x": got["decoder.final_layernorm.weight"]}, {"x": hub["model.norm.weight"]})
    with pytest.raises(LayoutError, match=r"is the factor itself: wanted zero_centered_gamma=False"):
        list(layout("megatron", {"zero_centered_gamma": "true"}).targets(model_of("qwen3")[0], Placement()))


def test_quantised_matrices_are_refused():
    config, hub = quantised.made("int8")
    model = recipes.find(config)(memory(hub), config)
    with pytest.raises(LayoutError, match=r"no place for .*q_proj.weight_scale"):
        list(layout("megatron").targets(model, Placement()))


@pytest.mark.parametrize(
    ("block", "message"),
    [("all", "q_proj: matrices with one scale each are not written as one"),
     (16, r"q_proj: 4 shares of 32 rows of .*k_proj do not end with blocks of 16")],
)  # fmt: skip
def test_scales_that_groups_would_tear(block, message):
    with pytest.raises(LayoutError, match=message):
        list(
            layout("megatron").targets(
                families.blank("ministral", lambda hub: quantised.bytes_of(hub, block)), Placement()
            )
        )


def test_experts_whose_width_does_not_divide():
    model, grid = families.blank("qwen3_moe"), Placement(tp=2, dp=5)
    with pytest.raises(LayoutError, match="moe_intermediate_size 24 does not divide by expert_tp 10"):
        layout("megatron", {"expert_tp": "10"}).targets(model, grid)


EXPERT_GRIDS = [(1, 1, 1, 1), (2, 1, 1, 2), (2, 3, 3, 2), (1, 3, 3, 1), (2, 3, 6, 1)]


@pytest.mark.parametrize(("tp", "dp", "ep", "etp"), EXPERT_GRIDS)
def test_experts_with_biases(tp, dp, ep, etp):
    """gpt-oss: gate and up apart, each expert by itself, sinks by head; ranks that cut an expert, or not."""
    model, _, hub = model_of("gpt_oss")
    options = {"expert_tp": str(etp)}
    if 3 % ep:
        with pytest.raises(LayoutError, match="3 experts do not divide by ep 6"):
            layout("megatron", options).targets(model, Placement(tp=tp, dp=dp, ep=ep))
        return
    for p in Placement(tp=tp, dp=dp, ep=ep).ranks():
        got, r = shard(layout("megatron", options).targets(model, p)), p.tp_rank
        part, mine = p.rank % etp, range(p.rank // etp % ep * (3 // ep), (p.rank // etp % ep + 1) * (3 // ep))
        for i in range(2):
            at, to, want = f"model.layers.{i}.", f"decoder.layers.{i}.", {}
            for local, e in enumerate(mine):
                both, bias = (hub[f"{at}mlp.experts.gate_up_proj{kind}"][e] for kind in ("", "_bias"))
                for leaf, x in (("weight", both.t()), ("bias", bias)):
                    halves = [rows(x[k::2], etp, part) for k in range(2)]
                    want[f"{to}mlp.experts.linear_fc1.{leaf}{local}"] = torch.cat(halves)
                down = hub[at + "mlp.experts.down_proj"][e].t()
                want[f"{to}mlp.experts.linear_fc2.weight{local}"] = columns(down, etp, part)
                want[f"{to}mlp.experts.linear_fc2.bias{local}"] = hub[at + "mlp.experts.down_proj_bias"][e]
            want[to + "mlp.router.weight"] = hub[at + "mlp.router.weight"]
            want[to + "mlp.router.bias"] = hub[at + "mlp.router.bias"]
            sinks = rows(hub[at + "self_attn.sinks"], tp, r)
            want[to + "self_attention.core_attention.softmax_offset"] = sinks
            chosen = {n for n in got if n.startswith(to) and (".mlp." in n or "softmax" in n)}
            same({n: got[n] for n in chosen}, want)


@pytest.mark.parametrize("spec", ["transformer_engine", "local"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention(name, tp, spec):
    model, _, hub = model_of(name)
    for p in Placement(tp=tp).ranks():
        got, r = shard(layout("megatron", {"spec": spec}).targets(model, p)), p.rank
        for i in range(2):
            a, to, want = f"model.layers.{i}.self_attn.", f"decoder.layers.{i}.", {}
            sa, fused = to + "self_attention.", spec == "transformer_engine"
            whole = [("kv", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")]
            if a + "q_proj.weight" in hub:
                want[sa + "linear_q_proj.weight"] = rows(hub[a + "q_proj.weight"], tp, r)
            else:
                whole.append(("q", "q_a_proj", "q_a_layernorm", "q_b_proj"))
            for kind, low, norm, high in whole:
                x = hub[f"{a}{low}.weight"]
                want[f"{sa}linear_{kind}_down_proj.weight"] = x if fused else rows(x, tp, r)
                place = f"linear_{kind}_up_proj.layer_norm_weight" if fused else f"{kind}_layernorm.weight"
                want[sa + place] = hub[f"{a}{norm}.weight"]
                want[f"{sa}linear_{kind}_up_proj.weight"] = rows(hub[f"{a}{high}.weight"], tp, r)
            want[sa + "linear_proj.weight"] = columns(hub[a + "o_proj.weight"], tp, r)
            want[to + "input_layernorm.weight"] = hub[f"model.layers.{i}.input_layernorm.weight"]
            chosen = {n for n in got if n.startswith((sa, to + "input"))}
            same({n: got[n] for n in chosen}, want)
