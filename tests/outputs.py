"""Small outputs for the tests of writer, commit and verification, written through the public interface."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastckpt.digest import crc32, digest
from fastckpt.dtypes import BY_NAME
from fastckpt.output.files import FileLayout, Spec, safetensors_layout
from fastckpt.output.manifest import Manifest, Origin, Record
from fastckpt.output.torchzip import torch_layout
from fastckpt.output.writer import Output
from safetensors.torch import save_file

RECORD = Record(Origin("/ckpt", "zero", "global_step3", 3, "aa"), "0.1.0", "hf", {"tp": 1}, {})
SPECS: list[Spec] = [
    ("a.weight", BY_NAME["float32"], (300, 7)),
    ("b.bias", BY_NAME["bfloat16"], (33,)),
    ("c.empty", BY_NAME["float32"], (0, 4)),
    ("d.scalar", BY_NAME["int64"], ()),
    ("e.bool", BY_NAME["bool"], (5,)),
]


def hub_directory(path: Path, config: dict[str, Any], hub: dict[str, torch.Tensor]) -> Path:
    """What save_pretrained leaves: a directory of one file and its config."""
    path.mkdir(exist_ok=True)
    whole = {n: x.contiguous() for n, x in hub.items()}
    save_file(whole, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def listing(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def data_of(specs: list[Spec], seed: int) -> dict[str, bytes]:
    """Finite values, other ones for every seed."""
    rng = random.Random(seed)
    out = {}
    for name, dtype, shape in specs:
        n = dtype.itemsize
        for k in shape:
            n *= k
        # every byte below 0x3f: no exponent of any float type is all ones
        out[name] = bytes(rng.randrange(1, 0x3F) for _ in range(n))
    return out


def sealed(record: object) -> bytes:
    """A record's text with its own digest made right, whatever it says."""
    head = json.dumps(record)[:-1].encode() + b",\n"
    return head + b'"digest": "%s"\n}\n' % digest(head).encode()


def changed(path: Path, change: Callable[[Any], object]) -> None:
    """Change what the commit record of an output says, and make its digest true of it again."""
    record = json.loads((path / "fastckpt.json").read_text())
    change(record)
    del record["digest"]
    (path / "fastckpt.json").write_bytes(sealed(record))


def fill(out: Output, layout: FileLayout, data: dict[str, bytes], rank: int | None = None) -> None:
    """Write a whole file through `out`."""
    file = out.create(layout, rank)
    for s in layout.slots:
        half = s.nbytes // 2
        file.write(s.offset + half, memoryview(data[s.name])[half:])
        file.write(s.offset, memoryview(data[s.name])[:half])
    crcs = {name: crc32(data[name]) for name in data} if layout.crc else {}
    digests = [int(digest(data[name]), 16) for name in layout.slots.names]
    file.close(crcs, np.array(digests, np.uint64))


def layouts_of(rank: int) -> list[FileLayout]:
    return [
        safetensors_layout(f"rank-{rank:02d}/model.safetensors", SPECS[:3], {"format": "pt"}),
        torch_layout(f"rank-{rank:02d}/rest.bin", SPECS[3:], {"tied": "d.scalar"}),
    ]


def write_rank(out: Output, rank: int, seed: int) -> None:
    data = data_of(SPECS, seed + 100 * rank)
    for layout in layouts_of(rank):
        fill(out, layout, {s.name: data[s.name] for s in layout.slots}, rank)
    out.text(f"rank-{rank:02d}/index.json", b'{"rank": %d}' % rank, rank)


def write_whole(
    path: Path, seed: int, *, world: int = 2, overwrite: bool = False, durable: bool = True
) -> Manifest:
    """An output of all ranks at once."""
    with Output(path, key=f"key{seed}", world=world, overwrite=overwrite, durable=durable) as out:
        out.reserve(1 << 16)
        for rank in range(world):
            write_rank(out, rank, seed)
        out.text("config.json", b"{}")
        return out.commit(RECORD)


def write_part(path: Path, rank: int, seed: int, *, world: int = 2, overwrite: bool = False) -> Manifest:
    """One rank of an output, or nothing where it is done."""
    with Output(path, key=f"key{seed}", rank=rank, world=world, overwrite=overwrite) as out:
        if out.done(rank):
            return out.complete()
        write_rank(out, rank, seed)
        out.text("config.json", b"{}")
        return out.commit(RECORD)


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
