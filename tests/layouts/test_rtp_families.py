"""`rtp_llm` of families that are no Llama: norms with biases, no gate, positions, ALiBi, parallel blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import fastckpt
import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError
from fastckpt.layouts import layout
from fastckpt.model import Experts, Layers, Lazy
from fastckpt.placement import Placement
from layouts import families, family_oracle, oracle, tiny
from layouts.family_oracle import cut
from outputs import hub_directory
from reading import memory, same, shard
from safetensors.torch import load_file

SLOPES = [2.0 ** -(i + 1) for i in range(8)]

NAMES = {
    "gpt2": dict(
        stem="transformer.", layers="h", norms=("pre_layernorm_weights", "post_layernorm_weights"),
        hub=("ln_1", "ln_2"), final="ln_f", attn="attn.c_attn", o="attn.c_proj", up="mlp.c_fc",
        down="mlp.c_proj", table="wte", conv=True,
    ),
    "bloom": dict(
        stem="transformer.", layers="h", norms=("pre_layernorm_weights", "post_layernorm_weights"),
        hub=("input_layernorm", "post_attention_layernorm"), final="ln_f",
        attn="self_attention.query_key_value",
        o="self_attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", table="word_embeddings",
    ),
}  # fmt: skip
NAMES["falcon-rw"] = NAMES["bloom"]
NAMES["falcon-mqa"] = NAMES["bloom"] | dict(
    norms=("pre_layernorm_weights", None), hub=("input_layernorm", None)
)
NAMES["falcon-11b"] = NAMES["falcon-mqa"]
SIDE = ("pre_attn_layernorm_weights", "pre_layernorm_weights")
NAMES["falcon-new"] = NAMES["bloom"] | dict(norms=SIDE, hub=("ln_attn", "ln_mlp"))
NAMES["gpt_neox"] = NAMES["bloom"] | dict(
    stem="gpt_neox.", layers="layers", norms=SIDE, final="final_layer_norm", attn="attention.query_key_value",
    o="attention.dense", table="embed_in",
)  # fmt: skip
HEADS = {"gpt2": (8, 8, 8)}


def of_heads(x, heads, tp, r, grouped):
    """Rows of q, k and v of rank r, of a matrix or vector that holds them all."""
    q, k, v = family_oracle.parts(x, heads, grouped)
    n, kv, d = heads
    mine = range(r * n // tp, (r + 1) * n // tp)
    kv_mine = sorted({h * kv // n for h in mine})
    return torch.cat(
        [y[h * d : (h + 1) * d] for y, hs in ((q, mine), (k, kv_mine), (v, kv_mine)) for h in hs]
    )


def wanted(name, hub, layers, heads, tp, r):
    say, key, out = NAMES[name], f"rank_{r:02d}_00_00.", {}
    stem = say["stem"]

    def norm(at, to, beta="beta"):
        out[f"{to}.gamma"] = hub[f"{at}.weight"]
        if f"{at}.bias" in hub:
            out[f"{to}.{beta}"] = hub[f"{at}.bias"]

    def matrix(at):
        x = hub[f"{at}.weight"]
        return x if say.get("conv") else x.t()

    table = hub[f"{stem}{say['table']}.weight"]
    out[key + "global.embedding"] = cut(table, 1, tp, r)
    head = hub.get("lm_head.weight", hub.get("embed_out.weight", table))
    rows = -(-head.shape[0] // (8 * tp)) * 8 * tp
    padded = torch.cat([head, head.new_zeros(rows - head.shape[0], head.shape[1])])
    out[key + "global.lm_head"] = head if tp == 1 else cut(padded, 0, tp, r)
    norm(f"{stem}{say['final']}", key + "global.final_layernorm")
    if name == "gpt2":
        out[key + "global.position_encoding.weight"] = cut(hub[stem + "wpe.weight"], 1, tp, r)
    if name == "bloom":
        norm(f"{stem}word_embeddings_layernorm", key + "global.pre_decoder_layernorm", "bias")
    if name in ("bloom", "falcon-rw"):
        out[key + "global.linear_bias_slopes"] = cut(torch.tensor(SLOPES), 0, tp, r)
    for i in range(layers):
        at, to = f"{stem}{say['layers']}.{i}.", f"{key}layers.{i}."
        for leaf, role in zip(say["hub"], say["norms"], strict=True):
            if leaf is not None:
                norm(at + leaf, to + role)
        a = to + "self_attention_weights."
        qkv = of_heads(matrix(at + say["attn"]).t(), heads, tp, r, not say.get("conv"))
        out[a + "query_weight.kernel"] = qkv.t()
        if f"{at}{say['attn']}.bias" in hub:
            bias = of_heads(hub[f"{at}{say['attn']}.bias"], heads, tp, r, not say.get("conv"))
            out[a + "query_weight.bias"] = bias[None] if tp > 1 else bias
            out[a + "attention_output_weight.bias"] = hub[f"{at}{say['o']}.bias"]
        out[a + "attention_output_weight.kernel"] = cut(matrix(at + say["o"]), 0, tp, r)
        f = to + "ffn_weights."
        out[f + "intermediate_weight3.kernel"] = cut(matrix(at + say["up"]), 1, tp, r)
        out[f + "intermediate_weight2.kernel"] = cut(matrix(at + say["down"]), 0, tp, r)
        if f"{at}{say['up']}.bias" in hub:
            out[f + "intermediate_weight3.bias"] = cut(hub[f"{at}{say['up']}.bias"], 0, tp, r)
            out[f + "intermediate_weight2.bias"] = hub[f"{at}{say['down']}.bias"]
    return out


def model_of(name, **changes):
    config, hub, _ = families.made(name) if name in families.FAMILIES | families.ENCODERS else tiny.made(name)
    config = config | changes
    return recipes.find(config)(memory(hub, 2), config), hub


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", list(NAMES))
def test_every_rank(name, tp):
    model, hub = model_of(name)
    heads = HEADS.get(name) or families.FAMILIES[name].heads
    for p in Placement(tp=tp).ranks():
        got = shard(layout("rtp_llm").targets(model, p))
        same(got, wanted(name, hub, len(model.layers), heads, tp, p.rank))


def test_norms_one_after_the_other():
    """NeoX without parallel residual: the second norm stands after attention."""
    got = shard(layout("rtp_llm").targets(model_of("gpt_neox", use_parallel_residual=False)[0], Placement()))
    at = "rank_00_00_00.layers.0."
    assert at + "post_layernorm_weights.gamma" in got
    assert at + "pre_attn_layernorm_weights.gamma" not in got


@pytest.mark.parametrize("tp", [1, 2])
def test_an_encoder(tp):
    _, hub = model_of("bert-alone")
    hub = {n: x for n, x in hub.items() if "pooler" not in n}
    config = families.made("bert-alone")[0]
    model = recipes.find(config)(memory(hub), config)
    for p in Placement(tp=tp).ranks():
        got, r = shard(layout("rtp_llm").targets(model, p)), p.rank
        key, want = f"rank_{r:02d}_00_00.", {}
        for part, name in (
            ("word", "embedding"), ("position", "position_encoding.weight"),
            ("token_type", "token_type_embedding.weight"),
        ):  # fmt: skip
            want[f"{key}global.{name}"] = cut(hub[f"embeddings.{part}_embeddings.weight"], 1, tp, r)
        want[f"{key}global.pre_decoder_layernorm.gamma"] = hub["embeddings.LayerNorm.weight"]
        want[f"{key}global.pre_decoder_layernorm.bias"] = hub["embeddings.LayerNorm.bias"]
        for i in range(2):
            at, to = f"encoder.layer.{i}.", f"{key}layers.{i}."
            for leaf, role in (
                ("attention.output.LayerNorm", "post_layernorm_weights"),
                ("output.LayerNorm", "post_ffn_layernorm_weights"),
            ):
                want[f"{to}{role}.gamma"], want[f"{to}{role}.beta"] = (
                    hub[f"{at}{leaf}.{kind}"] for kind in ("weight", "bias")
                )
            a, f = to + "self_attention_weights.", to + "ffn_weights."
            self_ = f"{at}attention.self."
            qkv = [cut(hub[f"{self_}{n}.weight"], 0, tp, r) for n in ("query", "key", "value")]
            want[a + "query_weight.kernel"] = torch.cat(qkv).t()
            bias = torch.cat([cut(hub[f"{self_}{n}.bias"], 0, tp, r) for n in ("query", "key", "value")])
            want[a + "query_weight.bias"] = bias[None] if tp > 1 else bias
            o, up, down = (f"{at}{n}.dense." for n in ("attention.output", "intermediate", "output"))
            want[a + "attention_output_weight.kernel"] = cut(hub[o + "weight"], 1, tp, r).t()
            want[a + "attention_output_weight.bias"] = hub[o + "bias"]
            want[f + "intermediate_weight3.kernel"] = cut(hub[up + "weight"], 0, tp, r).t()
            want[f + "intermediate_weight3.bias"] = cut(hub[up + "bias"], 0, tp, r)
            want[f + "intermediate_weight2.kernel"] = cut(hub[down + "weight"], 1, tp, r).t()
            want[f + "intermediate_weight2.bias"] = hub[down + "bias"]
        same(got, want)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("bert-alone", "pooler"), ("bert", "cls.predictions"), ("t5", "encoder of t5"),
        ("glm4", "post_self_attn"), ("gemma3", "layernorm"),
    ],
)  # fmt: skip
def test_what_has_no_place(name, what):
    with pytest.raises(LayoutError, match=what):
        list(layout("rtp_llm").targets(model_of(name)[0], Placement(tp=2)))


def test_experts_without_gates():
    model = families.blank("qwen3_moe")
    layer = next(x for x in model.layers if isinstance(x.mlp, Experts))
    bare = [partial(replace, expert, gate=None) for expert in layer.mlp.experts]
    layer = replace(layer, mlp=replace(layer.mlp, experts=Lazy(bare)))
    with pytest.raises(LayoutError, match=r"no place for .*experts\.0\.up_proj, an expert without a gate"):
        list(layout("rtp_llm").targets(replace(model, layers=Layers([lambda: layer])), Placement()))


@pytest.mark.parametrize(("dtype", "tp"), [(None, 1), ("bfloat16", 2)])
def test_norms_that_hold_one_less(tmp_path, dtype, tp):
    """Gemma: 1 + weight, summed in float32 and rounded once; on the road, as it is made when read."""
    config, hub, _ = families.made("gemma")
    hub = {n: x / 977 for n, x in hub.items()}
    source, out = hub_directory(tmp_path / "hub", config, hub), tmp_path / "served"
    fastckpt.reshard(source, tp, layout="rtp_llm", dtype=dtype, out=out, durable=False)
    served = torch.float32 if dtype is None else torch.bfloat16
    plain = {n: (x + 1 if "norm" in n else x).to(served) for n, x in hub.items()}
    for r in range(tp):
        got = load_file(out / f"model-{r:02d}-00-part-00000.safetensors")
        want = oracle.rtp_llm(plain, config, tp, r)
        assert sorted(got) == sorted(want)
        assert all(torch.equal(got[n], x) for n, x in want.items())
    again = fastckpt.open(out)
    assert {n.split(":")[0] for n in again.unread} == {n for n in hub if "norm" in n}
    assert sorted(again) == sorted(n for n in hub if "norm" not in n)


# ---- Jina's BERT, whose class is not transformers' ----


def jina():
    """Names and shapes as its modeling_bert.py has them, every element another number."""
    hidden, width, heads, vocab = 48, 36, 6, 40
    config = dict(
        model_type="bert", hidden_size=hidden, intermediate_size=width, num_attention_heads=heads,
        num_hidden_layers=2, vocab_size=vocab, type_vocab_size=2, position_embedding_type="alibi",
        feed_forward_type="geglu",
    )  # fmt: skip
    shapes = {
        f"embeddings.{n}_embeddings.weight": (rows, hidden)
        for n, rows in (("word", vocab), ("token_type", 2))
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(2):
        at = f"encoder.layer.{i}."
        norms += [f"{at}attention.self.layer_norm_{n}" for n in "qk"]
        norms += [f"{at}attention.output.LayerNorm", f"{at}layer_norm_1", f"{at}layer_norm_2"]
        for n in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= {f"{at}attention.{n}.weight": (hidden, hidden), f"{at}attention.{n}.bias": (hidden,)}
        shapes |= {f"{at}mlp.up_gated_layer.weight": (2 * width, hidden)}
        shapes |= {f"{at}mlp.down_layer.weight": (hidden, width), f"{at}mlp.down_layer.bias": (hidden,)}
    shapes |= {f"{n}.{kind}": (hidden,) for n in norms for kind in ("weight", "bias")}
    tensors = {n: torch.empty(shape) for n, shape in shapes.items()}
    families.number(tensors)
    return config, tensors


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_jina_bert(tp):
    config, t = jina()
    model = recipes.named("jina_bert")(memory(t, 2), config)
    same(shard(layout("hf").targets(model, Placement())), t)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    for p in Placement(tp=tp).ranks():
        got, r, want = shard(layout("rtp_llm").targets(model, p)), p.rank, {}
        key = f"rank_{r:02d}_00_00."
        want[key + "global.embedding"] = cut(t["embeddings.word_embeddings.weight"], 1, tp, r)
        types = cut(t["embeddings.token_type_embeddings.weight"], 1, tp, r)
        want[key + "global.token_type_embedding.weight"] = types
        want[key + "global.pre_decoder_layernorm.gamma"] = t["embeddings.LayerNorm.weight"]
        want[key + "global.pre_decoder_layernorm.bias"] = t["embeddings.LayerNorm.bias"]
        want[key + "global.linear_bias_slopes"] = cut(slopes, 0, tp, r)
        for i in range(2):
            at, to = f"encoder.layer.{i}.", f"{key}layers.{i}."
            a, f = to + "self_attention_weights.", to + "ffn_weights."
            for leaf, role in (
                ("attention.self.layer_norm_q", "self_attention_weights.q_layernorm"),
                ("attention.self.layer_norm_k", "self_attention_weights.k_layernorm"),
                ("attention.output.LayerNorm", "post_layernorm_weights"),
                ("layer_norm_1", "post_layernorm_weights_2"),
                ("layer_norm_2", "post_ffn_layernorm_weights"),
            ):
                for kind, end in (("weight", "gamma"), ("bias", "beta")):
                    want[f"{to}{role}.{end}"] = t[f"{at}{leaf}.{kind}"]
            qkv = ("query", "key", "value")
            rows = [cut(t[f"{at}attention.self.{n}.weight"], 0, tp, r) for n in qkv]
            bias = torch.cat([cut(t[f"{at}attention.self.{n}.bias"], 0, tp, r) for n in qkv])
            want[a + "query_weight.kernel"] = torch.cat(rows).t()
            want[a + "query_weight.bias"] = bias if tp == 1 else bias[None]
            want[a + "attention_output_weight.kernel"] = cut(
                t[f"{at}attention.output.dense.weight"], 1, tp, r
            ).t()
            want[a + "attention_output_weight.bias"] = t[f"{at}attention.output.dense.bias"]
            up, gate = t[f"{at}mlp.up_gated_layer.weight"].chunk(2)
            want[f + "intermediate_weight.kernel"] = cut(gate, 0, tp, r).t()
            want[f + "intermediate_weight3.kernel"] = cut(up, 0, tp, r).t()
            want[f + "intermediate_weight2.kernel"] = cut(t[f"{at}mlp.down_layer.weight"], 1, tp, r).t()
            want[f + "intermediate_weight2.bias"] = t[f"{at}mlp.down_layer.bias"]
        same(got, want)
