"""Checkpoints of Megatron's training: what megatron-core itself wrote, and saves with one thing wrong.

tests/fixtures/megatron holds what make_megatron_fixtures.py wrote with megatron-core 0.16.1 and 0.19.2, and
the truth: the transformers model whose weights megatron-core carried to its ranks.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt import cli, opening
from fastckpt.errors import FastckptError, LayoutError, RecipeError, SourceError
from fastckpt.joining import megatron
from fastckpt.layouts import layout
from layouts import families, gated, tiny
from megatron_writer import dist, keys_of, written
from reading import holds, refuses_a_copy_that_differs
from safetensors.torch import load_file, save_file

pytest.importorskip("lzma")  # of the fixtures; a Python may be built without it
FIXTURES = Path(__file__).parents[1] / "fixtures" / "megatron"
CASES = sorted(p.name.removesuffix(".tar.xz") for p in FIXTURES.glob("*.tar.xz"))
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setenv("FASTCKPT_CACHE", "off")


@pytest.fixture(scope="session")
def unpacked(packed):
    """Where a case lies."""
    return partial(packed, "megatron")


@pytest.fixture
def case(unpacked, tmp_path):
    """A copy of a case that may be broken."""
    return lambda name: Path(shutil.copytree(unpacked(name), tmp_path / name))


def alike(a, b):
    """Dicts of tensors a rank, bit for bit."""
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert one.keys() == two.keys()
        for name, x in one.items():
            assert x.dtype is two[name].dtype and torch.equal(x, two[name]), name


# ---- what megatron-core wrote ----


def test_every_kind_is_here():
    models = {name.rpartition("-")[0] for name in CASES}
    assert models == {"llama", "virtual", "qwen2", "qwen3_moe", "expert_tp", "deepseek_v3", "gpt2"}
    assert {name.rpartition("-")[2] for name in CASES} == {"0.16.1", "0.19.2"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["dist", "legacy"])
@pytest.mark.parametrize("weights", ["master", "module"])
def test_it_is_what_the_model_held(unpacked, name, kind, weights):
    at = unpacked(name)
    masters = at / "masters.safetensors"
    has_masters = kind == "dist" and weights == "master" and masters.exists()
    truth = load_file(masters if has_masters else at / "truth.safetensors")
    ckpt = fastckpt.open(at / kind, config=at, weights=weights)
    holds(ckpt, truth)
    assert ckpt.saved.step == 100
    narrow = any(x.itemsize == 2 for x in truth.values())
    assert bool(ckpt.notes) == (weights == "master" and narrow)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("llama", "qwen3_moe"))])
def test_gate_and_up_layers_and_experts_apart(unpacked, name):
    """singleton_local_shards: what is one tensor otherwise has names of its own."""
    at = unpacked(name)
    apart = at.with_name(name.replace("-0", "-singleton-0")) / "dist"
    holds(fastckpt.open(apart, config=at, weights="module"), load_file(at / "truth.safetensors"))
    if name.startswith("llama"):
        holds(fastckpt.open(apart, config=at), load_file(at / "masters.safetensors"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["dist", "legacy"])
def test_servers_get_what_they_get_of_the_hub(unpacked, tmp_path, name, kind):
    at = unpacked(name)
    shutil.copy(at / "config.json", tmp_path)
    shutil.copy(at / "truth.safetensors", tmp_path / "model.safetensors")
    absent = ("vllm", "rtp_llm") if name.startswith("gpt2") else ()
    for served in (s for s in ("hf", "vllm", "rtp_llm", "megatron") if s not in absent):
        placed = layout(served, {"replicate_kv": "true", "vocab_padding": "8"} if served == "hf" else {})
        want = fastckpt.reshard(tmp_path, 2, layout=placed, dtype="bfloat16")
        ckpt = fastckpt.open(at / kind, config=at, weights="module")
        alike(fastckpt.reshard(ckpt, 2, layout=placed, dtype="bfloat16"), want)
        alike([fastckpt.reshard(ckpt, 2, rank=1, layout=placed, dtype="bfloat16")], want[1:])
    (whole,) = fastckpt.reshard(at / kind, config=str(at), layout="hf", dtype="bfloat16")
    alike([whole], fastckpt.reshard(tmp_path, layout="hf", dtype="bfloat16"))


def test_from_the_command_line(unpacked, tmp_path, capsys):
    at = unpacked("llama-0.19.2")
    run, config = str(at / "dist"), str(at)
    assert cli.main(["inspect", run]) == 0
    assert "megatron" in capsys.readouterr().out
    assert cli.main(["inspect", "--config", config, "--tag", "100", str(at / "legacy")]) == 0
    assert "llama" in capsys.readouterr().out
    out = str(tmp_path / "served")
    assert cli.main(["reshard", run, out, "--config", config, "--layout", "vllm", "--tp", "2", "-q"]) == 0
    assert cli.main(["verify", out, "-q"]) == 0
    whole = str(tmp_path / "whole")
    assert cli.main(["reshard", run, whole, "--config", config, "--layout", "hf", "-q"]) == 0
    holds(fastckpt.open(whole), load_file(at / "masters.safetensors"))
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == "llama"
    assert cli.main(["diff", run, whole, "-q"]) == 0
    assert cli.main(["diff", run, out, "-q"]) == 0
    assert cli.main(["diff", run, whole, "--weights", "module", "-q"]) == 1
    assert cli.main(["diff", run, run, "--config", config, "-q"]) == 0
    assert cli.main(["plan", run, "--config", config, "--layout", "vllm", "--tp", "2"]) == 0
    assert cli.main(["consolidate", str(at / "legacy"), str(tmp_path / "bin"), "--config", config, "-q"]) == 0
    state = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    truth = load_file(at / "truth.safetensors")
    assert {n: x.tolist() for n, x in state.items()} == {n: x.float().tolist() for n, x in truth.items()}


def test_a_module_is_filled(unpacked):
    transformers = pytest.importorskip("transformers")
    at = unpacked("qwen2-0.19.2")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(at))
    fastckpt.load_into(model, at / "legacy", config=at)
    for name, x in load_file(at / "truth.safetensors").items():
        assert torch.equal(model.state_dict()[name], x), name


def test_without_a_config(unpacked, tmp_path):
    at = unpacked("llama-0.19.2")
    ckpt = fastckpt.open(at / "dist")
    names = {"embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc1.weight"}
    assert names <= {*ckpt} and len(ckpt) == 15
    (own,) = fastckpt.reshard(at / "dist", layout="same")
    assert own["embedding.word_embeddings.weight"].shape == (24, 16)  # padding and all
    assert (own["embedding.word_embeddings.weight"][19:] == 7).all()
    parts = fastckpt.open(at / "legacy")
    assert "1/decoder.layers.1.self_attention.linear_qkv.weight" in parts
    for verb in (fastckpt.reshard, fastckpt.consolidate):
        with pytest.raises(SourceError, match=r"parts of 2 ranks.*--config"):
            verb(at / "legacy")
    with pytest.raises(RecipeError, match="says where one is"):
        fastckpt.reshard(at / "dist")
    assert opening.join(ckpt) is ckpt


def test_a_config_and_a_tokenizer_beside_it(case):
    at = case("gpt2-0.19.2")
    shutil.copy(at / "config.json", at / "dist")
    (at / "dist" / "tokenizer.json").write_text("{}")
    truth = load_file(at / "truth.safetensors")
    holds(fastckpt.open(at / "dist"), truth)
    fastckpt.reshard(at / "dist", out=at / "hub", durable=False)
    holds(fastckpt.open(at / "hub"), truth | {"lm_head.weight": truth["transformer.wte.weight"]})
    assert (at / "hub" / "tokenizer.json").read_text() == "{}"
    (at / "tokenizer_config.json").write_text("{}")
    fastckpt.reshard(at / "legacy", config=at, out=at / "other", durable=False)
    assert (at / "other" / "tokenizer_config.json").read_text() == "{}"


def test_which_save(case):
    at = case("gpt2-0.19.2")
    run = at / "legacy"
    shutil.copytree(run / "iter_0000100", run / "iter_0000200")
    truth = load_file(at / "truth.safetensors")
    for tag in ("100", "iter_0000200"):
        holds(fastckpt.open(run, tag=tag, config=at), truth)
    holds(fastckpt.open(run / "iter_0000200", config=at), truth)
    (run / "latest_checkpointed_iteration.txt").write_text("300\n")
    with pytest.raises(SourceError, match="no save '300'; there is iter_0000100, iter_0000200"):
        fastckpt.open(run, config=at)
    (run / "iter_0000200").rename(run / "release")
    (run / "latest_checkpointed_iteration.txt").write_text("release")
    holds(fastckpt.open(run, config=at), truth)
    for odd in ("../x", "-1", "", "iter_1/.."):
        with pytest.raises(SourceError, match="is no save"):
            fastckpt.open(run, tag=odd, config=at)
    with pytest.raises(SourceError, match="exclude_frozen"):
        fastckpt.open(run, exclude_frozen=True)


# ---- what does not fit ----


def config_of(at, **changes):
    return json.loads((at / "config.json").read_text()) | changes


@pytest.mark.parametrize("kind", ["dist", "legacy"])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2}, "num_attention_heads 4.* 8"),
        ({"num_key_value_heads": 4}, "num_query_groups 2, the config has kv heads 4"),
        ({"head_dim": 8}, "kv_channels 4, the config has head size 8"),
        ({"hidden_size": 32}, "hidden_size 16, the config has hidden size 32"),
        ({"num_hidden_layers": 3}, "num_layers 2, the config has layers 3"),
        ({"intermediate_size": 48}, "ffn_hidden_size 24, the config has width 48"),
        ({"vocab_size": 25}, "padded_vocab_size 24, the config has vocab_size 25"),
        ({"tie_word_embeddings": True}, "untie_embeddings_and_output_weights True"),
        ({"attention_bias": True}, "linear_qkv.bias: the layout makes"),
        ({"model_type": "qwen3"}, "q_layernorm.weight: the layout makes"),
    ],
)
def test_a_config_of_another_model(unpacked, kind, changes, told):
    at = unpacked("llama-0.19.2")
    with pytest.raises(SourceError, match=told):
        fastckpt.open(at / kind, config=config_of(at, **changes))


def test_what_is_said_aloud(unpacked):
    at = unpacked("llama-0.19.2")
    ckpt = fastckpt.open(at / "dist", config=config_of(at, vocab_size=10))
    assert ckpt.notes == ("14 rows of the vocabulary are left out as padding: 24, the config has 10",)
    assert ckpt.entries["lm_head.weight"].shape == (10, 16)
    config = config_of(at)
    config["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    (note,) = fastckpt.open(at / "dist", config=config).notes
    assert note == "its args say rotary_base 10000, the config has rope_theta 500000.0"


# ---- a dull writer: one thing wrong ----

OF_TE = {"spec": "transformer_engine"}
MOE = dict(num_experts=5, moe_ffn_hidden_size=24, num_query_groups=4, expert_tensor_parallel_size=2)
TE_CASES = [
    ("llama", 2, OF_TE, dict(padded_vocab_size=256)),
    ("tied", 2, OF_TE, dict(untie_embeddings_and_output_weights=False)),
    ("gemma", 2, OF_TE | {"zero_centered_gamma": "true"}, dict(
        num_query_groups=4, kv_channels=10, apply_layernorm_1p=True, untie_embeddings_and_output_weights=False
    )),
    ("qwen2_moe", 2, OF_TE | {"experts": "grouped"}, MOE),
    ("deepseek_v3", 2, OF_TE | {"experts": "grouped"}, MOE | dict(
        num_experts=6, group_query_attention=False, moe_ffn_hidden_size=24
    )),
    ("glm", 2, OF_TE, dict(num_query_groups=4, rotary_interleaved=True)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tp", "options", "args"), TE_CASES)
def test_names_of_transformer_engine(tmp_path, name, tp, options, args):
    """Its modules cannot be built without it: the names are those that layout megatron is held to."""
    made = (tiny if name in tiny.MODELS else families).made(name)

    def extra(rank, state):
        state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
        state["model"]["decoder.layers.0.mlp.linear_fc2._extra_state"] = None
        state["model"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"fp8")

    run, config, hub = written(tmp_path, made, tp, options, extra, **args)
    ckpt = fastckpt.open(run, config=config)
    holds(ckpt, hub)
    assert "_extra_state: Transformer Engine's own" in ckpt.unread


def turns_neighbours(family):
    """Whether transformers' model turns elements 0 and 1, not 0 and the one half a head further."""
    package = family.removesuffix("_text")
    modeling = import_module(f"transformers.models.{package}.modeling_{package}")
    if family == "llama4_text":
        q, turn = torch.eye(8)[:1].reshape(1, 1, 1, 8), torch.full((1, 1, 4), 1j)
        return bool(modeling.apply_rotary_emb(q, q, turn)[0][0, 0, 0, 1])
    return bool(modeling.rotate_half(torch.eye(8)[0])[1])


