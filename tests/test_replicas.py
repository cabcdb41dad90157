"""What a checkpoint holds more than once: copies that differ in one element are not taken for one tensor."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt import replicas
from fastckpt.checkpoint import Replica
from fastckpt.errors import SourceError
from layouts import tiny
from outputs import changed, hub_directory
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setenv("FASTCKPT_CACHE", "off")


def hub_of(path, made):
    """A hub directory of a tiny model, whose tensors have no value twice."""
    config, hub, *_ = made
    hub = {
        n: torch.arange(x.numel(), dtype=torch.float32).reshape(x.shape) + k
        for k, (n, x) in enumerate(hub.items())
    }
    hub_directory(path, config, hub)
    return hub


def damaged(path, name, at):
    """One element of a tensor in a safetensors file, made another; the header stays as it is."""
    tensors = load_file(path)
    tensors[name].view(-1)[at] += 1
    values = tensors[name].numpy().tobytes()
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    data[8 + size + begin : 8 + size + end] = values
    path.write_bytes(data)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Shards of a model with two key-value heads, four ranks: each head is held by two of them."""
    root = tmp_path_factory.mktemp("served")
    hub_of(root / "hub", tiny.made("llama"))
    config = json.loads((root / "hub" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    fastckpt.reshard(root / "hub", 4, layout="vllm", out=root / "ours", durable=False)
    return root


PART = "model-rank-{}-part-0.safetensors"
QKV = "model.layers.1.self_attn.qkv_proj.weight"
"""Of each rank: 16 rows of q, 8 of the one head of k, 8 of v."""

COPIES = {
    "model.norm.weight": ("model.norm.weight", 37, 0),
    "model.layers.1.self_attn.o_proj.bias": ("model.layers.1.self_attn.o_proj.bias", 63, 0),
    "model.layers.1.self_attn.k_proj.weight": (QKV, 20 * 64 + 5, 2),
    "model.layers.1.self_attn.v_proj.weight": (QKV, 31 * 64 + 63, 2),
}
"""A tensor of the model -> the one of a shard, an element of it on rank 3, the first rank that has it too."""


def spoilt(served, tmp_path, name):
    """The shards with one element changed in one rank's copy, and what an error says of it."""
    out = tmp_path / "out"
    shutil.copytree(served / "ours", out)
    stored, at, first = COPIES[name]
    damaged(out / PART.format(3), stored, at)
    return out, [name, f"{out / PART.format(first)} ({first}/{stored}", f"{out / PART.format(3)} (3/{stored}"]


def roads(tmp_path):
    """All that reads weights of a checkpoint."""
    return (
        lambda c: fastckpt.reshard(c, 2, layout="vllm"),
        lambda c: fastckpt.reshard(c, 2, layout="vllm", rank=0, out=tmp_path / "files", durable=False),
        lambda c: fastckpt.consolidate(c),
        lambda c: fastckpt.load_into(torch.nn.Linear(1, 1), c, strict=False),
        lambda c: fastckpt.verify_tensors({}, c),
        lambda c: fastckpt.diff(c, c),
    )


@pytest.mark.parametrize("name", COPIES)
def test_no_road_takes_the_first_of_two(served, tmp_path, name):
    """Opening and planning read no weight; whatever reads weights refuses, naming tensor, ranks and files."""
    out, words = spoilt(served, tmp_path, name)
    ckpt = fastckpt.open(out)
    fastckpt.plan(ckpt, 2, layout="vllm")
    for road in roads(tmp_path):
        with pytest.raises(SourceError) as e:
            road(ckpt)
        for word in words:
            assert word in str(e.value), str(e.value)
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize("name", COPIES)
def test_shards_of_other_programs(served, tmp_path, name):
    out, words = spoilt(served, tmp_path, name)
    (out / "fastckpt.json").unlink()
    ckpt = fastckpt.open_shards(out, "vllm", served / "hub", tp=4)
    with pytest.raises(SourceError) as e:
        fastckpt.reshard(ckpt, layout="same")
    for word in words:
        assert word in str(e.value), str(e.value)


def drifted(served, tmp_path):
    """The shards, with all of COPIES changed on rank 3."""
    out = tmp_path / "out"
    shutil.copytree(served / "ours", out)
    for stored, at, _ in COPIES.values():
        damaged(out / PART.format(3), stored, at)
    return out


def test_the_first_of_what_drifted_apart(served, tmp_path):
    """Asked for, the first copy is taken on every road, as if the others were equal; a note counts them."""
    out = drifted(served, tmp_path)
    hub = load_file(served / "hub" / "model.safetensors")
    ckpt = fastckpt.open(out, replicas="first")
    got = fastckpt.consolidate(ckpt)
    assert got.keys() == hub.keys() and all(torch.equal(got[n], x) for n, x in hub.items())
    report = fastckpt.reshard(ckpt, 2, layout="vllm", out=tmp_path / "two", durable=False)
    (note,) = [n for n in report.notes if "differ" in n]
    assert note.startswith(f"{len(COPIES)} replicas differ, and the first was taken, such as model.")
    fastckpt.reshard(served / "ours", 2, layout="vllm", out=tmp_path / "wanted", durable=False)
    assert fastckpt.diff(tmp_path / "two", tmp_path / "wanted").equal
    with pytest.raises(SourceError, match="replicas='first'"):
        fastckpt.open(out, replicas="equal") and fastckpt.consolidate(out)


def test_the_first_of_drifted_shards_of_other_programs(served, tmp_path):
    out = drifted(served, tmp_path)
    (out / "fastckpt.json").unlink()
    ckpt = fastckpt.open_shards(out, "vllm", served / "hub", tp=4, replicas="first")
    got = fastckpt.consolidate(ckpt)
    hub = load_file(served / "hub" / "model.safetensors")
    assert all(torch.equal(got[n], x) for n, x in hub.items())
    with pytest.raises(fastckpt.FastckptError, match="none of equal, first"):
        fastckpt.open_shards(out, "vllm", served / "hub", tp=4, replicas="any")


def test_copies_that_are_equal(served):
    """What was cut is put together again, and the report counts the bytes that were compared."""
    ckpt = fastckpt.open(served / "ours")
    hub = load_file(served / "hub" / "model.safetensors")
    got = fastckpt.consolidate(ckpt)
    assert all(torch.equal(got[n], x) for n, x in hub.items()) and got.keys() == hub.keys()
    compared = sum(2 * r.kept().nbytes for r in ckpt.replicas)
    norms = 3 * 64 * 5
    biases = 3 * 64 * 4  # of o and down
    heads = 2 * 2 * 2 * 8 * (64 + 1)  # two layers, k and v, two heads, held once more each
    assert compared == 2 * 4 * (norms + biases + heads)
    report = fastckpt.reshard(ckpt, layout="same", out=[{n: torch.empty_like(x) for n, x in hub.items()}])
    whole = sum(x.nbytes for x in hub.values())
    assert report.bytes_read == whole + compared


def test_beyond_the_limit_samples(served, tmp_path, monkeypatch):
    """The smallest are compared whole, the others in samples, which a note says; both ends are looked at."""
    monkeypatch.setattr(replicas, "WHOLE", 2 * 4 * (64 * 3 * 9 + 2 * 2 * 2 * 8))  # norms and biases
    monkeypatch.setattr(replicas, "SAMPLES", 16)
    out = tmp_path / "out"
    shutil.copytree(served / "ours", out)
    report = fastckpt.reshard(out, 2, layout="vllm", out=tmp_path / "fine", durable=False)
    (note,) = [n for n in report.notes if "replicas" in n]
    assert note.startswith(
        "8 replicas of 16384 bytes were compared in samples, not whole, such as model.layers."
    )
    for at, seen in ((16 * 64, True), (16 * 64 + 30, False), (24 * 64 - 1, True)):
        shutil.rmtree(out)
        shutil.copytree(served / "ours", out)
        damaged(out / PART.format(1), QKV, at)
        if seen:
            with pytest.raises(SourceError, match="k_proj"):
                fastckpt.consolidate(out)
        else:
            fastckpt.consolidate(out)
    for name in ("model.norm.weight", "model.layers.1.self_attn.o_proj.bias"):
        with pytest.raises(SourceError, match=name):
            fastckpt.consolidate(spoilt(served, tmp_path / name, name)[0])


def test_a_record_with_two_digests(served, tmp_path):
    """The record tells at once that two ranks were cut from two checkpoints."""
    out = tmp_path / "out"
    shutil.copytree(served / "ours", out)
    changed(out, lambda record: record["ranks"][3]["tensors"]["model.norm.weight"].update(digest="0" * 16))
    said = r"0/model\.norm\.weight and 3/model\.norm\.weight are the same elements"
    with pytest.raises(SourceError, match=said):
        fastckpt.open(out)
    assert fastckpt.consolidate(fastckpt.open(out, replicas="first"))


# ---- two names that the config makes one ----


def twice_named(path, **changes):
    """A model whose file has a tied matrix of 2 MiB under both names, as trainers write it."""
    config, hub, *_ = tiny.made("tied")
    matrix = torch.arange(8192 * 64, dtype=torch.float32).reshape(8192, 64)
    hub = {**hub, "model.embed_tokens.weight": matrix, "lm_head.weight": matrix.clone()}
    hub_directory(path, config | {"vocab_size": 8192} | changes, hub)
    return hub


def bytes_of_reads(call):
    """What a call reads of files, by the kernel's count for this process."""

    def count():
        return int(Path("/proc/self/io").read_text().split()[1])

    call()  # what is imported and parsed once
    before = count()
    call()
    return count() - before


def test_opening_reads_no_matrix(tmp_path):
    """Headers, and samples of values: a tied matrix is compared by the run that takes one for both."""
    hub = twice_named(tmp_path / "a")
    headers = 8 + int.from_bytes((tmp_path / "a" / "model.safetensors").read_bytes()[:8], "little")
    for call in (fastckpt.open, fastckpt.inspect, lambda path: fastckpt.plan(path, 2, layout="vllm")):
        assert bytes_of_reads(lambda call=call: call(tmp_path / "a")) < headers + (64 << 10)
    ckpt = fastckpt.open(tmp_path / "a")
    (name, holder) = next(iter(ckpt.aliases.items()))
    assert {name, holder} == {"lm_head.weight", "model.embed_tokens.weight"}
    report = fastckpt.consolidate(ckpt, tmp_path / "whole", dtype=None, durable=False)
    matrix = hub["lm_head.weight"].nbytes
    assert report.bytes_read == sum(x.nbytes for x in hub.values()) - matrix + 2 * matrix


def test_a_tie_that_is_none(tmp_path):
    """Where no sample shows that two names are two tensors, the run does; where one does, both are kept."""
    file = tmp_path / "a" / "model.safetensors"
    twice_named(tmp_path / "a")
    damaged(file, "lm_head.weight", 100)
    ckpt = fastckpt.open(tmp_path / "a")
    assert ckpt.aliases
    for road in roads(tmp_path):
        with pytest.raises(SourceError, match=r"tie_word_embeddings of the config says: a float32 is") as e:
            road(ckpt)
        for part in (f"{file} (lm_head.weight, byte", f"{file} (model.embed_tokens.weight, byte"):
            assert part in str(e.value)
    damaged(file, "lm_head.weight", 0)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= fastckpt.consolidate(tmp_path / "a").keys()
    twice_named(tmp_path / "b", tie_word_embeddings=False)
    assert not fastckpt.open(tmp_path / "b").replicas


def test_replicas_of_two_shapes_or_dtypes_are_none(tmp_path):
    """Not even the first of them is taken: what they are is in doubt."""
    save_file(
        {"a": torch.zeros(4), "b": torch.zeros(2, 2), "c": torch.zeros(4).half()}, tmp_path / "x.safetensors"
    )
    ckpt = fastckpt.open(tmp_path / "x.safetensors", replicas="first")
    for name, said in (("b", r"float32\[4\] and float32\[2, 2\]"), ("c", r"float32\[4\] and float16\[4\]")):
        pair = Replica("w", partial(ckpt.__getitem__, "a"), partial(ckpt.__getitem__, name))
        with pytest.raises(SourceError, match=rf"x\.safetensors: w: {said}"):
            replicas.compare(replace(ckpt, replicas=(pair,)))
