"""A real vLLM serves what we wrote, and straight from a training checkpoint: `make test-vllm`.

vLLM runs at TP = 2 three times for each model: its own loading of a hub directory, its sharded_state loading
of our shards, and our load format on the checkpoint itself. Greedy tokens and their log probabilities must
be equal, to the last digit. Some models are trained a step by DeepSpeed on two ranks, and the hub
directory is ours too; the others are served from theirs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
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
ENGINE = layout("vllm", {"engine": f"vllm=={vllm.__version__}"})
TRAINED = {
    "llama": 3, "mixtral": 2, "qwen3_moe": 3, "llama-tied": 2, "olmo2": 3, "granitemoe": 2,
    "qwen3_5_text-wide": 3,
}  # fmt: skip
"""Model -> the ZeRO stage it is trained at."""

SERVED = (
    "llama+int8", "qwen3", "gemma2", "gemma3_text", "phi3", "glm4", "gpt_neox", "gpt2", "bloom", "falcon-new",
    "chatglm", "qwen2_moe", "glm4_moe", "deepseek_v2-576", "gpt_oss", "cohere2", "starcoder2", "apertus",
    "nemotron", "opt", "gptj", "exaone4", "llama4_text", "ernie4_5_moe", "olmoe", "hunyuan_v1_moe",
    "qwen3_next-wide", "hy_v3", "lfm2", "lfm2_moe", "mimo_v2_flash-wide", "afmoe", "cohere2_moe",
    "hyperclovax",
)  # fmt: skip
"""Models that are served from their hub directory."""


def script(log: Path, name: str, *argv: str) -> str:
    """What it says, which a file holds while it runs."""
    command = [sys.executable, str(HERE / name), *argv]
    with log.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, log.read_text()
    return log.read_text()


def roads(name, root):
    """road -> what vLLM is asked for, of one model."""
    hub, source, shards = root / "hub", root / "zero", root / "shards"
    if name in TRAINED:
        served_models.write(name, str(root / "start"))
        script(root / "log", "train_zero.py", str(root / "start"), str(source), str(TRAINED[name]), "2")
        fastckpt.reshard(source, layout="hf", dtype="bfloat16", out=hub)
    else:
        served_models.write(name, str(hub))
        source = hub
    dtype = "bfloat16" if name in TRAINED else None
    fastckpt.reshard(source, tp=2, layout=ENGINE, dtype=dtype, out=shards)
    assert fastckpt.verify(shards, engine="vllm").problems == ()
    return {
        "own": {"model": str(hub)},
        "sharded_state": {"model": str(shards), "load_format": "sharded_state"},
        "fastckpt": {"model": str(source), "load_format": "fastckpt"},
    }


def of_other_sizes(root):
    """A checkpoint of other sizes than the config's."""
    served_models.write("llama", str(root))
    told = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(told | {"intermediate_size": 192}))
    return {"fastckpt": {"model": str(root), "load_format": "fastckpt"}}


def generate(log: Path, engines: list[dict]) -> list[dict]:
    """What each of these engines makes of the prompts, one after another."""
    said = script(log, "vllm_generate.py", json.dumps(engines))
    lines = [line for line in said.splitlines() if line.startswith("GENERATED ")]
    return [json.loads(line.removeprefix("GENERATED ")) for line in lines]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """(model, road) -> what vLLM made of the prompts; all in one go, since starting it takes longest."""
    asked = {
        (name, road): engine
        for name in (*TRAINED, *SERVED)
        for road, engine in roads(name, tmp_path_factory.mktemp(name)).items()
    }
    broken = of_other_sizes(tmp_path_factory.mktemp("broken") / "hub")
    asked |= {("broken", road): engine for road, engine in broken.items()}
    told = generate(tmp_path_factory.mktemp("generated") / "log", list(asked.values()))
    return dict(zip(asked, told, strict=True))


@pytest.mark.parametrize("name", [*TRAINED, *SERVED])
def test_the_same_tokens_by_three_roads(name, generated):
    told = {road: generated[name, road] for road in ("own", "sharded_state", "fastckpt")}
    for road, made in told.items():
        print(f"{name}, {road}: {json.dumps(made)}")
        assert "error" not in made, made["error"]
    want = told["own"]
    assert len({tuple(tokens) for tokens in want["tokens"]}) > 1
    assert told == dict.fromkeys(told, want)


def test_what_does_not_fit_stops_vllm(generated):
    """An error that names both sizes, and nothing is served."""
    assert "got shape (256, 128), wanted (192, 128)" in generated["broken", "fastckpt"]["error"]


SOME = ("llama-tied", "mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3")
STAGED = ("llama+int8", "mixtral+fp8-matrix", "deepseek_v3-wide+fp8-block", "qwen3_moe+gptq")
EVERY = (*served_models.MODELS, *served_models.QUANTISED)
PIXELS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
GRIDS = {
    "tp1": (Placement(), EVERY, ()),
    "tp2": (Placement(tp=2), EVERY, ()),
    "tp4": (Placement(tp=4), tuple(served_models.MODELS), ("gpt_oss", "cohere-normed")),
    "tp2-ep2": (Placement(tp=2, ep=2), (*SOME[1:], "nemotron_h"), ()),
    "pp2": (
        Placement(pp=2),
        (*served_models.MODELS, *STAGED),
        (
            *("granitemoehybrid", "granitemoehybrid-dense", "granitemoehybrid-mixed", "idefics3", "smolvlm"),
            *("gemma4_text", "gemma4"),
        ),
    ),
    "tp2-data": (
        Placement(tp=2),
        (
            "qwen2_vl",
            "qwen2_5_vl-tied",
            "qwen3_vl",
            "qwen3_vl_moe",
            "glm4v",
            "glm4v_moe",
            "exaone4_5",
            "kimi_k25",
        ),
        (),
    ),
    "tp2-fastckpt": (Placement(tp=2), (*served_models.MODELS, *STAGED), ()),
    "pp2-fastckpt": (Placement(pp=2), ("phi", "qwen2_5_vl", *STAGED), ()),
}
"""Grid -> the placement, the models, and those vLLM itself refuses there."""


@pytest.mark.parametrize("grid", GRIDS)
def test_shards_are_bit_for_bit_what_vllm_loads(grid, tmp_path):
    """What vLLM's own load_weights leaves on every rank, before any kernel reorders it."""
    placement, names, refused = GRIDS[grid]
    models, truth = tmp_path / "models", tmp_path / "truth"
    for name in names:
        served_models.write(name, str(models / name), counted=True)
        if "fastckpt" in grid and "_vl" in name:  # of which vLLM makes buffers that are in no checkpoint
            (models / name / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    script(tmp_path / "log", "vllm_truth.py", str(models), str(truth), grid, *names)
    assert {name for name in names if (truth / name / grid / "error").exists()} == set(refused)
    for name in set(names) - set(refused):
        asked = replace(ENGINE, tower="whole" if "data" in grid else "cut")
        for rank, got in enumerate(fastckpt.reshard(models / name, placement=placement, layout=asked)):
            want = load_file(truth / name / grid / f"model-rank-{rank}-part-0.safetensors")
            missing = want.keys() - got.keys()
            assert not missing, f"{name} rank {rank}"
            for key, tensor in want.items():
                same = got[key].dtype is tensor.dtype and got[key].shape == tensor.shape
                same = same and torch.equal(bytes_of(got[key]), bytes_of(tensor))
                assert same, f"{name} rank {rank}: {key}"


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, which two float8 tensors can be compared by."""
    return tensor.contiguous().flatten().view(torch.uint8)
