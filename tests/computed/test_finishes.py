"""Finishes: any cut of what is computed is the same cut of the whole, bit for bit; and what is refused."""

from __future__ import annotations

import pytest
import torch
from fastckpt import dtypes
from fastckpt.computed import finishes
from fastckpt.errors import SourceError, ViewError
from fastckpt.views import cat, zeros
from reading import bits, elements, memory

ROWS, COLUMNS = 6, 8
G = torch.Generator().manual_seed(7)
X = torch.randn(ROWS, COLUMNS, generator=G) + 4
FP8 = torch.randint(0, 120, (ROWS, COLUMNS), dtype=torch.uint8, generator=G).view(torch.float8_e4m3fn)
TENSORS = {"x": X, "half": X.bfloat16(), "same": X.clone(), "fp8": FP8, "s": torch.tensor(0.3)}
TENSORS |= {"t": torch.tensor([0.7]), "none": torch.tensor(0.0)}


def view_of(name):
    return memory(TENSORS, 3)[name]


def both():
    """(name, view, the whole tensor it must be)."""
    ckpt = memory(TENSORS, 3)
    x, half = ckpt["x"], ckpt["half"]
    yield "plus_one", finishes.plus_one(half), (X.bfloat16().float() + 1).bfloat16()
    yield "reciprocal", finishes.reciprocal("x", x), 1 / X
    yield "multiple", finishes.multiple("x", half, 1 / 3), X.bfloat16().float() * torch.tensor(1 / 3)
    yield "agreed", finishes.agreed("x", [x, ckpt["same"]]), X
    again = finishes.requantised("fp8", ckpt["fp8"], ckpt["s"], [ckpt["s"], ckpt["t"]])
    yield "requantised", again, (FP8.float() * 0.3 / torch.tensor(0.7)).to(torch.float8_e4m3fn)


CASES = [name for name, _, _ in both()]


@pytest.mark.parametrize("name", CASES)
def test_cuts_of_what_is_computed(name):
    view, whole = next((v, w) for n, v, w in both() if n == name)
    assert (elements(view) == bits(whole)).all()
    assert (elements(view.T) == bits(whole.t())).all()
    part = view.narrow(0, 1, 4).part(1, 1, 2)
    assert (elements(part) == bits(whole[1:5, 4:])).all()
    turned = cat([part.T, view.narrow(0, 0, 4).narrow(1, 0, 2).T])
    assert (elements(turned) == bits(torch.cat([whole[1:5, 4:].t(), whole[:4, :2].t()]))).all()
    blocks = view.split(0, 2).narrow(1, 1, 1).merge(0)
    assert (elements(blocks) == bits(whole[1::2])).all()


def test_largest():
    x = view_of("half")
    assert (elements(finishes.largest("x", x)) == bits(X.bfloat16().float().max(1).values)).all()
    inverse = finishes.largest("x", x, inverse=True).narrow(0, 2, 3)
    assert (elements(inverse) == bits(1 / X.bfloat16().float().max(1).values[2:5])).all()


def test_a_multiple_of_one_is_the_view_itself():
    x = view_of("x")
    assert finishes.multiple("x", x, 1.0) is x


def test_what_differs_is_refused_where_it_is_read():
    ckpt = memory(TENSORS | {"same": torch.cat([X[:3], -X[3:]])})
    view = finishes.agreed("x.scale", [ckpt["x"], ckpt["same"]])
    assert (elements(view.narrow(0, 0, 3)) == bits(X[:3])).all()
    with pytest.raises(SourceError, match=r"x\.scale: differs among those that read one input"):
        elements(view)


def test_bad_values():
    ckpt = memory(TENSORS)
    with pytest.raises(SourceError, match="no scale: 0 has no reciprocal"):
        elements(finishes.reciprocal("no scale", ckpt["none"]))
    with pytest.raises(SourceError, match="0 has no reciprocal"):
        elements(finishes.reciprocal("some", memory({"some": torch.tensor([2.0, 0.0])})["some"]))
    with pytest.raises(SourceError, match="0 has no reciprocal"):
        elements(finishes.largest("x", ckpt["none"].reshape((1, 1)), inverse=True))
    for scale in (0.0, -1.0, float("nan")):
        ckpt = memory(TENSORS | {"none": torch.tensor(scale)})
        view = finishes.requantised("fp8", ckpt["fp8"], ckpt["s"], [ckpt["s"], ckpt["none"]])
        with pytest.raises(SourceError, match=r"fp8: scales .* wanted all above 0"):
            elements(view)
    with pytest.raises(ViewError, match="wanted stored elements, got zeros"):
        finishes.plus_one(zeros((2,), dtypes.float32))
