"""SGLang's loader class against a stub of its interface, and its sharded_state names as its source has."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import fastckpt
import pytest
import torch

pytest.importorskip("transformers")
from engines import served_models, sglang_stub
from fastckpt.engines.asked import Asked
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from safetensors.torch import load_file


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def hub(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / request.param
    served_models.write(request.param, str(folder), counted=True)
    return folder


@pytest.fixture
def loaded(hub, monkeypatch):
    """Loads a rank through the stub."""
    sglang_stub.install(monkeypatch)
    loader = importlib.import_module("fastckpt.engines.sglang").FastckptLoader
    sglang_stub.calls.clear()

    def load(tp=1, rank=0, extra=None, quantization=None, changed=None, **parallel):
        sizes = {"tp_size": tp, "attn_tp_size": tp, "tp_rank": rank, "pp_size": 1, "moe_ep_size": 1}
        vars(sglang_stub.parallel).update(sizes | parallel)
        config = json.loads((hub / "config.json").read_text()) | (changed or {})
        hf_config = SimpleNamespace(to_dict=lambda: config)
        model_config = sglang_stub.ModelConfig(str(hub), hf_config, quantization)
        made = loader(sglang_stub.LoadConfig(extra or {}))
        made.download_model(model_config)
        return made.load_model(model_config=model_config, device_config=SimpleNamespace(device="cpu"))

    return load


@pytest.mark.parametrize("given", [["tag"], {"tags": "x"}, {"tag": 3}, None])
def test_what_is_no_extra_config(given):
    with pytest.raises(LayoutError, match="model_loader_extra_config: "):
        Asked.of(given)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_parameter_of_the_module_is_filled(hub, loaded, tp):
    asked = layout("vllm", {"engine": "sglang==0.5"})
    for rank in range(tp):
        state = loaded(tp, rank).state_dict()
        want = fastckpt.reshard(hub, tp=tp, rank=rank, layout=asked)
        if hub.name == "llama-tied":
            assert torch.equal(state.pop("model.embed_tokens.weight"), state["lm_head.weight"])
        assert state.keys() == want.keys()
        assert all(torch.equal(state[name], want[name]) for name in want)
    assert sglang_stub.calls[:3] == ["built", "post-loaded", "postprocessed on cpu"]


def test_a_tied_pair_stands_once_in_files(hub, tmp_path):
    """SGLang's loader has a head that is the embedding, under the smaller of the two names."""
    fastckpt.reshard(hub, tp=2, layout=layout("vllm", {"engine": "sglang==0.5"}), out=tmp_path / "out")
    held = load_file(tmp_path / "out" / "model-rank-1-part-0.safetensors")
    assert "lm_head.weight" in held
    assert ("model.embed_tokens.weight" in held) == (hub.name != "llama-tied")
    assert fastckpt.verify(tmp_path / "out", engine="sglang").problems == ()
    assert not fastckpt.verify(tmp_path / "out", engine="vllm==0.32").ok  # no scales of the kv cache


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"quantization": "fp8"}, LayoutError, "quantization is not loaded this way, got 'fp8'"),
        ({"tp": 2, "pp_size": 2}, LayoutError, "pp_size > 1 is not loaded this way"),
        ({"tp": 2, "moe_ep_size": 2}, LayoutError, "moe_ep_size > 1 is not loaded"),
        ({"tp": 2, "attn_tp_size": 1}, LayoutError, "attention of another tp is not loaded"),
        ({"extra": {"tags": "x"}}, LayoutError, "'tags': 'x'; wanted text for checkpoint, tag, weights"),
        ({"extra": {"engine": "sglang==9.9"}}, LayoutError, "no engine 'sglang==9.9' is known"),
        ({"changed": {"intermediate_size": 128}}, RecipeError, "got shape"),
        ({"changed": {"num_hidden_layers": 1}}, RecipeError, "the model has no place for"),
    ],
)
def test_what_does_not_fit_is_an_error(loaded, asked, error, message):
    with pytest.raises(error, match=message):
        loaded(**asked)
