"""torchfile against torch.load, and against files that are not as they should be."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt import stored
from fastckpt.errors import SourceError
from fastckpt.extents import Extents, File
from fastckpt.sources import torchfile
from fastckpt.sources.torchfile import Inert, Tensor, torchzip, zipentries
from hostile import torch_files as make
from torch_types import KNOWN


def _random(dtype: str, *shape: int) -> torch.Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    numel = torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (numel * kind.itemsize,), dtype=torch.uint8)
    return raw.view(kind).reshape(shape)


def _every_dtype() -> object:
    return {d.name: _random(d.name, 3, 5) for d in KNOWN}


def _views() -> object:
    base = torch.arange(60, dtype=torch.float32)
    other = base.reshape(3, 4, 5)
    return {
        "whole": base,
        "shared": base,
        "tail": base[41:],
        "transposed": other.permute(2, 0, 1),
        "narrow": other[1:, 2, ::2],
        "expanded": base[7].expand(4, 6),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "empty tail": base[60:],
        "grad": torch.ones(2, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.randn(4), requires_grad=False),
    }


def _state_dict() -> object:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model[2].weight = torch.nn.Parameter(model[2].weight.to(torch.bfloat16))
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 3)}}, "lr": 1e-3}
    return {"module": model.state_dict(), "optimizer": optimizer, "size": torch.Size([2, 3])}


def _attributes() -> object:
    plain = torch.randn(5)
    plain.ds_id = "0_37"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.randn(2, 2))
    parameter.tag = {"a": [1, 2]}  # type: ignore[attr-defined]
    return [plain, parameter, (plain[1:3],)]


def _same(file: torchfile.TorchFile, ours: object, theirs: object) -> int:
    """Compares two trees; returns how many tensors were in them."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, Tensor)
        assert ours.shape == tuple(theirs.shape)
        assert f"torch.{ours.dtype}" == str(theirs.dtype)
        assert ours.requires_grad == theirs.requires_grad
        assert make.raw(make.elements(file, ours)) == make.raw(theirs)
        if ours.storage.extent >= 0:
            at, extents = ours.storage.extent, Extents(file.extents)
            stored.strided(extents, at, ours.dtype, ours.shape, offset=ours.offset, stride=ours.stride)
        return 1
    if isinstance(theirs, dict):
        assert isinstance(ours, dict) and list(ours) == list(theirs)
        return sum(_same(file, ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, (list, tuple)):
        assert isinstance(ours, tuple if isinstance(theirs, tuple) else list) and len(ours) == len(theirs)
        return sum(_same(file, a, b) for a, b in zip(ours, theirs, strict=True))
    if isinstance(theirs, torch.dtype):
        assert f"torch.{ours}" == str(theirs)
    elif isinstance(theirs, torch.device):
        assert ours == str(theirs)
    else:
        assert type(ours) is type(theirs) and ours == theirs
    return 0


CASES = {
    "dtypes": (_every_dtype, len(KNOWN)),
    "views": (_views, 11),
    "state dict": (_state_dict, 11),
    "attributes": (_attributes, 3),
    "plain": (lambda: {"a": [1, -2, 3.5, None, True, "x", b"\0\xff", 1 << 80], "s": {1, 2}, 3: ()}, 0),
    "torch words": (lambda: [torch.float16, torch.bfloat16, torch.device("cuda:1"), torch.Size([1, 2])], 0),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", CASES)
def test_same_as_torch(tmp_path: Path, case: str, zipped: bool) -> None:
    build, tensors = CASES[case]
    path = tmp_path / "file.pt"
    torch.manual_seed(3)
    value = build()
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    ours = torchfile.load(path, check_crc=zipped)
    assert _same(ours, ours.root, value) == tensors
    if zipped or case != "dtypes":  # torch cannot read back the legacy files it writes of untyped storages
        assert _same(ours, ours.root, torch.load(path, weights_only=False)) == tensors
    assert ours.inert == ()
    assert torchfile.is_torch_file(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_protocols(tmp_path: Path, protocol: int, zipped: bool) -> None:
    path = tmp_path / "file.pt"
    torch.save(_views(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    ours = torchfile.load(path)
    assert _same(ours, ours.root, torch.load(path, weights_only=False)) == 11


def test_shared_storages_share_an_extent(tmp_path: Path) -> None:
    torch.save(_views(), tmp_path / "f.pt")
    ours = torchfile.load(tmp_path / "f.pt")
    root = ours.root
    assert isinstance(root, dict)
    shared = [root[k].storage for k in ("whole", "shared", "tail", "transposed", "expanded")]
    assert all(s is shared[0] for s in shared)
    assert root["empty"].storage.extent == -1
    assert [e.key for e in ours.extents] == [s.key for s in _storages(root.values())]


def _storages(tensors: object) -> list[torchfile.Storage]:
    found = {t.storage.extent: t.storage for t in tensors}  # type: ignore[attr-defined]
    return [found[k] for k in sorted(found) if k >= 0]


def test_cuda_locations_are_tags_only(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0)}, tmp_path / "cpu.pt")
    path = make.repickled(
        tmp_path / "cpu.pt", tmp_path / "cuda.pt",
        lambda b: b.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:3"),
    )  # fmt: skip
    ours = torchfile.load(path, check_crc=True)
    tensor = ours.root["w"]  # type: ignore[index]
    assert make.raw(make.elements(ours, tensor)) == make.raw(torch.arange(6.0))


def test_wanted_alone_gets_extents_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"w": torch.ones(40), "m": torch.zeros(50), "v": torch.zeros(60)}, path)
    broken = make.patched(path, tmp_path / "g.pt", make.data_at(path, "f/data/1") - 20, b"\x55" * 300)
    with pytest.raises(SourceError):
        torchfile.load(broken)
    ours = torchfile.load(broken, wanted=lambda root: [root["w"]], check_crc=True)  # type: ignore[index]
    root = ours.root
    assert isinstance(root, dict)
    assert [root[k].storage.extent for k in "wmv"] == [0, -1, -1]
    assert len(ours.extents) == 1 and ours.extents[0].nbytes == 160


def test_known_pickles_are_parsed_once(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "f.pt", tmp_path / "b" / "f.pt", tmp_path / "c" / "f.pt"]
    for k, p in enumerate(paths):
        p.parent.mkdir()
        torch.save({"w": torch.full((5,), float(k)), "k": k == 2}, p)
    known: dict[bytes, torchfile.Tree] = {}
    files = [torchfile.load(p, known=known) for p in paths]
    assert files[0].root is files[1].root and len(known) == 2
    for k, f in enumerate(files):
        assert make.elements(f, f.root["w"]).tolist() == [k] * 5  # type: ignore[index]
    assert len({f.digest for f in files}) == 3


def embedded(file: File, at: int, nbytes: int, known: torchfile.Known) -> str:
    """What a zip within a file is found to be, or why it is none, in words."""
    with torchfile.Reader(file) as reader:
        try:
            return repr(torchfile.embedded(reader, at, nbytes, check_crc=False, known=known))
        except SourceError as e:
            return str(e)


def test_a_zip_held_against_another_is_what_it_is_by_itself(tmp_path: Path) -> None:
    """Any byte of it changed: no change may go unseen because a like one was read before."""
    zips = []
    for seed in (1, 2):
        torch.save(torch.randn(3, generator=torch.Generator().manual_seed(seed)), held := io.BytesIO())
        zips.append(held.getvalue())
    first, second = zips
    n, path = len(first), tmp_path / "0_0.distcp"
    changed = [second[:i] + bytes([b ^ 0x15]) + second[i + 1 :] for i, b in enumerate(second)]
    with zipfile.ZipFile(io.BytesIO(second)) as held_zip:
        crc = held_zip.getinfo("archive/data/0").CRC.to_bytes(4, "little")
    changed.append(second.replace(crc, bytes(4)))  # as if there were no checksum
    path.write_bytes(first + b"".join(changed))
    file, known = File.at(path), torchfile.Known()
    embedded(file, 0, n, known)
    short = [embedded(file, i * n, n, known) for i in range(1, n + 2)]
    assert short == [embedded(file, i * n, n, torchfile.Known()) for i in range(1, n + 2)]
    assert sum(found.startswith("TorchFile") for found in short) > 12, "changed values are other values"
    assert {len(forms) for forms in known.forms.values()} <= {0, torchfile._FORMS}


def test_digest_tells_files_apart_and_equal_files_alike(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name).mkdir()
        torch.save({"w": torch.full((5,), value)}, tmp_path / name / "f.pt")
    digests = [torchfile.load(tmp_path / n / "f.pt").digest for n in "abc"]
    assert digests[0] != digests[2] and len(digests[0]) == 16
    assert digests[0] == torchfile.load(tmp_path / "a" / "f.pt").digest


# ---- what stays inert ----


class Colour(enum.Enum):
    RED = 3


class Thing:
    def __init__(self) -> None:
        self.w = torch.arange(3.0)


def test_objects_stay_inert_and_their_tensors_are_found(tmp_path: Path) -> None:
    value = {"ns": argparse.Namespace(lr=0.1), "colour": Colour.RED, "thing": Thing()}
    torch.save(value, tmp_path / "f.pt")
    ours = torchfile.load(tmp_path / "f.pt")
    root = ours.root
    assert isinstance(root, dict)
    assert root["ns"].name == "argparse.Namespace" and root["ns"].state == {"lr": 0.1}
    assert root["colour"].args == (3,)
    assert make.elements(ours, root["thing"].state["w"]).tolist() == [0, 1, 2]
    assert ours.inert == ("argparse.Namespace", f"{__name__}.Colour", f"{__name__}.Thing")


def test_nothing_is_called(tmp_path: Path) -> None:
    mark = tmp_path / "called"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (open, (str(mark), "w"))

    torch.save({"w": torch.ones(2), "evil": Evil()}, tmp_path / "f.pt")
    ours = torchfile.load(tmp_path / "f.pt")
    assert not mark.exists()
    assert isinstance(ours.root, dict) and ours.root["evil"].args == (str(mark), "w")
    assert len(ours.inert) == 1


@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.5, 1, torch.qint8),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        lambda: torch.empty(3, device="meta"),
    ],
    ids=["quantised", "sparse", "conjugate", "meta"],
)
def test_tensors_whose_bytes_mean_something_else_stay_inert(tmp_path: Path, tensor: object) -> None:
    torch.save({"w": tensor()}, tmp_path / "f.pt")  # type: ignore[operator]
    ours = torchfile.load(tmp_path / "f.pt")
    assert isinstance(ours.root, dict) and isinstance(ours.root["w"], Inert)


