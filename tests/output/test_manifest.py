"""The manifest: what is written is read back; nothing else is."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from fastckpt.digest import digest
from fastckpt.dtypes import BY_NAME
from fastckpt.errors import SourceError, WriteError
from fastckpt.output import manifest
from fastckpt.output.manifest import FileEntry, Manifest, Origin, Record, Shard, TensorEntry, merged, rank_of
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import sealed

D = "0123456789abcdef"


def example(rank: int = 0, world: int = 1) -> Manifest:
    bf16 = BY_NAME["bfloat16"]
    tensors = {
        'a\n"é\ud800': TensorEntry(f"r{rank}/x.safetensors", bf16, (2, 3), 16, 12, D),
        "empty": TensorEntry(f"r{rank}/x.safetensors", bf16, (0, 3), 28, 0, D),
        "scalar": TensorEntry(f"r{rank}/x.safetensors", bf16, (), 28, 2, D),
    }
    shard = Shard(rank, {f"r{rank}/x.safetensors": FileEntry(30, D)}, tensors, {"tied": "scalar"})
    record = Record(
        Origin("/ck", "zero", "step3", 3, "ff"), "0.1", "hf", {"tp": 2}, {"dtype": None, "x": [1.5]}
    )
    return Manifest(
        "k1", world, "2026-01-02T03:04:05+00:00", record, {"config.json": FileEntry(7, D)}, (shard,)
    )


def body() -> dict:  # type: ignore[type-arg]
    out = json.loads(b"".join(example().text()))
    del out["digest"]
    return out


def test_comes_back(tmp_path: Path) -> None:
    for m in (example(), replace(example(1, 3), files={}), Manifest("", 0, "", example().record, {}, ())):
        (tmp_path / "fastckpt.json").write_bytes(b"".join(m.text()))
        assert Manifest.read(tmp_path) == Manifest.read(tmp_path / "fastckpt.json") == m
        assert json.loads(b"".join(m.text()))["schema"] == 1


def test_a_record_of_very_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written in pieces, and one larger than any that is read is refused."""
    m, entry = example(), example().shards[0].tensors["scalar"]
    many = {f"t{k}": replace(entry, offset=2 * k) for k in range(10_000)}
    shard = replace(m.shards[0], files={entry.file: FileEntry(20_000, D)}, tensors=many, aliases={})
    m = replace(m, shards=(shard,))
    pieces = list(m.text())
    (tmp_path / "m.json").write_bytes(b"".join(pieces))
    assert len(pieces) > 1 and Manifest.read(tmp_path / "m.json") == m
    monkeypatch.setattr(manifest, "_MAX_BYTES", sum(map(len, pieces)) - 1)
    with pytest.raises(SourceError, match=r"m\.json: a manifest has at most \d+ bytes"):
        Manifest.read(tmp_path / "m.json")


