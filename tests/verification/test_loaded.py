"""verify_tensors: right tensors are found right, and one changed bit, name, shape or dtype is found."""

from __future__ import annotations

from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt.errors import LayoutError
from fastckpt.verification.loaded import digests_of
from safetensors.torch import save_file

PLAN = {"*up": "colwise", "*down": "rowwise", "*": "replicate"}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "up": torch.randn(800, 512, generator=generator),
        "down": torch.randn(512, 800, generator=generator),
        "norm": torch.randn(7, generator=generator),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "count": torch.arange(5),
    }


def checked(state: object, *where: object, **options: object) -> tuple[str, ...]:
    report = fastckpt.verify_tensors(state, *where, **options)
    assert report.ok == (not report.problems)
    return report.problems


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_was_made_is_right_and_a_changed_bit_is_found(tmp_path: Path, dtype: str | None) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    options = {"layout": "hf", "tp_plan": PLAN}
    made = fastckpt.reshard(tmp_path, 2, rank=1, dtype=dtype, **options)
    assert checked(made, tmp_path, 2, 1, **options) == ()
    assert checked(made, weights(), 2, 1, **options) == ()
    other = checked(made, tmp_path, 2, 0, **options)
    assert set(other) == {f"{n}: its bytes differ from the checkpoint's" for n in ("up", "down")}
    made["down"].view(torch.uint8)[-1, -1] ^= 1
    assert checked(made, tmp_path, 2, 1, **options) == ("down: its bytes differ from the checkpoint's",)


def test_one_element_of_any_stride() -> None:
    base = torch.arange(9.0)
    held = {"w": base[4:5:3], "none": base[::2][:0]}
    assert checked(held, {"w": torch.tensor([4.0]), "none": base[:0]}) == ()


def test_against_a_record_no_weight_is_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fastckpt.reshard(weights(), 2, layout="hf", tp_plan=PLAN, out=out)
    made = fastckpt.reshard(weights(), 2, rank=1, layout="hf", tp_plan=PLAN)
    for file in out.glob("*/*.safetensors"):
        file.unlink()
    for file in out.glob("*.safetensors"):
        file.unlink()
    assert checked(made, out, rank=1) == ()
    assert len(checked(made, out, rank=0)) == 2
    with pytest.raises(LayoutError, match="which of the 2 ranks"):
        fastckpt.verify_tensors(made, out)
    with pytest.raises(LayoutError, match="which of the 2 ranks"):
        fastckpt.verify_tensors(made, weights(), 2, layout="hf", tp_plan=PLAN)
    with pytest.raises(LayoutError, match="no rank 7"):
        fastckpt.verify_tensors(made, out, rank=7)


def test_names_shapes_and_dtypes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fastckpt.reshard(weights(), layout="same", out=out)
    made = weights()
    made["norm"] = made["norm"].reshape(7, 1)
    made["count"] = made["count"].int()
    made["more"] = torch.zeros(2)
    made["scalar"] = torch.empty((), device="meta")
    del made["up"]
    assert set(checked(made, out)) == {
        "up: the checkpoint has it, these tensors do not",
        "more: the checkpoint has no such tensor",
        "norm: got float32[7, 1], the checkpoint has float32[7]",
        "count: got int32[5], the checkpoint has int64[5]",
        "scalar: it is on the meta device and holds nothing",
    }
    found = checked({n: t for n, t in weights().items() if n != "up"}, weights())
    assert found == ("up: the checkpoint has it, these tensors do not",)


def test_a_module_and_its_tied_names(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(40, 30), "b": torch.nn.Linear(40, 30, bias=False)})
    module["b"].weight = module["a"].weight
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    assert checked(module, tmp_path) == ()
    out = tmp_path / "out"
    fastckpt.reshard(tmp_path, layout="same", out=out)
    assert checked(module, out) == ()
    with torch.no_grad():
        module["a"].bias[3] += 1
    for where in (tmp_path, out):
        assert checked(module, where) == ("a.bias: its bytes differ from the checkpoint's",)
    module["b"].weight = torch.nn.Parameter(module["a"].weight.detach() + 1)
    assert "b.weight: its bytes differ from the checkpoint's" in checked(module, out)


def test_a_tensor_that_is_not_dense_is_read_as_it_is() -> None:
    turned = torch.randn(30, 20).t()
    assert digests_of({"a": turned}) == digests_of({"a": turned.contiguous()})
