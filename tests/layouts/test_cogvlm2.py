"""CogVLM2: layers with matrices of their own for image tokens, through every layout and back."""

from __future__ import annotations

import fastckpt
import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import cogvlm2
from layouts.family_oracle import cut, heads_of, parts, pick
from outputs import hub_directory
from reading import bits, memory, read, same, shard
from safetensors.torch import load_file

CONFIG, HUB, _ = cogvlm2.made()
HEADS = (8, 2, 8)
TOWER = "model.vision."


def model_of(hub=HUB, **changes):
    config = CONFIG | changes
    return recipes.named("cogvlm2")(memory(hub, 2), config)


def shards_of(served, tp, **options):
    model = model_of()
    return [shard(layout(served, options).targets(model, p)) for p in Placement(tp=tp).ranks()]


def rows_of(x, tp, r):
    """A rank's q, k and v of a matrix or vector that holds all three."""
    mine, its = heads_of(HEADS, tp, r)
    q, k, v = parts(x, HEADS, False)
    return torch.cat([pick(q, mine, 8), pick(k, its, 8), pick(v, its, 8)])


def hf(tp, r):
    out = {}
    for name, x in HUB.items():
        if name.startswith(TOWER) or "norm" in name:
            out[name] = x
        elif "query_key_value" in name:
            out[name] = rows_of(x, tp, r)
        else:
            out[name] = cut(x, 1 if name.endswith(("_dense.weight", "down_proj.weight")) else 0, tp, r)
    return out


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_hf(tp):
    for r, got in enumerate(shards_of("hf", tp, replicate_kv="true")):
        same(got, hf(tp, r))


