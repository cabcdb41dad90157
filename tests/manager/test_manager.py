"""One rank: what is saved comes back, what is kept is kept, what is broken is passed over."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.digest import LEAF
from fastckpt.errors import FastckptError, ManagerError, SourceError, WriteError
from fastckpt.manager import commits, coordination, loading, opened, saving
from fastckpt.manager.commits import Store
from fastckpt.manager.coordination import Group
from fastckpt.manager.loading import Asked, Loaded
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.metadata import JsonMetadata
from fastckpt.manager.reporting import CheckpointWarning
from fastckpt.manager.saving import Disk
from fastckpt.output import syscalls
from fastckpt.output.manifest import Origin, Record
from fastckpt.output.writer import Output
from fastckpt.sources.training import LAYOUT
from fastckpt.verification.outputs import verify
from safetensors.torch import load_file

Trained = Callable[..., dict[str, Any]]
Same = Callable[[object, object], bool]


def test_there_and_back(tmp_path: Path, trained: Trained, same: Same) -> None:
    saved, template = trained(1, 3), trained(2, 0)
    with CheckpointManager(tmp_path / "ck") as manager:
        assert manager.latest() is None and manager.steps() == []
        assert manager.save(7, saved, {"loss": 0.5})
        assert manager.steps() == [7] and manager.exists(7) and not manager.exists(6)
        assert manager.restore(template=template) is template
    assert same(template, saved)
    with CheckpointManager(tmp_path / "ck") as again:
        plain: Any = again.restore(7)
        assert same(plain["model"], saved["model"].state_dict()) and plain["seen"] == 13
    assert verify(tmp_path / "ck/step-00000007").ok
    assert (tmp_path / "ck/latest").read_text() == "step-00000007\n"


def test_torchs_default_device_is_the_callers(tmp_path: Path, trained: Trained, same: Same) -> None:
    """Scripts set it to the GPU; what is saved and restored passes through main memory all the same."""
    saved, template = trained(1, 3), trained(2, 0)
    with CheckpointManager(tmp_path / "ck", async_save=True) as manager, torch.device("meta"):
        manager.save(7, saved)
        manager.restore(template=template)
        plain: Any = manager.restore(7)
    assert same(template, saved) and same(plain["model"], saved["model"].state_dict())


def test_a_save_older_than_what_stands_is_told_and_kept(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, max_to_keep=2) as manager:
        for step in (10, 20):
            manager.save(step, {"w": torch.full((2,), step)})
        manager.restore(10)
        with pytest.warns(CheckpointWarning, match="step 12 is older than step 20, which"):
            assert manager.save(12, {"w": torch.full((2,), 12)})
        assert 12 in manager.steps() and manager.latest() == 20
        manager.save(14, {"w": torch.full((2,), 14)})  # said once
        assert 14 in manager.steps()
        manager.rewind(14)
        manager.save(16, {"w": torch.full((2,), 16)})
        assert manager.steps() == [14, 16]


def test_a_size_returns_into_a_template(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, {"shape": torch.Size([2, 3]), "w": torch.ones(2)})
        template = {"shape": torch.Size([1]), "w": torch.zeros(2)}
        manager.restore(0, template=template)
    assert template["shape"] == torch.Size([2, 3]) and template["w"].tolist() == [1, 1]


def test_the_files_are_plain(tmp_path: Path, trained: Trained, same: Same) -> None:
    """safetensors' own reader finds the tensors, and nothing in the commit is a pickle."""
    saved = trained(1)
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, saved)
        part = Path(manager.path(0, 0))
        tensors = load_file(part / "state.safetensors")
        assert sorted(tensors) == sorted(manager.names(0))
    for name, tensor in saved["model"].state_dict().items():
        assert same(tensors[f"model.{name}"], tensor)
    json.loads((part / "state.json").read_text())
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {"", ".json", ".safetensors"}


