"""A user's own recipe: names alone, in a file, found by path or by entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from fastckpt.recipes import FAMILIES
from fastckpt.recipes.names import Keys, Names
from layouts import families, tiny
from reading import bits, memory, same, shard

AT = "model.layers.{i}."
DENSE = dict(
    family="mine",
    embedding="model.embed_tokens.weight",
    attention_norm=AT + "input_layernorm.weight",
    o=AT + "self_attn.o_proj.weight",
    mlp_norm=AT + "post_attention_layernorm.weight",
    down=AT + "mlp.down_proj.weight",
    norm="model.norm.weight",
    lm_head="lm_head.weight",
)
APART = {p: AT + f"self_attn.{p}_proj.weight" for p in "qkv"}
GATED = {p: AT + f"mlp.{p}_proj.weight" for p in ("gate", "up")}
LLAMA = DENSE | APART | GATED


def shards(model, served, tp):
    return [shard(layout(served).targets(model, p)) for p in Placement(tp=tp).ranks()]


def equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert sorted(a) == sorted(b)
        assert all(a[n][0] == b[n][0] and (a[n][1] == b[n][1]).all() for n in a)


CASES = [
    (tiny, "llama", LLAMA | dict(biases=("q", "k", "v", "o", "gate", "up", "down"))),
    (tiny, "qwen3", LLAMA | {f"{p}_norm": AT + f"self_attn.{p}_norm.weight" for p in "qk"}),
    (tiny, "tied", LLAMA | dict(lm_head=None)),
    (
        tiny,
        "mixtral",
        LLAMA
        | dict(router=AT + "block_sparse_moe.gate.weight")
        | {
            role: (AT + "nothing.{e}.weight", AT + f"block_sparse_moe.experts.{{e}}.{w}.weight")
            for role, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        },
    ),
    (
        families,
        "phi3",
        DENSE | dict(qkv=AT + "self_attn.qkv_proj.weight", gate_up=AT + "mlp.gate_up_proj.weight"),
    ),
    (
        tiny,
        "gpt2",
        dict(
            family="mine",
            embedding="transformer.wte.weight",
            positions="transformer.wpe.weight",
            attention_norm="transformer.h.{i}.ln_1.weight",
            qkv="transformer.h.{i}.attn.c_attn.weight",
            o="transformer.h.{i}.attn.c_proj.weight",
            mlp_norm="transformer.h.{i}.ln_2.weight",
            up="transformer.h.{i}.mlp.c_fc.weight",
            down="transformer.h.{i}.mlp.c_proj.weight",
            norm="transformer.ln_f.weight",
            lm_head="lm_head.weight",
            tied=True,
            biases=("attention_norm", "mlp_norm", "norm", "qkv", "o", "up", "down"),
            transposed=("qkv", "o", "up", "down"),
            keys=Keys(
                hidden="n_embd",
                layers="n_layer",
                heads="n_head",
                kv_heads="n_head",
                width="n_inner",
                positions="n_positions",
            ),
        ),
    ),
]


@pytest.mark.parametrize(("models", "name", "names"), CASES, ids=[c[1] for c in CASES])
def test_names_read_what_the_family_reads(models, name, names):
    config, hub, _ = models.made(name)
    ours, theirs = Names(**names)(memory(hub), config), recipes.find(config)(memory(hub), config)
    same(shards(ours, "hf", 1)[0], hub)
    for tp in (2, 4):
        if name != "mixtral":  # whose stacks stand under the first of the alternatives
            equal(shards(ours, "vllm", tp), shards(theirs, "vllm", tp))


def test_grouped_matrices():
    config, hub, _ = families.made("falcon-new")
    at = "transformer.h.{i}."
    names = Names(
        family="mine",
        embedding="transformer.word_embeddings.weight",
        attention_norm=at + "ln_attn.weight",
        qkv=at + "self_attention.query_key_value.weight",
        grouped=True,
        o=at + "self_attention.dense.weight",
        mlp_norm=at + "ln_mlp.weight",
        up=at + "mlp.dense_h_to_4h.weight",
        down=at + "mlp.dense_4h_to_h.weight",
        norm="transformer.ln_f.weight",
        lm_head=None,
        biases=("attention_norm", "mlp_norm", "norm"),
        keys=Keys(kv_heads="num_kv_heads", width="ffn_hidden_size"),
    )
    theirs = recipes.find(config)(memory(hub), config)
    for served in ("hf", "vllm"):
        equal(shards(names(memory(hub), config), served, 2), shards(theirs, served, 2))


def test_biases_of_experts_are_added_once():
    """vLLM sums what the ranks make of an expert: the first of those that cut it adds down's bias."""
    config, hub, _ = tiny.made("mixtral")
    at = "model.layers.{i}.block_sparse_moe."
    roles = {
        role: at + f"experts.{{e}}.{w}.weight" for role, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    }
    biased = dict(hub)
    for name, x in hub.items():
        if ".experts." in name:
            biased[name.replace("weight", "bias")] = torch.randn(x.shape[0], dtype=x.dtype)
    names = LLAMA | roles | dict(router=at + "gate.weight", biases=("gate", "up", "down"))
    model = Names(**names)(memory(biased), config)
    same(shards(model, "hf", 1)[0], biased)
    with pytest.raises(LayoutError, match=r"no place for .*experts\.0\.w3\.bias"):
        shards(model, "rtp_llm", 2)
    ranks, stem = shards(model, "vllm", 2), "model.layers.1.block_sparse_moe.experts."
    each = [[biased[f"{stem}{e}.{w}.bias"] for e in range(3)] for w in ("w1", "w3", "w2")]
    for r, rank in enumerate(ranks):
        w13 = torch.stack([torch.cat([a.chunk(2)[r], b.chunk(2)[r]]) for a, b in zip(*each[:2], strict=True)])
        assert (rank[stem + "w13_bias"][1] == bits(w13)).all()
        w2 = torch.stack(each[2]) * (0 if r else 1)
        assert (rank[stem + "w2_bias"][1] == bits(w2.abs() if r else w2)).all()


