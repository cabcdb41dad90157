"""The names and shapes a recipe makes of a config alone, against the files transformers writes."""

from __future__ import annotations

import pytest
from fastckpt import recipes
from fastckpt.errors import RecipeError
from fastckpt.recipes import FAMILIES, imagining
from layouts import cogvlm2, families, gated, tiny
from layouts.test_rtp_families import jina

OTHERS = {"gated": gated.made, "cogvlm2": cogvlm2.made, "jina_bert": jina}
DECODERS = [*tiny.MODELS, *families.FAMILIES, *families.WRAPPERS, "chatglm", *OTHERS]
HEADS = ("cls.", "lm_head.", "classifier.", "head.", "decoder.bias")
"""What an encoder may have or not."""
PREFIX = {"bert-alone": "bert.", "jina_bert": "bert.", "xlm_roberta-alone": "roberta."}
PREFIX |= {"modernbert-alone": "model."}
"""What the names of an encoder that was saved alone lack."""


def shapes(name):
    """(config, recipe, name -> shape in the files)."""
    if name in OTHERS:
        config, files, *_ = OTHERS[name]()
        recipe = gated.RECIPE if name == "gated" else recipes.named(name)
    else:
        config, files, _ = (tiny if name in tiny.MODELS else families).made(name)
        recipe = recipes.find(config)
    prefix = PREFIX.get(name, "")
    return config, recipe, {prefix + n: tuple(x.shape) for n, x in files.items()}


@pytest.mark.parametrize("name", DECODERS)
def test_it_is_what_transformers_writes(name):
    config, recipe, want = shapes(name)
    assert recipes.imagined(recipe, config) == want


def test_a_config_may_say_any_number_of_layers():
    config, *_ = cogvlm2.made()
    tall = config | {"vision_config": config["vision_config"] | {"num_hidden_layers": 10**12}}
    with pytest.raises(RecipeError, match=r"vision_config\.num_hidden_layers 1000000000000"):
        recipes.imagined(recipes.named("cogvlm2"), tall)


@pytest.mark.parametrize("name", families.ENCODERS)
def test_an_encoder_is_without_its_heads(name):
    config, recipe, files = shapes(name)
    want = {n: s for n, s in files.items() if not n.startswith(HEADS) and ".pooler." not in n}
    assert recipes.imagined(recipe, config) == want


def test_every_family_is_here():
    here = {shapes(name)[0].get("model_type", name) for name in (*DECODERS, *families.ENCODERS)}
    assert {f.model_type for f in FAMILIES} <= here | set(OTHERS)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_config_may_say_anything(name, monkeypatch):
    monkeypatch.setattr(imagining, "MOST", 1000)
    config, recipe, _ = shapes(name)
    with pytest.raises(RecipeError, match="tensors"):
        recipes.imagined(recipe, config | {"num_hidden_layers": 10**12})


def test_quantised_names_are_not_imagined():
    config, recipe, want = shapes("llama")
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert recipes.imagined(recipe, config | {"quantization_config": said}) == want