@pytest.mark.parametrize("copy", [False, True], ids=["sync", "async"])
def test_every_kind_of_tensor(tmp_path: Path, same: Same, copy: bool) -> None:
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        "turned": base.view(4, 6).t(),
        "every other": base[::2],
        "one of every third": base[4:5:3],
        "none of every other": base[::2][:0],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "tied": base,
        "tied too": base,
        "same bytes, other shape": base.view(2, 12),
        "fp8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
        "complex": torch.tensor([1 + 2j]),
        "conj": torch.tensor([1 + 2j]).conj(),
        "long": torch.arange(LEAF // 4 + 3, dtype=torch.int64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "nan": torch.tensor([float("nan"), float("inf")]),
    }
    want = {k: v.detach().clone() for k, v in state.items()}
    with CheckpointManager(tmp_path, async_save=copy) as manager:
        manager.save(0, state)
        back: Any = manager.restore(0)
    assert list(back) == list(state)
    for name, tensor in want.items():
        assert same(back[name], tensor.resolve_conj().contiguous()), name
    assert back["tied"] is back["tied too"]
    assert verify(tmp_path / "step-00000000").ok


def freed(size: int) -> torch.Tensor:
    """As FSDP leaves what it gathered."""
    tensor = torch.ones(size)
    tensor.untyped_storage().resize_(0)
    return tensor


def partitioned() -> torch.Tensor:
    """As DeepSpeed leaves a parameter whose parts other ranks hold."""
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_id = 3  # type: ignore[attr-defined]
    return parameter


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(2).to_sparse(), "no plain memory"),
        (torch.empty(2, device="meta"), "no plain memory"),
        (freed(4096), "no plain memory"),
        (torch.ones(2, dtype=torch.complex128), "safetensors cannot spell"),
        (torch.empty(2, dtype=torch.bits8), "x is torch.bits8, which fastckpt does not know"),
        (partitioned(), "x is partitioned by DeepSpeed; give the engine, not its module"),
    ],
    ids=["sparse", "meta", "freed", "complex128", "bits8", "ZeRO-3"],
)
@pytest.mark.parametrize("copy", [False, True])
def test_tensors_that_are_refused(tmp_path: Path, tensor: torch.Tensor, said: str, copy: bool) -> None:
    with CheckpointManager(tmp_path, async_save=copy) as manager:
        manager.save(0, {"x": torch.ones(1)})
        with pytest.raises((ManagerError, WriteError), match=said):
            manager.save(1, {"x": tensor})
            manager.wait()
        assert manager.steps() == [0]
    assert not [e for e in os.listdir(tmp_path) if e.startswith((".saving", ".trash"))]


