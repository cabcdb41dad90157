"""`verify --engine`: shards are what an engine's loader wants, or what differs is told, with exit code 1."""

from __future__ import annotations

import json
from functools import partial

import fastckpt
import pytest
import torch
from fastckpt import cli
from fastckpt.errors import LayoutError
from fastckpt.layouts import layout
from layouts import families
from outputs import hub_directory
from safetensors.torch import load_file, save_file

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 200, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub directory of a small llama in bfloat16."""
    folder = tmp_path_factory.mktemp("hub")
    shapes = {"model.embed_tokens": (200, 64), "model.norm": (64,), "lm_head": (200, 64)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm": (64,), at + "post_attention_layernorm": (64,)}
        shapes |= {f"{at}self_attn.{x}_proj": (64, 64) for x in "qo"}
        shapes |= {f"{at}self_attn.{x}_proj": (32, 64) for x in "kv"}
        shapes |= {f"{at}mlp.{x}_proj": (96, 64) for x in ("gate", "up")} | {at + "mlp.down_proj": (64, 96)}
    tensors = {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    return hub_directory(folder, CONFIG, tensors)


def written(hub, out, dtype=None, tp=2, name="vllm", config=None, **options):
    asked = layout(name, options)
    fastckpt.reshard(hub, tp=tp, layout=asked, config=config, dtype=dtype, out=out, durable=False)
    return partial(fastckpt.verify, out)


def test_shards_for_the_engine_are_what_it_wants(hub, tmp_path):
    check = written(hub, tmp_path / "out", engine="vllm==0.32")
    assert check(engine="vllm==0.32").problems == ()
    assert check(engine="vllm==0.32.0").ok
    assert cli.main(["verify", str(tmp_path / "out"), "--engine", "vllm==0.32", "-q"]) == 0


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        ({}, ["rank 0: no tensor model.layers.0.self_attn.attn._k_scale, which vllm==0.32 asks for"]),
        (
            {"vocab_padding": "8"},
            ["rank 1: lm_head.weight has shape (100, 64), vllm==0.32 wants (128, 64)"],
        ),
        (
            {"engine": "vllm==0.32", "config": CONFIG | {"dtype": "float16"}},
            ["rank 1: model.norm.weight is bfloat16, vllm==0.32 wants float16"],
        ),
        ({"name": "hf"}, ["rank 0: vllm==0.32 has no tensor model.layers.0.self_attn.q_proj.weight"]),
    ],
)
def test_what_it_does_not_want_is_named(hub, tmp_path, options, problems):
    found = written(hub, tmp_path / "out", **options)(engine="vllm==0.32")
    assert not found.ok
    assert set(problems) <= set(found.problems)
    hint = "layout vllm with engine='vllm==0.32' (-L engine=vllm==0.32) does"
    hint = f"these shards were not written for vllm==0.32: {hint}"
    assert (found.problems[-1] == hint) == ("engine" not in options)


def test_the_exit_code_is_1(hub, tmp_path, capsys):
    written(hub, tmp_path / "out")
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    assert cli.main(["verify", str(tmp_path / "out"), "--engine", "vllm==0.32"]) == 1
    assert "_k_scale, which vllm==0.32 asks for" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["hf", "same"])
def test_a_whole_model_is_no_shard(hub, tmp_path, layout):
    fastckpt.reshard(hub, config=CONFIG, layout=layout, out=tmp_path / "out")
    (said,) = fastckpt.verify(tmp_path / "out", engine="vllm==0.32").problems
    assert f"layout {layout} holds the tensors whole, the loader wants shards" in said


def test_a_float32_config_is_served_as_bfloat16(hub, tmp_path):
    """vLLM's own default for it; the shards may be either."""
    config = CONFIG | {"dtype": "float32"}
    for dtype in (None, "float32"):
        out = tmp_path / str(dtype)
        asked = layout("vllm", {"engine": "vllm==0.32"})
        fastckpt.reshard(hub, tp=2, layout=asked, config=config, dtype=dtype, out=out)
        assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
        assert fastckpt.verify(out, engine="vllm==0.32").problems == ()


def test_a_smaller_tensor(hub, tmp_path):
    """vLLM's loader would copy it into the leading part of the parameter, with a warning."""
    written(hub, tmp_path / "out", engine="vllm==0.32")
    path = tmp_path / "out" / "model-rank-0-part-0.safetensors"
    state = load_file(path)
    state["model.norm.weight"] = state["model.norm.weight"][:32].clone()
    save_file(state, path)
    found = fastckpt.verify(tmp_path / "out", engine="vllm==0.32")
    assert not found.ok
    (tmp_path / "out" / "fastckpt.json").unlink()
    found = fastckpt.verify(tmp_path / "out", engine="vllm==0.32", plain=True)
    assert found.problems == ("vllm==0.32: without fastckpt.json nothing says which model this is",)


def test_an_engine_nobody_knows(hub, tmp_path):
    written(hub, tmp_path / "out")
    for asked in ("vllm==0.1", "tensorrt", "vllm=="):
        with pytest.raises(LayoutError, match=f"no engine '{asked}' is known, only vllm==0.32, sglang==0.5"):
            fastckpt.verify(tmp_path / "out", engine=asked)
    assert cli.main(["verify", str(tmp_path / "out"), "--engine", "tensorrt"]) == 2


def test_a_name_without_a_version_is_the_newest_known(hub, tmp_path):
    check = written(hub, tmp_path / "out", engine="vllm==0.32")
    assert check(engine="vllm").ok


def test_a_tower_held_whole_is_told_to_the_server(tmp_path):
    config, files, _ = families.made("qwen2_vl")
    (tmp_path / "hub").mkdir()
    save_file(files, tmp_path / "hub/model.safetensors")
    (tmp_path / "hub/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    for tower in ("cut", "whole"):
        check = written(tmp_path / "hub", tmp_path / tower, dtype="auto", engine="vllm==0.32", tower=tower)
        assert check(engine="vllm==0.32").problems == ()


def test_padded_widths_are_the_padded_configs(hub, tmp_path):
    check = written(hub, tmp_path / "out", tp=4, engine="vllm==0.32", pad="true", multiple="16")
    assert check(engine="vllm==0.32").problems == ()


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-channel"])
def test_shards_quantised_on_the_way(hub, tmp_path, scheme):
    """For the engine, with what it holds beside a quantised model; without it, what is missing is named."""
    for engine in ("vllm==0.32", ""):
        out = tmp_path / f"out{engine}"
        asked = layout("vllm", {"engine": engine})
        fastckpt.reshard(hub, tp=2, layout=asked, quant=scheme, out=out, durable=False)
        found = fastckpt.verify(out, engine="vllm==0.32")
        assert found.ok == bool(engine), found.problems
        states = fastckpt.reshard(hub, tp=2, layout=asked, quant=scheme)
        assert ("model.layers.0.self_attn.attn.k_zero_point" in states[1]) == bool(engine)
        told = json.loads((out / "config.json").read_text())["quantization_config"]
        assert set(told["ignore"]) == {"model.embed_tokens", "lm_head"}


def test_scales_of_a_kv_cache_are_not_known(hub, tmp_path):
    fastckpt.reshard(hub, quant="int8", out=tmp_path / "int8")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    with pytest.raises(LayoutError, match="compressed-tensors with kv_cache_scheme is not known"):
        asked = layout("vllm", {"engine": "vllm==0.32"})
        fastckpt.plan(tmp_path / "int8", tp=2, layout=asked, config=config)
