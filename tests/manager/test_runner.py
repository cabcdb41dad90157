"""JobRunner: caffe2's order, resuming, failed saves, stopping."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.errors import ManagerError, SourceError, WriteError
from fastckpt.manager import saving
from fastckpt.manager.job import Context, Job, epoch_limiter, task
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.metadata import JsonMetadata
from fastckpt.manager.reporting import CheckpointWarning
from fastckpt.manager.runner import JobRunner
from fastckpt.manager.uploaders import LocalDirectory, Uploader
from fastckpt.verification.outputs import verify

AsRanks = Callable[..., list[Any]]


class Trained:
    """A job whose every call is written down, of one small model."""

    def __init__(self, epochs: int, ranks: list[int] | None = None, crash: int | None = None) -> None:
        self.said: list[str] = []
        torch.manual_seed(99)  # what is not restored would differ
        self.model = torch.nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        state: dict[str, object] = {"model": self.model, "optimizer": self.optimizer, "seen": 0}
        with Job(state=state, ranks=ranks) as self.job:
            epoch_limiter(epochs)

            @task
            def epoch(context: Context) -> None:
                if context.epoch == crash:
                    raise RuntimeError("crash")
                self.said.append(f"epoch {context.epoch}")
                generator = torch.Generator().manual_seed(context.epoch)
                self.optimizer.zero_grad()
                loss = self.model(torch.randn(8, 4, generator=generator)).square().sum()
                loss.backward()
                self.optimizer.step()
                context.state["seen"] = int(str(context.state["seen"])) + 8
                context.metrics["loss"] = loss.item()

            with self.job.init_group:

                @task
                def init(context: Context) -> None:
                    self.said.append("init")
                    with torch.no_grad():
                        for p in self.model.parameters():
                            p.fill_(0.5 + context.rank)

            with self.job.download_group:
                task(lambda c: self.said.append("download"))
            with self.job.exit_group:
                task(lambda c: self.said.append("exit"))

    @property
    def weights(self) -> list[float]:
        return [x for p in self.model.parameters() for x in p.detach().flatten().tolist()]


def undisturbed(tmp_path: Path, epochs: int) -> list[float]:
    one = Trained(epochs)
    with CheckpointManager(tmp_path / "undisturbed") as manager:
        assert JobRunner(one.job, manager).train() == epochs
    return one.weights


def test_the_order(tmp_path: Path) -> None:
    one = Trained(3)
    with CheckpointManager(tmp_path / "ck") as manager:
        uploader = Uploader(LocalDirectory(tmp_path / "far"))
        assert JobRunner(one.job, manager, uploader=uploader).train() == 3
        assert manager.steps() == [0, 1, 2, 3]
        assert [c.metrics.keys() for c in manager.commits()] == [set(), {"loss"}, {"loss"}, {"loss"}]
        saved: Any = manager.restore(2)
        assert saved["seen"] == 16 and saved["epochs_run"] == 2
    assert one.said == ["init", "epoch 1", "epoch 2", "epoch 3", "download", "exit"]
    assert os.listdir(tmp_path / "far") == ["step-00000003"] and verify(tmp_path / "far/step-00000003").ok


@pytest.mark.parametrize("crash", [1, 2, 4])
def test_resumed_is_as_undisturbed(tmp_path: Path, crash: int) -> None:
    want = undisturbed(tmp_path, 5)
    first = Trained(5, crash=crash)
    with CheckpointManager(tmp_path / "ck") as manager, pytest.raises(RuntimeError, match="crash"):
        JobRunner(first.job, manager).train()
    again = Trained(5)
    with CheckpointManager(tmp_path / "ck") as manager:
        assert JobRunner(again.job, manager).train() == 5
    assert again.said == [*(f"epoch {k}" for k in range(crash, 6)), "download", "exit"]
    assert again.weights == want and again.job.context.state["seen"] == 40


def test_a_finished_job_does_nothing_more_and_can_be_prolonged(tmp_path: Path) -> None:
    want = undisturbed(tmp_path, 4)
    for epochs, said in ((2, ["init", "epoch 1", "epoch 2"]), (2, []), (4, ["epoch 3", "epoch 4"])):
        one = Trained(epochs)
        with CheckpointManager(tmp_path / "ck") as manager:
            assert JobRunner(one.job, manager).train() == epochs
        assert one.said == [*said, "download", "exit"]
    assert one.weights == want


def test_from_an_older_epoch(tmp_path: Path) -> None:
    want = undisturbed(tmp_path, 4)
    with CheckpointManager(tmp_path / "ck") as manager:
        JobRunner(Trained(3).job, manager).train()
        one = Trained(4)
        with pytest.warns(CheckpointWarning, match=r"newer commits \[2, 3\] were set aside"):
            assert JobRunner(one.job, manager, resume_from_epoch=1).train() == 4
        assert one.said[:3] == ["epoch 2", "epoch 3", "epoch 4"] and one.weights == want
        with pytest.raises(ManagerError, match="step 9 cannot be resumed"):
            JobRunner(Trained(4).job, manager, resume_from_epoch=9).train()
        broken = tmp_path / "ck/step-00000001/rank-00000/state.json"
        broken.write_bytes(broken.read_bytes()[:-1] + b" ")
        with pytest.raises(SourceError, match="digest"):
            JobRunner(Trained(4).job, manager, resume_from_epoch=1).train()
        assert manager.steps() == [0, 1, 2, 3, 4]  # nothing was set aside for an epoch that is broken


def test_the_last_epoch_is_saved_whatever_the_policy(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_interval=3) as manager:
        JobRunner(Trained(5).job, manager).train()
        assert manager.steps() == [0, 3, 5]


def test_scratch_needs_a_root_of_its_own(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        JobRunner(Trained(1).job, manager, "scratch").train()
        with pytest.raises(ManagerError, match=r"holds commits \(the newest is 1\)"):
            JobRunner(Trained(1).job, manager, "scratch").train()


def test_a_broken_newest_is_passed_over(tmp_path: Path) -> None:
    want = undisturbed(tmp_path, 4)
    with CheckpointManager(tmp_path / "ck") as manager:
        JobRunner(Trained(3).job, manager).train()
    broken = tmp_path / "ck/step-00000003/rank-00000/state.safetensors"
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    one = Trained(4)
    with CheckpointManager(tmp_path / "ck") as manager:
        with pytest.warns(CheckpointWarning, match="COMMIT 3 IS BROKEN"):
            assert JobRunner(one.job, manager).train() == 4
        assert manager.steps() == [0, 1, 2, 3, 4] and verify(manager.path(3)).ok
    assert one.said[:2] == ["epoch 3", "epoch 4"] and one.weights == want


class Failing:
    """Lets saves of some epochs fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, manager: CheckpointManager, epochs: set[int]) -> None:
        real = manager.save

        def save(step: int, *args: Any, **kwargs: Any) -> bool:
            if step in epochs:
                raise WriteError(f"no space for {step}")
            return real(step, *args, **kwargs)

        monkeypatch.setattr(manager, "save", save)


