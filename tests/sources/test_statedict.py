"""PyTorch state dicts in all the shapes they come in."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from fastckpt import sources
from reading import holds, refuses
from torch.distributed.fsdp import ShardingStrategy

BASE = torch.arange(40.0)
TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(5), "c": torch.zeros(0, 3),
    "view": BASE[3:33].view(5, 6).t(), "bf": torch.arange(6).to(torch.bfloat16),
    "p": torch.nn.Parameter(torch.ones(3)),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_one_file(tmp_path, zipped):
    path = tmp_path / "weights.pt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    ckpt = sources.open(path)
    holds(ckpt, TENSORS)
    assert ckpt.format == "statedict"


def test_a_directory(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1.0}, tmp_path / "optimizer.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "training_args.bin")
    ckpt = sources.open(tmp_path, check_crc=True)
    holds(ckpt, TENSORS)
    assert any(note.startswith("training_args.bin") for note in ckpt.unread)


def test_what_accelerate_puts_beside_a_gathered_model(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model_fsdp.bin")
    beside = "training_args", "optimizer", "optimizer_1", "scheduler", "sampler_1", "dl_state_dict"
    for name in beside:
        torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "w": torch.ones(2)}, tmp_path / f"{name}.bin")
    ckpt = sources.open(tmp_path)
    holds(ckpt, TENSORS)
    assert sorted(ckpt.unread) == sorted(f"{name}.bin: not a part of the weights" for name in beside)


def test_what_a_module_keeps_beside_its_weights_is_none(tmp_path):
    torch.save(TENSORS | {"x._extra_state": {"scale": torch.ones(1)}}, tmp_path / "x.pt")
    assert "x._extra_state" not in sources.open(tmp_path / "x.pt")
    torch.save(TENSORS | {"x": {"scale": torch.ones(1)}}, tmp_path / "x.pt")
    refuses(tmp_path / "x.pt", "tensors beside dicts of tensors")


def test_shards_with_an_index(tmp_path):
    placed = {}
    for k, (name, t) in enumerate(TENSORS.items()):
        placed[name] = f"pytorch_model-{k:05d}-of-00006.bin"
        torch.save({name: t}, tmp_path / placed[name])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    holds(sources.open(tmp_path), TENSORS)
    holds(sources.open(tmp_path / "pytorch_model.bin.index.json"), TENSORS)


def test_tied_names_are_aliases(tmp_path):
    tensors = {
        "embed": TENSORS["a"],
        "other": TENSORS["a"].clone(),
        "head": TENSORS["a"],
        "part": TENSORS["a"][1:],
    }
    torch.save(tensors, tmp_path / "x.bin")
    ckpt = sources.open(tmp_path / "x.bin")
    assert dict(ckpt.aliases) == {"head": "embed"}
    holds(ckpt, tensors)


def test_a_name_of_which_nothing_remains_is_left_out(tmp_path):
    tensors = {"embed": TENSORS["a"], "head": TENSORS["a"], "copy": TENSORS["a"], "b": TENSORS["b"]}
    torch.save(tensors, tmp_path / "x.bin")

    def kept(*patterns):
        ckpt = sources.open(tmp_path / "x.bin", rename=[(p, "") for p in patterns])
        holds(ckpt, {n: tensors[n] for n in (*ckpt.entries, *ckpt.aliases)})
        return list(ckpt.entries), dict(ckpt.aliases), ckpt.unread[-1]

    assert kept("^b$") == (["embed"], {"head": "embed", "copy": "embed"}, "left out by rename: b")
    assert kept("^head$", "^b") == (["embed"], {"copy": "embed"}, "left out by rename: b, head")
    assert kept("^embed$") == (["b", "head"], {"copy": "head"}, "left out by rename: embed")
    refuses(tmp_path / "x.bin", "leaves out every tensor", rename=[(".*", "")])


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
def test_wrapped_in_one_key(tmp_path, key):
    torch.save({key: TENSORS, "epoch": 3, "optimizer": {"state": {0: torch.ones(5)}}}, tmp_path / "x.pt")
    ckpt = sources.open(tmp_path / "x.pt")
    holds(ckpt, TENSORS)
    assert "optimizer: beside the state dict" in ckpt.unread


def test_where_composer_puts_the_model(tmp_path):
    state = {"model": TENSORS, "optimizers": {"Adam": {"state": {0: {"m": torch.ones(5)}}}}, "timestamp": {}}
    torch.save({"state": state, "rng": [{"cuda": torch.ones(2)}]}, tmp_path / "ep0-ba10-rank0.pt")
    ckpt = sources.open(tmp_path / "ep0-ba10-rank0.pt")
    holds(ckpt, TENSORS)
    assert ckpt.unread == tuple(f"{n}: beside the state dict" for n in ("rng", "optimizers", "timestamp"))


def test_structure_holds_offsets_and_strides(tmp_path):
    square = torch.arange(16.0).view(4, 4)
    digests = set()
    for k, t in enumerate((square[:3, :3], square[1:, 1:], square.t()[:3, :3])):
        torch.save({"a": t}, tmp_path / f"{k}.pt")
        (tmp_path / f"{k}.pt").rename(tmp_path / "x.pt")
        digests.add(sources.open(tmp_path / "x.pt").structure)
    assert len(digests) == 3


def test_what_is_no_tensor_is_said(tmp_path):
    torch.save({**TENSORS, "version": 3}, tmp_path / "x.pt")
    ckpt = sources.open(tmp_path / "x.pt")
    holds(ckpt, TENSORS)
    assert "version: no tensor" in ckpt.unread


class OfAnotherLibrary:
    """Pickles itself as Transformer Engine's fp8 tensors do: the bytes, and what makes a tensor of them."""

    def __reduce__(self):
        return OfAnotherLibrary, (torch.zeros(3, dtype=torch.uint8), 4, torch.ones(1))