ROTARY = [
    ("llama", {}),
    ("helium", dict(num_query_groups=4)),
    ("ernie4_5", dict(num_query_groups=4, untie_embeddings_and_output_weights=False)),
]


@pytest.mark.parametrize(("name", "args"), ROTARY)
def test_rotary_positions_are_the_hub_s(tmp_path, name, args):
    """Megatron's default turns halves: q and k trained so are none of a model that turns neighbours."""
    made = (tiny if name in tiny.MODELS else families).made(name)
    for said in (False, True):
        (at := tmp_path / str(said)).mkdir()
        run, config, hub = written(at, made, 2, OF_TE, rotary_interleaved=said, **args)
        if said is turns_neighbours(name):
            holds(fastckpt.open(run, config=config), hub)
        else:
            with pytest.raises(SourceError, match=f"its args say rotary_interleaved {said}, the config has"):
                fastckpt.open(run, config=config)


def test_families_that_turn_neighbours():
    known = (
        "ernie4_5",
        "ernie4_5_moe",
        "glm",
        "glm4",
        "granite",
        "helium",
        "llama4_text",
        "olmo2",
        "qwen3_moe",
    )
    assert {n for n in known if turns_neighbours(n)} == {*megatron.INTERLEAVED} - {"chatglm"}  # not its own


