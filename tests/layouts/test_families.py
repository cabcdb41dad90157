"""Every family: what transformers saves and trains is read, cut as the servers cut, and nothing is lost."""

from __future__ import annotations

import fastckpt
import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families, family_oracle, oracle
from layouts.slices import local_parts
from reading import bits, memory, same, shard

NAMES = [*families.FAMILIES, "chatglm"]
ENCODERS = list(families.ENCODERS)
WRAPPERS = list(families.WRAPPERS)
WITHOUT_PLAN = (
    "bloom",
    "falcon-",
    "stablelm",
    "hunyuan_v1_dense",
    "gpt_bigcode",
    "gptj",
    "opt",
    "mpt",
    "lfm2",
)
PLANNED = [n for n in families.FAMILIES if n == "lfm2_moe" or not n.startswith(WITHOUT_PLAN)]
UNPLANNED = [n for n in NAMES if n not in PLANNED]


TIED = ("lm_head.weight", "decoder.weight", ".decoder.bias", "coder.embed_tokens.weight", "proj_out.weight")


def model_of(name, trained=False, pieces=2):
    config, hub, state = families.made(name)
    tensors = state if trained else hub
    if trained and config["tie_word_embeddings"]:  # a source names such pairs once
        tensors = {n: x for n, x in tensors.items() if n in hub or not n.endswith(TIED)}
    return recipes.find(config)(memory(tensors, pieces), config)


def shards_of(name, served, placement, trained=False, **options):
    model, placed = model_of(name, trained), layout(served, options)
    return [shard(placed.targets(model, p)) for p in placement.ranks()]


NUMBERS = {"float32": "f4", "int64": "i8"}


def all_numbers(tensors):
    return sorted(torch.cat([x.flatten() for x in tensors.values()]).unique().tolist())


READ = [(n, t) for n in NAMES + ENCODERS + WRAPPERS for t in (False, True) if (n, t) != ("kimi_k25", True)]


@pytest.mark.parametrize(
    ("name", "trained"), READ, ids=[f"{n}-{'trained' if t else 'saved'}" for n, t in READ]
)
def test_hf_of_one_rank_is_what_save_pretrained_writes(name, trained):
    same(shards_of(name, "hf", Placement(), trained)[0], families.made(name)[1])


