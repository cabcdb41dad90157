"""Attention with output gates: where the gate's rows go in every layout, and back."""

from __future__ import annotations

from dataclasses import replace

import fastckpt
import pytest
import torch
from fastckpt import cli
from fastckpt.errors import LayoutError, RecipeError, SourceError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import gated
from layouts.family_oracle import cut, heads_of, pick
from outputs import hub_directory
from reading import bits, memory, read, same, shard

CONFIG, HUB = gated.made()
HEADS = (8, 2, 16)
D = 16


def shards_of(served, tp, hub=HUB, recipe=gated.RECIPE, **options):
    model = recipe(memory(hub, 2), CONFIG)
    return [shard(layout(served, options).targets(model, p)) for p in Placement(tp=tp).ranks()]


def attention(i):
    return {p: HUB[f"model.layers.{i}.self_attn.{p}_proj.weight"] for p in "qkvo"}


def alone(i):
    """The queries, and the gates, of all heads."""
    pairs = attention(i)["q"].view(8, 2, D, -1)
    return pairs[:, 0].flatten(0, 1), pairs[:, 1].flatten(0, 1)


def test_which_rows_transformers_takes_for_queries():
    """Its forward pass is asked: of each of q_proj's rows it gets the row's number, and norms the queries."""

    class Seen(Exception):
        pass

    def caught(module, args):
        raise Seen(args[0])

    layer, weight = gated.model().model.layers[0].self_attn, attention(0)["q"]
    layer.q_proj.register_forward_hook(lambda *_: torch.arange(len(weight)).view(1, 1, -1))
    layer.q_norm.register_forward_pre_hook(caught)
    with pytest.raises(Seen) as seen:
        layer(torch.zeros(1, 1, 64), (None, None), None)
    queries = seen.value.args[0].flatten().tolist()
    gates = [row for row in range(len(weight)) if row not in set(queries)]
    role = gated.RECIPE(memory(HUB), CONFIG).layers[0].attention
    for linear, rows in ((role.q, queries), (role.gate, gates)):
        assert (read(linear.weight) == bits(weight[rows])).all()


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_hf_and_vllm(tp):
    hf, vllm = shards_of("hf", tp, replicate_kv="true"), shards_of("vllm", tp)
    for r in range(tp):
        for i in range(2):
            a = f"model.layers.{i}.self_attn."
            (mine, its), t = heads_of(HEADS, tp, r), attention(i)
            q = pick(t["q"], mine, 2 * D)
            k, v = (pick(t[p], its, D) for p in "kv")
            o = cut(t["o"], 1, tp, r)
            wanted = {a + f"{p}_proj.weight": x for p, x in (("q", q), ("k", k), ("v", v), ("o", o))}
            same({n: hf[r][n] for n in wanted}, wanted)
            wanted = {a + "qkv_proj.weight": torch.cat([q, k, v]), a + "o_proj.weight": o}
            same({n: vllm[r][n] for n in wanted}, wanted)
    if tp == 1:
        same(hf[0], HUB)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_megatron(tp):
    """For each kv head its queries, their gates, itself and its value head; rows cut evenly."""
    got = shards_of("megatron", tp, zero_centered_gamma="true")
    for i in range(2):
        (q, gate), t, rows = alone(i), attention(i), []
        for g in range(2):
            of = range(4 * g, 4 * g + 4)
            rows += [pick(q, of, D), pick(gate, of, D), pick(t["k"], [g], D), pick(t["v"], [g], D)]
        for r in range(tp):
            name = f"decoder.layers.{i}.self_attention.linear_qkv.weight"
            same({name: got[r][name]}, {name: cut(torch.cat(rows), 0, tp, r)})


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_rtp_llm(tp):
    for r, got in enumerate(shards_of("rtp_llm", tp)):
        for i in range(2):
            (q, gate), t, (mine, its) = alone(i), attention(i), heads_of(HEADS, tp, r)
            s = f"rank_{r:02d}_00_00.layers.{i}.self_attention_weights."
            qkv = torch.cat([pick(q, mine, D), pick(t["k"], its, D), pick(t["v"], its, D)]).t()
            wanted = {s + "query_weight.kernel": qkv, s + "gate.weight": pick(gate, mine, D).t()}
            same({n: got[n] for n in wanted}, wanted)


