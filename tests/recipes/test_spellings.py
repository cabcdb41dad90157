"""What the hub holds besides: names without their prefix, stale buffers, other config keys, doubled heads."""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families
from reading import memory, same, shard


def hf(tensors, config, aliases=None):
    model = recipes.find(config)(memory(tensors, aliases=aliases), config)
    return model, shard(layout("hf").targets(model, Placement()))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("bloom", "transformer."), ("falcon-rw", "transformer."), ("gptj", "transformer."), ("opt", "model.")],
)
def test_names_without_their_prefix(name, prefix):
    """As bigscience's own files have them; roles carry the prefix, which transformers loads as well."""
    config, hub, _ = families.made(name)
    same(hf({n.removeprefix(prefix): x for n, x in hub.items()}, config)[1], hub)


@pytest.mark.parametrize(
    ("family", "name", "size", "why"),
    [
        ("bert", "cls.predictions.transform.dense.bias", 0, "needs .*dense.bias"),
        ("bert", "cls.predictions.transform.dense.bias", 3, r"dense.bias: got shape \(3,\), wanted \(64,\)"),
        ("bert", "cls.predictions.transform.dense.weight", 0, "needs .*dense.weight"),
        ("xlm_roberta-alone", "pooler.dense.bias", 0, "needs pooler.dense.bias"),
        ("bert", "cls.predictions.transform.dense.scale", 3, "no place for .*dense.scale"),
        ("modernbert-classes", "classifier.bias", 2, r"classifier.bias: got shape \(2,\), wanted \(3,\)"),
    ],
)
def test_a_head_that_is_carried_is_whole(family, name, size, why):
    config, hub, _ = families.made(family)
    torn = {n: x for n, x in hub.items() if n != name} | ({name: torch.ones(size)} if size else {})
    with pytest.raises(RecipeError, match=why):
        hf(torn, config)


def test_a_bert_saved_alone_keeps_its_names():
    config, hub, _ = families.made("bert-alone")
    assert "embeddings.word_embeddings.weight" in hub
    same(hf(hub, config)[1], hub)


def test_config_keys_of_old_files():
    config, hub, _ = families.made("bloom")
    old = config | {"n_embed": config["hidden_size"], "num_attention_heads": config["n_head"]}
    old = {k: v for k, v in old.items() if k not in ("hidden_size", "n_head")}
    same(hf(hub, old)[1], hub)
    config, hub, _ = families.made("falcon-new")
    old = config | {"n_head": 8, "n_head_kv": 4, "n_layer": 2}
    old = {
        k: v for k, v in old.items() if k not in ("num_attention_heads", "num_kv_heads", "num_hidden_layers")
    }
    same(hf(hub, old)[1], hub)
    config, hub, _ = families.made("internlm3")
    old = config | {"qkv_bias": config["attention_bias"], "bias": config["mlp_bias"]}
    same(hf(hub, {k: v for k, v in old.items() if k not in ("attention_bias", "mlp_bias")})[1], hub)
    config, hub, _ = families.made("qwen3_moe")
    counted = {k: v for k, v in config.items() if k != "num_local_experts"} | {"num_experts": 5}
    same(hf(hub, counted)[1], hub)


