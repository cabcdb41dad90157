"""AWQ's and GPTQ's outputs in GPTQModel, which transformers loads them with. Runs where that is installed."""

from __future__ import annotations

import fastckpt
import pytest
import torch
import transformers

pytestmark = pytest.mark.nightly
SIZES = dict(
    vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(("scheme", "kind", "backend"), [
    ("gptq-group", "GPTQConfig", "torch"), ("awq-group", "AwqConfig", "torch_awq"),
])  # fmt: skip
def test_its_weights_are_those_of_our_dequantised(tmp_path, scheme, kind, backend):
    """Multiplied by one, in float16."""
    pytest.importorskip("gptqmodel")
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, dtype="float16")).half()
    made.save_pretrained(tmp_path / "hub")
    fastckpt.reshard(tmp_path / "hub", out=tmp_path / "out", quant=scheme, durable=False)
    dense = fastckpt.reshard(tmp_path / "out", quant="none", dtype="float32", rank=0)
    chosen = getattr(transformers, kind)(bits=4, backend=backend)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float16, quantization_config=chosen
    )
    seen = 0
    for name, module in model.named_modules():
        if "gptqmodel" in type(module).__module__:
            held = module(torch.eye(module.in_features, dtype=torch.float16))  # [in, out]
            assert torch.equal(held.T, dense[f"{name}.weight"].half()), name
            seen += 1
    assert seen == 14
