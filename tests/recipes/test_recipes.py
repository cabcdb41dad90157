"""Recipes: what they read, what they refuse, and that nothing is read before it is asked for."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from fastckpt import recipes, sources
from fastckpt.doors.arguments import strip_prefix
from fastckpt.errors import RecipeError
from layouts import families, tiny
from reading import bits, memory, read


def recipe(tensors, config, **options):
    aliases = options.pop("aliases", None)
    return recipes.find(config)(memory(tensors, aliases=aliases), config, **options)


def without(tensors, *names):
    return {n: x for n, x in tensors.items() if n not in names}


def test_roles_of_llama():
    config, hub, _ = tiny.made("llama")
    model = recipe(hub, config)
    assert model.family == "llama" and not model.tied and model.positions is None
    sizes = model.sizes
    assert (sizes.hidden, sizes.vocab, sizes.heads, sizes.kv_heads, sizes.head_dim) == (64, 211, 8, 2, 8)
    assert sizes.widths == {"intermediate_size": 96}
    assert len(model.layers) == 2
    layer = model.layers[1]
    for role, name in [
        (layer.attention.q, "self_attn.q_proj"), (layer.attention.k, "self_attn.k_proj"),
        (layer.attention.v, "self_attn.v_proj"), (layer.attention.o, "self_attn.o_proj"),
        (layer.mlp.gate, "mlp.gate_proj"), (layer.mlp.up, "mlp.up_proj"), (layer.mlp.down, "mlp.down_proj"),
    ]:  # fmt: skip
        assert role.name == f"model.layers.1.{name}" and not role.transposed
        assert (read(role.weight) == bits(hub[f"{role.name}.weight"])).all()
        assert (read(role.bias) == bits(hub[f"{role.name}.bias"])).all()
    assert layer.attention_norm.name == "model.layers.1.input_layernorm"
    assert layer.mlp_norm.name == "model.layers.1.post_attention_layernorm"


@pytest.mark.parametrize(("name", "biases"), [("qwen2", "qkv"), ("qwen3", ""), ("mistral-mqa", "")])
def test_biases_and_head_norms_by_family(name, biases):
    config, hub, _ = tiny.made(name)
    attention = recipe(hub, config).layers[0].attention
    assert "".join(p for p in "qkvo" if getattr(attention, p).bias is not None) == biases
    assert (attention.q_norm is not None) == (attention.k_norm is not None) == (name == "qwen3")


def test_roles_of_gpt2_with_and_without_its_prefix():
    config, hub, _ = tiny.made("gpt2")
    bare = {n.removeprefix("transformer."): x for n, x in hub.items()}
    for tensors in (hub, bare):
        model = recipe(tensors, config)
        attention = model.layers[0].attention
        assert attention.fused == attention.k.name == "transformer.h.0.attn.c_attn"
        want = hub["transformer.h.0.attn.c_attn.weight"].t().chunk(3)[1]
        assert (read(attention.k.weight) == bits(want)).all()
        assert (read(attention.v.bias) == bits(hub["transformer.h.0.attn.c_attn.bias"].chunk(3)[2])).all()
        assert attention.o.transposed and model.tied and model.positions.name == "transformer.wpe"
        assert (read(model.lm_head.weight) == bits(hub["transformer.wte.weight"])).all()


def test_both_spellings_of_mixtral_are_one_model():
    config, hub, trained = tiny.made("mixtral-odd")
    a, b = (recipe(tensors, config).layers[1].mlp for tensors in (hub, trained))
    assert a.name == b.name == "model.layers.1.block_sparse_moe.experts" and len(a.experts) == 5
    assert a.router.name == b.router.name == "model.layers.1.block_sparse_moe.gate"
    for one, other in zip(a.experts, b.experts, strict=True):
        for role in ("gate", "up", "down"):
            x, y = getattr(one, role), getattr(other, role)
            assert x.name == y.name
            assert (read(x.weight) == read(y.weight)).all()
            assert (read(x.weight) == bits(hub[f"{x.name}.weight"])).all()


def test_layers_are_built_when_asked_for_and_dropped():
    config, hub, _ = tiny.made("mixtral")
    ckpt, built = memory(hub), []

    def watched(name, entry):
        def build():
            built.append(name)
            return entry.build()

        return dataclasses.replace(entry, make=build)

    ckpt = dataclasses.replace(ckpt, entries={n: watched(n, e) for n, e in ckpt.entries.items()})
    model = recipes.find(config)(ckpt, config)
    assert not [n for n in built if ".layers." in n]
    built.clear()
    first = model.layers[0]
    assert not [n for n in built if ".experts." in n]
    assert len(list(first.mlp.experts)) == len(list(first.mlp.experts)) == 3
    assert sorted(built) == sorted(n for n in hub if ".layers.0." in n)
    built.clear()
    assert model.layers[0] is first and not built
    assert model.layers[1].name == "model.layers.1"
    assert model.layers[0] is not first and model.layers[0].name == first.name


# ---- refusals ----


def test_a_missing_tensor_is_named():
    config, hub, _ = tiny.made("llama")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.bias"):
        with pytest.raises(RecipeError, match=f"needs {name}, which is not there"):
            recipe(without(hub, name), config)


def test_a_wrong_shape_names_got_wanted_and_the_config_keys():
    config, hub, _ = tiny.made("llama")
    with pytest.raises(
        RecipeError,
        match=r"layers\.0\.self_attn\.k_proj\.weight: got shape \(16, 64\), wanted \(32, 64\) = "
        r"\(num_key_value_heads \* head_dim, hidden_size\)",
    ):
        recipe(hub, config | {"num_key_value_heads": 4})
    with pytest.raises(RecipeError, match=r"gate_proj\.weight: got shape \(96, 64\), wanted \(95, 64\)"):
        recipe(hub, config | {"intermediate_size": 95})


def test_integers_are_no_weights():
    """A quantised matrix whose config does not say so, and one in the wrong dtype."""
    config, hub, _ = tiny.made("llama")
    for name in ("layers.1.mlp.up_proj.weight", "layers.0.self_attn.k_proj.bias", "norm.weight"):
        name = f"model.{name}"
        for dtype in (torch.int8, torch.int64, torch.bool):
            with pytest.raises(RecipeError, match=rf"{name}: got \w+, wanted floats; .*quantization_config"):
                recipe(hub | {name: hub[name].to(dtype)}, config)
    said = {"quant_method": "fp8"}
    name = "model.layers.1.mlp.up_proj.weight"
    scaled = hub | {f"{name}_scale": torch.ones(())}
    with pytest.raises(RecipeError, match=f"{name}_scale: got int32, wanted floats"):
        weight = hub[name].to(torch.float8_e4m3fn)
        scale = torch.ones((), dtype=torch.int32)
        recipe(hub | {name: weight, f"{name}_scale": scale}, config | {"quantization_config": said})
    for dtype in (torch.uint8, torch.bool, torch.bfloat16):
        with pytest.raises(RecipeError, match=f"{name} is quantised, so it must be int8 or float8_e4m3fn"):
            recipe(scaled | {name: hub[name].to(dtype)}, config | {"quantization_config": said})


def test_a_name_without_a_role_is_an_error_unless_ignored():
    config, hub, _ = tiny.made("tied")
    ignored = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert recipe(hub | {ignored: torch.ones(4)}, config).ignored == (ignored,)
    with pytest.raises(RecipeError, match=r"no place for .*0\.self_attn\.q_proj\.bias; ignored are only"):
        recipe(hub | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, config)
    with pytest.raises(RecipeError, match=r"no place for .*layers\.1\..* and 4 more"):
        recipe(hub, config | {"num_hidden_layers": 1})
    gpt2, tensors, _ = tiny.made("gpt2")
    masks = {f"transformer.h.{i}.attn.{n}": torch.ones(4) for i in range(2) for n in ("bias", "masked_bias")}
    assert sorted(recipe(tensors | masks, gpt2).ignored) == sorted(masks)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("prefix", ["module.", "_forward_module.model.", "base_model.model."])
def test_wrapped_names_say_how_to_unwrap(name, prefix):
    config, hub, _ = tiny.made(name)
    wrapped = {prefix + n: x for n, x in hub.items()}
    with pytest.raises(RecipeError, match=rf"with '{prefix}'; rename= \(--strip-prefix {prefix}\) removes"):
        recipe(wrapped, config)
    bare = {prefix + n.removeprefix("transformer."): x for n, x in hub.items()}
    with pytest.raises(RecipeError, match=rf"--strip-prefix {prefix}\) removes it"):
        recipe(bare, config)


def advised(tensors, config, flag):
    """The error of these tensors, and what its advice makes of them."""
    with pytest.raises(RecipeError) as refused:
        recipe(tensors, config)
    said = re.search(rf"{flag} (?:'(.*?)='|(\S+?))\)", str(refused.value))
    rename = (said[1], "") if said[1] else strip_prefix(said[2])
    made = sources.open(tensors, rename=[rename])
    return str(refused.value), {n: tensors[o] for o in tensors for n in [re.sub(*rename, o)] if n in made}


def test_the_advice_on_strange_names_mends_them():
    config, hub, _ = tiny.made("llama")
    lit = {f"model.{n}": x for n, x in hub.items()} | {"seen": torch.ones(3), "loss.weight": torch.ones(2)}
    said, bare = advised(lit, config, "--strip-prefix")
    assert f"{len(hub)} of {len(lit)} names start with 'model.'" in said
    said, bare = advised(bare, config, "--rename")
    assert "no place for seen, loss.weight" in said and "if it is no part of what is to be served" in said
    said, bare = advised(bare, config, "--rename")
    assert list(bare) == list(hub) and recipe(bare, config)


@pytest.mark.parametrize("part", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_what_wrappers_put_within_names(part):
    config, hub, _ = tiny.made("llama")
    for before in ("", part):
        held = {before + n.replace("layers.1.", f"layers.1.{part}"): x for n, x in hub.items()}
        said, bare = advised(held, config, "--rename")
        assert f"names hold '{part}'" in said
        assert list(bare) == list(hub) and recipe(bare, config)


def test_two_models_in_one():
    config, hub, _ = tiny.made("llama")
    both = {f"{role}.{n}": x for role in ("critic", "actor") for n, x in hub.items()}
    said, one = advised(both, config, "--rename")
    assert "a model under each of actor., critic.;" in said and "(--strip-prefix actor.)" in said
    assert list(advised(one, config, "--strip-prefix")[1]) == list(hub)


def test_what_zero_3_left_ungathered_is_told():
    config, hub, _ = tiny.made("llama")
    for emptied in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        with pytest.raises(RecipeError, match=f"{emptied} holds no element, as a save at ZeRO-3"):
            recipe(hub | {emptied: torch.zeros(0)}, config)


def test_vocabulary_rows_that_differ_from_config():
    config, hub, _ = tiny.made("llama")
    with pytest.raises(RecipeError, match=r"has 211 rows, config's vocab_size is 200; vocab_size="):
        recipe(hub, config | {"vocab_size": 200})
    for size in (200, 211):
        model = recipe(hub, config | {"vocab_size": 300}, vocab_size=size)
        assert model.sizes.vocab == size
        for role, name in ((model.embedding, "model.embed_tokens"), (model.lm_head, "lm_head")):
            assert (read(role.weight) == bits(hub[f"{name}.weight"][:size])).all()
    for size in (212, 0):
        with pytest.raises(RecipeError, match=f"has 211 rows, vocab_size= asks for {size}"):
            recipe(hub, config, vocab_size=size)
    with pytest.raises(RecipeError, match=r"model\.embed_tokens\.weight is a scalar, wanted 2 axes"):
        recipe(hub | {"model.embed_tokens.weight": torch.tensor(1.0)}, config)


def test_tied_pairs():
    config, hub, _ = tiny.made("tied")
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    for tensors, aliases in [
        (hub, {}),
        (hub, {head: table}),
        (without(hub, table) | {head: hub[table]}, {table: head}),
    ]:
        model = recipe(tensors, config, aliases=aliases)
        assert model.tied
        assert (read(model.lm_head.weight) == read(model.embedding.weight)).all()
        assert (read(model.embedding.weight) == bits(hub[table])).all()
    with pytest.raises(RecipeError, match=r"yet model\.embed_tokens\.weight and lm_head\.weight are two"):
        recipe(hub | {head: torch.randn(208, 64)}, config)
    untied = config | {"tie_word_embeddings": False}
    with pytest.raises(RecipeError, match=r"lm_head\.weight is not there and config's .* is false$"):
        recipe(hub, untied)
    with pytest.raises(
        RecipeError, match=r"is false; score\.weight is: layout 'same' has such a model whole"
    ):
        recipe(hub | {"score.weight": torch.randn(1, 64)}, untied)
    aliased = recipe(hub, untied, aliases={head: table})
    assert not aliased.tied and (read(aliased.lm_head.weight) == bits(hub[table])).all()


def test_two_names_on_the_same_bytes_are_tied():
    config, hub, _ = tiny.made("tied")
    ckpt = memory(hub)
    both = dict(ckpt.entries) | {"lm_head.weight": ckpt.entries["model.embed_tokens.weight"]}
    assert recipes.find(config)(dataclasses.replace(ckpt, entries=both), config).tied


CONFIGS = [
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
    ({"num_key_value_heads": 3}, "8 attention heads do not share 3 kv heads evenly"),
    ({"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
    ({"model_type": "bort"}, "no recipe for model_type 'bort', known: llama, mistral"),
    ({"model_type": None}, "it has no model_type"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS)
def test_bad_configs(change, message):
    config, hub, _ = tiny.made("llama")
    with pytest.raises(RecipeError, match=message):
        recipe(hub, config | change)


TOWERS = [
    ("internvl", {"downsample_ratio": 1.5}, "downsample_ratio must be a number up to 1, got 1.5"),
    ("internvl", {"vision_config": {"use_qk_norm": True}}, "vision_config.use_qk_norm True is not read"),
    (
        "internvl",
        {"vision_config": {"norm_type": "rms_norm"}},
        "vision_config.norm_type 'rms_norm' is not read",
    ),
    ("gemma4", {"vision_config": {"attention_bias": True}}, "vision_config.attention_bias true is not read"),
    ("gemma4", {"audio_config": {"subsampling_conv_channels": [16]}}, r"must be two numbers, got \[16\]"),
    ("qwen3_vl", {"vision_config": {"deepstack_visual_indexes": 2}}, "indexes must be a list, got 2"),
    (
        "kimi_k25",
        {"vision_config": {"merge_kernel_size": [2]}},
        r"merge_kernel_size must be two numbers, got \[2\]",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), TOWERS)
def test_bad_configs_of_towers(name, change, message):
    config, hub, _ = families.made(name)
    change = {k: config[k] | v if isinstance(v, dict) else v for k, v in change.items()}
    with pytest.raises(RecipeError, match=f"^config: .*{message}"):
        recipe(hub, config | change)


def test_a_whole_number_is_a_number():
    """JSON's 1 is no float; the projector then reads as many features as the tower makes."""
    config = families.made("internvl")[0] | {"downsample_ratio": 1}
    shapes = recipes.imagined(recipes.find(config), config)
    width = config["vision_config"]["hidden_size"]
    assert shapes["multi_modal_projector.layer_norm.weight"] == (width,)


def test_counts_that_no_checkpoint_has_take_no_time():
    for family, key in (("qwen2_moe", "num_hidden_layers"), ("llama", "num_hidden_layers")):
        config, hub, _ = (families if family in families.FAMILIES else tiny).made(family)
        with pytest.raises(RecipeError, match=r"model\.layers\.2|num_hidden_layers 1099511627776"):
            recipe(hub, config | {key: 1 << 40})
    config, hub, _ = families.made("internvl")
    sizes = config["vision_config"] | {"num_hidden_layers": 1 << 40}
    with pytest.raises(RecipeError, match=r"vision_config\.num_hidden_layers 1099511627776"):
        recipe(hub, config | {"vision_config": sizes})
    config, hub, _ = families.made("deepseek_v3")
    assert not len(recipe(hub, config | {"num_nextn_predict_layers": 1 << 40}).predictions)


def test_a_role_may_be_an_alias_of_a_name_without_one():
    config, hub, _ = tiny.made("llama")
    held = without(hub, "model.norm.weight") | {"shared": hub["model.norm.weight"]}
    norm = recipe(held, config, aliases={"model.norm.weight": "shared"}).norm
    assert (read(norm.weight) == bits(hub["model.norm.weight"])).all()
