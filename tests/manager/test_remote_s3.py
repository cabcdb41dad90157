"""Commits in S3, as moto's local server plays it: skipped where moto[server] and s3fs are not installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.errors import WriteError
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.uploaders import FsspecDirectory, Uploader
from fastckpt.verification.outputs import verify
from manager.test_remote import damaged_there, state, there_and_back

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


def steps(files: Any) -> set[str]:
    files.invalidate_cache()
    return {p.split("/")[2] for p in files.find("runs/ck")}


@pytest.mark.parametrize("world", [1, 2])
def test_there_and_back(tmp_path: Path, as_ranks: AsRanks, server: Any, world: int) -> None:
    there_and_back(as_ranks, URL, tmp_path, world, background=True)
    assert steps(server.files) == {"latest", "step-00000001", "step-00000002", "step-00000003"}


def test_damage_there_is_passed_over(tmp_path: Path, server: Any) -> None:
    damaged_there(URL, server.files, tmp_path)
    assert any(n.startswith(".aside-step-00000002") for n in steps(server.files))
    with CheckpointManager(URL, scratch=tmp_path / "b") as manager:
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