def test_large_states_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several threads, every tensor once, each file readable by safetensors."""
    monkeypatch.setattr(saving, "_FILE", 4 * LEAF)
    monkeypatch.setattr(saving, "_THREADS", 3)
    sizes = (LEAF, LEAF, LEAF, 9, 5, 0)
    state = {f"t{k}": torch.full((n,), k, dtype=torch.int32) for k, n in enumerate(sizes)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, state)
        part = Path(manager.path(0, 0))
        files = sorted(p.name for p in part.glob("*.safetensors"))
        assert files == [f"state-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
        found = [load_file(part / name) for name in files]
        assert sorted(n for f in found for n in f) == sorted(state)
        assert all(torch.equal(t, state[n]) for f in found for n, t in f.items())
        back: Any = manager.restore(0)
        assert all(torch.equal(back[n], t) for n, t in state.items())
    assert verify(tmp_path / "step-00000000").ok


def test_only_some_names_and_only_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"big": torch.ones(1 << 16), "small": torch.arange(3), "deep": {"x": torch.zeros(2)}, "n": 1}
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, state)
        read = 0
        real = os.preadv

        def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
            nonlocal read
            n = real(fd, buffers, offset)
            read += n
            return n

        monkeypatch.setattr(os, "preadv", counted)
        back: Any = manager.restore(names=["deep.x", "small"])
        assert read == 8 + 24
        assert list(back) == ["deep.x", "small"] and back["small"].tolist() == [0, 1, 2]
        with pytest.raises(ManagerError, match=r"no tensor 'smal'; near: small"):
            manager.restore(names=["smal"])
        assert list(manager.restore(names=["smal", "small"], allow_missing=True)) == ["small"]  # type: ignore[call-overload]
        into = {"small": torch.zeros(3, dtype=torch.float64)}
        held = into["small"]
        manager.restore(names=["small"], template=into)
        assert held.tolist() == [0.0, 1.0, 2.0]
        assert manager.stats()[-1].nbytes == 24 and manager.stats()[-1].action == "checkpoint_partial_load"


def test_the_tree_is_not_walked_for_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"x{k}": torch.ones(2) for k in range(50)}
    walked: list[object] = []
    real = opened.names_in

    def counted(tree: Any) -> list[str]:
        walked.append(tree)
        return real(tree)

    monkeypatch.setattr(opened, "names_in", counted)
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, state)
        manager.restore(0, template=state)
    assert 0 < len(walked) < 10


@pytest.mark.parametrize("names", [None, ["x"]])
def test_nothing_is_spread_over_a_larger_tensor(tmp_path: Path, names: list[str] | None) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, {"x": torch.ones(1), "list": [torch.ones(1)]})
        x, y = torch.zeros(3), torch.zeros(3)
        templates: list[Any] = [{"x": x}] if names else [{"x": x}, {"list": [y]}, [x], {"x": {"x": x}}]
        for template in templates:
            with pytest.raises(
                ManagerError, match=r"saved shape \(1,\), the template's is \(3,\)|template has a"
            ):
                manager.restore(names=names, template=template, allow_missing=True)
        assert not x.any() and not y.any()


@pytest.mark.parametrize(
    ("into", "said"),
    [
        (torch.zeros(3, device="meta"), "on the meta device"),
        (torch.zeros(3, dtype=torch.int8), r"saved as torch\.float32, the template's torch\.int8"),
        (torch.zeros(1).expand(3), "elements of the template share memory"),
        (freed(3), "no plain memory"),
    ],
)
def test_templates_that_cannot_hold_what_was_saved(tmp_path: Path, into: torch.Tensor, said: str) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, {"a": torch.ones(3), "b": torch.ones(3)})
        for names in (None, ["a", "b"]):
            other = torch.zeros(3)
            with pytest.raises(ManagerError, match=said):
                manager.restore(names=names, template={"a": other, "b": into})
            assert not other.any()


def test_an_optimizer_with_a_state_dict_of_its_own(tmp_path: Path) -> None:
    """Its groups are its own matter."""

    class Counting(torch.optim.SGD):
        steps = 0

        def state_dict(self) -> dict[str, Any]:
            return {"steps": self.steps}

        def load_state_dict(self, state_dict: Any) -> None:
            self.steps = state_dict["steps"]

    one, two = (Counting([torch.nn.Parameter(torch.ones(1))]) for _ in range(2))
    one.steps = 3
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, {"o": one})
        manager.restore(template={"o": two})
    assert two.steps == 3


def test_an_optimizer_of_other_groups_changes_nothing(tmp_path: Path, trained: Trained, same: Same) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, trained(1))
        other, untouched = trained(2), trained(2)
        other["optimizer"] = torch.optim.AdamW([{"params": [p]} for p in other["model"].parameters()])
        with pytest.raises(ManagerError, match=r"groups of \[6\] parameters were saved"):
            manager.restore(template=other)
        assert same(other["model"], untouched["model"])


def test_a_missing_key_of_the_template(tmp_path: Path, trained: Trained, same: Same) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, {"a": torch.ones(2), "b": 1})
        template = {"a": torch.zeros(2), "new": torch.zeros(1)}
        with pytest.raises(ManagerError, match="'new' is not in the commit"):
            manager.restore(template=template)
        assert template["a"].tolist() == [0.0, 0.0]
        manager.restore(template=template, allow_missing=True)
        assert template["a"].tolist() == [1.0, 1.0] and template["new"].tolist() == [0.0]


# ---- what stands ----


def test_a_step_is_committed_once(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"x": 1})
        with pytest.raises(ManagerError, match="committed already"):
            manager.save(1, {"x": 2})
        assert manager.restore() == {"x": 1}
        manager.save(1, {"x": 2}, overwrite=True)
        assert manager.restore() == {"x": 2}
    assert sorted(e for e in os.listdir(tmp_path) if e.startswith(".")) == [".fastckpt-lock"]


def test_metrics_that_are_no_numbers(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, best_metric="loss") as manager:
        with pytest.warns(CheckpointWarning, match="metric loss is nan and left out") as said:
            manager.save(0, {}, {"loss": float("nan"), "accuracy": 1})
        assert said[0].filename == __file__  # the line that saved
        manager.save(1, {}, {"loss": 5.0})
        assert manager.best() == 1 and manager.commits()[0].metrics == {"accuracy": 1.0}


def test_intervals(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_interval=3, save_on_steps=[4]) as manager:
        said = [manager.save(step, {}) for step in range(7)]
        assert said == [s in (0, 3, 4, 6) for s in range(7)]
        assert manager.save(8, {}, force=True)
    with CheckpointManager(
        tmp_path, save_when=lambda m: m.last is not None and m.step >= m.last + 5
    ) as manager:
        assert [manager.save(s, {}) for s in (9, 12, 13, 18)] == [False, False, True, True]


def test_names_of_steps(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, step_prefix="epoch_", step_digits=1) as manager:
        manager.save(12, {})
        assert os.path.basename(manager.path(12)) == "epoch_12" and manager.steps() == [12]
    with CheckpointManager("unused", path_prefix=str(tmp_path / "job-"), step_digits=3) as manager:
        manager.save(5, {})
    assert sorted(e for e in os.listdir(tmp_path) if e[0] != ".") == ["epoch_12", "job-step-005", "latest"]
    with CheckpointManager(f"file://{tmp_path}/by-url") as manager:
        manager.save(0, {})
    assert (tmp_path / "by-url/step-00000000").is_dir()
    with pytest.raises(ManagerError, match="nosuch://bucket/x: needs fsspec and its package"):
        CheckpointManager("nosuch://bucket/x")
    with pytest.raises(ManagerError, match="step -1"):
        manager.path(-1)


def test_one_job_a_root(tmp_path: Path) -> None:
    """Another process is kept out, and another manager of this one until the first is closed."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, {})
        with CheckpointManager(tmp_path) as other:
            assert other.restore() == {}
            with pytest.raises(ManagerError, match="another manager of this process saves here"):
                other.save(1, {})
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with CheckpointManager(tmp_path) as other:
                    assert other.restore() == {}
                    try:
                        other.save(1, {})
                    except ManagerError as e:
                        code = 0 if "another process saves here" in str(e) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    with CheckpointManager(tmp_path) as other:
        assert other.save(1, {})


