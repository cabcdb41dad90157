"""Gemma 4's configs as the hub and as transformers writes them, and what cannot be read or cut."""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families
from reading import memory, same, shard


def hubs(config):
    """The config as the hub has it, which says of all layers of a kind at once what differs."""
    told = {k: v for k, v in config.items() if k != "per_layer_config"}
    return told | {"global_head_dim": 12, "num_global_key_value_heads": 2}


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4_text-mixed"])
def test_both_spellings_of_a_config_are_read(name):
    config, hub, _ = families.made(name)
    told = hubs(config)
    assert "per_layer_config" in config
    same(shard(layout("hf").targets(recipes.find(told)(memory(hub), told), Placement())), hub)


def test_keys_that_layers_do_not_read_are_left_out():
    config, hub, _ = families.made("gemma4_text")
    stale = {f"model.layers.3.self_attn.{n}_proj.weight": torch.ones(2, 2) for n in "kv"}
    model = recipes.find(config)(memory(hub | stale), config)
    assert set(model.ignored) == set(stale)
    with pytest.raises(RecipeError, match=r"no place for model\.layers\.3\.self_attn\.x_proj"):
        recipes.find(config)(memory(hub | {"model.layers.3.self_attn.x_proj.weight": torch.ones(2)}), config)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"per_layer_config": {"1": {"hidden_size": 3}}}, "layer 1 must be of head_dim and num_key_value"),
        ({"per_layer_config": [1]}, "per_layer_config must be an object"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers 3: no earlier layer of each kind"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers 4: no earlier layer of each kind"),
        ({"layer_types": ["sliding_attention"] * 3 + ["chunked"]}, "layer_types must be 4 of full_attention"),
    ],
)
def test_what_a_config_cannot_mean(said, message):
    config, hub, _ = families.made("gemma4_text")
    with pytest.raises(RecipeError, match=message):
        recipes.find(config)(memory(hub), config | said)


def test_ranks_divide_the_heads_of_both_kinds_of_layers():
    config, hub, _ = families.made("gemma4_text-mixed")
    model = recipes.find(config)(memory(hub), config)
    with pytest.raises(LayoutError, match="2 kv heads do not divide by tp 4"):
        layout("hf").targets(model, Placement(tp=4))
    with pytest.raises(LayoutError, match="attention heads 8 does not divide by tp 3"):
        layout("vllm", {"pad": "true", "vocab_padding": "96"}).targets(model, Placement(tp=3))
