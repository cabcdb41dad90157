"""Every family through every layout and back, bit for bit, or refused: the table in docs/layouts.md."""

from __future__ import annotations

from pathlib import Path

import fastckpt
import pytest
from fastckpt import replicas
from fastckpt.errors import FastckptError, LayoutError
from fastckpt.layouts import layout
from fastckpt.recipes import FAMILIES
from layouts import cogvlm2, families, gated, tiny
from layouts.test_mxfp4 import hub as mxfp4
from layouts.test_rtp_families import jina
from layouts.test_rtp_llm import blocked
from outputs import hub_directory
from reading import holds

SERVED = ("hf", "vllm", "rtp_llm", "megatron")
ROWS = {
    "deepseek_v2-lora": "deepseek_v2 with attention_bias",
    "gated": "names with gated_q",
    "stablelm-parallel": "stablelm with use_parallel_residual",
    "cohere-normed": "cohere with use_qk_norm",
    "hyperclovax-before": "hyperclovax with use_post_norm off",
}
"""Models that have a row other than their model_type's."""


def table():
    """row -> layout -> what docs/layouts.md says."""
    text = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text()
    lines = text.partition("| family | ")[2].splitlines()
    assert lines[0].split(" | ") == ["`vllm`", "`rtp_llm`", "`megatron` |"]
    out = {}
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        out |= {name: dict(zip(SERVED, ["yes", *cells], strict=True)) for name in names.split(", ")}
    return out


TABLE = table()


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    """The recipe of names in a user's own file."""
    path = tmp_path_factory.mktemp("recipe") / "mine.py"
    path.write_text(gated.written())
    return str(path)


OTHERS = {"gated": gated.made, "cogvlm2": cogvlm2.made, "jina_bert": jina}
MODELS = [*tiny.MODELS, *families.FAMILIES, *families.ENCODERS, *families.WRAPPERS, "chatglm", *OTHERS]


def made(name):
    """(config, tensors, row of the table)."""
    if name in OTHERS:
        config, hub, *_ = OTHERS[name]()
        return config, hub, ROWS.get(name, name)
    config, hub, *_ = (tiny if name in tiny.MODELS else families).made(name)
    return config, hub, ROWS.get(name, config["model_type"])


PLUS_ONE = ("gemma", "vaultgemma", "nemotron", "gated", "qwen3_next", "qwen3_5", "qwen3_5_moe")
"""Models whose norms multiply by 1 + weight."""


def options(name, served, tp):
    if served == "hf" and tp > 1:
        return {"replicate_kv": "true", "vocab_padding": "8"}
    if served == "megatron" and name in PLUS_ONE:
        return {"zero_centered_gamma": "true"}
    return {}


UNREAD = {
    "llava": (".layers.2.", ".post_layernorm."),
    "llava_next": (".layers.2.", ".post_layernorm."),
    "llava-layers": (".layers.2.", ".post_layernorm."),
    "llava_onevision": (".post_layernorm.",),
}
"""What lies behind the last layer of a tower that is read, which vLLM does not hold."""


def lost(name, served, tensor):
    """Norms that rtp-llm has as 1 + weight cannot be taken back, nor what a server does not hold."""
    if served == "vllm" and "vision_tower" in tensor:
        return any(part in tensor for part in UNREAD.get(name, ()))
    if served != "rtp_llm" or name not in PLUS_ONE or "linear_attn" in tensor:
        return False
    return "norm" in tensor and not tensor.endswith("bias")


def way_back(tmp_path, name, served, tp, recipe_file):
    config, hub, row = made(name)
    source, out = hub_directory(tmp_path / "hub", config, hub), tmp_path / "out"
    recipe = {"gated": recipe_file, "cogvlm2": name, "jina_bert": name}.get(name)
    placed = layout(served, options(name, served, tp))
    if TABLE[row][served].startswith("no: "):
        with pytest.raises(LayoutError, match=f"layout {served}.*(no place|has no|wants|not divide)"):
            fastckpt.reshard(source, tp, layout=placed, recipe=recipe, out=out, durable=False)
        assert not out.exists()
        return
    assert TABLE[row][served].startswith("yes")
    fastckpt.reshard(source, tp, layout=placed, recipe=recipe, out=out, durable=False)
    ckpt = fastckpt.open(out, recipe=recipe)
    kept = {n: x for n, x in hub.items() if not lost(name, served, n)}
    assert {n.partition(":")[0] for n in ckpt.unread} == set(hub) - set(kept)
    holds(ckpt, kept)
    assert replicas.compare(ckpt)[1] == ()


def test_every_family_has_one_row():
    assert set(TABLE) == {f.model_type for f in FAMILIES} | set(ROWS.values())
    assert {made(n)[2] for n in MODELS} == set(TABLE)


@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks(tmp_path, name, served, recipe_file):
    way_back(tmp_path, name, served, 2, recipe_file)


UNEVEN = "does not divide|do not divide|neither do"
"""Sizes of these tiny models that so many ranks cannot share."""


@pytest.mark.nightly
@pytest.mark.parametrize("tp", [1, 4, 8])
@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("name", MODELS)
def test_more_ranks(tmp_path, name, served, tp, recipe_file):
    try:
        way_back(tmp_path, name, served, tp, recipe_file)
    except LayoutError as e:
        if tp == 1:
            raise
        assert any(words in str(e) for words in UNEVEN.split("|")), e


STORED = {"mxfp4": mxfp4, "fp8-blocks": lambda: blocked(count=4)}
TAKEN = {"mxfp4": ("hf", "vllm"), "fp8-blocks": ("hf", "vllm", "rtp_llm")}


@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("form", STORED)
def test_what_has_factors_of_blocks(tmp_path, form, served):
    config, hub = STORED[form]()
    source, out = hub_directory(tmp_path / "hub", config, hub), tmp_path / "out"
    tp = 2 if form == "fp8-blocks" else 1  # 96 inputs of an expert are 3 groups of 32
    if served not in TAKEN[form]:
        with pytest.raises(FastckptError, match=r"layouts hf and vllm have|no place for"):
            fastckpt.reshard(source, tp, layout=served, out=out, durable=False)
        return
    fastckpt.reshard(source, tp, layout=served, out=out, durable=False)
    holds(fastckpt.open(out), hub)