def test_a_reader_beside_a_cleaner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: object) -> None:
    """What goes while it is read is not called broken: the newer one is read."""
    with CheckpointManager(tmp_path, max_to_keep=1) as manager, CheckpointManager(tmp_path) as reader:
        manager.save(0, {"w": torch.zeros(3)})
        load = loading.load

        def late(store: Store, group: Group, disk: Disk, step: int, asked: Asked) -> Loaded:
            if step < 3:  # what was listed goes before it is read
                manager.save(step + 1, {"w": torch.full((3,), step + 1.0)})
            return load(store, group, disk, step, asked)

        monkeypatch.setattr(loading, "load", late)
        found = reader.restore()
        assert isinstance(found, dict) and torch.equal(found["w"], torch.full((3,), 3.0))
    assert not list(recwarn)  # type: ignore[call-overload]


# ---- what fails ----


def test_a_failed_save_leaves_what_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path, max_to_keep=1) as manager:
        manager.save(0, {"x": torch.ones(3)})
        before = {p: p.read_bytes() for p in (tmp_path / "step-00000000").rglob("*") if p.is_file()}

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(WriteError, match="No space left"):
            patch.setattr(os, "pwrite", full)
            manager.save(1, {"x": torch.ones(3)})
        assert {p: p.read_bytes() for p in (tmp_path / "step-00000000").rglob("*") if p.is_file()} == before
        assert not [e for e in os.listdir(tmp_path) if e.startswith(".saving")]
        assert manager.save(1, {"x": torch.ones(3)})


