"""Qwen2.5-VL as DeepSpeed leaves it, to a directory that transformers loads and to vLLM's shards."""

from __future__ import annotations

import json

import fastckpt
import pytest
import torch
from fastckpt.errors import LayoutError
from fastckpt.quantisation.schemes import SCHEMES, Quant
from layouts import families
from reading import equal
from zero_writer import write_zero

transformers = families.transformers
BESIDE = ("preprocessor_config.json", "chat_template.json", "tokenizer_config.json", "processor_config.json")


@pytest.fixture
def trained(tmp_path):
    """(the model, its ZeRO-3 directory, with what a processor needs beside it)."""
    sizes = families.WRAPPERS["qwen2_5_vl"].sizes | {"image_token_id": 200, "vision_start_token_id": 201}
    text = sizes["text_config"] | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    }
    config = transformers.Qwen2_5_VLConfig(**sizes | {"text_config": text, "tie_word_embeddings": False})
    torch.manual_seed(7)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    path = tmp_path / "checkpoint"
    write_zero(path, dict(model.named_parameters()), stage=3, world=3)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(path)
    for name in BESIDE:
        (path / name).write_text(json.dumps({"file": name}))
    return model, path


def logits(model):
    """Of a picture of 4 x 4 patches between words."""
    ids = torch.tensor([[5, 201, 200, 200, 200, 200, 7, 9]])
    torch.manual_seed(3)
    with torch.no_grad():
        return model(
            input_ids=ids,
            mm_token_type_ids=(ids == 200).int(),
            pixel_values=torch.randn(16, 3 * 2 * 4 * 4),
            image_grid_thw=torch.tensor([[1, 4, 4]]),
        ).logits


def test_transformers_sees_the_same(trained, tmp_path):
    model, path = trained
    fastckpt.reshard(path, layout="hf", out=tmp_path / "hf", durable=False)
    kind = type(model)
    again, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again.eval()), logits(model))
    assert not torch.equal(logits(model), logits(kind(model.config).eval()))
    for name in BESIDE:
        assert (tmp_path / "hf" / name).read_text() == (path / name).read_text()


def test_load_into_and_consolidate(trained, tmp_path):
    model, path = trained
    again = fastckpt.load_into(type(model)(model.config), path).eval()
    assert torch.equal(logits(again), logits(model))
    state = fastckpt.consolidate(path)
    assert all(torch.equal(state[n], x) for n, x in model.state_dict().items())


def test_vllms_shards_hold_the_same_numbers(trained):
    model, path = trained
    state, tp = model.state_dict(), 2
    shards = fastckpt.reshard(path, tp, layout="vllm")
    at = "model.visual.blocks.1"
    for rank, got in enumerate(shards):

        def rows(name, rank=rank):
            return state[name].chunk(tp)[rank]

        qkv = [x.chunk(tp)[rank] for x in state[f"{at}.attn.qkv.weight"].chunk(3)]
        assert torch.equal(got["visual.blocks.1.attn.qkv.weight"], torch.cat(qkv))
        both = [rows(f"{at}.mlp.{n}_proj.bias") for n in ("gate", "up")]
        assert torch.equal(got["visual.blocks.1.mlp.gate_up_proj.bias"], torch.cat(both))
        down = state["model.visual.merger.mlp.2.weight"].chunk(tp, 1)[rank]
        assert torch.equal(got["visual.merger.mlp.2.weight"], down)
        text = "layers.0.self_attn"
        q, k, v = (rows(f"model.language_model.{text}.{n}_proj.weight") for n in "qkv")
        assert torch.equal(got[f"language_model.model.{text}.qkv_proj.weight"], torch.cat([q, k, v]))


