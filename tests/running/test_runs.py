"""The ranks of a set that are made one by one come from one step, whatever the source is."""

from __future__ import annotations

import ctypes
import os
import shutil

import fastckpt
import pytest
import torch
from fastckpt.errors import DeviceError, LayoutError, SourceError, WriteError
from fastckpt.running import runs
from safetensors.torch import save_file

PLAN = {"*": "colwise"}


def state(step):
    return {"a.weight": torch.full((40, 40), float(step)), "b.weight": torch.full((2, 8), step + 0.5).t()}


def in_memory(step, path):
    return state(step)


def partitions(step, path):
    flat = {n: t.reshape(-1) for n, t in state(step).items()}
    garbage = torch.rand(3)  # padding differs from rank to rank
    parts = [{n: t[:10] for n, t in flat.items()}, {n: torch.cat([t[10:], garbage]) for n, t in flat.items()}]
    return fastckpt.partitioned(parts, {n: tuple(t.shape) for n, t in state(step).items()})


def views_of_storages(step, path):
    """As a flat parameter's: what lies beside differs from rank to rank."""
    held = {n: torch.rand(3, *t.shape) for n, t in state(step).items()}
    for n, t in state(step).items():
        held[n][1] = t
    return {n: t[1] for n, t in held.items()}


def without_checksums(step, path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(step), path / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    os.utime(path / "pytorch_model.bin", (step, step))  # a copy for each rank, with its times
    return path


def shards(step, path):
    shutil.rmtree(path)
    fastckpt.reshard(state(step), 4, tp_plan=PLAN, out=path, durable=False)
    return path


@pytest.mark.parametrize("source", [in_memory, partitions, views_of_storages, without_checksums, shards])
def test_ranks_of_two_steps_are_no_set(tmp_path, source):
    """Names and shapes are the same: once the later step's ranks were taken for done, and left out."""
    (tmp_path / "in").mkdir()
    out = tmp_path / "out"
    for rank in (0, 1):
        fastckpt.reshard(source(1, tmp_path / "in"), 2, rank=rank, tp_plan=PLAN, out=out, durable=False)
    assert fastckpt.verify(out).ok
    later = source(2, tmp_path / "in")
    with pytest.raises(WriteError, match="is of another plan"):
        fastckpt.reshard(later, 2, rank=1, tp_plan=PLAN, out=out, durable=False)
    for rank in (0, 1):
        fastckpt.reshard(later, 2, rank=rank, tp_plan=PLAN, out=out, durable=False, overwrite=True)
    held = fastckpt.reshard(out, layout="same")[0]
    assert all(torch.equal(held[n], t) for n, t in state(2).items())


def touched(path):
    """The same bytes at another time."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def one_element(path):
    with open(path, "r+b") as f:
        f.seek(-8 * 4 * 777, os.SEEK_END)
        f.write(b"\0\0\x80?")


@pytest.mark.parametrize("save", ["safetensors", "legacy", "without CRC32"])
@pytest.mark.parametrize("change", [one_element, touched])
def test_a_file_that_was_written_since_is_of_another_plan(tmp_path, save, change):
    """No sample shows one element: a rank that was done would have been kept, or joined by new ones."""
    held, path = {"w": torch.zeros(2000, 8)}, tmp_path / "model.bin"
    if save == "safetensors":
        save_file(held, path := tmp_path / "model.safetensors")
    elif save == "legacy":
        torch.save(held, path, _use_new_zipfile_serialization=False)
    else:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(held, path)
        finally:
            torch.serialization.set_crc32_options(True)
    made = {"tp": 2, "tp_plan": PLAN, "out": tmp_path / "out", "durable": False}
    fastckpt.reshard(path, rank=0, **made)
    change(path)
    for rank in (0, 1):
        with pytest.raises(WriteError, match=r"another plan .* or the checkpoint's files were written since"):
            fastckpt.reshard(path, rank=rank, **made)
    for rank in (0, 1):
        fastckpt.reshard(path, rank=rank, overwrite=True, **made)
    new = fastckpt.consolidate(path)["w"]
    assert torch.equal(fastckpt.reshard(tmp_path / "out", layout="same")[0]["w"], new)
    assert new.any() == (change is one_element)


def test_memory_is_never_done(tmp_path):
    """A change that no sample shows is written all the same."""
    held = {"w": torch.zeros(1000, 8)}
    for value in (0.0, 1.0):
        held["w"][333] = value
        for rank in (0, 1):
            report = fastckpt.reshard(held, 2, rank=rank, tp_plan=PLAN, out=tmp_path / "out", durable=False)
            assert report.notes == () and report.bytes_written == 16000
    assert torch.equal(fastckpt.reshard(tmp_path / "out", layout="same")[0]["w"], held["w"])


def test_no_checksum_is_no_wrong_checksum(tmp_path):
    with pytest.raises(SourceError, match=r"data.pkl: holds no checksum.*set_crc32_options"):
        fastckpt.open(without_checksums(1, tmp_path), check_crc=True)


def test_a_rank_with_another_tokenizer_is_not_done(tmp_path):
    """Its files are copied beside the weights, and the old ones stayed there."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    torch.save(state(1), source / "pytorch_model.bin")
    for text in ("{}", '{"a": 1}'):
        (source / "tokenizer.json").write_text(text)
        for rank in (0, 1):
            fastckpt.reshard(source, 2, rank=rank, tp_plan=PLAN, out=out, durable=False, overwrite=True)
        assert (out / "tokenizer.json").read_text() == text and fastckpt.verify(out).ok
    (source / "tokenizer.json").write_text("[]")
    with pytest.raises(WriteError, match="is of another plan"):
        fastckpt.reshard(source, 2, rank=1, tp_plan=PLAN, out=out, durable=False)


def test_a_turned_tensor_of_very_many_lines_is_written(tmp_path):
    """It is looked into without being cut into its lines, of which a view holds 2^22 at most."""
    turned = torch.arange(10_000_000).to(torch.uint8).reshape(2, -1).t()
    fastckpt.reshard({"w": turned}, layout="same", out=tmp_path / "out", durable=False)
    assert torch.equal(fastckpt.consolidate(tmp_path / "out")["w"], turned)


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        (1 << 22, DeviceError, f"cpu: no memory for w: the outputs need {1 << 52} bytes"),
        (1 << 32, LayoutError, f"1 tensors, of {1 << 62} bytes"),
    ],
)
def test_tensors_that_nothing_has_room_for(rows, kind, said):
    """One element is stored, again and again."""
    one = torch.ones(1).expand(rows // 2, 2, 1 << 28)
    with pytest.raises(kind, match=said):
        fastckpt.reshard({"w": one}, layout="same")
    if kind is DeviceError:
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(torch.empty(one.shape, device="meta"))
        with pytest.raises(kind, match=said):
            fastckpt.load_into(module, {"w": one})


def test_a_process_of_any_name_can_tell_its_memory():
    """Linux keeps the name as bytes, and `/proc/self/status` begins with it."""
    libc, was = ctypes.CDLL(None), ctypes.create_string_buffer(16)
    libc.prctl(16, was)  # PR_GET_NAME
    libc.prctl(15, b"entra\xc3\xaene\xff")  # PR_SET_NAME
    try:
        assert runs._peak_memory() > 1 << 20
    finally:
        libc.prctl(15, was)
