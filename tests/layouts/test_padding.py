"""`vllm` with pad=true: zero heads and widths where they belong, and the same function of the input."""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError
from fastckpt.layouts import layout
from fastckpt.layouts.padding import padded
from fastckpt.placement import Placement
from layouts import families, quantised, tiny
from layouts.test_sharing import fp8, predicting
from reading import memory, shard


def model_of(heads, kv, width, hidden=32, head_dim=4, bias=True):
    """A one-layer Llama of those sizes: (model, tensors)."""
    torch.manual_seed(heads * 100 + kv)
    config = dict(
        model_type="llama", hidden_size=hidden, intermediate_size=width, num_hidden_layers=1, vocab_size=64,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=head_dim, attention_bias=bias,
    )  # fmt: skip
    at = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (64, hidden), "lm_head.weight": (64, hidden)}
    for name, rows in (("q", heads), ("k", kv), ("v", kv)):
        shapes[f"{at}self_attn.{name}_proj.weight"] = (rows * head_dim, hidden)
        shapes[f"{at}self_attn.{name}_proj.bias"] = (rows * head_dim,)
    shapes[f"{at}self_attn.o_proj.weight"] = (hidden, heads * head_dim)
    shapes[f"{at}self_attn.o_proj.bias"] = (hidden,)
    for name in ("gate", "up"):
        shapes[f"{at}mlp.{name}_proj.weight"] = (width, hidden)
    shapes[f"{at}mlp.down_proj.weight"] = (hidden, width)
    for name in (f"{at}input_layernorm", f"{at}post_attention_layernorm", "model.norm"):
        shapes[f"{name}.weight"] = (hidden,)
    tensors = {n: torch.randint(-3, 4, s).float() for n, s in shapes.items()}
    return recipes.find(config)(memory(tensors), config), tensors


def ranks_of(model, tp, **sizes):
    placed = layout("vllm", {"pad": "true"})
    for p in Placement(tp=tp, **sizes).ranks():
        yield {
            n.removeprefix("model.layers.0."): torch.from_numpy(v.view("f4"))
            for n, (_, v) in shard(placed.targets(model, p)).items()
        }


def attend(q, k, v, heads, kv, d):
    """Attention of one token to itself alone would hide q and k: values weighed by integer scores instead."""
    out = []
    for h in range(heads):
        g = h // (heads // kv)
        score = q[h * d : (h + 1) * d] @ k[g * d : (g + 1) * d]
        out.append(score * v[g * d : (g + 1) * d])
    return torch.cat(out)


CASES = [  # heads, kv heads, tp -> padded heads, kv heads
    ((14, 2, 4), (16, 2)),  # each kv head read by two ranks: one query more for each
    ((6, 6, 4), (8, 8)),
    ((12, 3, 2), (16, 4)),
    ((9, 3, 4), (12, 4)),  # neither 3 divides by 4 nor 4 by 3
    ((6, 3, 8), (8, 4)),
    ((8, 4, 2), (8, 4)),
    ((5, 1, 4), (8, 1)),
]


