"""Shards without a record, as other programs write them: the model again, or what does not fit."""

from __future__ import annotations

import json
import os
import shutil

import fastckpt
import pytest
import torch
from fastckpt import cli
from fastckpt.errors import FastckptError, LayoutError, RecipeError, SourceError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families, gated, tiny
from outputs import hub_directory
from reading import holds
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setenv("FASTCKPT_CACHE", "off")


def hub_of(path, made):
    config, hub, *_ = made
    hub_directory(path, config, hub)
    return hub


def like(path, hub):
    """Names and shapes alone: other numbers."""
    path.mkdir()
    save_file({n: torch.zeros_like(x) for n, x in hub.items()}, path / "model.safetensors")
    return path


def foreign(tmp_path, made, served, options, sizes):
    """(shards as another program would leave them, what they are cut from, names and shapes)."""
    hub = hub_of(tmp_path / "hub", made)
    placed, out = layout(served, options), tmp_path / "shards"
    fastckpt.reshard(tmp_path / "hub", placement=Placement(**sizes), layout=placed, out=out, durable=False)
    (out / "fastckpt.json").unlink()
    return out, hub, like(tmp_path / "like", hub)


CASES = [
    ("llama", "vllm", {}, dict(tp=4)),
    ("tied", "vllm", {"engine": "vllm==0.32"}, dict(tp=2)),
    ("mixtral", "rtp_llm", {}, dict(tp=2)),
    ("qwen3", "hf", {}, dict(tp=2)),
    ("deepseek_v3", "vllm", {"gate_up": "up_gate"}, dict(tp=2, dp=2, ep=4)),
    ("qwen2_moe", "megatron", {"experts": "sequential"}, dict(tp=2, pp=2)),
]


@pytest.mark.parametrize(("name", "served", "options", "sizes"), CASES)
def test_whole_again(tmp_path, name, served, options, sizes):
    made = (tiny if name in tiny.MODELS else families).made(name)
    out, hub, shown = foreign(tmp_path, made, served, options, sizes)
    ckpt = fastckpt.open_shards(out, layout(served, options), shown, placement=Placement(**sizes))
    holds(ckpt, hub)
    fastckpt.reshard(ckpt, 4, layout="vllm", out=tmp_path / "4", durable=False)
    fastckpt.reshard(tmp_path / "hub", 4, layout="vllm", out=tmp_path / "straight", durable=False)
    for file in (tmp_path / "straight").glob("*.safetensors"):
        assert (tmp_path / "4" / file.name).read_bytes() == file.read_bytes()
    holds(fastckpt.open(tmp_path / "4"), hub)


@pytest.mark.parametrize(("name", "served", "options", "sizes"), CASES)
def test_a_config_is_enough(tmp_path, name, served, options, sizes):
    """Names and shapes are those the recipe gives a model of that config."""
    made = (tiny if name in tiny.MODELS else families).made(name)
    out, hub, _ = foreign(tmp_path, made, served, options, sizes)
    (out / "config.json").unlink()
    holds(fastckpt.open_shards(out, layout(served, options), made[0], placement=Placement(**sizes)), hub)
    said = tmp_path / "hub" / "config.json"
    holds(fastckpt.open_shards(out, layout(served, options), said, placement=Placement(**sizes)), hub)


def test_files_in_parts_and_a_config_of_the_like(tmp_path):
    """vLLM splits a rank's tensors into parts; without config.json the other's is used, and written."""
    out, hub, shown = foreign(tmp_path, tiny.made("qwen3"), "vllm", {}, dict(tp=2))
    for r in range(2):
        whole = load_file(out / f"model-rank-{r}-part-0.safetensors")
        for part in range(3):
            names = sorted(whole)[part::3]
            save_file({n: whole[n] for n in names}, out / f"model-rank-{r}-part-{part}.safetensors")
    shutil.move(out / "config.json", shown / "config.json")
    ckpt = fastckpt.open_shards(out, "vllm", shown, tp=2)
    holds(ckpt, hub)
    fastckpt.reshard(ckpt, 8, layout="vllm", out=tmp_path / "8", durable=False)
    config = json.loads((tmp_path / "8" / "config.json").read_text())
    assert config == json.loads((shown / "config.json").read_text())
    holds(fastckpt.open(tmp_path / "8"), hub)


def test_a_recipe_of_a_file(tmp_path):
    hub = hub_of(tmp_path / "hub", gated.made())
    mine = tmp_path / "mine.py"
    mine.write_text(gated.written())
    fastckpt.reshard(tmp_path / "hub", 2, layout="vllm", recipe=str(mine), out=tmp_path / "2", durable=False)
    (tmp_path / "2" / "fastckpt.json").unlink()
    ckpt = fastckpt.open_shards(tmp_path / "2", "vllm", tmp_path / "hub", tp=2, recipe=str(mine))
    holds(ckpt, hub)
    assert len(fastckpt.reshard(ckpt, 4, layout="vllm")) == 4
    with pytest.raises(RecipeError):
        fastckpt.open_shards(tmp_path / "2", "vllm", tmp_path / "hub", tp=2, recipe="gpt2")