@pytest.mark.parametrize("spoiled", [None, slice(0, 1), slice(100, None)])
def test_a_last_stage_has_the_embedding_of_the_first(tmp_path, spoiled):
    """The copy that Megatron keeps there of a tied embedding is not read but compared."""
    args = dict(untie_embeddings_and_output_weights=False, pipeline_model_parallel_size=2)
    run, config, hub = written(tmp_path, tiny.made("tied"), 2, rank=0, **args)  # as one process converts
    for rank in range(2):
        at = run / "iter_0000007" / f"mp_rank_0{rank}"
        state = torch.load(at / "model_optim_rng.pt", weights_only=False)
        whole, copy = state["model"], state["model"]["embedding.word_embeddings.weight"].clone()
        if spoiled and rank:
            copy[spoiled] += 1e-3
        last = {
            n.replace("layers.1", "layers.0"): x for n, x in whole.items() if "layers.1" in n or "fin" in n
        }
        first = {n: x for n, x in whole.items() if "layers.1" not in n and "fin" not in n}
        for stage, held in enumerate((first, last | {"output_layer.weight": copy})):
            place = at.with_name(f"mp_rank_0{rank}_00{stage}")
            place.mkdir()
            torch.save(state | {"model": held}, place / "model_optim_rng.pt")
        shutil.rmtree(at)
    if spoiled is None:
        ckpt = fastckpt.open(run, config=config)
        holds(ckpt, hub)
        assert "output_layer.weight: the last stage's copy of the embedding" in ckpt.unread
        return
    with pytest.raises(SourceError, match=r"of mp_rank_01_000 and output_layer\.weight of mp_rank_01_001"):
        fastckpt.reshard(fastckpt.open(run, config=config), layout="same")


