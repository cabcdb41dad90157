"""`consolidate` against DeepSpeed's own converter, and against the gathered truth where that one fails."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import fastckpt
import pytest
import torch
from real.checkpoints import ALL, MADE, NIGHTLY_MADE
from real.truth import Tensors, Truth, read_truth, same_bits
from safetensors.torch import load_file

Find = Callable[[str], Path]

WEIGHTS = ("*.bin", "*.safetensors", "*.index.json")
ONE, SEVERAL = "one file", "several files"


def shard_size(name: str, files: str) -> str:
    """A limit that makes one file of a model, or a few."""
    small = "1KB" if "nofrozen" in name else "3KB"
    return "5GB" if files == ONE else small if "mixed" in name else "30KB"


def names(directory: Path) -> list[str]:
    return sorted(p.name for pattern in WEIGHTS for p in directory.glob(pattern))


def load(directory: Path) -> Tensors:
    """Every tensor of a converted model, in the order of its files."""
    out: Tensors = {}
    for name in names(directory):
        if name.endswith(".safetensors"):
            out |= load_file(directory / name)
        elif name.endswith(".bin"):
            out |= torch.load(directory / name, weights_only=True)
    return out


def deepspeed_is_right(truth: Truth, safe: bool) -> bool:
    """It cannot read stage 0, drops stage 1's frozen weights, and refuses tied weights in safetensors."""
    drops = truth.stage == 1 and truth.frozen and not truth.exclude_frozen
    return not (truth.stage == 0 or drops or (safe and truth.shared))


def convert(truth: Truth, out: Path, safe: bool, size: str, exclude_frozen: bool = False) -> Path:
    """What DeepSpeed's converter makes of it."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert_zero_checkpoint_to_fp32_state_dict(
            str(truth.path), str(out), max_shard_size=size, safe_serialization=safe,
            exclude_frozen_parameters=exclude_frozen,
        )  # fmt: skip
    return out


def assert_same_model(ours: Path, theirs: Path) -> None:
    """File names, index, and each file's tensors: names, order, dtypes, bytes, shared storages."""
    assert names(ours) == names(theirs)
    for name in names(theirs):
        if name.endswith(".json"):
            assert (ours / name).read_text() == (theirs / name).read_text()
        elif name.endswith(".safetensors"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
        else:
            got = torch.load(ours / name, weights_only=True)
            wanted = torch.load(theirs / name, weights_only=True)
            assert list(got) == list(wanted)
            assert [k for k in wanted if not same_bits(got[k], wanted[k])] == []
            assert shared(got) == shared(wanted)


def shared(tensors: Tensors) -> set[frozenset[str]]:
    """Which names stand on one place in memory, that is in the file."""
    by_place: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            by_place.setdefault(tensor.data_ptr(), set()).add(name)
    return {frozenset(group) for group in by_place.values() if len(group) > 1}


@pytest.mark.parametrize("files", [ONE, SEVERAL])
@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize("name", [*MADE, *NIGHTLY_MADE])
def test_equals_deepspeeds_converter(
    name: str, safe: bool, files: str, checkpoint: Find, tmp_path: Path
) -> None:
    truth, size = read_truth(checkpoint(name)), shard_size(name, files)
    if not deepspeed_is_right(truth, safe):
        pytest.skip("DeepSpeed's converter fails here; test_equals_the_gathered_truth has this case")
    theirs = convert(truth, tmp_path / "theirs", safe, size)
    fastckpt.consolidate(
        truth.path, tmp_path / "ours", safe_serialization=safe, max_shard_size=size, durable=False
    )
    assert_same_model(tmp_path / "ours", theirs)


@pytest.mark.parametrize("name", [n for n in MADE if "mixed" in n])
def test_excluding_frozen_parameters_equals_deepspeeds(name: str, checkpoint: Find, tmp_path: Path) -> None:
    truth = read_truth(checkpoint(name))
    theirs = convert(truth, tmp_path / "theirs", False, "5GB", exclude_frozen=True)
    fastckpt.consolidate(truth.path, tmp_path / "ours", exclude_frozen=True, durable=False)
    assert truth.frozen.isdisjoint(load(theirs))
    assert_same_model(tmp_path / "ours", theirs)


@pytest.mark.parametrize("files", [ONE, SEVERAL])
@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_gathered_truth(
    name: str, safe: bool, files: str, checkpoint: Find, tmp_path: Path
) -> None:
    truth, size = read_truth(checkpoint(name)), shard_size(name, files)
    fastckpt.consolidate(truth.path, tmp_path, safe_serialization=safe, max_shard_size=size, durable=False)
    got = load(tmp_path)
    tied = {alias: got.pop(alias) for alias in truth.shared if alias in got}
    assert set(tied) == (set() if safe else set(truth.shared))
    assert [a for a, t in tied.items() if not same_bits(t, got[truth.shared[a]])] == []
    assert truth.mismatches(got) == []
    index = list(tmp_path.glob("*.index.json"))
    assert len(index) == (0 if files == ONE else 1)
    for path in index:
        mapped = json.loads(path.read_text())["weight_map"]
        assert set(mapped) == set(got) | set(tied)
        assert set(mapped.values()) == set(names(tmp_path)) - {path.name}


@pytest.mark.parametrize("name", ALL)
def test_in_memory_equals_the_gathered_truth(name: str, checkpoint: Find) -> None:
    truth = read_truth(checkpoint(name))
    got = fastckpt.consolidate(truth.path)
    assert isinstance(got, dict)
    got = dict(got)
    for alias, holder in truth.shared.items():
        assert got.pop(alias).data_ptr() == got[holder].data_ptr()
    assert truth.mismatches(got) == []
