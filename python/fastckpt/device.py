"""Outputs on a GPU: a plan whose sources are there too runs as one table; files come by pinned memory.

Law: the caller's current stream sees the tensors filled; nothing else waits. Only a rank's own output bytes,
cast and cut already, go over the bus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .digest import combine
from .errors import DeviceError, ViewError
from .executors.cuda import Cuda, Prepared, taken
from .extents import Buffer
from .lowrank import COMPUTED, computed
from .pipeline import Worker
from .planner import COPY, LEAF, Batch, Binding, Slots, Table, span
from .plans import Plan
from .reader import Lane

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A plan over GPU memory, made ready: `run()` fills the tensors in `out` (by rank) once more.

    It costs launches only, starts on the current stream and does not wait; sources and `out` must stay where
    they are. Raises DeviceError when a launch fails."""

    out: tuple[Mapping[str, torch.Tensor], ...]
    prepared: Prepared

    def run(self) -> None:
        """Start the copies."""
        self.prepared.run()


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The digest of each dense tensor on one GPU, taken there: equal to what a manifest or a Report says of
    the same bytes (docs/formats.md). Waits for the current stream.

    Raises DeviceError for a tensor that is not dense or lies elsewhere."""
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    for name, t in tensors.items():
        if t.device.type != "cuda" or t.device != device or not t.is_contiguous():
            raise DeviceError(
                f"digests: {name} is on {t.device} with strides {t.stride()}; wanted dense tensors on one GPU"
            )
    if not tensors:
        return {}
    table, counts = leaves([(t.data_ptr(), t.nbytes) for t in tensors.values()])
    out = taken(table, device)
    each = np.split(out, np.cumsum(counts)[:-1])
    return {name: combine(part) for name, part in zip(tensors, each, strict=True)}


def leaves(spans: Sequence[tuple[int, int]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The leaves of (address, nbytes) runs as such pairs, [leaves, 2], and how many each run has."""
    start, size = np.array(spans, np.int64).reshape(-1, 2).T
    counts = -(-size // LEAF)
    run = np.repeat(np.arange(len(size)), counts)
    at = (np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)) * LEAF
    table = np.stack([start[run] + at, np.minimum(LEAF, size[run] - at)], axis=1)
    return table.astype(np.uint64), counts


def resident(binding: Binding) -> bool:
    """Whether the sources lie on a GPU. Raises DeviceError where some do and others are files."""
    on_gpu = [isinstance(p, Buffer) and p.device not in ("cpu", COMPUTED) for p in binding.places]
    if any(on_gpu) and computed(binding.places):
        raise DeviceError("merging and dequantising run on the CPU alone, and some sources are in GPU memory")
    if any(on_gpu) and not all(isinstance(p, Buffer) for p in binding.places):
        raise DeviceError("some sources are in GPU memory, others in files; bring them together first")
    return any(on_gpu)


def prepare(planned: Plan, binding: Binding, buffers: Sequence[Buffer], device: str) -> Prepared:
    """The plan's whole table on the GPU that holds its sources and `buffers` (by planned tensor).

    Raises DeviceError for what lies elsewhere and for a table too large for the memory that is left."""
    places = [p for p in binding.places if isinstance(p, Buffer)]
    return Cuda(device).bind(places).prepare(placed(planned, binding), buffers)


def placed(planned: Plan, binding: Binding) -> Table:
    """All rows of a plan: `src_buffer` a place of the binding, `dst_buffer` the planned tensor.

    Raises ViewError for a row that would read or write outside."""
    sizes = planned.tensors.nbytes
    parts = []
    for first, chunk in planned.chunks():
        rows = binding.bind(chunk.rows)
        rows["dst_buffer"] = first + chunk.tensor
        low, high = span(rows, "dst")
        if (low < 0).any() or (high > sizes[first + chunk.tensor]).any():
            raise ViewError("plan: a row writes outside its tensor")
        parts.append(rows)
    return np.concatenate(parts) if parts else np.empty(0, COPY)


class ToDevice:
    """The end of a run over tensors on one device: batches are made in pinned memory and sent from there.

    `buffers`: each planned tensor's memory. Every worker has two stagings and a stream of its own, so that
    one batch is made while another travels."""

    def __init__(self, slots: Slots, buffers: Sequence[Buffer], device: str) -> None:
        self.slots = slots
        self.device = torch.device(device)
        self.bytes = [_bytes(b) for b in buffers]
        self.streams: list[torch.cuda.Stream] = []

    def worker(self, lane: Lane, size: int) -> Worker:
        """A worker that makes at most `size` bytes at a time. Call it on the thread whose stream counts."""
        on_gpu = self.device.type == "cuda"
        stagings = [torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        sent: list[torch.cuda.Event | None] = [None, None]
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))  # its tensors may still be in use
            self.streams.append(stream)
        turn = 0

        def run(batch: Batch) -> None:
            nonlocal turn
            turn ^= 1
            staging, before = stagings[turn], sent[turn]
            if before is not None:
                before.synchronize()
            n = batch.stop - batch.start
            lane.run(batch.rows, [Buffer(staging, staging.data_ptr(), n)])
            with torch.cuda.stream(stream):
                for tensor, at, into, length in pieces(batch, self.slots):
                    self.bytes[tensor][into : into + length].copy_(
                        staging[at : at + length], non_blocking=True
                    )
                if stream is not None:
                    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    event.record(stream)
                    sent[turn] = event

        return run

    def close(self) -> None:
        """The current stream waits for all that was sent."""
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)


def pieces(batch: Batch, slots: Slots) -> list[tuple[int, int, int, int]]:
    """What of a batch goes where: (tensor, bytes from the batch's start, bytes from the tensor's, bytes)."""
    tensor = np.searchsorted(slots.leaf, batch.leaf, "right") - 1
    into = (batch.leaf - slots.leaf[tensor]) * LEAF
    out: list[tuple[int, int, int, int]] = []
    for t, at, offset, length in zip(
        tensor.tolist(), batch.leaf_offset.tolist(), into.tolist(), batch.leaf_size.tolist(), strict=True
    ):
        if out and out[-1][0] == t:
            out[-1] = (*out[-1][:3], out[-1][3] + length)
        else:
            out.append((t, at, offset, length))
    return out


def _bytes(buffer: Buffer) -> torch.Tensor:
    owner = buffer.owner
    if not isinstance(owner, torch.Tensor):
        raise DeviceError(f"wanted the memory of a torch tensor, got {type(owner).__name__}")
    return owner.detach().reshape(-1).view(torch.uint8)