TRAINED = (
    ("embed_out.", "lm_head."),
    (".block_sparse_moe.gate.", ".mlp.router."),
    (".block_sparse_moe.", ".mlp."),
    (".attention_sink_bias", ".sinks"),
    (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
    (".mlp.router.gate.", ".mlp.gate."),
    (".mlp.shared_mlp.", ".mlp.shared_experts."),
    (".mlp.experts.e_score_", ".mlp.gate.e_score_"),
    (".mlp.shared_expert.", ".mlp.shared_experts."),
    (".mlp.e_score_", ".mlp.gate.e_score_"),
    (".mlp.moe_statics.", ".mlp.gate.moe_statics."),
    (".router.layer.", ".router."),
    (".input_linear.weight", ".experts.gate_up_proj"),
    (".output_linear.weight", ".experts.down_proj"),
    ("backbone.", "model."),
)
"""Parts of the hub's names, and what transformers calls them in memory, in some families."""


def named_as_trained(name, state):
    if any(f".{block}.experts." in name for block in ("block_sparse_moe", "feed_forward", "ffn")):
        name = f"model.{name}" if ".ffn." in name else name
        name = name.replace(".block_sparse_moe.", ".mlp.").replace(".ffn.", ".mlp.")
        for hub, trained in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            name = name.replace(f".{hub}.", f".{trained}_proj.")
    others = (name.replace(hub, trained) for hub, trained in TRAINED)
    return next((other for other in others if other in state), name)


def as_trained(tensors, state):
    """A shard by the names transformers holds in memory, experts in stacks."""
    out = {named_as_trained(n, state): torch.from_numpy(v) for n, (_, v) in tensors.items()}
    for name in [n for n in state if n.endswith(".conv1d.weight") and n not in out]:
        out[name] = torch.cat([out.pop(name.replace("conv1d", f"{part}_conv1d")) for part in "qkv"])
    for name in [n for n in state if n.endswith("experts.gate_up_proj") and n not in out]:
        at = name.removesuffix("gate_up_proj")
        count = state[name].shape[0]
        gate, up, down = (
            torch.stack([out.pop(f"{at}{e}.{p}_proj.weight") for e in range(count)])
            for p in ("gate", "up", "down")
        )
        out |= {name: torch.cat([gate, up], 1), f"{at}down_proj": down}
    for name in [n for n in state if n.endswith(("experts.up_proj", "experts.down_proj")) and n not in out]:
        each = [f"{name.replace('experts.', f'experts.{e}.')}.weight" for e in range(len(state[name]))]
        out[name] = torch.stack([out.pop(n.replace("model.", "backbone.", 1)) for n in each])
    return out


SPELLED = (*WRAPPERS, "deepseek_v4", "kimi_linear", "olmo_hybrid")
"""Models of which transformers calls most tensors otherwise in memory than the hub does."""


def as_saved(hub, state):
    """Name in memory -> name in the files, by the tensors' shapes and values, each of which is another."""
    names = {(x.shape, float(x.flatten()[0])): n for n, x in hub.items()}
    found = {n: names.get((x.shape, float(x.flatten()[0]))) for n, x in state.items()}
    return {n: saved for n, saved in found.items() if saved is not None}


def check_plan(name, tp):
    config, hub, state = families.made(name)
    saved = as_saved(hub, state)
    got = shards_of(name, "hf", Placement(tp=tp))
    for rank in range(tp):
        whole = families.model_of(name)
        whole.load_state_dict(state)
        want = local_parts(whole, tp, rank)
        if config["tie_word_embeddings"]:
            del want["lm_head.weight"]
        if name in SPELLED:
            want = {saved.get(n, n): x for n, x in want.items()}
        if name.startswith(("llama4-", "gemma4")):  # transformers cuts some of the tower, and the projector
            beside = ("vision_model.", "multi_modal_projector.", "model.vision_tower.")
            want |= {n: x for n, x in state.items() if n.startswith(beside)}
        alone = {n: x for n, x in state.items() if name not in SPELLED or n not in saved}
        mine = as_trained(got[rank], alone)
        assert sorted(mine) == sorted(want)
        for parameter, part in want.items():
            assert torch.equal(mine[parameter], torch.from_numpy(bits(part))), parameter


WITHOUT_ITS_OWN = ("qwen3_vl", "kimi_k25", "lfm2_vl", "lfm2_vl-moe")
"""Wrappers of which transformers has no plan, or none by the hub's names."""


@pytest.mark.parametrize("name", PLANNED + [n for n in WRAPPERS if n not in WITHOUT_ITS_OWN])
def test_hf_cuts_what_transformers_cuts(name):
    check_plan(name, 2)


@pytest.mark.parametrize(
    ("name", "at", "own"),
    [
        ("kimi_k25", "language_model.", ""),
        ("lfm2_vl", "model.language_model.", "model."),
        ("lfm2_vl-moe", "model.language_model.", "model."),
    ],
)
def test_a_wrapper_is_cut_as_its_decoder(name, at, own):
    """transformers cuts none of LFM2's, and calls the layers of Kimi K2.5's tower otherwise."""
    config, hub, _ = families.made(name)
    decoder = {own + n.removeprefix(at): x for n, x in hub.items() if n.startswith(at)}
    told = config["text_config"] | {"tie_word_embeddings": config["tie_word_embeddings"]}
    text = recipes.find(told)(memory(decoder), told)
    for place in Placement(tp=2).ranks():
        part = shard(layout("hf").targets(text, place))
        want = {at + n.removeprefix(own): x for n, x in part.items()}
        got = shard(layout("hf").targets(model_of(name), place))
        same({n: got.pop(n) for n in got.keys() - want}, {n: hub[n] for n in hub.keys() - want})
        assert got.keys() == want.keys()
        assert all((got[n][1] == x).all() for n, (_, x) in want.items())


def test_kimi_k25s_tower_as_it_is_trained_is_refused():
    """The rows of q and k are turned there."""
    config, _, state = families.made("kimi_k25")
    with pytest.raises(RecipeError, match=r"needs vision_tower\.encoder\.blocks\.0\.norm0\.weight"):
        recipes.find(config)(memory(state), config)


@pytest.mark.parametrize("tp", [2, 4])
def test_qwen3_vl_which_has_no_plan_is_cut_as_qwen3(tp):
    """transformers 5.23 cuts its head alone."""
    _, hub, _ = families.made("qwen3_vl")
    rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    for rank, got in enumerate(shards_of("qwen3_vl", "hf", Placement(tp=tp))):
        want = {}
        for name, x in hub.items():
            module = "" if ".visual." in name else name.split(".")[-2]
            axis = 0 if module in rows else 1
            cut = module in (*rows, "o_proj", "down_proj")
            want[name] = x.chunk(tp, axis)[rank] if cut else x
        same(got, want)


TWO_IN_SOME = ("gemma4_text-mixed", "gemma4_unified_text")
"""Models of which some layers have two kv heads, which hf refuses to cut in four."""


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name", [n for n in PLANNED if families.FAMILIES[n].heads[1] % 4 == 0 and n not in TWO_IN_SOME]
)
def test_hf_cuts_what_transformers_cuts_in_four(name):
    check_plan(name, 4)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", UNPLANNED + ENCODERS)