@pytest.mark.parametrize("name", ["llama-0.19.2", "qwen3_moe-0.19.2"])
def test_norms_of_two_ranks_that_differ_in_one_element(case, name):
    at = case(name)
    refuses_a_copy_that_differs(at / "legacy", config=at)


def test_a_users_own_recipe(tmp_path):
    config, hub = gated.made()[:2]
    path = tmp_path / "mine.py"
    path.write_text(Path(gated.__file__).read_text())
    (tmp_path / "hub").mkdir()
    save_file({n: x.contiguous() for n, x in hub.items()}, tmp_path / "hub" / "model.safetensors")
    placed = layout("megatron", {"zero_centered_gamma": "true"})
    held = fastckpt.reshard(tmp_path / "hub", layout=placed, config=config, recipe=str(path))[0]
    at = tmp_path / "run" / "mp_rank_00"
    at.mkdir(parents=True)
    said = argparse.Namespace(apply_layernorm_1p=True)
    torch.save({"args": said, "checkpoint_version": 3.0, "model": held}, at / "model_optim_rng.pt")
    found = fastckpt.open(tmp_path / "run", config=config, recipe=str(path))
    holds(found, hub)
    assert found.recipe == str(path)  # which is asked for no more to cut it


def broken(change, told, **args):
    return pytest.param(change, told, args, id=told[:30])


