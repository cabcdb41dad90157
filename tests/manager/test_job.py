"""Jobs: groups as contexts, and what the limiter counts."""

from __future__ import annotations

import pytest
from fastckpt.errors import ManagerError
from fastckpt.manager.job import Context, Job, TaskGroup, epoch_limiter, task


def test_groups_are_contexts() -> None:
    said: list[str] = []
    with Job() as job:
        assert Job.current() is job and TaskGroup.current() is job.epoch_group
        with job.init_group:
            task(lambda c: said.append("init"))

        @task
        def epoch(context: Context) -> None:
            said.append(f"epoch {context.epoch}")

        with Job.current().exit_group as group:
            group.add(lambda c: said.append("exit"))
            with Job() as inner:
                assert Job.current() is inner
                task(lambda c: said.append("inner"))
            assert TaskGroup.current() is group
        job.download_group.add(lambda c: said.append("download"))
    for group in (job.init_group, job.epoch_group, job.download_group, job.exit_group, inner.epoch_group):
        group.run(Context(epoch=3))
    assert said == ["init", "epoch 3", "download", "exit", "inner"]


def test_groups_are_given_at_once() -> None:
    said: list[str] = []
    job = Job(
        init=[lambda c: said.append("init")],
        epoch=[lambda c: said.append("epoch"), lambda c: said.append("more")],
        download=[lambda c: said.append("download")],
        exit=[lambda c: said.append("exit")],
        stop_conditions=[lambda c: c.epoch >= 2],
    )
    for group in (job.init_group, job.epoch_group, job.download_group, job.exit_group):
        group.run(job.context)
    assert said == ["init", "epoch", "more", "download", "exit"]
    assert [condition(Context(epoch=2)) for condition in job.stop_conditions] == [True]


def test_outside_of_a_job() -> None:
    with pytest.raises(ManagerError, match="no job is entered"):
        Job.current()
    with pytest.raises(ManagerError, match="no task group is entered"):
        task(lambda c: None)


def test_the_limiter_counts_in_the_state() -> None:
    with Job(state={"x": 1}) as job:
        epoch_limiter(2)
    (condition,) = job.stop_conditions
    assert job.limits == [condition] and not condition(job.context)
    for done in (False, True, True):
        job.epoch_group.run(job.context)
        assert condition(job.context) is done
    assert job.context.state == {"x": 1, "epochs_run": 3}
    with pytest.raises(ManagerError, match="at least 1 epoch, got 0"):
        epoch_limiter(0, job)
