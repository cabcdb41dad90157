"""Our shards for vLLM are, name by name and bit for bit, what vLLM holds after its own load_weights.

vllm_names.json was made from vLLM itself (make_vllm_names.py); nothing here needs it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import fastckpt
import pytest

pytest.importorskip("transformers")
from engines import served_models as models
from engines.state_digest import kinds, state_digest
from fastckpt.errors import LayoutError
from fastckpt.layouts import layout
from fastckpt.layouts.engines import ENGINES
from fastckpt.placement import Placement
from safetensors.torch import load_file

HELD = json.loads(Path(__file__).with_name("vllm_names.json").read_text())["models"]
ENGINE = "vllm==0.32"
GRIDS = {f"tp{tp}": Placement(tp=tp) for tp in (1, 2, 4)}
GRIDS |= {"tp2-ep2": Placement(tp=2, ep=2), "pp2": Placement(pp=2), "tp2-data": Placement(tp=2)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """name -> its hub directory, written once."""
    root = tmp_path_factory.mktemp("hub")

    @cache
    def written(name):
        models.write(name, str(root / name), counted=True)
        return root / name

    return written


SOME = ("llama", "phi3", "glm", "mixtral", "qwen3_moe", "deepseek_v3-wide")
"""Of models whose integers are packed these are compared in every run, the others at night."""


def often(name):
    model, _, scheme = name.partition("+")
    return scheme not in models.PACKED or (model in SOME and scheme in ("int4-zero", "awq", "gptq"))


@pytest.mark.parametrize(
    "name", [n if often(n) else pytest.param(n, marks=pytest.mark.nightly) for n in HELD]
)
def test_names_shapes_and_bytes_are_vllms(hub, name):
    for grid, digests in HELD[name]["ranks"].items():
        asked = layout("vllm", {"engine": ENGINE, "tower": "whole" if "data" in grid else "cut"})
        states = fastckpt.reshard(hub(name), placement=GRIDS[grid], layout=asked)
        for state in states:  # in memory a tied pair is two names of one tensor, also where there is no head
            for alias in [n for n in state if n.endswith("lm_head.weight")]:
                if any(state[n] is state[alias] for n in state if n != alias):
                    del state[alias]
        if grid == "tp2" and "tensors" in HELD[name]:
            assert kinds(states[0]) == HELD[name]["tensors"]
        assert [state_digest(s) for s in states] == digests


def test_every_family_of_the_table_was_compared(hub):
    assert set(HELD) == {*models.MODELS, *models.QUANTISED}
    unstaged = {name for name in models.MODELS if "pp2" not in HELD[name]["ranks"]}
    unlike = ("granitemoehybrid", "idefics3", "smolvlm")
    sharing = {"gemma4_text", "gemma4"}
    assert unstaged == sharing | {name for name in models.MODELS if name.startswith(unlike)}
    compared = {json.loads((hub(name) / "config.json").read_text())["model_type"] for name in HELD}
    assert set(ENGINES[ENGINE]) == compared
    methods = set()
    for name in models.QUANTISED:
        config = json.loads((hub(name) / "config.json").read_text())
        said = config["quantization_config"]
        packed = said.get("format") == "pack-quantized"
        methods.add((config["model_type"], "pack-quantized" if packed else said["quant_method"]))
    assert {(f, m) for f, served in ENGINES[ENGINE].items() for m in served.quantised} == methods


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vllm==0.31"}, "no engine 'vllm==0.31' is known, only vllm==0.32, sglang==0.5"),
        ({"engine": "vllm"}, "no engine 'vllm' is known"),
        (
            {"engine": ENGINE, "gate_up": "up_gate"},
            "wants vocab_padding 64 and gate_up gate_up, got 64 and up_gate",
        ),
        ({"engine": ENGINE, "vocab_padding": "128"}, "got 128 and gate_up"),
    ],
)
def test_what_an_engine_refuses(options, message):
    with pytest.raises(LayoutError, match=message):
        layout("vllm", options)


def test_a_pipeline_that_was_not_compared_is_refused(hub):
    asked = layout("vllm", {"engine": "sglang==0.5"})
    with pytest.raises(LayoutError, match="pipeline stages hold of qwen2 is not known: wanted pp 1, got 2"):
        fastckpt.plan(hub("qwen2"), placement=Placement(pp=2), layout=asked)


@pytest.mark.parametrize(
    ("name", "tied", "message"),
    [
        ("olmoe", True, "olmoe: wanted a head of its own, got its embedding as its head"),
        ("cohere2", False, "cohere2: wanted its embedding as its head, got a head of its own"),
    ],
)
def test_a_head_that_the_engine_ties_otherwise_is_refused(name, tied, message, tmp_path, monkeypatch):
    """vLLM's own loader leaves the one unfilled and does not read the other."""
    prefix, sizes = models.MODELS[name]
    monkeypatch.setitem(models.MODELS, name, (prefix, sizes | {"tie_word_embeddings": tied}))
    models.write(name, str(tmp_path))
    with pytest.raises(LayoutError, match=message):
        fastckpt.plan(tmp_path, layout=layout("vllm", {"engine": ENGINE}))