def test_a_smaller_vocabulary_is_told_where_the_config_has_it(trained, tmp_path):
    _, path = trained
    fastckpt.reshard(path, layout="hf", vocab_size=204, out=tmp_path / "less", durable=False)
    config = json.loads((tmp_path / "less" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 204
    assert "vocab_size" not in config


def test_padded_heads_are_told_there_too_and_taken_back(trained, tmp_path):
    _, path = trained
    padded = fastckpt.layouts.layout("hf", {"pad": "true"})
    fastckpt.reshard(path, 3, layout=padded, vocab_size=207, out=tmp_path / "out", durable=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_attention_heads"] == 12
    opened = fastckpt.open(tmp_path / "out")
    assert opened["model.language_model.layers.0.self_attn.q_proj.weight"].shape == (64, 64)
    assert opened.config["text_config"]["num_attention_heads"] == 8


def decoder_of(model, path):
    """(the tensors of a model's decoder by the names of a Qwen2, their config; those of its tower)."""
    state, config = model.state_dict(), json.loads((path / "config.json").read_text())
    text = {n.replace(".language_model", ""): x for n, x in state.items() if ".visual." not in n}
    tower = {n.removeprefix("model."): x for n, x in state.items() if ".visual." in n}
    return text, config["text_config"] | {"model_type": "qwen2", "tie_word_embeddings": False}, tower


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-block", "int4-group32-zero", "awq-group32"])
def test_the_decoder_is_quantised_as_one_of_its_own_and_the_tower_left(trained, tmp_path, scheme):
    model, path = trained
    text, config, tower = decoder_of(model, path)
    out, alone = tmp_path / "out", tmp_path / "alone"
    fastckpt.reshard(path, quant=scheme, out=out, durable=False)
    fastckpt.reshard(text, config=config, quant=scheme, out=alone, durable=False)
    assert fastckpt.verify(out).problems == ()
    for more in ({"layout": "same"}, {}, {"quant": "none", "dtype": "float32"}):
        equal(fastckpt.reshard(out, **more)[0], fastckpt.reshard(alone, **more)[0] | tower)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4-group32", "awq-group32", "gptq-group32"])
def test_so_it_is_in_vllms_shards(trained, tmp_path, scheme):
    """From the training checkpoint, and from the quantised hub's own; its tower from neither."""
    model, path = trained
    text, config, _ = decoder_of(model, path)
    wide = {n: torch.cat([x, x], int("down" in n)) if ".mlp." in n else x for n, x in text.items()}
    layout = fastckpt.layouts.layout("vllm", {"engine": "vllm==0.32"})
    state = model.state_dict() | {
        n.replace("model.layers", "model.language_model.layers"): x for n, x in wide.items() if ".mlp." in n
    }
    whole = json.loads((path / "config.json").read_text())
    whole["text_config"]["intermediate_size"] = config["intermediate_size"] = 192
    fastckpt.reshard(state, config=whole, quant=scheme, out=tmp_path / "hub", durable=False)
    alone = fastckpt.reshard(wide, 2, config=config, layout=layout, quant=scheme)
    dense = fastckpt.reshard(state, 2, config=whole, layout=layout)
    for source, more in ((state, {"config": whole, "quant": scheme}), (tmp_path / "hub", {})):
        for rank, got in enumerate(fastckpt.reshard(source, 2, layout=layout, **more)):
            tower = {n: x for n, x in dense[rank].items() if n.startswith("visual.")}
            equal(got, {f"language_model.{n}": x for n, x in alone[rank].items()} | tower)


def test_a_tower_is_quantised_by_no_pattern(trained, tmp_path):
    _, path = trained
    for layout in ("hf", "vllm"):
        asked = Quant(SCHEMES["int8"], include=("*visual.blocks.0.attn.proj.weight",))
        with pytest.raises(fastckpt.LayoutError, match="is beside the decoder, where all is dense"):
            fastckpt.reshard(path, layout=layout, quant=asked, out=tmp_path / layout, durable=False)


def test_a_decoder_that_says_how_it_is_quantised(tmp_path):
    """Its config loses the word as a whole model's does; vLLM finds it in either place."""
    torch.manual_seed(5)
    config, hub, _ = families.made("qwen3_vl")
    random = {n: torch.randn(x.shape) for n, x in hub.items()}
    fastckpt.reshard(random, config=config, quant="int8", out=tmp_path / "in")
    told = json.loads((tmp_path / "in/config.json").read_text())
    (state,) = fastckpt.reshard(tmp_path / "in")
    text = {**told["text_config"], "quantization_config": told["quantization_config"]}
    within = {k: v for k, v in told.items() if k != "quantization_config"} | {"text_config": text}
    for layout in (fastckpt.Hf(), fastckpt.Vllm(), fastckpt.Vllm(engine="vllm==0.32")):
        one, other = (fastckpt.reshard(state, 2, config=c, layout=layout, rank=0) for c in (told, within))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n], other[n]) for n in one)
    with pytest.raises(LayoutError, match="the config says that the source is quantised already"):
        fastckpt.reshard(state, config=within, quant="int8")
    fastckpt.reshard(state, config=within, quant="none", dtype="float32", out=tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
