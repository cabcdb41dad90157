"""safetensors: files of the reference writer read back bit for bit, and every rule of the header."""

from __future__ import annotations

import json
import struct

import pytest
import reading
import torch
from fastckpt import sources
from fastckpt.errors import SourceError
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import holds, refuses
from safetensors.torch import save_file

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(5, dtype=torch.int64), "c": torch.zeros(0, 3),
    "d": torch.arange(6).to(torch.bfloat16), "e": torch.tensor([True, False]), "f": torch.ones(2, 2).half(),
    "g": torch.ones(3).to(torch.float8_e4m3fn),
}  # fmt: skip


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_pieces_of_a_distributed_save_are_no_tensors(tmp_path):
    where = {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [0, 0]}}), "format": "pt"}
    save_file({"a": TENSORS["a"]}, tmp_path / "shard-00001-model-00001-of-00001.safetensors", metadata=where)
    for path in (tmp_path, tmp_path / "shard-00001-model-00001-of-00001.safetensors"):
        refuses(path, "holds pieces of tensors", "consolidate_safetensors_files")


def test_pieces_that_were_joined_name_the_whole(tmp_path):
    """As NeMo Automodel's last save leaves them: a user names the directory of the pieces."""
    where = {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [0, 0]}}), "format": "pt"}
    save_file({"a": TENSORS["a"]}, tmp_path / "shard-00001-model-00001-of-00001.safetensors", metadata=where)
    whole = tmp_path / "consolidated"
    whole.mkdir()
    save_file({"a": TENSORS["a"]}, whole / "model.safetensors")
    refuses(tmp_path, "holds pieces of tensors", f"open {whole}")


def test_a_whole_save_of_torch_s_hugging_face_writer(tmp_path):
    """Of rank 0 alone; ranks that write pieces at once give their files one name, and the last one wins."""
    where = {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [0, 0]}}), "format": "pt"}
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00001-of-00001.safetensors", metadata=where)
    index = tmp_path / "model.safetensors.index.json"
    mapped = {"a": "model-00001-of-00001.safetensors"}
    index.write_text(json.dumps({"metadata": {"total_size": TENSORS["a"].nbytes}, "weight_map": mapped}))
    ckpt = sources.open(tmp_path)
    holds(ckpt, {"a": TENSORS["a"]})
    assert ckpt.facts["metadata"] == {"format": "pt"}
    index.write_text(json.dumps({"metadata": {"total_size": 2 * TENSORS["a"].nbytes}, "weight_map": mapped}))
    refuses(
        tmp_path, f"hold {TENSORS['a'].nbytes} bytes, the index says {2 * TENSORS['a'].nbytes}: ranks wrote"
    )


def test_one_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        ckpt = sources.open(path)
        holds(ckpt, TENSORS)
        assert ckpt.format == "safetensors"
        assert ckpt.facts["metadata"] == {"format": "pt"}


