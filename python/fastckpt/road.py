"""The spine: open -> recipe -> layout -> compile -> read -> run -> write. Reads top to bottom.

Every public verb that moves tensors is here, and each is the same road with another end: files, fresh
tensors, the caller's tensors, or a stream of bytes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from . import __version__, joining, plans
from .checkpoint import JSON, Checkpoint
from .dtypes import DType
from .errors import DeviceError, LayoutError, SourceError, WriteError
from .executors import pick
from .executors.cpu import built
from .extents import Buffer
from .files import parse_size
from .layouts import Layout
from .layouts.same import Same
from .manifest import Manifest, Origin, Record
from .pipeline import ToFiles, Worker, feed, put_into, to_buffers
from .placement import Placement
from .planner import LEAF, Batch, Binding, compiled, cut
from .plans import Plan, Wanted
from .quantising import Job, Put, Quantising, Scan
from .quantplan import flat
from .reader import GAP, Lane, Mapped, Positioned
from .rounding import Error, Floats
from .schemes import Quant
from .writer import Output

if TYPE_CHECKING:
    import torch

    from .device import Ready

    State = dict[str, torch.Tensor]
    Opened = str | os.PathLike[str] | Checkpoint | Mapping[str, torch.Tensor]
    Out = str | os.PathLike[str] | State | Sequence[State] | None

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all and the phase: "plan", "copy" or "sync"."""

BAND = 8 * LEAF
"""Output bytes made at once of a tensor that is transposed on the way."""

FIXED_MEMORY = 64 << 20
"""What a run may hold besides its threads' staging: the promise of docs/architecture.md."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did: where, what, how many bytes, how long.

    `digests`: "name" (or "rank/name" with several ranks) -> hex digest of the tensor's output bytes, empty
    where no files were written. `bytes_needed`: source bytes the outputs are made of; `bytes_read`: source
    bytes that were read or, mapped, copied from. `peak_memory`: the process's highest resident bytes so far
    (VmHWM). `phases`: seconds of planning, copying and syncing. `notes`: what the user should know.
    `bytes_scanned`: source bytes read first, for scales that reach across a cut; `errors`: how far each
    quantised tensor lies from its dense values (docs/formats.md), named as in `digests`."""

    out: str | None
    key: str
    ranks: tuple[int, ...]
    files: tuple[str, ...]
    tensors: int
    bytes_needed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    phases: Mapping[str, float]
    digests: Mapping[str, str] = field(default_factory=dict)
    peak_memory: int = 0
    notes: tuple[str, ...] = ()
    bytes_scanned: int = 0
    errors: Mapping[str, Mapping[str, JSON]] = field(default_factory=dict)


# ---- the verbs ----


def plan(
    ckpt: Opened,
    tp: int = 1,
    *,
    placement: Placement | None = None,
    rank: int | None = None,
    layout: str | Layout = "hf",
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
    recipe: str | None = None,
    tp_plan: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    dtype: str | DType | None = None,
    quant: str | Quant | None = None,
    max_shard_size: str | int | None = "5GB",
) -> Plan:
    """What `reshard` would do with the same arguments, without reading a byte of a tensor.

    Raises what `reshard` would raise before its first byte."""
    grid = _placement(tp, placement)
    wanted = Wanted(
        grid, rank, layout, config, recipe, tp_plan, vocab_size, dtype, max_shard_size, quant=_quant(quant)
    )
    return plans.draft(_opened(ckpt), wanted)