@pytest.mark.parametrize(("sizes", "want"), CASES)
def test_ranks_together_are_the_same_function(sizes, want):
    """The sum over ranks of what each makes of an input, in integers, is what the whole model makes of it."""
    heads, kv, tp = sizes
    d, width = 4, 30
    model, t = model_of(heads, kv, width)
    new = padded(model, tp, tp, 1).sizes
    assert (new.heads, new.kv_heads) == want and new.widths == {"intermediate_size": -(-width // tp) * tp}
    x, at = torch.randint(-3, 4, (32,)).double(), "model.layers.0."
    t = {n: y.double() for n, y in t.items()}
    q, k, v = (t[f"{at}self_attn.{p}_proj.weight"] @ x + t[f"{at}self_attn.{p}_proj.bias"] for p in "qkv")
    attended = t[f"{at}self_attn.o_proj.weight"] @ attend(q, k, v, heads, kv, d)
    fed = t[f"{at}mlp.down_proj.weight"] @ (
        (t[f"{at}mlp.gate_proj.weight"] @ x).relu() * (t[f"{at}mlp.up_proj.weight"] @ x)
    )
    mine, its = new.heads // tp, max(new.kv_heads // tp, 1)
    for rank in ranks_of(model, tp):
        rank = {n: y.double() for n, y in rank.items()}
        qkv = rank["self_attn.qkv_proj.weight"] @ x + rank["self_attn.qkv_proj.bias"]
        parts = qkv.split([mine * d, its * d, its * d])
        attended = attended - rank["self_attn.o_proj.weight"] @ attend(*parts, mine, its, d)
        gate, up = (rank["mlp.gate_up_proj.weight"] @ x).chunk(2)
        fed = fed - rank["mlp.down_proj.weight"] @ (gate.relu() * up)
    assert not attended.any() and not fed.any()


def test_nothing_is_padded_where_all_divides():
    config, hub, _ = tiny.made("qwen3")
    model = recipes.find(config)(memory(hub), config)
    for p in Placement(tp=4).ranks():
        plain, with_pad = (shard(layout("vllm", o).targets(model, p)) for o in ({}, {"pad": "true"}))
        assert sorted(plain) == sorted(with_pad)
        assert all((plain[n][1] == with_pad[n][1]).all() for n in plain)


FULL, ODD = ["full_attention"] * 3, dict(num_attention_heads=6, num_key_value_heads=3)
NOT_PADDED = [
    (
        "mimo_v2_flash",
        ODD | dict(layer_types=FULL),
        "pad: the heads of .*0.self_attn.v_proj are of another size",
    ),
    (
        "laguna",
        dict(num_attention_heads=6, num_key_value_heads=2, num_attention_heads_per_layer=[8, 6, 6]),
        r"pad: model\.layers\.0 has heads of its own number and size",
    ),
    ("afmoe", ODD, r"pad: .*self_attn\.g(ate)?_proj is not padded"),
    ("jamba", dict(intermediate_size=90), r"pad: 1 \* intermediate_size would be 90, .* tp 4 times 1"),
]


@pytest.mark.parametrize(("name", "changes", "message"), NOT_PADDED)
def test_what_is_not_padded(name, changes, message):
    experts = {"ep": 4} if name == "jamba" else {}
    with pytest.raises(LayoutError, match=message):
        list(
            layout("vllm", {"pad": "true"}).targets(
                families.blank(name, **changes), Placement(tp=4, **experts)
            )
        )


def test_heads_of_groups_are_not_padded():
    with pytest.raises(LayoutError, match=r"pad: heads share rows of .*wo_a, and none are added"):
        placed = layout("hf", {"pad": "true", "vocab_padding": "3"})
        list(placed.targets(families.blank("deepseek_v4"), Placement(tp=3)))


@pytest.mark.parametrize(
    ("options", "tp", "message"),
    [
        ({"vocab_padding": "48"}, 3, r"q_proj: heads of a quantised matrix cannot be padded"),
        ({"multiple": "96"}, 2, r"gate_proj: a matrix of packed values cannot be padded"),
    ],
)
def test_packed_values_are_not_padded(options, tp, message):
    config, t = quantised.made("awq")
    with pytest.raises(LayoutError, match=message):
        list(
            layout("vllm", {"pad": "true"} | options).targets(
                recipes.find(config)(memory(t), config), Placement(tp=tp)
            )
        )


@pytest.mark.parametrize(
    ("ep", "key"), [(1, "intermediate_size 90 .* tp .* 4"), (4, r"1 \* intermediate_size 90 .* tp 4")]
)
def test_a_dense_block_as_wide_as_an_expert(ep, key):
    """Jamba's: ranks that share experts out cut it all the same."""
    with pytest.raises(LayoutError, match=f"^layout vllm: {key}; pad=True"):
        layout("vllm").targets(families.blank("jamba", intermediate_size=90), Placement(tp=4, ep=ep))


def test_a_width_no_config_can_say():
    with pytest.raises(LayoutError, match=r"the config of mpt has no key to say that 4 \* d_model is 288"):
        layout("vllm", {"pad": "true", "multiple": "96"}).resized(families.blank("mpt"), Placement())


def test_layers_of_one_block():
    """Nemotron-H: attention gets heads, blocks get width, layers of a mixer stay as they are."""
    model = families.blank("nemotron_h", moe_intermediate_size=23, intermediate_size=94, **ODD)
    shapes = [
        {t.name: t.view.shape for t in layout("vllm", {"pad": "true"}).targets(model, p)}
        for p in Placement(tp=4).ranks()
    ]
    at = "model.layers."
    assert {s[f"{at}2.mixer.qkv_proj.weight"] for s in shapes} == {(4 * 12, 64)}
    assert {s[f"{at}3.mixer.up_proj.weight"] for s in shapes} == {(24, 64)}
    assert {s[f"{at}1.mixer.experts.w13_weight"] for s in shapes} == {(5, 6, 64)}


def test_layers_that_predict_more_tokens():
    config, hub, extra = predicting("glm4_moe")
    model = recipes.find(config)(memory(hub | extra), config)
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    placed, got = layout("hf", {"pad": "true", "multiple": "16"}), []
    for p in Placement(tp=4).ranks():
        got.append(torch.from_numpy(shard(placed.targets(model, p))[name][1].view("f4")))
    whole = torch.cat(got, 1)
    assert torch.equal(whole[:, :24], extra[name]) and whole.shape == (64, 64) and not whole[:, 24:].any()


def test_uneven_sizes_are_refused_unless_asked():
    model, _ = model_of(14, 2, 30)
    with pytest.raises(LayoutError, match="attention heads 14 does not divide by tp 4"):
        layout("vllm").targets(model, Placement(tp=4))


def test_experts_and_latent_heads():
    config, hub, _ = families.made("deepseek_v3")
    model = recipes.find(config)(memory(hub), config)
    assert model.sizes.widths["moe_intermediate_size"] == 24
    whole = padded(model, 3, 9, 1)
    assert (whole.sizes.heads, whole.sizes.widths["moe_intermediate_size"]) == (9, 27)
    placed, at = layout("vllm", {"pad": "true", "vocab_padding": "48"}), "model.layers.1."
    ranks = [
        {n: torch.from_numpy(v.view("f4")) for n, (_, v) in shard(placed.targets(model, p)).items()}
        for p in Placement(tp=3).ranks()
    ]
    for name, rows in (("q_b_proj", 12), ("kv_b_proj", 14)):
        got = torch.cat([r[f"{at}self_attn.{name}.weight"] for r in ranks])
        assert torch.equal(got[: 8 * rows], hub[f"{at}self_attn.{name}.weight"])
        assert got.shape[0] == 9 * rows and not got[8 * rows :].any()
    o = torch.cat([r[f"{at}self_attn.o_proj.weight"] for r in ranks], 1)
    assert torch.equal(o[:, :48], hub[f"{at}self_attn.o_proj.weight"]) and not o[:, 48:].any()
    w13 = [r[f"{at}mlp.experts.w13_weight"] for r in ranks]
    gate = torch.cat([x[2].chunk(2)[0] for x in w13])
    assert torch.equal(gate, hub[f"{at}mlp.experts.2.gate_proj.weight"])


def test_widths_end_between_blocks():
    config, hub = fp8((8, 8))
    model = recipes.find(config)(memory(hub), config)
    placed, at = layout("vllm", {"pad": "true"}), "model.layers.1.mlp.experts."
    for p in Placement(tp=2).ranks():
        got = shard(placed.targets(model, p))
        assert got[f"{at}w13_weight"][1].shape == (6, 32, 64)
        factors = torch.from_numpy(got[f"{at}w13_weight_scale_inv"][1].view("f4"))
        both = torch.from_numpy(got[f"{at}w13_weight"][1])
        for e in range(6):
            for half, name in enumerate(("gate", "up")):
                rows = torch.cat([hub[f"{at}{e}.{name}_proj.weight"].view(torch.uint8), torch.zeros(8, 64)])
                scale = torch.cat([hub[f"{at}{e}.{name}_proj.weight_scale_inv"], torch.zeros(1, 8)])
                assert torch.equal(both[e].chunk(2)[half], rows.chunk(2)[p.rank].byte())
                assert torch.equal(factors[e].chunk(2)[half], scale.chunk(2)[p.rank])


def test_stacked_experts_and_sinks():
    config, hub, _ = families.made("gpt_oss")
    model = recipes.find(config)(memory(hub), config)
    placed, at, tp = layout("vllm", {"pad": "true", "vocab_padding": "40"}), "model.layers.1.", 5
    ranks = [
        {n: torch.from_numpy(v.view("f4")) for n, (_, v) in shard(placed.targets(model, p)).items()}
        for p in Placement(tp=tp).ranks()
    ]
    for name, dim, source, size in [
        (f"{at}mlp.experts.w13_weight", 1, hub[f"{at}mlp.experts.gate_up_proj"].transpose(1, 2), 192),
        (f"{at}mlp.experts.w13_bias", 1, hub[f"{at}mlp.experts.gate_up_proj_bias"], 192),
        (f"{at}mlp.experts.w2_weight", 2, hub[f"{at}mlp.experts.down_proj"].transpose(1, 2), 96),
        (f"{at}attn.sinks", 0, hub[f"{at}self_attn.sinks"], 8),
    ]:
        got = torch.cat([r[name] for r in ranks], dim)
        assert torch.equal(got.narrow(dim, 0, size), source)
        assert got.shape[dim] == {192: 200, 96: 100, 8: 10}[size]
        assert not got.narrow(dim, size, got.shape[dim] - size).any()
    biases = [r[f"{at}mlp.experts.w2_bias"] for r in ranks]
    assert torch.equal(sum(biases), hub[f"{at}mlp.experts.down_proj_bias"]) and not any(
        b.any() for b in biases[1:]
    )
