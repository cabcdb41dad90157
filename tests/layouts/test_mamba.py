"""Mamba's mixers: which rows are what, told by transformers' own forward pass, and where they go."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import fastckpt
import numpy as np
import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families
from reading import bits, memory, read, same, shard

AT = {
    "granitemoehybrid": "model.layers.2.mamba.",
    "nemotron_h": "backbone.layers.4.mixer.",
    "falcon_h1": "model.layers.2.mamba.",
    "falcon_h1-plain": "model.layers.2.mamba.",
    "bamba": "model.layers.2.mamba.",
}
"""A model's last mixer."""


def model_of(name, hub=None, **changes):
    config, files, _ = families.made(name)
    config = config | changes
    return recipes.find(config)(memory(files if hub is None else hub, 2), config)


def seen(name, monkeypatch):
    """What transformers takes for z, x, b, c and dt: of each row of its matrix the number; and the channels
    of the convolution, as rows too."""
    at = AT[name].replace("backbone.", "model.")
    module = families.transformers.AutoModelForCausalLM.from_config(families.config_of(name)).get_submodule(
        at[:-1]
    )
    source = importlib.import_module(type(module).__module__)
    rows = torch.arange(module.in_proj.weight.shape[0], dtype=torch.float64)
    module.in_proj.register_forward_hook(lambda *_: rows.view(1, 1, -1))
    out = {}

    class Seen(Exception):
        pass

    def convolved(x, *_, **__):
        out["channels"] = x.flatten()
        return x

    def scanned(x, dt, _, b, c, **__):
        assert b.shape == c.shape and x.shape[2] % b.shape[2] == 0
        out.update(x=x, dt=dt, b=b, c=c)
        if isinstance(module.norm, torch.nn.Identity):
            raise Seen
        return x

    def normed(_, args):
        out["z"] = args[1]
        raise Seen

    monkeypatch.setattr(source, "causal_conv1d_fn", convolved)
    monkeypatch.setattr(source, "mamba2_chunk_scan", scanned)
    module.norm.register_forward_pre_hook(normed)
    with pytest.raises(Seen):
        module.eval()(torch.zeros(1, 1, 64))
    taken = {int(r) for part in out.values() for r in part.flatten()}
    out.setdefault("z", torch.tensor([r for r in range(len(rows)) if r not in taken]))
    return out


@pytest.mark.parametrize("name", AT)
def test_which_rows_transformers_takes(name, monkeypatch):
    rows, hub = seen(name, monkeypatch), families.made(name)[1]
    made = model_of(name).layers[len(model_of(name).layers) - 1].mamba
    for part in ("z", "x", "b", "c", "dt"):
        want = hub[f"{AT[name]}in_proj.weight"][rows[part].flatten().long()]
        assert (read(getattr(made, part).weight) == bits(want)).all(), part
    order = {int(row): channel for channel, row in enumerate(rows["channels"])}
    for part, kernel in zip("xbc", made.conv, strict=True):
        channels = [order[int(row)] for row in rows[part].flatten()]
        assert (read(kernel.view) == bits(hub[f"{AT[name]}conv1d.weight"][channels])).all(), part
    sizes = model_of(name).sizes.mamba
    assert rows["x"].shape[2:] == (sizes.heads, sizes.dim)
    assert rows["b"].shape[2:] == (sizes.groups, sizes.state)


def rates(hub, at, tp, rank):
    """A of a rank: minus the exponentials, rounded once."""
    exact = np.exp(hub[f"{at}A_log"].numpy().astype(np.float64))
    return torch.from_numpy(-exact.astype(np.float32)).chunk(tp)[rank]


@pytest.mark.parametrize("name", ["granitemoehybrid", "nemotron_h", "falcon_h1"])
def test_an_engine_holds_rates_in_place_of_their_logarithms(name, tmp_path):
    """In float32, from what is stored, whatever the others are cast to."""
    config, hub, _ = families.made(name)
    small = {n: x * 2.0**-20 for n, x in hub.items()}  # exponentials of numbers of 5 digits are infinite
    engine = layout("vllm", {"engine": "vllm==0.32"})
    shards = fastckpt.reshard(small, 2, layout=engine, dtype="bfloat16", config=config)
    for rank, got in enumerate(shards):
        held = {n: x for n, x in got.items() if n.endswith(".A")}
        logs = sorted(n for n in hub if n.endswith("A_log"))
        assert len(held) == len(logs) and not any(n.endswith("A_log") for n in got)
        for (_, mine), log in zip(sorted(held.items()), logs, strict=True):
            assert torch.equal(mine, rates(small, log.removesuffix("A_log"), 2, rank))
    out = tmp_path / "out"
    (tmp_path / "config.json").write_text(json.dumps(config))
    fastckpt.reshard(small, 2, layout=engine, config=tmp_path / "config.json", out=out, durable=False)
    back = fastckpt.open(out)
    assert {n.partition(":")[0] for n in back.unread} == set(logs)
    assert sorted(back) == sorted(set(hub) - set(logs))


