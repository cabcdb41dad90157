"""Mutated torch files: an error of ours or a right answer, never another exception.

What is right: with `check_crc` every byte that matters is covered by a checksum, so a file that still
opens is the file that was written. A mutated pickle has no checksum; there CPython's own unpickler,
given classes that only record, says what is right.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import tracemalloc
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastckpt.errors import SourceError
from fastckpt.sources import torchfile
from fastckpt.sources.torchfile import Storage, Tensor, TorchFile, picklemachine
from fastckpt.sources.torchfile.inert import Inert
from fastckpt.sources.torchfile.inertpickle import parse
from hostile import torch_files as make


def _value() -> object:
    base = torch.arange(24, dtype=torch.float32)
    half = torch.randn(3, 5).to(torch.bfloat16)
    half.ds_id = "0_3"  # type: ignore[attr-defined]
    return {
        "module": OrderedDict(a=base[4:].reshape(4, 5).t(), b=half, c=torch.zeros(0), tied=base),
        "param_shapes": [OrderedDict(a=torch.Size([5, 4]))],
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "on": True, "none": None}],
        "args": Namespace(steps=12, name="run", data=b"\x00\xff"),
        "dtype": torch.float16,
        "seen": {1, 2},
    }


def _mutations(data: bytes, seed: int, tries: int) -> Iterator[bytes]:
    """`data` with a few bytes changed, cut, doubled, moved or replaced by telling ones."""
    rng = random.Random(seed)
    telling = [b"\0", b"\xff", b"\x7f", b"PK\x01\x02", b"PK\x03\x04", b"PK\x07\x08", b"\xff" * 4, b"\xff" * 8]
    telling += [
        b".",
        b"(",
        b"t",
        b"R",
        b"b",
        b"Q",
        b"h\x00",
        b"h\x01",
        b"q\x00",
        b"2",
        b"0",
        b"}",
        b"]",
        b"N",
    ]
    telling += [
        b"u",
        b"s",
        b"a",
        b"e",
        b"\x85",
        b"\x86",
        b"\x8a\x08",
        b"cos\nsystem\n",
        b"o",
        b"d",
        b"l",
        b"1",
    ]
    for _ in range(tries):
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at = rng.randrange(len(out))
            n = min(rng.choice((1, 1, 2, 4, 8, 30)), len(out) - at)
            match rng.randrange(8):
                case 0 | 1:
                    out[at] ^= 1 << rng.randrange(8)
                case 2:
                    out[at] = rng.randrange(256)
                case 3:
                    new = rng.choice(telling)
                    out[at : at + len(new)] = new
                case 4:
                    out[at:at] = rng.choice(telling)
                case 5:
                    del out[at : at + n]
                case 6:
                    out[at:at] = out[at : at + n]
                case 7:
                    to = rng.randrange(len(out))
                    out[to : to + n] = out[at : at + n]
            if not out:
                out = bytearray(b"P")
        yield bytes(out)


def _walk(x: object, file: TorchFile | None) -> object:
    """A tree with every type, record and element spelled out."""
    if isinstance(x, dict):
        return ("dict", [(_walk(k, file), _walk(v, file)) for k, v in x.items()])
    if isinstance(x, (list, tuple)):
        return (type(x).__name__, [_walk(v, file) for v in x])
    if isinstance(x, (set, frozenset)):
        return (type(x).__name__, sorted(repr(_walk(v, file)) for v in x))
    if isinstance(x, Inert):
        return ("record", x.name, _walk(x.args, file), _walk(x.state, file), _walk(x.items, file))
    if isinstance(x, Tensor) and file:
        return (str(x.dtype), x.shape, x.requires_grad, make.raw(make.elements(file, x)))
    if isinstance(x, Storage):
        return ("storage", x.nbytes)
    if isinstance(x, float):
        return ("float", x.hex())
    return (type(x).__name__, x)


SIZES = [
    pytest.param(400, id="small"),
    pytest.param(35_000, id="large", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("tries", SIZES)
@pytest.mark.parametrize("torch_writes", [True, False], ids=["streamed", "plain"])
def test_mutated_zips(tmp_path: Path, tries: int, torch_writes: bool) -> None:
    good = tmp_path / "f.pt"
    torch.save(_value(), good)
    if not torch_writes:
        good = make.write_zip(tmp_path / "plain.pt", make.records(good))
    file = torchfile.load(good, check_crc=True)
    right = _walk(file.root, file)
    path = tmp_path / "mutated.pt"
    opened = 0
    for data in _mutations(good.read_bytes(), 1 + torch_writes, tries):
        path.write_bytes(data)
        try:
            found = torchfile.load(path, check_crc=True)
        except SourceError as e:
            assert str(e).startswith(str(path))
            continue
        opened += 1
        assert _walk(found.root, found) == right
    assert 0 < opened < tries


@pytest.mark.parametrize("tries", SIZES)
def test_mutated_directories(tmp_path: Path, tries: int) -> None:
    """As above, every mutation in the headers of the records and in the directory."""
    good = tmp_path / "f.pt"
    torch.save(_value(), good)
    file = torchfile.load(good, check_crc=True)
    right = _walk(file.root, file)
    data = good.read_bytes()
    with zipfile.ZipFile(good) as z:
        begin = z.start_dir
    path = tmp_path / "mutated.pt"
    for tail in _mutations(data[begin:], 7, tries):
        path.write_bytes(data[:begin] + tail)
        try:
            found = torchfile.load(path, check_crc=True)
        except SourceError:
            continue
        assert _walk(found.root, found) == right


@pytest.mark.parametrize("tries", SIZES)
def test_mutated_pickles_in_zips(tmp_path: Path, tries: int) -> None:
    """Checksums right, pickle mutated: whatever opens has its tensors inside their storages."""
    good = tmp_path / "f.pt"
    torch.save(_value(), good)
    contents = make.records(good)
    path = tmp_path / "mutated.pt"
    opened = 0
    for data in _mutations(contents["f/data.pkl"], 3, tries):
        make.write_zip(path, {**contents, "f/data.pkl": data})
        try:
            found = torchfile.load(path, check_crc=True)
        except SourceError:
            continue
        opened += 1
        _walk(found.root, found)
    assert opened


@pytest.mark.parametrize("tries", SIZES)
def test_mutated_legacy_files(tmp_path: Path, tries: int) -> None:
    good = tmp_path / "f.pt"
    torch.save(_value(), good, _use_new_zipfile_serialization=False)
    path = tmp_path / "mutated.pt"
    for data in _mutations(good.read_bytes(), 4, tries):  # no checksum covers these
        path.write_bytes(data)
        try:
            found = torchfile.load(path)
        except SourceError as e:
            assert str(e).startswith(str(path))
            continue
        _walk(found.root, found)


def _peak(path: Path) -> int:
    """The most bytes allocated at once while the file is opened, or refused."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with contextlib.suppress(SourceError):
        torchfile.load(path)
    return tracemalloc.get_traced_memory()[1] - before