def test_failed_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path) as manager:
        Failing(monkeypatch, manager, {2, 3, 5})
        with pytest.warns(
            CheckpointWarning, match=r"epoch 3 was not saved \(2 failures in a row\): no space"
        ):
            assert JobRunner(Trained(6).job, manager).train() == 6
        assert manager.steps() == [0, 1, 4, 6]


def test_three_failed_saves_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Trained(9)
    with CheckpointManager(tmp_path) as manager:
        Failing(monkeypatch, manager, {2, 3, 4})
        with pytest.warns(CheckpointWarning), pytest.raises(WriteError, match="no space for 4"):
            JobRunner(one.job, manager).train()
    assert one.said[-1] == "epoch 4"


def test_a_first_save_that_is_skipped_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    manager = CheckpointManager(tmp_path / "file/ck")
    with manager, pytest.raises((ManagerError, WriteError), match="file/ck"):
        JobRunner(Trained(1).job, manager).train()

    class Away(JsonMetadata):
        def accessible(self, epoch: int | None = None) -> bool:
            return False

    with (
        CheckpointManager(tmp_path / "ck", metadata=Away(tmp_path / "m.json")) as manager,
        pytest.warns(CheckpointWarning, match="step 0 is not saved: ranks"),
        pytest.raises(ManagerError, match="ck: the first save was skipped; can it be reached"),
    ):
        JobRunner(Trained(1).job, manager).train()