def _drop(rank, state):
    if rank == 1:
        del state["model"]["decoder.layers.1.mlp.linear_fc2.weight"]


def _add(rank, state):
    state["model"]["decoder.layers.0.mlp.extra.weight"] = torch.zeros(3)


def _old(rank, state):
    state["checkpoint_version"] = 2.0


def _nested(rank, state):
    state["model"] = {"language_model": {"encoder": state["model"]}}


def _no_model(rank, state):
    del state["model"]


def _later(rank, state):
    state["iteration"] += rank


def _transposed(rank, state):
    x = state["model"]["decoder.layers.0.mlp.linear_fc2.weight"]
    state["model"]["decoder.layers.0.mlp.linear_fc2.weight"] = x.T.contiguous().T


def _list(rank, state):
    state["model"]["more"] = [torch.zeros(3)]


def _grouped(rank, state):
    state["model"]["decoder.layers.0.mlp.experts.weight1"] = torch.zeros(64, 192)


def _not_a_number(rank, state):
    state["checkpoint_version"] = float("nan")


def _no_args(rank, state):
    state["args"] = {"num_layers": 2}


def _no_layer(rank, state):
    names = [n for n in state["model"] if n.startswith("decoder.layers.1.")]
    for n in names:
        del state["model"][n]


@pytest.mark.parametrize(
    ("change", "told", "args"),
    [
        broken(_drop, "1/decoder.layers.1.mlp.linear_fc2.weight: the layout makes .* the shard holds none"),
        broken(_add, "0/decoder.layers.0.mlp.extra.weight is no tensor of layout megatron"),
        broken(_old, "checkpoint_version 2.0: wanted 3.0"),
        broken(_nested, "the form of Megatron before its core"),
        broken(_grouped, "experts.weight1: a rank's experts turned and in one, as GroupedMLP has them"),
        broken(_not_a_number, "checkpoint_version nan: wanted 3.0"),
        broken(_list, "more: holds a tensor, where a state dict has each under a name of its own"),
        broken(None, "tp 2 does not divide expert_tensor_parallel_size 1 \\* ep 1", num_experts=2,
               expert_tensor_parallel_size=1),
        broken(None, "several ranks share the name of a directory: its args say tp 1", num_experts=2,
               tensor_model_parallel_size=1, expert_tensor_parallel_size=2),
        broken(_no_model, "no model; keys: args"),
        broken(_later, "iteration is .*: files of two saves"),
        broken(_transposed, "lies with strides"),
        broken(_no_args, "wanted an argparse.Namespace, got dict"),
        broken(_no_layer, "decoder.layers.1.*the shard holds none"),
        broken(None, "2 directories of ranks, wanted 4", tensor_model_parallel_size=4),
        broken(None, "2 directories of ranks, wanted 1:", tensor_model_parallel_size=1),
        broken(None, "mp_rank_00 is no rank's", tensor_model_parallel_size=1, pipeline_model_parallel_size=2),
        broken(None, "tensor_model_parallel_size is 0", tensor_model_parallel_size=0),
        broken(None, "tensor_model_parallel_size is 1.5", tensor_model_parallel_size=1.5),
        broken(None, "wanted a number or a bool, got str", tensor_model_parallel_size="2"),
        broken(None, "more than 1048576 ranks", tensor_model_parallel_size=10**12),
        broken(None, "1 virtual stages, wanted 2", virtual_pipeline_model_parallel_size=2),
        broken(None, "rotary_interleaved True", rotary_interleaved=True),
        broken(None, "moe_mlp_glu_interleave_size 32: gate and up", moe_mlp_glu_interleave_size=32),
        broken(None, "num_experts 4, the config has experts 0", num_experts=4),
        broken(None, "vocab_size 212, the config has 211", vocab_size=212),
    ],
)  # fmt: skip
def test_one_thing_wrong(tmp_path, change, told, args):
    run, config, _ = written(tmp_path, tiny.made("llama"), options=OF_TE, change=change, **args)
    with pytest.raises(FastckptError, match=told):
        fastckpt.open(run, config=config)