def test_shards_that_were_written_since_make_another_plan(tmp_path):
    """A rank that is made of them is no part of a set with one that was made before."""
    out, _, shown = foreign(tmp_path, tiny.made("qwen3"), "vllm", {}, dict(tp=2))
    before = fastckpt.open_shards(out, "vllm", shown, tp=2)
    os.utime(out / "model-rank-1-part-0.safetensors", ns=(0, 1))
    assert fastckpt.open_shards(out, "vllm", shown, tp=2).headers != before.headers


def test_on_the_command_line(tmp_path, capsys):
    out, hub, shown = foreign(tmp_path, tiny.made("qwen3"), "vllm", {"vocab_padding": "128"}, dict(tp=4))
    said = ["--cut-as", "vllm:tp=4,vocab_padding=128", "--like", str(shown)]
    assert cli.main(["reshard", str(out), str(tmp_path / "2"), "--tp", "2", "--no-fsync", *said]) == 0
    holds(fastckpt.open(tmp_path / "2"), hub)
    assert cli.main(["consolidate", str(out), str(tmp_path / "whole"), "--no-fsync", *said]) == 0
    assert torch.load(tmp_path / "whole" / "pytorch_model.bin").keys() == hub.keys()
    assert cli.main(["inspect", str(out), *said]) == 0
    assert "model.layers.0.self_attn.q_proj.weight" in capsys.readouterr().out
    for wrong, message in (
        ([], "open_shards (--cut-as)"),
        (said[:2], "--cut-as and --like go together"),
        ([*said, "--tag", "x"], "leave --tag, --also"),
        ([*said, "--strip-prefix", "model."], "leave --tag, --also"),
        (["--cut-as", "vllm:tp=x", "--like", str(shown)], "tp: wanted a number, got 'x'"),
        (["--cut-as", f"vllm:tp={'9' * 5000}", "--like", str(shown)], "tp: wanted a number, got '999"),
        (["--cut-as", "vllm:tp=4,tp=2", "--like", str(shown)], "--cut-as: tp stands twice, as 4 and as 2"),
        (["--cut-as", "vlm:tp=4", "--like", str(shown)], "no layout 'vlm'"),
        (["--cut-as", "vllm:tp", "--like", str(shown)], "wanted KEY=VALUE, got 'tp'"),
    ):
        try:
            code = cli.main(["inspect", str(out), *wrong])
        except SystemExit as e:
            code = e.code
        assert code != 0
        assert message in capsys.readouterr().err


@pytest.fixture
def four(tmp_path):
    """A Qwen 3 of vLLM's 4 ranks, without a record, and its names and shapes."""
    out, _, shown = foreign(tmp_path, tiny.made("qwen3"), "vllm", {}, dict(tp=4))
    return out, shown


def refused(four, match, tp=4, served="vllm", kind=SourceError):
    with pytest.raises(kind, match=match):
        fastckpt.open_shards(four[0], served, four[1], tp=tp)


def test_another_grid(four):
    refused(four, r"rank-[23]-part-0\.safetensors: is no file of these 2 ranks", tp=2)
    refused(four, "rank 4 of 8 is not there", tp=8)
    refused(four, r"rank 0 of 4 is not there", served="hf")


def test_a_rank_that_is_missing_or_twice(four):
    shutil.copy(four[0] / "model-rank-1-part-0.safetensors", four[0] / "model-rank-1-part-1.safetensors")
    refused(four, "of rank 1 stands in another file too")
    (four[0] / "model-rank-1-part-1.safetensors").unlink()
    (four[0] / "model-rank-1-part-0.safetensors").unlink()
    refused(four, "rank 1 of 4 is not there")


def changed(four, change):
    path = four[0] / "model-rank-2-part-0.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_tensors_that_the_layout_does_not_make(four):
    changed(four, lambda t: t.update(more=torch.ones(2)))
    refused(four, "2/more is no tensor of layout vllm")
    changed(four, lambda t: t.pop("more"))
    changed(four, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    refused(four, r"2/model.norm.weight: the layout makes \(64,\), the shard holds \(63,\)")
    changed(four, lambda t: t.pop("model.norm.weight"))
    refused(four, r"2/model.norm.weight: the layout makes \(64,\), the shard holds none")


def test_ranks_of_two_dtypes(four):
    name = "model.layers.0.mlp.down_proj.weight"
    changed(four, lambda t: t.update({name: t[name].half()}))
    refused(four, f"{name}: its parts are float16, float32, wanted one")


def test_no_config_at_all(four):
    for path in four:
        (path / "config.json").unlink(missing_ok=True)
    refused(four, "no config.json, nor beside the checkpoint that it is like")


def test_another_model(four):
    tensors = load_file(four[1] / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, four[1] / "model.safetensors")
    refused(four, r"the model needs model.layers.1.mlp.up_proj.weight", kind=FastckptError)


def test_what_has_a_record_or_no_roles(tmp_path, four):
    refused(four, "wanted hf, vllm, rtp_llm or megatron", served="same", kind=LayoutError)
    fastckpt.reshard(tmp_path / "hub", 2, layout="vllm", out=tmp_path / "2", durable=False)
    refused((tmp_path / "2", four[1]), "has a record of fastckpt, and is opened by that", tp=2)
    refused((four[0] / "config.json", four[1]), "wanted a directory of shards")
