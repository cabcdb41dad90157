"""Damage to a commit: verify says so, no restore gives a wrong value, and what stood before is taken."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.errors import FastckptError, ManagerError, SourceError
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.reporting import CheckpointWarning
from fastckpt.output import syscalls
from fastckpt.verification.outputs import verify

Trained = Callable[..., dict[str, Any]]
Same = Callable[[object, object], bool]


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


def flip(path: Path, at: int = -1) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "record", "state", "table", "swapped"])
def test_a_broken_commit_is_passed_over(tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "_renameat2", None)  # NFS: what is broken is set aside there too
    with CheckpointManager(tmp_path) as manager:
        for step in range(3):
            manager.save(step, {"x": torch.full((5,), step), "n": step})
    newest, part = tmp_path / "step-00000002", tmp_path / "step-00000002/rank-00000"
    match harm:
        case "bit":
            flip(part / "state.safetensors")
        case "cut":
            os.truncate(part / "state.safetensors", (part / "state.safetensors").stat().st_size - 1)
        case "gone":
            (part / "state.safetensors").unlink()
        case "record":
            flip(newest / "fastckpt.json", 100)
        case "state":
            flip(part / "state.json", -3)
        case "table":
            flip(newest / "tensors.json", 5)
        case "swapped":
            shutil.copy(tmp_path / "step-00000001/rank-00000/state.safetensors", part / "state.safetensors")
    with CheckpointManager(tmp_path) as manager:
        if harm in ("bit", "state", "table", "swapped"):
            with pytest.warns(CheckpointWarning, match="COMMIT 2 IS BROKEN"):
                back: Any = manager.restore()
            with pytest.raises(SourceError, match="digest"):
                manager.restore(2)
        else:
            with pytest.warns(CheckpointWarning, match="COMMIT 2 IS BROKEN"):
                back = manager.restore()
            assert manager.steps() == [0, 1]
            with pytest.raises(ManagerError, match="no whole commit of it; what stands: \\[0, 1\\]"):
                manager.restore(2)
        assert back["n"] == 1 and back["x"].tolist() == [1] * 5 and manager.restored == 1
        manager.save(2, {"x": torch.full((5,), 9), "n": 2})  # in the broken one's place
        assert manager.restore(2)["x"].tolist() == [9] * 5  # type: ignore[index]
        assert len([e for e in os.listdir(tmp_path) if e.startswith(".aside-step-00000002")]) == 1
        manager.gc(aside=True)
    assert not [e for e in os.listdir(tmp_path) if e.startswith(".aside")]


def test_a_template_is_untouched_by_a_broken_commit(tmp_path: Path, trained: Trained, same: Same) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, trained(1, 2))
        flip(tmp_path / "step-00000000/rank-00000/state.safetensors")
        template, before = trained(2, 1), trained(2, 1)
        with pytest.raises(SourceError):
            manager.restore(0, template=template)
        with (
            pytest.warns(CheckpointWarning),
            pytest.raises(ManagerError, match=r"no valid commit.*broken: \[0\]"),
        ):
            manager.restore(template=template)
    assert same(template, before)