# ---- zip files that are not as they should be ----


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "f.pt"
    torch.save(OrderedDict(a=torch.arange(100.0), b=torch.arange(7)), path)
    return path


def _refused(path: Path, match: str, *, check_crc: bool = False) -> None:
    with pytest.raises(SourceError, match=match) as e:
        torchfile.load(path, check_crc=check_crc)
    assert str(e.value).startswith(str(path))


def test_flipped_bits_are_found_when_asked(good: Path, tmp_path: Path) -> None:
    at = make.data_at(good, "f/data/0") + 8
    broken = make.patched(good, tmp_path / "g.pt", at, b"\x01")
    torchfile.load(broken)
    _refused(broken, "record f/data/0: its bytes have CRC32", check_crc=True)
    at = good.read_bytes().index(b"cpu")
    broken = make.patched(good, tmp_path / "h.pt", at, b"npu")
    _refused(broken, "record f/data.pkl: its bytes have CRC32")


@pytest.mark.parametrize("kept", [0, 1, 3, 30, 500, 0.5, -200, -22, -1])
def test_truncated(good: Path, tmp_path: Path, kept: float) -> None:
    data = good.read_bytes()
    n = int(len(data) * kept) if isinstance(kept, float) else kept if kept >= 0 else len(data) + kept
    (tmp_path / "g.pt").write_bytes(data[:n])
    _refused(tmp_path / "g.pt", "truncated|no torch file")


