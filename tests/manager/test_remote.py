"""Commits in an object store (fsspec's memory://): whole when their record is there, proven, cleaned."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.errors import ManagerError, WriteError
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.remote import RemoteStore, default_scratch
from fastckpt.manager.reporting import CheckpointWarning
from fastckpt.manager.uploaders import FsspecDirectory, Upload, Uploader

fsspec = pytest.importorskip("fsspec")
URL = "memory://run/ck"
AsRanks = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    """An empty store: name -> bytes."""
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found.store
    found.store.clear()


def state(step: int, rank: int = 0) -> dict[str, Any]:
    return {"x": torch.full((300,), step), "own": torch.tensor([rank, step]), "n": step}


def names(store: Any) -> set[str]:
    return {n.removeprefix("/run/ck/").split("/")[0] for n in store}


def there_and_back(as_ranks: AsRanks, url: str, tmp_path: Path, world: int, background: bool) -> None:
    """Saved from one machine, and restored on another that has nothing of it."""

    def work(manager: CheckpointManager) -> None:
        for step in range(4):
            assert manager.save(step, state(step, manager.rank), {"loss": abs(step - 1.0)})
        manager.wait()
        manager.group.exchange(None)
        assert manager.steps() == [1, 2, 3] and manager.best("loss") == 1 and manager.resume_step() == 3

    options = {"max_to_keep": 2, "keep_best": 1, "best_metric": "loss", "async_save": background}
    as_ranks(world, url, work, scratch=tmp_path / "here", **options)

    def elsewhere(manager: CheckpointManager) -> None:
        assert manager.latest() == 3
        for step in (None, 2):
            found: Any = manager.restore(step)
            want = state(3 if step is None else step, manager.rank)
            assert found["n"] == want["n"] and all(torch.equal(found[k], want[k]) for k in ("x", "own"))
        assert list(manager.restore(1, ["x"])) == ["x"]  # type: ignore[call-overload]

    as_ranks(world, url, elsewhere, scratch=tmp_path / "there")


def damaged_there(url: str, files: Any, tmp_path: Path) -> None:
    """A commit whose bytes rot in the store is passed over, and saved again in its place."""
    with CheckpointManager(url, scratch=tmp_path / "a") as manager:
        for step in range(3):
            manager.save(step, state(step))
    name = f"{url}/step-00000002/rank-00000/state.safetensors"
    data = bytearray(files.cat_file(name))
    data[-1] ^= 1
    files.pipe_file(name, bytes(data))
    with CheckpointManager(url, scratch=tmp_path / "b") as manager:
        with pytest.warns(CheckpointWarning, match="COMMIT 2 IS BROKEN"):
            assert manager.restore()["n"] == 1  # type: ignore[index]
        manager.save(2, state(7))  # in the broken one's place
        assert manager.restore()["n"] == 7  # type: ignore[index]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_there_and_back(tmp_path: Path, as_ranks: AsRanks, store: Any, world: int, background: bool) -> None:
    there_and_back(as_ranks, URL, tmp_path, world, background)
    assert names(store) == {"latest", "step-00000001", "step-00000002", "step-00000003"}
    assert [e for e in sorted(os.listdir(tmp_path / "here")) if e.startswith("step")] == ["step-00000003"]


def test_an_upload_that_stops_is_no_commit(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every object of a save: the store fails for good, and what stood still stands."""
    with CheckpointManager(URL, scratch=tmp_path / "a") as manager:
        manager.save(0, state(0))
    whole = {n: bytes(f.getbuffer()) for n, f in store.items()}
    put = FsspecDirectory.put
    for last in range(5):
        left = [last]

        def failing(self: FsspecDirectory, path: str, name: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(5, "reset by peer")
            put(self, path, name)

        with CheckpointManager(URL, scratch=tmp_path / "a") as manager, monkeypatch.context() as patch:
            patch.setattr(manager._store._uploader, "_pause", 0.0)  # type: ignore[attr-defined]
            patch.setattr(FsspecDirectory, "put", failing)
            with pytest.raises(WriteError, match="could not be carried"):
                manager.save(1, state(1))
            assert manager.steps() == [0]
            assert manager.restore()["n"] == 0  # type: ignore[index]
            assert {n: bytes(store[n].getbuffer()) for n in whole} == whole
    with CheckpointManager(URL, scratch=tmp_path / "b") as manager:  # another machine goes on
        manager.save(1, state(1))
        assert manager.steps() == [0, 1] and manager.restore()["n"] == 1  # type: ignore[index]


def test_a_copy_that_will_not_go_stops_a_save_before_the_upload(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointManager(URL, scratch=tmp_path) as manager:
        manager.save(0, state(0))
        (tmp_path / "step-00000001").mkdir()  # half a copy of a save that was lost there
        before, rename = names(store), os.rename

        def stuck(a: str, b: str) -> None:
            if a.endswith("step-00000001") and ".trash-" in b:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            rename(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", stuck)
            with pytest.raises(WriteError, match="step-00000001: Device or resource busy"):
                manager.save(1, state(1))
        assert names(store) == before
        manager.save(1, state(1))
        assert manager.steps() == [0, 1] and manager.restore()["n"] == 1  # type: ignore[index]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".trash-")]


def test_damage_there_is_passed_over(tmp_path: Path, store: Any) -> None:
    damaged_there(URL, fsspec.filesystem("memory"), tmp_path)
    assert any(n.startswith(".aside-step-00000002") for n in names(store))
    with CheckpointManager(URL, scratch=tmp_path / "b") as manager:
        (tmp_path / "b/step-00000002/rank-00000/state.safetensors").write_bytes(b"rotten")
        assert manager.restore()["n"] == 7  # type: ignore[index]  # brought again
        manager.gc(aside=True)
        assert not any(n.startswith(".aside") for n in names(store))
        assert manager.rewind(1) == [2] and manager.latest() == 1


def test_a_save_that_rots_before_it_is_carried(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = RemoteStore.seal

    def rotten(self: RemoteStore, step: int, token: str, *, aside: bool) -> None:
        path = Path(self.saving(step, token), "rank-00000/state.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        seal(self, step, token, aside=aside)

    with CheckpointManager(URL, scratch=tmp_path) as manager:
        manager.save(0, state(0))
        before = set(store)
        with monkeypatch.context() as patch:
            patch.setattr(RemoteStore, "seal", rotten)
            with pytest.raises(WriteError, match=r"not uploaded, it is not sound: .*x: "):
                manager.save(1, state(1))
        assert set(store) == before and manager.restore()["n"] == 0  # type: ignore[index]
    assert not list(tmp_path.glob(".saving-*"))


def test_a_store_that_loses_what_was_carried(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Uploader.upload

    def lost(self: Uploader, path: str, name: str) -> Upload:
        done = upload(self, path, name)
        fsspec.filesystem("memory").rm(f"/run/ck/{name}/rank-00000/state.safetensors")
        return done

    with CheckpointManager(URL, scratch=tmp_path) as manager:
        manager.save(0, state(0))
        with monkeypatch.context() as patch:
            patch.setattr(Uploader, "upload", lost)
            with pytest.raises(WriteError, match="ck: step 1 is not what was just carried there"):
                manager.save(1, state(1))
        with pytest.warns(CheckpointWarning, match="COMMIT 1 IS BROKEN"):
            assert manager.restore()["n"] == 0  # type: ignore[index]
        assert manager.save(1, state(1)) and manager.restore()["n"] == 1  # type: ignore[index]


def test_commits_that_lie_in_the_scratch_directory_are_no_copies(tmp_path: Path, store: Any) -> None:
    """A job that saved to this disk saves to a store from now on."""
    with CheckpointManager(tmp_path) as manager:
        for step in range(3):
            manager.save(step, state(step + 10))
    (tmp_path / "step-00000001/fastckpt.json").write_bytes(b"{")  # nothing says whose it is
    with CheckpointManager(URL, scratch=tmp_path) as manager:
        for step in (2, 3):
            manager.save(step, state(step))
        assert manager.steps() == [2, 3] and manager.restore(2)["n"] == 2  # type: ignore[index]
        manager.save(4, state(4))
    found = sorted(e for e in os.listdir(tmp_path) if "step" in e)
    (aside,) = [e for e in found if e.startswith(".aside-step-00000002-")]
    assert found == [aside, "step-00000000", "step-00000001", "step-00000004"]
    (tmp_path / "step-00000004").rename(tmp_path / "copy")
    (tmp_path / aside).rename(tmp_path / "step-00000002")
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore()["n"] == 12  # type: ignore[index]


def test_another_job_that_commits_the_same_step(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another scratch directory, while this one begins to carry its own: theirs stands."""
    aside = RemoteStore.set_aside

    def late(self: RemoteStore, steps: Any) -> None:
        aside(self, steps)
        monkeypatch.setattr(RemoteStore, "set_aside", aside)
        with CheckpointManager(URL, scratch=tmp_path / "b") as other:
            other.save(1, state(7))

    with CheckpointManager(URL, scratch=tmp_path / "a") as manager:
        monkeypatch.setattr(RemoteStore, "set_aside", late)
        with pytest.raises(ManagerError, match="ck: step 1 stands, and nothing is replaced here in one step"):
            manager.save(1, state(1))
        assert manager.restore(1)["n"] == 7  # type: ignore[index]


def test_a_torn_upload_of_an_older_step_goes(tmp_path: Path, store: Any) -> None:
    """One of a newer step may still be under way."""
    with CheckpointManager(URL, scratch=tmp_path / "a") as manager:
        manager.save(1, state(1))
    for step in (0, 2):
        fsspec.filesystem("memory").pipe_file(f"/run/ck/step-0000000{step}/rank-00000/state.json", b"{")
    with CheckpointManager(URL, scratch=tmp_path / "b") as manager:
        manager.gc()
        assert manager.steps() == [1]
    assert names(store) == {"latest", "step-00000001", "step-00000002"}


def test_a_hint_that_will_not_go(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put = FsspecDirectory.put

    def no_hint(self: FsspecDirectory, path: str, name: str) -> None:
        if name == "latest":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        put(self, path, name)

    monkeypatch.setattr(FsspecDirectory, "put", no_hint)
    with CheckpointManager(URL, scratch=tmp_path) as manager:
        assert manager.save(0, state(0)) and manager.steps() == [0]
    assert names(store) == {"step-00000000"}


def test_a_commit_that_goes_while_it_is_read(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job removes it there; the one before it is read, and nothing of it stays here."""
    read = FsspecDirectory.read
    with (
        CheckpointManager(URL, scratch=tmp_path / "job") as job,
        CheckpointManager(URL, scratch=tmp_path / "reader") as reader,
    ):
        for step in range(3):
            job.save(step, state(step))

        def late(self: FsspecDirectory, name: str) -> Iterator[bytes]:
            if name.startswith("step-00000002/rank") and 2 in job.steps():
                job.rewind(1)
            return read(self, name)

        monkeypatch.setattr(FsspecDirectory, "read", late)
        assert reader.restore()["n"] == 1  # type: ignore[index]
        assert not list((tmp_path / "reader").glob(".saving-*"))


def test_what_cannot_be_reached_is_not_broken(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage while the newest record is read does not bring an older state back."""
    read = FsspecDirectory.read

    def out(self: FsspecDirectory, name: str) -> Iterator[bytes]:
        if name == "step-00000001/fastckpt.json":
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return read(self, name)

    with CheckpointManager(URL, scratch=tmp_path / "a") as manager:
        for step in range(2):
            manager.save(step, state(step))
        with monkeypatch.context() as patch:
            patch.setattr(FsspecDirectory, "read", out)
            with pytest.raises(WriteError, match=r"step-00000001/fastckpt\.json: Connection reset"):
                manager.restore()
            assert not manager.accessible(1)
        assert manager.restore()["n"] == 1  # type: ignore[index]


def test_an_object_that_is_called_as_a_step(tmp_path: Path, store: Any) -> None:
    """An object store has objects beside what lies below their names."""
    fsspec.filesystem("memory").pipe("/run/ck/step-00000077", b"somebody's")
    with CheckpointManager(URL, scratch=tmp_path) as manager:
        assert not manager.exists(77) and manager.steps() == []
        assert manager.save(2, state(2)) and manager.steps() == [2]


def test_what_is_refused(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(URL, scratch=tmp_path / "a") as manager:
        manager.save(0, state(0))
        with pytest.raises(ManagerError, match="replaces nothing in one step"):
            manager.save(0, state(5), overwrite=True)
        assert manager.restore(0)["n"] == 0  # type: ignore[index]
    with pytest.raises(ManagerError, match="a scratch directory goes with a URL"):
        CheckpointManager(tmp_path / "x", scratch=tmp_path)
    with pytest.raises(ManagerError, match="share it and a scratch"):
        CheckpointManager(URL, shared=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_scratch(URL).startswith(str(tmp_path / "cache/fastckpt/commits/"))
    assert default_scratch(URL) != default_scratch(URL + "2")
