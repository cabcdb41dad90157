"""Every layout against the oracle, bit for bit, and all ranks together against the original."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import FastckptError, LayoutError
from fastckpt.layouts import layout
from fastckpt.layouts.cuts import padded_part
from fastckpt.model import Layers, VisionExpert
from fastckpt.placement import Placement
from fastckpt.roles import Parameter
from layouts import oracle, tiny
from reading import bits, memory, read, same, shard

NAMES = list(tiny.MODELS)
STACKED = ["mixtral", "mixtral-odd"]


def model_of(name, stacked=False, pieces=3):
    """(model, config, hub tensors): read from the hub's spelling, or from the trainer's stacked one."""
    config, files, state = tiny.made(name)
    tensors = state if stacked else files
    if stacked:
        assert any(n.endswith("mlp.experts.gate_up_proj") for n in tensors)
    return recipes.find(config)(memory(tensors, pieces), config), config, files


def shards_of(name, model, tp, **options):
    placed = layout(name, options)
    return [shard(placed.targets(model, p)) for p in Placement(tp=tp).ranks()]


def tensors_of(got):
    """A shard as torch tensors of its bit patterns: what the way back needs."""
    return {n: torch.from_numpy(value.view(f"i{value.itemsize}")) for n, (_, value) in got.items()}


def raw(tensors):
    kinds = {2: torch.int16, 4: torch.int32}
    return {n: x.contiguous().view(kinds[x.element_size()]) for n, x in tensors.items()}


CASES = [(n, s) for n in NAMES for s in ([False, True] if n in STACKED else [False])]
ODD = {"llama": 211, "mixtral-odd": 131}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(("name", "stacked"), CASES)
@pytest.mark.parametrize("served", ["hf", "vllm", "rtp_llm"])
def test_every_rank(served, name, stacked, tp):
    model, config, hub = model_of(name, stacked)
    if served == "rtp_llm" and name == "gpt2":
        return  # tests/layouts/test_rtp_families.py has what is no Llama
    if served == "hf" and tp > 1 and name in ODD:
        with pytest.raises(LayoutError, match=f"vocab_size {ODD[name]} does not divide by tp {tp}"):
            layout(served, {"replicate_kv": "true"}).targets(model, Placement(tp=tp))
        return
    shards = shards_of(served, model, tp, **({"replicate_kv": "true"} if served == "hf" else {}))
    for r, got in enumerate(shards):
        same(got, getattr(oracle, served)(hub, config, tp, r))
    whole = getattr(oracle, f"{served}_whole")([tensors_of(got) for got in shards], config)
    want = raw(hub)
    if served == "rtp_llm" and config["tie_word_embeddings"]:
        want["lm_head.weight"] = want["model.embed_tokens.weight"]
    assert sorted(whole) == sorted(want)
    assert all(torch.equal(whole[n], want[n]) for n in want)


@pytest.mark.parametrize(("name", "stacked"), CASES)
def test_hf_of_one_rank_is_what_save_pretrained_writes(name, stacked):
    model, _, hub = model_of(name, stacked)
    same(shards_of("hf", model, 1)[0], hub)


def test_hf_refuses_fewer_kv_heads_than_ranks():
    model, *_ = model_of("tied")
    layout("hf").targets(model, Placement(tp=2))
    with pytest.raises(LayoutError, match=r"2 kv heads do not divide by tp 4.*replicate_kv=True"):
        layout("hf").targets(model, Placement(tp=4))


REFUSED = [
    ("hf", "qwen3", 3, "attention heads 8 does not divide by tp 3"),
    ("hf", "qwen3", 16, "attention heads 8 does not divide by tp 16"),
    ("vllm", "mixtral", 16, "attention heads 8 does not divide by tp 16"),
    ("rtp_llm", "llama", 16, "attention heads 8 does not divide by tp 16"),
]


@pytest.mark.parametrize(("served", "name", "tp", "message"), REFUSED)
def test_uneven_sizes_name_both_numbers(served, name, tp, message):
    model, *_ = model_of(name)
    with pytest.raises(LayoutError, match=message):
        layout(served).targets(model, Placement(tp=tp))


def sized(**changes):
    """A model whose layers cannot be built, so that a refusal is seen to come from sizes alone."""

    def never():
        raise AssertionError("a layer was built before the sizes were checked")

    model, *_ = model_of("tied")
    sizes = dataclasses.replace(model.sizes, **changes)
    return dataclasses.replace(model, sizes=sizes, layers=Layers((never,)))


@pytest.mark.parametrize("served", ["hf", "vllm", "rtp_llm"])
def test_sizes_are_checked_first(served):
    place, placed = Placement(tp=4), layout(served, {"replicate_kv": "true"} if served == "hf" else {})
    with pytest.raises(LayoutError, match="intermediate_size 90 does not divide by tp 4"):
        placed.targets(sized(widths={"intermediate_size": 90}), place)
    with pytest.raises(LayoutError, match="attention heads 6 does not divide by tp 4"):
        placed.targets(sized(heads=6), place)
    with pytest.raises(LayoutError, match="neither do 3 kv heads divide by tp 4"):
        placed.targets(sized(heads=12, kv_heads=3), place)
    for axis in {"hf": ("pp", "dp", "ep"), "rtp_llm": ("pp",)}.get(served, ()):
        with pytest.raises(LayoutError, match=f"wanted {axis} 1, got 2"):
            placed.targets(sized(), Placement(tp=2, **{axis: 2}))


@pytest.mark.parametrize("served", ["vllm", "rtp_llm", "megatron"])
def test_what_layers_of_no_decoder_have_is_refused(served):
    """As a user's own recipe may make them."""
    model, *_ = model_of("llama")
    layer = model.layers[0]
    biased = dataclasses.replace(layer.attention, relative=Parameter("buckets", layer.mlp_norm.weight))
    odd = [{"cross": layer.attention}, {"cross_norm": layer.mlp_norm}, {"attention": biased}]
    if served != "rtp_llm":
        odd.append({"vision": VisionExpert(layer.attention, layer.mlp)})
    for roles in odd:
        one = Layers([partial(dataclasses.replace, layer, **roles)])
        with pytest.raises(LayoutError, match=rf"layout {served} has no place for (model\.layers|buckets)"):
            list(layout(served).targets(dataclasses.replace(model, layers=one), Placement()))