def test_failures_in_the_background_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that comes with the next save costs that one nothing."""
    real = os.pwrite
    harm = {"epoch": 0}

    def pwrite(*args: Any) -> int:
        if harm["epoch"] == 2:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    one = Trained(4)
    with CheckpointManager(tmp_path, async_save=True) as manager:

        def settle(context: Context) -> None:
            while manager._background.busy:
                time.sleep(0.01)
            harm["epoch"] = context.epoch

        one.job.epoch_group.add(settle)
        with pytest.warns(
            CheckpointWarning, match=r"the epoch before 3 was not saved \(1 failures in a row\)"
        ):
            assert JobRunner(one.job, manager).train() == 4
        assert manager.steps() == [0, 1, 3, 4]


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_last_save_that_fails_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """It counts as the others do: the third failure in a row ends the job."""
    real = saving.save

    def save(store: Any, group: Any, disk: Any, request: saving.Request) -> Any:
        if request.step:
            raise WriteError(f"no space for {request.step}")
        return real(store, group, disk, request)

    monkeypatch.setattr(saving, "save", save)
    one = Trained(epochs)
    with (
        CheckpointManager(tmp_path, async_save=True) as manager,
        pytest.warns(CheckpointWarning, match=r"was not saved \(2 failures in a row\): no space for 2"),
    ):
        if epochs == 3:
            with pytest.raises(WriteError, match="no space for 3"):
                JobRunner(one.job, manager).train()
        else:
            assert JobRunner(one.job, manager).train() == epochs
    assert (one.said[-1] == "exit") == (epochs == 2)


def test_an_epoch_count_that_is_none(tmp_path: Path) -> None:
    one = Trained(2)
    one.job.context.state["epochs_run"] = "two"
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(ManagerError, match=r"state\['epochs_run'\] is 'two', wanted the number of epochs run"),
    ):
        JobRunner(one.job, manager).train()


def test_a_failed_first_save_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Trained(9)
    with CheckpointManager(tmp_path) as manager:
        Failing(monkeypatch, manager, {0})
        with pytest.raises(WriteError, match="no space for 0"):
            JobRunner(one.job, manager).train()
    assert one.said == ["init"]


def test_sigterm_ends_after_a_save(tmp_path: Path) -> None:
    want = undisturbed(tmp_path, 4)
    first = Trained(4)
    first.job.epoch_group.add(lambda c: os.kill(os.getpid(), signal.SIGTERM) if c.epoch == 2 else None)
    with CheckpointManager(tmp_path / "ck", save_interval=10, save_on_signal=True) as manager:
        with pytest.raises(SystemExit) as left:
            JobRunner(first.job, manager).train()
        assert left.value.code == 143 and manager.steps() == [0, 2]
    assert first.said == ["init", "epoch 1", "epoch 2"]
    again = Trained(4)
    with CheckpointManager(tmp_path / "ck") as manager:
        JobRunner(again.job, manager).train()
    assert again.weights == want


def test_tensors_of_an_epoch(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        runner = JobRunner(Trained(2).job, manager)
        runner.train()
        found = runner.load_from(["model.bias"], 0)
        assert list(found) == ["model.bias"] and found["model.bias"].tolist() == [0.5] * 4  # type: ignore[attr-defined]
        with pytest.raises(ManagerError, match="step 7 cannot be restored"):
            runner.load_from(["model.bias"], 7)
        bad = tmp_path / "step-00000001/rank-00000/state.safetensors"
        bad.write_bytes(bad.read_bytes()[:-1] + b"\xff")
        with pytest.raises(SourceError, match="digest"):
            runner.load_from(manager.names(1), 1)


def test_ranks_stop_and_resume_together(tmp_path: Path, as_ranks: AsRanks) -> None:
    def run(manager: CheckpointManager, epochs: int) -> tuple[int, list[float], list[str]]:
        one = Trained(epochs)
        one.job.add_stop_condition(lambda c: c.rank == 1 and c.epoch == 3)
        return JobRunner(one.job, manager).train(), one.weights, one.said

    found = as_ranks(2, tmp_path, lambda m: run(m, 9))
    assert [f[0] for f in found] == [3, 3] and found[0][1] != found[1][1]
    again = as_ranks(2, tmp_path, lambda m: run(m, 5))
    assert [f[0] for f in again] == [5, 5]
    assert again[0][2] == ["epoch 4", "epoch 5", "download", "exit"]


def test_ranks_that_are_not_saved(tmp_path: Path, as_ranks: AsRanks) -> None:
    def run(manager: CheckpointManager) -> tuple[int, list[str]]:
        return JobRunner(Trained(2, ranks=[1]).job, manager).train(), manager.names(2)

    found = as_ranks(2, tmp_path, run)
    assert [f[0] for f in found] == [2, 2] and found[0][1] == [] and "model.weight" in found[1][1]
