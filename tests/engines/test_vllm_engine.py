"""A real vLLM serves what we wrote, and straight from a training checkpoint: `make test-vllm`.

Each model is trained a step by DeepSpeed on two ranks. vLLM then runs at TP = 2 three times: its own loading
of the hub directory we made of that checkpoint, its sharded_state loading of our shards, and our load format
on the checkpoint itself. Greedy tokens and their log probabilities must be equal, to the last digit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt.layouts import layout
from fastckpt.placement import Placement

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
from engines import served_models  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

HERE = Path(__file__).parent
ENGINE = f"vllm=={vllm.__version__}"
TRAINED = {"llama": 3, "mixtral": 2, "qwen3_moe": 3, "llama-tied": 2}
"""Model -> the ZeRO stage it is trained at."""


def script(name: str, *argv: str) -> str:
    command = [sys.executable, str(HERE / name), *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def generated(model: Path, **asked: str) -> dict:
    said = script("vllm_generate.py", json.dumps({"model": str(model), "tensor_parallel_size": 2} | asked))
    print("\n".join(line for line in said.splitlines() if "fastckpt" in line or "GENERATED" in line))
    (line,) = (line for line in said.splitlines() if line.startswith("GENERATED "))
    return json.loads(line.removeprefix("GENERATED "))


@pytest.mark.parametrize("name", TRAINED)
def test_the_same_tokens_by_three_roads(name, tmp_path):
    served_models.write(name, str(tmp_path / "start"))
    zero, hub, shards = tmp_path / "zero", tmp_path / "hub", tmp_path / "shards"
    script("train_zero.py", str(tmp_path / "start"), str(zero), str(TRAINED[name]), "2")
    fastckpt.reshard(zero, layout="hf", dtype="bfloat16", out=hub)
    fastckpt.reshard(zero, tp=2, layout=layout("vllm", {"engine": ENGINE}), dtype="bfloat16", out=shards)
    assert fastckpt.verify(shards, engine="vllm").problems == ()
    want = generated(hub)
    assert len({tuple(tokens) for tokens in want["tokens"]}) > 1
    assert generated(shards, load_format="sharded_state") == want
    assert generated(zero, load_format="fastckpt") == want


SOME = ("llama-tied", "mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3")
GRIDS = {
    "tp1": (Placement(), tuple(served_models.MODELS), ()),
    "tp2": (Placement(tp=2), tuple(served_models.MODELS), ()),
    "tp4": (Placement(tp=4), tuple(served_models.MODELS), ("gpt_oss",)),
    "tp2-ep2": (Placement(tp=2, ep=2), SOME[1:], ()),
    "pp2": (Placement(pp=2), ("llama-tied", "mixtral", "qwen3_moe", "deepseek_v3"), ()),
}
"""Grid -> the placement, the models, and those vLLM itself refuses there."""


@pytest.mark.parametrize("grid", GRIDS)
def test_shards_are_bit_for_bit_what_vllm_loads(grid, tmp_path):
    """What vLLM's own load_weights leaves on every rank, before any kernel reorders it."""
    placement, names, refused = GRIDS[grid]
    models, truth = tmp_path / "models", tmp_path / "truth"
    for name in names:
        served_models.write(name, str(models / name), counted=True)
    script("vllm_truth.py", str(models), str(truth), grid, *names)
    asked = layout("vllm", {"engine": ENGINE})
    assert {name for name in names if (truth / name / grid / "error").exists()} == set(refused)
    for name in set(names) - set(refused):
        for rank, got in enumerate(fastckpt.reshard(models / name, placement=placement, layout=asked)):
            want = load_file(truth / name / grid / f"model-rank-{rank}-part-0.safetensors")
            missing = want.keys() - got.keys()
            assert not missing, f"{name} rank {rank}"
            for key, tensor in want.items():
                same = torch.equal(got[key], tensor) and got[key].dtype is tensor.dtype
                assert same, f"{name} rank {rank}: {key}"


def test_what_does_not_fit_stops_vllm(tmp_path):
    """A checkpoint of other sizes than the config's is an error that names both, and nothing is served."""
    served_models.write("llama", str(tmp_path / "hub"))
    told = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps(told | {"intermediate_size": 192}))
    with pytest.raises(AssertionError, match=r"got shape \(256, 128\), wanted \(192, 128\)"):
        generated(tmp_path / "hub", load_format="fastckpt")
