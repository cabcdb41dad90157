"""The way back: what a serving layout cut is put together again, bit for bit; what cannot be is refused."""

from __future__ import annotations

import json

import fastckpt
import pytest
import torch
from fastckpt import layouts as served_layouts
from fastckpt import sources
from fastckpt.digest import digest
from fastckpt.errors import FastckptError, RecipeError, SourceError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families, quantised, tiny
from outputs import changed, hub_directory
from reading import bits, holds, read
from safetensors.torch import load_file, save_file
from zero_writer import write_zero


def hub_of(path, made):
    """A hub directory of a tiny model, its config and its tensors."""
    config, files, _ = made
    hub_directory(path, config, files)
    return config, files


def cut(source, out, served, options=None, **more):
    fastckpt.reshard(source, out=out, layout=layout(served, options), durable=False, **more)
    return fastckpt.open(out)


REPLICATE = {"hf": {"replicate_kv": "true"}}
FROZEN = {
    ("hf", 1): "9971f21a92420177",
    ("hf", 4): "fe89662ec834cdae",
    ("vllm", 1): "fcc88b83b746a728",
    ("vllm", 4): "c1b7264b7b45b168",
    ("rtp_llm", 1): "b68f3fc31cb1fe11",
    ("rtp_llm", 4): "488fdc4383918aa5",
    ("megatron", 1): "038b486050999747",
    ("megatron", 4): "5ed76100b0e6eef8",
}
"""What each layout makes of one model: a digest of every rank's names, dtypes, shapes and bytes. Whoever must
change one raises layouts.VERSION, or shards that are out there would be taken apart wrongly."""


def counted(shapes):
    """Tensors of those shapes whose elements are numbered through."""
    out, at = {}, 0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        out[name] = torch.arange(at, at + numel, dtype=torch.float32).reshape(shape)
        at += numel
    return out


@pytest.mark.parametrize(("served", "tp"), FROZEN)
def test_layouts_are_frozen(served, tp):
    config, files, _ = tiny.made("mixtral")
    source = counted({n: t.shape for n, t in sorted(files.items())})
    made = fastckpt.reshard(source, tp, layout=served, config=config)
    told = [
        (r, n, str(t.dtype), tuple(t.shape), digest(t.contiguous().numpy().tobytes()))
        for r, state in enumerate(made)
        for n, t in sorted(state.items())
    ]
    assert (served_layouts.VERSION, digest(repr(told).encode())) == (1, FROZEN[served, tp])


def test_shards_of_other_layouts_are_refused(tmp_path, monkeypatch):
    hub_of(tmp_path / "hub", tiny.made("llama"))
    cut(tmp_path / "hub", tmp_path / "cut", "vllm", tp=2)
    monkeypatch.setattr(served_layouts, "VERSION", 2)
    with pytest.raises(SourceError, match="cut by version 1 of the layouts"):
        fastckpt.open(tmp_path / "cut")


@pytest.mark.parametrize("served", ["hf", "vllm", "rtp_llm"])
@pytest.mark.parametrize("scheme", list(quantised.CONFIGS))
def test_quantised_checkpoints_whole_again(tmp_path, scheme, served):
    """What a checkpoint is quantised to is carried both ways, but for what a layout leaves out."""
    config, files = quantised.made(scheme)
    hub_of(tmp_path / "hub", (config, files, None))
    ckpt = cut(tmp_path / "hub", tmp_path / "cut", served, REPLICATE.get(served), tp=2)
    kept = {"rtp_llm": (), "vllm": ("q_proj.g_idx", "gate_proj.g_idx", "o_proj.g_idx", "down_proj.g_idx")}
    orders = {n for n in files if n.endswith("g_idx")}  # each i // group; vllm holds one of what it joins
    left = {n for n in orders if not n.endswith(kept.get(served, "g_idx"))}
    if served == "vllm":  # so it does of smoothers
        left |= {n for n in files if n.endswith(("k_proj.smoother", "v_proj.smoother"))}
    assert {n.partition(":")[0] for n in ckpt.unread} == left
    holds(ckpt, {n: x for n, x in files.items() if n not in left})