def sharded(path):
    path.mkdir(exist_ok=True)
    files = {f"model-{k:05d}-of-00007.safetensors": {n: t} for k, (n, t) in enumerate(TENSORS.items(), 1)}
    for file, tensors in files.items():
        save_file(tensors, path / file)
    index = {"metadata": {}, "weight_map": {n: file for file, tensors in files.items() for n in tensors}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return index["weight_map"]


def test_shards_with_an_index(tmp_path):
    sharded(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    save_file({"z": torch.zeros(2)}, tmp_path / "adapter.safetensors")
    ckpt = sources.open(tmp_path)
    holds(ckpt, TENSORS)
    assert ckpt.config == {"hidden_size": 4}
    assert any(note.startswith("adapter.safetensors") for note in ckpt.unread)
    holds(sources.open(tmp_path / "model.safetensors.index.json"), TENSORS)


def test_shards_without_an_index(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    holds(sources.open(tmp_path), TENSORS)


def test_a_whole_file_beside_an_index_s_is_in_doubt(tmp_path):
    """save_pretrained in one file, then in several: transformers 5.23 loads the first save."""
    sharded(tmp_path)
    save_file({n: torch.zeros_like(x) for n, x in TENSORS.items()}, tmp_path / "model.safetensors")
    refuses(tmp_path, "model.safetensors lies beside the files of model.safetensors.index.json")
    holds(sources.open(tmp_path / "model.safetensors.index.json"), TENSORS)
    sources.open(tmp_path / "model.safetensors")


def test_shards_on_two_disks(tmp_path):
    sharded(tmp_path / "a")
    (tmp_path / "b").mkdir()
    moved = "model-00001-of-00007.safetensors"
    (tmp_path / "a" / moved).rename(tmp_path / "b" / moved)
    refuses(tmp_path / "a", moved, "is missing in")
    holds(sources.open(tmp_path / "a", also=[tmp_path / "b"]), TENSORS)


def test_index_rules(tmp_path):
    placed = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"

    def with_map(change):
        index.write_text(json.dumps({"weight_map": {**placed, **change}}))

    for name in ("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", ""):
        with_map({"a": name})
        refuses(tmp_path, "no file name of this directory")
    with_map({"a": placed["b"]})
    refuses(tmp_path, "the index says a is in", "it is in")
    with_map({"zz": placed["b"]})
    refuses(tmp_path, "the index says zz is in", "in no file")
    index.write_text(json.dumps({"weights": {}}))
    refuses(tmp_path, "no weight_map")
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    refuses(tmp_path, "'a' stands twice")


def test_several_indexes(tmp_path):
    save_file(TENSORS, tmp_path / "a-1.safetensors")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    refuses(tmp_path, "several indexes: a.safetensors.index.json, b.safetensors.index.json; open the one")
    own = {"weight_map": dict.fromkeys(TENSORS, "a-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(own))
    holds(sources.open(tmp_path), TENSORS)


def test_an_index_that_names_too_little(tmp_path):
    save_file(TENSORS, tmp_path / "model-1.safetensors")
    placed = {n: "model-1.safetensors" for n in TENSORS if n != "b"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    refuses(tmp_path, "the index does not name b")


@pytest.mark.parametrize("opened", [".", "model.safetensors.index.json"])
def test_an_index_that_leaves_out_a_file_of_its_set(tmp_path, opened):
    placed = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    lost = next(n for n in placed if n != next(iter(placed)))
    index.write_text(json.dumps({"weight_map": {n: f for n, f in placed.items() if n != lost}}))
    refuses(tmp_path / opened, placed[lost], f"the index names neither it nor {lost} (1 tensors")
    (tmp_path / placed[lost]).unlink()  # what is not there at all is not asked for
    assert lost not in sources.open(tmp_path / opened)


def test_a_file_of_the_set_that_holds_nothing_new_is_only_noted(tmp_path):
    placed = sharded(tmp_path)
    save_file({n: TENSORS[n] for n in list(placed)[:2]}, tmp_path / "model-00009-of-00007.safetensors")
    ckpt = sources.open(tmp_path)
    holds(ckpt, TENSORS)
    assert any(note.startswith("model-00009-of-00007") for note in ckpt.unread)


def test_a_long_name(tmp_path):
    name = "x" * 70_000
    save_file({name: torch.ones(2)}, tmp_path / "model.safetensors")
    holds(sources.open(tmp_path), {name: torch.ones(2)})


def test_a_name_in_two_files(tmp_path):
    for k in range(2):
        save_file({"x": torch.ones(2)}, tmp_path / f"part-{k}.safetensors")
    refuses(tmp_path, "x is also in")


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


BROKEN = {
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "a hole before b"),
    "hole at the start": ({"a": entry(4, 8)}, 8, "a hole before a"),
    "overlap": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "an overlap at b"),
    "trailing bytes": ({"a": entry(0, 4)}, 5, "data ends at byte"),
    "too short": ({"a": entry(0, 4)}, 3, "data ends at byte"),
    "size and shape": ({"a": entry(0, 8)}, 8, "8 bytes for float32[1], wanted 4"),
    "overflow": ({"a": entry(0, 4, (1 << 40, 1 << 40))}, 4, "wanted"),
    "zero times huge": ({"a": entry(0, 0, (0, 1 << 63))}, 0, "are no tensor's"),
    "negative": ({"a": entry(0, 4, (-1,))}, 4, "are no tensor's"),
    "no list": ({"a": entry(0, 4) | {"shape": 1}}, 4, "shape 1, data_offsets [0, 4] are no tensor's"),
    "half an element": ({"a": entry(0, 4, (3,), "F4")}, 4, "a: float4_e2m1fn_x2: [3] does not"),
    "backwards": ({"a": entry(4, 0)}, 4, "are no tensor's"),
    "a bool": ({"a": entry(0, 4, (True,))}, 4, "are no tensor's"),
    "dtype": ({"a": entry(0, 4, dtype="F3")}, 4, "dtype 'F3' is none of"),
    "a key more": ({"a": entry(0, 4) | {"more": 1}}, 4, "wanted dtype, shape and data_offsets"),
    "no object": ({"a": 1}, 0, "wanted dtype, shape and data_offsets"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "no map of strings"),
    "doubled": (b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), 4, "'a' stands twice"),
    "not utf-8": (b'{"\xff": 1}', 0, "no UTF-8"),
    "not json": (b"{nothing", 0, "no JSON"),
    "no brace": (b" {}", 0, "header begins with"),
    "deep": (b"{" + b'"a":{' * 100_000, 0, "no JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "data", "word"), BROKEN.values(), ids=BROKEN)
def test_headers_that_break_a_rule(tmp_path, header, data, word):
    refuses(raw(tmp_path / "x.safetensors", header, bytes(data)), "x.safetensors", word)


@pytest.mark.parametrize(
    "data", [b"", b"1234567", struct.pack("<Q", 100), struct.pack("<Q", 1 << 63) + b"{}"]
)
def test_lengths_that_lie(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    refuses(tmp_path, "header of" if len(data) >= 8 else f"{len(data)} bytes are too few")


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_headers_are_an_error_or_read_inside_the_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    save_file({n: TENSORS[n] for n in "abe"}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    try:
        ckpt = sources.open(path)
    except SourceError:
        return
    for name in ckpt:
        reading.read(ckpt[name])


def test_zero_options_are_refused(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    refuses(tmp_path, "no ZeRO checkpoint", tag="x")
    refuses(tmp_path, "no ZeRO checkpoint", weights="module")


def test_a_part_of_a_numbered_set_is_refused(tmp_path):
    for n in (1, 2):
        save_file({f"t{n}": torch.ones(n)}, tmp_path / f"model-0000{n}-of-00002.safetensors")
    assert sorted(sources.open(tmp_path)) == ["t1", "t2"]
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    refuses(tmp_path, "only 1", "(2)")
    assert sorted(sources.open(tmp_path / "model-00002-of-00002.safetensors")) == ["t2"], "asked for alone"
