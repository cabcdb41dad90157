"""A real vLLM loads what we quantised and generates: `make test-vllm`.

What it holds of our hub output after its own load_weights is, bit for bit, what layout `vllm` writes with the
names of its version; and both roads generate the same tokens.
"""

from __future__ import annotations

import json

import fastckpt
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
from engines import served_models
from engines.test_vllm_engine import ENGINE, bytes_of, generate, script
from fastckpt.layouts import layout
from safetensors.torch import load_file

DENSE = (
    "llama", "llama-biased", "llama-tied", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma",
    "gemma2", "gemma3_text", "hyperclovax",
)  # fmt: skip
FUSED = ("phi3", "glm", "glm4", "glm4v")
"""Their hubs store gate and up as one: one scale for both is not what vLLM keeps."""
MIXED = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "glm4v_moe", "afmoe", "cohere2_moe")
"""Mixtures of experts, one beside an image tower."""
STACKED = ("qwen3_vl_moe", "qwen3_vl_moe-wide")
"""Their hubs store experts in stacks: quantised they are written one by one, and cut from there."""
SPLIT = layout("hf", {"split_experts": "true"})
SEEING = (
    "qwen2_vl", "qwen2_5_vl-tied", "qwen3_vl", "gemma3", "mistral3", "llava", "llava_onevision", "internvl",
    "cohere2_vision",
)  # fmt: skip
"""Decoders beside an image tower, which stays dense."""
ALL = (*DENSE, *FUSED, *MIXED, "qwen3_vl_moe", *SEEING)
FOUR_BITS = dict.fromkeys(("int4-group32", "int4-group32-zero", "awq-group32"), ALL)
FOUR_BITS["gptq-group32"] = tuple(n for n in ALL if n not in ("glm4", "glm4v"))  # vLLM's loader fails
CASES = {
    "int8": (*DENSE, *FUSED, *SEEING),
    "fp8": (*DENSE, *SEEING),
    "fp8-channel": ALL,
    "fp8-block": (
        *("qwen3_vl-wide", "llava_onevision-wide", "qwen3_vl_moe-wide"),
        *("qwen3_5_moe_text-wide", "qwen3_5-wide", "qwen3_5_moe-wide"),
    ),
    **FOUR_BITS,
}
GENERATED = ("int8", "fp8-channel", *FOUR_BITS)


@pytest.mark.parametrize("scheme", CASES)
def test_shards_are_bit_for_bit_what_vllm_loads(scheme, tmp_path):
    models, truth = tmp_path / "models", tmp_path / "truth"
    for name in CASES[scheme]:
        served_models.write(name, str(tmp_path / "hub" / name))
        single = SPLIT if name in STACKED else "hf"
        fastckpt.reshard(tmp_path / "hub" / name, layout=single, quant=scheme, out=models / name)
    script(tmp_path / "log", "vllm_truth.py", str(models), str(truth), "tp2", *CASES[scheme])
    for name in CASES[scheme]:
        error = truth / name / "tp2" / "error"
        assert not error.exists(), error.read_text()
        if name in STACKED:
            made = fastckpt.reshard(models / name, 2, layout=ENGINE)
        else:
            made = fastckpt.reshard(tmp_path / "hub" / name, 2, layout=ENGINE, quant=scheme)
        for rank, got in enumerate(made):
            want = load_file(truth / name / "tp2" / f"model-rank-{rank}-part-0.safetensors")
            assert not want.keys() - got.keys(), f"{name} rank {rank}"
            for key, tensor in want.items():
                assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), f"{name}: {key}"
                assert torch.equal(bytes_of(got[key]), bytes_of(tensor)), f"{name}: {key}"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Scheme -> what vLLM made of the prompts by its own loading of our hub output, by its sharded_state
    loading of our shards, and by our load format on the hub output; all in one go, since starting it takes
    longest."""
    hub, asked = tmp_path_factory.mktemp("hub"), []
    served_models.write("llama", str(hub))
    for scheme in GENERATED:
        root = tmp_path_factory.mktemp(scheme)
        made, shards = root / "made", root / "shards"
        fastckpt.reshard(hub, quant=scheme, out=made)
        fastckpt.reshard(hub, 2, layout=ENGINE, quant=scheme, out=shards)
        assert fastckpt.verify(shards, engine="vllm").problems == ()
        asked += [{"model": str(made)}, {"model": str(shards), "load_format": "sharded_state"}]
        asked += [{"model": str(made), "load_format": "fastckpt"}]
    told = generate(tmp_path_factory.mktemp("log") / "log", asked)
    return {scheme: told[3 * i : 3 * i + 3] for i, scheme in enumerate(GENERATED)}


@pytest.mark.parametrize("scheme", GENERATED)
def test_it_generates(scheme, generated):
    own, *ours = generated[scheme]
    for made in generated[scheme]:
        print(f"{scheme}: {json.dumps(made)}")
        assert "error" not in made, made["error"]
    assert len({tuple(tokens) for tokens in own["tokens"]}) > 1
    assert ours == [own, own]
