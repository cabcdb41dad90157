"""File layouts against the packages that define them: safetensors, torch.save, huggingface_hub."""

from __future__ import annotations

import io
import json
import random
import warnings
import zipfile
from pathlib import Path
from zlib import crc32

import pytest
import safetensors.torch
import torch
from fastckpt.dtypes import BY_NAME
from fastckpt.errors import LayoutError, WriteError
from fastckpt.output import files
from fastckpt.output.files import FileLayout, Slot, Spec, parse_size, safetensors_layout, split
from fastckpt.output.pickling import Wrap
from fastckpt.output.torchzip import torch_layout
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.serialization import skip_data
from torch_types import KNOWN

SHAPES = [(), (3,), (2, 3), (2, 3, 4), (1, 2, 3, 4), (0,), (3, 0), (300,)]


def raw(t: torch.Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def spec(name: str, t: torch.Tensor) -> Spec:
    return name, BY_NAME[str(t.dtype).removeprefix("torch.")], tuple(t.shape)


def assembled(layout: FileLayout, data: dict[str, bytes]) -> bytes:
    """The file, having seen that parts and slots tile it."""
    parts = [(0, b"".join(layout.head())), *layout.fixed, *((s.offset, data[s.name]) for s in layout.slots)]
    parts += layout.closing({name: crc32(d) for name, d in data.items()})
    out = bytearray()
    for offset, part in sorted(parts, key=lambda p: (p[0], len(p[1]))):
        assert offset == len(out)
        out += part
    assert len(out) == layout.nbytes
    return bytes(out)


def every_type(names: list[str], shapes: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """One tensor of random bytes (bools: zeros and ones) a type and shape, names out of order."""
    out = {}
    for name in names:
        for shape in shapes:
            dtype = getattr(torch, name)
            n = torch.Size(shape).numel() * dtype.itemsize
            top = 2 if name == "bool" else 256
            data = torch.randint(0, top, (n,), dtype=torch.uint8)
            out[f"{random.Random(str(shape) + name).random()}.{name}.é"] = (
                data.view(dtype).reshape(shape).clone() if n else torch.empty(shape, dtype=dtype)
            )
    return out


# ---- safetensors ----


def saved(tensors: dict[str, torch.Tensor], tmp: Path, metadata: dict[str, str] | None) -> bytes:
    safetensors.torch.save_file(tensors, tmp / "x.safetensors", metadata=metadata)
    return (tmp / "x.safetensors").read_bytes()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {'q"\\\n\x01é': "v\t\x7f"}])
def test_safetensors_is_save_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    spelled = [d for d in KNOWN if d.safetensors]
    tensors = every_type([d.name for d in spelled if d.packed == 1], SHAPES)
    tensors |= every_type([d.name for d in spelled if d.packed > 1], [s for s in SHAPES if s])
    layout = safetensors_layout("x.safetensors", [spec(*t) for t in tensors.items()], metadata or {})
    assert assembled(layout, {n: raw(t) for n, t in tensors.items()}) == saved(tensors, tmp_path, metadata)


def test_safetensors_of_nothing_and_odd_names(tmp_path: Path) -> None:
    assert assembled(safetensors_layout("x", [], {}), {}) == saved({}, tmp_path, None)
    tensors = {n: torch.tensor([1.0]) for n in ["", " ", "\x00", "\n", '"', "\\", "é", "😀", "a" * 300, "/"]}
    layout = safetensors_layout("x", [spec(*t) for t in tensors.items()], {})
    assert assembled(layout, {n: raw(t) for n, t in tensors.items()}) == saved(tensors, tmp_path, None)


def test_safetensors_header_of_very_many_tensors(tmp_path: Path) -> None:
    """It is made in pieces, which must join."""
    tensors = {f"é{k}": torch.tensor([k], dtype=torch.int16) for k in range(3 * files._LINES)}
    layout = safetensors_layout("x", [spec(*t) for t in tensors.items()], {"format": "pt"})
    assert max(map(len, layout.head())) < len(b"".join(layout.head())) // 2
    whole = assembled(layout, {n: raw(t) for n, t in tensors.items()})
    assert whole == saved(tensors, tmp_path, {"format": "pt"})