def test_hf_without_a_plan_of_transformers(name, tp):
    _, hub, _ = families.made(name)
    heads = (8, 2, 8) if name == "chatglm" else (families.FAMILIES | families.ENCODERS)[name].heads
    shards = shards_of(name, "hf", Placement(tp=tp), replicate_kv="true")
    for rank, got in enumerate(shards):
        same(got, family_oracle.hf(hub, heads, tp, rank))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_vllm(name, tp):
    _, hub, _ = families.made(name)
    heads = (8, 2, 8) if name == "chatglm" else families.FAMILIES[name].heads
    shards = shards_of(name, "vllm", Placement(tp=tp))
    found = set()
    for rank, got in enumerate(shards):
        want = family_oracle.vllm(hub, heads, tp, rank, order="grouped" if name != "chatglm" else "concat")
        same(got, want)
        found |= {float(x) for kind, v in got.values() for x in v.view(NUMBERS[kind]).flatten()}
    assert sorted(found - {0.0}) == all_numbers(hub)


def apart(hub, heads):
    """The same tensors by Llama's names: what is fused, taken apart."""
    out = {}
    for name, x in hub.items():
        if ".qkv_proj." in name:
            for p, y in zip("qkv", family_oracle.parts(x, heads, False), strict=True):
                out[name.replace("qkv_proj", f"{p}_proj")] = y
        elif ".gate_up_proj." in name:
            for p, y in zip(("gate", "up"), x.chunk(2), strict=True):
                out[name.replace("gate_up_proj", f"{p}_proj")] = y
        else:
            out[name] = x
    return out


LIKE_LLAMA = ("ministral3", "seed_oss", "ernie4_5-biased", "internlm3", "cwm", "helium", "stablelm")
UNGATED = ("starcoder2", "starcoder2-plain", "arcee", "jais2")


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("name", ["granite", "ministral", "smollm3", "phi3", "glm", *LIKE_LLAMA, *UNGATED])
def test_rtp_llm(name, tp):
    config, hub, _ = families.made(name)
    plain = apart(hub, families.FAMILIES[name].heads)
    for rank, got in enumerate(shards_of(name, "rtp_llm", Placement(tp=tp))):
        same(got, oracle.rtp_llm(plain, config, tp, rank))


@pytest.mark.parametrize("name", ["olmo2", "cohere-normed"])
def test_heads_are_not_added_where_norms_tell(name):
    placed = layout("vllm", {"pad": "true", "vocab_padding": "96"})
    with pytest.raises(LayoutError, match="q_norm tells heads apart or norms them all at once"):
        list(placed.targets(model_of(name), Placement(tp=3)))


def test_norms_of_repeated_heads_are_repeated():
    """vLLM's own loader fails here; a rank's norm is that of the kv head it holds."""
    hub, name = families.made("cohere-normed")[1], "model.layers.1.self_attn.k_norm.weight"
    for rank, got in enumerate(shards_of("cohere-normed", "vllm", Placement(tp=8))):
        assert torch.equal(torch.from_numpy(got[name][1].view("f4")), hub[name][rank // 2 : rank // 2 + 1])


def test_refusals_name_what_has_no_place():
    for name, what in [
        ("olmo", "lm_head"),
        ("olmo2", "post_attention_layernorm"),
        ("exaone4", "post_attention_layernorm"),
        ("cohere-normed", "q_norm, a norm with weights for each head"),
        ("hunyuan_v1_dense", "query_layernorm, a norm after the rotary positions"),
        ("apertus", "act_fn.alpha_p"),
        ("gemma2", "post_attention_layernorm"),
        ("deepseek_v2-lora", "kv_a_proj_with_mqa.bias"),
        ("gpt_oss", "attention of model"),
        ("bert", "pooler|cls"),
    ]:
        with pytest.raises(LayoutError, match=what):
            list(layout("rtp_llm").targets(model_of(name), Placement(tp=2)))


@pytest.mark.parametrize("said", [False, None])
@pytest.mark.parametrize("name", ["deepseek_v3", "mistral4", "minicpm3"])
def test_latent_attention_whose_positions_turn_halves(name, said):
    """Servers turn neighbours, whatever rope_interleave says; MiniCPM 3 never does, in vLLM too."""
    config, hub, _ = families.made(name)
    model = recipes.find(config)(memory(hub), config | {"rope_interleave": said})
    same(shard(layout("hf").targets(model, Placement())), hub)
    for served in ("vllm", "rtp_llm", "megatron"):
        if (name, served) == ("minicpm3", "vllm"):
            list(layout(served).targets(model, Placement()))
            continue
        since = r" false\); RTP-LLM reads .* 68a3f843b .*layout hf$" if served == "rtp_llm" else r" false\)$"
        what = f"{served} has no place for .*kv_a_proj_with_mqa.*rope_interleave{since}"
        with pytest.raises(LayoutError, match=what):
            list(layout(served).targets(model, Placement()))
    if name != "minicpm3":
        model = recipes.find(config)(memory(hub), config | {"rope_interleave": True})
        assert list(layout("vllm").targets(model, Placement()))


@pytest.mark.parametrize("served", ["rtp_llm", "megatron"])
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lfm2", {}, r"no place for .*out_proj, of a short convolution"),
        ("mimo_v2_flash", dict(layer_types=["full_attention"] * 3), r"v_proj, of other rows than .*k_proj"),
        (
            "nemotron_h",
            dict(layers_block_type=["mlp", "moe"], num_hidden_layers=2),
            "0, a layer of one block",
        ),
    ],
)
def test_blocks_that_servers_do_not_know(name, changes, message, served):
    with pytest.raises(LayoutError, match=f"^layout {served} .*{message}"):
        list(layout(served).targets(families.blank(name, **changes), Placement()))


