"""Vision-language models: the spellings the hub and transformers have of one are read, doubts refused."""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families
from reading import memory, same, shard


def written(tensors, config, served="hf", tp=1):
    model = recipes.find(config)(memory(tensors), config)
    return shard(layout(served).targets(model, Placement(tp=tp)))


def test_a_config_without_a_text_config():
    """As the hub has Qwen2-VL's and Qwen2.5-VL's: the decoder's sizes beside the tower's config."""
    for name in ("qwen2_vl", "qwen2_5_vl"):
        config, hub, _ = families.made(name)
        own = {k: v for k, v in config["text_config"].items() if k != "model_type"}
        flat = own | {k: v for k, v in config.items() if k != "text_config"}
        same(written(hub, flat), hub)


@pytest.mark.parametrize(
    "name", ["gemma3-images", "llava", "llava-layers", "llava_next", "paligemma", "cohere2_vision", "lfm2_vl"]
)
def test_a_tower_within_vision_model_stays_there_and_is_the_same_to_vllm(name):
    config, hub, _ = families.made(name)
    older = {n.replace("vision_tower.", "vision_tower.vision_model."): x for n, x in hub.items()}
    same(written(older, config), older)
    one, other = written(older, config, "vllm"), written(hub, config, "vllm")
    assert sorted(one) == sorted(other)
    assert all((one[n][1] == other[n][1]).all() for n in one)


