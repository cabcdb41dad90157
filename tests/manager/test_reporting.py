"""What a job is told: timings, and handlers whose failures cost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.metadata import JsonMetadata
from fastckpt.manager.reporting import CheckpointWarning, Timing


def test_a_handler_that_fails_costs_nothing(tmp_path: Path) -> None:
    class Broken(JsonMetadata):
        def write(self, epoch: int) -> None:
            raise RuntimeError("database is down")

    with CheckpointManager(tmp_path, metadata=Broken(tmp_path / "m.json"), max_to_keep=1) as manager:
        for step in range(2):
            with pytest.warns(CheckpointWarning, match=f"step {step} stands, but .*: database is down"):
                assert manager.save(step, {})
        assert manager.steps() == [1]


def test_speeds() -> None:
    assert Timing("checkpoint_save", 1, 0, 2.0, 4_000_000_000).gb_per_second == 2.0
    assert Timing("checkpoint_save", 1, 0, 0.0, 1).gb_per_second == 0.0
