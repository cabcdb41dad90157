"""Mapped and positioned reads: truncation is survived and told, pages are given back."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastckpt.errors import SourceError
from fastckpt.executors.cpu import Cpu
from fastckpt.extents import Buffer
from fastckpt.planning.copies import COPY

_C = pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

MIB = 1 << 20


def resident(address: int) -> int:
    """Bytes of the mapping at `address` that this process has mapped in (smaps), the file's pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no mapping holds {address:#x}")


def peak() -> int:
    """The most bytes this process ever held (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def line(nbytes: int) -> np.ndarray:
    rows = np.zeros(1, COPY)
    rows["shape"][0] = [1, 1, 1, nbytes // 4]
    rows["src_stride"][0, 3] = rows["dst_stride"][0, 3] = 4
    return rows


def test_a_file_truncated_while_mapped(tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 256, 3 * MIB, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data)
    a, b = (_C.Mapping(str(tmp_path / n), len(data)) for n in "ab")
    assert (a.nbytes, a.path, a.faulted) == (len(data), str(tmp_path / "a"), False)
    before = _C.faults()
    os.truncate(tmp_path / "a", MIB)
    got = ctypes.string_at(a.address, len(data))
    assert got[:MIB] == data[:MIB] and not any(got[MIB:])
    assert a.faulted and not b.faulted and _C.faults() > before
    assert ctypes.string_at(b.address, len(data)) == data
    a.close()
    a.close()
    assert a.faulted and not b.faulted


@pytest.mark.parametrize("threads", [1, 2])
def test_the_executor_tells_of_a_truncated_source(tmp_path: Path, threads: int) -> None:
    n = 4 * MIB
    path = tmp_path / "a"
    path.write_bytes(bytes(n))
    m = _C.Mapping(str(path), n)
    out = np.empty(n, np.uint8)
    runner = Cpu().bind([Buffer(m, m.address, m.nbytes)])
    runner.run(line(n), [Buffer(out, out.ctypes.data, n)], threads)
    os.truncate(path, 3 * MIB)
    with pytest.raises(SourceError, match="shrank"):
        runner.run(line(n), [Buffer(out, out.ctypes.data, n)], threads)


def test_a_fault_elsewhere_still_kills(tmp_path: Path) -> None:
    """The handler passes on what is not its own: a plain mmap of a truncated file dies as ever."""
    script = f"""
import mmap, os
from fastckpt import _C
path = {str(tmp_path / "a")!r}
open(path, "wb").write(bytes(65536))
ours = _C.Mapping(path, 65536)
foreign = mmap.mmap(os.open(path, os.O_RDONLY), 65536, prot=mmap.PROT_READ)
os.truncate(path, 0)
foreign[40000]
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == -signal.SIGBUS, done.stderr


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(SourceError, match="wanted 4 bytes, the file has 3"):
        _C.Mapping(str(tmp_path / "a"), 4)
    with pytest.raises(SourceError, match="No such file"):
        _C.Mapping(str(tmp_path / "b"), 4)
    with pytest.raises(SourceError, match="not a regular file"):
        _C.Mapping(str(tmp_path), 0)
    empty = _C.Mapping(str(tmp_path / "a"), 0)
    assert empty.address == 0 and not empty.faulted


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["line", "transpose", "columns", "small rows"])
def test_copies_give_mapped_pages_back(tmp_path: Path, kind: str, threads: int) -> None:
    """The result is right and what stays mapped is bounded, however one big row walks its source."""
    n = 64 * MIB
    data = np.random.default_rng(3).integers(0, 1 << 32, n // 4, dtype=np.uint32).reshape(1024, -1)
    data.tofile(tmp_path / "a")
    wide = data.shape[1]
    m = _C.Mapping(str(tmp_path / "a"), n)
    rows = line(n)
    wanted = data
    if kind == "transpose":
        wanted = np.ascontiguousarray(data.T)
        rows["shape"][0] = [1, 1, wide, 1024]
        rows["src_stride"][0] = [0, 0, 4, wide * 4]
        rows["dst_stride"][0] = [0, 0, 4096, 4]
    if kind == "columns":
        wanted = np.ascontiguousarray(data[:, wide // 2 :])
        rows["src"] = wide * 2
        rows["shape"][0] = [1, 1, 1024, wide // 2]
        rows["src_stride"][0] = [0, 0, wide * 4, 4]
        rows["dst_stride"][0] = [0, 0, wide * 2, 4]
    if kind == "small rows":
        rows = np.repeat(rows, 4096)
        order = np.random.default_rng(4).permutation(4096)
        rows["src"] = rows["dst"] = order.astype(np.uint64) * np.uint64(n // 4096)
        rows["shape"][:, 3] = n // 4096 // 4
    out = np.full(wanted.shape, 1, np.uint32)
    runner = Cpu(recent_bytes=16 * MIB).bind([Buffer(m, m.address, m.nbytes)])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = peak()
    runner.run(rows, [Buffer(out, out.ctypes.data, out.nbytes)], threads)
    held = peak() - before  # the comparison below makes an array of its own
    assert np.array_equal(out, wanted)
    assert resident(m.address) <= 16 * MIB
    assert held < 16 * MIB + threads * 8 * MIB


def test_a_neighbouring_buffer_keeps_its_bytes(tmp_path: Path) -> None:
    """Giving back is by whole windows; nothing outside the mapping may lose its pages."""
    n = MIB + 4096
    (tmp_path / "a").write_bytes(bytes(n))
    around = []
    for i in range(64):  # some of these land beside the mapping
        around.append((np.full(17 * 4096, i, np.uint8), i))
    m = _C.Mapping(str(tmp_path / "a"), n)
    for i in range(64, 128):
        around.append((np.full(17 * 4096, i, np.uint8), i))
    out = np.ones(n, np.uint8)
    address = np.array([m.address], np.uint64)
    rows = line(n)
    _C.copy_rows(
        rows.view(np.uint8),
        address,
        np.array([out.ctypes.data], np.uint64),
        1,
        -1,
        _C.Recent(address, np.array([n], np.uint64), 0),
    )
    assert not out.any() and all((a == i).all() for a, i in around)


FORKING = """
import os, signal, sys, threading, time
from fastckpt import _C

sys.setswitchinterval(1e-5)
path, over = sys.argv[1], []

def busy():
    while not over:
        for mapping in [_C.Mapping(path, 4096) for _ in range(8)]:
            mapping.close()

threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads:
    thread.start()
end = time.monotonic() + 20
codes = set()
while time.monotonic() < end:
    if not (child := os.fork()):
        signal.alarm(60)
        _C.Mapping(path, 4096).close()
        os._exit(0)
    codes.add(os.waitpid(child, 0)[1])
over.append(None)
print(codes)
"""


@pytest.mark.nightly
def test_a_fork_while_another_thread_maps(tmp_path: Path) -> None:
    """A child has no thread that would release what was locked at that moment."""
    (tmp_path / "a").write_bytes(bytes(4096))
    command = [sys.executable, "-c", FORKING, tmp_path / "a"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=300).stdout == "{0}\n"
