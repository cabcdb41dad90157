"""One run of a plan, into any of its sinks: files, tensors in memory or on a GPU, digests.

Law: what a run holds stays within its `Limits`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from .. import __version__
from ..checkpoint import JSON
from ..computed.nowhere import computed
from ..digest import LEAF
from ..errors import expect
from ..executors import pick
from ..executors.cpu import built
from ..extents import COMPUTED, Buffer, Extents, File
from ..joining.recorded import cut_from
from ..output.manifest import Manifest, Origin, Record, rows_of
from ..output.syscalls import give_back
from ..output.writer import Output
from ..pipeline import feed
from ..planning.batches import Batch, cut, spread
from ..planning.binding import Binding
from ..planning.compiling import in_windows
from ..planning.plans import Plan
from ..quantisation.rounding import Error, Floats
from ..reader import GAP, Lane, Mapped, Positioned, Reader, check_unchanged
from ..sources import memory
from . import figures
from .computing import Computing, Losses
from .limits import STAGE, Limits, recent
from .quantising import Quantising, Scan, Sink, Stretch
from .sinks import ToDigests, ToFiles, ToMemory, Worker

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all and the phase: "copy" or "sync"."""

SMALL = 16 << 20
"""Bytes in and out that the caller's thread moves from memory to memory sooner than others are started."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did: where, what, how many bytes, how long.

    `digests`: "name" (or "rank/name" with several ranks) -> hex digest of the tensor's output bytes, empty
    where no files were written. `bytes_needed`: source bytes the outputs are made of, None where values are
    computed of others (`Plan`); `bytes_read`: source bytes that were read or, mapped, copied from.
    `peak_memory`: the process's highest resident bytes so far (VmHWM). `phases`: seconds of planning, copying
    and syncing. `notes`: what the user should know.
    `bytes_scanned`: source bytes read first, for scales that reach across a cut; `errors`: how far each
    quantised tensor lies from its dense values (docs/formats.md), named as in `digests`; none where a GPU
    quantised."""

    out: str | None
    key: str
    ranks: tuple[int, ...]
    files: tuple[str, ...]
    tensors: int
    bytes_needed: int | None
    bytes_read: int
    bytes_written: int
    seconds: float
    phases: Mapping[str, float]
    digests: Mapping[str, str] = field(default_factory=dict)
    peak_memory: int = 0
    notes: tuple[str, ...] = ()
    bytes_scanned: int = 0
    errors: Mapping[str, Mapping[str, JSON]] = field(default_factory=dict)