def test_no_room_is_seen_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is an error, not a save that is skipped, where not even the probe has room."""

    class Small:
        f_blocks, f_bavail, f_frsize = 8, 1, 512

    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written = []
    with CheckpointManager(tmp_path) as manager:
        monkeypatch.setattr(os, "statvfs", lambda path: Small)
        monkeypatch.setattr(commits, "write_file", full)
        monkeypatch.setattr(saving._Save, "_write", lambda *a: written.append(a))
        with pytest.raises(WriteError, match="needs 4096 bytes, the file system has 512 free"):
            manager.save(0, {"x": torch.ones(1024)})
    assert not written


def test_a_record_of_something_else(tmp_path: Path) -> None:
    """Under a step's name: another step, a part of a set, an output for servers."""
    with CheckpointManager(tmp_path) as manager:
        for step in range(3):
            manager.save(step, {"x": torch.ones(2)})
        (tmp_path / "step-00000000").rename(tmp_path / "step-00000007")
        for name, world in (("step-00000001", 2), ("step-00000002", 1)):
            shutil.rmtree(tmp_path / name)
            with Output(tmp_path / name, key="k", rank=0, world=world) as out:
                layout = LAYOUT if world == 2 else "hf"
                made = out.commit(Record(Origin("", layout), "0", layout, {}))
            (tmp_path / name / "fastckpt.json").write_bytes(b"".join(made.text()))
        assert manager.steps() == []
        for step, said in (
            (7, "step-00000007: its record is of step 0"),
            (1, "step-00000001: 1 of 2 ranks are in its record"),
            (2, "step-00000002: is no commit, but an output of layout hf"),
        ):
            with pytest.raises(SourceError, match=said):
                manager.names(step)


def test_a_commit_that_a_disk_lost_before_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = Store.seal

    def lost(store: Store, step: int, token: str, *, aside: bool) -> None:
        os.unlink(os.path.join(store.saving(step, token), "fastckpt.json"))
        seal(store, step, token, aside=aside)

    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"n": 1})
        with monkeypatch.context() as patch:
            patch.setattr(Store, "seal", lost)
            with pytest.raises(WriteError, match=r"\.saving-step-00000001-.*fastckpt\.json: no such file"):
                manager.save(1, {"n": 2}, overwrite=True)
        assert manager.restore() == {"n": 1}
    assert not [e for e in os.listdir(tmp_path) if e.startswith((".saving", ".trash"))]


def test_a_disk_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in range(2):
            manager.save(step, {"x": torch.full((3,), step)})
        preadv = os.preadv

        def bad(fd: int, into: Any, offset: int) -> int:
            if "step-00000001" in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(fd, into, offset)

        monkeypatch.setattr(os, "preadv", bad)
        with pytest.raises(SourceError, match=r"state\.safetensors: x: Input/output error$"):
            manager.restore(1)
        with pytest.warns(CheckpointWarning, match="COMMIT 1 IS BROKEN"):
            assert manager.restore()["x"].tolist() == [0] * 3  # type: ignore[index]


# ---- resuming ----


