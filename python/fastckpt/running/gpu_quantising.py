"""Quantised outputs made by the GPU that holds their sources.

Law: the bytes are those of the CPU's road. A matrix is quantised from where its rows lie, else from a band
into which the plan's rows are copied; what shares a scale beyond a band is looked through first. All of it
runs on the caller's current stream, which is waited for: a value that is not finite is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..dtypes import DType, uint8
from ..errors import DeviceError
from ..executors.cuda import Cuda, CudaRunner, Prepared, quantise, short_of_memory
from ..extents import Buffer
from ..planning.binding import Binding
from ..planning.compiling import in_windows
from ..planning.copies import COPY, NOTHING, Chunk, Table, nbytes
from ..planning.plans import Plan
from ..quantisation.quantised_targets import flat
from ..quantisation.quantrows import Part, There, covered, tiled
from ..quantisation.rounding import not_finite
from ..quantisation.schemes import Scheme
from .gpu_sources import gathered
from .quantising import Dense, Quantising, form_of

BAND = 64 << 20
"""Dense bytes that are copied at once, unless one row of blocks is more."""

ALIGNED = 16
"""What each matrix of a band begins on."""

Span = tuple[int, int, int, int]
"""Rows of a matrix: the first, how many, the address of the first, bytes from one to the next."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is started together: copies into the band, then tiles [first, stop) that look for the largest
    magnitudes, then tiles that round."""

    copies: Prepared | None
    looked: tuple[int, int]
    rounded: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Quantiser:
    """A quantised plan over GPU memory, made ready.

    `found`: the bits of the largest magnitudes that steps hand to later ones; `bad`: whether each of `names`
    (dense name, rows) could not be quantised, `told` its place in main memory."""

    others: Prepared
    steps: tuple[Step, ...]
    table: torch.Tensor
    owner: torch.Tensor
    found: torch.Tensor
    bad: torch.Tensor
    told: torch.Tensor
    names: tuple[tuple[str, int], ...]
    keep: tuple[Buffer, ...]
    ready: torch.cuda.Event
    bytes_scanned: int

    def run(self) -> None:
        """Fill the tensors once more and wait for them. Raises SourceError naming a matrix that holds NaN or
        infinity, DeviceError when a launch fails and where a graph is being captured."""
        # In inference mode, as `prepare` may have been called in it; what was made outside is filled too.
        with torch.inference_mode(), torch.cuda.device(self.table.device):
            if torch.cuda.is_current_stream_capturing():
                raise DeviceError("quantising waits for the GPU, and a CUDA graph is being captured")
            stream = torch.cuda.current_stream()
            stream.wait_event(self.ready)
            self.found.zero_()
            self.bad.zero_()
            self.others.run()
            for step in self.steps:
                if step.copies is not None:
                    step.copies.run()
                for first, stop in (step.looked, step.rounded):
                    quantise(self.table, self.owner, first, stop - first)
            self.told.copy_(self.bad, non_blocking=True)
            stream.synchronize()
        for (name, rows), bad in zip(self.names, self.told.tolist(), strict=True):
            if bad:
                raise not_finite(name, 0, rows)


def fits(planned: Plan) -> bool:
    """Whether the kernel knows every scheme of the plan."""
    return all(covered(q.scheme) for q in planned.quantised.values())


def prepare(planned: Plan, binding: Binding, buffers: Sequence[Buffer], device: str) -> Quantiser:
    """The plan's tables on the GPU that holds its sources and `buffers` (by planned tensor).

    Raises DeviceError for what lies elsewhere, a scheme without a kernel, and where memory is too short."""
    if not fits(planned):
        names = sorted({q.scheme.name for q in planned.quantised.values() if not covered(q.scheme)})
        raise DeviceError(f"{device}: no kernel there for quantisation scheme {', '.join(names)}")
    making = _Making(device)
    if planned.scans is not None:
        scheme = next(q.scheme for q in planned.quantised.values() if q.scanned)
        for window, chunk, extents in in_windows(planned.scans(), planned.extents):
            bound = Binding.of(extents)
            dense, runner = Dense(chunk, bound), making.runner(bound)
            for i, (_, target) in enumerate(window):
                making.scan(target.name, scheme, target.view.dtype, target.shape, dense, i, runner)
            making.flush(runner)
            making.bytes_scanned += int(nbytes(chunk.rows, "src").sum())
    made = Quantising(planned, planned.slots(), {}).made
    runner = making.runner(binding)
    rest = []
    for first, chunk in planned.chunks():
        keep = ~made[first + chunk.tensor]
        rest.append(
            gathered(planned, binding, first, Chunk(chunk.count, chunk.rows[keep], chunk.tensor[keep]))
        )
        dense = Dense(chunk, binding)
        for i in range(chunk.count):
            told = planned.quantised.get(first + i)
            if told is None:
                continue
            zeros = None if told.zeros is None or told.scheme.dynamic else told.zeros
            out, scales, points = (
                0 if t is None else buffers[t].address for t in (first + i, told.scales, zeros)
            )
            there = There(told.scheme, told.dtype, *flat(told.shape), told.shape[-2], out, scales, points)
            making.matrix(told.name, there, told.scanned, dense, i, runner)
    making.flush(runner)
    forms = {t: form_of(told) for told in planned.quantised.values() if (t := told.form) is not None}
    held = np.concatenate([f.view(np.uint8) for f in forms.values()] or [np.zeros(0, np.uint8)])
    constant = Buffer(held, held.ctypes.data, held.nbytes)
    places = [p for p in binding.places if isinstance(p, Buffer)]
    rest.append(_constants(forms, len(places)))
    others = Cuda(device).bind([*places, constant]).prepare(np.concatenate(rest), buffers)
    return making.done(others, (*places, *buffers))


class _Making:
    """A Quantiser on its way: the step that is open, and those that are closed."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.band: torch.Tensor | None = None
        self.used = 0  # bytes of the band
        self.copies: list[Table] = []
        self.looked: list[Part] = []
        self.rounded: list[Part] = []
        self.steps: list[tuple[Prepared | None, list[Part], list[Part]]] = []
        self.words = 1  # of `found`; the first stands for none
        self.found: dict[str, int] = {}
        self.names: list[tuple[str, int]] = []
        self.bytes_scanned = 0

    def runner(self, binding: Binding) -> CudaRunner:
        return Cuda(self.device).bind([p for p in binding.places if isinstance(p, Buffer)])

    def scan(
        self,
        name: str,
        scheme: Scheme,
        dtype: DType,
        shape: tuple[int, ...],
        dense: Dense,
        i: int,
        runner: CudaRunner,
    ) -> None:
        """Look for the largest magnitudes of an uncut matrix."""
        there = There(scheme, dtype, *flat(shape), shape[-2], amax=self._words(scheme, shape))
        self.found[name] = there.amax
        for span in self._spans(there, dense, i, runner):
            self.looked.append(there.part(*span, largest=True))

    def matrix(
        self, name: str, there: There, scanned: bool, dense: Dense, i: int, runner: CudaRunner
    ) -> None:
        """Quantise one that lies in the plan."""
        if scanned:
            amax = self.found[name]
        else:
            amax = (
                0
                if there.scheme.block[0]
                else self._words(there.scheme, (there.rows // there.tall, there.tall, 1))
            )
        there = replace(there, amax=amax, bad=len(self.names))
        self.names.append((name, there.rows))
        for span in self._spans(there, dense, i, runner):
            if amax and not scanned:
                self.looked.append(there.part(*span, largest=True))
            self.rounded.append(there.part(*span))

    def flush(self, runner: CudaRunner) -> None:
        """Close the step."""
        copies = None
        if self.copies and self.band is not None:
            held = Buffer(self.band, self.band.data_ptr(), len(self.band), str(self.band.device))
            copies = runner.prepare(np.concatenate(self.copies), [held])
        if self.looked or self.rounded:
            self.steps.append((copies, self.looked, self.rounded))
        self.copies, self.looked, self.rounded, self.used = [], [], [], 0

    def done(self, others: Prepared, keep: tuple[Buffer, ...]) -> Quantiser:
        """All of it on the device."""
        table, owner, tiles = tiled(
            [part for _, looked, rounded in self.steps for part in (*looked, *rounded)]
        )
        sizes = [len(parts) for _, looked, rounded in self.steps for parts in (looked, rounded)]
        borders = tiles[np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])].tolist()
        try:
            found, bad = (
                torch.empty((n,), dtype=torch.int32, device=self.device)
                for n in (self.words, len(self.names))
            )
            table["amax"][table["amax"] > 0] += np.uint64(found.data_ptr())
            table["bad"] = np.uint64(bad.data_ptr()) + np.uint64(4) * table["bad"]
            held = [
                torch.from_numpy(column.view(np.uint8)).pin_memory().to(self.device, non_blocking=True)
                for column in (table, owner)
            ]
        except torch.OutOfMemoryError:
            needed = table.nbytes + owner.nbytes
            raise short_of_memory(self.device, needed, "the table of matrices") from None
        steps = [
            Step(copies, (borders[2 * k], borders[2 * k + 1]), (borders[2 * k + 1], borders[2 * k + 2]))
            for k, (copies, _, _) in enumerate(self.steps)
        ]
        told = torch.empty((len(self.names),), dtype=torch.int32, device="cpu", pin_memory=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(self.device))
        return Quantiser(
            others, tuple(steps), held[0], held[1], found, bad, told, tuple(self.names), keep, ready,
            self.bytes_scanned,
        )  # fmt: skip

    def _words(self, scheme: Scheme, shape: tuple[int, ...]) -> int:
        """Room for the largest magnitude of each row, or of each matrix: bytes from the start of `found`."""
        rows, _ = flat(shape)
        first, self.words = self.words, self.words + (rows if scheme.block[0] else rows // shape[-2])
        return 4 * first

    def _spans(self, there: There, dense: Dense, i: int, runner: CudaRunner) -> Iterator[Span]:
        """The rows of a matrix where they lie, or where the step's copies bring them."""
        lying = _lying(
            dense.bound[dense.edges[i] : dense.edges[i + 1]], dense.binding, there, str(self.device)
        )
        if lying is not None:
            yield from lying
            return
        width = there.columns * there.dtype.itemsize
        step = max(there.unit, BAND // width // there.unit * there.unit)
        for band in dense.bands(i, there.rows, width, step):
            size = band.count * width
            if self.used + size > BAND:
                self.flush(runner)
            rows = band.rows.copy()
            rows["dst"] += np.uint64(self.used)
            self.copies.append(rows)
            yield band.row, band.count, self._room(self.used + size) + self.used, width
            self.used += -(-size // ALIGNED) * ALIGNED

    def _room(self, size: int) -> int:
        """The address of the band, at least `size` bytes of it."""
        if self.band is None or size > len(self.band):
            size = max(size, BAND)
            try:
                self.band = torch.empty((size,), dtype=torch.uint8, device=self.device)
            except torch.OutOfMemoryError:
                raise short_of_memory(self.device, size, "dense rows to quantise") from None
        return self.band.data_ptr()


def _lying(rows: Table, binding: Binding, there: There, device: str) -> list[Span] | None:
    """The rows of a matrix where they lie on the device as they are, as `unit`s; None where one is not so."""
    item = there.dtype.itemsize
    width = there.columns * item
    spans: list[Span] = []
    for row in rows:
        if row["src_buffer"] == NOTHING or row["src_dtype"] != row["dst_dtype"]:
            return None
        shape, src, dst = (row[name].tolist() for name in ("shape", "src_stride", "dst_stride"))
        place = binding.places[int(row["src_buffer"])]
        if not isinstance(place, Buffer) or place.device != device or shape[:2] != [1, 1]:
            return None
        run = shape[3] * item
        if (shape[3] > 1 and not src[3] == dst[3] == item) or int(row["dst"]) % width:
            return None
        if shape[2] == 1 and run % width == 0:
            count, pitch = run // width, width
        elif run == width and dst[2] == width:
            count, pitch = shape[2], src[2]
        else:
            return None
        first, address = int(row["dst"]) // width, place.address + int(row["src"])
        if first % there.unit or address % item or pitch % item:
            return None
        spans.append((first, count, address, pitch))
    return spans


def _constants(forms: Mapping[int, NDArray[np.generic]], place: int) -> Table:
    """The rows that copy each tensor's bytes, one behind the other in a place."""
    rows, at = np.zeros(len(forms), COPY), 0
    for row, (tensor, form) in zip(rows, forms.items(), strict=True):
        row["shape"], row["src_stride"], row["dst_stride"] = (
            [1, 1, 1, form.nbytes],
            [0, 0, 0, 1],
            [0, 0, 0, 1],
        )
        row["src"], row["src_buffer"], row["dst_buffer"] = at, place, tensor
        row["src_dtype"] = row["dst_dtype"] = uint8.code
        at += form.nbytes
    return rows
