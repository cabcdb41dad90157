"""What `quantization_config` says of a model, against the modules that transformers builds of its config."""

from __future__ import annotations

import json

import fastckpt
import pytest
import torch
from fastckpt.errors import LayoutError
from fastckpt.quantisation.schemes import SCHEMES, Quant

transformers = pytest.importorskip("transformers")
from layouts.families import ENCODERS, FAMILIES, config_of, made  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

GPT2_NAMES = ("gpt_bigcode", "gpt_bigcode-heads")
"""Models whose matrices all have the names of GPT-2's, which are stored the other way round."""


@pytest.mark.parametrize("name", GPT2_NAMES)
def test_names_that_do_not_say_which_way_a_matrix_lies_are_refused(name, tmp_path):
    config, tensors, _ = made(name)
    with pytest.raises(LayoutError, match="no tensor is a matrix known by name"):
        fastckpt.reshard(tensors, config=config, quant="int8", out=tmp_path / "out", durable=False)


STACKED = dict.fromkeys(("gpt_oss", "llama4_text"), ("*.experts.*",))
GRANITE = ("granitemoe", "granitemoeshared", "granitemoehybrid")
STACKED |= dict.fromkeys(GRANITE, ("*.block_sparse_moe.*put_linear.weight",))
"""Models whose hub has stacks of experts -> patterns of them."""


@pytest.mark.parametrize("name", [n for n in (*FAMILIES, *ENCODERS) if n not in GPT2_NAMES])
def test_every_linear_is_quantised_or_said_to_be_dense(name, tmp_path):
    """compressed-tensors takes every other one for quantised, and finds no scales of it: a tied output layer
    lies in no file, and a module may be called otherwise than its tensors."""
    family = (FAMILIES | ENCODERS)[name]
    config = config_of(name)
    with torch.device("meta"):
        kind = (family.model or family.name).removesuffix("Text")
        model = getattr(transformers, kind + family.architecture)(config)
    linear = {n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    written, tensors, _ = made(name)
    out = tmp_path / "out"
    quant = Quant(SCHEMES["int8"], exclude=STACKED.get(name, ()))  # stacks stay dense
    fastckpt.reshard(tensors, config=written, quant=quant, out=out, durable=False)
    names = load_file(out / "model.safetensors")
    quantised = {n.removesuffix(".weight_scale") for n in names if n.endswith(".weight_scale")}
    ignored = set(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    assert quantised and not ignored & quantised
    trained = {n.replace("backbone.", "model.") for n in quantised}
    assert linear <= ignored | trained and not ignored & trained