def test_resume_step(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "ck", metadata=JsonMetadata(tmp_path / "told.json")) as manager:
        assert manager.resume_step() is None
        with pytest.raises(ManagerError, match="step 3 cannot be resumed"):
            manager.resume_step(3)
        for step in range(3):
            manager.save(step, {})
        assert manager.resume_step() == 2 and manager.resume_step(1) == 1
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["epochs"] == [0, 1, 2] and told["params"]["root"] == str(tmp_path / "ck")
    assert list(told["stats"]["checkpoint_save"]) == [str(tmp_path / "ck/step-00000002/rank-00000")]
    with CheckpointManager(tmp_path / "ck") as manager:
        manager.save(3, {})
    manager = CheckpointManager(tmp_path / "ck", metadata=JsonMetadata(tmp_path / "told.json"))
    with manager, pytest.warns(CheckpointWarning, match="metadata knows of step 2, step 3 stands"):
        assert manager.resume_step() == 3
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"ck/step-0000000{step}")
    manager = CheckpointManager(tmp_path / "ck", metadata=JsonMetadata(tmp_path / "told.json"))
    with manager, pytest.warns(CheckpointWarning, match=r"metadata says step 2.*resuming 1"):
        assert manager.resume_step() == 1


def test_the_newest_is_found_without_the_records_of_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointManager(tmp_path) as manager:
        for step in range(5):
            manager.save(step, {})
    (tmp_path / "step-00000004/rank-00000/state.json").unlink()
    read: list[int] = []
    real = Store.manifest
    monkeypatch.setattr(Store, "manifest", lambda store, step: (read.append(step), real(store, step))[1])
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest() == 3
    assert {*read} == {4, 3}


def test_changed_names_are_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, {"a": torch.ones(1), "b": torch.ones(1)})
    with CheckpointManager(tmp_path) as manager:
        manager.restore()
        assert not recwarn.list
        with pytest.warns(CheckpointWarning, match=r"1 new \(c\), 1 gone \(b\)"):
            manager.save(1, {"a": torch.ones(1), "c": torch.ones(1)})


def test_what_cannot_be_reached_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with CheckpointManager(tmp_path / "file") as manager:
        assert not manager.accessible()
        with pytest.warns(CheckpointWarning, match="not saved: ranks \\[0\\] cannot reach"):
            assert not manager.save(0, {})
        with pytest.raises(WriteError, match="Not a directory"):
            manager.resume_step()  # not the same as nothing to resume

    class Away(JsonMetadata):
        def accessible(self, epoch: int | None = None) -> bool:
            return False

    manager = CheckpointManager(tmp_path / "ck", metadata=Away(tmp_path / "m.json"))
    with manager, pytest.warns(CheckpointWarning, match="not saved"):
        assert not manager.save(0, {})
    assert not (tmp_path / "ck").exists()


# ---- what is asked of it ----


def test_a_closed_manager_saves_nothing(tmp_path: Path) -> None:
    """What is left to it is to look at what there is."""
    with CheckpointManager(tmp_path, async_save=True) as manager:
        manager.save(1, {"w": torch.ones(3)})
    uses: list[Callable[[], object]] = [
        lambda: manager.save(2, {"w": torch.ones(3)}),
        lambda: manager.restore(1),
        manager.resume_step,
        manager.gc,
        lambda: manager.rewind(0),
        lambda: manager.publish(1, layout="same", to=tmp_path / "served"),
    ]
    for use in uses:
        with pytest.raises(ManagerError, match="this manager is closed; make another one"):
            use()
    manager.close()
    assert manager.steps() == [1] and manager.latest() == 1 and manager.names(1) == ["w"]
    with CheckpointManager(tmp_path) as another:
        assert another.save(2, {})


