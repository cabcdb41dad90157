"""`fastckpt manager`: list, verify, clean, restore, publish, and the way back."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastckpt
import pytest
import torch
from fastckpt.doors.manager_commands import add_parser, run
from fastckpt.errors import FastckptError, ManagerError, SourceError, WriteError
from fastckpt.manager.commits import TRASH
from fastckpt.manager.manager import CheckpointManager
from safetensors.torch import load_file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with CheckpointManager(tmp_path / "ck") as manager:
        for step in range(4):
            model = torch.nn.Linear(2, 3)
            torch.nn.init.constant_(model.weight, step)
            manager.save(step, {"model": model, "n": step}, {"loss": abs(1.5 - step)})
    return tmp_path / "ck"


def call(*words: object) -> int:
    top = argparse.ArgumentParser()
    add_parser(top.add_subparsers(dest="command"))
    return run(top.parse_args(["manager", *map(str, words)]))


def test_ls(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("ls", root) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[0] == "0" and said[2].endswith("loss=0.5") and said[-1] == f"4 commits in {root}"
    assert call("ls", root, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(c["step"], c["metrics"]["loss"]) for c in found] == [(0, 1.5), (1, 0.5), (2, 0.5), (3, 1.5)]
    (root / "nothing").mkdir()
    assert call("ls", root / "nothing") == 0
    assert capsys.readouterr().out.startswith("0 commits in")


def test_verify(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", root) == 0
    assert capsys.readouterr().out.endswith("4 commits, 0 broken\n")
    state = root / "step-00000002/rank-00000/state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    assert call("verify", root) == 1
    said = capsys.readouterr().out
    assert "step 2: BROKEN" in said and "differ from the manifest's digest" in said and "1 broken" in said
    assert call("verify", root, "--step", 1) == 0
    (root / "step-00000003/rank-00000/state.json").unlink()
    assert call("verify", root, "--json", "--step", 3) == 1
    capsys.readouterr()


def test_gc(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / ".saving-step-00000009-aa").mkdir()
    assert call("gc", root, "--max-to-keep", 1, "--keep-best", 1, "--metric", "loss", "--dry-run") == 0
    assert capsys.readouterr().out == "2 commits would go: 0, 1\n"
    assert (root / ".saving-step-00000009-aa").exists()
    assert call("gc", root) == 0
    assert capsys.readouterr().out == "0 commits went: none\n"
    assert not (root / ".saving-step-00000009-aa").exists()
    assert call("gc", root, "--max-to-keep", 1, "--keep-best", 1, "--metric", "loss") == 0
    assert sorted(e for e in os.listdir(root) if e.startswith("step")) == ["step-00000002", "step-00000003"]


def test_gc_by_period_and_by_the_largest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with CheckpointManager(root) as manager:
        manager.save(4, {"n": 4}, {"loss": 9.0})
        manager.save(5, {"n": 5}, {"loss": 0.0})
        assert manager.rewind(4) == [5]
    best = ("--keep-best", 1, "--metric", "loss", "--mode", "max")
    assert call("gc", root, "--keep-period", 3, "--dry-run") == 0
    assert capsys.readouterr().out == "2 commits would go: 1, 2\n"
    assert call("gc", root, *best) == 0
    assert capsys.readouterr().out == "4 commits went: 0, 1, 2, 3\n"
    assert [e for e in os.listdir(root) if e.startswith(".aside")]
    assert call("gc", root, "--aside") == 0
    assert not [e for e in os.listdir(root) if e.startswith(".aside")]


def test_restore(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("restore", root, tmp_path / "all") == 0
    found = load_file(tmp_path / "all/model.safetensors")
    assert set(found) == {"model.weight", "model.bias"} and found["model.weight"].unique().tolist() == [3.0]
    assert call("restore", root, tmp_path / "one", "--step", 1, "--names", "model.weight") == 0
    assert {n: t.unique().tolist() for n, t in load_file(tmp_path / "one/model.safetensors").items()} == {
        "model.weight": [1.0]
    }
    capsys.readouterr()
    with pytest.raises(ManagerError, match=r"no tensor 'weight'; near: model\.weight"):
        call("restore", root, tmp_path / "none", "--names", "weight")
    with pytest.raises(ManagerError, match="there is no rank 5"):
        call("restore", root, tmp_path / "none", "--rank", 5)
    state = root / "step-00000002/rank-00000/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SourceError, match="digest"):
        call("restore", root, tmp_path / "none", "--step", 2)
    assert not (tmp_path / "none").exists()


def test_restore_gives_each_rank_its_own(tmp_path: Path, as_ranks: Callable[..., list[Any]]) -> None:
    """As it was saved: what differs from rank to rank, NaN and infinity too."""

    def work(manager: CheckpointManager) -> None:
        mine = torch.tensor([float(manager.rank), torch.nan, -torch.inf])
        manager.save(1, {"w": torch.ones(4), "mine": mine})

    as_ranks(2, tmp_path / "ck", work)
    for rank in (0, 1):
        assert call("restore", tmp_path / "ck", tmp_path / f"{rank}", "--rank", rank) == 0
        found = load_file(tmp_path / f"{rank}/model.safetensors")
        assert torch.equal(found["w"], torch.ones(4))
        assert found["mine"].nan_to_num(9.0).tolist()[:2] == [rank, 9.0] and found["mine"][2] == -torch.inf
    with pytest.raises(SourceError, match=r"the commits of a training job; open one of them, such as .*0001"):
        fastckpt.open(tmp_path / "ck")


def test_verify_in_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not on this machine is brought first; what cannot be is broken."""
    fsspec = pytest.importorskip("fsspec")
    url, store = "memory://commands/ck", fsspec.filesystem("memory").store
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with CheckpointManager(url, scratch=tmp_path / "elsewhere") as manager:
        for step in range(3):
            manager.save(step, {"x": torch.full((9,), step)})
    assert call("verify", url) == 0
    brought = [p.name for p in (tmp_path / "cache").rglob("step-*")]
    assert brought == ["step-00000002"]  # one at a time
    name = "/commands/ck/step-00000001/rank-00000/state.safetensors"
    data = bytes(store[name].getbuffer())
    fsspec.filesystem("memory").pipe_file(name, data[:-1] + b"!")
    assert call("verify", url) == 1
    fsspec.filesystem("memory").pipe_file(name, data[:-1])
    assert call("verify", url) == 1
    with pytest.raises(SourceError, match="the record says"):
        call("verify", url, "--step", 1)
    store.clear()