class Run:
    """One run's clock, limits and counts; a method for each sink a plan can have.

    `errors`: how far quantised tensors lie from their dense values, by number in the plan; `losses`:
    the same of what is quantised as it is read."""

    def __init__(self, threads: int | None, memory: str | int | None, progress: Progress | None) -> None:
        expect("threads", threads, int, type(None))
        expect("memory", memory, str, int, type(None))
        expect("progress", progress, Callable, type(None))  # type: ignore[arg-type]
        self.limits = Limits.of(threads, memory)
        self.progress = progress
        self.start = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.bytes_read = 0
        self.bytes_scanned = 0
        self.errors: dict[int, Error] = {}
        self.losses = Losses()

    def planned(self, make: Callable[[], Plan]) -> Plan:
        """Make the plan, on the clock."""
        planned = make()
        self.phases["plan"] = time.perf_counter() - self.start
        return planned

    def to_memory(self, planned: Plan, device: str = "cpu") -> tuple[list[State], Report]:
        """Fresh tensors; a tied name is the same tensor again."""
        from . import tensors

        states, buffers = tensors.allocate(planned, device)
        report = self._in_memory(planned, buffers, device)
        tensors.tie(states, planned.aliases)
        return states, report

    def to_tensors(self, planned: Plan, out: Sequence[State], device: str) -> Report:
        """The caller's tensors, filled in place."""
        from . import tensors

        return self._in_memory(planned, tensors.matched(planned, out, device), device)

    def to_digests(self, planned: Plan) -> dict[str, str]:
        """The digest of every tensor of a plan of one rank; nothing is kept."""
        sink = ToDigests(planned.slots())
        self._copy(planned, lambda lane: sink.worker(lane, self.limits.band))
        found = map("{:016x}".format, sink.digests().tolist())
        return dict(zip(planned.tensors.made.names, found, strict=True))

    def _in_memory(self, planned: Plan, buffers: Sequence[Buffer], device: str) -> Report:
        if device == "cpu":
            sink = ToMemory(buffers)
            small = (planned.needed_bytes or 0) + planned.output_bytes <= SMALL
            self._copy(planned, sink.worker, sink, for_memory=True, here=small)
        else:
            self._on_gpu(planned, buffers, device)
        return self._report(planned, None, {})

    def _on_gpu(self, planned: Plan, buffers: Sequence[Buffer], device: str) -> None:
        """Tensors on a GPU: made there where the sources lie there, else sent."""
        from . import gpu_quantising, gpu_sources
        from .gpu_sinks import ToDevice

        binding = Binding.of(planned.extents)
        if gpu_sources.resident(binding) and (not planned.quantised or gpu_quantising.fits(planned)):
            began = time.perf_counter()
            if planned.quantised:
                made = gpu_quantising.prepare(planned, binding, buffers, device)
                self.bytes_scanned += made.bytes_scanned
                made.run()
            else:
                gpu_sources.prepare(planned, binding, buffers, device).run()
            self.bytes_read += planned.needed_bytes or 0  # nothing computed lies on a GPU
            self.phases["copy"] = time.perf_counter() - began  # of copies alone: until they were started
        elif planned.quantised:  # by the CPU
            sink = ToDevice(planned.slots(), buffers, device)
            sink.open()
            with closing(sink):
                self._copy(planned, lambda lane: sink.worker(lane, self.limits.band), sink)
        else:
            self._over_the_bus(planned, buffers, device)

    def _over_the_bus(self, planned: Plan, buffers: Sequence[Buffer], device: str) -> None:
        """From files and main memory to a GPU, by the faster way."""
        from . import gpu_transfer

        limits, way = self.limits, "cpu"
        if limits.spare is None:  # the GPU's way, and what is sent at once, hold more than `memory` may allow
            limits = replace(limits, band=gpu_transfer.SENT)
            way = gpu_transfer.way(planned, device, limits.threads)
        worker, close = gpu_transfer.sinks(way, planned.slots(), list(buffers), device, limits.band)
        try:
            limits = replace(limits, threads=min(limits.threads, gpu_transfer.MOST_WORKERS[way]))
            self._copy(planned, worker, for_memory=way == "gpu", stage=gpu_transfer.SENT, limits=limits)
        finally:  # after an error too: what was sent is on its way into memory that is given up then
            close()

    def to_files(
        self,
        planned: Plan,
        out: str,
        rank: int | None,
        *,
        durable: bool,
        overwrite: bool,
        finite: bool,
        beside: bool = True,
    ) -> Report:
        """Files, real all at once or not at all; a rank that is done already is left as it is."""
        output = _output(planned, out, rank, durable=durable, overwrite=overwrite)
        with output:
            # What lies in memory is made again: that the sampled bytes are the same does not prove the rest.
            if rank is not None and planned.checkpoint.format != memory.NAME and output.done(rank):
                done = _digests(output.complete(), planned.ranks)
                notes = (*planned.notes, f"rank {rank} was done already")
                return replace(self._report(replace(planned, notes=notes), out, done), bytes_written=0)
            output.reserve(_nbytes(planned))
            files = [output.create(f, r) for f, r in zip(planned.files, planned.file_ranks, strict=True)]
            sink = ToFiles(planned.slots(), planned.tensors, files, finite=finite)
            give_back()  # what opening and planning freed
            self._copy(planned, lambda lane: sink.worker(lane, self.limits.band), sink)
            began = time.perf_counter()
            if self.progress is not None:
                self.progress(planned.output_bytes, planned.output_bytes, "sync")
            sink.close(self.limits.threads)
            lost = figures.texts(planned, self.errors, self.losses.found)
            for owner, name, data in (*planned.texts, *lost):
                output.text(name, data, owner)
            if beside:
                ckpt = planned.checkpoint
                copied = [f for f in ckpt.beside if planned.config is None or f is not ckpt.config_file]
                for file in copied:
                    output.copy(file.path)
                check_unchanged(copied, range(len(copied)))  # the weights were cut by the config of then
                if planned.config is not None:
                    output.text("config.json", planned.config)
            manifest = output.commit(_record(planned, finite))
            self.phases["sync"] = time.perf_counter() - began
        planned = replace(planned, notes=(*planned.notes, *output.notes))
        return self._report(planned, out, _digests(manifest, planned.ranks))

    def _copy(
        self,
        planned: Plan,
        worker: Callable[[Lane], Worker],
        sink: Sink | None = None,
        *,
        for_memory: bool = False,
        here: bool = False,
        stage: int = STAGE,
        limits: Limits | None = None,
    ) -> None:
        """Every batch of the plan through the readers and the executor.

        `sink`: where quantised values go, None where the plan has none; `for_memory`: batches are made by
        `spread`, not by `cut`; `here`: the caller's thread runs them, and no other; `stage`: bytes of a batch
        from mapped sources, where the band has them; `limits`: those of the batches, where they are not the
        run's."""
        limits = limits or self.limits
        largest = self._scan(planned)
        began = time.perf_counter()
        binding, slots = Binding.of(planned.extents), planned.slots()
        quantising = Quantising(planned, slots, largest)
        threads = limits.fitting(quantising.staging)
        done = _Done(planned.output_bytes, self.progress)
        alone = len(planned.ranks) < planned.placement.world
        with reader_of(planned.extents, binding, alone=alone, losses=self.losses) as reader:
            step, band = reader.batch_sizes(stage, limits.band)
            cutting = partial(cut, stage=step, band=band, thin=LEAF)
            if for_memory:
                cutting = partial(spread, stage=band, band=band, by_file=bool(computed(binding.places)))
            items = _items(planned, quantising, binding, cutting)
            executor = pick(None, recent(len(planned.tensors)))
            lanes = [reader.lane(executor) for _ in range(1 if here else threads)]
            workers = [_either(worker(lane), quantising, lane, sink) for lane in lanes]
            if here:
                for item in items:
                    workers[0](item)
                    done.add(item.stop - item.start)
            else:
                feed(items, workers, done.add, lambda item: item.file)
            done.finish()
            self.bytes_read += sum(lane.bytes_read for lane in lanes)
            self.bytes_scanned += sum(lane.bytes_scanned for lane in lanes)
        self.errors = quantising.errors
        self.phases["copy"] = time.perf_counter() - began

    def _scan(self, planned: Plan) -> dict[str, Floats]:
        """The first read: the largest magnitudes of uncut matrices whose scales reach across a cut."""
        scan = Scan()
        if planned.scans is None:
            return scan.largest
        began = time.perf_counter()
        for window, chunk, extents in in_windows(planned.scans(), planned.extents):
            binding = Binding.of(extents)
            with reader_of(extents, binding, alone=False) as reader:
                executor = pick(None)
                lanes = [reader.lane(executor) for _ in range(self.limits.threads)]
                feed(
                    scan.bands(window, chunk, binding), [scan.worker(lane) for lane in lanes], lambda _: None
                )
                self.bytes_scanned += sum(lane.bytes_read for lane in lanes)
        self.phases["scan"] = time.perf_counter() - began
        return scan.largest

    def _report(self, planned: Plan, out: str | None, digests: Mapping[str, str]) -> Report:
        folder = "" if out is None else out
        return Report(
            out=out,
            key=planned.key,
            ranks=planned.ranks,
            files=tuple(os.path.join(folder, f.path) for f in planned.files),
            tensors=len(planned.tensors),
            bytes_needed=planned.needed_bytes,
            bytes_read=self.bytes_read,
            bytes_scanned=self.bytes_scanned,
            bytes_written=planned.output_bytes,
            seconds=time.perf_counter() - self.start,
            phases=self.phases,
            digests=digests,
            peak_memory=_peak_memory(),
            notes=planned.notes,
            errors={
                f"{rank}/{name}" if planned.placement.world > 1 else name: lost
                for rank, mine in figures.of(planned, self.errors, self.losses.found).items()
                for name, lost in mine.items()
            },
        )


