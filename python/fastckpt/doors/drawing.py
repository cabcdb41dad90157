"""A small canvas: lines, dots and letters in colours, as a PNG (RFC 2083). numpy and zlib alone."""

from __future__ import annotations

import struct
import zlib

import numpy as np

Ink = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

GLYPHS = bytes.fromhex(
    "0000000000 00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649562050 0008070300 001c224100"
    "0041221c00 2a1c7f1c2a 08083e0808 0080703000 0808080808 0000606000 2010080402 3e5149453e 00427f4000"
    "7249494946 2141494d33 1814127f10 2745454539 3c4a494931 4121110907 3649494936 464949291e 0000140000"
    "0040340000 0008142241 1414141414 0041221408 0201590906 3e415d594e 7c1211127c 7f49494936 3e41414122"
    "7f4141413e 7f49494941 7f09090901 3e41415173 7f0808087f 00417f4100 2040413f01 7f08142241 7f40404040"
    "7f021c027f 7f0408107f 3e4141413e 7f09090906 3e4151215e 7f09192946 2649494932 03017f0103 3f4040403f"
    "1f2040201f 3f4038403f 6314081463 0304780403 6159494d43 007f414141 0204081020 004141417f 0402010204"
    "4040404040 0003070800 2054547840 7f28444438 3844444428 384444287f 3854545418 00087e0902 18a4a49c78"
    "7f08040478 00447d4000 2040403d00 7f10284400 00417f4000 7c04780478 7c08040478 3844444438 fc18242418"
    "18242418fc 7c08040408 4854545424 04043f4424 3c4040207c 1c2040201c 3c4030403c 4428102844 4c9090907c"
    "4464544c44 0008364100 0000770000 0041360800 0201020402"
)
"""The letters from the space on, five columns of eight points each, the top one in the lowest bit."""


class Canvas:
    """White, `width` by `height` points; what lies outside is not drawn."""

    def __init__(self, width: int, height: int) -> None:
        self.points = np.full((height, width, 3), 255, np.uint8)

    def put(self, x: int, y: int, ink: Ink) -> None:
        """One point."""
        height, width, _ = self.points.shape
        if 0 <= x < width and 0 <= y < height:
            self.points[y, x] = ink

    def line(self, x0: int, y0: int, x1: int, y1: int, ink: Ink) -> None:
        """A straight line with both its ends."""
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        for k in range(n + 1):
            self.put(round(x0 + (x1 - x0) * k / n), round(y0 + (y1 - y0) * k / n), ink)

    def dot(self, x: int, y: int, ink: Ink) -> None:
        """A square of five points around one."""
        for dy in range(-2, 3):
            self.line(x - 2, y + dy, x + 2, y + dy, ink)

    def text(self, x: int, y: int, words: str, ink: Ink) -> None:
        """Letters six points wide from the upper left on; what is no ASCII letter is a question mark."""
        for i, letter in enumerate(words):
            code = ord(letter) - 32
            at = 5 * (code if 0 <= code < len(GLYPHS) // 5 else ord("?") - 32)
            for dx, column in enumerate(GLYPHS[at : at + 5]):
                for dy in range(8):
                    if column >> dy & 1:
                        self.put(x + 6 * i + dx, y + dy, ink)

    def png(self) -> bytes:
        """The picture, eight bits a colour, not interlaced."""
        height, width, _ = self.points.shape
        rows = np.zeros((height, 1 + 3 * width), np.uint8)  # before each row: filter 0
        rows[:, 1:] = self.points.reshape(height, -1)

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = zlib.compress(rows.tobytes(), 9)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
