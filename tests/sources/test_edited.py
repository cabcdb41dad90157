"""One element of one tensor changes between the runs of two ranks: their parts are never one output.

A file of torch's zip has a CRC32 of what is changed, and it is changed too, as by who saves again.
tests/running/test_runs.py has the formats without checksums.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt.errors import WriteError
from fastckpt.sources.samples import located

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEPT = [
    "z0-llama-w2", "z1-mixed-w2", "z2-mixed-w3", "z2-llama-w2-robin", "z3-mixed-w4", "z3-llama-w2-subgroups",
    "moe-z0-w2", "moe-z2-w4", "grid-z1-tp2-pp2", "grid-z2-autotp2-w4", "grid-z3-autotp2-w2", "fsdp-w3",
    "fsdp-tp-w4",
]  # fmt: skip
PACKED = [("fsdp", "torch-2.13.0", case, False) for case in ("fsdp2", "tp", "fsdp1")]
PACKED += [
    ("megatron", name, kind, True)
    for name in ("llama-0.19.2", "qwen3_moe-0.19.2")
    for kind in ("dist", "legacy")
]


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setenv("FASTCKPT_CACHE", "off")


def edited(ckpt):
    """Changes one element of the largest tensor that is held once, in its file, and the CRC32 it has there.
    Returns the tensor's name."""
    twice = "".join(replica.what for replica in ckpt.replicas)
    name = max((n for n in ckpt if n not in twice), key=lambda name: ckpt[name].numel)
    ((extent, at, _),) = located(ckpt[name], [1])
    path = Path(extent.where.path)
    data = bytearray(path.read_bytes())
    storage = slice(extent.offset, extent.offset + extent.nbytes)
    old = zlib.crc32(data[storage]).to_bytes(4, "little")
    data[at] ^= 1
    for _ in range(2):  # behind its record, and in the directory
        place = data.index(old, storage.stop)
        data[place : place + 4] = zlib.crc32(data[storage]).to_bytes(4, "little")
    path.write_bytes(data)
    return name


def refused(path, tmp_path, **options):
    """Parts of two ranks, of which one was made before an edit, are no output; both made again are."""
    made = {"tp": 2, "tp_plan": {"*": "replicate"}, "out": tmp_path / "out", "durable": False}
    before = fastckpt.open(path, **options)
    fastckpt.reshard(before, rank=0, **made)
    was = fastckpt.reshard(before, layout="same", rank=0)
    name = edited(before)
    for rank in (1, 0):
        with pytest.raises(WriteError, match="another plan"):
            fastckpt.reshard(fastckpt.open(path, check_crc=True, **options), rank=rank, **made)
    assert not (tmp_path / "out" / "fastckpt.json").exists()
    for rank in (1, 0):
        fastckpt.reshard(fastckpt.open(path, **options), rank=rank, overwrite=True, **made)
    got = fastckpt.consolidate(tmp_path / "out", dtype=None)
    assert {n for n in before if (got[n] != was[n]).any()} == {name}
    assert (got[name] != was[name]).sum() == 1


@pytest.mark.parametrize("name", KEPT)
def test_fixtures_of_deepspeed_and_torch(tmp_path, name):
    refused(shutil.copytree(FIXTURES / name, tmp_path / name), tmp_path)


@pytest.mark.parametrize(("folder", "archive", "case", "config"), PACKED)
def test_ranks_files(tmp_path, packed, folder, archive, case, config):
    at = Path(shutil.copytree(packed(folder, archive), tmp_path / archive))
    refused(at / case, tmp_path, **({"config": at} if config else {}))


def test_torchs_zip(tmp_path):
    torch.save({"w": torch.rand(40, 50), "b": torch.rand(7)}, tmp_path / "model.bin")
    refused(tmp_path / "model.bin", tmp_path)