def test_longer(good: Path, tmp_path: Path) -> None:
    (tmp_path / "g.pt").write_bytes(good.read_bytes() + b"x")
    _refused(tmp_path / "g.pt", "no zip end record")
    (tmp_path / "h.pt").write_bytes(good.read_bytes()[:4] + b"x" + good.read_bytes()[4:])
    _refused(tmp_path / "h.pt", "zip64 end record is not where")


def test_compressed(good: Path, tmp_path: Path) -> None:
    _refused(make.write_zip(tmp_path / "g.pt", make.records(good), zipfile.ZIP_DEFLATED), "compressed")


CENTRAL = {
    "encrypted": (8, b"\x01\x00", "encrypted"),
    "flags": (8, b"\x00\x08", "local flags"),
    "method": (10, b"\x08\x00", "compressed"),
    "crc": (16, b"\x00\x00\x00\x00", "descriptor"),
    "packed": (20, b"\x01\x00\x00\x00", "packed"),
    "sizes": (20, struct.pack("<II", 401, 401), "descriptor"),
    "too large": (20, struct.pack("<II", 9999, 9999), "run into"),
    "huge": (20, struct.pack("<II", 2**32 - 2, 2**32 - 2), "run into"),
    "zip64 without": (20, struct.pack("<II", 2**32 - 1, 2**32 - 1), "zip64 sizes are missing"),
    "disk": (34, b"\x01\x00", "disk"),
    "offset": (42, struct.pack("<I", 1), "run into|local header"),
    "far": (42, struct.pack("<I", 2**31), "run into"),
    "name": (46, b"f/data/1", "twice"),
    "other name": (46, b"f/data/7", "no record data/0"),
    "signature": (0, b"PK\x01\x03", "broken"),
    "long name": (28, b"\xff\xff", "broken"),
    "long comment": (32, b"\xff\xff", "broken"),
}