def test_sigterm_saves_whatever_the_policy(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with CheckpointManager(tmp_path, save_interval=1000, save_on_signal=True, async_save=True) as manager:
        assert not manager.save(1, {"x": 1})
        os.kill(os.getpid(), signal.SIGTERM)
        assert not manager.preempted
        assert manager.save(2, {"x": 2}) and manager.preempted
        assert manager.steps() == [2]  # not in the background
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_manager_that_another_thread_closes_hears_no_more(tmp_path: Path) -> None:
    """Only the main thread puts a handler back: the next signal does it there, and goes to whom it is for."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        manager = CheckpointManager(tmp_path, save_on_signal=True)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(manager.close).result()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_manager_that_cannot_be_made_lets_go_of_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Telling(JsonMetadata):
        def set_params(self, **told: object) -> None:
            raise RuntimeError("the metadata's own")

    closed: list[object] = []
    monkeypatch.setattr(coordination.Alone, "close", lambda group: closed.append(group))
    with pytest.raises(RuntimeError, match="the metadata's own"):
        CheckpointManager(tmp_path, metadata=Telling(tmp_path / "m.json"))
    assert len(closed) == 2


def test_what_would_only_be_found_out_later_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong, said in (
        ({"best_mode": "mid"}, "mode 'mid'"),
        ({"timeout": 0}, "timeout: wanted seconds"),
        ({"path_type": "hdfs"}, f"path type 'hdfs' for {tmp_path}/.*: wanted local, or fsspec for a URL"),
        ({"rank": 0, "world": 2}, r"file/\.fastckpt-meeting: Not a directory"),
    ):
        with pytest.raises(ManagerError, match=said):
            CheckpointManager(tmp_path / "file", **wrong)
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(ManagerError, match="metric loss: wanted a number, got 'low'"),
    ):
        manager.save(1, {"n": 1}, {"loss": "low"})
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(FastckptError, match="metrics: a name: wanted str, got int 3"),
    ):
        manager.save(1, {"n": 1}, {3: 0.5})


def test_options_that_lack_their_other_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ManagerError, match="goes with best_metric"):
        CheckpointManager(tmp_path, keep_best=1)
    with pytest.raises(ManagerError, match="give both or none"):
        CheckpointManager(tmp_path, rank=1)
    with pytest.raises(ManagerError, match="rank 3 of 1: wanted a rank from 0 on and below the world"):
        CheckpointManager(tmp_path, rank=3, world=1)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ManagerError, match="RANK=3, WORLD_SIZE=None in the environment"):
        CheckpointManager(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ManagerError, match="rank 3 of 3: wanted a rank from 0 on and below the world"):
        CheckpointManager(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with CheckpointManager(tmp_path) as manager:
        assert manager.world == 1
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ManagerError, match="by which metric"):
            manager.best()
        with pytest.raises(ManagerError, match="client_state goes with a DeepSpeed engine"):
            manager.save(0, {"x": 1}, client_state={"epoch": 1})
        with pytest.raises(ManagerError, match="no valid commit to restore"):
            manager.restore()
        manager.save(0, {"x": torch.ones(1)})
        for template in ([torch.ones(1)], {"x": 1}):
            with pytest.raises(ManagerError, match="wanted a dict of tensors by name as template"):
                manager.restore(0, ["x"], template=template)


@pytest.mark.parametrize(
    "wrong",
    [{"max_to_keep": "3"}, {"async_save": "no"}, {"timeout": None}, {"save_interval": "x"}, {"shared": 1},
     {"rank": True, "world": 1}, {"keep_best": 1.5, "best_metric": "loss"}, {"save_on_steps": 5},
     {"step_digits": "8"}, {"path_prefix": 1}, {"node": 0}, {"metadata": "x"}],
)  # fmt: skip
def test_an_argument_of_another_type_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(FastckptError, match=f"^{next(iter(wrong))}: wanted "):
        CheckpointManager(tmp_path / "ck", **wrong)


def test_a_step_is_a_number_and_names_are_several(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "ck") as manager:
        for step in (True, "1", 1.0):
            with pytest.raises(FastckptError, match=r"^step: wanted int"):
                manager.save(step, {"ab": torch.ones(1)})  # type: ignore[arg-type]
        manager.save(1, {"ab": torch.ones(1)})
        with pytest.raises(FastckptError, match=r"^names: wanted Sequence"):
            manager.restore(names="ab")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS whose lock daemon is away, Lustre mounted without locks: saved all the same, by one here."""

    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(commits.fcntl, "lockf", none)
    with CheckpointManager(tmp_path) as manager, CheckpointManager(tmp_path) as second:
        assert manager.save(1, {"w": torch.ones(2)})
        with pytest.raises(ManagerError, match="another manager of this process"):
            second.save(2, {})
        assert manager.restore()["w"].tolist() == [1.0, 1.0]  # type: ignore[index]


NOWHERE = """
import os, sys, fastckpt
from fastckpt import CheckpointManager

source, directory = sys.argv[1:]
os.mkdir(directory)
os.chdir(directory)
os.rmdir(directory)
for verb in (
    lambda: fastckpt.reshard(source, out="out"),
    lambda: fastckpt.reshard(source, out="out", placement=fastckpt.Placement(pp=2), rank=0, layout="vllm"),
    lambda: fastckpt.consolidate(source, "out"),
    lambda: fastckpt.open("out"),
    lambda: fastckpt.verify("out"),
    lambda: CheckpointManager("out"),
):
    try:
        verb()
    except fastckpt.FastckptError as e:
        assert str(e).startswith("out: "), e
    else:
        raise SystemExit("no error")
"""


def test_only_the_main_thread_hears_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    monkeypatch.setattr(coordination.Alone, "close", lambda group: closed.append(group))
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ManagerError, match="save_on_signal: signal only works"),
    ):
        pool.submit(CheckpointManager, tmp_path, save_on_signal=True).result()
    assert len(closed) == 2


