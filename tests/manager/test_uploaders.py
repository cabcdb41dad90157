"""Commits carried elsewhere: whole, proven, tried again, taken up where it stopped."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastckpt.digest import LEAF
from fastckpt.errors import ManagerError, SourceError, WriteError
from fastckpt.manager import uploaders
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.uploaders import FsspecDirectory, LocalDirectory, Uploader
from fastckpt.verification.outputs import VerifyReport, verify


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A commit."""
    with CheckpointManager(tmp_path / "ck") as manager:
        manager.save(1, {"x": torch.arange(LEAF // 4), "y": torch.ones(3), "n": 1})
        return Path(manager.path(1))


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


class Unsteady(LocalDirectory):
    """Fails, or stores something else, as `faults` say; "" works."""

    def __init__(self, root: Path, faults: list[str]) -> None:
        super().__init__(root)
        self.faults, self.puts = faults, []

    def put(self, path: str, name: str) -> None:
        self.puts.append(name)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "error":
            raise OSError(5, "reset by peer")
        super().put(path, name)
        stored = Path(self.root, name)
        if fault == "flip":
            data = bytearray(stored.read_bytes())
            data[len(data) // 2] ^= 1
            stored.write_bytes(data)
        if fault == "cut":
            stored.write_bytes(stored.read_bytes()[:-1])


def test_a_local_directory(tmp_path: Path, step: Path) -> None:
    done = Uploader(LocalDirectory(tmp_path / "far")).upload(step)
    assert contents(tmp_path / "far/step-00000001") == contents(step)
    assert (done.sent, done.there, done.failures) == (len(contents(step)), 0, 0)
    assert done.nbytes == sum(map(len, contents(step).values()))
    assert verify(tmp_path / "far/step-00000001").ok
    with CheckpointManager(tmp_path / "far") as manager:
        assert manager.restore(1)["n"] == 1  # type: ignore[index]


def test_new_directories_are_synced_too(tmp_path: Path, step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    monkeypatch.setattr(uploaders, "sync_directory", synced.add)
    Uploader(LocalDirectory(tmp_path / "far")).upload(step)
    far = tmp_path / "far"
    assert synced == {str(p) for p in (tmp_path, far, far / step.name, far / step.name / "rank-00000")}


def test_the_record_goes_last(tmp_path: Path, step: Path) -> None:
    far = Unsteady(tmp_path / "far", [])
    Uploader(far).upload(step, "other")
    assert far.puts[-1] == "other/fastckpt.json" and len(set(far.puts)) == len(far.puts)


@pytest.mark.parametrize("fault", ["error", "flip", "cut"])
def test_faults_are_tried_again(tmp_path: Path, step: Path, fault: str) -> None:
    far = Unsteady(tmp_path / "far", ["", fault, fault, "", fault])
    done = Uploader(far, pause=0.001).upload(step)
    assert done.failures == 3 and contents(tmp_path / "far/step-00000001") == contents(step)


def test_what_is_there_is_not_sent_again(tmp_path: Path, step: Path) -> None:
    far = Unsteady(tmp_path / "far", ["", "", "error", "error"])
    with pytest.raises(WriteError, match=r"could not be carried .* in 2 tries: .*reset by peer"):
        Uploader(far, tries=2, pause=0.001).upload(step)
    assert not (tmp_path / "far/step-00000001/fastckpt.json").exists()
    done = Uploader(far).upload(step)
    assert done.there == 2 and done.sent == len(contents(step)) - 2
    assert Uploader(far).upload(step).sent == 0
    Path(tmp_path, "far/step-00000001/rank-00000/state.json").write_text("{}")
    assert Uploader(far).upload(step).sent == 1 and contents(tmp_path / "far/step-00000001") == contents(step)


def test_what_is_not_sound_stays(tmp_path: Path, step: Path) -> None:
    state = step / "rank-00000/state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(SourceError, match="not uploaded, it is not sound"):
        Uploader(LocalDirectory(tmp_path / "far")).upload(step)
    assert not (tmp_path / "far").exists()


def test_a_commit_that_is_removed_meanwhile(
    tmp_path: Path, step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removed(root: str) -> VerifyReport:
        found = verify(root)
        shutil.rmtree(Path(root, "rank-00000"))
        return found

    monkeypatch.setattr(uploaders, "verify", removed)
    with pytest.raises(SourceError, match=r"rank-00000/.*: no such file"):
        Uploader(LocalDirectory(tmp_path / "far")).upload(step)
    assert not (tmp_path / "far/step-00000001/fastckpt.json").exists()


def test_in_the_background(tmp_path: Path, step: Path) -> None:
    uploader = Uploader(LocalDirectory(tmp_path / "far"))
    uploader.start(step)
    uploader.start(step, "again")
    assert [u.name for u in uploader.wait()] == ["step-00000001", "again"] and uploader.wait() == []
    uploader.start(tmp_path / "nothing")
    uploader.start(step, "third")
    with pytest.raises(SourceError, match="no such directory"):
        uploader.wait()
    assert verify(tmp_path / "far/third").ok
    uploader.close()


def test_other_file_systems(tmp_path: Path, step: Path) -> None:
    pytest.importorskip("fsspec")
    far = FsspecDirectory(f"memory://{tmp_path.name}/runs")
    done = Uploader(far).upload(step)
    assert done.sent == len(contents(step))
    for name, data in contents(step).items():
        assert b"".join(far.read(f"step-00000001/{name}")) == data
    assert Uploader(far).upload(step).sent == 0


def test_what_a_client_raises_past_fsspec(
    tmp_path: Path, step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of stores' own clients are tried again as others are; what is no store's fault is not hidden."""
    pytest.importorskip("fsspec")

    class HttpError(Exception):
        """As gcsfs has it."""

    monkeypatch.setitem(sys.modules, "gcsfs.retry", SimpleNamespace(HttpError=HttpError))
    far = FsspecDirectory(f"memory://{tmp_path.name}/runs")
    for error, kind, said in (
        (HttpError("503"), WriteError, "in 2 tries: .*HttpError: 503"),
        (KeyError("no store"), KeyError, "no store"),
    ):
        with monkeypatch.context() as patch, pytest.raises(kind, match=said):
            patch.setattr(far._fs, "put_file", lambda *a, e=error: (_ for _ in ()).throw(e))
            Uploader(far, tries=2, pause=0.001).upload(step)
    with pytest.raises(ManagerError, match="tries: wanted at least 1, got 0"):
        Uploader(far, tries=0)


def test_pieces_of_any_size(tmp_path: Path, step: Path) -> None:
    class Drops(LocalDirectory):
        """Gives what it has in odd pieces."""

        def read(self, name: str) -> Iterator[bytes]:
            data = b"".join(super().read(name))
            yield from (data[k : k + 77_777] for k in range(0, len(data), 77_777))

    assert Uploader(Drops(tmp_path / "far")).upload(step).failures == 0