def test_norms_by_one_plus_weight_are_not_confused(tmp_path):
    run, config, _ = written(tmp_path, tiny.made("llama"), options=OF_TE, apply_layernorm_1p=True)
    with pytest.raises(LayoutError, match="the factor itself: wanted zero_centered_gamma=False"):
        fastckpt.open(run, config=config)


def test_files_under_one_anothers_names(tmp_path):
    run, config, hub = written(tmp_path, tiny.made("llama"), options=OF_TE)
    holds(fastckpt.open(run, config=config), hub)
    root = run / "iter_0000007"
    for a, b in (("mp_rank_00", "x"), ("mp_rank_01", "mp_rank_00"), ("x", "mp_rank_01")):
        (root / a).rename(root / b)
    with pytest.raises(SourceError, match="mp_rank_00 was written by process 1 of 2, tp rank 1; wanted tp"):
        fastckpt.open(run, config=config)


def test_experts_under_one_anothers_names(tmp_path):
    made = families.made("deepseek_v3")
    args = MOE | dict(num_experts=6, group_query_attention=False)
    run, config, hub = written(tmp_path, made, 2, OF_TE, None, 2, **args)
    holds(fastckpt.open(run, config=config), hub)
    root = run / "iter_0000007"
    for a, b in (("mp_rank_00_000", "x"), ("mp_rank_00_001", "mp_rank_00_000"), ("x", "mp_rank_00_001")):
        (root / a).rename(root / b)
    with pytest.raises(SourceError, match="mp_rank_00_000 was written by process 2 of 4, ep rank 1"):
        fastckpt.open(run, config=config)


def test_a_rank_that_does_not_say_who_wrote_it(tmp_path):
    def unsaid(rank, state):
        if rank == 1:
            del state["args"].rank

    run, config, hub = written(tmp_path, tiny.made("llama"), options=OF_TE, change=unsaid)
    holds(fastckpt.open(run, config=config), hub)


def test_what_two_stages_hold(tmp_path):
    run, config, _ = written(tmp_path, tiny.made("llama"), 1, OF_TE, rank=0, pipeline_model_parallel_size=2)
    at = run / "iter_0000007/mp_rank_00"
    shutil.copytree(at, at.with_name("mp_rank_00_001"))
    at.rename(at.with_name("mp_rank_00_000"))
    with pytest.raises(SourceError, match=r"two stages hold embedding.*, one of them mp_rank_00_001"):
        fastckpt.open(run, config=config)


def test_what_is_not_of_the_model(tmp_path):
    def more(rank, state):
        state["model"].update({"mtp.layers.0.enorm.weight": torch.zeros(3), "note": "x"})

    run, config, hub = written(tmp_path, tiny.made("llama"), options=OF_TE, change=more)
    ckpt = fastckpt.open(run, config=config)
    holds(ckpt, hub)
    assert {"mtp: multi-token prediction", "note: no tensor"} <= {*ckpt.unread}


def test_a_converter_writes_all_as_one_process(tmp_path):
    run, config, hub = written(tmp_path, tiny.made("llama"), options=OF_TE, rank=0, world_size=1)
    holds(fastckpt.open(run, config=config), hub)