def test_an_infinite_rate_is_found(tmp_path):
    config, hub, _ = families.made("falcon_h1")
    engine = layout("vllm", {"engine": "vllm==0.32"})
    with pytest.raises(fastckpt.FastckptError, match=r"mamba\.A: 16 values .* NaN or infinite"):
        fastckpt.reshard(hub, layout=engine, config=config, out=tmp_path / "out", durable=False)


def test_logarithms_are_not_rounded():
    config, hub, _ = families.made("bamba")
    for served in ("hf", "vllm"):
        (state,) = fastckpt.reshard(hub, config=config, layout=served, dtype="bfloat16")
        kinds = {n.rpartition(".")[2]: x.dtype for n, x in state.items() if ".mamba." in n}
        assert kinds["A_log"] is torch.float32 and kinds["D"] is kinds["dt_bias"] is torch.bfloat16


def test_heads_and_groups_that_ranks_cannot_share():
    model = model_of("nemotron_h")

    def of(**sizes):
        return replace(model, sizes=replace(model.sizes, mamba=replace(model.sizes.mamba, **sizes)))

    with pytest.raises(LayoutError, match="the number of Mamba's heads 6 does not divide by tp 4"):
        layout("vllm").targets(of(heads=6), Placement(tp=4))
    with pytest.raises(LayoutError, match="the number of groups of Mamba's heads 2 does not divide by tp 4"):
        layout("vllm").targets(of(groups=2), Placement(tp=4))


@pytest.mark.parametrize(("served", "name"), [("rtp_llm", "bamba"), ("megatron", "nemotron_h")])
def test_servers_without_mixers(served, name):
    with pytest.raises(LayoutError, match=r"no place for .*out_proj, of a Mamba mixer"):
        list(layout(served).targets(model_of(name), Placement()))


def test_which_blocks_config_says():
    config, hub, _ = families.made("nemotron_h")
    assert "num_hidden_layers" not in config
    silent = {k: v for k, v in config.items() if k != "layers_block_type"}
    for said in (
        {"hybrid_override_pattern": "ME*-M"},
        {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"], "num_hidden_layers": 5},
    ):
        same(shard(layout("hf").targets(recipes.find(config)(memory(hub), silent | said), Placement())), hub)
    for said, message in (
        ({}, "hybrid_override_pattern must be 1 of M and .*, got None"),
        ({"hybrid_override_pattern": "MEX-M"}, "must be 5 of M and .*, got 'MEX-M'"),
        ({"hybrid_override_pattern": "ME*-"}, r"no place for backbone\.layers\.4"),
        ({"hybrid_override_pattern": "MM*-M"}, r"layers\.1\.mixer\.in_proj"),
        ({"hybrid_override_pattern": "ME*-M", "num_hidden_layers": 4}, "must be 4 of M and"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipes.find(config)(memory(hub), silent | said)
    for types in (["linear_attention"] * 2, ["sliding_attention"] * 3, "mamba"):
        with pytest.raises(RecipeError, match="layer_types must be 3 of"):
            model_of("granitemoehybrid", layer_types=types)
    older = ["mamba", "attention", "mamba"]
    assert len(model_of("granitemoehybrid", layer_types=older, mamba_d_head="auto").layers) == 3
    for those in ([3], "1", [True, 5]):
        with pytest.raises(RecipeError, match="attn_layer_indices must be numbers of 3 layers"):
            model_of("bamba", attn_layer_indices=those)
    with pytest.raises(RecipeError, match="mamba_n_heads 16 is no multiple of mamba_n_groups 5"):
        model_of("bamba", mamba_n_groups=5)


def test_layers_for_more_tokens_are_left_out():
    _, hub, _ = families.made("nemotron_h")
    further = {"mtp.layers.0.norm.weight": torch.ones(64)}
    model = model_of("nemotron_h", hub | further, num_nextn_predict_layers=1)
    assert model.ignored == tuple(further)
