"""Families from a directory of transformers' to files of two ranks, cast on the way, in the default run."""

from __future__ import annotations

import json

import fastckpt
import pytest
from fastckpt.placement import Placement
from layouts import families, family_oracle
from outputs import hub_directory
from reading import equal
from safetensors.torch import load_file
from zero_writer import write_zero

KEPT = ("e_score_correction_bias", "A_log")


def directory(name, path):
    """Where transformers would have saved the model."""
    config, hub, _ = families.made(name)
    return hub_directory(path, config, hub), hub


def rounded(tensors):
    return {n: x if n.endswith(KEPT) else x.bfloat16() for n, x in tensors.items()}


FILES = ["deepseek_v3", "gpt_oss", "falcon-new", "bloom", "phi3", "chatglm", "cohere-normed", "opt", "phi"]


@pytest.mark.parametrize("name", FILES)
def test_vllm_files_of_two_ranks(name, tmp_path):
    path, hub = directory(name, tmp_path / "hub")
    heads = (8, 2, 8) if name == "chatglm" else families.FAMILIES[name].heads
    order = "concat" if name == "chatglm" else "grouped"
    fastckpt.reshard(path, tp=2, layout="vllm", dtype="bfloat16", out=tmp_path / "served", durable=False)
    for r in range(2):
        got = load_file(tmp_path / "served" / f"model-rank-{r}-part-0.safetensors")
        equal(got, rounded(family_oracle.vllm(hub, heads, 2, r, order)))


def test_numbers_that_a_trainer_keeps_as_buffers(tmp_path):
    """Of Apertus' activation two numbers are parameters, two are buffers, which ZeRO does not cut."""
    config, hub, _ = families.made("apertus")
    fixed = {n: x for n, x in hub.items() if n.endswith((".beta", ".eps"))}
    assert len(fixed) == 4 and all(x.shape == () for x in fixed.values())
    trained = {n: x for n, x in hub.items() if n not in fixed}
    write_zero(tmp_path / "zero", trained, stage=3, world=3, buffers=fixed)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shards = fastckpt.reshard(
        tmp_path / "zero", tp=2, layout="vllm", dtype="bfloat16", config=tmp_path / "config.json"
    )
    for r, got in enumerate(shards):
        equal(got, rounded(family_oracle.vllm(hub, families.FAMILIES["apertus"].heads, 2, r)))


@pytest.mark.parametrize("name", ["bert", "t5", "whisper", "falcon-mqa"])
def test_hf_files_of_two_ranks(name, tmp_path):
    path, hub = directory(name, tmp_path / "hub")
    heads = (families.FAMILIES | families.ENCODERS)[name].heads
    replicate = fastckpt.layouts.layout("hf", {"replicate_kv": "true"})
    fastckpt.reshard(path, tp=2, layout=replicate, out=tmp_path / "served", durable=False)
    for r in range(2):
        got = load_file(tmp_path / "served" / f"rank-{r:02d}" / "model.safetensors")
        equal(got, family_oracle.hf(hub, heads, 2, r))


TIED = ("t5", "opt", "mpt")


@pytest.mark.parametrize(
    "name",
    [
        *("qwen3_moe", "deepseek_v2", "gpt_oss", "glm4", "gpt_neox", "bert-alone", "t5"),
        *("olmo2", "apertus", "nemotron", "gptj", "opt", "mpt", "modernbert-alone"),
        *("deepseek_v4", "kimi_linear", "olmo_hybrid"),
    ],
)
def test_transformers_loads_what_one_rank_wrote(name, tmp_path):
    """Written from the trainer's spelling, loaded by transformers: the same model again."""
    config, _, state = families.made(name)
    tied = {"lm_head.weight"} if name in TIED else set()
    if name == "t5":
        tied |= {f"{side}coder.embed_tokens.weight" for side in ("en", "de")}
    tensors = {n: x for n, x in state.items() if n not in tied}
    fastckpt.reshard(tensors, config=config, layout="hf", out=tmp_path / "hub", durable=False)
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    family = (families.FAMILIES | families.ENCODERS)[name]
    kind = getattr(families.transformers, family.name + family.architecture)
    model, info = kind.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    equal(dict(model.state_dict()), state)


@pytest.mark.parametrize(
    "name", ["qwen3_next", "qwen3_5_moe", "granitemoehybrid", "nemotron_h-latent", "falcon_h1"]
)
def test_from_zero_3(name, tmp_path):
    """Partitions of three ranks, under the names of training, to files that transformers loads, and to a
    server's tensors."""
    config, hub, state = families.made(name)
    fixed = {n: x for n, x in state.items() if n.endswith("e_score_correction_bias")}
    trained = {n: x for n, x in state.items() if n not in fixed}
    write_zero(tmp_path / "zero", trained, stage=3, world=3, buffers=fixed)
    (tmp_path / "zero" / "config.json").write_text(json.dumps(config))
    fastckpt.reshard(tmp_path / "zero", layout="hf", dtype="bfloat16", out=tmp_path / "hub", durable=False)
    equal(load_file(tmp_path / "hub" / "model.safetensors"), rounded(hub))
    kind = families.transformers.AutoModelForCausalLM
    _, info = kind.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for r, got in enumerate(fastckpt.reshard(tmp_path / "zero", 2, layout="vllm", dtype="bfloat16")):
        equal(got, rounded(family_oracle.vllm(hub, families.FAMILIES[name].heads, 2, r)))


def test_an_expert_parallel_rank_alone(tmp_path):
    path, hub = directory("deepseek_v3", tmp_path / "hub")
    grid = Placement(tp=2, dp=1, ep=2)
    out = tmp_path / "served"
    for rank in (1, 0):
        fastckpt.reshard(path, placement=grid, rank=rank, layout="vllm", out=out, durable=False)
    for r in range(2):
        held = range(3 * r, 3 * r + 3)
        want = family_oracle.vllm(hub, (8, 8, 6), 2, r, experts=held)
        equal(load_file(out / f"model-rank-{r}-part-0.safetensors"), want)


def test_pipeline_and_data_parallel_files(tmp_path):
    path, hub = directory("gemma2", tmp_path / "hub")
    grid = Placement(tp=2, pp=2, dp=2)
    fastckpt.reshard(path, placement=grid, layout="vllm", out=tmp_path / "served", durable=False)
    files = sorted(p.name for p in (tmp_path / "served").glob("*.safetensors"))
    assert len(files) == 8
    seen = {n for f in files for n in load_file(tmp_path / "served" / f)}
    assert seen == set(family_oracle.vllm(hub, (8, 4, 8), 2, 0))