class _Done:
    """The output bytes of a run that are made, told to the caller as they are."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        """So many more."""
        self.nbytes += nbytes
        if self.progress is not None:
            self.progress(self.nbytes, self.total, "copy")

    def finish(self) -> None:
        """All are: the scales went out with the last values of their tensors."""
        if self.nbytes < self.total:
            self.add(self.total - self.nbytes)


def _items(
    planned: Plan, quantising: Quantising, binding: Binding, cutting: Callable[..., Iterator[Batch]]
) -> Iterator[Batch | Stretch]:
    """What is to be done, window by window: stretches of quantised tensors, and batches of all others."""
    for first, chunk in planned.chunks():
        yield from quantising.stretches(first, chunk, binding)
        yield from cutting(quantising.others(first, chunk), first, quantising.rest, binding)


def _either(
    copy: Worker, quantising: Quantising, lane: Lane, sink: Sink | None
) -> Callable[[Batch | Stretch], None]:
    """One thread's work on what comes: a batch to copy, or a stretch to quantise."""
    quantise = None if sink is None else quantising.worker(lane, sink)

    def run(item: Batch | Stretch) -> None:
        if not isinstance(item, Stretch):
            copy(item)
        elif quantise is not None:
            quantise(item)

    return run


def require_place(planned: Plan, out: str, rank: int | None, *, overwrite: bool = False) -> None:
    """Raises WriteError where `Run.to_files` would before its first byte, as `Output.refuse` does."""
    _output(planned, out, rank, durable=False, overwrite=overwrite).refuse(_nbytes(planned))


