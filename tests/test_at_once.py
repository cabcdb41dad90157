"""Several threads of one process at once: each gets what it asked for, and only that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt.errors import WriteError
from zero_writer import write_zero

SHAPES = {f"layers.{k}.weight": (40 + k, 9) for k in range(12)}
TIMES = 8


@pytest.fixture
def truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights of a ZeRO checkpoint at tmp_path/in; plans are kept at tmp_path/plans, for all threads."""
    monkeypatch.setenv("FASTCKPT_CACHE", str(tmp_path / "plans"))
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return write_zero(tmp_path / "in", weights, stage=3, world=3)


def at_once(what: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(what, k) for k in range(TIMES)]:
            done.result()


def model() -> torch.nn.Module:
    made = torch.nn.Module()
    made.layers = torch.nn.ModuleList(torch.nn.Linear(c, r, bias=False) for r, c in SHAPES.values())
    return made


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return list(got) == list(want) and all(torch.equal(got[n], t) for n, t in want.items())


@pytest.mark.parametrize("opened", [True, False])
def test_modules_are_filled(tmp_path: Path, truth: dict[str, torch.Tensor], opened: bool) -> None:
    source = fastckpt.open(tmp_path / "in") if opened else tmp_path / "in"

    def fill(_: int) -> None:
        assert same(fastckpt.load_into(model(), source).state_dict(), truth)

    at_once(fill)


@pytest.mark.parametrize("opened", [True, False])
def test_outputs_are_written(tmp_path: Path, truth: dict[str, torch.Tensor], opened: bool) -> None:
    source = fastckpt.open(tmp_path / "in") if opened else tmp_path / "in"

    def write(k: int) -> None:
        out = tmp_path / f"out-{k}"
        fastckpt.reshard(source, layout="same", out=out, durable=False, threads=1 + k % 3)
        assert fastckpt.verify(out).ok
        assert same(fastckpt.consolidate(out), truth)

    at_once(write)


def test_one_output_is_one_threads(tmp_path: Path, truth: dict[str, torch.Tensor]) -> None:
    """The others are told, and what stands there is whole at every moment."""
    refused = []

    def write(_: int) -> None:
        try:
            fastckpt.reshard(tmp_path / "in", layout="same", out=tmp_path / "out", durable=False)
        except WriteError as error:
            refused.append(error)
        assert same(fastckpt.consolidate(tmp_path / "out"), truth)

    at_once(write)
    assert len(refused) == TIMES - 1
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out"]


def test_an_event_loop_waits_for_many(tmp_path: Path, truth: dict[str, torch.Tensor]) -> None:
    async def load() -> list[dict[str, torch.Tensor]]:
        source = await asyncio.to_thread(fastckpt.open, tmp_path / "in")
        ones = (asyncio.to_thread(fastckpt.consolidate, source) for _ in range(TIMES))
        return [dict(one) for one in await asyncio.gather(*ones)]

    assert all(same(one, truth) for one in asyncio.run(load()))