def test_progress_is_told_as_lines(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, phase in (
        (("verify", root), "verify 3"),
        (("restore", root, tmp_path / "out"), "sync"),
        (("publish", root, "--to", tmp_path / "to", "--layout", "same"), "sync"),
    ):
        assert call(*words, "--json") == 0
        last = json.loads(capsys.readouterr().err.splitlines()[-1])
        assert last["phase"] == phase and last["done"] == last["total"]


def test_dry_runs_write_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("restore", root, tmp_path / "out", "--names", "model.bias", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "model.bias" in said and "model.weight" not in said
    to = ("publish", root, "--to", tmp_path / "served", "--layout", "same")
    assert call(*to, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert sorted(t["name"] for t in planned["tensors"]) == ["bias", "weight"]
    with pytest.raises(FastckptError, match="--back moves a link alone"):
        call(*to, "--back", "step-00000001", "--dry-run")
    assert not (tmp_path / "out").exists() and not (tmp_path / "served").exists()


def test_dry_runs_refuse_what_the_runs_would(root: Path, tmp_path: Path) -> None:
    for taken in ("out", "served/step-00000001"):
        (tmp_path / taken).mkdir(parents=True)
        (tmp_path / taken / "mine").touch()
    for words in (
        ("restore", root, tmp_path / "out"),
        ("publish", root, "--to", tmp_path / "served", "--step", 1, "--layout", "same"),
    ):
        for more in ([], ["--dry-run"]):
            with pytest.raises(WriteError, match="not empty \\(1 entries, mine first\\)"):
                call(*words, *more)
    again = ("publish", root, "--to", tmp_path / "again", "--step", 1, "--layout", "same")
    assert call(*again) == 0
    assert call(*again, "--dry-run") == 0
    for more in ([], ["--dry-run"]):
        with pytest.raises(ManagerError, match="is there already, of another save or made otherwise"):
            call(*again, "--dtype", "float64", *more)


def test_limits_and_silence(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        ("restore", root, tmp_path / "out"),
        ("publish", root, "--to", tmp_path / "served", "--step", 1, "--layout", "same"),
    )
    for each in words:
        for more in ([], ["--dry-run"]):
            with pytest.raises(WriteError, match="memory"):
                call(*each, "--memory", "1MB", *more)
        assert call(*each, "--memory", "200MB", "--threads", 1, "--quiet") == 0
        assert capsys.readouterr().out == ""


def test_publish_and_back(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "served"
    for step in (1, 3):
        assert call("publish", root, "--to", to, "--step", step, "--layout", "same") == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == "current: step-00000003 of step-00000001, step-00000003"
    )
    assert load_file(to / "current/model.safetensors")["weight"].unique().tolist() == [3.0]
    assert call("publish", root, "--to", to, "--back", "step-00000001", "--json") == 0
    assert json.loads(capsys.readouterr().out)["current"] == "step-00000001"
    assert load_file(to / "current/model.safetensors")["weight"].unique().tolist() == [1.0]


@pytest.mark.parametrize("words", [["ls"], ["verify"], ["gc"], ["gc", "--dry-run"], ["restore", "OUT"]])
def test_a_root_that_is_not_there(tmp_path: Path, words: list[str]) -> None:
    """A word mistyped makes no new root, and is no root without commits."""
    action, *more = words
    with pytest.raises(SourceError, match=r"runs/kc: no such directory") as failed:
        call(action, tmp_path / "runs/kc", *(str(tmp_path / "out") if w == "OUT" else w for w in more))
    assert failed.value.exit_code == 3
    assert os.listdir(tmp_path) == []


def test_publish_as_reshard_does(root: Path, tmp_path: Path) -> None:
    """The options of `fastckpt reshard`, with their meaning."""
    to = tmp_path / "served"
    assert call("publish", root, "--to", to, "--layout", "same", "--dtype", "bfloat16", "--tp", 1) == 0
    assert load_file(to / "current/model.safetensors")["weight"].dtype == torch.bfloat16
    with pytest.raises(FastckptError, match="--quant-include and --quant-exclude go with --quant SCHEME"):
        call("publish", root, "--to", to, "--layout", "same", "--quant-include", "*")
    with pytest.raises(FastckptError, match="tensor_parallel"):
        call("publish", root, "--to", to, "--layout", "same", "-L", "tensor_parallel=9")


def test_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ManagerError, match="holds no commits"):
        call("publish", tmp_path, "--to", tmp_path / "served")
    with pytest.raises(ManagerError, match="holds no commits"):  # proves nothing
        call("verify", tmp_path)
    (tmp_path / f"{TRASH}old").write_text("another program's")
    for more in ([], ["--dry-run"]):
        with pytest.raises(ManagerError, match="holds no commits"):
            call("gc", tmp_path, *more)
    assert os.listdir(tmp_path) == [f"{TRASH}old"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "nosuch://x"], "needs fsspec and its package"),
        (["ls", "R", "--step-digits", "0"], "gives no plain file name"),
        (["ls", "R", "--step-prefix", "../x"], "gives no plain file name"),
        (["gc", "R", "--max-to-keep", "0"], "max_to_keep: wanted at least 1, got 0"),
        (["gc", "R", "--keep-best", "1"], "keep_best goes with best_metric (--metric)"),
        (["verify", "R", "--step", "9"], "step-00000009: no such directory"),
        (["restore", "R", "OUT", "--step", "-1"], "steps count from 0"),
        (["restore", "R", "OUT", "--step", "9"], "no such file"),
        (["publish", "R", "--to", "OUT", "--step", "9"], "no such file"),
        (["publish", "R", "--to", "OUT", "--part", "none"], "no part 'none'; it has model, n"),
        (["publish", "R", "--to", "OUT", "--back", "../x"], "is no plain name"),
        (["publish", "R", "--to", "OUT", "--back", "v9"], "no whole version 'v9'"),
        (["publish", "R", "--to", "OUT", "--back", "v9", "--keep", "2"], "--back v9: moves a link alone"),
        (["publish", "R", "--to", "OUT", "--back", "v9", "--part", "m", "--step", "1"], "out --step, --part"),
        (["publish", "R", "--to", "OUT", "--back", "v9", "--tp", "2", "-L", "a=b"], "out --tp, -L"),
        (["publish", "R", "--to", "OUT", "--back", "v9", "--max-shard-size", "none"], "out --max-shard-size"),
    ],
)
def test_bad_inputs(root: Path, tmp_path: Path, words: list[str], said: str) -> None:
    places = {"R": str(root), "OUT": str(tmp_path / "out")}
    with pytest.raises(FastckptError, match=re.escape(said)):
        call(*(places.get(w, w) for w in words))
    assert not (tmp_path / "out/current").is_symlink()
    assert call("verify", root) == 0


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="Not a directory"):
        call("ls", tmp_path / "file")