def reshard(
    ckpt: Opened,
    tp: int = 1,
    *,
    placement: Placement | None = None,
    rank: int | None = None,
    layout: str | Layout = "hf",
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
    recipe: str | None = None,
    tp_plan: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    dtype: str | DType | None = None,
    quant: str | Quant | None = None,
    allow_nonfinite: bool = False,
    device: str = "cpu",
    out: Out = None,
    max_shard_size: str | int | None = "5GB",
    durable: bool = True,
    overwrite: bool = False,
    memory: str | int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report | State | list[State]:
    """Carry a checkpoint to the serving ranks of a grid, each tensor cut and cast on the way.

    `ckpt`: a path, an opened checkpoint, or tensors by name; `tp=8` is short for
    `placement=Placement(tp=8)`; `rank` makes one rank's part only. Without `out`: a dict of tensors a rank
    (one dict with `rank`); with a path: files and a Report; with the caller's tensors (a dict with `rank`,
    else a list of dicts by rank): they are filled in place, and a shape or dtype that differs is an error.
    `layout`, `config`, `recipe`, `tp_plan`, `vocab_size`, `dtype`, `max_shard_size`: see `plans.Wanted`.
    `quant`: a scheme of `schemes.SCHEMES`, or a Quant with patterns: matrices are quantised on the way, from
    the values `dtype` gives; NaN and infinity in those are an error always.
    NaN and infinity in the output are an error unless `allow_nonfinite`. `durable` fsyncs; `overwrite`
    replaces an output in one step; `memory` bounds the bytes held ("256MB"); `progress` see Progress.
    `device` "cuda" or "cuda:N": tensors there, made by the GPU where the checkpoint's tensors lie there too;
    they are filled in the order of the current stream.

    Raises SourceError, RecipeError, LayoutError and ViewError before anything is written, WriteError while
    it is; then nothing is left behind. DeviceError for what this build cannot do."""
    device = _device(device)
    grid = _placement(tp, placement)
    wanted = Wanted(
        grid, rank, layout, config, recipe, tp_plan, vocab_size, dtype, max_shard_size, quant=_quant(quant)
    )
    run = _Run(threads, memory, progress)
    in_memory = not isinstance(out, (str, os.PathLike))
    if device != "cpu" and not in_memory:
        raise DeviceError(f"device {device!r}: files are written from main memory; leave device= out")
    planned = run.planned(lambda: plans.draft(_opened(ckpt), wanted, in_memory=in_memory))
    if out is None:
        states, _ = run.to_memory(planned, device)
        return states if rank is None else states[0]
    if isinstance(out, (str, os.PathLike)):
        return run.to_files(
            planned, os.fspath(out), rank, durable=durable, overwrite=overwrite, finite=not allow_nonfinite
        )
    return run.to_tensors(planned, _by_rank(out, rank), device)


def prepare(
    ckpt: Opened,
    tp: int = 1,
    *,
    placement: Placement | None = None,
    rank: int | None = None,
    layout: str | Layout = "hf",
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
    recipe: str | None = None,
    tp_plan: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    dtype: str | DType | None = None,
    device: str = "cuda",
    out: State | Sequence[State] | None = None,
) -> Ready:
    """`reshard` from GPU memory to GPU memory made ready, to be run as often as the weights change.

    Arguments as there; `run()` of the result plans and uploads nothing. Raises as `reshard` does, and
    DeviceError where the checkpoint's tensors do not lie on the device."""
    from . import tensors
    from .device import Ready, resident
    from .device import prepare as on_device

    device = _device(device)
    grid = _placement(tp, placement)
    wanted = Wanted(grid, rank, layout, config, recipe, tp_plan, vocab_size, dtype)
    planned = plans.draft(_opened(ckpt), wanted, in_memory=True)
    binding = Binding.of(planned.extents)
    if device == "cpu" or not resident(binding):
        raise DeviceError(f"prepare: wanted tensors on a GPU as source, device {device!r}; else use reshard")
    states: Sequence[Mapping[str, torch.Tensor]]
    if out is None:
        states, buffers = tensors.allocate(planned, device)
        tensors.tie(states, planned.aliases)
    else:
        states = _by_rank(out, rank)
        buffers = tensors.matched(planned, states, device)
    return Ready(tuple(states), on_device(planned, binding, buffers, device))


def consolidate(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    tag: str | None = None,
    also: Sequence[str | os.PathLike[str]] = (),
    rename: Sequence[tuple[str, str]] = (),
    weights: str = "master",
    exclude_frozen: bool = False,
    check_crc: bool = False,
    safe_serialization: bool = False,
    max_shard_size: str | int | None = "5GB",
    dtype: str | DType | None = "float32",
    weights_key: str | None = None,
    client_state: Sequence[str] = (),
    allow_nonfinite: bool = True,
    durable: bool = True,
    overwrite: bool = False,
    memory: str | int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report | State:
    """The whole model in one directory, as DeepSpeed's zero_to_fp32 writes it: names, order, file names.

    `path` and the options up to `check_crc` as in `open`; `dtype` of the floats (None: as stored), integer
    buffers are kept; `.bin` files unless `safe_serialization`. Without `out` the state dict is returned.
    `weights_key` wraps the weights into a single-file training checkpoint, with the plain values named in
    `client_state` beside them. Raises as `reshard` does."""
    opened = joining.open(
        path,
        tag=tag,
        also=also,
        rename=rename,
        weights=weights,
        exclude_frozen=exclude_frozen,
        check_crc=check_crc,
    )
    opened = joining.whole(opened)
    run = _Run(threads, memory, progress)
    planned = run.planned(
        lambda: consolidation(
            opened,
            safe_serialization=safe_serialization,
            max_shard_size=max_shard_size,
            dtype=dtype,
            weights_key=weights_key,
            client_state=client_state,
            in_memory=out is None,
        )
    )
    if out is None:
        return run.to_memory(planned)[0][0]
    return run.to_files(
        planned,
        os.fspath(out),
        None,
        durable=durable,
        overwrite=overwrite,
        finite=not allow_nonfinite,
        beside=False,
    )


def consolidation(
    ckpt: Checkpoint,
    *,
    safe_serialization: bool = False,
    max_shard_size: str | int | None = "5GB",
    dtype: str | DType | None = "float32",
    weights_key: str | None = None,
    client_state: Sequence[str] = (),
    in_memory: bool = False,
) -> Plan:
    """The plan of `consolidate` for an opened checkpoint."""
    if client_state and weights_key is None:
        raise LayoutError("client_state goes with weights_key: it stands beside the weights in one file")
    wanted = Wanted(
        Placement(),
        layout=Same("safetensors" if safe_serialization else "bin"),
        dtype=dtype,
        max_shard_size=None if weights_key else max_shard_size,
        sorted=True,
        weights_key=weights_key,
        client_state=_client_state(ckpt, client_state) if client_state else None,
    )
    return plans.draft(ckpt, wanted, in_memory=in_memory)


def load_into(
    module: torch.nn.Module,
    ckpt: Opened,
    tp: int = 1,
    rank: int | None = None,
    layout: str | Layout = "same",
    strict: bool = True,
    *,
    placement: Placement | None = None,
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
    recipe: str | None = None,
    tp_plan: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> torch.nn.Module:
    """Fill a module's parameters and buffers from a checkpoint, cast to the module's dtypes; returns it.

    The same road as `reshard` with the module as `out`: no second copy of the model. Parameters on the
    meta device are made where the others are, else on the CPU. `strict`: every persistent tensor of the
    module must be filled and every tensor of the shard used, else LayoutError names them."""
    from . import tensors

    grid = _placement(tp, placement)
    if rank is None and grid.world > 1:
        raise LayoutError(f"load_into: a module is one rank's; say which of the {grid.world} ranks (rank=)")
    held = tensors.held(module)
    if strict and (unmade := tensors.left_on_meta(module, held)):
        raise LayoutError(
            f"load_into: {unmade[0]} is a buffer on the meta device that checkpoints do not hold "
            f"({len(unmade)} such); make it first, or strict=False leaves it"
        )
    wanted = Wanted(
        grid, rank or 0, layout, config, recipe, tp_plan, vocab_size, held=tensors.dtypes_of(held)
    )
    run = _Run(threads, memory, progress)
    planned = run.planned(lambda: plans.draft(_opened(ckpt), wanted, in_memory=True))
    made = {t.name for t in planned.tensors}
    tied = tensors.tied(held, made)
    missing = [n for n in held if n not in made and n not in tied]
    if strict and (missing or planned.left_out):
        raise LayoutError(
            f"load_into: {len(missing)} tensors of the module are not in the checkpoint"
            f" ({', '.join(missing[:3]) or 'none'}), {len(planned.left_out)} of the checkpoint are not in"
            f" the module ({', '.join(planned.left_out[:3]) or 'none'}); strict=False loads what both have"
        )
    device = tensors.device_of(held)
    real = tensors.made_real({n: held[n] for n in made}, device)
    run.to_tensors(planned, [real], device if device == "cpu" else _device(device))
    tensors.assign(module, real, tied)
    return module


def stream(ckpt: Opened, names: Sequence[str]) -> Iterator[tuple[str, int, memoryview]]:
    """The dense bytes of tensors as stored, in order: (name, offset in bytes, at most a MiB of them).

    The memory is valid until the next step. Reads in bounded memory; for `diff` and the like."""
    opened = ckpt if isinstance(ckpt, Checkpoint) else joining.open(ckpt)
    only = replace(opened, entries={n: opened.entries[n] for n in names}, aliases={})
    planned = plans.draft(only, Wanted(Placement(), layout=Same()), in_memory=True)
    binding, slots = Binding.of(planned.extents), planned.slots()
    staging = np.empty(LEAF, np.uint8)
    target = Buffer(staging, staging.ctypes.data, LEAF)
    whole = memoryview(staging.data)
    with _reader(binding, alone=False) as reader:
        lane = reader.lane(pick(None))
        for first, chunk in planned.chunks():
            for batch in cut(chunk, first, slots, binding, stage=LEAF, band=LEAF):
                lane.run(batch.rows, [target])
                for at, size, leaf in zip(
                    batch.leaf_offset.tolist(), batch.leaf_size.tolist(), batch.leaf.tolist(), strict=True
                ):
                    t = int(np.searchsorted(slots.leaf, leaf, "right")) - 1
                    yield planned.tensors[t].name, (leaf - int(slots.leaf[t])) * LEAF, whole[at : at + size]


# ---- a run ----


class _Run:
    """One run's clock, threads and memory, and the three ends a plan can have."""

    def __init__(self, threads: int | None, memory: str | int | None, progress: Progress | None) -> None:
        self.threads = _threads(threads)
        self.band = band(self.threads)
        self.spare: int | None = None
        if memory is not None:
            budget = parse_size(memory)
            spare = budget - FIXED_MEMORY
            if spare < 2 * LEAF:
                raise WriteError(
                    f"memory {memory!r}: {budget} bytes are too few, "
                    f"a run needs at least {FIXED_MEMORY + 2 * LEAF}"
                )
            self.threads = max(1, min(self.threads, spare // (2 * LEAF)))
            self.spare = spare
            self.band = max(LEAF, min(BAND, spare // self.threads // LEAF // 2 * LEAF))
        self.progress = progress
        self.start = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.bytes_read = 0
        self.bytes_scanned = 0
        self.errors: dict[int, Error] = {}

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

    def to_tensors(self, planned: Plan, out: Sequence[State], device: str = "cpu") -> Report:
        """The caller's tensors, filled in place."""
        from . import tensors

        return self._in_memory(planned, tensors.matched(planned, out, device), device)

    def _in_memory(self, planned: Plan, buffers: Sequence[Buffer], device: str) -> Report:
        if device == "cpu":
            self._copy(planned, lambda lane: to_buffers(lane, buffers), put_into(buffers), apart=True)
        else:
            self._on_gpu(planned, buffers, device)
        return self._report(planned, None, {})

    def _on_gpu(self, planned: Plan, buffers: Sequence[Buffer], device: str) -> None:
        from .device import ToDevice, prepare, resident

        if planned.quantised:
            raise DeviceError(f"device {device!r}: quantising runs on the CPU only")
        binding = Binding.of(planned.extents)
        if resident(binding):
            began = time.perf_counter()
            prepare(planned, binding, buffers, device).run()
            self.bytes_read += planned.needed_bytes
            self.phases["copy"] = time.perf_counter() - began  # until it was started
        else:
            sink = ToDevice(planned.slots(), buffers, device)
            self._copy(planned, lambda lane: sink.worker(lane, self.band))
            sink.close()

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
        world = planned.placement.world
        output = Output(
            out, key=planned.key, rank=rank, world=world, overwrite=overwrite, durable=durable,
            keep=_read_from(planned),
        )  # fmt: skip
        with output:
            if rank is not None and output.done(rank):
                done = _digests(output.complete(), planned.ranks)
                notes = (*planned.notes, f"rank {rank} was done already")
                return self._report(replace(planned, notes=notes), out, done)
            output.reserve(sum(f.nbytes for f in planned.files))
            files = [output.create(f, r) for f, r in zip(planned.files, planned.file_ranks, strict=True)]
            sink = ToFiles(planned.slots(), planned.tensors, files, finite=finite)
            self._copy(planned, lambda lane: sink.worker(lane, self.band), sink.put)
            began = time.perf_counter()
            if self.progress is not None:
                self.progress(planned.output_bytes, planned.output_bytes, "sync")
            sink.close(self.threads)
            for owner, name, data in (*planned.texts, *_errors(planned, self.errors)):
                output.text(name, data, owner)
            if beside:
                for path in planned.checkpoint.beside:
                    if planned.config is None or os.path.basename(path) != "config.json":
                        output.copy(path)
                if planned.config is not None:
                    output.text("config.json", planned.config)
            manifest = output.commit(_record(planned, finite))
            self.phases["sync"] = time.perf_counter() - began
        return self._report(planned, out, _digests(manifest, planned.ranks))

    def _copy(
        self, planned: Plan, worker: Callable[[Lane], Worker], put: Put | None = None, *, apart: bool = False
    ) -> None:
        """Every batch of the plan through the readers and the executor."""
        largest = self._scan(planned)
        began = time.perf_counter()
        executor = pick(None)
        binding, slots = Binding.of(planned.extents), planned.slots()
        quantising = Quantising(planned, slots, largest)
        threads = self._fitting(quantising)
        total, done = planned.output_bytes, 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if self.progress is not None:
                self.progress(done, total, "copy")

        with _reader(binding, alone=len(planned.ranks) < planned.placement.world) as reader:
            band = self.band if isinstance(reader, Mapped) else LEAF

            def batches() -> Iterator[Batch | Job]:
                for first, chunk in planned.chunks():
                    yield from quantising.jobs(first, chunk, binding)
                    others = quantising.others(first, chunk)
                    yield from cut(others, first, quantising.rest, binding, band=band, apart=apart)

            def both(lane: Lane) -> Callable[[Batch | Job], None]:
                copy = worker(lane)
                if put is None:  # the plan quantises nothing
                    return lambda item: None if isinstance(item, Job) else copy(item)
                quantise = quantising.worker(lane, put)
                return lambda item: quantise(item) if isinstance(item, Job) else copy(item)

            lanes = [reader.lane(executor) for _ in range(threads)]
            feed(batches(), [both(lane) for lane in lanes], count)
            self.bytes_read += sum(lane.bytes_read for lane in lanes)
        self.errors = quantising.errors
        self.phases["copy"] = time.perf_counter() - began

    def _fitting(self, quantising: Quantising) -> int:
        """As many threads as `memory` holds the staging of. Raises WriteError where it holds none."""
        need = quantising.dense + quantising.values
        if self.spare is None or not quantising.dense:
            return self.threads
        if self.spare < need:
            raise WriteError(
                f"memory: a band of blocks to quantise takes {need} bytes above {FIXED_MEMORY}, "
                f"got {self.spare}"
            )
        return min(self.threads, self.spare // need)

    def _scan(self, planned: Plan) -> dict[str, Floats]:
        """The first read: the largest magnitudes of uncut matrices whose scales reach across a cut."""
        scan = Scan()
        if planned.scans is None:
            return scan.largest
        began = time.perf_counter()
        for window, chunk, extents in compiled(planned.scans(), planned.extents):
            binding = Binding.of(extents)
            with _reader(binding, alone=False) as reader:
                lanes = [reader.lane(pick(None)) for _ in range(self.threads)]
                feed(scan.jobs(window, chunk, binding), [scan.worker(lane) for lane in lanes], lambda _: None)
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
                f"{t.rank}/{t.name}" if planned.placement.world > 1 else t.name: told
                for i, told in _told(planned, self.errors).items()
                for t in [planned.tensors[i]]
            },
        )


def _quant(asked: str | Quant | None) -> Quant | None:
    return None if asked is None else Quant.of(asked)


def _told(planned: Plan, errors: Mapping[int, Error]) -> dict[int, dict[str, JSON]]:
    """What is told of each quantised tensor, in the plan's order."""
    told: dict[int, dict[str, JSON]] = {}
    for i, q in planned.quantised.items():
        if i in errors:
            e = errors[i]
            told[i] = {
                "scheme": q.scheme.name,
                "dense": q.name,
                "dense_bytes": flat(q.shape)[0] * flat(q.shape)[1] * q.dtype.itemsize,
                "bytes": planned.tensors[i].nbytes + planned.tensors[q.scales].nbytes,
                "max_error": _figure(e.biggest),
                "rms_error": _figure(e.rms),
                "snr_db": _figure(e.snr),
                "cosine": _figure(e.cosine),
            }
    return told


def _figure(value: float | None) -> float | None:
    """Six digits; None for what JSON cannot say."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def _errors(planned: Plan, errors: Mapping[int, Error]) -> list[tuple[int, str, bytes]]:
    """A file for each rank that tells the error of its quantised tensors: (rank, path, bytes)."""
    by_rank: dict[int, dict[str, JSON]] = {}
    for i, told in _told(planned, errors).items():
        by_rank.setdefault(planned.tensors[i].rank, {})[planned.tensors[i].name] = told
    return [
        (rank, f"quantisation-rank-{rank}.json", (json.dumps(told, indent=1) + "\n").encode())
        for rank, told in by_rank.items()
    ]


def _read_from(planned: Plan) -> list[str]:
    """Every path this run reads: overwriting must remove none of them. Tensors in memory have none."""
    ckpt = planned.checkpoint
    return [ckpt.path, *(f.path for f in ckpt.files), *ckpt.beside] if ckpt.files else []


def _record(planned: Plan, finite: bool) -> Record:
    """What the manifest says of this run."""
    ckpt, grid = planned.checkpoint, planned.placement
    tag, step = ckpt.facts.get("tag"), ckpt.facts.get("step")
    origin = Origin(
        os.path.abspath(ckpt.path) if ckpt.files else ckpt.path,
        ckpt.format,
        tag if isinstance(tag, str) else "",
        step if isinstance(step, int) else None,
        ckpt.headers,
    )
    sizes = {"tp": grid.tp, "pp": grid.pp, "dp": grid.dp, "ep": grid.ep}
    told = joining.told(ckpt, grid.world, planned.layout)
    options = {**planned.options, **told, "allow_nonfinite": not finite}
    return Record(origin, __version__, planned.layout, sizes, options)


def _digests(manifest: Manifest, ranks: Sequence[int]) -> dict[str, str]:
    """Tensor digests of some ranks; the rank stands before the name where the set has several."""
    return {
        f"{shard.rank}/{name}" if manifest.world > 1 else name: tensor.digest
        for shard in manifest.shards
        if shard.rank in ranks
        for name, tensor in shard.tensors.items()
    }


def _client_state(ckpt: Checkpoint, names: Sequence[str]) -> dict[str, JSON]:
    """The plain values of the training checkpoint that are to be kept. Raises SourceError for others."""
    held = ckpt.facts.get("client_state")
    known = held if isinstance(held, dict) else {}
    missing = [n for n in names if n not in known]
    if missing:
        raise SourceError(
            f"{ckpt.path}: no plain value {missing[0]!r} in the client state; "
            f"it has {', '.join(known) or 'none'}"
        )
    return {n: known[n] for n in names}


def band(threads: int) -> int:
    """The band of each of so many threads: together at most 4 MiB a thread and 16 MiB of the fixed part."""
    return min(BAND, (16 + 4 * threads) // threads * LEAF)


def _placement(tp: int, placement: Placement | None) -> Placement:
    if placement is not None and tp not in (1, placement.tp):
        raise LayoutError(f"tp={tp} and placement.tp={placement.tp} differ; give one of them")
    return Placement(tp=tp) if placement is None else placement


def _device(name: str) -> str:
    """The device by its full name. Raises DeviceError where this build or machine cannot use it."""
    if name == "cpu":
        return name
    from .executors.cuda import usable

    return str(usable(name))


def _by_rank(out: State | Sequence[State], rank: int | None) -> list[State]:
    if isinstance(out, Mapping) == (rank is None):
        raise LayoutError("out: one dict of tensors goes with rank=, a list of dicts with all ranks")
    return [out] if isinstance(out, Mapping) else list(out)


def _opened(ckpt: Opened) -> Checkpoint:
    return joining.whole(ckpt if isinstance(ckpt, Checkpoint) else joining.open(ckpt))


def _threads(asked: int | None) -> int:
    if asked is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked < 1:
        raise WriteError(f"threads: wanted at least 1, got {asked}")
    return asked


def _reader(binding: Binding, *, alone: bool) -> Mapped | Positioned:
    """Mapped where it is compiled, else by position; one rank alone may read through small gaps."""
    if built():
        return Mapped(binding.places)
    return Positioned(binding.places, gap=GAP if alone else 0)


def _peak_memory() -> int:
    """VmHWM in bytes; 0 where the kernel does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM")), 0)
    except OSError:
        return 0
