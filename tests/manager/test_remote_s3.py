"""Commits in S3, as moto's local server plays it: skipped where moto[server] and s3fs are not installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.errors import WriteError
from fastckpt.manager.manager import CheckpointManager, CheckpointWarning
from fastckpt.manager.uploaders import FsspecDirectory, Uploader
from fastckpt.verification.outputs import verify

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")
URL = "s3://runs/ck"
AsRanks = Callable[..., list[Any]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty S3 with one bucket; the files are looked at through `server.files`."""
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    s3fs.S3FileSystem.clear_instance_cache()
    made = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    host, made.port = made.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{made.port}"),
    ):
        monkeypatch.setenv(name, value)
    made.files = s3fs.S3FileSystem(skip_instance_cache=True)
    made.files.mkdir("runs")
    yield made
    made.stop()
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].reset()
    s3fs.S3FileSystem.clear_instance_cache()


def state(step: int, rank: int = 0) -> dict[str, Any]:
    return {"x": torch.full((300,), step), "own": torch.tensor([rank, step]), "n": step}


def steps(files: Any) -> set[str]:
    files.invalidate_cache()
    return {p.split("/")[2] for p in files.find("runs/ck")}


@pytest.mark.parametrize("world", [1, 2])
def test_there_and_back(tmp_path: Path, as_ranks: AsRanks, server: Any, world: int) -> None:
    def work(manager: CheckpointManager) -> None:
        for step in range(4):
            assert manager.save(step, state(step, manager.rank), {"loss": abs(step - 1.0)})
        manager.wait()
        manager.group.exchange(None)
        assert manager.steps() == [1, 2, 3] and manager.best("loss") == 1 and manager.resume_step() == 3

    options = {"max_to_keep": 2, "keep_best": 1, "best_metric": "loss", "async_save": True}
    as_ranks(world, URL, work, scratch=tmp_path / "here", **options)
    assert steps(server.files) == {"latest", "step-00000001", "step-00000002", "step-00000003"}

    def elsewhere(manager: CheckpointManager) -> None:  # a machine that has nothing of it
        for step in (None, 2):
            found: Any = manager.restore(step)
            want = state(3 if step is None else step, manager.rank)
            assert found["n"] == want["n"] and all(torch.equal(found[k], want[k]) for k in ("x", "own"))

    as_ranks(world, URL, elsewhere, scratch=tmp_path / "there")


def test_damage_there_is_passed_over(tmp_path: Path, server: Any) -> None:
    with CheckpointManager(URL, scratch=tmp_path / "a") as manager:
        for step in range(3):
            manager.save(step, state(step))
    name = "runs/ck/step-00000002/rank-00000/state.safetensors"
    data = bytearray(server.files.cat_file(name))
    data[-1] ^= 1
    server.files.pipe_file(name, bytes(data))
    with CheckpointManager(URL, scratch=tmp_path / "b") as manager:
        with pytest.warns(CheckpointWarning, match="COMMIT 2 IS BROKEN"):
            assert manager.restore()["n"] == 1  # type: ignore[index]
        manager.save(2, state(7))  # in the broken one's place
        assert manager.restore()["n"] == 7  # type: ignore[index]
        assert any(n.startswith(".aside-step-00000002") for n in steps(server.files))
        manager.gc(aside=True)
        assert steps(server.files) == {"latest", "step-00000000", "step-00000001", "step-00000002"}


def test_a_server_that_goes_away(tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store's client raises then is a failed save, not an error of a class that nobody knows."""
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    with CheckpointManager(URL, scratch=tmp_path / "a") as manager:
        monkeypatch.setattr(manager._store._uploader, "_pause", 0.0)  # type: ignore[attr-defined]
        manager.save(0, state(0))
        server.stop()
        with pytest.raises(WriteError, match="s3://runs/ck"):
            manager.save(1, state(1))
        again = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=server.port, verbose=False)
        again.start()
        assert manager.steps() == [0]
        manager.save(1, state(1))
        assert manager.restore()["n"] == 1  # type: ignore[index]
        again.stop()


def test_an_uploader(tmp_path: Path, server: Any) -> None:
    with CheckpointManager(tmp_path / "ck") as manager:
        manager.save(0, {"w": torch.randn(2 << 20)})  # 8 MiB: more than a part of a multipart upload
        uploader = Uploader(FsspecDirectory("s3://runs/models"))
        uploader.start(manager.path(0))
        assert [u.name for u in uploader.wait()] == ["step-00000000"]
        assert uploader.upload(manager.path(0)).sent == 0  # all of it is there, seen by its digests
        uploader.close()
    server.files.get("runs/models/step-00000000", str(tmp_path / "back"), recursive=True)
    assert verify(tmp_path / "back").ok and len(os.listdir(tmp_path / "back")) == len(
        os.listdir(tmp_path / "ck/step-00000000")
    )
