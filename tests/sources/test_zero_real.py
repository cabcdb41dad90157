"""Checkpoints that DeepSpeed wrote: every view against the gathered truth, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import reading
import torch
from fastckpt import sources
from fastckpt.errors import SourceError
from real.checkpoints import ALL
from real.truth import read_truth, same_bits

SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor(ckpt, name):
    """A view's elements as a torch tensor of its stored dtype."""
    view = ckpt[name]
    bits = torch.from_numpy(reading.read(view).reshape(-1).view(f"i{view.dtype.itemsize}"))
    return bits.view(SIGNED[view.dtype.itemsize]).view(getattr(torch, view.dtype.name)).reshape(view.shape)


@pytest.mark.parametrize("name", ALL)
def test_masters(checkpoint: Callable[[str], Path], name):
    path = checkpoint(name)
    truth = read_truth(path)
    ckpt = sources.open(path)
    got = {n: tensor(ckpt, n) for n in ckpt}
    assert truth.mismatches({n: t.float() if t.is_floating_point() else t for n, t in got.items()}) == []
    assert dict(ckpt.aliases) == truth.shared
    assert {n for n, e in ckpt.entries.items() if e.kind == "frozen"} == (
        set() if truth.exclude_frozen or truth.stage == 0 else set(truth.frozen)
    )
    assert ckpt.facts["stage"] == truth.stage


@pytest.mark.parametrize("name", ALL)
def test_module_weights(checkpoint: Callable[[str], Path], name):
    path = checkpoint(name)
    truth = read_truth(path)
    if truth.stage == 3:
        with pytest.raises(SourceError, match="placeholders"):
            sources.open(path, weights="module")
        return
    ckpt = sources.open(path, weights="module")
    gone = truth.frozen if truth.exclude_frozen else frozenset()
    assert {n for n in truth.module if n not in gone} == set(ckpt)
    assert [n for n in ckpt if not same_bits(tensor(ckpt, n), truth.module[n])] == []
