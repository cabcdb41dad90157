"""Sources in GPU memory: one table for what stays there, lanes for what goes to main memory and files.

Law: outputs are made on the GPU that holds the sources, so that only output bytes, cut and cast already, come
over the bus.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from ..computed.nowhere import computed
from ..errors import DeviceError, ViewError
from ..executors.cuda import Cuda, Prepared, short_of_memory
from ..extents import COMPUTED, Buffer
from ..planning.binding import Binding
from ..planning.copies import COPY, Chunk, Executor, Table, nbytes, span
from ..planning.plans import Plan

ALIGNED = 16
"""What each destination of a batch begins on, there and in pinned memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A plan over GPU memory, made ready: `run()` fills the tensors in `out` (by rank) once more.

    It costs launches only and starts on the current stream; sources and `out` must stay where they are.
    Copies are not waited for, and may be captured into a CUDA graph once they have run; a quantised plan is
    waited for, and raises SourceError naming a matrix with NaN or infinity in it. Raises DeviceError when a
    launch fails."""

    out: tuple[Mapping[str, torch.Tensor], ...]
    prepared: Runnable

    def run(self) -> None:
        """Fill them."""
        self.prepared.run()


class Runnable(Protocol):
    """What is made ready: copies (`Prepared`), or copies and matrices to quantise (`quantised.Quantiser`)."""

    def run(self) -> None:
        """Start it on the current stream."""


def resident(binding: Binding) -> bool:
    """Whether the sources lie on a GPU. Raises DeviceError where some do and others are files."""
    on_gpu = [isinstance(p, Buffer) and p.device not in ("cpu", COMPUTED) for p in binding.places]
    if any(on_gpu) and computed(binding.places):
        raise DeviceError(
            "merging, dequantising, and quantising before the layout (rtp_llm; fp8 with one scale a matrix "
            "in vllm) run on the CPU alone, and some sources are in GPU memory; bring them to the CPU first"
        )
    if any(on_gpu) and not all(isinstance(p, Buffer) for p in binding.places):
        raise DeviceError("some sources are in GPU memory, others in files; bring them together first")
    return any(on_gpu)


def prepare(planned: Plan, binding: Binding, buffers: Sequence[Buffer], device: str) -> Prepared:
    """The plan's whole table on the GPU that holds its sources and `buffers` (by planned tensor).

    Raises DeviceError for what lies elsewhere and for a table too large for the memory that is left."""
    places = [p for p in binding.places if isinstance(p, Buffer)]
    return Cuda(device).bind(places).prepare(placed(planned, binding), buffers)


def placed(planned: Plan, binding: Binding) -> Table:
    """All rows of a plan, as `gathered` has them."""
    parts = [gathered(planned, binding, first, chunk) for first, chunk in planned.chunks()]
    return np.concatenate(parts) if parts else np.empty(0, COPY)


def gathered(planned: Plan, binding: Binding, first: int, chunk: Chunk) -> Table:
    """Rows of the plan's tensors from `first` on: `src_buffer` a place of the binding, `dst_buffer` the
    planned tensor. Raises ViewError for a row that would read or write outside."""
    rows = binding.bind(chunk.rows)
    tensor = first + chunk.tensor
    rows["dst_buffer"] = tensor
    low, high = span(rows, "dst")
    if (low < 0).any() or (high > planned.tensors.nbytes[tensor]).any():
        raise ViewError("plan: a row writes outside its tensor")
    return rows


class Resident:
    """A Reader over GPU memory. Raises DeviceError where its places lie on several devices."""

    def __init__(self, binding: Binding) -> None:
        resident(binding)
        places = [p for p in binding.places if isinstance(p, Buffer)]
        found = sorted({p.device for p in places if p.device != "cpu"})
        if len(found) > 1:
            raise DeviceError(f"the sources lie on {', '.join(found)}; bring them to one GPU first")
        self.device = torch.device(found[0])
        self.runner = Cuda(self.device).bind(places)

    def __enter__(self) -> Resident:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Every lane has waited for what it began."""

    def lane(self, executor: Executor) -> ResidentLane:
        """A lane for one worker, whose rows the GPU runs. To be called on the caller's thread."""
        return ResidentLane(self)

    def batch_sizes(self, stage: int, band: int) -> tuple[int, int]:
        """A band: few large launches are better than many small ones."""
        return band, band


class ResidentLane:
    """See Resident. A stream of its own, and memory for one batch there and, pinned, here: while it waits or
    its bytes are digested and written, other lanes' batches are made and travel."""

    def __init__(self, reader: Resident) -> None:
        self.reader = reader
        self.bytes_read = self.bytes_scanned = 0
        self.stream = torch.cuda.Stream(reader.device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(reader.device))  # the sources may be on their way
        self.there = torch.empty((0,), dtype=torch.uint8, device=reader.device)
        self.here = torch.empty((0,), dtype=torch.uint8, device="cpu")

    def run(self, rows: Table, destinations: Sequence[Buffer], file: int = 0) -> None:
        """Make what `rows` write on the GPU and bring it to `destinations` in main memory."""
        rows = rows.copy()
        low, high = span(rows, "dst")
        parts, end = [], 0
        for i in np.unique(rows["dst_buffer"]).tolist():
            mine = rows["dst_buffer"] == i
            # The rows of a batch write every byte between the first and the last of each destination.
            start, stop = int(low[mine].min()), int(high[mine].max())
            rows["dst"][mine] = low[mine] - start + end
            parts.append((destinations[i].address + start, end, stop - start))
            end += -(-(stop - start) // ALIGNED) * ALIGNED
        rows["dst_buffer"] = 0
        self._make(rows, end)
        for address, at, size in parts:
            ctypes.memmove(address, self.here.data_ptr() + at, size)

    def direct(self, rows: Table, staging: memoryview) -> memoryview | None:
        """The bytes in pinned memory, where the batch came."""
        nbytes = len(staging)
        if nbytes == 0:
            return None
        rows = rows.copy()
        rows["dst_buffer"] = 0
        self._make(rows, nbytes)
        return memoryview(self.here.numpy()[:nbytes].data)

    def _make(self, rows: Table, size: int) -> None:
        """Fill the first `size` bytes of `here`."""
        device = self.reader.device
        with torch.cuda.stream(self.stream):
            if size > len(self.there):
                try:
                    self.there = torch.empty((size,), dtype=torch.uint8, device=device)
                except torch.OutOfMemoryError:
                    raise short_of_memory(device, size, "a batch on its way to main memory") from None
                self.here = torch.empty((size,), dtype=torch.uint8, device="cpu", pin_memory=True)
            made = Buffer(self.there, self.there.data_ptr(), size, str(device))
            prepared = self.reader.runner.prepare(rows, [made])
            prepared.run()
            self.here[:size].copy_(self.there[:size], non_blocking=True)
        self.stream.synchronize()
        self.bytes_read += int(nbytes(rows, "src").sum())