STALE = [
    ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
    ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
    ("gpt_neox", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
    ("chatglm", "transformer.rotary_pos_emb.inv_freq"),
    ("deepseek_v3", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ("bert", "bert.embeddings.position_ids"),
    ("xlm_roberta", "roberta.embeddings.position_ids"),
    ("gptj", "transformer.h.0.attn.masked_bias"),
    ("gpt_bigcode", "transformer.h.1.attn.bias"),
    ("cohere", "model.layers.0.self_attn.rotary_emb.inv_freq"),
]


@pytest.mark.parametrize(("name", "buffer"), STALE)
def test_stale_buffers_are_known(name, buffer):
    config, hub, _ = families.made(name)
    model, got = hf(hub | {buffer: torch.ones(4)}, config)
    assert model.ignored == (buffer,)
    same(got, hub)
    with pytest.raises(RecipeError, match="no place for"):
        hf(hub | {f"{buffer}.more": torch.ones(4)}, config)


def test_deepseek_v4_by_the_names_that_save_pretrained_writes():
    """A mixture of its hub's names, which transformers and vLLM load, and of those of training."""
    config, hub, _ = families.made("deepseek_v4")
    own = {"embed.weight": "model.embed_tokens.weight", "head.weight": "head.weight"}
    own |= {f"hc_head_{leaf}": f"model.hc_head.hc_{leaf}" for leaf in ("fn", "base", "scale")}
    saved = {own.get(n, "model." + n.replace(".attn.kv_norm.", ".attn.norm.")): x for n, x in hub.items()}
    same(hf(saved, config)[1], hub)
    with pytest.raises(RecipeError, match=r"are both what the hub calls layers\.0\.attn\.kv_norm\.weight"):
        hf(saved | {"layers.0.attn.kv_norm.weight": torch.ones(8)}, config)


def test_deepseek_v4_in_the_form_of_its_releases_is_refused():
    config, hub, _ = families.made("deepseek_v4")
    bytes_ = {n: x.to(torch.float8_e4m3fn) if n.endswith("wq_a.weight") else x for n, x in hub.items()}
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    with pytest.raises(RecipeError, match=r"wq_a\.weight is float8_e4m3fn, and has no weight_scale_inv"):
        hf(bytes_ | {"layers.0.attn.wq_a.scale": torch.ones(1, 1)}, config | said)


def test_deepseek_v4_by_the_keys_of_its_hubs_config():
    config, hub, _ = families.made("deepseek_v4")
    kinds = {"layer_types": None, "compress_ratios": [0, 4, 128, 4, 0]}  # one of a layer after the last
    rates = {"compress_rates": None, "compress_rate_csa": 4, "compress_rate_hca": 128}
    same(hf(hub, config | kinds | rates)[1], hub)
    for changed, message in (
        ({"layer_types": None}, r"layers\.0\.attn\.compressor\.wkv"),
        ({"layer_types": None, "compress_ratios": [0, 5, 128, 4]}, "compress_ratios must be of 0, 4, 128"),
        ({"layer_types": None, "compress_ratios": [0, 4.0, 128, 4]}, "must be of 0, 4, 128"),
        ({"layer_types": None, "compress_ratios": [[0], "4", 128, 4]}, "must be of 0, 4, 128"),
        ({"layer_types": ["sliding_attention"]}, "layer_types must be 4 of sliding_attention and"),
        ({"compress_rate_csa": 8}, r"compressor\.ape: got shape \(4, 16\), wanted \(8, 16\)"),
        ({"compress_rates": "4"}, "compress_rates must be an object"),
        ({"mlp_layer_types": None}, r"layers\.1\.ffn\.gate\.tid2eid"),
        ({"mlp_layer_types": None, "num_hash_layers": 0}, r"layers\.0\.ffn\.gate\.bias"),
        ({"o_groups": 3}, "num_attention_heads 8 is no multiple of o_groups 3"),
    ):
        with pytest.raises(RecipeError, match=message):
            hf(hub, config | changed)


def spelled(hub, *replaced):
    """The same tensors with these parts of their names replaced."""
    out = {}
    for name, x in hub.items():
        for old, new in replaced:
            name = name.replace(old, new)
        out[name] = x
    return out


def test_kimi_linear_as_it_is_saved_and_as_its_hubs_config_says():
    """save_pretrained calls dense blocks as it calls those with experts."""
    config, hub, _ = families.made("kimi_linear")
    same(hf(spelled(hub, (".mlp.", ".block_sparse_moe.")), config)[1], hub)
    linear = {"head_dim": 10, "num_heads": 8, "short_conv_kernel_size": 3}
    layers = {"kda_layers": [1, 3], "full_attn_layers": [2]}
    silent = {k: v for k, v in config.items() if k not in ("layer_types", "mlp_layer_types")}
    silent = {k: v for k, v in silent.items() if not k.startswith("linear_")} | {"first_k_dense_replace": 1}
    same(hf(hub, silent | {"linear_attn_config": linear | layers})[1], hub)
    for said, message in (
        (linear, r"layers\.1\.self_attn\.q_proj"),
        (linear | layers | {"num_heads": 4}, r"q_proj\.weight: got shape \(80, 64\), wanted \(40, 64\)"),
        (linear | layers | {"kda_layers": [1]}, "must name each of 3 layers once"),
        (linear | layers | {"kda_layers": 1}, "must be lists"),
        (7, "linear_attn_config must be an object"),
    ):
        with pytest.raises(RecipeError, match=message):
            hf(hub, silent | {"linear_attn_config": said})


def test_olmo_hybrid_as_it_is_saved():
    """Norms by OLMo-core's names, and the kernels of q, k and v in three parts of as many rows each."""
    config, hub, _ = families.made("olmo_hybrid")
    after = {n for n in hub if ".layers.1." in n}  # with attention: its first norm has the name of another's
    saved = spelled(
        {n: x for n, x in hub.items() if n not in after},
        (".input_layernorm.", ".attention_layer_norm."),
        (".post_attention_layernorm.", ".feedforward_layer_norm."),
    )
    saved |= spelled({n: hub[n] for n in after}, (".post_attention_layernorm.", ".feedforward_layer_norm."))
    for i in (0, 2):
        at = [f"model.layers.{i}.linear_attn.{part}_conv1d.weight" for part in "qkv"]
        saved |= zip(at, torch.cat([hub[n] for n in at]).chunk(3), strict=True)
        assert [len(saved[n]) for n in at] == [86, 86, 84] != [len(hub[n]) for n in at]
    same(hf(saved, config)[1], hub)
    with pytest.raises(RecipeError, match=r"k_conv1d\.weight: got shape \(47, 1, 3\), wanted \(48, 1, 3\)"):
        hf(hub | {at[1]: hub[at[1]][:47]}, config)


LEFT_OUT = [
    ("mimo_v2_flash", {"num_hidden_layers": 8, "mlp_layer_types": None}, "layer_types"),
    ("laguna", {}, "num_attention_heads_per_layer"),
    ("minicpm3", {}, "v_head_dim"),
    ("olmo_hybrid", {}, "layer_types"),
    ("olmo_hybrid", {"num_hidden_layers": 5}, "layer_types"),
    ("lfm2", {}, "layer_types"),
    ("lfm2", {"full_attn_idxs": [1]}, "layer_types"),
    ("lfm2", {"tie_embedding": False}, "tie_word_embeddings"),
]


@pytest.mark.parametrize(("name", "more", "key"), LEFT_OUT)
def test_what_a_config_leaves_out_is_what_transformers_makes_of_it(name, more, key):
    silent = {k: v for k, v in (families.made(name)[0] | more).items() if k != key}
    meant = type(families.config_of(name))(**silent).to_dict()[key]
    recipe = recipes.find(silent)
    assert recipes.imagined(recipe, silent) == recipes.imagined(recipe, silent | {key: meant})


def test_layers_that_a_config_numbers_wrongly():
    silent = {k: v for k, v in families.made("lfm2")[0].items() if k != "layer_types"}
    with pytest.raises(RecipeError, match=r"full_attn_idxs must be numbers of 3 layers, got \[3\]"):
        recipes.imagined(recipes.find(silent), silent | {"full_attn_idxs": [3]})


@pytest.mark.parametrize("name", ["granitemoe", "qwen3_moe", "phimoe", "jamba", "lfm2_moe", "deepseek_v3"])
def test_what_the_hub_calls_tensors_of_training(name):
    config, hub, trained = families.made(name)
    for there, tensor in trained.items():
        names = recipes.saved_as(config, there)
        if there not in hub and names:
            found = [hub[n.format(0)] for n in names]
            rows = sum(x.shape[-2] for x in found)
            assert (rows, found[0].shape[-1]) == tuple(tensor.shape[-2:]), there


def test_which_layers_of_jamba_have_what():
    config, hub, _ = families.made("jamba")
    same(hf(hub, config | {"mamba_dt_rank": 10, "num_local_experts": 5, "num_experts": None})[1], hub)
    for changed, message in (
        ({"attn_layer_offset": 2}, r"layers\.1\.mamba\.in_proj"),
        ({"attn_layer_offset": 3}, "attn_layer_offset 3 is not below attn_layer_period 3"),
        ({"expert_layer_offset": 0}, r"layers\.0\.feed_forward\.router"),
        ({"num_experts": 1}, r"layers\.1\.feed_forward\.gate_proj"),
        ({"mamba_dt_rank": "auto"}, r"x_proj\.weight: got shape \(22, 128\), wanted \(16, 128\)"),
        ({"mamba_expand": 3}, r"in_proj\.weight: got shape \(256, 64\), wanted \(384, 64\)"),
    ):
        with pytest.raises(RecipeError, match=message):
            hf(hub, config | changed)


def test_heads_by_the_name_they_are_trained_under():
    config, hub, state = families.made("gpt_neox")
    assert "embed_out.weight" in hub and "lm_head.weight" in state
    same(hf(state, config)[1], hub)
    with pytest.raises(RecipeError, match=r"no place for lm_head\.weight"):
        hf(hub | {"lm_head.weight": hub["embed_out.weight"]}, config)


def test_tied_pairs_of_a_trainer():
    """DeepSpeed names every member of a tied pair; a source turns all but one into aliases."""
    config, hub, _ = families.made("t5")
    pairs = {n: "shared.weight" for n in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}
    same(hf(hub, config, pairs | {"lm_head.weight": "shared.weight"})[1], hub)
    config, hub, _ = families.made("bert")
    table = "bert.embeddings.word_embeddings.weight"
    pairs = {"cls.predictions.decoder.weight": table, "cls.predictions.decoder.bias": "cls.predictions.bias"}
    same(hf(hub, config, pairs)[1], hub)
    hub = hub | {"cls.predictions.decoder.bias": hub["cls.predictions.bias"] + 1}
    with pytest.raises(
        RecipeError, match=r"cls.predictions.bias and cls.predictions.decoder.bias are two tens"
    ):
        hf(hub, config, {"cls.predictions.decoder.weight": table})


@pytest.mark.parametrize(("name", "head"), [("bert", "cls.predictions"), ("roberta", "lm_head")])
def test_a_head_that_is_not_tied_keeps_both_biases(name, head):
    """transformers 5 adds that of the matrix, and saves both."""
    config, hub, _ = families.made(name)
    hub = hub | {  # not in place: `made` keeps it for other tests
        f"{head}.decoder.weight": torch.randn(hub[f"{head}.bias"].shape[0], config["hidden_size"]),
        f"{head}.decoder.bias": hub[f"{head}.bias"] + 1,
    }
    model, got = hf(hub, config | {"tie_word_embeddings": False})
    assert model.lm_head.bias_name == f"{head}.decoder.bias"
    same(got, hub)


def test_forms_that_are_not_read():
    config, hub, _ = families.made("chatglm")
    for key in ("rmsnorm", "post_layer_norm"):
        with pytest.raises(RecipeError, match=f"{key} False is not read"):
            hf(hub, config | {key: False})
    config, hub, _ = families.made("opt")
    for key, value in (
        ("do_layer_norm_before", False),
        ("_remove_final_layer_norm", True),
        ("word_embed_proj_dim", 32),
    ):
        with pytest.raises(RecipeError, match=f"{key}.* is not read"):
            hf(hub, config | {key: value})
    config, hub, _ = families.made("mpt")
    for attends in ({"alibi": False}, {"attn_type": "multiquery_attention"}, {"alibi_bias_max": 16}):
        with pytest.raises(RecipeError, match="wanted"):
            hf(hub, config | {"attn_config": attends})
    with pytest.raises(RecipeError, match="attn_config must be an object, got 'x'"):
        hf(hub, config | {"attn_config": "x"})
    config, hub, _ = families.made("whisper")
    with pytest.raises(RecipeError, match="8 decoder and 4 encoder heads"):
        hf(hub, config | {"encoder_attention_heads": 4})
    config, hub, _ = families.made("qwen3_moe")
    with pytest.raises(RecipeError, match="mlp_only_layers must be a list"):
        hf(hub, config | {"mlp_only_layers": "0"})


def test_layers_for_more_tokens_that_transformers_leaves_out():
    """Of ERNIE, K-EXAONE and DeepSeek-V4; their servers are other models."""
    leaves = {"ernie4_5_moe": "model.mtp_linear_proj.0.weight", "exaone_moe": "mtp.fc.weight"}
    leaves["deepseek_v4"] = "mtp.0.norm.weight"
    for name, further in leaves.items():
        config, hub, _ = families.made(name)
        model, got = hf(hub | {further: torch.ones(4)}, config)
        assert model.ignored == (further,)
        same(got, hub)


def test_numbers_said_of_each_layer():
    config, hub, _ = families.made("hunyuan_v1_moe")
    same(hf(hub, config | {"num_shared_expert": [1, 1]})[1], hub)
    with pytest.raises(RecipeError, match="num_shared_expert"):
        hf(hub, config | {"num_shared_expert": [1, 2]})


def test_layers_with_experts_by_every_key():
    """Kinds of layers, or how many are dense, or how far apart those with experts are."""
    config, hub, _ = families.made("exaone_moe")
    assert config["mlp_layer_types"] == ["sparse", "dense"] and config["first_k_dense_replace"] == 1
    for types, message in (
        (["sparse"], "mlp_layer_types must be 2 of dense and sparse"),
        (["sparse", "other"], "mlp_layer_types must be 2 of dense and sparse"),
        (["sparse", ["sparse"]], "mlp_layer_types must be 2 of dense and sparse"),
        (["dense", "sparse"], "layers.0.mlp.gate_proj"),
        (None, "layers.0.mlp.gate_proj"),
    ):
        with pytest.raises(RecipeError, match=message):
            hf(hub, config | {"mlp_layer_types": types})
    config, hub, _ = families.made("llama4_text")
    assert config["moe_layers"] == [1] and config["interleave_moe_layer_step"] == 2
    same(hf(hub, config | {"moe_layers": None})[1], hub)
    for changed in ({"moe_layers": [0]}, {"moe_layers": None, "interleave_moe_layer_step": 1}):
        with pytest.raises(RecipeError, match=r"layers\.[01]\.feed_forward"):
            hf(hub, config | changed)
    with pytest.raises(RecipeError, match="moe_layers must be a list of numbers"):
        hf(hub, config | {"moe_layers": "1"})
    config, hub, _ = families.made("cohere2_moe")
    assert config["mlp_layer_types"] == ["dense", "sparse"]
    silent = {k: v for k, v in config.items() if k != "mlp_layer_types"}
    same(hf(hub, silent | {"first_k_dense_replace": 1})[1], hub)
    for changed, message in (
        ({"first_k_dense_replace": 0}, r"layers\.0\.mlp\.gate\.weight"),
        ({"mlp_layer_types": None}, r"layers\.0\.mlp\.gate\.weight"),
        ({"first_k_dense_replace": 1, "num_shared_experts": None}, "no place for .*shared_experts"),
        ({"first_k_dense_replace": 1, "prefix_dense_intermediate_size": None}, r"\(80, 64\), wanted \(96, "),
    ):
        with pytest.raises(RecipeError, match=message):
            hf(hub, silent | changed)
    config, hub, _ = families.made("afmoe")
    assert (config["num_dense_layers"], config["num_shared_experts"]) == (2, 2)
    same(hf(hub, config | {"num_shared_experts": None})[1], hub)
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.router\.gate\.weight"):
        hf(hub, config | {"num_dense_layers": None})
    config, hub, _ = families.made("ernie4_5_moe")
    assert (config["moe_layer_start_index"], config["moe_layer_end_index"]) == (0, 0)
    for changed in ({"moe_layer_end_index": -1}, {"moe_layer_start_index": 1}, {"moe_layer_interval": 2}):
        with pytest.raises(RecipeError, match=r"layers\.[01]\.mlp"):
            hf(hub, config | changed)


def test_norms_after_blocks_that_a_config_leaves_out():
    config, hub, _ = families.made("hyperclovax")
    same(hf(hub, {k: v for k, v in config.items() if k != "use_post_norm"})[1], hub)
    with pytest.raises(RecipeError, match=r"no place for .*post_norm1\.weight"):
        hf(hub, config | {"use_post_norm": False})
    config, hub, _ = families.made("hyperclovax-before")
    with pytest.raises(RecipeError, match=r"needs .*post_norm1\.weight"):
        hf(hub, config | {"use_post_norm": None})


def test_layers_with_an_indexer_by_every_key():
    config, hub, _ = families.made("glm_moe_dsa")
    assert config["indexer_types"] == ["full", "shared"]
    silent = {k: v for k, v in config.items() if k != "indexer_types"}
    said = ({"index_topk_pattern": "FS"}, {"index_topk_freq": 2, "index_skip_topk_offset": 1})
    for one in said:
        same(hf(hub, silent | one)[1], hub)
    for other in ({}, {"index_topk_pattern": "FF"}, {"index_topk_freq": 2}):
        with pytest.raises(RecipeError, match=r"layers\.1\.self_attn\.indexer\.wq_b"):
            hf(hub, silent | other)
    with pytest.raises(RecipeError, match="index_topk_pattern must be 2 of full and shared and F"):
        hf(hub, silent | {"index_topk_pattern": "F"})