def test_safetensors_keep_order(tmp_path: Path) -> None:
    """In the order given within a type; types still by alignment, so that the package can load it."""
    tensors = {"z": torch.ones(3), "odd": torch.ones(5, dtype=torch.uint8), "a": torch.zeros(2)}
    layout = safetensors_layout("x", [spec(*t) for t in tensors.items()], {}, keep_order=True)
    assert [s.name for s in layout.slots] == ["z", "a", "odd"]
    (tmp_path / "x").write_bytes(assembled(layout, {n: raw(t) for n, t in tensors.items()}))
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())


def test_a_header_that_no_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = safetensors_layout("x", [("a", BY_NAME["float32"], ())], {})
    monkeypatch.setattr(files, "_MAX_HEADER", layout.slots[0].offset - 8)
    assert safetensors_layout("x", [("a", BY_NAME["float32"], ())], {}).nbytes == layout.nbytes
    with pytest.raises(WriteError, match=r"x: a header of \d+ bytes; safetensors reads at most \d+; cut it"):
        safetensors_layout("x", [("a", BY_NAME["float32"], ()), ("b", BY_NAME["float32"], ())], {})


def test_safetensors_refuses() -> None:
    f32, c128 = BY_NAME["float32"], BY_NAME["complex128"]
    with pytest.raises(WriteError, match="complex128"):
        safetensors_layout("x", [("a", c128, ())], {})
    with pytest.raises(WriteError, match="two tensors named a"):
        safetensors_layout("x", [("a", f32, ()), ("a", f32, (2,))], {})
    with pytest.raises(WriteError, match="__metadata__"):
        safetensors_layout("x", [("__metadata__", f32, ())], {})
    with pytest.raises(WriteError, match="float4_e2m1fn_x2 without an axis"):
        safetensors_layout("x", [("a", BY_NAME["float4_e2m1fn_x2"], ())], {})
    with pytest.raises(WriteError, match="Unicode"):
        safetensors_layout("x", [("\ud800", f32, ())], {})


# ---- torch ----

NEWER = (".format_version", ".storage_alignment")
"""Records that torch writes since 2.7; older ones read past them, and have all that follows elsewhere."""


def records(file: bytes) -> dict[str, bytes]:
    """The records by name, in order, but for the serialization id."""
    with zipfile.ZipFile(io.BytesIO(file)) as z:
        read = {name.split("/", 1)[1]: z.read(name) for name in z.namelist()}
    assert list(read)[-1] == ".data/serialization_id"
    return dict(list(read.items())[:-1])


def writes_newer() -> bool:
    """Whether this torch writes them."""
    torch.save({}, made := io.BytesIO())
    return set(NEWER) <= set(records(made.getvalue()))


def same_as_torch(
    tensors: dict[str, torch.Tensor],
    path: Path,
    aliases: dict[str, str] | None = None,
    wrap: Wrap | None = None,
) -> bytes:
    """Our file, having compared it with torch.save's: all bytes but the serialization id and its CRC.

    A torch that does not write all records (NEWER) must have the others."""
    aliases = aliases or {}
    state = {**tensors, **{a: tensors[h] for a, h in aliases.items()}}
    torch.save(state if wrap is None else {wrap.weights_key: state, **wrap.client_state}, path)
    layout = torch_layout(path.name, [spec(*t) for t in tensors.items()], aliases, wrap)
    got, want = assembled(layout, {n: raw(t) for n, t in tensors.items()}), path.read_bytes()
    if not writes_newer():
        ours = [record for record in records(got).items() if record[0] not in NEWER]
        assert ours == list(records(want).items())
        path.write_bytes(got)
        return got
    with zipfile.ZipFile(path) as z:
        info = z.infolist()[-1]
        assert info.filename.endswith(".data/serialization_id")
        fields = want[info.header_offset + 26 :]
        start = (
            info.header_offset
            + 30
            + int.from_bytes(fields[:2], "little")
            + int.from_bytes(fields[2:4], "little")
        )
    free = set(range(start, start + 40)) | set(range(start + 44, start + 48))
    central = want.rindex(info.filename.encode()) - 46
    free |= set(range(central + 16, central + 20))
    assert len(got) == len(want)
    assert [k for k in range(len(got)) if got[k] != want[k] and k not in free] == []
    path.write_bytes(got)
    return got


