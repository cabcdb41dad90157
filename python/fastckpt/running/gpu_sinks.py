"""Outputs on a GPU: what files and main memory hold comes there by pinned memory, two ways.

Law: the caller's current stream sees the tensors filled; nothing else waits. `ToDevice` casts before the bus,
so that only a rank's own output bytes go over it; `CastThere` sends what a rank's outputs are made of as it
is, and the GPU cuts, turns and casts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..digest import LEAF, combine
from ..errors import DeviceError
from ..executors.cuda import Cuda, CudaRunner, Prepared, short_of_memory, taken
from ..extents import Buffer
from ..planning.axes import classify
from ..planning.batches import Batch, Slots
from ..planning.copies import AXES, NOTHING, Table, item_sizes
from ..reader import Lane
from .sinks import Worker

State = dict[str, torch.Tensor]


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


class ToDevice:
    """The sink of a run over tensors on one device: batches are made in pinned memory and sent from there.

    `buffers`: each planned tensor's memory. Every worker has two stagings and a stream of its own, so that
    one batch is made while another travels. A tensor made in inference mode is filled in that mode only, in
    which a worker's thread is not by itself."""

    def __init__(self, slots: Slots, buffers: Sequence[Buffer], device: str) -> None:
        self.slots = slots
        self.device = torch.device(device)
        self.bytes = [_bytes(b) for b in buffers]
        self.streams: list[torch.cuda.Stream] = []
        self.made: torch.cuda.Stream | None = None

    def room(self, tensor: int, offset: int, nbytes: int) -> None:
        """No memory there is filled from here."""

    def put(self, tensor: int, offset: int, data: memoryview) -> None:
        """Send bytes that the CPU quantised; on return `data` may be reused."""
        source = torch.frombuffer(data, dtype=torch.uint8)
        with torch.inference_mode(), torch.cuda.stream(self.made):
            self.bytes[tensor][offset : offset + len(data)].copy_(source)

    def open(self) -> None:
        """Before `put`, on the caller's thread: what is put waits for that thread's current stream."""
        if self.device.type == "cuda":
            self.made = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self.made.wait_stream(torch.cuda.current_stream(self.device))
            self.streams.append(self.made)

    def worker(self, lane: Lane, size: int) -> Worker:
        """A worker that makes at most `size` bytes at a time. To be called on the caller's thread."""
        on_gpu = self.device.type == "cuda"
        stagings: list[torch.Tensor | None] = [None, None]  # made when needed: pinning takes time
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
            if staging is None:
                staging = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
                stagings[turn] = staging
            if before is not None:
                before.synchronize()
            n = batch.stop - batch.start
            lane.run(batch.rows, [Buffer(staging, staging.data_ptr(), n)], batch.file)
            with torch.inference_mode(), torch.cuda.stream(stream):
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


class CastThere:
    """The other sink: source bytes go over the bus as they are, dense, and the GPU does the rest.

    `buffers`: each planned tensor's memory. Every worker has a stream and two slots of its own, each a run of
    pinned memory and one there: they are the most that is held beside the outputs. Batches are `spread`'s."""

    def __init__(self, buffers: Sequence[Buffer], device: str) -> None:
        self.buffers = buffers
        self.device = torch.device(device)
        self.streams: list[torch.cuda.Stream] = []

    def worker(self, lane: Lane) -> Worker:
        """A worker. To be called on the caller's thread, whose current stream it waits for."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))  # its tensors may still be in use
        self.streams.append(stream)
        slots = [_Slot(self.device), _Slot(self.device)]
        turn = 0

        def run(batch: Batch) -> None:
            nonlocal turn
            turn ^= 1
            slot = slots[turn]
            raw, rows, size = as_they_are(batch.rows)
            with torch.cuda.stream(stream):
                runner = slot.of(size)
                lane.run(raw, [Buffer(slot.here, slot.here.data_ptr(), size)], batch.file)
                slot.there[:size].copy_(slot.here[:size], non_blocking=True)
                used, rows["dst_buffer"] = np.unique(rows["dst_buffer"], return_inverse=True)
                slot.prepared = runner.prepare(rows, [self.buffers[i] for i in used.tolist()])
                slot.prepared.run()
                slot.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
                slot.sent.record(stream)

        return run

    def close(self) -> None:
        """The current stream waits for all that was begun."""
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)


class _Slot:
    """Memory for the source bytes of one batch, here and there, and what still uses it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.here = torch.empty((0,), dtype=torch.uint8, device="cpu")
        self.there = torch.empty((0,), dtype=torch.uint8, device=device)
        self.runner: CudaRunner | None = None
        self.prepared: Prepared | None = None
        self.sent: torch.cuda.Event | None = None

    def of(self, size: int) -> CudaRunner:
        """A runner over at least `size` bytes that nothing uses any more."""
        if self.sent is not None:
            self.sent.synchronize()
            self.prepared = None
        if self.runner is None or size > len(self.there):
            try:
                self.there = torch.empty((max(size, 1),), dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError:
                raise short_of_memory(self.device, size, "a batch on its way there") from None
            self.here = torch.empty((max(size, 1),), dtype=torch.uint8, device="cpu", pin_memory=True)
            held = Buffer(self.there, self.there.data_ptr(), self.there.nbytes, str(self.device))
            self.runner = Cuda(self.device).bind([held])
        return self.runner


def as_they_are(rows: Table) -> tuple[Table, Table, int]:
    """Rows as two steps: what each reads, dense and one behind the other; the same rows over those bytes.

    The first are copies alone, in the order of the source; the last number is how many bytes they fill."""
    rows = rows.copy()
    real = rows["src_buffer"] != NOTHING
    raw = rows[real]
    outermost = (raw["shape"] == 1) | (raw["src_stride"] == 0)
    order = np.argsort(np.where(outermost, np.iinfo(np.int64).min, -raw["src_stride"]), axis=1, kind="stable")
    shape = np.take_along_axis(raw["shape"].astype(np.int64), order, axis=1)
    item = item_sizes(raw["src_dtype"])
    dense = np.ones((len(raw), AXES), np.int64)
    dense[:, :-1] = np.cumprod(shape[:, :0:-1], axis=1)[:, ::-1]
    dense *= item[:, None]
    size = -(-shape.prod(axis=1) * item // 16) * 16
    at = np.cumsum(size) - size
    strides = np.empty_like(dense)
    np.put_along_axis(strides, order, dense, axis=1)
    rows["src"][real], rows["src_stride"][real], rows["src_buffer"][real] = at, strides, 0
    raw["src_stride"] = np.take_along_axis(raw["src_stride"], order, axis=1)
    raw["shape"], raw["dst_stride"], raw["dst"] = shape, dense, at
    raw["dst_buffer"], raw["dst_dtype"] = 0, raw["src_dtype"]
    classify(raw)
    return raw, rows, int(size.sum())


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
    assert isinstance(owner, torch.Tensor)  # `tensors` made or took them
    return owner.detach().as_strided((owner.numel(),), (1,)).view(torch.uint8)
