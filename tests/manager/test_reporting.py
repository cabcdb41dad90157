"""What a job is told: timings, and handlers whose failures cost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.metadata import JsonMetadata
from fastckpt.manager.reporting import CheckpointWarning, Timing


def test_a_handler_that_fails_costs_nothing(tmp_path: Path) -> None:
    class DatabaseError(Exception):
        """Of a client that knows nothing of ours."""

    class Broken(JsonMetadata):
        def write(self, epoch: int) -> None:
            raise DatabaseError("database is down")

    with CheckpointManager(tmp_path, metadata=Broken(tmp_path / "m.json"), max_to_keep=1) as manager:
        for step in range(2):
            with pytest.warns(CheckpointWarning, match=f"step {step} stands, but .*: database is down"):
                assert manager.save(step, {})
        assert manager.steps() == [1]


def test_speeds() -> None:
    assert Timing("checkpoint_save", 1, 0, 2.0, 4_000_000_000).gb_per_second == 2.0
    assert Timing("checkpoint_save", 1, 0, 0.0, 1).gb_per_second == 0.0


def test_names_that_changed_since_the_restore_are_told(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, {"a": torch.ones(1), "b": torch.ones(1)})
        manager.restore()
        with pytest.warns(CheckpointWarning, match=r"step 1: .* 1 new \(c\), 1 gone \(b\)") as said:
            manager.save(1, {"a": torch.ones(1), "c": torch.ones(1)})
        assert said[0].filename == __file__
