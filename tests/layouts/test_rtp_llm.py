"""`rtp_llm` beyond dense models: latent attention, shared experts, ep x tp x dp grids and fp8 blocks."""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError
from fastckpt.layouts import layout
from fastckpt.layouts.rtp_llm.split import SPLITS
from fastckpt.layouts.rtp_llm.weights import NAMES, TABLES
from fastckpt.placement import Placement
from layouts import families
from layouts.family_oracle import cut
from reading import memory, same, shard

NOPE, ROPE, VALUE, RANK = 8, 4, 6, 16


def halves(gate, up, dim, count, index):
    return torch.cat([cut(gate, dim, count, index), cut(up, dim, count, index)], dim)


def latent(t, at, to, heads, tp, r, absorb=True):
    """DeepSeek's attention of rank r, in [in, out]."""
    out, n = {}, heads // tp
    mine = range(r * n, (r + 1) * n)
    mla, kv_a = to + "mla.", t[at + "kv_a_proj_with_mqa.weight"]
    wide = NOPE + ROPE
    if at + "q_proj.weight" in t:
        q = torch.cat([t[at + "q_proj.weight"][h * wide : (h + 1) * wide] for h in mine])
        out[mla + "fusedqkrope_no_lora.kernel"] = torch.cat([q, kv_a]).t()
    else:
        out[mla + "fusedqkrope.kernel"] = torch.cat([t[at + "q_a_proj.weight"], kv_a]).t()
        q = torch.cat([t[at + "q_b_proj.weight"][h * wide : (h + 1) * wide] for h in mine])
        out[mla + "query_b_weight.kernel"] = q.t()
        out[mla + "query_a_layernorm_weight.gamma"] = t[at + "q_a_layernorm.weight"]
    out[mla + "key_value_a_layernorm_weight.gamma"] = t[at + "kv_a_layernorm.weight"]
    both = NOPE + VALUE
    each = [t[at + "kv_b_proj.weight"][h * both : (h + 1) * both] for h in mine]
    out[mla + "kv_b_weight.kernel"] = torch.cat(each).t()
    if absorb:
        out[mla + "kc.kernel"] = torch.stack([x[:NOPE] for x in each])
        out[mla + "vc.kernel"] = torch.stack([x[NOPE:].t() for x in each])
    out[to + "attention_output_weight.kernel"] = cut(t[at + "o_proj.weight"], 1, tp, r).t()
    return out