def _output(planned: Plan, out: str, rank: int | None, *, durable: bool, overwrite: bool) -> Output:
    return Output(
        out, key=planned.key, rank=rank, world=planned.placement.world, overwrite=overwrite, durable=durable,
        keep=_read_from(planned),
    )  # fmt: skip


def _nbytes(planned: Plan) -> int:
    return sum(f.nbytes for f in planned.files)


def _read_from(planned: Plan) -> list[str]:
    """Every path this run reads: overwriting must remove none of them. Tensors in memory have none."""
    ckpt = planned.checkpoint
    return [ckpt.path, *(f.path for f in (*ckpt.files, *ckpt.beside))] if ckpt.files else []


def _record(planned: Plan, finite: bool) -> Record:
    """What the manifest says of this run."""
    ckpt, grid = planned.checkpoint, planned.placement
    origin = Origin(
        os.path.abspath(ckpt.path) if ckpt.files else ckpt.path,
        ckpt.format,
        ckpt.saved.tag or "",
        ckpt.saved.step,
        ckpt.headers,
    )
    sizes = {"tp": grid.tp, "pp": grid.pp, "dp": grid.dp, "ep": grid.ep}
    of = cut_from(ckpt, grid.world, planned.layout)
    options = {**planned.options, **of, "allow_nonfinite": not finite}
    return Record(origin, __version__, planned.layout, sizes, options)


def _digests(manifest: Manifest, ranks: Sequence[int]) -> dict[str, str]:
    """Tensor digests of some ranks; the rank stands before the name where the set has several."""
    return {
        f"{shard.rank}/{name}" if manifest.world > 1 else name: found
        for shard in manifest.shards
        if shard.rank in ranks
        for name, *_, found in rows_of(shard.tensors)
    }


def reader_of(extents: Extents, binding: Binding, *, alone: bool, losses: Losses | None = None) -> Reader:
    """The reader for these extents: mapped with the compiled module, else by position, where one rank `alone`
    may read through small gaps. Computed extents are made by a reader over that one, which adds to `losses`;
    extents on a GPU have a reader of their own."""
    if any(isinstance(p, Buffer) and p.device not in ("cpu", COMPUTED) for p in binding.places):
        from .gpu_sources import Resident

        return Resident(binding)

    def stored(places: Sequence[File | Buffer]) -> Reader:
        return Mapped(places) if built() else Positioned(places, gap=GAP if alone else 0)

    if computed(binding.places):
        return Computing(extents, binding, stored, losses)
    return stored(binding.places)


def _peak_memory() -> int:
    """VmHWM in bytes; 0 where the kernel does not tell."""
    try:
        with open("/proc/self/status", "rb") as f:  # a process may have any name
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith(b"VmHWM")), 0)
    except OSError:
        return 0
