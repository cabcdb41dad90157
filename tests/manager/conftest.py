"""Ranks as threads that meet on the file system, and small training states."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastckpt.manager.manager import CheckpointManager

Work = Callable[[CheckpointManager], Any]


def run_ranks(
    world: int, root: object, work: Work, nodes: list[str] | None = None, **options: Any
) -> list[Any]:
    """`work(manager)` on every rank at once; the results by rank, or the first error when all have ended."""

    def one(rank: int) -> Any:
        more = {} if nodes is None else {"node": nodes[rank], "shared": False}
        place = root[rank] if isinstance(root, list) else root
        with CheckpointManager(place, rank=rank, world=world, timeout=120, **more, **options) as manager:
            return work(manager)

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(one, rank) for rank in range(world)]
        errors = [f.exception() for f in futures]
    for error in errors:
        if error is not None:
            raise error
    return [f.result() for f in futures]


@pytest.fixture
def as_ranks() -> Callable[..., list[Any]]:
    """as_ranks(world, root, work, nodes, **options): see run_ranks."""
    return run_ranks


@pytest.fixture
def trained() -> Callable[..., dict[str, Any]]:
    """trained(seed, steps=1): a module, its optimizer and scheduler, having taken some steps, and values."""

    def make(seed: int, steps: int = 1) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for k in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
            scheduler.step(float(k))
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "seen": 10 * seed + steps}

    return make


def same(a: object, b: object) -> bool:
    """Whether two values are equal, tensors bit for bit, types too."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        raw_a, raw_b = (
            t.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
            for t in (a, b)
        )
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw_a, raw_b)
    if hasattr(a, "state_dict") and hasattr(b, "state_dict"):
        return same(dict(a.state_dict()), dict(b.state_dict()))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    return type(a) is type(b) and a == b


@pytest.fixture(name="same")
def _same() -> Callable[[object, object], bool]:
    return same