def test_what_was_quantised_again_is_named(tmp_path):
    """One scale of q, k and v, and of an expert's up and gate: what it was before is not in the shards."""
    config, files = quantised.made("fp8-static", 2)
    hub_of(tmp_path / "hub", (config, files, None))
    ckpt = cut(tmp_path / "hub", tmp_path / "cut", "rtp_llm", {"one_scale": "true"}, tp=2)
    joint = [f"self_attn.{p}_proj" for p in "qkv"]
    joint += [f"mlp.experts.{e}.{p}_proj" for e in range(2) for p in ("gate", "up")]
    left = {f"model.layers.0.{n}.{leaf}" for n in joint for leaf in ("weight", "weight_scale", "input_scale")}
    left |= {f"model.layers.0.mlp.experts.{e}.down_proj.input_scale" for e in range(2)}
    assert {n.partition(":")[0] for n in ckpt.unread} == left
    holds(ckpt, {n: x for n, x in files.items() if n not in left})


GRIDS = [
    ("qwen2_moe", {"experts": "round_robin"}, dict(tp=2, dp=2, ep=4)),
    ("deepseek_v3", {"gate_up": "up_gate"}, dict(tp=2, ep=2)),
    ("deepseek_v3", {}, dict(tp=2, dp=2)),
    ("gemma2", {}, dict(tp=2, pp=2)),
    ("gpt_oss", {}, dict(tp=1, pp=2, dp=2)),
    ("qwen2_moe", {"experts": "sequential"}, dict(tp=2, pp=2)),
    ("qwen2_moe", {"experts": "sequential"}, dict(tp=2, dp=5, ep=5)),
    ("qwen3_moe", {"experts": "sequential", "first_stage": "1"}, dict(tp=2, pp=2)),
    ("deepseek_v2", {"absorb": "true"}, dict(tp=2, dp=2, ep=2)),
    ("deepseek_v3", {"absorb": "false"}, dict(tp=4)),
]


@pytest.mark.parametrize(("name", "options", "sizes"), GRIDS)
def test_grids_whole_again(tmp_path, name, options, sizes):
    _, files = hub_of(tmp_path / "hub", families.made(name))
    served = "megatron" if "sequential" in options.values() else "rtp_llm" if "absorb" in options else "vllm"
    placement = Placement(**sizes)
    holds(cut(tmp_path / "hub", tmp_path / "cut", served, options, placement=placement), files)


@pytest.mark.parametrize(("name", "sizes"), [("mixtral", dict(tp=1, dp=2)), ("gpt_oss", dict(tp=2, dp=2))])
def test_more_ranks_an_expert_than_tp(tmp_path, name, sizes):
    """Megatron-LM's names of directories do not tell such ranks apart, so theirs say more."""
    _, files = hub_of(tmp_path / "hub", (tiny if name == "mixtral" else families).made(name))
    count = sizes["tp"] * sizes["dp"]
    options = {"expert_tp": str(count)}
    got = cut(tmp_path / "hub", tmp_path / "cut", "megatron", options, placement=Placement(**sizes))
    holds(got, files)
    want = [f"mp_rank_{r % sizes['tp']:02d}_expert_tp_{r:02d}" for r in range(count)]
    assert sorted(p.name for p in (tmp_path / "cut").iterdir() if p.is_dir()) == sorted(want)


