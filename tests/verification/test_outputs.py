"""verify: finds every change, raises no false alarm, says what it could not check."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fastckpt.dtypes import BY_NAME, DTYPES
from fastckpt.errors import SourceError
from fastckpt.finite import nonfinite
from fastckpt.output.files import safetensors_layout
from fastckpt.output.writer import Output
from fastckpt.verification.outputs import verify
from outputs import RECORD, contents, data_of, fill, write_part, write_whole
from torch_types import of_torch

MANY = [pytest.param(200, id="some"), pytest.param(10_000, id="many", marks=pytest.mark.nightly)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output of two ranks, and one tensor of several leaves."""
    specs = [("big", BY_NAME["bfloat16"], (1300, 1000)), ("row", BY_NAME["float32"], (1000,))]
    with Output(tmp_path / "out", key="k", world=2) as o:
        for rank in range(2):
            cycle = bytes(range(1, 0x3F)) + bytes([rank])
            data = {"big": (cycle * 42_000)[:2_600_000], "row": (cycle * 70)[:4000]}
            fill(o, safetensors_layout(f"r{rank}.safetensors", specs, {"format": "pt"}), data, rank)
        o.text("config.json", b'{"a": 1}')
        o.commit(RECORD)
    return tmp_path / "out"


def test_sound(out: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = verify(out, threads=3, progress=lambda *said: seen.append(said))
    assert (report.ok, report.problems, report.notes) == (True, (), ())
    assert (report.files, report.tensors, report.bytes) == (3, 4, 2 * 2_604_000)
    assert seen[-1] == (report.bytes, report.bytes, "verify") and seen == sorted(seen)


@pytest.mark.parametrize("many", MANY)
def test_every_flipped_bit_is_found(tmp_path: Path, many: int) -> None:
    """Bits anywhere in any file: tensors, headers, zip structure, pickles, texts, the manifest."""
    write_whole(tmp_path / "out", 1)
    before = contents(tmp_path / "out")
    bits = [(name, k) for name, data in before.items() for k in range(8 * len(data))]
    rng = random.Random(many)
    spread = [(name, rng.randrange(8 * len(data))) for name, data in before.items() for _ in range(3)]
    for name, k in [*spread, *rng.sample(bits, min(many, len(bits)))]:
        broken = bytearray(before[name])
        broken[k // 8] ^= 1 << k % 8
        (tmp_path / "out" / name).write_bytes(broken)
        report = verify(tmp_path / "out", threads=1)
        assert not report.ok and name in report.problems[0], (name, k)
        (tmp_path / "out" / name).write_bytes(before[name])
    assert verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize("many", MANY)
def test_truncated_zeroed_swapped(tmp_path: Path, many: int) -> None:
    write_whole(tmp_path / "out", 1)
    root, before, rng = tmp_path / "out", contents(tmp_path / "out"), random.Random(many)
    for _ in range(many // 2):
        name = rng.choice(list(before))
        data, what = before[name], rng.choice(["cut", "grown", "zeros", "gone", "directory"])
        if what == "cut":
            (root / name).write_bytes(data[: rng.randrange(len(data))])
        elif what == "grown":
            (root / name).write_bytes(data + b"\0")
        elif what == "zeros":
            at = rng.randrange(len(data))
            (root / name).write_bytes(data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :])
            if (root / name).read_bytes() == data:
                continue
        else:
            (root / name).unlink()
            if what == "directory":
                (root / name).mkdir()
        report = verify(root, threads=1)
        assert not report.ok and name in report.problems[0], (name, what)
        if what == "directory":
            (root / name).rmdir()
        (root / name).write_bytes(data)
    assert verify(root).problems == ()


def test_files_of_equal_size_swapped(tmp_path: Path) -> None:
    write_whole(tmp_path / "out", 1)
    for name in ("model.safetensors", "rest.bin", "index.json"):
        a, b = (tmp_path / "out" / f"rank-0{r}" / name for r in range(2))
        a.rename(tmp_path / "x")
        b.rename(a)
        (tmp_path / "x").rename(b)
        assert len(verify(tmp_path / "out").problems) >= 2
        a.rename(tmp_path / "x")
        b.rename(a)
        (tmp_path / "x").rename(b)
    assert verify(tmp_path / "out").ok


def test_a_tensor_is_named(out: Path) -> None:
    """Bits of the second leaf, at the end of a tensor, in each rank's file."""
    for rank in range(2):
        path = out / f"r{rank}.safetensors"
        data = bytearray(path.read_bytes())
        start = len(data) - 2_600_000
        for at in (start + (1 << 20) + 5, len(data) - 1):
            data[at] ^= 16
            path.write_bytes(data)
            report = verify(out)
            assert report.problems == (
                f"r{rank}.safetensors: big: its bytes differ from the manifest's digest",
            )
            data[at] ^= 16
        path.write_bytes(data)
    assert verify(out).ok


def test_extra_files(out: Path) -> None:
    (out / "README.md").write_bytes(b"hello")
    report = verify(out)
    assert report.ok and report.notes == ("README.md: not in the manifest, not checked",)
    for name in (
        "model.safetensors",
        "sub/pytorch_model.bin",
        "x.safetensors.index.json",
        "fastckpt-rank-7.json",
    ):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"x")
        assert verify(out).problems == (f"{name}: not in the manifest, a loader may take it for weights",)
        (out / name).unlink()


def test_many_extra_files_are_one_note(out: Path) -> None:
    for k in range(3000):
        (out / f"log-{k:04}.txt").write_bytes(b"")
    (note,) = verify(out).notes
    assert note.startswith("3000 files not in the manifest, not checked: log-0000.txt, ")
    assert note.endswith(" and 2995 more")


@pytest.mark.parametrize("how", ["missing", "fifo", "directory"])
def test_a_file_that_cannot_be_read_is_one_problem(out: Path, how: str) -> None:
    (out / "r1.safetensors").unlink()
    if how == "fifo":
        os.mkfifo(out / "r1.safetensors")
    if how == "directory":
        (out / "r1.safetensors").mkdir()
    said = "No such file or directory" if how == "missing" else "no regular file"
    assert verify(out).problems == (f"r1.safetensors: {said}",)
    if how == "fifo":
        (out / "fastckpt.json").unlink()
        assert any("not a regular file" in p for p in verify(out, plain=True).problems)


@pytest.mark.parametrize("what", ["header", "tensor"])
def test_a_disk_that_fails(out: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """What is read elsewhere is checked all the same."""
    preadv, start = os.preadv, 1 << 20

    def bad(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("r1.safetensors") and (offset == 0) == (
            what == "header"
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    data = bytearray((out / "r0.safetensors").read_bytes())
    data[start] ^= 1
    (out / "r0.safetensors").write_bytes(data)
    monkeypatch.setattr(os, "preadv", bad)
    differs = "r0.safetensors: big: its bytes differ from the manifest's digest"
    bad_tensors = [f"r1.safetensors: {name}: Input/output error" for name in ("row", "big")]
    want = ["r1.safetensors: Input/output error", differs] if what == "header" else [differs, *bad_tensors]
    assert list(verify(out).problems) == want


def test_many_problems_are_counted(tmp_path: Path) -> None:
    for k in range(1003):
        (tmp_path / f"{k:04}.safetensors").write_bytes(b"")
    problems = verify(tmp_path, plain=True).problems
    assert len(problems) == 1001 and problems[-1] == "and 3 more"


def test_a_directory_that_may_not_be_listed_is_a_problem(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "closed").mkdir()
    scandir = os.scandir

    def refusing(path: str):  # type: ignore[no-untyped-def]
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert verify(out).problems == ("closed: Permission denied",)


def test_an_incomplete_set(tmp_path: Path) -> None:
    write_part(tmp_path / "out", 1, 1, world=3)
    report = verify(tmp_path / "out")
    assert report.problems == (
        "no fastckpt.json: the set is incomplete; there are records of 1 of 3 ranks: [1]",
    )
    write_part(tmp_path / "other", 0, 2, world=3)
    shutil.copy(tmp_path / "other/fastckpt-rank-0.json", tmp_path / "out")
    assert "records of 2 of 3 ranks, of different plans: [0, 1]" in verify(tmp_path / "out").problems[0]
    shutil.copy(tmp_path / "out/fastckpt-rank-1.json", tmp_path / "out/fastckpt.json")
    assert "lists 1 of 3 ranks: the set is incomplete" in verify(tmp_path / "out").problems[0]


def test_each_ranks_own_record(tmp_path: Path) -> None:
    """The manifest has all that the ranks' records have; they must still say the same."""
    for path, seed in (("out", 1), ("other", 2)):
        for rank in range(2):
            write_part(tmp_path / path, rank, seed)
    assert verify(tmp_path / "out").problems == ()
    record = tmp_path / "out/fastckpt-rank-1.json"
    sound = record.read_bytes()
    record.write_bytes(sound.replace(b"rank-01", b"rank-11", 1))
    assert verify(tmp_path / "out").problems == (
        f"{record}: does not have its own digest: it was changed or damaged",
    )
    for other in ("out/fastckpt-rank-0.json", "other/fastckpt-rank-1.json"):
        record.write_bytes((tmp_path / other).read_bytes())
        assert verify(tmp_path / "out").problems == (
            "fastckpt-rank-1.json: is not what fastckpt.json says of rank 1",
        )
    record.unlink()
    assert verify(tmp_path / "out").problems == ()


def test_the_header_must_say_what_the_manifest_says(tmp_path: Path) -> None:
    """A manifest whose digests are right, of a file whose header names its tensors otherwise."""
    specs = [("a", BY_NAME["float32"], (2, 3)), ("b", BY_NAME["float32"], (6,))]
    layout = safetensors_layout("x.safetensors", specs, {})
    header = b"".join(layout.head())
    other = header.replace(b'"a":{"dtype":"F32","shape":[2,3]', b'"a":{"dtype":"I32","shape":[3,2]').replace(
        b'"b"', b'"c"'
    )
    assert len(other) == len(header) and other != header
    with Output(tmp_path / "out", key="k") as o:
        odd = type(layout)(layout.path, layout.nbytes, layout.slots, ((0, other),))
        fill(o, odd, data_of(specs, 0))
        o.commit(RECORD)
    assert sorted(verify(tmp_path / "out").problems) == [
        "x.safetensors: a: header has int32[3, 2] at 128, the manifest float32[2, 3] at 128".replace(
            "128", str(len(header))
        ),
        "x.safetensors: b is only in the manifest",
        "x.safetensors: c is only in the header",
    ]


# ---- NaN and Inf ----


def reference_nonfinite(raw: bytes, name: str) -> int:
    """By torch: every value to float64, or the bit pattern the type's definition gives."""
    if name == "float8_e8m0fnu":
        return raw.count(0xFF)
    if name == "float4_e2m1fn_x2":
        return 0  # its sixteen values are all finite (OCP Microscaling Formats 1.0, table 5)
    t = torch.frombuffer(bytearray(raw), dtype=of_torch(BY_NAME[name]))
    if t.is_complex():
        t = torch.view_as_real(t)
    return int((~torch.isfinite(t.double())).sum()) if t.is_floating_point() else 0


@pytest.mark.parametrize("dtype", [d for d in DTYPES], ids=str)
def test_nonfinite(dtype) -> None:  # type: ignore[no-untyped-def]
    """All patterns of one and two bytes; of larger types random ones and the edges of the exponent."""
    rng = random.Random(0)
    if dtype.itemsize <= 2:
        raw = np.arange(256**dtype.itemsize, dtype=f"<u{dtype.itemsize}").tobytes()
    else:
        raw = rng.randbytes(dtype.itemsize * 1000)
        values = [0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-45, 1.5]
        raw += np.array(values * 4, "<f4").tobytes() + np.array(values * 4, "<f8").tobytes()
    if dtype.name == "bool":
        raw = bytes([0, 1, 1])
    assert nonfinite(np.frombuffer(raw, np.uint8), dtype) == reference_nonfinite(raw, dtype.name)


@pytest.mark.parametrize("allowed", [False, True])
def test_nonfinite_values_are_problems(tmp_path: Path, allowed: bool) -> None:
    data = np.zeros(600_000, "<f4")
    data[[5, 400_000, 599_999]] = np.nan, np.inf, -np.inf
    layout = safetensors_layout("x.safetensors", [("w", BY_NAME["float32"], (600_000,))], {})
    record = type(RECORD)(RECORD.source, "0", "hf", {}, {"allow_nonfinite": allowed})
    with Output(tmp_path / "out", key="k") as o:
        fill(o, layout, {"w": data.tobytes()})
        o.commit(record)
    want = () if allowed else ("x.safetensors: w: 3 of its values are NaN or Inf",)
    assert verify(tmp_path / "out").problems == want


# ---- directories of others ----


def test_a_plain_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such directory"):
        verify(tmp_path / "none")
    with pytest.raises(SourceError, match=r"^'': no such directory"):
        verify("")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="file: is no directory, as an output is"):
        verify(tmp_path / "file")
    with pytest.raises(SourceError, match=r"no fastckpt.json, no \*.safetensors"):
        verify(tmp_path)
    a, b = {"a": torch.ones(3, 4)}, {"b": torch.ones(5, dtype=torch.bfloat16), "empty": torch.ones(0, 2)}
    safetensors.torch.save_file(a, tmp_path / "model-1.safetensors", {"format": "pt"})
    safetensors.torch.save_file(b, tmp_path / "model-2.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "extra.bin").write_bytes(b"x")
    assert "nothing says what these files should hold" in verify(tmp_path).problems[0]
    report = verify(tmp_path, plain=True)
    assert report.ok and (report.files, report.tensors, report.bytes) == (2, 3, 58)
    assert report.notes == (
        "no fastckpt.json: there are no digests; headers were checked and values looked through",
        "extra.bin: not checked",
    )
    index["weight_map"]["b"] = "model-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (
        "b should lie in model-1.safetensors, lies in model-2.safetensors"
        in verify(tmp_path, plain=True).problems[0]
    )
    for broken in (b"[" * 5000, b"{}", b"\xff"):
        (tmp_path / "model.safetensors.index.json").write_bytes(broken)
        assert len(verify(tmp_path, plain=True).problems) == 1
    (tmp_path / "model.safetensors.index.json").unlink()
    safetensors.torch.save_file({**a, "c": torch.ones(2)}, tmp_path / "model.safetensors")
    assert verify(tmp_path, plain=True).problems == (
        "model.safetensors: a is also in model-1.safetensors: a loader takes either",
    )
    (tmp_path / "model.safetensors").unlink()
    a["a"][1, 1] = torch.nan
    safetensors.torch.save_file(a, tmp_path / "model-1.safetensors")
    assert verify(tmp_path, plain=True).problems == (
        "model-1.safetensors: a: 1 of its values are NaN or Inf",
    )


def test_a_directory_that_may_not_be_listed_is_not_an_empty_one(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(SourceError, match=f"{out}: Permission denied"):
        verify(out)


def st(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"", "too few for a safetensors file"),
        (b"\xff" * 8, "header of"),
        (struct.pack("<Q", 100) + b"{}", "header of 100 bytes"),
        (st(b" {}"), "header begins with"),
        (st(b"{"), "no JSON"),
        (st(b'{"a":' * 100_000), "no JSON"),
        (st(b'{"a":1,"a":1}'), "stands twice"),
        (st(b'{"\xff":1}'), "no UTF-8"),
        (st({"a": 1}), "wanted dtype, shape"),
        (st({"a": {**ONE, "dtype": "F33"}}, bytes(4)), "dtype 'F33' is none of"),
        (st({"a": {**ONE, "shape": [2]}}, bytes(4)), "wanted 8"),
        (st({"a": {**ONE, "shape": [-1]}}, bytes(4)), "no tensor's"),
        (st({"a": {**ONE, "shape": [0, 1 << 62]}}, bytes(4)), "no tensor's"),
        (st({"a": {**ONE, "data_offsets": [-4, 0]}}), "no tensor's"),
        (st({"a": ONE}, bytes(3)), "data ends at byte"),
        (st({"a": ONE}, bytes(5)), "data ends at byte"),
        (st({"a": {**ONE, "data_offsets": [4, 8]}}, bytes(8)), "a hole before"),
        (st({"a": ONE, "b": ONE}, bytes(4)), "an overlap at"),
        (st({"__metadata__": {"x": 1}}), "no map of strings"),
    ],
)
def test_broken_headers(tmp_path: Path, file: bytes, said: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(file)
    (problem,) = verify(tmp_path, plain=True).problems
    assert said in problem


def test_a_file_cut_while_it_is_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, calls = os.preadv, 0

    def cutting(fd: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 8:
            os.truncate(out / "r1.safetensors", 1_500_000)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", cutting)
    report = verify(out, threads=1)
    assert not report.ok and "r1.safetensors: big: the file was cut" in report.problems[0]