def test_files_that_are_not_whole(tmp_path):
    run, config, _ = written(tmp_path, tiny.made("llama"), options=OF_TE)
    file = run / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(SourceError, match="mp_rank_01"):
        fastckpt.open(run, config=config)
    file.unlink()
    with pytest.raises(SourceError, match="mp_rank_01"):
        fastckpt.open(run, config=config)


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_nothing_is_executed(tmp_path):
    def harm(rank, state):
        state["args"].harm = state["harm"] = Hostile(tmp_path / "run-by-pickle")

    run, config, hub = written(tmp_path, tiny.made("llama"), options=OF_TE, change=harm)
    ckpt = fastckpt.open(run, config=config)
    holds(ckpt, hub)
    assert any("system" in name for name in ckpt.inert)
    assert not (tmp_path / "run-by-pickle").exists()


# ---- torch_dist, written by torch's own DCP ----


@pytest.mark.parametrize(
    ("form", "stored"), [("fp32_param", "whole"), ("param", "whole"), ("fp32_param", "parts")]
)
def test_masters_and_what_has_none(tmp_path, form, stored):
    """Of Float16Optimizer, and of the distributed optimizer: fully_reshardable, fully_sharded_model_space."""
    made = tiny.made("llama")
    keys = keys_of(tmp_path, made)
    put = in_parts if stored == "parts" else torch.clone
    masters = {f"optimizer.state.{form}.{n}": put(exact(x)) for n, x in keys.items()}
    bare = "embedding.word_embeddings.weight"
    del masters[f"optimizer.state.{form}.{bare}"]
    moments = {f"optimizer.state.exp_avg.{n}": x.float() for n, x in keys.items()}
    ckpt = fastckpt.open(dist(tmp_path, keys | masters | moments), config=made[0])
    assert ckpt.notes == (f"no fp32 copy of 1 tensors, which are taken in 16 bits: such as {bare}",)
    want = {n: x if "embed" in n else exact(x) for n, x in made[1].items()}
    holds(ckpt, want)