def test_padded_shards_are_cut_again_as_what_they_were(tmp_path):
    """Heads, widths and vocabulary padded for 3 ranks, then for 5: never padded twice."""
    config, files = hub_of(tmp_path / "hub", tiny.made("llama"))
    pad = {"pad": "true", "vocab_padding": "15"}
    cut(tmp_path / "hub", tmp_path / "3", "hf", pad, tp=3)
    assert json.loads((tmp_path / "3" / "config.json").read_text())["num_attention_heads"] == 12
    holds(cut(tmp_path / "3", tmp_path / "5", "vllm", pad, tp=5), files)
    cut(tmp_path / "hub", tmp_path / "straight", "vllm", pad, tp=5)
    for file in (tmp_path / "straight").iterdir():
        if file.name != "fastckpt.json":
            assert (tmp_path / "5" / file.name).read_bytes() == file.read_bytes(), file.name
    for at, layout_name in (("3", "same"), ("5", "hf")):
        cut(tmp_path / at, tmp_path / f"{at}-whole", layout_name)
        assert json.loads((tmp_path / f"{at}-whole" / "config.json").read_text()) == config
        holds(fastckpt.open(tmp_path / f"{at}-whole"), files)


# ---- from one cut to another ----


def shards(path):
    return {p.relative_to(path).as_posix(): load_file(p) for p in sorted(path.rglob("*.safetensors"))}


@pytest.mark.parametrize("name", ["tied", "mixtral", "qwen2", "qwen3", "deepseek_v2"])
def test_from_training_through_three_layouts(tmp_path, name):
    """ZeRO-3 -> rtp_llm tp 8 -> vllm tp 4 -> hf: each what it is straight from the masters."""
    config, files, _ = (tiny if name in tiny.MODELS else families).made(name)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config["tie_word_embeddings"] else None
    params = {n: x.float() for n, x in files.items()}
    zero = tmp_path / "zero"
    write_zero(zero, params, stage=3, world=3, tied=tied)
    (zero / "config.json").write_text(json.dumps(config))
    steps = [("rtp_llm", 8), ("vllm", 4), ("hf", 2), ("hf", 1)]
    at = zero
    for k, (served, tp) in enumerate(steps):
        dtype = "bfloat16" if k == 0 else None
        fastckpt.reshard(at, tp, layout=served, dtype=dtype, out=tmp_path / f"{k}", durable=False)
        fastckpt.reshard(
            zero, tp, layout=served, dtype="bfloat16", out=tmp_path / f"straight-{k}", durable=False
        )
        got, want = shards(tmp_path / f"{k}"), shards(tmp_path / f"straight-{k}")
        assert sorted(got) == sorted(want)
        for file, tensors in want.items():
            assert sorted(got[file]) == sorted(tensors)
            assert all(torch.equal(got[file][n], x) for n, x in tensors.items()), file
        at = tmp_path / f"{k}"
    assert fastckpt.diff(tmp_path / "0", tmp_path / "1").equal
    assert fastckpt.diff(tmp_path / "0", tmp_path / "3").equal
    whole = fastckpt.consolidate(tmp_path / "0")
    assert all(torch.equal(whole[n], x.bfloat16().float()) for n, x in params.items())
    assert fastckpt.open(tmp_path / "0").aliases == (tied or {})


def test_what_is_not_rounded_stays_so(tmp_path):
    _, files = hub_of(tmp_path / "hub", families.made("deepseek_v3"))
    got = cut(tmp_path / "hub", tmp_path / "cut", "vllm", tp=2, dtype="bfloat16")
    assert sorted(got) == sorted(files)
    for name, x in files.items():
        kept = "e_score_correction_bias" in name
        assert got[name].dtype.name == ("float32" if kept else "bfloat16"), name
        assert (read(got[name]) == bits(x if kept else x.bfloat16())).all(), name


def test_rows_that_were_left_out_stay_so(tmp_path):
    _, files = hub_of(tmp_path / "hub", tiny.made("qwen3"))
    got = cut(tmp_path / "hub", tmp_path / "cut", "rtp_llm", tp=2, vocab_size=130)
    assert got.config["vocab_size"] == 130
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (read(got[name]) == bits(files[name][:130])).all()


def test_patterns_whole_again(tmp_path):
    _, files = hub_of(tmp_path / "hub", tiny.made("qwen3"))
    plan = {"*.q_proj": "colwise", "*.o_proj": "rowwise", "*.gate_proj": "packed_colwise", "*": "replicate"}
    fastckpt.reshard(tmp_path / "hub", 4, tp_plan=plan, out=tmp_path / "cut", durable=False)
    holds(fastckpt.open(tmp_path / "cut"), files)