def test_a_small_record_takes_little_memory(tmp_path: Path) -> None:
    """Not as much as the largest that is read."""
    (tmp_path / "x").write_bytes(b"".join(example().text()))
    Manifest.read(tmp_path / "x")
    tracemalloc.start()
    try:
        Manifest.read(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("flips", [300, pytest.param(10**6, marks=pytest.mark.nightly)])
def test_every_flipped_bit_is_refused(tmp_path: Path, flips: int) -> None:
    text, path = b"".join(example().text()), tmp_path / "m.json"
    bits = range(8 * len(text))
    for k in random.Random(0).sample(bits, min(flips, len(bits))):
        broken = bytearray(text)
        broken[k // 8] ^= 1 << k % 8
        path.write_bytes(broken)
        with pytest.raises(SourceError):
            Manifest.read(path)
    for k in random.Random(0).sample(range(len(text)), 50):
        path.write_bytes(text[:k])
        with pytest.raises(SourceError):
            Manifest.read(path)


def test_options_must_be_json() -> None:
    odd = replace(example(), record=replace(example().record, options={"x": float("nan")}))
    with pytest.raises(WriteError, match="JSON"):
        odd.text()


def changed(path: str, value: object) -> dict:  # type: ignore[type-arg]
    """The example with one value replaced, or removed (value is ...)."""
    out = body()
    *way, last = path.split("|")
    at = out
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at[step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return out


A = "ranks|0|tensors|scalar|"
F = "ranks|0|files|"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("schema", 2, "schema 2; this version reads 1"),
        ("schema", True, "wanted int, got bool"),
        ("key", ..., "no key 'key'"),
        ("world", -1, "no size"),
        ("world", 0, "not ascending ranks below 0"),
        ("source", [], "wanted dict"),
        ("source|step", "3", "wanted int"),
        ("files|../x", {"nbytes": 1, "digest": D}, "leaves the directory"),
        ("files|/etc/passwd", {"nbytes": 1, "digest": D}, "leaves the directory"),
        ("files|a//b", {"nbytes": 1, "digest": D}, "leaves the directory"),
        ("files|x\0", {"nbytes": 1, "digest": D}, "leaves the directory"),
        ("files|r0/x.safetensors", {"nbytes": 1, "digest": D}, "belongs to two"),
        ("files|config.json|digest", "XYZ", "no digest"),
        ("files|config.json|nbytes", 1e3, "wanted int"),
        ("files|config.json|nbytes", 1 << 70, "no size"),
        ("ranks|0|rank", 1, "not ascending"),
        ("ranks", [1], "a rank is a JSON object"),
        ("ranks|0|aliases|x", "nothing", "alias x of nothing"),
        ("ranks|0|aliases|scalar", "scalar", "alias scalar"),
        (A + "dtype", "float99", "no dtype"),
        (A + "file", "config.json", "do not lie in a file of the rank"),
        (A + "offset", 29, "do not lie in a file"),
        (A + "offset", 20, "overlaps"),
        (A + "shape", [2], "is not 2 bytes"),
        (A + "shape", [True], "no shape"),
        (A + "shape", [-1, -1], "no shape"),
        (A + "shape", [1] * 65, "no shape"),
        (A + "nbytes", ..., "no key 'nbytes'"),
        (A + "digest", D.upper(), "no digest"),
        (F + "r0/x.safetensors", 5, "wanted dict"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, path: str, value: object, said: str) -> None:
    (tmp_path / "m.json").write_bytes(sealed(changed(path, value)))
    with pytest.raises(SourceError, match=said):
        Manifest.read(tmp_path / "m.json")
    (tmp_path / "m.json").write_bytes(sealed(body()))
    assert Manifest.read(tmp_path / "m.json") == example()


def test_hostile_json(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    deep = b"[" * 200_000
    for head in (
        deep,
        b'{"a": ' + deep,
        b'{"schema": 1, "schema": 1,',
        b'{"x": NaN,',
        b'{"x": 1' + b"0" * 9999 + b",",
        b"",
    ):
        path.write_bytes(head + b'"digest": "%s"\n}\n' % digest(head).encode())
        with pytest.raises(SourceError):
            Manifest.read(path)
    os.mkfifo(tmp_path / "fifo")
    for odd in (tmp_path / "fifo", tmp_path / "none", tmp_path):
        with pytest.raises(SourceError, match="no such file"):
            Manifest.read(odd)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PATHS = [
    "schema", "version", "source", "source|headers", "placement", "options", "files", "ranks", "ranks|0|rank",
    "ranks|0|files", "ranks|0|tensors", "ranks|0|tensors|empty", A + "shape", A + "offset", "ranks|0|aliases",
]  # fmt: skip


@given(st.sampled_from(PATHS), anything)
@settings(max_examples=150, deadline=None)
def test_any_value_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, path: str, value: object
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    file.write_bytes(sealed(changed(path, value)))
    try:
        read = Manifest.read(file)
    except SourceError:
        return
    assert json.loads(b"".join(read.text()))["ranks"] == json.loads(file.read_bytes())["ranks"]


def test_ranks_merge() -> None:
    a, b = example(0, 2), example(1, 2)
    later = replace(b, created="2027-01-01T00:00:00+00:00", files={"tokenizer.json": FileEntry(1, D)})
    whole = merged([later, a])
    assert [s.rank for s in whole.shards] == [0, 1] and whole.complete and not a.complete
    assert not replace(whole, world=1 << 61).complete
    assert whole.created == later.created and set(whole.files) == {"config.json", "tokenizer.json"}
    moved = replace(b.record, source=replace(b.record.source, headers="other"))
    for odd, said in (
        (replace(b, key="k2"), "plan key"),
        (replace(b, world=3), "world"),
        (replace(b, record=moved), "source headers"),
        (replace(b, files={"config.json": FileEntry(8, D)}), "another config.json"),
    ):
        with pytest.raises(WriteError, match=said):
            merged([a, odd])


def test_record_names() -> None:
    assert rank_of("fastckpt-rank-12.json") == 12
    for name in (
        "fastckpt-rank-.json",
        "fastckpt-rank-01.json",
        "fastckpt-rank--1.json",
        "xfastckpt-rank-1.json",
    ):
        assert rank_of(name) is None
