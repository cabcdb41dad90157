"""What `quantization_config` says of a model, against the modules that transformers builds of its config."""

from __future__ import annotations

import json
import re

import fastckpt
import pytest
import torch
from fastckpt.errors import LayoutError
from fastckpt.quantisation.schemes import SCHEMES, Quant

transformers = pytest.importorskip("transformers")
from layouts.families import ENCODERS, FAMILIES, WRAPPERS, made, model_of  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer  # noqa: E402
from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: E402

GPT2_NAMES = ("gpt_bigcode", "gpt_bigcode-heads")
"""Models whose matrices all have the names of GPT-2's, which are stored the other way round."""


@pytest.mark.parametrize("name", GPT2_NAMES)
def test_names_that_do_not_say_which_way_a_matrix_lies_are_refused(name, tmp_path):
    config, tensors, _ = made(name)
    with pytest.raises(LayoutError, match="no tensor is a matrix known by name"):
        fastckpt.reshard(tensors, config=config, quant="int8", out=tmp_path / "out", durable=False)


STACKED = dict.fromkeys(("gpt_oss", "llama4_text", "mistral4", "gemma4_text-mixed"), ("*.experts.*",))
GRANITE = ("granitemoe", "granitemoeshared", "granitemoehybrid")
STACKED |= dict.fromkeys(GRANITE, ("*.block_sparse_moe.*put_linear.weight",))
"""Models whose hub has stacks of experts -> patterns of them."""


TRAINED = {"hy_v3": (".shared_mlp.", ".shared_experts."), "laguna": (".shared_expert.", ".shared_experts.")}
TRAINED["kimi_linear"] = (".block_sparse_moe.", ".mlp.")
"""What the hub calls a module, and transformers, where that is another name (and its files are renamed)."""


def test_a_model_whose_modules_have_other_names_is_refused(tmp_path):
    config, tensors, _ = made("deepseek_v4")
    for served in ("hf", "vllm"):
        with pytest.raises(LayoutError, match="DeepSeek-V4's modules go by other names in transformers"):
            fastckpt.reshard(
                tensors, config=config, quant="int8", layout=served, out=tmp_path / "out", durable=False
            )
        assert not (tmp_path / "out").exists()


def modules(name):
    """A family's model without its weights, and the names of its linear modules."""
    with torch.device("meta"):
        model = model_of(name)
    return model, {n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize("name", [n for n in (*FAMILIES, *ENCODERS) if n not in (*GPT2_NAMES, "deepseek_v4")])
def test_every_linear_is_quantised_or_said_to_be_dense(name, tmp_path):
    """compressed-tensors takes every other one for quantised, and finds no scales of it: a tied output layer
    lies in no file, and a module may be called otherwise than its tensors."""
    _, linear = modules(name)
    written, tensors, _ = made(name)
    out = tmp_path / "out"
    quant = Quant(SCHEMES["int8"], exclude=STACKED.get(name, ()))  # stacks stay dense
    fastckpt.reshard(tensors, config=written, quant=quant, out=out, durable=False)
    names = load_file(out / "model.safetensors")
    quantised = {n.removesuffix(".weight_scale") for n in names if n.endswith(".weight_scale")}
    ignored = set(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    assert quantised and not ignored & quantised
    trained = {n.replace(*TRAINED.get(name.partition("-")[0], ("backbone.", "model."))) for n in quantised}
    assert linear <= ignored | trained and not ignored & trained


UNEVEN = ("llama4-images", "mistral3-mistral4", "kimi_k25")
UNTAKEN = ("lfm2_vl-moe",)  # transformers' own quantiser to fp8 fails at LFM2-MoE's experts
SEEING = [
    n for n in WRAPPERS if n not in (*UNEVEN, *UNTAKEN)
]  # of sizes that groups of 32, or 8 rows, divide
LEFT = (
    ".in_proj_qkv", ".in_proj_z", ".in_proj_b", ".in_proj_a", ".shared_expert_gate", ".router.proj",
    ".per_layer_input_gate", ".per_layer_projection", ".per_layer_model_projection", ".conv.in_proj",
)  # fmt: skip
"""Of a decoder stay dense, unless it is asked for: what linear attention and convolutions read, gates, inputs
of layers."""


@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "awq-group32", "gptq-group32"])
@pytest.mark.parametrize("name", SEEING)
def test_loaders_take_the_decoder_alone_for_quantised(name, scheme, tmp_path):
    """By their own rules, under the names that transformers' modules have, which are not the files'."""
    model, linear = modules(name)
    written, tensors, _ = made(name)
    out = tmp_path / "out"
    mixed = any(".experts." in n for n in tensors)  # which are no modules of their own in transformers
    quant = Quant(SCHEMES[scheme], exclude=("*.experts.*",) if mixed else ())
    fastckpt.reshard(tensors, config=written, quant=quant, out=out, durable=False)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    match said.pop("quant_method"):
        case "compressed-tensors":
            named = [i.removeprefix("re:") if i.startswith("re:") else re.escape(i) for i in said["ignore"]]
            taken = {n for n in linear if not any(re.fullmatch(i, n) for i in named)}
        case "fp8":
            asked = transformers.FineGrainedFP8Config(**said)
            with torch.device("meta"):
                FineGrainedFP8HfQuantizer(asked)._process_model_before_weight_loading(model)
            taken = {n for n, module in model.named_modules() if type(module).__name__ == "FP8Linear"}
        case "awq":
            left = said["modules_to_not_convert"]
            skip = HfQuantizer.get_modules_to_not_convert(model, left, add_default_skips=True)
            taken = {n for n in linear if should_convert_module(n, skip)}
        case "gptq":
            named = [i.removeprefix("-:") for i in said["dynamic"]]
            taken = {n for n in linear if n != "lm_head" and not any(re.match(i, n) for i in named)}
    decoder = "model.text_model." if name in ("idefics3", "smolvlm") else ".language_model."
    assert taken == {n for n in linear if decoder in n and not n.endswith(LEFT)}
