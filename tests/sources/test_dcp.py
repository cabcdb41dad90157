"""The DCP source against torch.distributed.checkpoint: saves of FSDP2, and saves made of its own records."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import fastckpt
import pytest
import reading
import torch
from fastckpt import sources
from fastckpt.errors import SourceError
from fastckpt.sources import torchfile
from reading import holds, refuses
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEPT = ("fsdp-w3", "fsdp-tp-w4")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Box = tuple[tuple[int, ...], tuple[int, ...]]


# ---- what FSDP wrote ----


@pytest.mark.parametrize("name", KEPT)
def test_what_fsdp_wrote_is_what_torch_gathers(name):
    path = FIXTURES / name
    truth = load_file(path / "truth.safetensors")
    holds(sources.open(path), truth)
    holds(sources.open(path / "pytorch_model_fsdp_0", check_crc=True), truth)
    assert [note.split(":")[0] for note in sources.open(path).unread] == ["optim", "step"]


def test_a_tied_pair_is_one_tensor():
    tied = fastckpt.open(FIXTURES / "fsdp-w3")
    assert dict(tied.aliases) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not fastckpt.open(FIXTURES / "fsdp-tp-w4").aliases


def test_a_tied_pair_of_a_vision_language_model(tmp_path):
    root = Path(shutil.copytree(FIXTURES / "fsdp-w3", tmp_path / "in"))
    text = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({"text_config": text, "tie_word_embeddings": True}))
    assert dict(fastckpt.open(root).aliases) == {"lm_head.weight": "model.embed_tokens.weight"}
    (root / "config.json").write_text(json.dumps({"text_config": text, "tie_word_embeddings": False}))
    assert not fastckpt.open(root).aliases


def test_a_tied_pair_of_a_save_without_its_config(tmp_path):
    root, beside = tmp_path / "in", FIXTURES / "fsdp-w3"
    shutil.copytree(beside / "pytorch_model_fsdp_0", root)
    assert not fastckpt.open(root).aliases
    whole = tmp_path / "whole"
    fastckpt.reshard(beside, out=whole)
    assert fastckpt.diff(root, whole).equal
    want = fastckpt.reshard(beside, tp=2, layout="vllm")
    for ckpt in (root, fastckpt.open(root)):
        got = fastckpt.reshard(ckpt, tp=2, layout="vllm", config=beside)
        assert all(
            list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in b)
            for a, b in zip(got, want, strict=True)
        )


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize(("layout", "tp"), [("hf", 1), ("vllm", 2), ("rtp_llm", 2)])
def test_shards_are_those_of_the_gathered_model(name, layout, tp):
    path = FIXTURES / name
    truth = load_file(path / "truth.safetensors")
    if json.loads((path / "config.json").read_text())["tie_word_embeddings"]:
        del truth["lm_head.weight"]
    want = fastckpt.reshard(truth, tp=tp, layout=layout, config=path, dtype="bfloat16")
    got = fastckpt.reshard(path, tp=tp, layout=layout, dtype="bfloat16")
    for a, b in zip(got, want, strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in b)


@pytest.mark.nightly
@pytest.mark.parametrize(("world", "tp", "tied"), [(2, 1, False), (3, 1, True), (4, 2, False), (4, 1, True)])
def test_what_the_installed_torch_writes(tmp_path, world, tp, tied):
    made = Path(__file__).parents[1] / "real/make_dcp.py"
    argv = [sys.executable, made, "--world", str(world), "--tp", str(tp), *(["--tied"] * tied), tmp_path]
    subprocess.run(argv, check=True, timeout=900)
    holds(sources.open(tmp_path), load_file(tmp_path / "truth.safetensors"))


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 5, generator=made),
        "b": torch.randn(3, generator=made).bfloat16(),
        "whole": torch.arange(6).reshape(2, 3),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "f8": torch.randn(4, 4, generator=made).to(torch.float8_e4m3fn),
    }


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_where_the_model_is(tmp_path, key):
    whole = {"app": {key: state(), "optimizer": {"state": {"0": {"exp_avg": torch.ones(3)}}}}, "epoch": 3}
    dcp.save(whole, checkpoint_id=tmp_path / "a")
    found = sources.open(tmp_path / "a")
    holds(found, state())
    assert found.facts["state dict"] == f"app.{key}"
    flat = {**state(), "optimizer": {"w": torch.ones(3)}, "train_state": {"step": 1}}
    dcp.save(flat, checkpoint_id=tmp_path / "b")
    holds(sources.open(tmp_path / "b"), state())
    assert sources.open(tmp_path / "b").structure != found.structure
    beside = {"app": {**state(), "optimizer": {"w": torch.ones(3)}}}
    dcp.save(beside, checkpoint_id=tmp_path / "c")
    holds(sources.open(tmp_path / "c"), {f"app.{n}": x for n, x in state().items()})
    dcp.save({key: state(), "seed": torch.tensor(3)}, checkpoint_id=tmp_path / "d")
    holds(sources.open(tmp_path / "d"), state())


def test_the_first_of_accelerates_models(tmp_path):
    for k in (0, 1):
        folder = tmp_path / f"pytorch_model_fsdp_{k}"
        dcp.save({"model": {"w": torch.full((2,), k)}}, checkpoint_id=folder)
    found = sources.open(tmp_path)
    holds(found, {"w": torch.zeros(2, dtype=torch.int64)})
    assert "pytorch_model_fsdp_1: another model" in found.unread


def test_olmo_core_s_own_records_and_directory(tmp_path, monkeypatch):
    parts = ["olmo_core", "distributed", "checkpoint", "filesystem"]
    for k in range(len(parts)):
        name = ".".join(parts[: k + 1])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = sys.modules[name]._StorageInfo = type("_StorageInfo", (), {"__module__": name})
    root = tmp_path / "step10/model_and_optim"
    dcp.save({"model": state(), "optim": {"state": {"x": torch.ones(2)}}}, checkpoint_id=root)
    found = pickle.loads((root / ".metadata").read_bytes())
    for key, info in found.storage_data.items():
        found.storage_data[key] = kind()
        fields = ("relative_path", "offset", "length")
        found.storage_data[key].__dict__ = {f: getattr(info, f) for f in fields}
    (root / ".metadata").write_bytes(pickle.dumps(found))
    for path in (root, root.parent):
        holds(sources.open(path), state())


def test_a_nested_state_dict_is_joined_with_dots(tmp_path):
    nested = {"model": {"enc": {"w": torch.ones(2)}, "w": torch.zeros(2)}}
    dcp.save(nested, checkpoint_id=tmp_path)
    assert list(sources.open(tmp_path)) == ["enc.w", "w"]


def test_names_that_become_one_are_refused(tmp_path):
    pair = torch.ones(2), [((0,), (2,))]
    paths = {"x": ("model", "enc", "w"), "y": ("model", "enc.w")}
    write(tmp_path, {"x": pair, "y": pair}, paths=paths)
    with pytest.raises(SourceError, match=r"would both be enc\.w"):
        sources.open(tmp_path)


def test_several_models_and_none(tmp_path):
    dcp.save({"ema": {"model": state()}, "model": state()}, checkpoint_id=tmp_path / "two")
    with pytest.raises(SourceError, match=r"several state dicts of models: ema\.model, model"):
        sources.open(tmp_path / "two")
    dcp.save({"optim": {"w": torch.ones(2)}, "step": 1}, checkpoint_id=tmp_path / "none")
    with pytest.raises(SourceError, match="no tensors of a model; at the top: optim, step"):
        sources.open(tmp_path / "none")


# ---- saves made of torch's records, box by box ----


def write(
    path: Path,
    tensors: Mapping[str, tuple[torch.Tensor, list[Box]]],
    *,
    paths: Mapping[str, tuple[str, ...]] | None = None,
    change: Mapping[str, object] | None = None,
) -> None:
    """A save of `tensors` in these boxes, in two files by turns; `change`: what .metadata says otherwise."""
    path.mkdir(exist_ok=True)
    files: dict[str, io.BytesIO] = {f"__{k}_0.distcp": io.BytesIO() for k in (0, 1)}
    stored, places = {}, {}
    for name, (whole, boxes) in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in boxes]
        stored[name] = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.size(), chunks)
        for k, (at, size) in enumerate(boxes):
            file = f"__{k % 2}_0.distcp"
            begin = files[file].tell()
            blob = io.BytesIO()
            torch.save(whole[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))].clone(), blob)
            files[file].write(blob.getvalue())
            info = _StorageInfo(file, begin, files[file].tell() - begin)
            places[MetadataIndex(name, torch.Size(at), k)] = info
    stored["step"] = BytesStorageMetadata()
    places[MetadataIndex("step")] = _StorageInfo("__0_0.distcp", 0, 0)
    made = Metadata(stored, planner_data=paths, storage_data=places)
    for key, value in (change or {}).items():
        setattr(made, key, value)
    for name, body in files.items():
        (path / name).write_bytes(body.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(made))


def cut(n: int, at: list[int]) -> list[tuple[int, int]]:
    return [(a, b - a) for a, b in zip([0, *at], [*at, n], strict=True)]


GRID = [((a, b), (m, n)) for a, m in cut(7, [2, 5]) for b, n in cut(9, [4])]
SPIRAL = [((0, 0), (2, 7)), ((0, 7), (5, 2)), ((5, 2), (2, 7)), ((2, 0), (5, 2)), ((2, 2), (3, 5))]
MATRIX = torch.arange(63, dtype=torch.float32).reshape(7, 9)


@pytest.mark.parametrize("boxes", [GRID, GRID[::-1], SPIRAL], ids=["grid", "reversed", "spiral"])
def test_boxes_of_any_cut(tmp_path, boxes):
    write(tmp_path, {"w": (MATRIX, boxes), "v": (MATRIX[0].clone(), [((0,), (9,))])})
    holds(sources.open(tmp_path), {"w": MATRIX, "v": MATRIX[0]})
    turned = fastckpt.reshard(tmp_path, layout="same", dtype="bfloat16")[0]
    assert torch.equal(turned["w"], MATRIX.bfloat16())


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        (GRID[1:], r"its boxes have 55 elements, \[7, 9\] has 63"),
        ([((0, 0), (7, 9)), ((0, 0), (7, 8))], r"chunks of \(7, 9\) and \(7, 8\) at \(0, 0\)"),
        ([((0, 0), (4, 9)), ((3, 0), (3, 9))], r"boxes at \[0, 0\] and \[3, 0\] overlap"),
        ([((0, 0), (6, 9)), ((5, 0), (1, 9))], r"boxes at \[0, 0\] and \[5, 0\] overlap"),
    ],
)
def test_boxes_that_do_not_tile_are_refused(tmp_path, boxes, words):
    write(tmp_path, {"w": (MATRIX, boxes)})
    with pytest.raises(SourceError, match=words):
        sources.open(tmp_path)


def test_empty_boxes_of_small_tensors(tmp_path):
    """FSDP over more ranks than rows leaves some with none."""
    write(tmp_path, {"w": (MATRIX[:2], [((0, 0), (1, 9)), ((1, 0), (1, 9)), ((2, 0), (0, 9))])})
    holds(sources.open(tmp_path), {"w": MATRIX[:2]})


def test_files_that_are_missing_cut_or_of_another_save(tmp_path):
    def save(name: str) -> Path:
        write(tmp_path / name, {"w": (MATRIX, GRID)})
        return tmp_path / name

    gone = save("gone")
    (gone / "__1_0.distcp").unlink()
    refuses(gone, "names __1_0.distcp, which is missing")
    (tmp_path / "rest").mkdir()
    (save("whole") / "__1_0.distcp").rename(tmp_path / "rest/__1_0.distcp")
    holds(sources.open(tmp_path / "whole", also=[tmp_path / "rest"]), {"w": MATRIX})
    cut = save("cut")
    body = (cut / "__0_0.distcp").read_bytes()
    (cut / "__0_0.distcp").write_bytes(body[: len(body) // 2])
    refuses(cut, "__0_0.distcp: w at", "are outside a file of")
    torn = save("torn")
    (torn / ".metadata").unlink()
    refuses(torn, "a torch distributed checkpoint without .metadata: not finished")
    short = save("short")
    whole = (short / ".metadata").read_bytes()
    for n in range(0, len(whole), 97):
        (short / ".metadata").write_bytes(whole[:n])
        refuses(short, ".metadata")
    other = save("other")
    write(tmp_path / "bf16", {"w": (MATRIX.bfloat16(), GRID)})
    (other / ".metadata").write_bytes((tmp_path / "bf16/.metadata").read_bytes())
    refuses(other, "__0_0.distcp: w at")


def test_a_save_over_another_that_was_interrupted(tmp_path):
    """Files of a new save beside the old .metadata, in all that shows it."""

    def save(name: str, *others: str) -> Path:
        more = {other: (MATRIX[0].clone(), [((0,), (9,))]) for other in others}
        write(tmp_path / name, {"w": (MATRIX, GRID)} | more)
        return tmp_path / name

    tmp = save("tmp")
    (tmp / ".metadata.tmp").write_bytes(b"")
    refuses(tmp, ".metadata.tmp: a save over this one was interrupted")
    old, new = save("old"), save("new", "x")  # w lies where it was, and x behind it
    (old / "__0_0.distcp").write_bytes((new / "__0_0.distcp").read_bytes())
    refuses(old, "__0_0.distcp: has")
    newer = save("newer")
    written = (newer / ".metadata").stat().st_mtime_ns
    os.utime(newer / "__0_0.distcp", ns=(written, written))
    os.utime(newer / "__1_0.distcp", ns=(written, written))
    assert not sources.open(newer).notes
    os.utime(newer / "__1_0.distcp", ns=(written + 1, written + 1))
    (note,) = fastckpt.plan(newer, layout="same").notes
    assert note.startswith("1 of 2 files were written after .metadata, such as __1_0.distcp")


def test_a_flipped_byte_is_found_when_asked_for(tmp_path):
    write(tmp_path, {"w": (MATRIX, [((0, 0), (7, 9))])})
    body = bytearray((tmp_path / "__0_0.distcp").read_bytes())
    body[body.index(MATRIX.numpy().tobytes()) + 5] ^= 1
    (tmp_path / "__0_0.distcp").write_bytes(body)
    sources.open(tmp_path)
    with pytest.raises(SourceError, match="CRC32"):
        sources.open(tmp_path, check_crc=True)


def index(name: str, at: tuple[int, ...]) -> MetadataIndex:
    return MetadataIndex(name, torch.Size(at), 0)


def chunk(at: tuple[int, ...], size: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(at), torch.Size(size))


def stored(chunks: object) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=MATRIX.dtype), MATRIX.size(), chunks)


def compressed() -> _StorageInfo:
    """Where bytes lie that something was done to; torch 2.6 has no such field yet."""
    info = _StorageInfo("__0_0.distcp", 0, 9)
    info.transform_descriptors = ["zstd"]
    return info


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"storage_data": {}}, "does not say where w at (0, 0) is"),
        ({"storage_data": None}, "storage_data: wanted a dict, got NoneType"),
        ({"state_dict_metadata": {"w": 3}}, "no tensors of a model"),
        ({"state_dict_metadata": {3: BytesStorageMetadata()}}, "a name is 3; wanted a string"),
        ({"state_dict_metadata": {"w": stored(chunks=())}}, "w: its chunks are no list"),
        ({"state_dict_metadata": {"w": stored(chunks=[chunk((0,), (7,))])}}, "a chunk of (7,) at (0,) in"),
        ({"storage_data": {index("w", (0, 0)): _StorageInfo("../x", 0, 1)}}, "leaves the directory"),
        ({"storage_data": {index("w", (0, 0)): _StorageInfo("/etc/passwd", 0, 1)}}, "leaves the directory"),
        ({"storage_data": {index("w", (0, 0)): _StorageInfo("__0_0.distcp", -1, 1)}}, "outside a file"),
        ({"storage_data": {index("w", (0, 0)): _StorageInfo("__0_0.distcp", 0, 1 << 70)}}, "outside a file"),
        ({"storage_data": {index("w", (0, 0)): _StorageInfo("__0_0.distcp", 3, 40)}}, "no torch file"),
        (
            {"storage_data": {index("w", (0, 0)): compressed()}},
            "stored as ['zstd'], which is not read",
        ),
    ],
)  # fmt: skip
def test_metadata_that_lies(tmp_path, change, words):
    write(tmp_path, {"w": (MATRIX, [((0, 0), (7, 9))])}, change=change)
    refuses(tmp_path, words)


def test_a_box_that_is_said_to_lie_in_two_places(tmp_path, monkeypatch):
    """Ranks list the boxes that all of them hold, and torch keeps one place of each."""
    twice = {"w": (MATRIX, [((0, 0), (7, 9))] * 2)}
    write(tmp_path / "a", twice)
    holds(sources.open(tmp_path / "a"), {"w": MATRIX})
    monkeypatch.setattr(MetadataIndex, "__hash__", object.__hash__)
    monkeypatch.setattr(MetadataIndex, "__eq__", object.__eq__)
    write(tmp_path / "b", twice)
    refuses(tmp_path / "b", "w at (0, 0): lies in", "__0_0.distcp", "__1_0.distcp", "in doubt")


def test_a_box_that_is_no_tensor(tmp_path, monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda tensor, to: save({"w": tensor}, to))
    write(tmp_path, {"w": (MATRIX, [((0, 0), (7, 9))])})
    refuses(tmp_path, "__0_0.distcp: w at", "wanted a tensor, got dict")


def test_metadata_beyond_any_save(tmp_path, monkeypatch):
    write(tmp_path, {"w": (MATRIX, [((0, 0), (7, 9))])})
    monkeypatch.setattr(torchfile, "MAX_PICKLE", 100)
    refuses(tmp_path, ".metadata: has ", "the limit is 100")


def test_boxes_that_are_safetensors_are_refused(tmp_path):
    write(tmp_path, {"w": (MATRIX, [((0, 0), (7, 9))])})
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(b"\x00\x02".ljust(8, b"\0") + b'{"' + file.read_bytes()[10:])
    refuses(tmp_path, "no torch file", "SerializationFormat.SAFETENSORS")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("echo executed > /dev/null; exit 3",)


def test_nothing_in_metadata_is_called(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/.metadata").write_bytes(pickle.dumps(Evil()))
    refuses(tmp_path / "w", "wanted a Metadata, got posix.system")


def test_zero_options_are_refused(tmp_path):
    write(tmp_path, {"w": (MATRIX, [((0, 0), (7, 9))])})
    with pytest.raises(SourceError, match="no ZeRO checkpoint"):
        sources.open(tmp_path, weights="module")
    assert list(sources.open(tmp_path, rename=[("^w$", "x")])) == ["x"]


@pytest.mark.parametrize(
    "tries", [pytest.param(600, id="small"), pytest.param(30_000, id="large", marks=pytest.mark.nightly)]
)
def test_mutated_metadata_ends_in_an_error_of_ours_or_in_views(tmp_path, tries):
    """There is no checksum in it; what still opens has every tensor tiled by boxes of its dtype and shape."""
    write(tmp_path, {"w": (MATRIX, GRID), "v": (MATRIX[0].clone(), [((0,), (9,))])})
    data = (tmp_path / ".metadata").read_bytes()
    made = random.Random(tries)
    opened = 0
    for _ in range(tries):
        out = bytearray(data)
        for _ in range(made.choice((1, 1, 2, 4))):
            at = made.randrange(len(out))
            match made.randrange(3):
                case 0:
                    out[at] ^= 1 << made.randrange(8)
                case 1:
                    out[at] = made.choice(b"\0\xff.(tRbh2}]Nuse\x85\x86\x87\x94")
                case 2:
                    del out[at : at + made.choice((1, 2, 8))]
        (tmp_path / ".metadata").write_bytes(out)
        try:
            found = sources.open(tmp_path)
            for name in found:
                reading.read(found[name])
            opened += 1
        except SourceError:
            pass
    assert 0 < opened < tries


def test_metadata_of_many_boxes_is_large_beside_none_of_the_limits(tmp_path):
    """It builds more than its own size allows; the save that it is a part of is what counts."""
    boxes = [((k, 0), (1, 64)) for k in range(16_000)]
    write(tmp_path, {"w": (torch.ones(16_000, 64), boxes[:1])})
    info = _StorageInfo("__0_0.distcp", 0, (tmp_path / "__0_0.distcp").stat().st_size)
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in boxes]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size((16_000, 64)), chunks)
    places = {MetadataIndex("w", torch.Size(at), k): info for k, (at, _) in enumerate(boxes)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"w": tensor}, storage_data=places)))
    refuses(tmp_path, "builds more than")
    os.truncate(tmp_path / "__1_0.distcp", 32 << 20)
    assert torch.equal(fastckpt.reshard(tmp_path, layout="same")[0]["w"], torch.ones(16_000, 64))