@pytest.mark.parametrize("tp", [1, 2])
def test_what_the_recipe_leaves_out_is_said(tmp_path, tp):
    config, files, _ = tiny.made("tied")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    hub_of(tmp_path / "hub", (config, files | extra, None))
    ckpt = cut(tmp_path / "hub", tmp_path / "cut", "vllm", tp=tp)
    holds(ckpt, files)
    assert ckpt.unread == (f"{next(iter(extra))}: layout vllm does not write it as it is",)


def test_what_a_layout_cannot_give_back_is_said_where_it_is_missed(tmp_path):
    hub_of(tmp_path / "hub", families.made("gemma"))
    cut(tmp_path / "hub", tmp_path / "cut", "rtp_llm", tp=2)
    with pytest.raises(RecipeError, match=r"norm\.weight, which is not there \(.*layout rtp_llm does not"):
        fastckpt.reshard(tmp_path / "cut")


def test_the_shards_themselves(tmp_path):
    _, files = hub_of(tmp_path / "hub", tiny.made("qwen3"))
    cut(tmp_path / "hub", tmp_path / "cut", "vllm", tp=2)
    ckpt = sources.open(tmp_path / "cut")
    assert ckpt.format == "shards"
    rows = files["model.layers.0.self_attn.o_proj.weight"].shape[0]
    assert ckpt["1/model.layers.0.self_attn.o_proj.weight"].shape == (rows, 48)


# ---- what cannot be joined ----


def spoiled(path, change):
    changed(path, change)
    with pytest.raises(FastckptError) as e:
        fastckpt.open(path)
    return str(e.value)


@pytest.fixture
def served(tmp_path):
    hub_of(tmp_path / "hub", tiny.made("qwen3"))
    cut(tmp_path / "hub", tmp_path / "cut", "vllm", tp=2)
    return tmp_path / "cut"


def test_records_that_tell_too_little(served):
    assert "does not tell what the shards were cut from" in spoiled(
        served, lambda r: r["options"].pop("cut_from")
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o, t: t.update(x=3), "x: 3 is no dtype and shape"),
        (lambda o, t: t.update(x=["float33", [1]]), "x: ['float33', [1]] is no dtype and shape"),
        (lambda o, t: t.update(x=["float32", [-1]]), "x: [-1] is no shape"),
        (lambda o, t: t.update(x=["float32", [1 << 40, 1 << 40]]), "is no shape"),
        (lambda o, t: o.update(layout_fields=[1]), "the record's layout_fields is no JSON object"),
        (lambda o, t: o["cut_from"].update(tensors=[]), "the record's tensors is no JSON object"),
    ],
)
def test_records_of_other_kinds(served, change, said):
    assert said in spoiled(served, lambda r: change(r["options"], r["options"]["cut_from"]["tensors"]))


def test_a_layout_without_roles(served):
    assert "layout same of 2 ranks cannot be joined" in spoiled(served, lambda r: r.update(layout="same"))


def test_records_that_tell_another_model(served):
    def other(record):
        record["options"]["cut_from"]["tensors"]["model.norm.weight"] = ["bfloat16", [63]]

    assert "model.norm.weight: got shape (63,), wanted (64,)" in spoiled(served, other)
    message = spoiled(served, lambda r: r["options"]["cut_from"]["aliases"].update(a="b"))
    assert "its record ties a to b, which is no tensor of it" in message


def test_records_of_another_layout(served):
    message = spoiled(served, lambda r: r.update(layout="rtp_llm"))
    assert "rank_00_00_00.global.embedding: the layout makes (208, 32), the shard holds none" in message


