"""Output: what it refuses, what it leaves behind, what is on disk when it is done."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fastckpt.dtypes import BY_NAME
from fastckpt.errors import SourceError, WriteError
from fastckpt.output import part, syscalls, whole
from fastckpt.output.files import FileLayout, SlotTable, safetensors_layout
from fastckpt.output.manifest import Manifest
from fastckpt.output.writer import Output
from fastckpt.verification.outputs import verify
from outputs import (
    RECORD,
    SPECS,
    contents,
    data_of,
    fill,
    layouts_of,
    listing,
    write_part,
    write_rank,
    write_whole,
)

NO_TENSORS = SlotTable.of((), (), ())
BIG = safetensors_layout("big.safetensors", [("w", BY_NAME["uint8"], (8 << 20,))], {})


# ---- what comes out ----


@pytest.mark.parametrize("durable", [True, False])
def test_files_hold_the_tensors(tmp_path: Path, durable: bool) -> None:
    manifest = write_whole(tmp_path / "new" / "out", 1, durable=durable)
    out, data = tmp_path / "new" / "out", data_of(SPECS, 1)
    assert manifest == Manifest.read(out)
    loaded = safetensors.torch.load_file(out / "rank-00/model.safetensors")
    rest = torch.load(out / "rank-00/rest.bin", weights_only=True)
    assert loaded["a.weight"].numpy().tobytes() == data["a.weight"]
    assert loaded["b.bias"].view(torch.uint8).numpy().tobytes() == data["b.bias"]
    assert rest["d.scalar"].numpy().tobytes() == data["d.scalar"] and rest["tied"] is rest["d.scalar"]
    for shard in manifest.shards:
        for name, t in shard.tensors.items():
            raw = (out / t.file).read_bytes()[t.offset : t.offset + t.nbytes]
            assert raw == data_of(SPECS, 1 + 100 * shard.rank)[name]
    assert {n: f.nbytes for n, f in manifest.all_files().items()} == {
        n: len(d) for n, d in contents(out).items() if n != "fastckpt.json"
    }
    assert manifest.shards[1].aliases == {"tied": "d.scalar"}
    assert listing(tmp_path / "new") == ["out"]


def test_both_modes_write_the_same_files(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", 1)
    assert not write_part(tmp_path / "b", 1, 1).complete
    assert write_part(tmp_path / "b", 0, 1).complete
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    for name in ("fastckpt.json", "fastckpt-rank-0.json", "fastckpt-rank-1.json"):
        a.pop(name, None)
        b.pop(name)
    assert a == b
    assert Manifest.read(tmp_path / "a").shards == Manifest.read(tmp_path / "b").shards


def test_threads_write_one_file(tmp_path: Path) -> None:
    data = os.urandom(8 << 20)
    with Output(tmp_path / "out", key="k") as out:
        file = out.create(BIG)
        start, step = BIG.slots[0].offset, 1 << 18
        jobs = [
            threading.Thread(target=file.write, args=(start + k, memoryview(data)[k : k + step]))
            for k in range(0, len(data), step)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        file.close({}, np.zeros(1, np.uint64))
        out.commit(RECORD)
    assert (tmp_path / "out/big.safetensors").read_bytes()[start:] == data


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    write_whole(tmp_path / "out", 1)
    monkeypatch.undo()
    assert verify(tmp_path / "out").problems == ()


def test_a_file_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(WriteError, match=r"out/rank-00/model\.safetensors.*: the file takes no more bytes"):
        write_whole(tmp_path / "out", 1)
    assert listing(tmp_path) == []


def test_copies(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"x" * (2 << 20) + b"y")
    with Output(tmp_path / "out", key="k") as out:
        out.copy(tmp_path / "tokenizer.json")
        for odd in (tmp_path, tmp_path / "none"):
            with pytest.raises(SourceError, match="no such file"):
                out.copy(odd)
        out.commit(RECORD)
    same = (tmp_path / "tokenizer.json").read_bytes()
    assert {n: d for n, d in contents(tmp_path / "out").items() if n != "fastckpt.json"} == {
        "tokenizer.json": same
    }


@pytest.mark.parametrize("old", [False, True])
def test_a_private_directory_stays_private(tmp_path: Path, old: bool) -> None:
    out = tmp_path / "out"
    if old:
        write_whole(out, 1)
    else:
        out.mkdir()
    out.chmod(0o2750)
    write_whole(out, 1, overwrite=old)
    assert stat.S_IMODE(out.stat().st_mode) == 0o2750


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives a directory any group")
def test_a_group_that_is_not_ours_is_given_no_more_than_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for mode, then in ((0o770, 0o700), (0o755, 0o755), (0o574, 0o744)):
        out.mkdir()
        os.chown(out, -1, out.stat().st_gid + 1)
        out.chmod(mode)
        with monkeypatch.context() as patch:
            patch.setattr(os, "chown", lambda *_: (_ for _ in ()).throw(PermissionError()))
            write_whole(out, 1)
        assert stat.S_IMODE(out.stat().st_mode) == then
        shutil.rmtree(out)
    out.mkdir()
    os.chown(out, -1, out.stat().st_gid + 1)
    group = out.stat().st_gid
    write_whole(out, 1)
    assert out.stat().st_gid == group


# ---- what is refused ----


def test_refuses_a_directory_in_use(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_whole(out, 1)  # empty is fine
    before = contents(tmp_path)
    with pytest.raises(WriteError, match="not empty"):
        write_whole(out, 2)
    (tmp_path / "file").write_bytes(b"x")
    for rank in (None, 0):
        for below, said in (("", "exists and is no directory"), ("/out", "file(/out)?: Not a directory")):
            place = f"{tmp_path}/file{below}"
            with pytest.raises(WriteError, match=said), Output(place, key="k", rank=rank):
                pass
        with (
            pytest.raises(WriteError, match=r"/proc/out.*: No such file"),
            Output("/proc/out/x", key="k", rank=rank),
        ):
            pass  # as where every directory that is made is gone at once
    (tmp_path / "file").unlink()
    with pytest.raises(WriteError, match="mount point"), Output("/", key="k"):
        pass
    assert contents(tmp_path) == before and listing(tmp_path) == ["out"]


def test_refuses_a_foreign_directory_for_a_rank(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"mine")
    with pytest.raises(WriteError, match="no output of fastckpt"):
        write_part(tmp_path, 0, 1)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_refuses_a_rank_of_another_plan(tmp_path: Path) -> None:
    write_part(tmp_path / "out", 0, 1)
    before = contents(tmp_path)
    with pytest.raises(
        WriteError, match=r"fastckpt-rank-0.json is of another plan \(key1, this one is key2\)"
    ):
        write_part(tmp_path / "out", 1, 2)
    write_part(tmp_path / "out", 1, 1)
    with pytest.raises(
        WriteError, match=r"fastckpt-rank-0.json is of another plan|fastckpt.json is of another plan"
    ):
        write_part(tmp_path / "out", 1, 2)
    assert {n: contents(tmp_path)[n] for n in before} == before


def test_no_other_ranks_records_are_read_before_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = part.Part._record
    monkeypatch.setattr(part.Part, "_record", lambda self, rank: (read.append(rank), real(self, rank))[1])
    for rank in (1, 2, 0):
        write_part(tmp_path, rank, 1, world=4)
    assert read == [1, 2, 0]  # each its own, whether it is done
    write_part(tmp_path, 3, 1, world=4)
    assert read[3:] == [3, 0, 1, 2, 3]


def test_refuses_to_replace_what_it_reads(tmp_path: Path) -> None:
    write_whole(tmp_path / "out", 1)
    source = tmp_path / "out" / "rank-00"
    for rank in (None, 0):
        with (
            pytest.raises(WriteError, match="which this run reads"),
            Output(tmp_path / "out", key="k", rank=rank, overwrite=True, keep=[str(source)]),
        ):
            pass
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    "name", ["../x", "/x", "", "a/../b", "fastckpt.json", "fastckpt-rank-0.json", ".fastckpt-x"]
)
def test_refuses_names(tmp_path: Path, name: str) -> None:
    with Output(tmp_path / "out", key="k") as out:
        with pytest.raises(WriteError, match="file name"):
            out.text(name, b"")
        with pytest.raises(WriteError, match="file name"):
            out.create(FileLayout(name, 0, NO_TENSORS, ()))


def test_refuses_half_a_file(tmp_path: Path) -> None:
    layout = layouts_of(0)[0]
    data = data_of(SPECS, 1)
    digests = np.zeros(len(layout.slots), np.uint64)
    with Output(tmp_path / "out", key="k") as out:
        file = out.create(layout)
        with pytest.raises(WriteError, match="written twice"):
            out.create(layout)
        for offset in (-1, layout.nbytes):
            with pytest.raises(WriteError, match="of a file of"):
                file.write(offset, memoryview(b"x"))
        with pytest.raises(WriteError, match="bytes of its tensors were not written"):
            file.close({}, digests)
        with pytest.raises(WriteError, match="was not closed"):
            out.commit(RECORD)
        for s in layout.slots:
            file.write(s.offset, memoryview(data[s.name]))
        with pytest.raises(WriteError, match="digests for"):
            file.close({}, digests[1:])
        file.close({}, digests)
        with pytest.raises(WriteError, match="also in"):
            fill(out, replace(layout, path="again"), data)
    assert listing(tmp_path) == []


def test_refuses_a_layout_with_a_hole(tmp_path: Path) -> None:
    with Output(tmp_path / "out", key="k") as out:
        for nbytes, fixed in (
            (10, ((0, b"abc"),)),
            (10, ((0, b"abc"), (4, b"abcdef"))),
            (5, ((0, b"abc"), (2, b"abc"))),
        ):
            file = out.create(FileLayout(f"x{nbytes}{len(fixed)}", nbytes, NO_TENSORS, fixed))
            with pytest.raises(WriteError, match="layout"):
                file.close({}, np.empty(0, np.uint64))


def test_reserve(tmp_path: Path) -> None:
    with (
        Output(tmp_path / "a" / "out", key="k") as out,
        pytest.raises(WriteError, match=r"needs \d+ bytes, .* free"),
    ):
        out.reserve(1 << 60)
    assert listing(tmp_path) == []


# ---- failures leave nothing ----


def failing(name: str, code: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a call raise from its `after`-th time on."""
    module = syscalls if hasattr(syscalls, name) else os
    real: Callable[..., object] = getattr(module, name)
    calls = 0

    def call(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("allocate", errno.ENOSPC, "no space left"),
        ("pwrite", errno.ENOSPC, "no space left"),
        ("pwrite", errno.EIO, "Input/output error"),
        ("pwrite", errno.EDQUOT, "quota"),
        ("fsync", errno.EIO, "Input/output error"),
        ("mkdir", errno.EACCES, "Permission denied"),
        ("rename", errno.EIO, "Input/output error"),
        ("exchange", errno.EIO, "Input/output error"),
    ],
)
def test_a_failing_call_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool, name: str, code: int, said: str
) -> None:
    if old:
        write_whole(tmp_path / "out", 1)
    before = contents(tmp_path)
    seen = 0
    for after in range(200):
        failing(name, code, after, monkeypatch)
        try:
            write_whole(tmp_path / "out", 2, overwrite=True)
        except WriteError as e:
            assert said in str(e)
            monkeypatch.undo()
            assert listing(tmp_path) == (["out"] if (tmp_path / "out").exists() else [])
            assert contents(tmp_path) == before
            seen += 1
        else:
            monkeypatch.undo()
            break
    if name != ("rename" if old else "exchange"):
        assert seen >= 1
    assert verify(tmp_path / "out").ok and Manifest.read(tmp_path / "out").key == "key2"
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["allocate", "pwrite", "fsync", "replace", "write"])
def test_a_failing_call_leaves_no_file_of_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for after in range(40):
        failing(name, errno.ENOSPC, after, monkeypatch)
        try:
            write_part(tmp_path / "out", 0, 1)
        except WriteError as e:
            assert "no space left" in str(e)
        else:
            break
        finally:
            monkeypatch.undo()
        left = contents(tmp_path)
        assert left == {} or "out/fastckpt-rank-0.json" in left  # committed; the fsync after it failed
    write_part(tmp_path / "out", 0, 1)
    assert write_part(tmp_path / "out", 1, 1).complete and verify(tmp_path / "out").ok
    assert not any(n.startswith(".") for n in listing(tmp_path / "out"))


