"""DeepSpeed's converter by its own names: arguments, results, the script's command line."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastckpt import zero_to_fp32
from fastckpt.errors import SourceError, WriteError
from safetensors.torch import load_file
from zero_writer import write_zero

PARAMS = {"a.weight": torch.randn(5, 3), "b.weight": torch.randn(7), "c.frozen": torch.randn(3, 3)}


@pytest.fixture(params=[1, 2, 3])
def source(request, tmp_path):
    """(path, what a converter must give): every stage, with a frozen parameter, a buffer and a tied pair."""
    path = tmp_path / "source"
    want = write_zero(
        path, PARAMS, stage=request.param, world=2, frozen=["c.frozen"],
        buffers={"steps": torch.arange(4), "mean": torch.randn(3, dtype=torch.bfloat16)},
        tied={"d.weight": "a.weight"},
    )  # fmt: skip
    return path, {n: t.float() if t.is_floating_point() else t for n, t in want.items()}


def same(got, want):
    assert list(got) == list(want)
    for name, t in want.items():
        assert (got[name].dtype, got[name].shape) == (t.dtype, t.shape), name
        assert torch.equal(got[name], t), name


def deepspeed_functions() -> dict[str, list[tuple[str, object]]]:
    """Each function of DeepSpeed's script with its arguments and defaults, without importing it."""
    found = importlib.util.find_spec("deepspeed")
    if found is None:
        pytest.skip("deepspeed is not installed")
    script = Path(found.submodule_search_locations[0]) / "utils" / "zero_to_fp32.py"
    return signatures(script)


def signatures(script: Path) -> dict[str, list[tuple[str, object]]]:
    out = {}
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in node.args.args]
            values = [ast.unparse(d).replace("torch.float32", "'float32'") for d in node.args.defaults]
            out[node.name] = list(zip(names, [None] * (len(names) - len(values)) + values, strict=True))
    return out


@pytest.mark.parametrize(
    "name",
    [
        "get_fp32_state_dict_from_zero_checkpoint",
        "convert_zero_checkpoint_to_state_dict",
        "convert_zero_checkpoint_to_fp32_state_dict",
        "load_state_dict_from_zero_checkpoint",
    ],
)
def test_arguments_are_deepspeed_s(name):
    assert signatures(Path(zero_to_fp32.__file__))[name] == deepspeed_functions()[name]


def test_the_state_dict(source):
    path, want = source
    got = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(path))
    same(got, want)
    assert got["d.weight"].data_ptr() == got["a.weight"].data_ptr()
    same(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(path, "global_step2"), want)


def test_without_frozen_parameters(source):
    path, want = source
    del want["c.frozen"]
    same(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(path, exclude_frozen_parameters=True), want)


def test_lazy_mode(source, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCKPT_CACHE", str(tmp_path / "plans"))
    path, want = source
    lazy = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(path, lazy_mode=True)
    assert list(lazy) == list(want)
    assert lazy["d.weight"] is lazy["a.weight"]
    for name, t in want.items():
        assert (lazy[name].shape, lazy[name].dtype) == (t.shape, t.dtype)
        assert lazy[name].shape.numel() == t.numel()
        assert torch.equal(lazy[name].contiguous(), t)
    assert not (tmp_path / "plans").exists()  # 64 are kept, and a tensor is no plan


@pytest.mark.parametrize("safe", [False, True])
def test_files(source, tmp_path, safe):
    path, want = source
    out = tmp_path / "out"
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(path, out, safe_serialization=safe)
    if safe:
        held = load_file(out / "model.safetensors")
        assert {*want} - {*held} == {"d.weight"}  # one name of a tied pair, as the hub keeps it
        assert all(torch.equal(held[n], want[n]) for n in held)
    else:
        same(torch.load(out / "pytorch_model.bin", weights_only=True), want)


def test_files_are_cut_and_indexed(source, tmp_path):
    path, want = source
    out = tmp_path / "out"
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(path, out, max_shard_size="80")
    index = json.loads((out / "pytorch_model.bin.index.json").read_text())
    assert set(index["weight_map"]) == set(want)
    for name, file in index["weight_map"].items():
        assert torch.equal(torch.load(out / file, weights_only=True)[name], want[name])
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(path, tmp_path / "one", max_shard_size=None)
    assert (tmp_path / "one" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_other_types(source, tmp_path, dtype):
    path, want = source
    out = tmp_path / "out"
    zero_to_fp32.convert_zero_checkpoint_to_state_dict(path, out, dtype)
    got = torch.load(out / "pytorch_model.bin", weights_only=True)
    same(got, {n: t.bfloat16() if t.is_floating_point() else t for n, t in want.items()})


def test_an_earlier_output_is_replaced_and_nothing_else(source, tmp_path):
    path, want = source
    out = tmp_path / "out"
    out.mkdir()  # as DeepSpeed's makedirs(exist_ok=True): an empty directory is fine
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(path, out, max_shard_size="80")
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(path, out)
    assert sorted(p.name for p in out.iterdir()) == ["fastckpt.json", "pytorch_model.bin"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(WriteError, match=r"not empty, notes\.txt is of no earlier output; name a new dir"):
        zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(path, out)
    with pytest.raises(WriteError, match=r"not empty, global_step2/.* is of no earlier output"):
        zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(path, path)
    assert (out / "notes.txt").read_text() == "mine"
    same(torch.load(out / "pytorch_model.bin", weights_only=True), want)


def test_a_model_is_filled(source):
    path, want = source

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(3, 5, bias=False)
            self.b = torch.nn.Module()
            self.b.weight = torch.nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
            self.e = torch.nn.Linear(2, 2)
            self.register_buffer("steps", torch.zeros(4, dtype=torch.int64))

    model = Part()
    untouched = model.e.weight.detach().clone()
    assert zero_to_fp32.load_state_dict_from_zero_checkpoint(model, path) is model
    assert torch.equal(model.a.weight, want["a.weight"])
    assert torch.equal(model.b.weight, want["b.weight"].bfloat16())
    assert torch.equal(model.steps, want["steps"])
    assert torch.equal(model.e.weight, untouched)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(SourceError):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    write_zero(tmp_path / "source", PARAMS, stage=3, world=2)
    with pytest.raises(SourceError, match="global_step2"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "source", tag="absent")


def test_the_script(source, tmp_path):
    path, want = source
    command = [sys.executable, "-m", "fastckpt.zero_to_fp32", str(path), str(tmp_path / "out")]
    done = subprocess.run([*command, "-t", "global_step2"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    same(torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True), want)


def test_the_script_s_options(source, tmp_path, capsys):
    path, want = source
    argv = ["--safe_serialization", "--max_shard_size", "80", "--exclude_frozen_parameters", "-d"]
    assert zero_to_fp32.main([str(path), str(tmp_path / "out"), *argv]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(want) - {"c.frozen", "d.weight"}
    assert zero_to_fp32.main([str(path), str(tmp_path / "new"), "--tag", "absent"]) == 3
    error, more = capsys.readouterr().err.splitlines()
    assert error.startswith("zero_to_fp32: error: ") and "`fastckpt consolidate` has more options" in more
    with pytest.raises(SourceError):
        zero_to_fp32.main([str(path), str(tmp_path / "new"), "--tag", "absent", "--debug"])
    assert not (tmp_path / "new").exists()