def test_padded_heads_keep_their_gates():
    """8 and 2 heads for 3 ranks: a kv head more, with its 4 queries and their gates, all zeros."""
    got = shards_of("hf", 3, pad="true", vocab_padding="3")
    name = "model.layers.1.self_attn.q_proj.weight"
    q = torch.cat([HUB[name], HUB[name].new_zeros(4 * 2 * D, 64)])
    for r in range(3):
        same({name: got[r][name]}, {name: cut(q, 0, 3, r)})


def test_biases_go_with_their_rows():
    hub, recipe = dict(HUB), replace(gated.RECIPE, biases=("q", "k", "v"))
    for i in range(2):
        for p in "qkv":
            at = f"model.layers.{i}.self_attn.{p}_proj."
            hub[at + "bias"] = torch.arange(float(len(HUB[at + "weight"])))
    name = "model.layers.0.self_attn.q_proj.bias"
    same({name: shards_of("hf", 2, hub, recipe)[1][name]}, {name: hub[name][8 * D :]})
    got = shards_of("megatron", 2, hub, recipe, zero_centered_gamma="true")
    pairs = hub[name].view(2, 4, 2, D)
    want = torch.cat([pairs[1, :, 0].flatten(), pairs[1, :, 1].flatten(), torch.arange(16.0, 32).repeat(2)])
    name = "decoder.layers.0.self_attention.linear_qkv.bias"
    same({name: got[1][name]}, {name: want})
    with pytest.raises(LayoutError, match=r"rtp_llm has no place for model.layers.0.self_attn.q_proj.bias"):
        shards_of("rtp_llm", 2, hub, recipe)


def test_a_gate_needs_its_rows():
    plain = HUB | {"model.layers.0.self_attn.q_proj.weight": torch.ones(8 * D, 64)}
    with pytest.raises(RecipeError, match=r"q_proj.weight: got shape \(128, 64\), wanted \(256, 64\)"):
        gated.RECIPE(memory(plain), CONFIG)
    with pytest.raises(RecipeError, match="gated_q wants q, k and v apart"):
        replace(gated.RECIPE, q=None, k=None, v=None, qkv="x.weight")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub directory, and the recipe's file beside it."""
    monkeypatch.setenv("FASTCKPT_CACHE", "off")
    (tmp_path / "mine.py").write_text(gated.written())
    return hub_directory(tmp_path / "hub", CONFIG, HUB)


def test_a_record_runs_no_file(hub, tmp_path):
    """The recipe's file is the user's to name, and must be the one of then."""
    out, mine = tmp_path / "out", tmp_path / "mine.py"
    fastckpt.reshard(hub, tp=2, layout="vllm", recipe=str(mine), out=out, durable=False)
    for again in (fastckpt.open, fastckpt.consolidate, fastckpt.inspect):
        with pytest.raises(SourceError, match=r"mine.py, which is not run unless you name it: recipe="):
            again(out)
        again(out, recipe=str(mine))
    with pytest.raises(SourceError, match="not run unless you name it"):
        fastckpt.open(out, recipe="llama")
    words = ["consolidate", str(out), str(tmp_path / "whole"), "--no-fsync"]
    assert cli.main(words) == 3
    assert cli.main([*words, "--recipe", str(mine)]) == 0
    fastckpt.reshard(out, tp=4, layout="vllm", recipe=str(mine), out=tmp_path / "4", durable=False)
    assert fastckpt.reshard(fastckpt.open(out, recipe=str(mine)), tp=4, layout="vllm")
    mine.write_text(mine.read_text() + "\n# changed\n")
    with pytest.raises(SourceError, match=r"cut with the recipe gated \(.*, and .*mine.py is for gated \("):
        fastckpt.open(out, recipe=str(mine))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_family_of_linear_attention_may_have_a_model_without_any(tp):
    whole = fastckpt.reshard(HUB, tp, config=CONFIG, layout="hf")
    assert all(rank.keys() == HUB.keys() for rank in whole)
    q = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(torch.cat([rank[q] for rank in whole]), HUB[q])


def test_what_a_layout_raises_by_mistake_is_no_empty_rank():
    class Empty(type(layout("hf"))):
        def targets(self, model, placement):
            return next(iter(()))

    with pytest.raises((StopIteration, RuntimeError)):
        fastckpt.reshard(HUB, config=CONFIG, layout=Empty())
