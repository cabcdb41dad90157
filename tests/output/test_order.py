"""Files are made and synced in an order that a crash, or another run, cannot upset."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from fastckpt.errors import WriteError
from fastckpt.output.writer import Output
from fastckpt.verification.outputs import verify
from outputs import (
    RECORD,
    write_part,
    write_rank,
    write_whole,
)


@pytest.mark.parametrize("rank", [None, 0])
@pytest.mark.parametrize("when", ["marker", "files"])
def test_a_directory_that_others_take_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None, when: str
) -> None:
    """Another run that gives up removes the directories it made, while this one is about to use them."""
    made = os.mkdir
    parents = {str(tmp_path / "new"), str(tmp_path / "new" / "out")}
    wanted = parents if when == "marker" else {str(tmp_path / "new" / "out" / "rank-00")}
    taken: list[str] = []

    def mkdir(path: str, *args: object) -> None:
        made(path, *args)  # type: ignore[arg-type]
        if path in wanted and taken.count(path) < 3:
            taken.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with Output(tmp_path / "new" / "out", key="k", rank=rank, world=1) as out:
        write_rank(out, 0, 1)
        out.commit(RECORD)
    assert verify(tmp_path / "new" / "out").ok
    assert len(taken) >= 3 or (rank is None and when == "files")


def test_ranks_that_give_up_never_disturb_others(tmp_path: Path) -> None:
    """Ranks start and give up in one new directory, many at once; whoever goes on finishes."""
    for round in range(6):
        path = tmp_path / str(round) / "out"
        errors: list[BaseException] = []

        def gives_up(path: Path = path, errors: list[BaseException] = errors) -> None:
            try:
                for _ in range(30):
                    try:
                        with Output(path, key="key1", rank=1, world=2):
                            raise KeyError
                    except KeyError:
                        pass
                    except WriteError as e:
                        if "another run is making rank 1" not in str(e):
                            raise
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=gives_up) for _ in range(3)]
        for thread in threads:
            thread.start()
        write_part(path, 0, 1)
        for thread in threads:
            thread.join()
        assert errors == []
        assert write_part(path, 1, 1).complete and verify(path).ok


def test_everything_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and directory of the output is fsynced before the rename, the parent after."""
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(fd: int) -> None:
        log.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def logged_rename(a: str, b: str) -> None:
        log.append("RENAME")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    write_whole(tmp_path / "out", 1)
    at = log.index("RENAME")
    staged = next(p for p in log if p.endswith("fastckpt.json")).removesuffix("/fastckpt.json")
    made = {p.replace(staged, str(tmp_path / "out")) for p in log[:at]}
    want = {str(p) for p in (tmp_path / "out").rglob("*")} | {str(tmp_path / "out")}
    assert made == want
    assert log[at + 1 :] == [str(tmp_path)]


def test_not_durable_never_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("fsync"))
    write_whole(tmp_path / "out", 1, durable=False)
    assert json.loads((tmp_path / "out/fastckpt.json").read_bytes())["key"] == "key1"