@pytest.mark.parametrize("tries", [pytest.param(60, id="small"), *SIZES[1:]])
def test_memory_stays_within_four_times_the_file_and_sixteen_mib(tmp_path: Path, tries: int) -> None:
    """Of files whose pickle, zip or legacy stream is mutated; pickles with a bomb put in."""
    good, old, path = tmp_path / "f.pt", tmp_path / "old.pt", tmp_path / "mutated.pt"
    torch.save(_value(), good)
    torch.save(_value(), old, _use_new_zipfile_serialization=False)
    contents = make.records(good)
    pickled = contents["f/data.pkl"]
    rng = random.Random(5)

    def bombed(data: bytes) -> bytes:
        at = rng.randrange(2, len(data))
        bombs = b"]", b"}", b"\x8f", b"(", b"N\x85", b"2", b"X\1\0\0\0a", b"J\1\2\3\4", b")R", b"\x86"
        bomb = rng.choice(bombs)
        return data[:at] + bomb * rng.choice((1000, 20_000, 60_000)) + data[at:]

    tracemalloc.start()
    try:
        for k, data in enumerate(_mutations(pickled, 20, tries)):
            make.write_zip(path, {**contents, "f/data.pkl": bombed(data) if k % 3 == 0 else data})
            assert _peak(path) <= 4 * path.stat().st_size + (16 << 20)
        for source in (good, old):
            for data in _mutations(source.read_bytes(), 21, tries):
                path.write_bytes(data)
                assert _peak(path) <= 4 * len(data) + (16 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["ones", "placeholders", "matrices"])