def rtp_llm(tp, r):
    """models/cogvlm2_weight.py of 2025: embedding and head whole, the tower on the first rank."""
    key = f"rank_{r:02d}_00_00."
    out = {
        key + "global.embedding": HUB["model.embed_tokens.weight"],
        key + "global.lm_head": HUB["lm_head.weight"],
        key + "global.final_layernorm.gamma": HUB["model.norm.weight"],
    }
    if r == 0:
        tower = {n.removeprefix(TOWER): x for n, x in HUB.items() if n.startswith(TOWER)}
        out |= {f"{key}global.{n}": x for n, x in tower.items()}
    for i in range(2):
        at, to = f"model.layers.{i}.", f"{key}layers.{i}."
        out[to + "pre_layernorm_weights.gamma"] = HUB[at + "input_layernorm.weight"]
        out[to + "post_layernorm_weights.gamma"] = HUB[at + "post_attention_layernorm.weight"]
        for kind, prefix in (("language", ""), ("vision", "vision_")):
            a, s, m = f"{at}self_attn.{kind}_expert_", f"{to}self_attention_weights.{prefix}", f"{at}mlp."
            out[s + "query_weight.kernel"] = rows_of(HUB[a + "query_key_value.weight"], tp, r).t()
            out[s + "attention_output_weight.kernel"] = cut(HUB[a + "dense.weight"], 1, tp, r).t()
            gate, up, down = (HUB[f"{m}{kind}_mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
            f = f"{to}{prefix}ffn_weights.intermediate_weight"
            halves = [cut(x, 0, tp, r).t() for x in (gate, up)]
            if kind == "language":
                out[f + "13.kernel"] = torch.cat(halves, 1)
            else:
                out[f + ".kernel"], out[f + "3.kernel"] = halves
            out[f + "2.kernel"] = cut(down, 1, tp, r).t()
        bias = rows_of(HUB[at + "self_attn.vision_expert_query_key_value.bias"], tp, r)
        out[to + "self_attention_weights.vision_query_weight.bias"] = bias if tp == 1 else bias[None]
    return out


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_rtp_llm(tp):
    for r, got in enumerate(shards_of("rtp_llm", tp)):
        same(got, rtp_llm(tp, r))


@pytest.mark.parametrize("served", ["vllm", "megatron"])
def test_servers_that_do_not_have_it(served):
    with pytest.raises(LayoutError, match=f"layout {served} has no place for model.vision.*cogvlm2"):
        list(layout(served).targets(model_of(), Placement(tp=2)))


def test_padding_would_not_fit_the_tower():
    with pytest.raises(LayoutError, match=r"the image tower beside model\.layers\.0"):
        list(layout("hf", {"pad": "true", "multiple": "64"}).targets(model_of(), Placement(tp=2)))
    same(shards_of("hf", 2, pad="true")[0], hf(2, 0))


BAD = [
    (dict(num_multi_query_heads=4), "query_key_value.weight: got shape"),
    (dict(num_multi_query_heads=3), "do not share \\d+ kv heads evenly"),
    (dict(num_attention_heads=7), "hidden_size 64 is no multiple of num_attention_heads"),
    (dict(hidden_size=32), "model.embed_tokens.weight|wanted"),
    (dict(intermediate_size=48), "gate_proj.weight: got shape"),
    (dict(num_hidden_layers=1), "no place for model.layers.1"),
    (dict(num_hidden_layers=3), "the model needs model.layers.2"),
    (dict(vision_config=None), "vision_config must be an object"),
]
BAD += [
    (dict(vision_config=CONFIG["vision_config"] | {key: value}), match)
    for key, value, match in (
        ("hidden_size", 48, "vision_config.hidden_size"),
        ("patch_size", 4, "vision_config.patch_size"),
        ("num_positions", 16, "vision_config.num_positions"),
        ("num_hidden_layers", 1, "no place for model.vision.transformer.layers.1"),
        ("num_hidden_layers", 3, "the model needs model.vision.transformer.layers.2"),
        ("intermediate_size", "x", "vision_config.intermediate_size must be a positive integer"),
        ("in_channels", None, "vision_config.in_channels is missing"),
    )
]


@pytest.mark.parametrize(("changes", "match"), BAD)
def test_a_config_that_does_not_fit(changes, match):
    with pytest.raises(RecipeError, match=match):
        model_of(**changes)


def test_what_is_missing_or_left_over():
    name = "model.layers.1.mlp.vision_mlp.up_proj.weight"
    with pytest.raises(RecipeError, match=f"the model needs {name}"):
        model_of({n: x for n, x in HUB.items() if n != name})
    with pytest.raises(RecipeError, match=r"no place for model\.vision\.more"):
        model_of(HUB | {"model.vision.more": torch.ones(2)})


def test_kv_heads_as_the_config_class_has_them():
    config = {k: v for k, v in CONFIG.items() if k != "num_multi_query_heads"}
    with pytest.raises(RecipeError, match=r"wanted \(192, 64\)"):
        recipes.named("cogvlm2")(memory(HUB), config)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCKPT_CACHE", "off")
    return hub_directory(tmp_path / "hub", CONFIG, HUB)


def test_there_and_back_again(hub, tmp_path):
    """The hub's config names no model_type, so the recipe is asked for by name, and remembered."""
    with pytest.raises(RecipeError, match="--recipe"):
        fastckpt.reshard(hub, tp=2, layout="rtp_llm", out=tmp_path / "x", durable=False)
    fastckpt.reshard(hub, tp=8, layout="rtp_llm", recipe="cogvlm2", out=tmp_path / "8", durable=False)
    fastckpt.reshard(tmp_path / "8", tp=2, layout="hf", recipe="cogvlm2", out=tmp_path / "2", durable=False)
    for r in range(2):
        got = load_file(tmp_path / "2" / f"rank-{r:02d}" / "model.safetensors")
        assert sorted(got) == sorted(HUB)
        assert all(torch.equal(got[n], x) for n, x in hf(2, r).items())
    for made in ("8", "2"):
        ckpt = fastckpt.open(tmp_path / made)
        assert sorted(ckpt) == sorted(HUB)
        assert all((read(ckpt[n]) == bits(x)).all() for n, x in HUB.items())


def test_ranks_add_up():
    """The model run on the slices of two ranks, with text around an image."""
    torch.manual_seed(0)
    whole = cogvlm2.Model()
    hub = {n: torch.randn_like(x) * 0.2 for n, x in whole.state_dict().items()}
    whole.load_state_dict(hub)
    ranks = []
    for p in Placement(tp=2).ranks():
        rank = cogvlm2.Model(2)
        held = shard(layout("hf").targets(model_of(hub), p))
        rank.load_state_dict({n: torch.from_numpy(x.view("f4")) for n, (_, x) in held.items()})
        ranks.append(rank)
    image = torch.zeros(10, dtype=torch.bool)
    image[2:7] = True
    said = torch.arange(10) * 17 % 208, image, torch.randn(5, 64)
    want, got = cogvlm2.logits([whole], *said), cogvlm2.logits(ranks, *said)
    assert want.abs().max() > 0.5
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
