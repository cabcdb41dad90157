"""Ranks that share a directory: each makes its part, and whoever comes last the whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastckpt.errors import WriteError
from fastckpt.output.manifest import Manifest
from fastckpt.output.part import Part
from fastckpt.output.writer import Output
from fastckpt.verification.outputs import verify
from outputs import (
    RECORD,
    contents,
    listing,
    write_part,
    write_rank,
    write_whole,
)


def test_a_finished_rank_is_skipped(tmp_path: Path) -> None:
    write_part(tmp_path / "out", 0, 1)
    before = contents(tmp_path)
    with Output(tmp_path / "out", key="key1", rank=0, world=2) as out:
        assert out.done(0) and not out.done(1)
    assert contents(tmp_path) == before
    with (
        Output(tmp_path / "out", key="key1", rank=1, world=2) as out,
        pytest.raises(WriteError, match="not done"),
    ):
        out.complete()
    os.truncate(tmp_path / "out/rank-00/rest.bin", 10)
    with Output(tmp_path / "out", key="key1", rank=0, world=2) as out:
        assert not out.done(0)
    write_part(tmp_path / "out", 0, 1)
    assert write_part(tmp_path / "out", 1, 1).complete
    after = contents(tmp_path)
    assert all(after[n] == d for n, d in before.items() if n != "out/fastckpt-rank-0.json")
    assert not any(n.startswith(".") for n in listing(tmp_path / "out"))


ORPHAN = """
import os, signal, sys, time
from fastckpt.output.writer import Output

with Output(sys.argv[1], key="key1", rank=0, world=2):
    if os.fork() == 0:  # a data worker, which outlives its trainer
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(60)
"""


def test_a_fork_does_not_keep_the_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline())
        try:
            with pytest.raises(WriteError, match="another run is making rank 0"):
                write_part(tmp_path / "out", 0, 1)
            run.kill()
            run.wait()
            write_part(tmp_path / "out", 0, 1)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_rank_of_a_set_that_one_process_made_is_done(tmp_path: Path) -> None:
    whole = write_whole(tmp_path / "out", 1)
    before = contents(tmp_path)
    assert write_part(tmp_path / "out", 1, 1) == whole
    assert contents(tmp_path) == before
    os.truncate(tmp_path / "out/rank-00/rest.bin", 10)
    write_part(tmp_path / "out", 1, 1)  # the set is not whole: its ranks are made again
    assert not verify(tmp_path / "out").ok
    write_part(tmp_path / "out", 0, 1)
    assert verify(tmp_path / "out").ok
    assert {n: d for n, d in contents(tmp_path).items() if "fastckpt" not in n} == {
        n: d for n, d in before.items() if "fastckpt" not in n
    }


def test_a_set_that_lost_a_file_is_not_completed(tmp_path: Path) -> None:
    write_part(tmp_path / "out", 0, 1)
    (tmp_path / "out/rank-00/rest.bin").unlink()
    with pytest.raises(WriteError, match=r"rank-00/rest.bin"):
        write_part(tmp_path / "out", 1, 1)
    assert not (tmp_path / "out/fastckpt.json").exists()
    write_part(tmp_path / "out", 0, 1)
    assert verify(tmp_path / "out").ok


def test_overwriting_a_set_by_ranks(tmp_path: Path) -> None:
    """Old files that are no part of the new set go; the old commit record goes before the first new file."""
    write_whole(tmp_path / "out", 1, world=3)
    write_part(tmp_path / "out", 1, 2, overwrite=True)
    assert not (tmp_path / "out/fastckpt.json").exists() and not verify(tmp_path / "out").ok
    assert write_part(tmp_path / "out", 0, 2).key == "key2"
    write_whole(tmp_path / "want", 2)
    got, want = contents(tmp_path / "out"), contents(tmp_path / "want")
    assert {n: d for n, d in got.items() if not n.startswith("fastckpt")} == {
        n: d for n, d in want.items() if not n.startswith("fastckpt")
    }
    assert verify(tmp_path / "out").ok and verify(tmp_path / "out").notes == ()
    # a larger world over a smaller, and back, each rank asking to overwrite
    for world, seed in ((3, 3), (1, 4)):
        for rank in range(world):
            write_part(tmp_path / "out", rank, seed, world=world, overwrite=True)
        assert verify(tmp_path / "out").problems == () and Manifest.read(tmp_path / "out").key == f"key{seed}"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "fastckpt-rank-0.json", "fastckpt.json", "rank-00"]  # fmt: skip


def test_a_record_that_goes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank of this set replaces it: the place is no other plan's."""
    write_part(tmp_path / "out", 0, 1)
    read = Part._read

    def late(self: Part, name: str) -> Manifest | None:
        if self.rank == 1 and name == "fastckpt-rank-0.json":
            monkeypatch.undo()
            (tmp_path / "out" / name).unlink()
        return read(self, name)

    monkeypatch.setattr(Part, "_read", late)
    assert not write_part(tmp_path / "out", 1, 1).complete
    assert write_part(tmp_path / "out", 0, 1).complete and verify(tmp_path / "out").ok