def test_stages_that_read_one_another():
    """vLLM does not cut Gemma 4's layers without keys of their own into stages."""
    message = r"model\.layers\.2 reads the keys of an earlier layer, .*: wanted pp 1, got 2"
    with pytest.raises(LayoutError, match=message):
        layout("vllm", {"engine": "vllm==0.32"}).targets(model_of("gemma4_text"), Placement(pp=2))


def test_a_pooling_head_of_a_tower():
    config = families.made("gemma3-images")[0]
    vision = config["vision_config"] | {"vision_use_head": True}
    model = families.blank("gemma3-images", vision_config=vision)
    want = {
        "vision_tower.head.probe",
        "vision_tower.head.attention.in_proj_weight",
        "vision_tower.head.layernorm.bias",
    }
    assert want <= {t.name for t in layout("hf").targets(model, Placement())}
    with pytest.raises(LayoutError, match=r"layout vllm has no place for vision_tower\.head\.probe"):
        layout("vllm").targets(model, Placement())


@pytest.mark.parametrize("name", ["olmoe", "minimax_m2"])
def test_heads_that_are_normed_together_are_not_padded(name):
    with pytest.raises(LayoutError, match="q_norm"):
        shards_of(name, "vllm", Placement(tp=3), pad="true", vocab_padding="3")


def test_rows_in_pairs_want_plain_matrices():
    config, hub, _ = families.made("llama4_text")
    biases = {n.replace("weight", "bias"): x[:, 0].clone() for n, x in hub.items() if ".self_attn." in n}
    model = recipes.find(config)(memory(hub | biases), config | {"attention_bias": True})
    with pytest.raises(LayoutError, match=r"how vLLM orders .*q_proj\.bias is not known"):
        list(layout("vllm").targets(model, Placement(tp=2)))


@pytest.mark.parametrize("name", ["granitemoeshared", "llama4_text", "llama4-images"])
def test_stacks_are_not_quantised_as_the_hub_has_them(name):
    """Nor left dense unsaid; as vLLM has them they are quantised, and a shared block always is."""
    config, hub, _ = families.made(name)
    with pytest.raises(LayoutError, match=r"stack of experts, which would stay dense; .*split_experts=True"):
        fastckpt.reshard(hub, 1, layout="hf", quant="int8", config=config)
    (got,) = fastckpt.reshard(hub, 1, layout="vllm", quant="int8", config=config)
    wanted = ("shared_mlp.input_linear.weight", "shared_expert.gate_up_proj.weight", "experts.w13_weight")
    found = [x for n, x in got.items() if "layers.1." in n and n.endswith(wanted)]
    assert [x.dtype for x in found] == [torch.int8] * 2


@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe"])
def test_a_block_is_quantised_by_all_its_names(name):
    """vLLM calls LFM2's gate and up w13."""
    config, hub, _ = families.made(name)
    for served in ("hf", "vllm"):
        (got,) = fastckpt.reshard(hub, 1, layout=served, quant="int8", config=config)
        block = {n: x for n, x in got.items() if ".layers.0.feed_forward." in n and n.endswith(".weight")}
        assert len(block) >= 2 and {x.dtype for x in block.values()} == {torch.int8}
