"""What the manager's saves cost the loop and the disk, against plain writes and torch.save; digests.

The state is 16 tensors of `--size` bytes in all, in host memory. torch.save does not wait for the disk: it is
compared with a save that does not either, and, followed by an fsync of its file, with one that does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastckpt.manager import opened
from fastckpt.manager.manager import CheckpointManager
from floors import drop_cache, touch
from measure import Bench, Figure, Goal, Step, of_floor, times_faster

STEP = 1


@pytest.fixture
def state(size: int) -> dict[str, torch.Tensor]:
    """Random tensors, one of them a third of the whole."""
    torch.manual_seed(0)
    rest = size * 2 // 3 // 15
    return {f"t{k}": torch.randn((size // 3 if k == 0 else rest) // 4) for k in range(16)}


def shape(state: dict[str, torch.Tensor]) -> str:
    return f"{len(state)} tensors, {sum(t.nbytes for t in state.values()) >> 20} MiB"


class Saves:
    """A save into an empty root."""

    def __init__(self, root: Path, state: dict[str, torch.Tensor], *, durable: bool) -> None:
        self.root, self.state, self.durable = root, state, durable

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def __call__(self) -> None:
        with CheckpointManager(self.root, durable=self.durable) as manager:
            manager.save(STEP, self.state)

    @property
    def step(self) -> Step:
        return Step("save, durable" if self.durable else "save", self, self.clear, self.clear)


class Plain:
    """The same bytes into one file by plain writes of 8 MiB."""

    def __init__(self, path: Path, state: dict[str, torch.Tensor], *, durable: bool) -> None:
        self.path, self.durable = path, durable
        self.views = [memoryview(t.numpy()).cast("B") for t in state.values()]

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def __call__(self) -> None:
        with open(self.path, "xb", buffering=0) as f:
            for view in self.views:
                for at in range(0, len(view), 8 << 20):
                    piece = view[at : at + (8 << 20)]
                    while piece:
                        piece = piece[f.write(piece) :]
            if self.durable:
                os.fsync(f.fileno())

    @property
    def step(self) -> Step:
        name = "write + fsync" if self.durable else "write"
        return Step(name, self, self.clear, self.clear)


class TorchSave(Plain):
    """torch.save of the same state."""

    def __init__(self, path: Path, state: dict[str, torch.Tensor], *, durable: bool) -> None:
        super().__init__(path, {}, durable=durable)
        self.state = state

    def __call__(self) -> None:
        torch.save(self.state, self.path)
        if self.durable:
            with open(self.path, "rb") as f:
                os.fsync(f.fileno())

    @property
    def step(self) -> Step:
        name = "torch.save + fsync" if self.durable else "torch.save"
        return Step(name, self, self.clear, self.clear)


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "not durable"])
def bench_save(bench: Bench, state: dict[str, torch.Tensor], work: Path, durable: bool) -> None:
    """A whole save with its digests and its commit, over plain writes of the same bytes."""
    floor = Plain(work / "plain", state, durable=durable).step
    what = f"manager: a save{', durable' if durable else ', not synced'} / {floor.name} of the same bytes"
    goal = Goal(1 / 0.9) if durable else None
    bench.measure(
        Figure(what, shape(state), "of a plain write", of_floor, goal),
        Saves(work / "ck", state, durable=durable).step, [floor], rounds=7,
    )  # fmt: skip


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "not durable"])
def bench_torch_save(bench: Bench, state: dict[str, torch.Tensor], work: Path, durable: bool) -> None:
    """The same against torch.save, which checks nothing and commits nothing."""
    peer = TorchSave(work / "torch", state, durable=durable).step
    bench.measure(
        Figure(f"manager: a save{', durable' if durable else ', not synced'}, against {peer.name}",
               shape(state), "x faster", times_faster, Goal(2, at_most=False)),
        Saves(work / "ck", state, durable=durable).step, [peer], rounds=7,
    )  # fmt: skip


def bench_stall(bench: Bench, state: dict[str, torch.Tensor], work: Path) -> None:
    """What the loop waits for with async_save: the call of `save`, over the copy to host buffers that exist.

    The save before it has ended."""
    host = {name: torch.empty_like(t).copy_(t) for name, t in state.items()}

    def copy() -> None:
        for name, tensor in state.items():
            host[name].copy_(tensor)

    with CheckpointManager(work / "ck", async_save=True) as manager:
        step = iter(range(1 << 30))

        def clear() -> None:
            manager.wait()
            for old in manager.steps():
                shutil.rmtree(manager.path(old))

        manager.save(next(step), state)  # makes the buffers
        bench.measure(
            Figure("manager: the loop's wait for an async save / the copy to host memory", shape(state),
                   "of the copy", of_floor, Goal(1.1)),
            Step("save", lambda: manager.save(next(step), state), clear, clear),
            [Step("copy", copy, clear)], rounds=15,
        )  # fmt: skip


class _Anything:
    """Says yes to every digest."""

    def __call__(self, leaves: object) -> _Anything:
        return self

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A switch: whether a restore goes without its digests."""
    off, real, real_combine, anything = [False], opened.digest64, opened.combine, _Anything()
    monkeypatch.setattr(opened, "digest64", lambda piece: 0 if off[0] else real(piece))
    monkeypatch.setattr(opened, "combine", lambda leaves: anything if off[0] else real_combine(leaves))
    yield off


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def bench_verified(
    bench: Bench, state: dict[str, torch.Tensor], work: Path, unchecked: list[bool], cold: bool
) -> None:
    """A restore as it is, which checks every byte, over the same with its digests left out."""
    with CheckpointManager(work / "ck") as manager:
        manager.save(STEP, state)
        into = {name: torch.empty_like(t) for name, t in state.items()}

        def restore(off: bool) -> None:
            unchecked[0] = off
            manager.restore(STEP, template=into)

        def before() -> None:
            (drop_cache if cold else touch)(manager.path(STEP))

        bench.measure(
            Figure(f"manager: a restore, {'cold' if cold else 'warm'} / the same without digests",
                   shape(state), "of unchecked", of_floor, Goal(1.05)),
            Step("restore", lambda: restore(False), before),
            [Step("unchecked", lambda: restore(True), before)], rounds=11,
        )  # fmt: skip