def test_the_uneven_share_of_kv_heads_is_refused():
    """12 query and 4 kv heads over 6 ranks: no rank's local ratio says which kv head a query reads."""
    for served in ("vllm", "rtp_llm"):
        with pytest.raises(LayoutError, match="neither do 4 kv heads divide by tp 6"):
            model = sized(heads=12, kv_heads=4, hidden=96, widths={"intermediate_size": 96})
            layout(served).targets(model, Placement(tp=6))


def test_vocabularies_that_do_not_cut():
    with pytest.raises(LayoutError, match="vocab_size 32000, padded to 32000 does not divide by tp 3"):
        layout("vllm").targets(sized(vocab=32000, heads=9, kv_heads=3), Placement(tp=3))
    with pytest.raises(LayoutError, match="hidden_size 64 does not divide by tp 3"):
        layout("rtp_llm").targets(sized(heads=9, kv_heads=3), Placement(tp=3))


def test_padded_vocabularies_by_rank():
    """The worked figures: rows of data and of zeros on each rank."""

    def data_rows(vocab, multiple, tp):
        x = torch.ones(vocab, 1)
        view = memory({"x": x})["x"]
        parts = [read(padded_part(view, multiple, r, tp)) for r in range(tp)]
        assert len({len(p) for p in parts}) == 1
        return len(parts[0]), [int((p == bits(torch.ones(1))[0]).sum()) for p in parts]

    assert data_rows(10, 16, 2) == (8, [8, 2])
    assert data_rows(10, 32, 4) == (8, [8, 2, 0, 0])
    assert data_rows(17, 16, 2) == (16, [16, 1])
    assert data_rows(1010, 64, 2) == (512, [512, 498])
    assert data_rows(32001, 64, 2) == (16032, [16032, 15969])
    assert data_rows(32001, 16, 2) == (16008, [16008, 15993])
    assert data_rows(32000, 24, 3) == (10672, [10672, 10672, 10656])


