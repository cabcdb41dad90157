"""Parameters in flat slices of several ranks: the parameter, its padding left alone."""

from __future__ import annotations

import fastckpt
import numpy as np
import pytest
import torch
from fastckpt.errors import SourceError
from fastckpt.layouts.same import Same

SHAPES = {"a": (7, 5), "b": (3,), "c": (), "none": (0, 4), "big": (64, 33)}


def parts(world: int, shapes: dict[str, tuple[int, ...]], truth: dict[str, torch.Tensor]) -> list[dict]:
    """Each rank's slices, all in one flat buffer of the rank behind a few elements; pads are garbage."""
    out: list[dict] = []
    for r in range(world):
        pieces = {}
        for n in shapes:
            flat = truth[n].reshape(-1)
            size = -(-flat.numel() // world)
            padded = torch.cat([flat, torch.full((size * world - flat.numel(),), 1e30)])
            pieces[n] = padded[r * size : (r + 1) * size]
        whole = torch.cat([torch.full((3,), 9.0), *pieces.values()])
        at, mine = 3, {}
        for n, p in pieces.items():
            mine[n] = whole[at : at + p.numel()]
            at += p.numel()
        out.append(mine)
    return out


@pytest.mark.parametrize("world", [1, 3, 8])
def test_what_was_cut_comes_back(world: int) -> None:
    truth = {n: torch.randn(s) for n, s in SHAPES.items()}
    ckpt = fastckpt.partitioned(parts(world, SHAPES, truth), SHAPES)
    got = fastckpt.reshard(ckpt, layout=Same(), rank=0)
    assert isinstance(got, dict) and set(got) == set(SHAPES)
    for n, t in truth.items():
        assert got[n].shape == t.shape and torch.equal(got[n], t), n


def test_refusals() -> None:
    flat = np.zeros(4, np.float32)
    for given, shapes, said in [
        ([{"a": flat}, {}], {"a": (8,)}, "partition 1 of 2 does not have it"),
        ([{"a": flat}], {"a": (5,)}, "needs 5 elements, its partitions have 4"),
        ([{"a": flat}, {"a": flat.astype(np.float16)}], {"a": (8,)}, "partitions of float16, float32"),
        ([{"a": flat.reshape(2, 2)}], {"a": (4,)}, "wanted flat"),
        ([{"a": np.zeros(8, np.float32)[::2]}], {"a": (4,)}, "wanted flat"),
        ([{"a": flat, "b": flat}], {"a": (4,)}, "b: partition 0 of 1 has it, and no shape is given"),
        ([{"a": flat}], {"a": (-2, -2)}, r"a: \(-2, -2\) is no shape"),
        ([{"a": flat}], {"a": (4.0,)}, r"a: \(4.0,\) is no shape"),
    ]:
        with pytest.raises(SourceError, match=said):
            fastckpt.partitioned(given, shapes)