def in_parts(x):
    """Of a stack each layer, of a matrix halves of its rows."""
    parts = [n if k < x.ndim - 2 else 2 if k == x.ndim - 2 else 1 for k, n in enumerate(x.shape)]
    apart = x.reshape([n for size, p in zip(x.shape, parts, strict=True) for n in (p, size // p)])
    return apart.permute(*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)).reshape(*parts, -1)


def exact(x):
    """A master that rounds to `x`."""
    return x.float() * (1 + 2**-12)


def test_remainders_are_no_masters(tmp_path):
    """What Transformer Engine keeps of a master whose upper half the weight is (store_param_remainders):
    16 bits, which megatron-core saves as whole numbers in float32."""
    made = tiny.made("llama")
    keys = keys_of(tmp_path, made)
    rests = {n: exact(x).view(torch.int32).to(torch.int16).float() for n, x in keys.items()}
    root = dist(tmp_path, keys | {f"optimizer.state.param.{n}": x for n, x in rests.items()})
    with pytest.raises(SourceError, match=r"was not rounded from it, .*--weights module"):
        fastckpt.open(root, config=made[0])
    holds(fastckpt.open(root, config=made[0], weights="module"), made[1])


@pytest.mark.parametrize(("inside", "prefix"), [("weights", "module"), ("model_weights", "model")])
def test_nemos_directories_and_no_args(tmp_path, inside, prefix):
    """NeMo 2, and the unpacked archive of NeMo 1."""
    made = tiny.made("llama")
    keys = {f"{prefix}.{n}": x for n, x in keys_of(tmp_path, made).items()}
    masters = {f"optimizer.state.fp32_param.{n}": x.float() for n, x in keys.items()}
    root = dist(tmp_path, keys | masters, args=None)
    (tmp_path / "nemo").mkdir()
    root.rename(tmp_path / "nemo" / inside)
    ckpt = fastckpt.open(tmp_path / "nemo", config=made[0])
    holds(ckpt, {n: x.float() for n, x in made[1].items()})
    assert "the checkpoint has no args" in ckpt.notes[0]


@pytest.mark.parametrize("inside", ["model", "."])
def test_verls_directories(tmp_path, inside):
    made = tiny.made("llama")
    root = dist(tmp_path, keys_of(tmp_path, made), args=None)
    save = tmp_path / "run/global_step_7"
    (save / "actor" / inside / "huggingface").mkdir(parents=True)
    root.rename(save / "actor" / inside / "dist_ckpt")
    (save / "actor" / inside / "huggingface/config.json").write_text(json.dumps(made[0]))
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("7")
    for path in (tmp_path / "run", save, save / "actor"):
        holds(fastckpt.open(path), made[1])


def test_what_torch_dist_must_have(tmp_path):
    made = tiny.made("llama")
    keys = keys_of(tmp_path, made)
    fc1 = "decoder.layers.mlp.linear_fc1.weight"
    stacked = keys[fc1]
    cases = [
        ({f"{fc1}_w": stacked[:, :96]}, {fc1}, "wanted it whole, or its halves _w and _v"),
        ({f"{fc1}_w": stacked[:, :96], f"{fc1}_v": stacked[:, 96:]}, (), "wanted it whole, or its halves"),
        (
            {f"{fc1}_w": stacked[:, :96], f"{fc1}_v": stacked[:, 96:].double()},
            {fc1},
            "halves of .* and float64",
        ),
        ({"decoder.layers.0.mlp.linear_fc1.weight": stacked[0]}, (), "two tensors would be decoder.layers.0"),
        ({"decoder.layers.input_layernorm.weight": torch.zeros(2, 64)}, (), "two tensors would be"),
        (
            {f"optimizer.state.fp32_param.{fc1}": torch.zeros(2, 1, 1, 192 * 64)},
            (),
            "was not rounded from it",
        ),
        (
            {f"optimizer.state.fp32_param.{fc1}": torch.zeros(2, 5, 1, 7)},
            (),
            r"is float32\[2, 5, 1, 7\], its tensor",
        ),
        (
            {f"optimizer.state.param.{fc1}": torch.zeros(2, 192, 64, dtype=torch.int16)},
            (),
            r"is int16\[2, 192, 64\], its tensor .*--weights module",
        ),
        ({"decoder.layers.odd": torch.tensor(1.0)}, (), "has no axis of layers"),
        ({"decoder.odd.weight": torch.zeros(3)}, (), "decoder.odd.weight is no tensor of layout megatron"),
        ({}, {fc1}, "linear_fc1.weight: the layout makes"),
        ({}, {*keys}, "no tensors of a model"),
    ]
    for k, (more, less, told) in enumerate(cases):
        (tmp_path / str(k)).mkdir()
        held = {n: x for n, x in keys.items() if n not in less} | more or {"rng_state": torch.zeros(1)}
        with pytest.raises(SourceError, match=told):
            fastckpt.open(dist(tmp_path / str(k), held), config=made[0])


def test_a_save_that_is_not_finished_or_of_another_backend(tmp_path):
    made = tiny.made("llama")
    keys = keys_of(tmp_path, made)
    (tmp_path / "list").mkdir()
    root = dist(tmp_path / "list", keys)
    torch.save([1, 2], root / "common.pt")
    with pytest.raises(SourceError, match="wanted a dict, got list"):
        fastckpt.open(root)
    with pytest.raises(SourceError, match=r"without metadata.json: not finished"):
        fastckpt.open(dist(tmp_path, keys, record=None))
    (tmp_path / "zarr").mkdir()
    with pytest.raises(SourceError, match="its sharded_backend is 'zarr'"):
        fastckpt.open(dist(tmp_path / "zarr", keys, record="zarr"))
    (tmp_path / "part").mkdir()
    root = dist(tmp_path / "part", keys)
    (root / ".metadata").unlink()
    with pytest.raises(SourceError, match=r"without .metadata: not finished"):
        fastckpt.open(root)
    run = tmp_path / "run"
    (run / "iter_0000001").mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(SourceError, match="no save of Megatron's that is read"):
        fastckpt.open(run)


def test_stacks_are_taken_apart_at_any_box(tmp_path):
    """Boxes that hold several layers, or a part of them, as resharding tools may write."""
    made = tiny.made("llama")
    keys = keys_of(tmp_path, made)
    root = dist(tmp_path, keys)  # one box a tensor: both layers
    holds(fastckpt.open(root, config=made[0]), made[1])
    with pytest.raises(FastckptError):
        fastckpt.open(root, config=made[0], tag="5")