@pytest.mark.parametrize(
    ("name", "kept", "sizes"),
    [
        ("gemma3-images", ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"), {}),
        ("llava", ("model_type", "vocab_size"), {"hidden_size": 4096, "num_attention_heads": 32}),
        ("paligemma", ("model_type",), {"head_dim": 256}),
        ("paligemma-2", ("model_type", "num_hidden_layers"), {"num_attention_heads": 8, "head_dim": 256}),
    ],
)
def test_what_the_hubs_text_config_leaves_out(name, kept, sizes):
    """Gemma 3 4B's and LLaVA 1.5's say only what differs from transformers' classes."""
    config, _, _ = families.made(name)
    text = {k: v for k, v in config["text_config"].items() if k in kept}
    text |= {"num_hidden_layers": 1}
    names = recipes.imagined(recipes.find(config), config | {"text_config": text})
    plain = families.transformers.AutoConfig.for_model(**text)
    at = "language_model.model.layers.0.self_attn"
    head_dim = plain.head_dim
    assert names[f"{at}.q_proj.weight"] == (plain.num_attention_heads * head_dim, plain.hidden_size)
    assert names[f"{at}.k_proj.weight"] == (plain.num_key_value_heads * head_dim, plain.hidden_size)
    assert names["language_model.model.embed_tokens.weight"] == (plain.vocab_size, plain.hidden_size)
    assert sizes.items() <= plain.to_dict().items()


def silent(config):
    """The config, where nothing says whether embedding and head are one."""
    text = {k: v for k, v in config["text_config"].items() if k != "tie_word_embeddings"}
    return {k: v for k, v in config.items() if k != "tie_word_embeddings"} | {"text_config": text}


@pytest.mark.parametrize("name", ["mistral3", "llava", "gemma3-images", "qwen2_5_vl"])
def test_a_config_that_does_not_say_whether_the_head_is_tied(name):
    """Mistral Small 3.1's of the hub has a head of its own, though transformers' class ties it by default."""
    config, hub, _ = families.made(name)
    same(written(hub, silent(config)), hub)


def test_a_tied_head_beside_one_of_its_own_is_refused():
    config, hub, _ = families.made("mistral3")
    with pytest.raises(RecipeError, match=r"mistral3's decoder.*config says tie_word_embeddings, yet"):
        written(hub, config | {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("cohere2_vision", {"alignment_intermediate_size": 113}, "alignment_intermediate_size must be even"),
        (
            "cohere2_vision",
            {"alignment_intermediate_size": None},
            r"got shape \(112, 128\), wanted \(36864, ",
        ),
        (
            "cohere2_vision",
            {"downsample_factor": 3},
            r"linear_1\.weight: got shape \(112, 128\), wanted .* 288",
        ),
        ("lfm2_vl", {"projector_hidden_size": None}, r"got shape \(40, 128\), wanted \(2560, 128\)"),
        ("lfm2_vl", {"projector_bias": False}, r"no place for .*linear_1\.bias"),
        ("lfm2_vl", {"projector_use_layernorm": False}, r"no place for .*layer_norm\.bias"),
        ("lfm2_vl-moe", {"projector_use_layernorm": None}, r"needs .*layer_norm\.weight"),
        ("lfm2_vl", {"tie_word_embeddings": False}, r"lm_head\.weight is not there"),
    ],
)
def test_what_a_projector_is_told(name, changed, message):
    config, hub, _ = families.made(name)
    with pytest.raises(RecipeError, match=message):
        written(hub, config | changed)


def test_biases_that_a_text_config_does_not_say():
    """GLM-4.5V's class has them by default, those of GLM-4 MoE have not; so with a shared expert."""
    config, hub, _ = families.made("glm4v_moe")
    silent = ("attention_bias", "n_shared_experts")
    text = {k: v for k, v in config["text_config"].items() if k not in silent}
    same(written(hub, config | {"text_config": text}), hub)


def test_stacks_of_experts_lie_either_way():
    """The hub's [experts, in, out], and transformers 5's [experts, out, in]: the same to vLLM."""
    config, hub, _ = families.made("qwen3_vl_moe")
    turned = {n: x.transpose(1, 2).contiguous() if ".experts." in n else x for n, x in hub.items()}
    same(written(turned, config), turned)
    one, other = written(turned, config, "vllm", 2), written(hub, config, "vllm", 2)
    assert sorted(one) == sorted(other)
    assert all((one[n][1] == other[n][1]).all() for n in one)


def test_stacks_of_square_experts_are_refused():
    config, hub, _ = families.made("qwen3_vl_moe")
    square = config | {"text_config": config["text_config"] | {"moe_intermediate_size": 64}}
    with pytest.raises(RecipeError, match="experts of 64 by 64 may be stored either way"):
        written(hub, square)


def test_two_spellings_of_one_tensor_are_refused():
    config, hub, _ = families.made("llava")
    with pytest.raises(RecipeError, match=r"are both what the hub calls language_model\.lm_head\.weight"):
        written(hub | {"lm_head.weight": hub["language_model.lm_head.weight"]}, config)


def test_a_tensor_that_is_nowhere_in_the_model_is_refused():
    config, hub, _ = families.made("qwen3_vl")
    for name in ("model.visual.blocks.7.norm1.weight", "model.language_model.layers.0.extra"):
        with pytest.raises(RecipeError, match="has no place for"):
            written(hub | {name: torch.zeros(3)}, config)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text_config": {"model_type": "mamba"}}, "whose text_config has model_type 'mamba', known: llama"),
        (
            {"vision_config": {"model_type": "dinov2", "hidden_size": 32}},
            "no tower for vision_config's model_type 'dinov2'",
        ),
        ({"vision_config": None}, "vision_config must be an object, got None"),
        ({"text_config": None}, "text_config must be an object, got None"),
        ({"vision_feature_layer": -9}, "vision_feature_layer -9 of 3 layers"),
        ({"vision_feature_layer": True}, "vision_feature_layer True of 3 layers"),
    ],
)
def test_configs_that_are_not_read(changed, message):
    config, hub, _ = families.made("llava")
    with pytest.raises(RecipeError, match=message):
        written(hub, config | changed)


def test_what_vllm_refuses():
    config, hub, _ = families.made("qwen2_5_vl")
    odd = config | {"vision_config": config["vision_config"] | {"num_heads": 4}}
    model = recipes.find(odd)(memory(hub), odd)
    with pytest.raises(LayoutError, match="number of attention heads 4 does not divide by tp 8"):
        list(layout("vllm").targets(model, Placement(tp=8)))