def accepted(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loaded by torch both ways, equal by bits; zip CRCs right."""
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded)[: len(tensors)] == list(tensors)
        for name, t in tensors.items():
            assert loaded[name].dtype == t.dtype and loaded[name].shape == t.shape
            assert raw(loaded[name]) == raw(t)
    return dict(loaded)


def test_torch_file_is_torch_save(tmp_path: Path) -> None:
    tensors = every_type([d.name for d in KNOWN], SHAPES)
    first, second = list(tensors)[1], list(tensors)[40]
    same_as_torch(tensors, tmp_path / "pytorch_model.bin", {"tied": second, "tied.2": first, "tied.3": first})
    loaded = accepted(tmp_path / "pytorch_model.bin", tensors)
    assert loaded["tied.2"].untyped_storage().data_ptr() == loaded[first].untyped_storage().data_ptr()
    assert list(loaded)[-3:] == ["tied", "tied.2", "tied.3"]


def test_torch_file_of_an_empty_name(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "": torch.arange(5.0)}
    same_as_torch(tensors, tmp_path / "x.bin", {"tied": ""})
    accepted(tmp_path / "x.bin", tensors)


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 2000])
def test_torch_file_of_many(tmp_path: Path, count: int) -> None:
    tensors = {f"t{k}": torch.tensor([k]) for k in range(count)}
    same_as_torch(tensors, tmp_path / "x.bin")
    accepted(tmp_path / "x.bin", tensors)


@pytest.mark.nightly
def test_torch_file_of_more_than_16_bits(tmp_path: Path) -> None:
    same_as_torch({f"t{k}": torch.tensor([k]) for k in range(70_000)}, tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["a.b-c.bin", "noext", "pytorch_model-00001-of-00002.bin"])
def test_torch_file_names_its_root_as_torch(tmp_path: Path, name: str) -> None:
    same_as_torch({"w": torch.ones(2)}, tmp_path / name)


def test_torch_file_of_a_training_checkpoint(tmp_path: Path) -> None:
    values = {
        "step": 3, "list": [1, 2.5, None, True, False, "é", {}], "empty": [], "one": [1],
        "big": [-1, -128, -129, -(2**31), -(2**31) - 1, -(2**40), 2**31, 2**63, 2**100],
        "trimmed": [-(2**39), -(2**63), 255, 256, 1 << 16],
        "thousand": list(range(1000)), "more": list(range(1001)), "keys": {str(k): k for k in range(1000)},
        "deep": {"a": {"b": [{"c": -0.0}]}},
    }  # fmt: skip
    wrap = Wrap("module", values)
    same_as_torch({"w": torch.ones(2)}, tmp_path / "x.pt", {"tied": "w"}, wrap)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {k: v for k, v in loaded.items() if k != "module"} == values
    assert loaded["module"]["tied"] is loaded["module"]["w"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
@settings(max_examples=60, deadline=None)
def test_client_state_comes_back(value: object) -> None:
    layout = torch_layout("x.pt", [], {}, Wrap("module", {"value": value}))  # type: ignore[dict-item]
    assert torch.load(io.BytesIO(assembled(layout, {})), weights_only=True) == {"module": {}, "value": value}


def test_torch_file_beyond_4_gib(tmp_path: Path) -> None:
    """Every header of a 5 GiB file where torch has it; torch leaves the CRCs of skipped data at 0."""
    if not writes_newer():
        pytest.skip(f"torch {torch.__version__} writes no {' and no '.join(NEWER)}, so it has them elsewhere")
    tensors = {
        "big": torch.empty(5 << 30, dtype=torch.uint8),
        "small": torch.arange(10.0),
        "none": torch.empty(0),
        "last": torch.empty(3, dtype=torch.bfloat16),
    }
    with skip_data(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(tensors, tmp_path / "z.bin")
    layout = torch_layout("z.bin", [spec(*t) for t in tensors.items()])
    closing = layout.closing(dict.fromkeys(tensors, 0))
    assert layout.nbytes == (tmp_path / "z.bin").stat().st_size
    with open(tmp_path / "z.bin", "rb") as f:
        for offset, part in [*layout.fixed, *closing[:-1]]:
            f.seek(offset)
            assert f.read(len(part)) == part
        offset, part = closing[-1]
        f.seek(offset)
        want = f.read()
    assert len(part) == len(want)
    crc = part[44:48]
    assert part[40:44] + part[48:].replace(crc, want[44:48], 1) == want[40:44] + want[48:]


def test_torch_file_refuses() -> None:
    f32 = BY_NAME["float32"]
    with pytest.raises(WriteError, match="two tensors named a"):
        torch_layout("x.bin", [("a", f32, ()), ("a", f32, ())])
    for aliases in ({"a": "a"}, {"b": "c"}):
        with pytest.raises(WriteError, match="alias"):
            torch_layout("x.bin", [("a", f32, ())], aliases)
    with pytest.raises(WriteError, match="a key 'module' of its own"):
        torch_layout("x.bin", [], {}, Wrap("module", {"module": 1}))
    with pytest.raises(WriteError, match="set"):
        torch_layout("x.bin", [], {}, Wrap("module", {"x": {1, 2}}))  # type: ignore[dict-item]
    with pytest.raises(WriteError, match="no CRC32 given for a"):
        torch_layout("x.bin", [("a", f32, ())]).closing({})
    with pytest.raises(
        WriteError, match=r"x\.bin: client state holds an integer of 256 bytes, wanted at most 255"
    ):
        torch_layout("x.bin", [], {}, Wrap("module", {"x": [1 << 2040]}))
    torch_layout("x.bin", [], {}, Wrap("module", {"x": [(1 << 2039) - 1, -(1 << 2039)]}))
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(WriteError, match="nested"):
        torch_layout("x.bin", [], {}, Wrap("module", {"x": nested}))  # type: ignore[dict-item]


# ---- which tensor goes into which file ----


def hub_names(part: int, parts: int) -> str:
    return "m.bin" if parts == 1 else f"m-{part + 1:05d}-of-{parts:05d}.bin"


def test_split_is_the_hubs() -> None:
    """Random sizes, limits and shared storages, against huggingface_hub and DeepSpeed's index text."""
    rng = random.Random(0)
    for _ in range(100):
        state: dict[str, torch.Tensor] = {}
        for k in range(rng.randrange(1, 12)):
            dtype = rng.choice([torch.float32, torch.bfloat16, torch.uint8])
            state[f"t{k}"] = torch.zeros(rng.randrange(1, 60), dtype=dtype)
        tensors = [spec(*t) for t in state.items()]
        aliases = {f"x{k}": rng.choice(list(state)) for k in range(rng.randrange(3))}
        state |= {a: state[h] for a, h in aliases.items()}
        limit = rng.choice([1, 50, 100, 240, "0.2KB", "1KB"])
        want = split_torch_state_dict_into_shards(
            state, filename_pattern="m{suffix}.bin", max_shard_size=limit
        )
        got = split(tensors, limit, hub_names, aliases)
        assert {
            g.path: [*(t[0] for t in g.tensors), *g.aliases] for g in got.groups
        } == want.filename_to_tensors
        index = {"metadata": want.metadata, "weight_map": want.tensor_to_filename}
        text = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        assert got.index == (text if want.is_sharded else None)


def test_split_into_one() -> None:
    tensors = [("a", BY_NAME["float32"], (3,)), ("b", BY_NAME["uint8"], ())]
    got = split(tensors, None, hub_names, {"c": "b", "d": "a"})
    assert [(g.path, [*g.tensors], g.aliases) for g in got.groups] == [
        ("m.bin", tensors, {"c": "b", "d": "a"})
    ]
    assert (got.total, got.index) == (13, None)
    assert [g.path for g in split([], "5GB", hub_names).groups] == ["m.bin"]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("0.5 kb", 500), (" 2MiB", 2 << 20), ("1TiB", 1 << 40), (7, 7), ("7", 7),
     ("1B", None),
     ("", None), ("-1GB", None), ("0", None), ("GB", None), ("5XB", None), ("1e9", None), (0, None)],
)  # fmt: skip
def test_sizes(text: str | int, nbytes: int | None) -> None:
    if nbytes is None:
        with pytest.raises(LayoutError, match="wanted a number of bytes"):
            parse_size(text)
    else:
        assert parse_size(text) == nbytes


def test_a_size_says_whose_it_is() -> None:
    with pytest.raises(LayoutError, match=r"^max_shard_size '0': wanted a number of bytes from 1 on"):
        split([], "0", hub_names)


def test_slots_say_where_tensors_lie(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5.0), "b": torch.arange(3)}
    layout = safetensors_layout("x", [spec(*t) for t in tensors.items()], {})
    file = assembled(layout, {n: raw(t) for n, t in tensors.items()})
    assert all(
        isinstance(s, Slot) and file[s.offset :][: s.nbytes] == raw(tensors[s.name]) for s in layout.slots
    )