def test_overwriting_a_damaged_set(tmp_path: Path) -> None:
    """Nothing says which files were its own: those that may pass for weights are told by verify."""
    write_whole(tmp_path / "out", 1, world=3)
    (tmp_path / "out/fastckpt.json").write_bytes(b"{")
    with pytest.raises(
        WriteError, match=r"fastckpt\.json is of another plan \(unreadable, this one is key2\)"
    ):
        write_part(tmp_path / "out", 0, 2)
    for rank in range(2):
        write_part(tmp_path / "out", rank, 2, overwrite=True)
    assert Manifest.read(tmp_path / "out").key == "key2" and not list(tmp_path.glob("out/.*"))
    assert verify(tmp_path / "out").problems == tuple(
        f"rank-02/{name}: not in the manifest, a loader may take it for weights"
        for name in ("model.safetensors", "rest.bin")
    )


def test_the_old_set_stays_whole_until_the_first_rank_commits(tmp_path: Path) -> None:
    write_whole(tmp_path / "out", 1)
    with (
        pytest.raises(KeyError),
        Output(tmp_path / "out", key="key2", rank=0, world=2, overwrite=True) as out,
    ):
        write_rank(out, 0, 2)
        assert verify(tmp_path / "out").ok and Manifest.read(tmp_path / "out").key == "key1"
        raise KeyError
    assert verify(tmp_path / "out").ok and verify(tmp_path / "out").notes == ()


def test_ranks_at_once(tmp_path: Path) -> None:
    """Eight processes over an older output, as they come; the last completes the set."""
    write_whole(tmp_path / "out", 1, world=3)
    children = []
    for rank in range(8):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                time.sleep(0.002 * (rank * 5 % 8))
                write_part(tmp_path / "out", rank, 2, world=8, overwrite=True)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 8
    assert verify(tmp_path / "out").problems == () and Manifest.read(tmp_path / "out").complete
    write_whole(tmp_path / "want", 2, world=8)
    assert Manifest.read(tmp_path / "out").shards == Manifest.read(tmp_path / "want").shards


def test_a_rank_is_made_by_one_run_at_a_time(tmp_path: Path) -> None:
    """Who comes while another run makes the rank is told so, before any work, and disturbs nothing."""
    out = tmp_path / "out"
    with Output(out, key="key1", rank=0, world=1) as first:
        write_rank(first, 0, 1)
        for overwrite in (False, True):
            before = contents(out)
            with pytest.raises(WriteError, match=f"{out}: another run is making rank 0; run this one again"):
                write_part(out, 0, 1, world=1, overwrite=overwrite)
            assert contents(out) == before
        with Output(out, key="key1", rank=1, world=2):
            pass  # other ranks go on
        assert first.commit(RECORD).complete
    assert write_part(out, 0, 1, world=1).complete and verify(out).ok
    assert not any(n.startswith(".") for n in listing(out))


def test_a_rank_of_a_killed_run_is_free(tmp_path: Path) -> None:
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with Output(tmp_path / "out", key="key1", rank=0, world=2) as out:
                write_rank(out, 0, 1)
                os.write(told, b"!")
                time.sleep(600)
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"!"
    with pytest.raises(WriteError, match="another run is making rank 0"):
        write_part(tmp_path / "out", 0, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert any(n.startswith(".fastckpt-rank-0.") for n in listing(tmp_path / "out"))
    write_part(tmp_path / "out", 0, 1)
    assert write_part(tmp_path / "out", 1, 1).complete and verify(tmp_path / "out").ok
    assert not any(n.startswith(".") for n in listing(tmp_path / "out"))


def test_runs_of_the_same_rank_at_once(tmp_path: Path) -> None:
    """Of four processes that make one rank as they come, each made it, found it done, or was told why not."""
    for round in range(12):
        out = tmp_path / str(round) / "out"
        children = []
        for k in range(4):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    time.sleep(0.001 * (k * round % 5))
                    write_part(out, 0, 1, world=1)
                    status = 0
                except WriteError as e:
                    status = 4 if "another run is making rank 0" in str(e) else 1
                finally:
                    os._exit(status)
            children.append(pid)
        codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children}
        assert 0 in codes and codes <= {0, 4}
        assert verify(out).ok and not any(n.startswith(".") for n in listing(out))
