"""What goes and what stays: policies, leftovers of dead saves, a step gone back to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fastckpt.errors import ManagerError
from fastckpt.manager.manager import CheckpointManager


def test_retention(tmp_path: Path) -> None:
    with CheckpointManager(
        tmp_path, max_to_keep=2, keep_period=4, keep_best=1, best_metric="loss"
    ) as manager:
        for step in range(8):
            manager.save(step, {"step": step}, {"loss": abs(step - 2.5)})
        assert manager.steps() == [0, 3, 4, 6, 7] and manager.best() == 3 and manager.latest() == 7
        assert manager.best("loss", "max") == 7
        assert manager.best("other") is None
    assert not [e for e in os.listdir(tmp_path) if e.startswith((".saving", ".trash", ".aside"))]


def test_the_newest_stays_whatever_the_policy(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep=lambda commits: set()) as manager:
        for step in range(3):
            manager.save(step, {"step": step})
            assert manager.steps() == [step]
        manager._store.remove([2])
        assert manager.steps() == [2]


def test_nothing_goes_before_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with CheckpointManager(tmp_path, max_to_keep=1) as manager:
        real = manager._store.remove

        def remove(steps: list[int]) -> list[int]:
            seen.append((manager.steps(), list(steps)))
            return real(steps)

        monkeypatch.setattr(manager._store, "remove", remove)
        manager.save(0, {})
        manager.save(1, {})
    assert seen == [([0, 1], [0])]


def test_of_a_commit_that_was_moved_away_the_link_goes(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "ck", max_to_keep=1) as manager:
        manager.save(0, {"step": 0})
        moved = tmp_path / "ck/step-00000000"
        moved.rename(tmp_path / "archive")
        moved.symlink_to(tmp_path / "archive")
        manager.save(1, {"step": 1})
        assert manager.steps() == [1]
    assert (tmp_path / "archive/fastckpt.json").exists()
    assert sorted(os.listdir(tmp_path / "ck")) == [".fastckpt-lock", "latest", "step-00000001"]


def test_torn_leftovers_go_with_the_first_save(tmp_path: Path) -> None:
    for name in (".saving-step-00000001-aa", ".trash-step-00000000-bb"):
        (tmp_path / name / "rank-00000").mkdir(parents=True)
    for name in (".fastckpt-probe-0123abcd", ".latest-0123abcd"):
        (tmp_path / name).touch()
    (tmp_path / "step-00000009").mkdir()  # no record: not a commit
    with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == []
        assert len([e for e in os.listdir(tmp_path) if e[0] == "."]) == 4  # reading changes nothing
        manager.save(0, {})
    assert sorted(os.listdir(tmp_path)) == [".fastckpt-lock", "latest", "step-00000000", "step-00000009"]


def test_going_back(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in range(4):
            manager.save(step, {"step": step})
        assert manager.rewind(1) == [2, 3]
        assert manager.steps() == [0, 1] and manager.restore() == {"step": 1}
        manager.save(2, {"step": "other"})
        assert len([e for e in os.listdir(tmp_path) if e.startswith(".aside-")]) == 2
        with pytest.raises(ManagerError, match="cannot go back to step 7"):
            manager.rewind(7)
