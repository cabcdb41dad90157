"""The table of element types against torch and safetensors."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from fastckpt import dtypes
from fastckpt.dtypes import DTYPES, DType, castable, dtype, exact
from fastckpt.errors import ViewError

FLOATS = [d for d in DTYPES if d.kind == "float"]


def of_torch(d: DType) -> torch.dtype:
    found = getattr(torch, d.name)
    assert isinstance(found, torch.dtype)
    return found


def test_a_code_is_the_place_in_the_table() -> None:
    assert [d.code for d in DTYPES] == list(range(len(DTYPES)))


@pytest.mark.parametrize("d", DTYPES, ids=str)
def test_name_size_and_kind_are_torchs(d: DType) -> None:
    theirs = of_torch(d)
    assert d.itemsize == theirs.itemsize
    assert (d.kind == "complex") == theirs.is_complex
    if d.kind == "float":
        assert theirs.is_floating_point
        assert torch.finfo(theirs).eps == 2.0 ** (1 - d.digits)
        assert d.digits + d.exponent == 8 * d.itemsize


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("d", DTYPES, ids=str)
def test_storage_names_are_torchs(d: DType) -> None:
    if d.storage:
        assert getattr(torch, d.storage).dtype == of_torch(d)
    else:
        mapped = torch.storage._dtype_to_storage_type_map()
        assert of_torch(d) not in mapped


def test_safetensors_names_are_safetensors() -> None:
    ours = {d.safetensors: of_torch(d) for d in DTYPES if d.safetensors}
    theirs = dict(safetensors.torch._TYPES)
    # in the format; the package's torch part writes them and does not read them
    theirs |= {"F8_E8M0": torch.float8_e8m0fnu, "F4": torch.float4_e2m1fn_x2}
    assert {k: v for k, v in theirs.items() if k in ours} == ours
    assert {v for k, v in theirs.items() if k not in ours}.isdisjoint(ours.values())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("bfloat16", dtypes.bfloat16), ("torch.float32", dtypes.float32), ("bf16", dtypes.bfloat16),
        ("FP16", dtypes.float16), ("half", dtypes.float16), ("bool", dtypes.bool_),
        (dtypes.int8, dtypes.int8),
    ],
)  # fmt: skip
def test_a_type_is_found_by_name(name: str | DType, wanted: DType) -> None:
    assert dtype(name) is wanted


def test_an_unknown_name_says_what_is_known() -> None:
    with pytest.raises(ViewError, match=r"unknown dtype 'float13'; known: float32, bfloat16"):
        dtype("float13")


def every_value(d: DType) -> torch.Tensor:
    """Every finite value of a type of one or two bytes; for wider ones, values near their limits."""
    if d.itemsize <= 2:
        bits = torch.arange(1 << 8 * d.itemsize, dtype=torch.int32)
        raw = bits.to(torch.uint8) if d.itemsize == 1 else bits.to(torch.uint16)
        values = raw.view(of_torch(d))
    else:
        info = torch.finfo(of_torch(d))
        values = torch.tensor([1 + info.eps, info.max, info.smallest_normal], dtype=of_torch(d))
    return values[values.double().isfinite()]


@pytest.mark.parametrize("dst", FLOATS, ids=str)
@pytest.mark.parametrize("src", FLOATS, ids=str)
def test_exact_means_that_no_value_is_rounded(src: DType, dst: DType) -> None:
    values = every_value(src)
    kept = torch.equal(values.to(of_torch(dst)).double(), values.double())
    assert exact(src, dst) == kept


def test_only_floats_convert() -> None:
    for src in DTYPES:
        for dst in DTYPES:
            assert castable(src, dst) == (src is dst or (src in FLOATS and dst in FLOATS))


def test_torchs_own_dtype_is_a_name() -> None:
    assert dtype(torch.bfloat16) is dtypes.bfloat16  # type: ignore[arg-type]
