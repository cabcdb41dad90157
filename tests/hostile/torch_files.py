"""Builders of broken and hostile torch files, and a plain reader of what ours says about good ones."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from fastckpt.sources.torchfile import Tensor, TorchFile


def elements(file: TorchFile, t: Tensor) -> torch.Tensor:
    """The tensor's elements, out of the file's bytes by torch itself."""
    dtype: torch.dtype = getattr(torch, t.dtype.name)
    if t.storage.extent < 0:
        storage = torch.empty(0, dtype=dtype)
    else:
        e = file.extents[t.storage.extent]
        with open(e.where.path, "rb") as f:
            f.seek(e.offset)
            storage = torch.frombuffer(bytearray(f.read(e.nbytes)), dtype=torch.uint8).view(dtype)
    return torch.as_strided(storage, t.shape, t.stride, t.offset) if t.numel else storage.new_empty(t.shape)


def raw(t: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements in order."""
    t = t.detach().contiguous()
    return bytes(t.untyped_storage())[t.storage_offset() * t.itemsize :][: t.numel() * t.itemsize]


def records(path: Path) -> dict[str, bytes]:
    """The records of a good zip, by name."""
    with zipfile.ZipFile(path) as z:
        return {i.filename: z.read(i) for i in z.infolist()}


def write_zip(path: Path, contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A valid zip of those records, without flag bit 3."""
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in contents.items():
            z.writestr(zipfile.ZipInfo(name), data, compression)
    return path


def repickled(path: Path, out: Path, change: Callable[[bytes], bytes]) -> Path:
    """The same torch file with its pickle changed and every checksum right."""
    contents = records(path)
    return write_zip(out, {n: change(b) if n.endswith("/data.pkl") else b for n, b in contents.items()})


def patched(path: Path, out: Path, at: int, new: bytes) -> Path:
    """The same file with the bytes at `at` replaced."""
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    out.write_bytes(data)
    return out


def central_at(path: Path, name: str) -> int:
    """The offset of a record's entry in the central directory."""
    data = path.read_bytes()
    at = struct.unpack("<I", data[-6:-2])[0]
    if at == 0xFFFFFFFF:
        raise ValueError("zip64")
    while True:
        n, extra, comment = struct.unpack_from("<HHH", data, at + 28)
        if data[at + 46 : at + 46 + n].decode() == name:
            return at
        at += 46 + n + extra + comment


def local_at(path: Path, name: str) -> int:
    """The offset of a record's local header."""
    with zipfile.ZipFile(path) as z:
        return z.getinfo(name).header_offset


def data_at(path: Path, name: str) -> int:
    """The offset of a record's bytes."""
    at = local_at(path, name)
    n, extra = struct.unpack_from("<HH", path.read_bytes(), at + 26)
    return at + 30 + n + extra
