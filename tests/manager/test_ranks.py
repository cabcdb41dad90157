"""Several ranks: parts, one commit, one decision; a rank that is lost leaves the old commit the newest.

Ranks are threads that meet on the file system; test_distributed has processes with torch.distributed."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.errors import ManagerError, WriteError
from fastckpt.manager import saving
from fastckpt.manager.coordination import Alone, Group, Meeting, together
from fastckpt.manager.manager import CheckpointManager
from fastckpt.manager.pieces import Claim, shared
from fastckpt.manager.reporting import CheckpointWarning
from fastckpt.verification.outputs import verify
from safetensors.torch import load_file

AsRanks = Callable[..., list[Any]]


def state(rank: int, step: int = 0) -> dict[str, Any]:
    """Two replicated tensors, one of each rank's own, one that only rank 1 has, and values."""
    out: dict[str, Any] = {
        "weight": torch.full((64, 8), step + 0.5),
        "bias": torch.arange(8) + step,
        "own": torch.tensor([rank, step]),
        "step": step,
        "rank": rank,
    }
    if rank == 1:
        out["extra"] = torch.ones(3)
    return out


def check(found: dict[str, Any], rank: int, step: int) -> None:
    want = state(rank, step)
    assert list(found) == list(want)
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
        else:
            assert found[key] == value


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_there_and_back(tmp_path: Path, as_ranks: AsRanks, world: int, background: bool) -> None:
    def work(manager: CheckpointManager) -> None:
        for step in range(4):
            assert manager.save(step, state(manager.rank, step), {"loss": 1.0})
        manager.wait()
        manager.group.exchange(None)  # the coordinator has cleaned
        assert manager.steps() == [2, 3]
        check(manager.restore(), manager.rank, 3)  # type: ignore[arg-type]
        check(manager.restore(2), manager.rank, 2)  # type: ignore[arg-type]
        assert {t.rank for t in manager.stats()} == set(range(world))

    as_ranks(world, tmp_path, work, max_to_keep=2, async_save=background)
    assert verify(tmp_path / "step-00000003").ok
    assert not [e for e in os.listdir(tmp_path) if e.startswith((".saving", ".trash"))]


def test_what_is_replicated_is_written_once(tmp_path: Path, as_ranks: AsRanks) -> None:
    as_ranks(2, tmp_path, lambda m: m.save(0, state(m.rank)))
    names = [set(load_file(tmp_path / f"step-00000000/rank-0000{r}/state.safetensors")) for r in range(2)]
    assert names == [{"own", "weight"}, {"own", "extra", "bias"}]


def test_owners_share_the_work() -> None:
    same = {f"t{k}": Claim("float32", (100 - k,), f"{k}") for k in range(20)}
    table = shared([same, same, same, same], range(4))
    load = [0] * 4
    for name, t in table.items():
        load[t.boxes[0][0]] += same[name].nbytes
    assert max(load) - min(load) <= 400 and sum(load) == sum(c.nbytes for c in same.values())


class Counted(dict[str, Claim]):
    """A rank's claims, and how often one was asked for."""

    asked = 0

    def __getitem__(self, name: str) -> Claim:
        Counted.asked += 1
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        Counted.asked += 1
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        Counted.asked += 1
        return super().__contains__(name)


def test_names_of_one_rank_are_not_looked_for_in_all_others() -> None:
    parts = [Counted({f"{r}.{k}": Claim("int8", (1,), "d") for k in range(10)}) for r in range(50)]
    assert shared(parts, range(50)) == {}
    assert Counted.asked <= 500


def test_owners_are_the_same_in_every_process() -> None:
    """Tensors of one size go to the ranks by their names: no rank asks another who writes what."""
    same = {f"t{k:02}": Claim("float32", (4,), f"{k}") for k in range(20)}
    table = shared([same, same], range(2))
    assert [table[f"t{k:02}"].boxes[0][0] for k in range(20)] == [0, 1] * 10