def test_no_exchange_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "out", 1)
    before = contents(tmp_path)
    monkeypatch.setattr(syscalls, "_renameat2", None)
    with (
        pytest.raises(WriteError, match="cannot exchange two directories"),
        Output(tmp_path / "out", key="k", overwrite=True),
    ):
        pytest.fail("work began")
    assert contents(tmp_path) == before and listing(tmp_path) == ["out"]


def test_a_file_too_large_for_the_process(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel itself says no, at creation where blocks are reserved."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(WriteError, match="File too large"), Output(tmp_path / "out", key="k") as out:
            out.create(BIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(tmp_path) == []


def test_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_fallocate", "_sync_file_range", "_malloc_trim"):
        monkeypatch.setattr(syscalls, name, None)
    syscalls.give_back()
    write_whole(tmp_path / "out", 1)
    assert verify(tmp_path / "out").ok
    monkeypatch.setattr(syscalls, "_renameat2", None)
    with pytest.raises(WriteError, match="cannot exchange"):
        write_whole(tmp_path / "out", 2, overwrite=True)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """No reserving, no syncing of directories, no locks, no exchange, as on some network file systems."""

    def cannot(*args: object) -> int:
        ctypes.set_errno(code)
        return -1

    for name in ("_fallocate", "_sync_file_range", "_renameat2"):
        monkeypatch.setattr(syscalls, name, cannot)
    fsync = os.fsync

    def of_files_only(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(fd)

    def no_lock(fd: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", of_files_only)
    monkeypatch.setattr(fcntl, "flock", no_lock)
    write_whole(tmp_path / "out", 1)
    assert verify(tmp_path / "out").ok
    before = contents(tmp_path / "out")
    with pytest.raises(WriteError, match="cannot exchange"):
        write_whole(tmp_path / "out", 2, overwrite=True)
    assert contents(tmp_path / "out") == before and listing(tmp_path) == ["out"]
    write_part(tmp_path / "parts", 1, 1)
    assert write_part(tmp_path / "parts", 0, 1).complete and verify(tmp_path / "parts").ok


@pytest.mark.parametrize("removed", [True, False])
def test_a_staging_directory_that_another_run_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    """Of another container, between its making and its lock: files written there would go."""
    lock, asked = whole._lock, []

    def swept(directory: str) -> int:
        asked.append(directory)
        if len(asked) == 1:
            fd = lock(directory) if removed else -1  # it has ended, or has the lock still
            os.rmdir(directory)
            return fd
        return lock(directory)

    monkeypatch.setattr(whole, "_lock", swept)
    write_whole(tmp_path / "out", 1)
    assert len(set(asked)) == 2 and verify(tmp_path / "out").ok and listing(tmp_path) == ["out"]


def test_a_full_disk_is_found_before_the_old_set_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        write_part(tmp_path / "out", rank, 0)
    before = contents(tmp_path / "out")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(part, "write_file", full)
    with pytest.raises(WriteError, match="no space left"):
        write_part(tmp_path / "out", 0, 1, overwrite=True)
    assert contents(tmp_path / "out") == before and verify(tmp_path / "out").ok


def test_an_old_output_that_may_not_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "out", 0)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    with Output(tmp_path / "out", key="k", world=2, overwrite=True) as out:
        write_rank(out, 0, 1)
        write_rank(out, 1, 1)
        assert out.notes == ()
        out.commit(RECORD)
    (left,) = (name for name in listing(tmp_path) if name != "out")
    assert out.notes == (f"{tmp_path / left}: the old output, which this user may not remove",)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("rank", ["None", "0"])
def test_signals_leave_nothing(tmp_path: Path, number: int, rank: str) -> None:
    code = f"""
import sys, time
from fastckpt.output.writer import Output
from fastckpt.output.files import FileLayout, SlotTable
with Output({str(tmp_path / "new" / "out")!r}, key="k", rank={rank}) as out:
    out.create(FileLayout("sub/x", 3, SlotTable.of((), (), ()), ((0, b"abc"),)))
    print("ready", flush=True)
    for _ in range(12000):  # a signal just before a long sleep would be heard after it
        time.sleep(0.01)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    assert contents(tmp_path)
    child.send_signal(number)
    assert child.wait(60) != 0
    child.stdout.close()
    assert listing(tmp_path) == []


@pytest.mark.parametrize("rank", [None, 0])
@pytest.mark.parametrize(("second", "code"), [("SIGINT", 7), ("SIGTERM", -signal.SIGTERM)])
def test_impatience_leaves_nothing(tmp_path: Path, rank: int | None, second: str, code: int) -> None:
    """Another signal while the first Ctrl-C is cleaned up after: it waits, and is heard then."""
    program = f"""
import os, shutil, signal, sys
from fastckpt.output.writer import Output
from fastckpt.output.files import FileLayout, SlotTable
signals = [signal.{second}]
def again(real):
    def call(*args, **kwargs):
        if signals:
            signal.raise_signal(signals.pop())
        return real(*args, **kwargs)
    return call
try:
    with Output({str(tmp_path / "new" / "out")!r}, key="k", rank={rank}) as out:
        out.create(FileLayout("sub/x", 3, SlotTable.of((), (), ()), ((0, b"abc"),)))
        shutil.rmtree, os.unlink = again(shutil.rmtree), again(os.unlink)
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    sys.exit(7 if not signals else 1)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == code
    assert listing(tmp_path) == []


def test_who_ignores_signals_is_left_alone(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Output(tmp_path / "out", key="k"):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Output(tmp_path / "out", key="k") as out:
        (mine,) = listing(tmp_path)
        host = mine.removeprefix(".out.fastckpt-").rsplit("-", 2)[0]
        dead = subprocess.Popen(["true"])
        dead.wait()
        stale = tmp_path / f".out.fastckpt-{host}-{dead.pid}-0123abcd"
        kept = [
            tmp_path / f".out.fastckpt-{host}-{os.getpid()}-0123abcd",
            tmp_path / f".out.fastckpt-other_host-{dead.pid}-0123abcd",
            tmp_path / f".out2.fastckpt-{host}-{dead.pid}-0123abcd",
        ]
        for path in (stale, *kept):
            path.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError())
            )  # it lives, another user's
            with Output(tmp_path / "out", key="k"):
                assert stale.exists()
        with Output(tmp_path / "out", key="k"):
            assert not stale.exists() and all(path.exists() for path in kept)
        assert out.path and (tmp_path / mine).exists()


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127, "x" * 129])
def test_long_names(tmp_path: Path, name: str) -> None:
    """The staging directory has a shorter one, which is found again."""
    with Output(tmp_path / name, key="k"):
        (mine,) = listing(tmp_path)
    stale = tmp_path / re.sub("-[0-9]+-[0-9a-f]{8}$", f"-{2**30}-0123abcd", mine)
    stale.mkdir()
    write_whole(tmp_path / name, 1)
    assert listing(tmp_path) == [name] and verify(tmp_path / name).ok
    for rank in (None, 0):
        with (
            pytest.raises(WriteError, match="xxxx: File name too long"),
            Output(tmp_path / ("x" * 256), key="k", rank=rank),
        ):
            pass
    assert listing(tmp_path) == [name]


@pytest.mark.parametrize("there", [False, True])
def test_of_two_whole_outputs_one_wins(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with Output(out, key="key2", world=2) as late:
        write_rank(late, 0, 2)
        write_rank(late, 1, 2)
        write_whole(out, 1)
        before = contents(out)
        with pytest.raises(WriteError, match=f"{out}: another run put something there meanwhile"):
            late.commit(RECORD)
    assert contents(out) == before and verify(out).ok and listing(tmp_path) == ["out"]
