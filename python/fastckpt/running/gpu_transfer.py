"""Which way bytes cross to a GPU: cast by the CPU before the bus, or by the GPU behind it (`ToDevice` and
`CastThere` of `gpu_sinks`).

Law: both fill the same bytes; only time decides. It is measured, once a process for each kind of copy, on the
very workers that do the work; FASTCKPT_CAST=cpu or =gpu decides instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from ..digest import LEAF
from ..dtypes import DTYPES, DType
from ..errors import DeviceError
from ..executors import pick
from ..executors.cpu import built
from ..extents import Buffer, Extent, Extents
from ..pipeline import feed
from ..planning.batches import Slots, cut, spread
from ..planning.binding import Binding
from ..planning.copies import COPY, NOTHING, Chunk, item_sizes, nbytes
from ..planning.plans import Plan
from ..reader import Lane, Mapped, Positioned
from .gpu_sinks import CastThere, ToDevice
from .sinks import Worker

WAYS = ("cpu", "gpu")

LEAST = 1 << 30
"""Output bytes of a plan under which the CPU casts, unmeasured: asking would cost more than it gives."""

SENT = 8 * LEAF
"""Output bytes that are sent at once: more than for files, since the bus is fast and Python starts one batch
at a time."""

MOST_WORKERS = {"cpu": 32, "gpu": 4}
"""Workers of each way: they hold two batches each, pinned, and of the GPU's way there too. A bus of 55 GB/s
takes what ten cores cast at 12 GB/s of fp32."""

SIDE, TIMES, PLACES = 4096, 16, 4
"""What is measured: so many square matrices, read from one that is larger than a cache, enough of them that
each of many workers sends several batches; they are written to so many places in turn."""


def way(planned: Plan, device: str, threads: int) -> str:
    """One of WAYS for this plan. Raises DeviceError where FASTCKPT_CAST names none of them."""
    asked = os.environ.get("FASTCKPT_CAST")
    if asked is not None and asked not in WAYS:
        raise DeviceError(f"FASTCKPT_CAST: got {asked!r}, wanted one of {', '.join(WAYS)}")
    if asked is not None:
        return asked
    if planned.output_bytes < LEAST:
        return "cpu"
    kind = main_kind(planned)
    try:
        return "cpu" if kind is None else faster(device, *kind, threads)
    except (torch.OutOfMemoryError, DeviceError):
        return "cpu"  # the outputs fill the GPU, and this way needs no more of it


def main_kind(planned: Plan) -> tuple[DType, DType, bool] | None:
    """The source dtype, output dtype, and whether it is transposed, of most bytes of the plan's first chunk;
    None where those are copied as they are."""
    for _, chunk in planned.chunks():
        rows = chunk.rows[chunk.rows["src_buffer"] != NOTHING]
        if not len(rows):
            continue
        item = item_sizes(rows["src_dtype"])
        turned = (rows["shape"][:, -1] > 1) & (rows["src_stride"][:, -1] != item)
        kinds = rows["src_dtype"].astype(np.int64) << 9 | rows["dst_dtype"].astype(np.int64) << 1 | turned
        found, which = np.unique(kinds, return_inverse=True)
        most = int(found[np.bincount(which, weights=nbytes(rows, "dst")).argmax()])
        src, dst = DTYPES[most >> 9], DTYPES[most >> 1 & 255]
        return None if src is dst and not most & 1 else (src, dst, bool(most & 1))
    return None


@cache
def faster(device: str, src: DType, dst: DType, turned: bool, threads: int) -> str:
    """The way that took less time for copies of this kind, each by as many workers as a run gives it."""
    times = {name: _time(name, device, src, dst, turned, threads) for name in WAYS}
    return min(times, key=lambda name: times[name])


def sinks(
    name: str, slots: Slots, buffers: list[Buffer], device: str, size: int
) -> tuple[Callable[[Lane], Worker], Callable[[], None]]:
    """What makes the workers of a way, and what closes them; `size`: the most bytes of a batch that the CPU
    casts."""
    if name == "cpu":
        sink = ToDevice(slots, buffers, device)
        return lambda lane: sink.worker(lane, size), sink.close
    there = CastThere(buffers, device)
    return there.worker, there.close


def _time(name: str, device: str, src: DType, dst: DType, turned: bool, threads: int) -> float:
    """Seconds of the better of two runs, after one that does not count."""
    n, out = SIDE * SIDE, SIDE * SIDE * dst.itemsize
    source = torch.ones((n * src.itemsize,), dtype=torch.uint8, device="cpu")
    held = Buffer(source, source.data_ptr(), source.nbytes)
    made = [torch.empty((out,), dtype=torch.uint8, device=device) for _ in range(PLACES)]
    buffers = [Buffer(t, t.data_ptr(), out, device) for t in made] * (TIMES // PLACES)
    rows = np.zeros(TIMES, COPY)
    s, d = src.itemsize, dst.itemsize
    rows["shape"] = [1, 1, SIDE, SIDE]
    rows["src_stride"] = [0, 0, s, SIDE * s] if turned else [0, 0, SIDE * s, s]
    rows["dst_stride"] = [0, 0, SIDE * d, d]
    rows["src_dtype"], rows["dst_dtype"] = src.code, dst.code
    chunk = Chunk(TIMES, rows, np.arange(TIMES))
    slots = Slots.of([0] * TIMES, np.arange(TIMES) * out, [out] * TIMES)
    binding = Binding.of(Extents([Extent(held, 0, held.nbytes)]))
    batches = spread if name == "gpu" else cut
    best = float("inf")
    with Mapped(binding.places) if built() else Positioned(binding.places) as reader:
        make, close = sinks(name, slots, buffers, device, SENT)
        workers = [make(reader.lane(pick(None))) for _ in range(min(threads, MOST_WORKERS[name]))]
        for k in range(3):
            began = time.perf_counter()
            try:
                items = batches(chunk, 0, slots, binding, stage=SENT, band=SENT)
                feed(items, workers, lambda _: None)
            finally:  # after an error too: what was sent is on its way into memory that is given up then
                close()
            torch.cuda.current_stream(device).synchronize()
            best = min(best, time.perf_counter() - began) if k else best
    return best
