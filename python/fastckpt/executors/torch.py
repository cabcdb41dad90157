"""The `torch` executor: Copy rows in plain torch. The reference, and the road where nothing is compiled.

Law: conversions are those of csrc/cast.h. Where torch is not one thing, its answer is replaced by ours:
float8_e4m3fn saturates, a NaN becomes the destination's canonical quiet NaN with the sign of the source.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..dtypes import DTYPES, DType, castable
from ..errors import DeviceError
from ..extents import Buffer
from ..planning.copies import NOTHING, Table

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}

_NAN = {
    "float32": 0x7FC00000,
    "bfloat16": 0x7FC0,
    "float16": 0x7E00,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7F,
    "float64": 0x7FF8000000000000,
}


class Torch:
    """Runs rows with torch's own copy."""

    name = "torch"

    def bind(self, sources: Sequence[Buffer]) -> TorchRunner:
        """A runner over these source buffers."""
        return TorchRunner(sources)


class TorchRunner:
    """`Torch` with its sources."""

    def __init__(self, sources: Sequence[Buffer]) -> None:
        self._sources = [_bytes(b) for b in sources]

    def run(self, rows: Table, destinations: Sequence[Buffer], threads: int = 1) -> None:
        """Runs `rows` in order into `destinations`; torch's own setting decides the threads.

        Raises DeviceError for a conversion that does not exist."""
        targets = [_bytes(b) for b in destinations]
        for row in rows:
            src, dst = DTYPES[int(row["src_dtype"])], DTYPES[int(row["dst_dtype"])]
            if 0 in row["shape"]:
                continue
            to = _Box.of(targets, row, "dst", dst)
            if int(row["src_buffer"]) == NOTHING:
                to.bytes().zero_()
                continue
            if not castable(src, dst):
                raise DeviceError(f"executor torch: no conversion of {src} to {dst}")
            values = _Box.of(self._sources, row, "src", src)
            if src is dst:
                to.write(values.read(_BITS[src.itemsize]))
            else:
                to.write(cast(values.read(getattr(torch, src.name)), dst))


def cast(values: torch.Tensor, to: DType) -> torch.Tensor:
    """The bits of `values`, a float tensor, converted to another float type by the rules of csrc/cast.h.

    Returns an integer tensor of the same shape and of `to.itemsize` bytes."""
    single = values.to(torch.float32)
    finite = single.clamp(-448, 448) if to.name == "float8_e4m3fn" else single
    bits = finite.to(getattr(torch, to.name)).view(_BITS[to.itemsize])
    nan = single.isnan()
    if bool(nan.any()):
        quiet = torch.tensor(_NAN[to.name], dtype=bits.dtype, device="cpu")
        negative = quiet + torch.iinfo(bits.dtype).min  # the sign bit set
        # The sign is the source's: torch's own conversion may drop it.
        sign = values.view(_BITS[values.itemsize]) < 0
        bits = torch.where(nan, torch.where(sign, negative, quiet), bits)
    return bits


@dataclass(frozen=True, slots=True, eq=False)
class _Box:
    """The elements of one side of a row: `size` bytes each, `stride` bytes apart, in a buffer's bytes."""

    buffer: torch.Tensor
    offset: int
    shape: list[int]
    stride: list[int]
    size: int

    @staticmethod
    def of(buffers: Sequence[torch.Tensor], row: np.void, side: str, dtype: DType) -> _Box:
        """The "src" or "dst" side of a row."""
        buffer = buffers[int(row[f"{side}_buffer"])]
        return _Box(
            buffer, int(row[side]), row["shape"].tolist(), row[f"{side}_stride"].tolist(), dtype.itemsize
        )

    def bytes(self) -> torch.Tensor:
        """The bytes of every element: [*shape, itemsize]."""
        return self.buffer.as_strided([*self.shape, self.size], [*self.stride, 1], self.offset)

    def _aligned(self, dtype: torch.dtype) -> torch.Tensor | None:
        # torch views bytes as wider elements only where every element is aligned to itself.
        n = self.size
        if (self.buffer.data_ptr() + self.offset) % n or any(s % n for s in self.stride):
            return None
        skip = -self.buffer.data_ptr() % n
        end = skip + (self.buffer.numel() - skip) // n * n
        whole = self.buffer[skip:end].view(dtype)
        return whole.as_strided(self.shape, [s // n for s in self.stride], (self.offset - skip) // n)

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The elements as `dtype`: a view where they are aligned, else a copy."""
        view = self._aligned(dtype)
        if view is None:
            view = self.bytes().clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)
        return view

    def write(self, values: torch.Tensor) -> None:
        """Stores integer `values` of the same item size."""
        view = self._aligned(values.dtype)
        if view is not None:
            view.copy_(values)
        else:
            self.bytes().copy_(values.contiguous().unsqueeze(-1).view(torch.uint8))


def _bytes(buffer: Buffer) -> torch.Tensor:
    if buffer.device != "cpu":
        raise DeviceError(f"executor torch: wanted buffers in main memory, got one on {buffer.device}")
    if buffer.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    raw = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address)
    return torch.frombuffer(raw, dtype=torch.uint8)