def test_real_files_of_many_small_tensors_need_no_floor(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the smallest tensors build is within three times their file."""
    monkeypatch.setattr(picklemachine, "FLOOR", 1 << 13)
    shape = {"ones": (1,), "placeholders": (0,), "matrices": (1, 3)}[kind]
    names = [f"model.layers.{k // 9}.self_attn.{k % 9}_proj.weight" for k in range(3000)]
    state = OrderedDict((n, torch.zeros(shape)) for n in names)
    shapes = OrderedDict((n, torch.Size([40, 3])) for n in names)
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": state, "param_shapes": [shapes] if kind == "placeholders" else None}, path)
    root = torchfile.load(path).root
    assert isinstance(root, dict) and list(root["module"]) == names
    assert all(t.shape == shape for t in root["module"].values())
    if kind == "placeholders":
        assert list(root["param_shapes"][0].values()) == [(40, 3)] * 3000


# ---- pickles, against CPython's unpickler ----


class _Record:
    """What CPython's unpickler makes of every class: it writes down what happened, as Inert does."""

    def __init__(self, name: str, args: tuple[object, ...]) -> None:
        self.record = (name, args)
        self.state: object | None = None
        self.items: list[object] = []

    def __setstate__(self, state: object) -> None:
        if self.state is not None:
            raise pickle.UnpicklingError("twice")
        self.state = state

    def __call__(self, *args: object) -> object:
        return _Record(self.record[0], args)

    def append(self, item: object) -> None:
        self.items.append(item)

    def extend(self, items: list[object]) -> None:
        self.items.extend(items)

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))


class _Name(type):
    """A global that CPython's unpickler looked up: a class whose calls make records."""

    full: str

    def __call__(cls, *args: object, **named: object) -> object:
        return _Record(cls.full, (*args, named) if named else args)

    def __setstate__(cls, state: object) -> None:
        raise pickle.UnpicklingError("a class is built")


class _Named(metaclass=_Name):
    def __new__(cls, *args: object, **named: object) -> object:  # what NEWOBJ calls
        return _Record(cls.full, (*args, named) if named else args)


def _encode(text: str, codec: str) -> bytes:
    return text.encode(codec)


_PLAIN = {"collections.OrderedDict": dict, "builtins.set": set, "_codecs.encode": _encode}


class _Oracle(pickle._Unpickler):
    """The Python one: the C one takes gigabytes for a memo index of 2^31."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="strict")
        self.names: dict[str, object] = {}

    def find_class(self, module: str, name: str) -> object:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if full not in self.names:
            self.names[full] = _Name("name", (_Named,), {"full": full})
        return self.names[full]


def _oracle_walk(x: object) -> object:
    if isinstance(x, _Record):
        name, args = x.record
        return ("record", name, *(_oracle_walk(v) for v in (args, x.state, x.items)))
    if isinstance(x, type) or x is _encode:
        full = x.full if isinstance(x, _Name) else next(k for k, v in _PLAIN.items() if v is x)
        return ("record", full, ("tuple", []), ("NoneType", None), ("list", []))
    if isinstance(x, dict):
        return ("dict", [(_oracle_walk(k), _oracle_walk(v)) for k, v in x.items()])
    if isinstance(x, (list, tuple)):
        return (type(x).__name__, [_oracle_walk(v) for v in x])
    if isinstance(x, bytearray):
        return ("bytes", bytes(x))
    return _walk(x, None)


def _plain_value() -> object:
    return {
        "lr": [1e-3, -5, 1 << 40, 255, 70000, True, None],
        ("a", 1): (1, 2, "x", (), ("y",)),
        "od": OrderedDict(k={"n": [1, [2, [3]]]}),
        "args": Namespace(steps=12, name="run"),
        "set": {1, "b"},
        "bytes": b"\x00\xff",
        "long": "text " * 60,
    }


@pytest.mark.parametrize("tries", SIZES)
@pytest.mark.parametrize("protocol", [2, 4])
def test_mutated_pickles_read_as_cpython_reads_them(tries: int, protocol: int) -> None:
    """What both read they read alike; what ours alone reads is rare (NEWOBJ of a record, say)."""
    good = pickle.dumps(_plain_value(), protocol)
    if protocol == 4:
        good = good[:2] + good[11:]  # without its frame, which every mutation would break
    agreed = alone = 0
    for data in _mutations(good, 10 + protocol, 2 * tries):
        try:
            ours = parse(data)
        except SourceError:
            continue
        try:
            theirs = _Oracle(data).load()
        except (pickle.UnpicklingError, TypeError, AttributeError, KeyError):
            alone += 1
            continue
        assert _walk(ours.root, None) == _oracle_walk(theirs), data
        agreed += 1
    assert agreed > tries // 5 and alone <= tries // 50