class Filled(dict):
    """A dict of a class of its own."""


def test_settings_beside_the_weights_are_no_tensors(tmp_path):
    """Which name functions, classes and enums of torch's."""
    settings = argparse.Namespace(act=torch.nn.functional.gelu, norm=torch.nn.SiLU(), cut=ShardingStrategy(1))
    torch.save({**TENSORS, "args": settings}, tmp_path / "x.pt")
    ckpt = sources.open(tmp_path / "x.pt")
    holds(ckpt, TENSORS)
    assert "args: no tensor" in ckpt.unread


BAD = {
    "ambiguous": ({"model": TENSORS, "state_dict": TENSORS}, "several dicts of tensors: state_dict, model"),
    "deeper": ({"a": {"model": TENSORS}, "b": {"model": TENSORS}}, "tensors: a.model, b.model"),
    "no known key": ({"weights": TENSORS, "epoch": 1}, "keys: weights, epoch"),
    "nothing": ({"a": 1}, "no dict of tensors"),
    "a module": (torch.nn.Linear(1, 1), "got torch.nn.modules.linear.Linear"),
    "a list": ([torch.ones(1)], "wanted a dict of tensors, got list"),
    "within": ({"model": {**TENSORS, "more": {"deep": (3, torch.ones(1))}}}, "more: holds a tensor"),
    "beside": ({"a": torch.ones(1), "model": TENSORS}, "tensors beside dicts of tensors"),
    "names": ({1: torch.ones(1)}, "which is no string"),
    "deepspeed": ({"module": TENSORS, "param_shapes": []}, "open its directory"),
    "its optimizer": ({"optimizer_state_dict": {"a": 1}, "ds_version": "0.19.8"}, "open its directory"),
    "a form of its own": ({**TENSORS, "w": OfAnotherLibrary()}, "w: a tensor of another library's class"),
    "a dict of its own": ({**TENSORS, "w": Filled(deep=torch.ones(1))}, "Filled), such as"),
    "an object": ({**TENSORS, "w": argparse.Namespace(a=torch.eye(2).to_sparse())}, "Namespace), such as"),
    "sparse": ({"a": torch.ones(1), "b": torch.eye(2).to_sparse()}, "b"),
}


@pytest.mark.parametrize(("content", "word"), BAD.values(), ids=BAD)
def test_files_that_are_no_state_dict(tmp_path, content, word):
    torch.save(content, tmp_path / "x.pt")
    refuses(tmp_path / "x.pt", word)


def test_no_tensors_at_all(tmp_path):
    torch.save({}, tmp_path / "x.pt")
    holds(sources.open(tmp_path / "x.pt"), {})


def test_a_file_of_two_shards_missing(tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    refuses(tmp_path, "pytorch_model-1.bin is missing")


def test_an_index_of_nothing(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model-00001-of-00001.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    refuses(tmp_path, "no weight_map, or an empty one")


def test_an_index_that_leaves_out_a_file_of_its_set(tmp_path):
    names = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
    for name, file in zip("ab", names, strict=True):
        torch.save({name: torch.ones(2)}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": names[0]}}))
    refuses(tmp_path, f"{names[1]}: is of the set that the index lists, but the index names neither it nor b")