def test_the_second_of_two_groups_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first one holds is let go of."""
    closed: list[str] = []

    class Fails(coordination.Alone):
        def __init__(self, root: str, rank: int, world: int, timeout: float, name: str) -> None:
            if name == "save":
                raise ManagerError("rank 1 went away")

        def close(self) -> None:
            closed.append("main")

    monkeypatch.setattr(coordination, "Meeting", Fails)
    with pytest.raises(ManagerError, match="rank 1 went away"):
        CheckpointManager(tmp_path, rank=0, world=2)
    assert closed == ["main"]


def test_a_directory_where_the_hint_belongs(tmp_path: Path) -> None:
    """It is only a hint: the commit stands, and nothing is left of the file that was to be it."""
    (tmp_path / "latest").mkdir()
    with CheckpointManager(tmp_path) as manager:
        assert manager.save(1, {"x": 1}) and manager.steps() == [1]
    assert sorted(os.listdir(tmp_path)) == [".fastckpt-lock", "latest", "step-00000001"]


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "fixtures/z2-llama-w2-robin"
    here = [sys.executable, "-c", "import torch\n" + NOWHERE, source, tmp_path / "gone"]
    done = subprocess.run(here, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_root_by_another_name_is_the_same_root(tmp_path: Path) -> None:
    """Mounted twice, or in another case where case says nothing: links are followed, so here one is moved."""
    with CheckpointManager(tmp_path / "a") as manager, CheckpointManager(tmp_path / "b") as second:
        assert manager.save(1, {})
        (tmp_path / "a").rename(tmp_path / "b")
        with pytest.raises(ManagerError, match="another manager of this process"):
            second.save(2, {})


def test_a_commit_that_cannot_be_exchanged_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "_renameat2", None)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": torch.ones(2)})
        with pytest.raises(WriteError, match="step-00000001: this file system cannot exchange two"):
            manager.save(1, {"w": torch.zeros(2)}, overwrite=True)
        assert manager.restore()["w"].tolist() == [1.0, 1.0]  # type: ignore[index]
        assert not list(tmp_path.glob(".saving-*"))