def test_vllm_vocabulary_padding_is_an_option():
    model, *_ = model_of("llama")
    got = shards_of("vllm", model, 1, vocab_padding="8")[0]
    assert got["model.embed_tokens.weight"][1].shape == (216, 64)
    assert shards_of("vllm", model, 1, vocab_padding="1")[0]["lm_head.weight"][1].shape == (211, 64)


def test_options_from_strings():
    assert layout("hf", {"replicate_kv": "true"}) == layout("hf", {}).__class__(replicate_kv=True)
    assert layout("same", {"container": "bin"}).container == "bin"
    assert layout("vllm", {"vocab_padding": "128"}).vocab_padding == 128
    for name, options, message in [
        ("tensorrt", {}, "no layout 'tensorrt'; known: same, hf, vllm, rtp_llm, megatron"),
        ("vllm", {"padding": "1"}, "no option 'padding'; known: vocab_padding, pad, multiple, experts"),
        ("rtp_llm", {"x": "1"}, "known: absorb"),
        ("hf", {"replicate_kv": "yes"}, "wanted true or false, got 'yes'"),
        ("same", {"container": "zip"}, "wanted safetensors or bin, got 'zip'"),
        ("vllm", {"vocab_padding": "-64"}, "wanted a number, got '-64'"),
        ("vllm", {"vocab_padding": "9" * 5000}, f"wanted a number, got '{'9' * 40}'"),
        ("vllm", {"vocab_padding": "0"}, "at least 1, got 0"),
        ("hf", {"multiple": "0"}, "layout hf: multiple must be at least 1, got 0"),
        ("hf", {"multiple": "32"}, "layout hf: multiple goes with pad=True"),
        ("vllm", {"multiple": "32"}, "layout vllm: multiple goes with pad=True"),
        ("megatron", {"vocab_padding": "0"}, "vocab_padding must be at least 1, got 0"),
        ("rtp_llm", {"rope_positions": "1048577"}, "rope_positions must be at most 1048576, got 1048577"),
        ("rtp_llm", {"nodes": "0"}, "layout rtp_llm: nodes must be at least 1, got 0"),
    ]:
        with pytest.raises(LayoutError, match=message):
            layout(name, options)
    with pytest.raises(LayoutError, match="ffn_tp must be at least 0, got -2"):
        layout("rtp_llm").__class__(ffn_tp=-2)
    with pytest.raises(FastckptError, match="layout hf: multiple: wanted int, got float"):
        layout("hf").__class__(pad=True, multiple=2.0)


def test_file_names():
    one, third = Placement(), Placement(tp=4, rank=2)
    hf = layout("hf").naming(one)
    assert (hf.directory, hf.file(0, 1)) == ("", "model.safetensors")
    assert hf.file(0, 2) == "model-00001-of-00002.safetensors"
    assert (hf.index, hf.metadata) == ("model.safetensors.index.json", {"format": "pt"})
    assert layout("hf").naming(third).directory == "rank-02"
    vllm = layout("vllm").naming(third)
    assert [vllm.file(p, 2) for p in range(2)] == [f"model-rank-2-part-{p}.safetensors" for p in range(2)]
    assert (vllm.file(0, 1), vllm.index) == ("model-rank-2-part-0.safetensors", None)
    rtp = layout("rtp_llm").naming(third)
    assert rtp.file(0, 1) == rtp.file(0, 2) == "model-02-00-part-00000.safetensors"
    assert rtp.file(1, 2) == "model-02-00-part-00001.safetensors"
    torch_files = layout("same", {"container": "bin"}).naming(one)
    assert torch_files.file(0, 1) == "pytorch_model.bin"
    assert torch_files.file(2, 3) == "pytorch_model-00003-of-00003.bin"
    assert torch_files.index == "pytorch_model.bin.index.json"


def test_same_is_the_checkpoint_itself():
    tensors = {"b": torch.randn(5, 7), "a.scale": torch.tensor(3.0), "ids": torch.arange(4)}
    tensors["none"] = torch.ones(0, 3)
    ckpt = memory(tensors, pieces=2)
    targets = list(layout("same").targets(ckpt, Placement()))
    assert [t.name for t in targets] == list(tensors)
    same(shard(targets), tensors)
    for place in (Placement(tp=2), Placement(dp=2), Placement(ep=2)):
        with pytest.raises(LayoutError, match="same cuts nothing"):
            layout("same").targets(ckpt, place)