def test_a_tower_that_vllm_cannot_hold_whole_is_refused(hub):
    with pytest.raises(LayoutError, match="tower=whole wants one of exaone4_5, glm4v, glm4v_moe, kimi_k25, "):
        fastckpt.plan(hub("internvl"), tp=2, layout=layout("vllm", {"tower": "whole"}))


def test_a_patch_release_goes_by_its_minor_version():
    assert layout("vllm", {"engine": "vllm==0.32.1+cpu"}).engine == "vllm==0.32.1+cpu"


def test_a_family_without_a_line_is_refused(hub):
    asked = layout("vllm", {"engine": "sglang==0.5"})
    with pytest.raises(LayoutError, match="its names for family gemma are not known; known are llama"):
        fastckpt.plan(hub("gemma"), tp=2, layout=asked)


def test_a_decoder_that_vllm_does_not_know_beside_a_tower_is_refused(monkeypatch, tmp_path):
    """vLLM 0.32 finds no class for Mistral 4 there."""
    prefix, sizes = models.MODELS["mistral3"]
    text = models.MODELS["mistral4"][1] | {"model_type": "mistral4"}
    monkeypatch.setitem(models.MODELS, "mistral3", (prefix, sizes | {"text_config": text}))
    models.write("mistral3", str(tmp_path))
    with pytest.raises(LayoutError, match="its names for family mistral3 of mistral4 are not known"):
        fastckpt.plan(tmp_path, layout=layout("vllm", {"engine": ENGINE}))


def test_another_class_than_the_one_compared_is_refused(hub):
    """transformers spells Kimi K2.5's otherwise, and vLLM has no class of that name."""
    config = json.loads((hub("kimi_k25") / "config.json").read_text())
    config |= {"architectures": ["Kimi_K25ForConditionalGeneration"]}
    with pytest.raises(LayoutError, match=r"\[KimiK25ForConditionalGeneration\], got Kimi_K25For"):
        fastckpt.plan(hub("kimi_k25"), config=config, layout=layout("vllm", {"engine": ENGINE}))


def test_a_tied_pair_is_the_head_alone_in_files(hub, tmp_path):
    """The loader drops names of the same tensor but for the smallest."""
    served = layout("vllm", {"engine": ENGINE})
    fastckpt.reshard(hub("llama-tied"), tp=2, layout=served, out=tmp_path / "out")
    for rank in range(2):
        state = load_file(tmp_path / "out" / f"model-rank-{rank}-part-0.safetensors")
        assert "lm_head.weight" in state
        assert "model.embed_tokens.weight" not in state


def test_shards_of_an_engine_are_read_back(hub, tmp_path):
    for name in ("llama-tied", "glm", "gpt_neox", "deepseek_v2-lora"):
        out = tmp_path / name
        fastckpt.reshard(hub(name), tp=2, layout=layout("vllm", {"engine": ENGINE}), out=out)
        assert fastckpt.diff(hub(name), out).equal
