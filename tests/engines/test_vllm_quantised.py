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
from safetensors.torch import load_file

DENSE = (
    "llama", "llama-biased", "llama-tied", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma",
    "gemma2", "gemma3_text",
)  # fmt: skip
FUSED = ("phi3", "glm", "glm4")
"""Their hubs store gate and up as one: one scale for both is not what vLLM keeps."""
MIXED = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe")
"""Mixtures: vLLM's CPU build has kernels for fp8 by output alone."""
CASES = {"int8": (*DENSE, *FUSED), "fp8": DENSE, "fp8-channel": (*DENSE, *FUSED, *MIXED)}


@pytest.mark.parametrize("scheme", CASES)
def test_shards_are_bit_for_bit_what_vllm_loads(scheme, tmp_path):
    models, truth = tmp_path / "models", tmp_path / "truth"
    for name in CASES[scheme]:
        served_models.write(name, str(tmp_path / "hub" / name))
        fastckpt.reshard(tmp_path / "hub" / name, quant=scheme, out=models / name)
    script(tmp_path / "log", "vllm_truth.py", str(models), str(truth), "tp2", *CASES[scheme])
    for name in CASES[scheme]:
        error = truth / name / "tp2" / "error"
        assert not error.exists(), error.read_text()
        made = fastckpt.reshard(tmp_path / "hub" / name, 2, layout=ENGINE, quant=scheme)
        for rank, got in enumerate(made):
            want = load_file(truth / name / "tp2" / f"model-rank-{rank}-part-0.safetensors")
            assert not want.keys() - got.keys(), f"{name} rank {rank}"
            for key, tensor in want.items():
                assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), f"{name}: {key}"
                assert torch.equal(bytes_of(got[key]), bytes_of(tensor)), f"{name}: {key}"


@pytest.mark.parametrize("scheme", ["int8", "fp8-channel"])
def test_it_generates(scheme, tmp_path):
    """Its own loading of our hub output, and its sharded_state loading of our shards: the same tokens."""
    hub, made, shards = tmp_path / "hub", tmp_path / "made", tmp_path / "shards"
    served_models.write("llama", str(hub))
    fastckpt.reshard(hub, quant=scheme, out=made)
    fastckpt.reshard(hub, 2, layout=ENGINE, quant=scheme, out=shards)
    said = json.loads((shards / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors"
    engines = [{"model": str(made)}, {"model": str(shards), "load_format": "sharded_state"}]
    own, ours = generate(tmp_path / "log", engines)
    assert len({tuple(tokens) for tokens in own["tokens"]}) > 1
    assert ours == own


@pytest.mark.parametrize("scheme", ["int4-group", "awq-group", "gptq-group"])
def test_four_bits_load(scheme, tmp_path):
    """Names, shapes and values of what vLLM holds of four bits; its scales have the model's dtype."""
    served_models.write("llama", str(tmp_path / "hub"))
    fastckpt.reshard(tmp_path / "hub", quant=scheme, out=tmp_path / "models" / "llama")
    models, truth = tmp_path / "models", tmp_path / "truth"
    script(tmp_path / "log", "vllm_truth.py", str(models), str(truth), "tp2", "llama")
    made = fastckpt.reshard(tmp_path / "hub", 2, layout="vllm", quant=scheme)
    for rank, got in enumerate(made):
        want = load_file(truth / "llama" / "tp2" / f"model-rank-{rank}-part-0.safetensors")
        left = {n for n in want.keys() - got.keys() if ".attn." not in n}
        assert not left and {n for n in got.keys() - want.keys() if not n.endswith(".g_idx")} == set()
        for key in (want.keys() & got.keys()) - {n for n in want if n.endswith("weight_shape")}:
            assert torch.equal(got[key].to(want[key].dtype), want[key]), key