@pytest.mark.parametrize("served", ["vllm", "megatron"])
@pytest.mark.parametrize("roles", [("q",), ("q", "v"), ("k", "v")])
def test_a_bias_of_some_of_q_k_and_v_is_refused_where_they_are_one(served, roles):
    config, hub, _ = tiny.made("qwen2")
    model = Names(**LLAMA | dict(biases=roles, ignored=("*_proj.bias",)))(memory(hub), config)
    with pytest.raises(LayoutError, match="parts have a bias, wanted all or none"):
        shards(model, served, 2)


def test_layers_counted_from_one_and_alternatives():
    config, hub, _ = tiny.made("tied")
    moved = {n.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1."): x for n, x in hub.items()}
    shifted = {
        role: (f"old.{p}", p.replace("{i}", "{i+1}")) if isinstance(p, str) else p
        for role, p in LLAMA.items()
    }
    model = Names(**shifted | dict(family="mine", lm_head=None))(memory(moved), config)
    same(shards(model, "hf", 1)[0], moved)


BAD = [
    (dict(q=None), "wanted q, k and v, or qkv"),
    (dict(qkv="a.weight"), "wanted q, k and v, or qkv"),
    (dict(up=None), "wanted up, with or without gate, or gate_up"),
    (dict(gate_up="a.weight"), "wanted up, with or without gate, or gate_up"),
    (dict(router="a.weight", gate=None), "experts need router, gate, up and down"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_names_that_contradict_themselves(change, message):
    with pytest.raises(RecipeError, match=message):
        Names(**LLAMA | change)


def test_a_role_that_is_named_must_be_there():
    config, hub, _ = tiny.made("tied")
    names = LLAMA | dict(lm_head=None)
    for change, message in [
        (dict(q_norm=AT + "self_attn.q_norm.weight"), r"needs model\.layers\.0\.self_attn\.q_norm\.weight"),
        (dict(biases=("q",)), r"needs model\.layers\.0\.self_attn\.q_proj\.bias"),
        (dict(o=AT + "self_attn.o_proj"), "does not end in .weight"),
        (dict(router=AT + "self_attn.o_proj.weight"), "num_local_experts is missing"),
    ]:
        with pytest.raises(RecipeError, match=message):
            Names(**names | change)(memory(hub), config)
    with pytest.raises(RecipeError, match=r"it needs \{e\}"):
        Names(**names | dict(router="r.weight"))(
            memory(hub | {"r.weight": torch.ones(2, 64)}), config | {"num_local_experts": 2}
        )
    with pytest.raises(RecipeError, match=r"no place for model\.norm\.weight; ignored"):
        Names(**names | dict(norm="model.layers.0.input_layernorm.weight"))(memory(hub), config)


# ---- where recipes come from ----


def test_a_file_of_the_user(tmp_path):
    config, hub, _ = tiny.made("tied")
    path = tmp_path / "mine.py"
    roles = ", ".join(f"{role}={pattern!r}" for role, pattern in (LLAMA | dict(lm_head=None)).items())
    path.write_text(f"from fastckpt.recipes.names import Names\nRECIPE = Names({roles})\n")
    model = recipes.named(str(path))(memory(hub), config)
    assert model.family.startswith("mine (")
    same(shards(model, "hf", 1)[0], hub)
    path.write_text(path.read_text() + "# changed\n")
    assert recipes.named(str(path))(memory(hub), config).family != model.family


def test_a_file_is_run_as_it_is_now(tmp_path, monkeypatch):
    """Python keeps what it compiled by a file's time, in seconds, and size."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    config, hub, _ = tiny.made("tied")
    path = tmp_path / "mine.py"
    for family in ("one", "two"):
        names = LLAMA | dict(lm_head=None, family=family)
        path.write_text(f"from fastckpt.recipes.names import Names\nRECIPE = Names(**{names})\n")
        os.utime(path, (0, 0))
        assert recipes.named(str(path))(memory(hub), config).family.startswith(f"{family} (")
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_may_define_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Sizes:\n    heads: int = 1\n"
        "def RECIPE(ckpt, config, *, vocab_size=None): ...\n"
    )
    assert callable(recipes.named(str(path)))


def test_files_and_names_that_are_no_recipe(tmp_path):
    path = tmp_path / "mine.py"
    with pytest.raises(RecipeError, match=r"mine\.py: No such file"):
        recipes.named(str(path))
    path.write_text("RECIPES = 3\n")
    with pytest.raises(RecipeError, match=r"mine\.py: RECIPE: wanted a recipe .* got None"):
        recipes.named(str(path))
    path.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        recipes.named(str(path))
    with pytest.raises(RecipeError, match=r"no recipe 'lama'; known: llama"):
        recipes.named("lama")


def test_a_config_cannot_name_a_file(tmp_path):
    path = tmp_path / "evil.py"
    path.write_text("raise SystemExit('was run')\n")
    with pytest.raises(RecipeError, match="no recipe for model_type"):
        recipes.find({"model_type": str(path)})


def test_an_installed_recipe(tmp_path, monkeypatch):
    (tmp_path / "installed_recipe.py").write_text(
        "def read(ckpt, config, *, vocab_size=None): ...\nwrong = 3\n"
    )
    info = tmp_path / "installed_recipe-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed_recipe\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[fastckpt.recipes]\nmy_family = installed_recipe:read\nno_family = installed_recipe:wrong\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert recipes.find({"model_type": "my_family"}).__name__ == "read"
    assert recipes.named("my_family").__module__ == "installed_recipe"
    with pytest.raises(RecipeError, match=r"installed_recipe:wrong: wanted a recipe .* got 3"):
        recipes.named("no_family")


def test_the_table():
    assert [row.model_type for row in FAMILIES] == list(recipes.TYPES)
    assert all(row.about and recipes.named(row.model_type) is row.known.recipe for row in FAMILIES)
    assert recipes.TYPES["llama"].known.ignored == ("*rotary_emb.inv_freq", "rope.freqs", "freqs_cis")
    for module in {row.module for row in FAMILIES}:
        read = import_module(f"fastckpt.recipes.{module}").FAMILIES
        assert {*read} == {row.model_type for row in FAMILIES if row.module == module}


def test_only_the_module_that_reads_it_is_imported():
    code = (
        "import sys; from fastckpt import recipes; recipes.named('llama'); "
        "print(*sorted(m for m in sys.modules if m.startswith('fastckpt.recipes.')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "fastckpt.recipes.llama" in found.split() and "fastckpt.recipes.gpt2" not in found.split()