def test_ranks_that_do_not_agree_on_owners(
    tmp_path: Path, as_ranks: AsRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One would leave to another what that one leaves to it."""
    calls = itertools.count()

    def other(claims: Any, disk: Any) -> Any:
        return shared(claims, disk) if next(calls) else {}

    monkeypatch.setattr(saving, "shared", other)
    with pytest.raises(ManagerError, match=r"ranks \[0, 1\] do not agree on which of them writes"):
        as_ranks(2, tmp_path, lambda m: m.save(0, state(m.rank)))
    assert not [e for e in os.listdir(tmp_path) if e.startswith(("step-", ".saving"))]


def test_boxes_that_overlap() -> None:
    """As many elements as the whole, of parts that were cut unevenly and say that they were cut evenly."""
    parts = [{"x": Claim("float32", (n,), f"{at}", (4,), (at,))} for at, n in ((0, 3), (2, 1))]
    with pytest.raises(ManagerError, match=r"x is cut over the ranks, but boxes at \[0\] and \[2\] overlap"):
        shared(parts, range(2))


LOW, HIGH = ((4,), (0,)), ((4,), (2,))
"""Halves of four elements: whole, offset."""


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (("int8", (2,), "a", *LOW), ("int8", (2,), "b"), r"\(2,\) on rank 1, int8 \(2,\), a part of"),
        (("int8", (2,), "a"), ("int8", (2,), "b", *HIGH), r"\(2,\) on rank 0, int8 \(2,\), a part of"),
        (("int8", (2,), "a", *LOW), ("bool", (2,), "b", *HIGH), "x is bool .* on rank 1, int8 "),
        (("int8", (2,), "a", *LOW), ("int8", (2,), "b", *LOW), "ranks 0 and 1 hold different bytes"),
    ],
    ids=["cut here", "cut there", "other type", "drifted"],
)  # fmt: skip
def test_parts_that_are_not_of_one_tensor(first: Any, second: Any, said: str) -> None:
    with pytest.raises(ManagerError, match=said):
        shared([{"x": Claim(*first)}, {"x": Claim(*second)}], range(2))


def test_another_world(tmp_path: Path, as_ranks: AsRanks) -> None:
    as_ranks(2, tmp_path, lambda m: m.save(0, state(m.rank)))
    for world in (1, 3):
        with pytest.raises(
            ManagerError, match=r"saved by 2 ranks, restored by \d: \w+ differs from rank to rank"
        ):
            as_ranks(world, tmp_path, lambda m: m.restore())
        with pytest.warns(CheckpointWarning, match="left out, as each of 2 ranks had its own"):
            found = as_ranks(world, tmp_path, lambda m: m.restore(allow_missing=True))
        for each in found:
            assert sorted(each) == ["bias", "step", "weight"]
            assert torch.equal(each["weight"], state(0)["weight"]) and each["step"] == 0


def test_ties_that_differ_are_not_given_to_another_world(tmp_path: Path, as_ranks: AsRanks) -> None:
    def work(manager: CheckpointManager) -> None:
        x = torch.ones(2)
        manager.save(0, {"a": x, "b": x if manager.rank else x.clone()})
        manager.save(1, {"a": x, "list": [x.clone(), x.clone(), 1][: 2 + manager.rank]})

    as_ranks(2, tmp_path, work)
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ManagerError, match="ranks 0 and 1 tie other tensors; resume with 2 ranks"):
            manager.restore(0)
        with pytest.raises(ManagerError, match=r"list\.0 is not in this rank's state"):
            manager.restore(1, ["list.0"])  # all hold it, in lists that differ
        assert list(manager.restore(1, ["a"])) == ["a"]  # type: ignore[call-overload]


def test_metrics_and_lists_are_the_same_for_all(tmp_path: Path, as_ranks: AsRanks) -> None:
    def work(manager: CheckpointManager) -> tuple[object, ...]:
        for step, loss in enumerate([3.0, 1.0, 2.0]):
            manager.save(step, state(manager.rank, step), {"loss": loss})
        return (
            manager.best("loss"),
            manager.steps(),
            manager.exists(2),
            manager.resume_step(),
            manager.names(1),
        )

    found = as_ranks(2, tmp_path, work)
    assert found[0][:4] == found[1][:4] == (1, [0, 1, 2], True, 2)
    assert set(found[1][4]) - set(found[0][4]) == {"extra"}


# ---- failures ----


@pytest.mark.parametrize("method", ["_claim", "_open", "_write"])
def test_one_rank_fails_and_all_know(
    tmp_path: Path, as_ranks: AsRanks, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    real = getattr(saving._Save, method)
    harm = {"now": False}

    def sometimes(self: saving._Save, *args: Any) -> Any:
        if harm["now"] and self.group.rank == 1:
            raise OSError(5, "Input/output error")
        return real(self, *args)

    monkeypatch.setattr(saving._Save, method, sometimes)

    def work(manager: CheckpointManager) -> str:
        manager.save(0, state(manager.rank, 0))
        manager.group.exchange(None)
        harm["now"] = True
        with pytest.raises((ManagerError, WriteError)) as error:
            manager.save(1, state(manager.rank, 1))
        manager.group.exchange(None)
        harm["now"] = False
        check(manager.restore(), manager.rank, 0)  # type: ignore[arg-type]
        assert manager.steps() == [0]
        manager.save(1, state(manager.rank, 1))
        check(manager.restore(), manager.rank, 1)  # type: ignore[arg-type]
        return str(error.value)

    for said in as_ranks(2, tmp_path, work):
        assert "save of step 1: rank 1: " in said and "Input/output error" in said
    assert not [e for e in os.listdir(tmp_path) if e.startswith((".saving", ".trash"))]


def test_a_state_that_one_rank_cannot_save(tmp_path: Path, as_ranks: AsRanks) -> None:
    def work(manager: CheckpointManager) -> None:
        with pytest.raises(ManagerError, match="rank 0: state at f: a builtin"):
            manager.save(0, {"f": len if manager.rank == 0 else 1})
        assert manager.save(0, {"f": 1})

    as_ranks(2, tmp_path, work)


def test_broken_for_one_is_broken_for_all(tmp_path: Path, as_ranks: AsRanks) -> None:
    as_ranks(2, tmp_path, lambda m: [m.save(s, state(m.rank, s)) for s in (0, 1)])
    part = tmp_path / "step-00000001/rank-00001/state.json"
    part.write_bytes(part.read_bytes().replace(b'"rank"', b'"Rank"'))
    with pytest.warns(CheckpointWarning, match="COMMIT 1 IS BROKEN.*rank 1: "):
        found = as_ranks(2, tmp_path, lambda m: m.restore())
    for rank, each in enumerate(found):
        check(each, rank, 0)


def test_a_mixed_directory_is_no_commit(tmp_path: Path, as_ranks: AsRanks) -> None:
    """Parts of two saves of one step never pass for one commit."""
    for name, seed in (("a", 1), ("b", 2)):
        as_ranks(2, tmp_path / name, lambda m, s=seed: m.save(0, {"own": torch.tensor([m.rank, s])}))
    step = tmp_path / "a/step-00000000"
    shutil.copy(tmp_path / "b/step-00000000/rank-00001/state.safetensors", step / "rank-00001")
    with pytest.warns(CheckpointWarning), pytest.raises(ManagerError, match="no valid commit"):
        as_ranks(2, tmp_path / "a", lambda m: m.restore())
    (step / "fastckpt.json").unlink()
    shutil.copy(tmp_path / "b/step-00000000/fastckpt-rank-1.json", step)
    with CheckpointManager(tmp_path / "a", rank=0, world=1) as manager:
        assert manager.steps() == []


@pytest.mark.parametrize("other", ["look", "exchange"])
def test_ranks_that_do_other_things(tmp_path: Path, as_ranks: AsRanks, other: str) -> None:
    """No answer to another question is taken."""

    def work(manager: CheckpointManager) -> None:
        if manager.rank == 0:
            said = "rank 0 is at save of step 1, rank 1 at look for step 1"
            with pytest.raises(ManagerError, match=said if other == "look" else "rank 1 answered 5"):
                manager.save(1, {})
        elif other == "look":
            with pytest.raises(ManagerError, match="rank 1 is at look for step 1, rank 0 at save of step 1"):
                manager.exists(1)
        else:
            manager.group.exchange(5)

    as_ranks(2, tmp_path, work)
    assert not (tmp_path / "step-00000001").exists()


# ---- disks of nodes ----


def nodes(tmp_path: Path) -> dict[str, Any]:
    return {"root": [str(tmp_path / n) for n in "aabb"], "nodes": ["a", "a", "b", "b"]}


def meet_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks meet in a directory that is no rank's root."""
    meet = str(tmp_path / "meet")

    def joined(root: str, rank: int, world: int, timeout: float) -> tuple[Group, Group]:
        if world == 1:
            return Alone(), Alone()
        return Meeting(meet, rank, world, 20, "main"), Meeting(meet, rank, world, 20, "save")

    monkeypatch.setattr("fastckpt.manager.manager.join", joined)


def test_a_root_that_is_not_shared(
    tmp_path: Path, as_ranks: AsRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One path on two nodes' own disks: said before anything is written, and nothing is left there."""
    meet_elsewhere(tmp_path, monkeypatch)

    def work(manager: CheckpointManager) -> None:
        with pytest.raises(WriteError, match=r"rank 1: .*rank 0 made it and this rank does not see it"):
            manager.save(1, state(manager.rank))

    as_ranks(2, [tmp_path / "a", tmp_path / "b"], work)
    assert not [*(tmp_path / "a").glob(".saving-*"), *(tmp_path / "b").iterdir()]


def test_what_one_rank_sees_later(tmp_path: Path, as_ranks: AsRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS shows a rename to other nodes some seconds after it; a disk fails for one rank alone."""

    def work(manager: CheckpointManager) -> None:
        store, commit, steps = manager._store, manager._store.commit, manager._store.steps
        late = manager.rank == 1

        def fails(*step: int) -> None:
            raise WriteError("stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(store, "commit", lambda step: None if late else commit(step))
            assert manager.save(1, state(manager.rank, 1))
            assert manager.save(2, state(manager.rank, 1))
        with monkeypatch.context() as patch:
            patch.setattr(store, "commit", fails if late else commit)
            with pytest.raises(WriteError, match="rank 1: stale file handle"):
                manager.save(2, state(manager.rank, 1), overwrite=True)
        with monkeypatch.context() as patch:
            patch.setattr(store, "steps", fails if late else steps)
            with pytest.raises(WriteError, match="rank 1: stale file handle"):
                manager.rewind(1)
        assert manager.rewind(1) == [2]
        check(manager.restore(), manager.rank, 1)  # type: ignore[arg-type]

    as_ranks(2, tmp_path, work)


def test_disks_of_nodes(tmp_path: Path, as_ranks: AsRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks on two nodes: each node has a whole commit of its own; both or none count."""
    meet_elsewhere(tmp_path, monkeypatch)

    def save(manager: CheckpointManager) -> None:
        for step in range(3):
            manager.save(step, state(manager.rank, step))
        check(manager.restore(), manager.rank, 2)  # type: ignore[arg-type]

    where = nodes(tmp_path)
    as_ranks(4, where["root"], save, where["nodes"], max_to_keep=2)
    for node in "ab":
        assert verify(tmp_path / node / "step-00000002").ok
        assert sorted(e for e in os.listdir(tmp_path / node) if e.startswith("step")) == [
            "step-00000001",
            "step-00000002",
        ]
    shutil.rmtree(tmp_path / "b/step-00000002")  # node b was lost before its rename

    def resume(manager: CheckpointManager) -> None:
        assert not manager.exists(2) and manager.exists(1)
        assert manager.resume_step() == 1
        with pytest.raises(ManagerError, match=r"ranks \[2, 3\] have no whole commit of it"):
            manager.restore(2)
        check(manager.restore(), manager.rank, 1)  # type: ignore[arg-type]
        manager.save(2, state(manager.rank, 2))  # what node a has of it is no commit, and gives way
        check(manager.restore(2), manager.rank, 2)  # type: ignore[arg-type]

    as_ranks(4, where["root"], resume, where["nodes"])
    shutil.rmtree(tmp_path / "b/step-00000002")

    def clean(manager: CheckpointManager) -> None:
        assert manager.gc() == [] and manager.resume_step() == 1  # 2 stands on a alone
        manager.save(3, state(manager.rank, 3))
        check(manager.restore(), manager.rank, 3)  # type: ignore[arg-type]

    with CheckpointManager(tmp_path / "a", rank=0, world=1, max_to_keep=1) as alone:
        assert alone.gc() == []  # one node's disk does not show what stands on all
    as_ranks(4, where["root"], clean, where["nodes"], max_to_keep=1)
    for node in "ab":
        assert [e for e in os.listdir(tmp_path / node) if e.startswith("step")] == ["step-00000003"]


def test_a_step_of_two_saves(tmp_path: Path, as_ranks: AsRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of one node is of another run."""
    for node in "ab":
        with CheckpointManager(tmp_path / node) as manager:
            manager.save(0, {"n": node})
    meet_elsewhere(tmp_path, monkeypatch)

    def work(manager: CheckpointManager) -> None:
        assert not manager.exists(0) and manager.resume_step() is None
        with pytest.raises(ManagerError, match="the ranks have commits of different saves under this step"):
            manager.restore(0)

    with pytest.warns(CheckpointWarning, match="COMMIT 0 IS BROKEN.*different saves"):
        as_ranks(2, [tmp_path / "a", tmp_path / "b"], work, ["a", "b"])


# ---- meeting on the file system ----


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    with pytest.raises(ManagerError, match=r"rank 0 met 1 of 2 ranks in 0\.2 s; missing or not alive: \[1\]"):
        Meeting(str(tmp_path), 0, 2, 0.2, "main")


def test_files_of_a_dead_run_are_no_answer(tmp_path: Path, as_ranks: AsRanks) -> None:
    as_ranks(2, tmp_path, lambda m: m.save(0, state(m.rank)))
    assert os.listdir(tmp_path / ".fastckpt-meeting")
    with pytest.raises(ManagerError, match="rank 0 met"):
        Meeting(str(tmp_path), 0, 2, 0.3, "main")  # rank 1's files lie there, it does not


def test_a_rank_that_goes_silent(tmp_path: Path, as_ranks: AsRanks) -> None:
    def work(manager: CheckpointManager) -> None:
        group = Meeting(str(tmp_path / "m"), manager.rank, 2, 1.0, "own")
        assert group.exchange(manager.rank) == [0, 1]
        if manager.rank == 0:
            with pytest.raises(ManagerError, match="rank 1 did not answer"):
                group.exchange(None)

    as_ranks(2, tmp_path, work)


def test_where_the_ranks_meet_goes(tmp_path: Path, as_ranks: AsRanks) -> None:
    def work(manager: CheckpointManager) -> None:
        group = Meeting(str(tmp_path / "m"), manager.rank, 2, 60, "own")
        manager.group.exchange(None)
        if manager.rank == 0:
            shutil.rmtree(tmp_path / "m")
            said = r"rank 0 of 2: cannot reach the others: .*m/\.fastckpt-meeting: No such file"
            with pytest.raises(ManagerError, match=said):
                group.exchange(None)

    as_ranks(2, tmp_path, work)


def test_exchanges_stay_in_step(tmp_path: Path, as_ranks: AsRanks) -> None:
    def work(manager: CheckpointManager) -> None:
        for k in range(50):
            assert manager.group.exchange([manager.rank, k, "x" * k]) == [[r, k, "x" * k] for r in range(3)]

    as_ranks(3, tmp_path, work)
    assert len([e for e in os.listdir(tmp_path / ".fastckpt-meeting") if "main" in e]) <= 9


class OfTheJob(Exception):
    """What an optimizer of somebody's may raise."""


@pytest.mark.parametrize(
    "error", [KeyError("lr"), AttributeError("lr"), ZeroDivisionError("lr"), OfTheJob("lr")]
)
def test_what_a_state_dict_fails_with_is_heard_by_all(
    tmp_path: Path, as_ranks: AsRanks, error: Exception
) -> None:
    class Failing:
        def state_dict(self) -> dict[str, Any]:
            raise error

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def work(manager: CheckpointManager) -> None:
        with pytest.raises(ManagerError, match=f"rank 1: {type(error).__name__}: .*lr"):
            manager.save(1, {"x": Failing() if manager.rank else 1})
        assert manager.save(2, {"x": 1})

    as_ranks(2, tmp_path, work)


def test_the_class_of_an_error_is_the_same_everywhere(tmp_path: Path, as_ranks: AsRanks) -> None:
    def work(manager: CheckpointManager) -> None:
        def fail() -> None:
            raise WriteError("no") if manager.rank == 0 else ManagerError("never")

        with pytest.raises(ManagerError, match=r"^what: rank 1: never$"):
            together(manager.group, "what", fail)

    as_ranks(2, tmp_path, work)
