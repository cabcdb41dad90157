"""PNG files in plain Python (8 bits, RGB, no interlacing), and a sheet of pictures with captions under them.

Source of the format: PNG specification, third edition (w3.org/TR/png-3).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""[height, width, 3]."""

_MAGIC = b"\x89PNG\r\n\x1a\n"


class BrokenPicture(ValueError):
    """A file that is no PNG as `write` makes them, or a damaged one."""


def write(path: Path, picture: Picture, **text: str) -> None:
    """Write a picture; `text` goes into it as tEXt chunks (Latin-1)."""
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # a 0 before each row: not filtered
    rows[:, 1:] = picture.reshape(height, -1)
    said = [_chunk(b"tEXt", f"{k}\0{v}".encode("latin-1", "replace")) for k, v in text.items()]
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    path.write_bytes(b"".join([_MAGIC, head, *said, body, _chunk(b"IEND", b"")]))


def read(path: Path) -> Picture:
    """The picture in a file that `write` made. Raises BrokenPicture for any other."""
    data = path.read_bytes()
    if data[:8] != _MAGIC:
        raise BrokenPicture(f"{path}: is no PNG")
    at, size, body = 8, (0, 0), b""
    try:
        while at < len(data):
            (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
            content = data[at + 8 : at + 8 + length]
            if _chunk(kind, content) != data[at : at + 12 + length]:
                raise ValueError(f"a {kind.decode('latin-1')} chunk is damaged or cut off")
            if kind == b"IHDR":
                width, height, *rest = struct.unpack(">IIBBBBB", content)
                size = (height, width)
                if rest != [8, 2, 0, 0, 0]:
                    raise ValueError(f"wanted 8 bits, RGB, not interlaced, got {rest}")
            elif kind == b"IDAT":
                body += content
            at += 12 + length
        rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(size[0], 1 + 3 * size[1])
        if rows[:, 0].any():
            raise ValueError("its rows are filtered")
    except (struct.error, zlib.error, ValueError) as e:
        raise BrokenPicture(f"{path}: {e}") from None
    return rows[:, 1:].reshape(*size, 3)


def sheet(rows: Sequence[Sequence[Picture]], *, scale: int = 1, gap: int = 2) -> Picture:
    """Pictures of one size side by side, row below row, each `scale` times as large, `gap` apart."""
    white = 255
    lines = []
    for row in rows:
        large = [np.kron(p, np.ones((scale, scale, 1), np.uint8)) for p in row]
        lines.append(
            np.hstack([np.pad(p, ((gap, gap), (gap, gap), (0, 0)), constant_values=white) for p in large])
        )
    return np.vstack(lines)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