@pytest.mark.parametrize("tp", [1, 2])
def test_quantised_shards_are_seen_as_they_are(tmp_path, tp):
    hub_of(tmp_path / "hub", tiny.made("qwen3"))
    for out in ("a", "b"):
        fastckpt.reshard(tmp_path / "hub", tp, layout="vllm", quant="int8", out=tmp_path / out, durable=False)
    assert f"{tp - 1}/model.norm.weight" in fastckpt.open(tmp_path / "a")
    assert fastckpt.diff(tmp_path / "a", tmp_path / "b").equal
    for again in (fastckpt.reshard, fastckpt.consolidate):
        with pytest.raises(SourceError, match="quantised to int8 as it was cut, which cannot"):
            again(tmp_path / "a", out=tmp_path / "c")


def test_another_config(served):
    config = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4, "head_dim": 24}))
    with pytest.raises(SourceError, match="was changed since the shards were cut"):
        fastckpt.open(served)


def test_no_config(served):
    (served / "config.json").unlink()
    with pytest.raises(FastckptError, match=r"no config\.json, which says"):
        fastckpt.open(served)


def test_ranks_that_are_not_there(served):
    assert "lists 1 of 2 ranks" in spoiled(served, lambda r: r["ranks"].pop())


def test_a_record_that_was_changed(served):
    text = (served / "fastckpt.json").read_text()
    (served / "fastckpt.json").write_text(text.replace('"layout_fields": {}', '"layout_fields": { }'))
    with pytest.raises(SourceError, match="does not have its own digest"):
        fastckpt.open(served)


def test_a_placement_of_other_ranks(served):
    assert "2 ranks, and a placement of 4" in spoiled(served, lambda r: r["placement"].update(dp=2))


def test_files_that_leave_the_directory(served):
    def outside(record):
        record["ranks"][0]["files"]["../x.safetensors"] = {"nbytes": 0, "digest": "0" * 16}

    assert "'../x.safetensors' leaves the directory" in spoiled(served, outside)


def test_a_tensor_that_is_in_no_file(served):
    def empty(record):
        norm = record["ranks"][1]["tensors"]["model.norm.weight"]
        record["ranks"][1]["tensors"]["more"] = norm | {"shape": [0], "nbytes": 0}

    assert "more of rank 1 is in fastckpt.json and in no file" in spoiled(served, empty)


def test_a_tensor_that_the_record_does_not_name(served):
    said = spoiled(served, lambda r: r["ranks"][1]["tensors"].pop("model.norm.weight"))
    assert "holds model.norm.weight, which fastckpt.json does not name there" in said


@pytest.mark.parametrize("other", [{"shape": [1, 64]}, {"dtype": "int32"}])
def test_a_shard_that_is_not_what_the_record_says(served, other):
    message = spoiled(served, lambda r: r["ranks"][1]["tensors"]["model.norm.weight"].update(other))
    assert "model.norm.weight is float32[64] at byte" in message


def test_a_tensor_of_which_two_ranks_have_other_bytes(served):
    said = spoiled(served, lambda r: r["ranks"][1]["tensors"]["model.norm.weight"].update(digest="0" * 16))
    assert "0/model.norm.weight and 1/model.norm.weight are the same elements of model.norm.weight" in said


def test_names_of_shards_are_not_changed(served):
    with pytest.raises(SourceError, match="cannot be changed"):
        fastckpt.open(served, rename=[("model", "m")])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("same", [True, False])
def test_a_tied_pair_that_a_trainer_wrote_twice_is_one_tensor(tmp_path, file, same):
    table = torch.randn(6, 4)
    state = {"model.embed_tokens.weight": table, "lm_head.weight": table + (0 if same else 1)}
    (save_file if file.endswith("s") else torch.save)(state, tmp_path / file)
    (tmp_path / "config.json").write_text('{"vocab_size": 6, "tie_word_embeddings": true}')
    found = fastckpt.open(tmp_path)
    assert len(found.entries) == 2 - same and len(found.aliases) == same
    (tmp_path / "config.json").write_text('{"vocab_size": 6, "tie_word_embeddings": false}')
    assert not fastckpt.open(tmp_path).aliases
