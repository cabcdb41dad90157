"""Models under Meta's names: the hub's tensors, row for row, in every layout and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt import recipes
from fastckpt.checkpoint import Saved
from fastckpt.errors import RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families, tiny
from meta_writer import metas, size_of
from outputs import hub_directory
from reading import holds, memory, same, shard
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
FIXTURES = Path(__file__).parents[1] / "fixtures" / "torchtitan"
NAMES = ("tied", "mistral-mqa", "mixtral", "qwen3", "qwen3_moe", "deepseek_v3")


def made(name, since_3=False):
    """(config, the hub's tensors, Meta's)."""
    config, hub, *_ = (tiny if name in tiny.MODELS else families).made(name)
    return config, hub, metas(hub, config, since_3)


@pytest.mark.parametrize("since_3", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_is_that_of_the_hubs_tensors(name, since_3):
    config, hub, tensors = made(name, since_3)
    assert not {*hub} & {*tensors} - {"lm_head.weight"}
    read = recipes.find(config)
    ours, theirs = read(memory(tensors, 3), config), read(memory(hub), config)
    same(shard(layout("hf").targets(ours, Placement())), hub)
    for served in ("vllm", "rtp_llm", "megatron"):
        for rank in Placement(tp=2).ranks():
            got, want = (shard(layout(served).targets(m, rank)) for m in (ours, theirs))
            assert {n: (d, x.tolist()) for n, (d, x) in got.items()} == {
                n: (d, x.tolist()) for n, (d, x) in want.items()
            }


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(tmp_path, name):
    config, _, tensors = made(name, since_3=name == "deepseek_v3")
    source = hub_directory(tmp_path / "in", config, tensors)
    fastckpt.reshard(source, 2, layout="vllm", out=tmp_path / "out", durable=False)
    holds(fastckpt.open(tmp_path / "out"), tensors)


def forward(tensors, config, tokens):
    """Logits as Meta's own model has them: rotary positions turn neighbours, as complex numbers."""
    size, eps = size_of(config), config["rms_norm_eps"]
    theta = config["rope_parameters"]["rope_theta"]
    angles = torch.outer(
        torch.arange(len(tokens)).float(), theta ** -(torch.arange(0, size, 2).float() / size)
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def normed(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * tensors[f"{name}.weight"]

    def turned(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    x = tensors["tok_embeddings.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        w = {n.removeprefix(f"layers.{i}."): t for n, t in tensors.items() if n.startswith(f"layers.{i}.")}
        h = normed(x, f"layers.{i}.attention_norm")
        q, k, v = ((h @ w[f"attention.w{n}.weight"].T).unflatten(-1, (-1, size)) for n in "qkv")
        times = q.shape[1] // k.shape[1]
        q, k, v = turned(q), turned(k).repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        scores += torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["attention.wo.weight"].T
        h = normed(x, f"layers.{i}.ffn_norm")
        gate, up = (h @ w[f"feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w["feed_forward.w2.weight"].T
    return normed(x, "norm") @ tensors.get("output.weight", tensors["tok_embeddings.weight"]).T


@pytest.mark.parametrize("name", ["tied", "mistral-mqa"])
def test_what_metas_model_computes_the_hubs_does_too(name):
    config, hub, _ = made(name)
    hub = {n: (x.double() * (0.3 if x.ndim == 2 else 1)).float() for n, x in hub.items()}
    tokens = torch.randint(0, config["vocab_size"], (9,), generator=torch.Generator().manual_seed(1))
    tensors = metas(hub, config)
    model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))
    fastckpt.load_into(model.float().eval(), tensors, layout="hf", config=config)
    with torch.no_grad():
        got, want = model(tokens[None]).logits[0], forward(tensors, config, tokens)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    halves = forward(
        {n: hub.get(n, x) for n, x in metas(hub, config | {"model_type": "qwen3"}).items()}, config, tokens
    )
    assert (halves - want).abs().max() > 0.1  # rows as they are would be another model


@pytest.mark.parametrize(
    ("name", "change", "said", "why"),
    [
        ("tied", {"layers.0.attention.wq.bias": torch.ones(64)}, {}, r"no place for .*wq\.bias"),
        ("tied", {"layers.1.ffn_norm.weight": None}, {}, r"hub has them\).* needs model\.layers\.1\.post"),
        ("tied", {"layers.0.attention.qkv_linear.wk.weight": torch.ones(16)}, {}, "would both be .*k_proj"),
        ("tied", {}, {"num_key_value_heads": 4}, r"k_proj\.weight: got shape \(16, 64\), wanted \(32, 64\)"),
        ("tied", {}, {"model_type": "qwen2"}, "names are Meta's, under which no qwen2 is known"),
        ("qwen3_moe", {"layers.1.moe.experts.w1": torch.ones(4, 24, 64)}, {}, r"needs .*experts\.4\."),
        ("qwen3_moe", {"layers.1.moe.experts.w1": torch.ones(5, 64, 24)}, {}, r"got shape \(64, 24\)"),
        ("deepseek_v3", {}, {"rope_interleave": False}, "rope_interleave is false"),
        ("tied", {"norm.weight": None, "norm.scale": torch.ones(64)}, {}, "torchtune's own names"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name, change, said, why):
    config, _, tensors = made(name)
    changed = {n: x for n, x in (tensors | change).items() if x is not None}
    with pytest.raises(RecipeError, match=why):
        recipes.find(config | said)(memory(changed), config | said)


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"n_heads": 4}, "n_heads 4, the config has num_attention_heads 8"),
        ({"n_kv_heads": 8}, "n_kv_heads 8, the config has num_key_value_heads 2"),
        ({"rope_theta": 5e5}, "rope_theta 500000.0, the config has rope_theta 10000.0"),
        ({"dim": 64, "n_heads": 8, "n_kv_heads": 2, "vocab_size": -1, "hidden_dim": 96, "n_layers": 2}, ""),
    ],
)
def test_params_json_and_the_config_agree(params, why):
    config, hub, tensors = made("tied")
    ckpt = replace(memory(tensors), saved=Saved(args=params))
    if why:
        with pytest.raises(RecipeError, match=why):
            recipes.find(config)(ckpt, config)
        return
    same(shard(layout("hf").targets(recipes.find(config)(ckpt, config), Placement())), hub)


def test_what_servers_compute_is_left_out():
    config, hub, tensors = made("qwen3_moe")
    beside = {"layers.1.moe.expert_bias": torch.ones(5), "freqs_cis": torch.ones(3, 2, dtype=torch.complex64)}
    model = recipes.find(config)(memory(tensors | beside), config)
    assert {*model.ignored} == {*beside}
    same(shard(layout("hf").targets(model, Placement())), hub)


def test_two_names_of_one_tensor_are_each_what_they_are():
    config, _, tensors = made("mistral-mqa")
    wk, wv = "layers.0.attention.wk.weight", "layers.0.attention.wv.weight"
    held = {n: x for n, x in tensors.items() if n != wv}
    ours = recipes.find(config)(memory(held, aliases={wv: wk}), config)
    theirs = recipes.find(config)(memory(tensors | {wv: tensors[wk]}), config)
    got, want = (shard(layout("hf").targets(model, Placement())) for model in (ours, theirs))
    assert {n: x.tolist() for n, (_, x) in got.items()} == {n: x.tolist() for n, (_, x) in want.items()}


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3"])
def test_what_torchtitan_wrote_is_what_its_converter_makes_of_it(name):
    path = FIXTURES / name
    config, want = json.loads((path / "hf.json").read_text()), load_file(path / "truth.safetensors")
    got = fastckpt.reshard(path / "step-1", layout="hf", config=config, rank=0)
    if config["tie_word_embeddings"]:
        found = fastckpt.open(path / "step-1", config=config)
        assert found.aliases == {"lm_head.weight": "tok_embeddings.weight"}
        assert torch.equal(got.pop("lm_head.weight"), got["model.embed_tokens.weight"])
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], x) for n, x in want.items())
