"""Every family in every layout at tp 1, 2, 4 and 8: the plan uses every name, or says what has no place."""

from __future__ import annotations

import json
from functools import partial

import fastckpt
import pytest
from fastckpt import dtypes, recipes
from fastckpt.checkpoint import Checkpoint, Single
from fastckpt.errors import FastckptError, LayoutError, RecipeError
from fastckpt.extents import Buffer, Extent, Extents
from fastckpt.layouts import LAYOUTS, layout
from fastckpt.placement import Placement
from fastckpt.recipes import FAMILIES
from fastckpt.stored import strided
from fastckpt.views import ZERO
from layouts import families, tiny
from safetensors.torch import save_file

MODELS = {
    **{n: tiny for n in ("llama", "mistral-mqa", "qwen2", "qwen3", "mixtral", "gpt2")},
    **{n: families for n in (*families.FAMILIES, *families.ENCODERS, *families.WRAPPERS, "chatglm")},
}
OPTIONS = {"hf": {"replicate_kv": "true", "vocab_padding": "8"}}


def hollow(tensors):
    """A checkpoint of those names and shapes, an extent each and no bytes."""
    f32, sizes = dtypes.float32, {n: x.numel() * 4 for n, x in tensors.items()}
    extents = Extents(Extent(Buffer(None, 0, size), 0, size, n) for n, size in sizes.items())
    entries = {
        n: Single(tuple(x.shape), f32, partial(strided, extents, i, f32, tuple(x.shape)))
        for i, (n, x) in enumerate(tensors.items())
    }
    return Checkpoint("hollow", "hollow", entries, extents)


def used(targets):
    """The names whose elements the targets hold."""
    names = set()
    for target in targets:
        held = target.view.held[:, 0]
        # A norm of 1 + weight is made of that weight.
        names |= {target.view.extents[i].key.removeprefix("1 + ") for i in set(held[held != ZERO].tolist())}
    return names


ELSEWHERE = {"cogvlm2", "jina_bert"}
"""Families that transformers does not build, with tests of their own."""


def test_every_family_of_the_table_is_here():
    here = {MODELS[n].made(n)[0]["model_type"] for n in MODELS}
    assert {f.model_type for f in FAMILIES} - ELSEWHERE == here


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_uses_every_name(name):
    config, tensors, _ = MODELS[name].made(name)
    refused = {}
    for served in LAYOUTS:
        if served == "same":
            continue
        for tp in (1, 2, 4, 8):
            model = recipes.find(config)(hollow(tensors), config)
            assert not model.ignored
            made = layout(served, OPTIONS.get(served))
            try:
                names = set().union(*(used(made.targets(model, p)) for p in Placement(tp=tp).ranks()))
            except LayoutError as e:
                assert any(
                    word in str(e) for word in ("no place", "wants", "wanted", "does not divide", "neither")
                ), e
                refused.setdefault(served, []).append(tp)
                continue
            names.discard("constant")  # ALiBi's slopes, which no file holds
            left = set(tensors) - names
            if served == "vllm" and name in families.WRAPPERS:  # behind what a projector reads
                left = {n for n in left if not n.startswith("vision_tower.")}
            assert names <= set(tensors) and not left, (served, tp, left)
    assert "hf" not in refused
    if name not in families.ENCODERS:
        assert "vllm" not in refused


@pytest.mark.parametrize("served", [n for n in LAYOUTS if n != "same"])
@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"]
)
def test_a_wrong_config_is_an_error_before_a_byte(key, served, tmp_path):
    config, tensors, _ = tiny.made("qwen3")
    (tmp_path / "hub").mkdir()
    save_file({n: x.contiguous() for n, x in tensors.items()}, tmp_path / "hub" / "model.safetensors")
    for wrong in (config[key] * 2, config[key] + 1, 0, -1, "8", None):
        (tmp_path / "hub" / "config.json").write_text(json.dumps(config | {key: wrong}))
        if wrong is None and key not in ("hidden_size", "intermediate_size"):
            continue  # null is "not said", and then a default
        with pytest.raises(FastckptError) as told:
            fastckpt.reshard(tmp_path / "hub", tp=2, layout=served, out=tmp_path / "out", durable=False)
        assert isinstance(told.value, RecipeError)
        assert [p.name for p in tmp_path.iterdir()] == ["hub"]