@pytest.mark.parametrize("few", [0, zipentries._FEW])
@pytest.mark.parametrize("fault", CENTRAL)
def test_central_directory(
    good: Path, tmp_path: Path, fault: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are kept in a dict, or where they are many as columns."""
    monkeypatch.setattr(zipentries, "_FEW", few)
    shift, new, match = CENTRAL[fault]
    at = make.central_at(good, "f/data/0")
    _refused(make.patched(good, tmp_path / "g.pt", at + shift, new), match)


LOCAL = {
    "signature": (0, b"PK\x03\x05", "local header"),
    "flags": (6, b"\x09\x08", "local flags"),
    "method": (8, b"\x08\x00", "method"),
    "crc": (14, b"\x01\x00\x00\x00", "disagrees"),
    "size": (22, b"\x01\x00\x00\x00", "disagrees"),
    "name": (30, b"f/data/1", "names"),
    "name length": (26, b"\x07\x00", "names"),
    "extra": (28, b"\xff\xff", "run into"),
    "shifted": (28, b"\x01\x00", "descriptor"),
}


@pytest.mark.parametrize("fault", LOCAL)
def test_local_header(good: Path, tmp_path: Path, fault: str) -> None:
    shift, new, match = LOCAL[fault]
    at = make.local_at(good, "f/data/0")
    _refused(make.patched(good, tmp_path / "g.pt", at + shift, new), match)


def test_descriptor(good: Path, tmp_path: Path) -> None:
    at = make.data_at(good, "f/data/0") + 400
    for k in (0, 4, 8, 12):
        _refused(make.patched(good, tmp_path / f"{k}.pt", at + k, b"\xee"), "its descriptor")


def test_local_sizes_without_a_descriptor(good: Path, tmp_path: Path) -> None:
    plain = make.write_zip(tmp_path / "g.pt", make.records(good))
    assert torchfile.load(plain, check_crc=True).inert == ()
    at = make.local_at(plain, "f/data/0")
    for k, shift in enumerate((14, 18, 22)):
        _refused(make.patched(plain, tmp_path / f"{k}.pt", at + shift, b"\x01"), "disagrees")


def test_local_sizes_in_a_zip64_field(good: Path, tmp_path: Path) -> None:
    """As zipfile writes a record whose size it does not know before."""
    path = tmp_path / "g.pt"

    def written(field: Callable[[bytes], bytes]) -> Path:
        with zipfile.ZipFile(path, "w") as z:
            for name, data in make.records(good).items():
                with z.open(zipfile.ZipInfo(name), "w", force_zip64=True) as f:
                    f.write(data)
        data = path.read_bytes()
        at = make.local_at(path, "f/data/0") + 30 + len("f/data/0")
        path.write_bytes(data[:at] + field(data[at : at + 20]) + data[at + 20 :])
        return path

    assert torchfile.load(written(lambda field: field)).root["a"].numel == 100  # type: ignore[index]
    _refused(written(lambda field: field[:4] + struct.pack("<QQ", 400, 401)), "disagrees with the directory")
    _refused(
        written(lambda field: field[:2] + b"\x08\0" + field[4:12] + b"\1\0\4\0" + bytes(4)),
        "two zip64 fields",
    )


@pytest.mark.parametrize(
    ("count", "match"), [(0, "has entries of 0"), (0xFFF, "the zip directory of 4095 records has")]
)
def test_records_that_are_counted_otherwise(good: Path, tmp_path: Path, count: int, match: str) -> None:
    plain = make.write_zip(tmp_path / "plain.pt", make.records(good))
    at = plain.stat().st_size - 22 + 8
    _refused(make.patched(plain, tmp_path / "g.pt", at, struct.pack("<HH", count, count)), match)


def test_a_zip_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "f.pt").write_bytes(b"PK\3\4" + b"PK\5\6" + bytes(4) + struct.pack("<HHIIH", 0, 0, 0, 4, 0))
    _refused(tmp_path / "f.pt", "a zip file without /data.pkl")


def test_records_that_overlap(good: Path, tmp_path: Path) -> None:
    at = make.central_at(good, "f/data/1")
    where = struct.pack("<I", make.local_at(good, "f/data/0") + 64)
    _refused(make.patched(good, tmp_path / "g.pt", at + 42, where), "run into")


def test_byteorder(good: Path, tmp_path: Path) -> None:
    contents = make.records(good)
    _refused(make.write_zip(tmp_path / "g.pt", {**contents, "f/byteorder": b"big"}), "wanted little")
    del contents["f/byteorder"]  # files of torch before 2.1 have none
    assert len(torchfile.load(make.write_zip(tmp_path / "h.pt", contents)).extents) == 2


def test_missing_and_short_records(good: Path, tmp_path: Path) -> None:
    contents = make.records(good)
    short = {**contents, "f/data/0": contents["f/data/0"][:-4]}
    _refused(make.write_zip(tmp_path / "g.pt", short), "data/0 has 396 bytes, its storage 400")
    del contents["f/data/1"]
    _refused(make.write_zip(tmp_path / "h.pt", contents), "no record data/1")
    del contents["f/data.pkl"]
    _refused(make.write_zip(tmp_path / "i.pt", contents), "without f/data.pkl")
    program = {"f/data.pkl": b"N.", "f/constants.pkl": b""}
    _refused(make.write_zip(tmp_path / "k.pt", program), "TorchScript")


def test_limits(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room, name, limit, match in (
        (torchfile, "MAX_PICKLE", 100, "the limit is 100"),
        (torchzip, "MAX_RECORDS", 3, "at most 3 records"),
        (torchzip, "MAX_DIRECTORY", 99, "in 99 bytes"),
    ):
        with monkeypatch.context() as m:
            m.setattr(room, name, limit)
            _refused(good, match)


def test_torchscript(tmp_path: Path) -> None:
    program = tmp_path / "f.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    _refused(program, "TorchScript")


def test_other_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.pt", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    _refused(tmp_path / "old.pt", "tar file")
    (tmp_path / "text.pt").write_text("no tensors here")
    _refused(tmp_path / "text.pt", "no torch file")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    _refused(tmp_path / "plain.pkl", "no torch file")
    _refused(tmp_path / "nowhere.pt", "No such file")
    _refused(tmp_path, "not a regular file")
    for name in ("text.pt", "plain.pkl", "nowhere.pt", ""):
        assert not torchfile.is_torch_file(tmp_path / name)


def test_zip64(tmp_path: Path) -> None:
    """A record of 5 GiB (a hole in the file) and the records behind it, as torch writes them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = tmp_path / "f.pt"
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save([torch.empty((5 << 30) + 7, dtype=torch.uint8), torch.zeros(5)], path)
    ours = torchfile.load(path)
    with zipfile.ZipFile(path) as z, open(path, "rb") as f:
        for e in ours.extents:
            info = z.getinfo(f"f/data/{e.key}")
            f.seek(info.header_offset + 26)
            assert e.offset == info.header_offset + 30 + sum(struct.unpack("<HH", f.read(4)))
            assert e.nbytes == info.file_size
    assert [e.nbytes for e in ours.extents] == [(5 << 30) + 7, 20]
    tail = path.stat().st_size - 98
    faults = {4: "zip64 end", 16: "disagree", 40: "disagree", 48: "must end", 64: "zip64 end"}
    for shift, match in faults.items():
        with open(path, "r+b") as f:
            f.seek(tail + shift)
            old = f.read(1)
            f.seek(tail + shift)
            f.write(bytes([old[0] ^ 1]))
            f.flush()
            _refused(path, match)
            f.seek(tail + shift)
            f.write(old)
    os.utime(path, ns=(0, ours.file.mtime_ns))
    assert torchfile.load(path).digest == ours.digest


# ---- pickles that lie about storages and tensors ----


def _swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return change


REBUILDS = {
    "numel": (b"q\x04Kdt", b"q\x04K\xc8t", "data/0 has 400 bytes, its storage 800"),
    "offset": (b"QK\x00Kd", b"QK\x01Kd", "needs 404 bytes"),
    "shape": (b"QK\x00Kd", b"QK\x00Ke", "needs 404 bytes"),
    "negative": (b"QK\x00Kd", b"QJ\xff\xff\xff\xffKd", "offset is -1"),
    "bool": (b"QK\x00Kd", b"Q\x88Kd", "offset is bool"),
    "huge": (b"QK\x00Kd", b"QK\x00\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", "shape is"),
    "many axes": (b"QK\x00Kd", b"QK\x00KdKd", "requires_grad is a tuple"),
    "length": (b"Kd\x85q\x06K\x01\x85", b"Kd\x85q\x06K\x01K\x01\x86", "differ in length"),
    "beyond": (
        b"q\x04Kdt",
        b"q\x04\x8a\x08" + struct.pack("<q", 1 << 61) + b"t",
        "storage 0 has 9223372036854775808 bytes",
    ),
    "word": (b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00storagf", "persistent id"),
}


@pytest.mark.parametrize("fault", REBUILDS)
def test_tensors_outside_their_storage(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "f.pt"
    torch.save(torch.arange(100.0), path)
    old, new, match = REBUILDS[fault]
    _refused(make.repickled(path, tmp_path / "g.pt", _swap(old, new)), match)


class Made:
    """Pickled as a call of `function`."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> object:
        return self.call


def _storage() -> object:
    return torch.arange(6.0).storage()


U, V2, V3 = torch._utils, torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor_v3
FORMED = {
    "tensor": (lambda: Made(U._rebuild_tensor, _storage(), 0, (6,)), "3 arguments; wanted 4"),
    "tensor 2": (lambda: Made(V2, _storage(), 0, (6,), (1,)), "4 arguments; wanted 6 or 7"),
    "tensor 3": (lambda: Made(V3, _storage(), 0), "2 arguments; wanted 7 or 8"),
    "no dtype": (lambda: Made(V3, _storage(), 0, (6,), (1,), False, None, None), "its dtype is None"),
    "a dtype": (lambda: Made(V3, _storage(), 0, (6,), (1,), False, None, 3), "its dtype is a int"),
    "parameter": (lambda: Made(U._rebuild_parameter, 1, True), "2 arguments; wanted 3 or 4"),
    "of what": (lambda: Made(U._rebuild_parameter, 1, True, None), "not made of a tensor and a bool"),
    "grad": (lambda: Made(U._rebuild_parameter, torch.ones(1), 1, None), "not made of a tensor and a bool"),
    "arguments": (
        lambda: Made(torch._tensor._rebuild_from_type_v2, V2, torch.nn.Parameter, 3, {}),
        "arguments of torch._utils._rebuild_tensor_v2 are a int",
    ),
    "device": (lambda: Made(torch.device, 3), "wanted a device type and an index"),
}


@pytest.mark.parametrize("case", FORMED)
def test_calls_that_make_no_tensor(tmp_path: Path, case: str) -> None:
    made, match = FORMED[case]
    torch.save({"x": made()}, tmp_path / "f.pt")
    _refused(tmp_path / "f.pt", match)


def test_the_oldest_way_to_make_a_tensor(tmp_path: Path) -> None:
    torch.save(
        {
            "x": Made(U._rebuild_tensor, _storage(), 1, (2, 2), (2, 1)),
            "s": Made(torch.Size, [2, 3]),
            "p": Made(
                U._rebuild_parameter, Made(V2, _storage(), 0, (6,), (1,), False, OrderedDict()), True, None
            ),
        },
        tmp_path / "f.pt",
    )
    ours = torchfile.load(tmp_path / "f.pt")
    root: Any = ours.root
    assert make.elements(ours, root["x"]).tolist() == [[1, 2], [3, 4]]
    assert root["s"] == (2, 3) and root["p"].requires_grad


def test_more_than_a_pickle(good: Path, tmp_path: Path) -> None:
    _refused(make.repickled(good, tmp_path / "g.pt", lambda data: data + b"."), "its pickle ends at byte")


def test_storages_that_contradict(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save([torch.arange(100.0), torch.arange(50.0)], path)
    change = _swap(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
    _refused(make.repickled(path, tmp_path / "g.pt", change), "has 200 bytes here and 400 before")
    torch.save([torch.arange(100.0), torch.arange(50)], path)
    _refused(make.repickled(path, tmp_path / "h.pt", change), "holds int64 here and float32 before")


# ---- legacy files ----


def _legacy(path: Path, value: object) -> bytes:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


def test_legacy_views(tmp_path: Path) -> None:
    """Files of torch before 0.4 describe a slice of a storage in the persistent id."""
    path = tmp_path / "f.pt"
    data = _legacy(path, torch.arange(10.0)[:3])
    old = b"K\nNt"  # numel 10, no view
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, b"K\nX\x01\x00\x00\x00vK\x04K\x05\x87t"))
    ours = torchfile.load(path)
    assert [e.key for e in ours.extents] == ["v"] and ours.extents[0].nbytes == 20
    assert make.elements(ours, ours.root).tolist() == [4, 5, 6]  # type: ignore[arg-type]
    assert torch.load(path, weights_only=False).tolist() == [4, 5, 6]
    path.write_bytes(data.replace(old, b"K\nX\x01\x00\x00\x00vK\x06K\x05\x87t"))
    _refused(path, "elements .6, 11. of storage")
    path.write_bytes(data.replace(old, b"K\nX\x01\x00\x00\x00vK\x04\x86t"))
    _refused(path, "the view of storage .* is not .key, offset, numel.")
    whole = torch.arange(10.0)
    first, last = (b"K\nX\x01\x00\x00\x00vK" + k + b"K\x05\x87t" for k in (b"\x04", b"\x05"))
    data = _legacy(path, [whole[:3], whole[5:]])
    path.write_bytes(data.replace(old, first, 1).replace(old, last, 1))
    _refused(path, "storage v is a slice of .* here and something else before")
    data = _legacy(path, [whole[:3], torch.arange(10.0)])
    key = re.findall(rb"X\x0f?.\0\0\0\d+", data, re.DOTALL)[1]
    path.write_bytes(data.replace(old, b"K\n" + key + b"K\x04K\x05\x87t", 1))
    _refused(path, "is held and is a slice of")


def test_bytes_of_a_storage_without_a_type(tmp_path: Path) -> None:
    tensor = torch.arange(5, dtype=torch.uint8)
    torch.save([tensor, tensor.untyped_storage()], tmp_path / "f.pt")
    ours = torchfile.load(tmp_path / "f.pt")
    root: Any = ours.root
    assert make.elements(ours, root[0]).tolist() == [0, 1, 2, 3, 4]
    assert root[1].nbytes == root[0].storage.nbytes == 5 and root[1].key == root[0].storage.key


def test_legacy_modules_are_records(tmp_path: Path) -> None:
    """With the source text of their class."""
    net = torch.nn.Linear(2, 3)
    _legacy(tmp_path / "f.pt", {"net": net, "w": net.weight})
    ours = torchfile.load(tmp_path / "f.pt")
    root: Any = ours.root
    assert root["net"].name == "torch.nn.modules.linear.Linear"
    assert make.elements(ours, root["w"]).tolist() == net.weight.tolist()


def test_legacy_long_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"text": "x" * (3 << 20), "w": torch.arange(5)}
    path = tmp_path / "f.pt"
    _legacy(path, value)
    ours = torchfile.load(path)
    assert _same(ours, ours.root, value) == 1
    monkeypatch.setattr(torchfile, "MAX_PICKLE", 1 << 20)
    _refused(path, "its pickles have more than 1048576 bytes")


def test_legacy_faults(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    data = _legacy(path, {"a": torch.arange(10.0), "b": torch.arange(3)})

    def refused(changed: bytes, match: str) -> None:
        assert changed != data
        path.write_bytes(changed)
        _refused(path, match)

    refused(data[:-1], "the file has")
    refused(data + b"\0", "the file has")
    refused(data[: len(data) // 2], "truncated|the file has")
    refused(data[:20], "truncated")
    refused(data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"), "little")
    refused(
        re.sub(rb"\x80\x02\]q\x00\(X.*?e\.", b"\x80\x02]K\x01a.", data, flags=re.DOTALL), "no list of strings"
    )
    refused(data.replace(b"\x80\x02M\xe9\x03.", b"\x80\x02M\xea\x03."), "protocol")
    count = struct.pack("<q", 10) + struct.pack("<f", 0)
    refused(data.replace(count, struct.pack("<q", 9) + struct.pack("<f", 0)), "9 elements")
    path.write_bytes(data)
    _refused(path, "no checksums", check_crc=True)


def test_a_file_that_changes_is_refused(good: Path) -> None:
    from fastckpt.extents import File
    from fastckpt.sources.torchfile import Reader

    seen = File.at(good)
    with open(good, "ab") as f:
        f.write(b"x")
    with pytest.raises(SourceError, match="changed"):
        Reader(seen)


def test_a_file_that_shrinks_while_it_is_read(good: Path) -> None:
    from fastckpt.extents import File
    from fastckpt.sources.samples import read_all
    from fastckpt.sources.torchfile import Reader

    with Reader(seen := File.at(good)) as reader:
        with pytest.raises(SourceError, match="are outside a file of"):
            reader.read_through(seen.nbytes - 3, 4)
        os.truncate(good, 100)
        with pytest.raises(SourceError, match=f"the file, of {seen.nbytes} bytes, now ends at 100"):
            reader.read_through(90, 20)
    with pytest.raises(SourceError, match="ends before byte 110"):
        read_all(str(good), [(0, 4), (90, 20)])
    good.unlink()
    with pytest.raises(SourceError, match="No such file"):
        read_all(str(good), [(0, 4)])
