"""Damage to any byte of a commit: verify says so, and no restore gives a wrong value."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.errors import FastckptError
from fastckpt.manager.manager import CheckpointManager
from fastckpt.verification.outputs import verify


def state() -> dict[str, Any]:
    return {
        "x": torch.arange(40, dtype=torch.float32),
        "y": {"z": torch.ones(3, dtype=torch.bfloat16), "t": torch.arange(40, dtype=torch.float32)},
        "n": 5,
        "text": "words",
    }


def right(found: Any) -> bool:
    want = state()
    return (
        list(found) == list(want)
        and torch.equal(found["x"], want["x"])
        and torch.equal(found["y"]["z"], want["y"]["z"])
        and torch.equal(found["y"]["t"], want["y"]["t"])
        and (found["n"], found["text"]) == (5, "words")
    )


def damages(data: bytes, stride: int) -> Iterator[tuple[str, bytes]]:
    """One bit, or a run of zeros, at many places; and a shorter file."""
    for at in range(0, len(data), stride):
        yield f"bit at {at}", data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]
        zeroed = data[:at] + bytes(len(data[at : at + 16])) + data[at + 16 :]
        if zeroed != data:
            yield f"zeros at {at}", zeroed
        yield f"cut at {at}", data[:at]


@pytest.mark.parametrize(
    "stride", [pytest.param(41, id="some"), pytest.param(1, id="all", marks=pytest.mark.nightly)]
)
def test_damage(tmp_path: Path, stride: int) -> None:
    with CheckpointManager(tmp_path, durable=False) as manager:
        manager.save(0, state())
        step = Path(manager.path(0))
        files = [p for p in sorted(step.rglob("*")) if p.is_file()]
        assert len(files) == 5
        seen = 0
        for file in files:
            sound = file.read_bytes()
            for what, data in damages(sound, stride):
                file.write_bytes(data)
                if file.name != "fastckpt-rank-0.json":  # the commit record repeats it
                    assert not verify(step).ok, f"{file.name}: {what}"
                    seen += 1
                with (
                    CheckpointManager(tmp_path, durable=False) as fresh,
                    warnings.catch_warnings(),
                    suppress(FastckptError),
                ):
                    warnings.simplefilter("ignore")
                    assert right(fresh.restore()), f"{file.name}: {what}"
            file.write_bytes(sound)
            assert verify(step).ok and right(manager.restore(0))
    assert seen > 100
