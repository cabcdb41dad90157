"""Tensors in memory: views lie over their own bytes."""

from __future__ import annotations

import fastckpt
import numpy as np
import pytest
import reading
import torch
from fastckpt import sources
from fastckpt.errors import SourceError
from reading import holds

BASE = torch.arange(60.0)
TENSORS = {
    "a": BASE[7:37].view(5, 6), "t": BASE[7:37].view(5, 6).t(), "step": BASE[::3],
    "wide": torch.ones(3, 1).expand(3, 4),
    "scalar": torch.tensor(3), "empty": torch.zeros(2, 0), "bf": torch.arange(5).bfloat16(),
    "p": torch.nn.Parameter(torch.ones(3)), "f8": torch.ones(3).to(torch.float8_e5m2),
}  # fmt: skip


def test_torch_tensors():
    ckpt = sources.open(TENSORS)
    holds(ckpt, TENSORS)
    assert ckpt.format == "memory"


def test_nothing_is_copied():
    x = torch.zeros(4)
    ckpt = sources.open({"x": x})
    x[2] = 5
    assert reading.read(ckpt["x"]).view(np.float32).tolist() == [0, 0, 5, 0]


def test_numpy_arrays():
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    arrays = {"a": base, "part": base[1:3, ::2], "t": base.T, "scalar": np.array(3.5), "e": np.zeros((0, 2))}
    ckpt = sources.open(arrays)
    assert list(ckpt) == list(arrays)
    for name, want in arrays.items():
        got = reading.read(ckpt[name])
        assert got.shape == want.shape
        assert (got == np.ascontiguousarray(want).view(got.dtype).reshape(want.shape)).all(), name


def test_tied_tensors_are_one():
    x = torch.ones(3)
    ckpt = sources.open({"a": x, "b": x, "c": x.clone(), "d": x[:2]})
    assert dict(ckpt.aliases) == {"b": "a"}
    assert len(ckpt.extents) == 2


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3, device="meta"), torch.eye(2).to_sparse(), torch.ones(3, dtype=torch.complex64).conj(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), [1.0],
        torch.nested.nested_tensor([torch.ones(3)]), 3, None, torch._efficientzerotensor((3,)),
        torch.nn.UninitializedParameter(), torch._to_functional_tensor(torch.ones(3)),
        np.ma.masked_less(np.ones(3), 1),
        np.ones(3)[::-1], np.ones(3, ">f4"), np.array(["a"]), np.zeros(3, [("a", "f4"), ("b", "f8")])["b"],
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_what_has_no_plain_memory(value):
    with pytest.raises(SourceError, match="x: "):
        sources.open({"x": value})


def swapped(x):
    x.data = torch.ones_like(x)


def freed(x):
    x.untyped_storage().resize_(0)


@pytest.mark.parametrize("change", [swapped, freed])
@pytest.mark.parametrize("into_files", [False, True])
def test_memory_that_was_given_up_is_not_read(tmp_path, change, into_files):
    """As FSDP frees and swaps what lies behind its parameters."""
    x = torch.zeros(64, 64)
    ckpt = sources.open({"x": x})
    change(x)
    with pytest.raises(SourceError, match="open the checkpoint again"):
        fastckpt.reshard(ckpt, layout="same", out=str(tmp_path / "out") if into_files else None)
    assert not any(tmp_path.iterdir())


def test_zero_options_are_refused():
    with pytest.raises(SourceError, match="no ZeRO checkpoint"):
        sources.open(TENSORS, tag="x")
