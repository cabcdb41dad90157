"""The table of element types against torch and safetensors."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from fastckpt import dtypes
from fastckpt.dtypes import DTYPES, DType, castable, dtype, exact
from fastckpt.errors import SourceError, ViewError
from torch_types import KNOWN, of_torch

FLOATS = [d for d in DTYPES if d.kind == "float"]


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
    ours = {d.safetensors: of_torch(d) for d in KNOWN if d.safetensors}
    theirs = dict(safetensors.torch._TYPES)
    # in the format; the package's torch part writes them and does not read them
    late = {"F8_E8M0": dtypes.float8_e8m0fnu, "F4": dtypes.float4_e2m1fn_x2}
    theirs |= {n: of_torch(d) for n, d in late.items() if d in KNOWN}
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
        top = 1 << 8 * d.itemsize
        bits = torch.arange(-top // 2, top // 2, dtype=torch.int8 if d.itemsize == 1 else torch.int16)
        return bits[bits.view(of_torch(d)).double().isfinite()].view(of_torch(d))
    info = torch.finfo(of_torch(d))
    return torch.tensor([1 + info.eps, info.max, info.smallest_normal], dtype=of_torch(d))


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


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, None), ({"dtype": None}, None), ({"dtype": None, "torch_dtype": "float16"}, dtypes.float16),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, dtypes.bfloat16),
        ({"torch_dtype": "torch.float32"}, dtypes.float32),
    ],
)  # fmt: skip
def test_the_dtype_of_a_config(config: dict[str, object], wanted: DType | None) -> None:
    assert dtypes.of_config(config) is wanted


@pytest.mark.parametrize("named", ["float13", 16, ["bfloat16"]])
def test_a_config_of_no_known_dtype(named: object) -> None:
    with pytest.raises(SourceError, match=r"config\.json: torch_dtype: unknown dtype"):
        dtypes.of_config({"torch_dtype": named})


def test_torchs_own_dtype_is_a_name() -> None:
    assert dtype(torch.bfloat16) is dtypes.bfloat16  # type: ignore[arg-type]


def test_packed_values_need_an_axis_of_whole_elements() -> None:
    packed = dtypes.BY_NAME["float4_e2m1fn_x2"]
    assert dtypes.counted(packed, (3, 4)) == (3, 8) and dtypes.in_elements(packed, (3, 8)) == (3, 4)
    with pytest.raises(ViewError, match="2 values an element, and no axis to count them on"):
        dtypes.counted(packed, ())
    for shape in ((), (8, 3)):
        with pytest.raises(ViewError, match="does not hold whole elements of 2 values"):
            dtypes.in_elements(packed, shape)