def heads_of(x, count, tp, r):
    """Rows of the heads that rank r reads, of `count` q or kv heads; there are 8 query heads."""
    size = x.shape[0] // count
    kv = sorted({h * count // 8 for h in range(r * 8 // tp, (r + 1) * 8 // tp)})
    return torch.cat([x[h * size : (h + 1) * size] for h in kv])


def grouped(t, at, to, kv, tp, r):
    out = {}
    for kind, name in (("weight", "kernel"), ("bias", "bias")):
        if f"{at}q_proj.{kind}" in t:
            parts = [heads_of(t[f"{at}{p}_proj.{kind}"], 8 if p == "q" else kv, tp, r) for p in "qkv"]
            x = torch.cat(parts)
            out[f"{to}query_weight.{name}"] = x.t() if kind == "weight" else x
    out[to + "attention_output_weight.kernel"] = cut(t[at + "o_proj.weight"], 1, tp, r).t()
    for p in "qk":
        if f"{at}{p}_norm.weight" in t:
            out[f"{to}{p}_layernorm.gamma"] = t[f"{at}{p}_norm.weight"]
    return out


def dense(t, at, to, tp, r):
    pair = halves(t[at + "gate_proj.weight"].t(), t[at + "up_proj.weight"].t(), 1, tp, r)
    down = cut(t[at + "down_proj.weight"].t(), 0, tp, r)
    return {to + "intermediate_weight13.kernel": pair, to + "intermediate_weight2.kernel": down}


def experts(t, at, to, grid, rank):
    """The router whole; this rank's experts, each cut by the ranks that share it."""
    tp, dp, ep = grid
    count = len([n for n in t if n.startswith(at + "experts.") and n.endswith("up_proj.weight")])
    moe_tp, moe_rank = (tp * dp // ep, rank // ep) if ep > 1 else (tp, rank % tp)
    k = count // ep
    pairs, downs = [], []
    for e in range(rank % ep * k, rank % ep * k + k):
        gate, up, down = (t[f"{at}experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        pairs.append(halves(up, gate, 0, moe_tp, moe_rank))
        downs.append(cut(down, 1, moe_tp, moe_rank))
    moe = to + "partial_moe_weights."
    out = {
        moe + "gate.kernel": t[at + "gate.weight"].t(),
        moe + "intermediate_weight.kernel": torch.stack(pairs),
        moe + "intermediate_weight2.kernel": torch.stack(downs),
    }
    if at + "gate.e_score_correction_bias" in t:
        out[moe + "e_score_correction_bias"] = t[at + "gate.e_score_correction_bias"].float()
    for shared in ("shared_experts.", "shared_expert."):
        if at + shared + "up_proj.weight" in t:
            out |= dense(t, at + shared, to + "ffn_weights.", tp, rank % tp)
    if at + "shared_expert_gate.weight" in t:
        out[to + "ffn_weights.shared_expert_gate.kernel"] = t[at + "shared_expert_gate.weight"].t()
    return out


def wanted(t, config, grid, rank, absorb=True):
    tp, dp, ep = grid
    r = rank % tp
    key = f"rank_{r:02d}_{rank // tp:02d}_{rank % ep:02d}."
    head = t["lm_head.weight"]
    if tp > 1:
        rows = -(-head.shape[0] // (8 * tp)) * 8 * tp
        head = cut(torch.cat([head, head.new_zeros(rows - head.shape[0], head.shape[1])]), 0, tp, r)
    out = {
        key + "global.embedding": cut(t["model.embed_tokens.weight"], 1, tp, r),
        key + "global.lm_head": head,
        key + "global.final_layernorm.gamma": t["model.norm.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        at, to = f"model.layers.{i}.", f"{key}layers.{i}."
        out[to + "pre_layernorm_weights.gamma"] = t[at + "input_layernorm.weight"]
        out[to + "post_layernorm_weights.gamma"] = t[at + "post_attention_layernorm.weight"]
        sa = to + "self_attention_weights."
        if at + "self_attn.kv_b_proj.weight" in t:
            out |= latent(t, at + "self_attn.", sa, config["num_attention_heads"], tp, r, absorb)
        else:
            part = grouped(t, at + "self_attn.", sa, config["num_key_value_heads"], tp, r)
            bias = sa + "query_weight.bias"
            if bias in part and (tp, dp, ep) != (1, 1, 1):
                part[bias] = part[bias][None]
            out |= part
        if at + "mlp.up_proj.weight" in t:
            out |= dense(t, at + "mlp.", to + "ffn_weights.", tp, r)
        else:
            out |= experts(t, at + "mlp.", to, grid, rank)
    return out


def model_of(name):
    config, hub, _ = families.made(name)
    return recipes.find(config)(memory(hub), config), config, hub


GRIDS = [(tp, 1, 1) for tp in (1, 2, 4, 8)] + [
    (1, 2, 2),
    (2, 1, 2),
    (2, 2, 2),
    (4, 1, 2),
    (2, 3, 6),
    (3, 2, 3),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_and_experts(name, grid):
    model, config, hub = model_of(name)
    tp, dp, ep = grid
    if tp == 3:
        with pytest.raises(LayoutError, match="attention heads 8 does not divide by tp 3"):
            layout("rtp_llm").targets(model, Placement(tp=tp, dp=dp, ep=ep))
        return
    for p in Placement(tp=tp, dp=dp, ep=ep).ranks():
        same(shard(layout("rtp_llm").targets(model, p)), wanted(hub, config, grid, p.rank))


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 1, 2), (1, 4, 4), (2, 2, 4)])
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_shared_experts_and_grids(name, grid):
    model, config, hub = model_of(name)
    tp, dp, ep = grid
    if model.sizes.experts % ep:
        with pytest.raises(LayoutError, match=f"experts do not divide by ep {ep}"):
            layout("rtp_llm").targets(model, Placement(tp=tp, dp=dp, ep=ep))
        return
    for p in Placement(tp=tp, dp=dp, ep=ep).ranks():
        same(shard(layout("rtp_llm").targets(model, p)), wanted(hub, config, grid, p.rank))


@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 2, 4), (4, 1, 4), (2, 2, 2), (4, 2, 4)])
def test_four_experts(grid):
    config, hub, _ = families.made("qwen3_moe")
    hub = {n: x[:4] if n.endswith("mlp.gate.weight") else x for n, x in hub.items() if "experts.4." not in n}
    config = config | {"num_experts": 4}
    model = recipes.find(config)(memory(hub), config)
    tp, dp, ep = grid
    for p in Placement(tp=tp, dp=dp, ep=ep).ranks():
        same(shard(layout("rtp_llm").targets(model, p)), wanted(hub, config, grid, p.rank))


def test_without_what_absorbs():
    model, config, hub = model_of("deepseek_v3")
    for p in Placement(tp=2).ranks():
        got = shard(layout("rtp_llm", {"absorb": "false"}).targets(model, p))
        same(got, wanted(hub, config, (2, 1, 1), p.rank, absorb=False))


REFUSED = [
    ("deepseek_v3", dict(pp=2), "the engine's loader has no stages: wanted pp 1, got 2"),
    ("deepseek_v3", dict(tp=4, ep=3), r"tp \* dp 4 does not divide by ep 3"),
    ("deepseek_v3", dict(tp=4, ep=4), "6 experts do not divide by ep 4"),
    ("deepseek_v3", dict(dp=2), "experts are shared out by ep, got ep 1"),
    ("granite", dict(tp=2, ep=2), "0 experts do not divide by ep 2"),
]


@pytest.mark.parametrize(("name", "sizes", "message"), REFUSED)
def test_grids_that_do_not_fit(name, sizes, message):
    with pytest.raises(LayoutError, match=message):
        layout("rtp_llm").targets(model_of(name)[0], Placement(**sizes))


def test_every_weight_has_a_strategy():
    for kind, table in TABLES.items():
        assert set(table) == set(NAMES), kind
        assert set(table.values()) <= set(SPLITS), kind
    assert len(set(NAMES.values())) == len(NAMES)


# ---- fp8 with factors of 128 x 128 blocks: matrices stay [out, in] ----

SIZES = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=128, vocab_size=32,
             num_hidden_layers=1, tie_word_embeddings=False, rms_norm_eps=1e-6)  # fmt: skip


def fp8(config, shapes):
    """A model whose matrices are bytes, each block's factor another number."""
    at, out = 1, {}
    for name, shape in shapes.items():
        if len(shape) == 1 or "embed" in name or "lm_head" in name or "mlp.gate." in name:
            out[name] = torch.arange(at, at + torch.Size(shape).numel(), dtype=torch.float32).view(shape)
            continue
        g = torch.Generator().manual_seed(at)
        raw = torch.randint(0, 120, shape, dtype=torch.uint8, generator=g)
        out[name] = raw.view(torch.float8_e4m3fn)
        blocks = tuple(-(-n // 128) for n in shape)
        out[name + "_scale_inv"] = torch.arange(at, at + blocks[0] * blocks[1]).float().view(blocks)
        at += blocks[0] * blocks[1]
    return config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, out


def blocked(width=512, count=0):
    """A Llama, or a Qwen3-MoE of `count` experts."""
    at = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (32, 256),
        "lm_head.weight": (32, 256),
        "model.norm.weight": (256,),
    }
    shapes |= {at + n + "_layernorm.weight": (256,) for n in ("input", "post_attention")}
    shapes |= {at + f"self_attn.{p}_proj.weight": (n, 256) for p, n in (("q", 512), ("k", 256), ("v", 256))}
    shapes[at + "self_attn.o_proj.weight"] = (256, 512)
    moe = [f"{at}mlp.experts.{e}." for e in range(count)]
    for block in moe or [at + "mlp."]:
        shapes |= {f"{block}{p}_proj.weight": (width, 256) for p in ("gate", "up")}
        shapes[block + "down_proj.weight"] = (256, width)
    config = SIZES | {"model_type": "llama", "intermediate_size": width}
    if moe:
        shapes |= {at + "mlp.gate.weight": (count, 256)}
        shapes |= {at + f"self_attn.{p}_norm.weight": (128,) for p in "qk"}
        config |= {"model_type": "qwen3_moe", "num_experts": count, "moe_intermediate_size": width,
                   "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
    return fp8(config, shapes)


def blocked_parts(t, tp, r, ep=1):
    """Weights and factors of a rank, cut alike: a factor belongs to 128 rows and columns."""
    at, out = "model.layers.0.", {}
    for suffix, leaf in (("weight", "kernel"), ("weight_scale_inv", "weight_only_quant_scale")):
        x = {p: t[f"{at}self_attn.{p}_proj.{suffix}"] for p in "qkvo"}
        q = cut(x["q"], 0, tp, r)
        k, v = (cut(x[p], 0, min(tp, 2), r * min(tp, 2) // tp) for p in "kv")
        out[f"self_attention_weights.query_weight.{leaf}"] = torch.cat([q, k, v])
        out[f"self_attention_weights.attention_output_weight.{leaf}"] = cut(x["o"], 1, tp, r)
        if f"{at}mlp.up_proj.{suffix}" in t:
            gate, up, down = (t[f"{at}mlp.{p}_proj.{suffix}"] for p in ("gate", "up", "down"))
            out[f"ffn_weights.intermediate_weight13.{leaf}"] = halves(gate, up, 0, tp, r)
            out[f"ffn_weights.intermediate_weight2.{leaf}"] = cut(down, 1, tp, r)
            continue
        count, pairs, downs = 4 // ep, [], []
        share, place = (tp // ep, r // ep) if ep > 1 else (tp, r)
        for e in range(r % ep * count, r % ep * count + count):
            gate, up, down = (t[f"{at}mlp.experts.{e}.{p}_proj.{suffix}"] for p in ("gate", "up", "down"))
            pairs.append(halves(up, gate, 0, share, place))
            downs.append(cut(down, 1, share, place))
        out[f"partial_moe_weights.intermediate_weight.{leaf}"] = torch.stack(pairs)
        out[f"partial_moe_weights.intermediate_weight2.{leaf}"] = torch.stack(downs)
    return out


@pytest.mark.parametrize(
    ("tp", "ep", "count"), [(1, 1, 0), (2, 1, 0), (4, 1, 0), (2, 1, 4), (4, 2, 4), (2, 2, 4)]
)
def test_fp8_blocks(tp, ep, count):
    config, hub = blocked(count=count)
    model = recipes.find(config)(memory(hub), config)
    for p in Placement(tp=tp, ep=ep).ranks():
        got = shard(layout("rtp_llm").targets(model, p))
        at = f"rank_{p.rank:02d}_00_{p.rank % ep:02d}.layers.0."
        want = {at + n: x for n, x in blocked_parts(hub, tp, p.rank, ep).items()}
        same({n: got[n] for n in want}, want)
        rest = [n for n in got if n not in want]
        assert all(any(part in n for part in ("global", "gamma", "moe_weights.gate")) for n in rest), rest


def test_fp8_blocks_that_ranks_would_share():
    for width, tp, message in [
        (384, 2, "gate_proj has 384 on axis 0, which tp 2"),
        (512, 8, "heads 4 does not"),
    ]:
        config, hub = blocked(width)
        model = recipes.find(config)(memory(hub), config)
        with pytest.raises(LayoutError, match=message):
            list(layout("rtp_llm").targets(model, Placement(tp=tp)))
    config, hub = blocked(384, 4)
    model = recipes.find(config)(memory(hub), config)
    with pytest.raises(LayoutError, match="up_proj has 384 on axis 0, which tp 2"):
        list(layout("rtp_llm").targets(model, Placement(tp=4, ep=2)))
    config, hub = blocked(320, 4)
    model = recipes.find(config)(memory(hub), config)
    with pytest.raises(LayoutError, match="up_proj has 320 on axis 0, which tp 1"):
        list(layout("rtp_llm").targets(model, Placement()))  # gate's factors would begin within up's block
