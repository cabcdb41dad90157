"""The spine: open -> recipe -> layout -> compile -> read -> run -> write. Reads top to bottom.

Every public verb that moves tensors is here, and each is the same road with another end: files, fresh
tensors, the caller's tensors, or a stream of bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, overload

from . import opening, sources
from .checkpoint import JSON, Checkpoint
from .dtypes import DType
from .errors import DeviceError, LayoutError, SourceError, expect
from .layouts import Layout
from .layouts.same import Same
from .leaves import leaves
from .opening import open_joined
from .placement import Placement, grid_of
from .planning import plans
from .planning.binding import Binding
from .planning.plans import Plan
from .planning.request import Request
from .quantisation.schemes import Quant
from .recipes import strangers
from .replicas import compare
from .running.runs import Progress, Report, Run
from .sources.memory import stamped

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from .planning.request import Serving
    from .running.gpu_sources import Ready

    State = dict[str, torch.Tensor]
    Opened = str | os.PathLike[str] | Checkpoint | Mapping[str, torch.Tensor]
    Out = str | os.PathLike[str] | State | Sequence[State]

    class Resharding(Serving, total=False):
        """The arguments of `reshard` that do not decide what it returns."""

        allow_nonfinite: bool
        device: str | torch.device
        durable: bool
        overwrite: bool
        memory: str | int | None
        threads: int | None
        progress: Progress | None


DENSE = "none"
"""The `quant` that takes quantisation back."""


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
    adapter: str | os.PathLike[str] | None = None,
    apart: bool = False,
    max_shard_size: str | int | None = "5GB",
) -> Plan:
    """What `reshard` would do with the same arguments, without reading a byte of a tensor.

    Raises what `reshard` would raise before its first byte."""
    grid = grid_of(tp, placement)
    request = Request(
        grid, rank, layout, config, recipe, tp_plan, vocab_size, dtype, max_shard_size,
        quant=_quant(quant), dense=quant == DENSE, adapter=adapter, apart=apart,
    )  # fmt: skip
    return plans.draft(open_joined(ckpt, recipe, config), request)


# What is returned follows from `rank` and `out`; the options are spelled out below.
@overload
def reshard(
    ckpt: Opened, tp: int = 1, *, rank: int, out: None = None, **options: Unpack[Resharding]
) -> State: ...
@overload
def reshard(
    ckpt: Opened, tp: int = 1, *, rank: None = None, out: None = None, **options: Unpack[Resharding]
) -> list[State]: ...
@overload
def reshard(
    ckpt: Opened, tp: int = 1, *, rank: int | None = None, out: Out, **options: Unpack[Resharding]
) -> Report: ...
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
    adapter: str | os.PathLike[str] | None = None,
    apart: bool = False,
    allow_nonfinite: bool = False,
    device: str | torch.device = "cpu",
    out: Out | None = None,
    max_shard_size: str | int | None = "5GB",
    durable: bool = True,
    overwrite: bool = False,
    memory: str | int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report | State | list[State]:
    """Carry a checkpoint to the serving ranks of a grid, each tensor cut and cast on the way.

    `ckpt`: a path, an opened checkpoint, or tensors by name; `tp=8` is short for
    `placement=Placement(tp=8)`; `rank` makes one rank's part only (files of tensors in memory: all ranks must
    have been given the same values). Without `out`: a dict of tensors a rank
    (one dict with `rank`); with a path: files and a Report; with the caller's tensors (a dict with `rank`,
    else a list of dicts by rank): they are filled in place, and a shape or dtype that differs is an error.
    `layout`, `config`, `recipe`, `tp_plan`, `vocab_size`, `dtype`, `max_shard_size`: see `Request`.
    `quant`: a scheme of `schemes.SCHEMES`, or a Quant with patterns: matrices are quantised on the way, from
    the values `dtype` gives; NaN and infinity in those are an error always. "none": what is quantised already
    is dequantised, to `dtype`, else to what the config names, else to bfloat16.
    `adapter`: the directory of a PEFT adapter (LoRA), merged on the way; with `apart` it is written alone,
    cut as the ranks' parts of this base are.
    NaN and infinity in files are an error unless `allow_nonfinite`; tensors in memory are given as they are.
    `durable` fsyncs; `overwrite` replaces an output in one step; `memory` bounds the bytes held ("256MB");
    `progress` see Progress.
    `device` "cuda" or "cuda:N", or torch's own for it: tensors there, made by the GPU where the checkpoint's
    tensors lie there too; they are filled in the order of the current stream.

    Raises RecipeError, LayoutError and ViewError before anything is written, SourceError before or when a
    value shows it (NaN, a file that changed), WriteError while writing; this run then leaves nothing behind.
    DeviceError for what this build cannot do."""
    place = _device(device)
    expect("allow_nonfinite", allow_nonfinite, bool)
    grid = grid_of(tp, placement)
    request = Request(
        grid, rank, layout, config, recipe, tp_plan, vocab_size, dtype, max_shard_size,
        quant=_quant(quant), dense=quant == DENSE, adapter=adapter, apart=apart,
    )  # fmt: skip
    expect("out", out, str, os.PathLike, Mapping, Sequence, type(None))
    run = Run(threads, memory, progress)
    in_memory = not isinstance(out, (str, os.PathLike))
    if place != "cpu" and not in_memory:
        raise DeviceError(f"device {place!r}: files lie on no GPU; leave device= out, for tensors there too")

    def drafted() -> Plan:
        opened = open_joined(ckpt, recipe, config)
        return plans.draft(opened if in_memory else stamped(opened), request, in_memory=in_memory)

    planned = proved(run, drafted)
    if out is None:
        states, _ = run.to_memory(planned, place)
        return states if rank is None else states[0]
    if isinstance(out, (str, os.PathLike)):
        return run.to_files(
            planned, os.fspath(out), rank, durable=durable, overwrite=overwrite, finite=not allow_nonfinite
        )
    return run.to_tensors(planned, _by_rank(out, rank), place)


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
    quant: str | Quant | None = None,
    device: str | torch.device = "cuda",
    out: State | Sequence[State] | None = None,
) -> Ready:
    """`reshard` from GPU memory to GPU memory made ready, to be run as often as the weights change.

    Arguments as there; `run()` of the result plans and uploads nothing, and with `quant` waits. Raises as
    `reshard` does, and DeviceError where the checkpoint's tensors do not lie on the device."""
    from .running import gpu_quantising, gpu_sources, tensors

    place = _device(device)
    grid = grid_of(tp, placement)
    request = Request(grid, rank, layout, config, recipe, tp_plan, vocab_size, dtype, quant=_quant(quant))
    planned = plans.draft(open_joined(ckpt, recipe, config), request, in_memory=True)
    binding = Binding.of(planned.extents)
    if place == "cpu" or not gpu_sources.resident(binding):
        raise DeviceError(f"prepare: wanted tensors on a GPU as source, device {place!r}; else use reshard")
    states: Sequence[Mapping[str, torch.Tensor]]
    if out is None:
        states, buffers = tensors.allocate(planned, place)
        tensors.tie(states, planned.aliases)
    else:
        states = _by_rank(out, rank)
        buffers = tensors.matched(planned, states, place)
    made = (gpu_quantising if planned.quantised else gpu_sources).prepare(planned, binding, buffers, place)
    return gpu_sources.Ready(tuple(states), made)


def consolidate(
    path: Opened,
    out: str | os.PathLike[str] | None = None,
    *,
    tag: str | None = None,
    also: Sequence[str | os.PathLike[str]] = (),
    rename: Sequence[tuple[str, str]] = (),
    weights: str = "master",
    exclude_frozen: bool = False,
    check_crc: bool = False,
    replicas: str = "equal",
    recipe: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
    safe_serialization: bool = False,
    max_shard_size: str | int | None = "5GB",
    dtype: str | DType | None = "float32",
    weights_key: str | None = None,
    client_state: Sequence[str] = (),
    adapter: str | os.PathLike[str] | None = None,
    allow_nonfinite: bool = True,
    durable: bool = True,
    overwrite: bool = False,
    memory: str | int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report | State:
    """The whole model in one directory, as DeepSpeed's zero_to_fp32 writes it: names, order, file names.

    `path`: a path, with the options up to `config` as in `open`, or an opened checkpoint; `dtype` of the
    floats (None: as stored), integer buffers are kept; `.bin` files unless `safe_serialization`. Without
    `out` the state dict is returned. `weights_key` wraps the weights into a single-file training checkpoint,
    with the plain values named in `client_state` beside them; `adapter` as in `reshard`, merged. NaN and
    infinity are written as they are, as DeepSpeed's converter does, unless `allow_nonfinite` is False.
    Raises as `reshard` does."""
    expect("out", out, str, os.PathLike, type(None))
    expect("allow_nonfinite", allow_nonfinite, bool)
    if out is None and weights_key is not None:
        raise LayoutError("weights_key goes with out=: it is a key in the file of a training checkpoint")
    if isinstance(path, Checkpoint):
        if tag or also or rename or weights != "master" or exclude_frozen or check_crc or replicas != "equal":
            raise LayoutError("consolidate: options of open go with a path, this checkpoint is open already")
    else:
        path = sources.open(
            path, tag=tag, also=also, rename=rename, weights=weights,
            exclude_frozen=exclude_frozen, check_crc=check_crc, replicas=replicas,
        )  # fmt: skip
    opened = open_joined(path, recipe, config)
    run = Run(threads, memory, progress)
    planned = proved(
        run,
        lambda: consolidation(
            opened,
            safe_serialization=safe_serialization,
            max_shard_size=max_shard_size,
            dtype=dtype,
            weights_key=weights_key,
            client_state=client_state,
            adapter=adapter,
            in_memory=out is None,
        ),
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
    adapter: str | os.PathLike[str] | None = None,
    in_memory: bool = False,
) -> Plan:
    """The plan of `consolidate` for an opened checkpoint."""
    expect("safe_serialization", safe_serialization, bool)
    expect("client_state", client_state, Sequence)
    if client_state and weights_key is None:
        raise LayoutError("client_state goes with weights_key: it stands beside the weights in one file")
    request = Request(
        Placement(),
        layout=Same("safetensors" if safe_serialization else "bin"),
        dtype=dtype,
        max_shard_size=None if weights_key else max_shard_size,
        sorted=True,
        weights_key=weights_key,
        client_state=_client_state(ckpt, client_state) if client_state else None,
        adapter=adapter,
    )
    return plans.draft(ckpt, request, in_memory=in_memory)


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
    adapter: str | os.PathLike[str] | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> torch.nn.Module:
    """Fill a module's parameters and buffers from a checkpoint, cast to the module's dtypes; returns it.

    The same road as `reshard` with the module as `out`: no second copy of the model. Parameters on the
    meta device are made where the others are, else on the CPU. `adapter`: the directory of a PEFT adapter,
    merged on the way and rounded once, to the module's dtypes. What is one tensor in the checkpoint and two
    in the module fills both. `strict`: every persistent tensor of the module must be filled, every tensor of
    the shard used, and no buffer that checkpoints do not hold be on the meta device, else LayoutError names
    them. Raises as `reshard` does; the module may then be half filled."""
    from .running import tensors

    expect("strict", strict, bool)
    grid = grid_of(tp, placement)
    if rank is None and grid.world > 1:
        raise LayoutError(f"load_into: a module is one rank's; say which of the {grid.world} ranks (rank=)")
    state = tensors.tensors_of(module)
    tensors.refuse_copies(module, state)
    if strict:
        tensors.require_made(module, state)
    request = Request(
        grid, rank or 0, layout, config, recipe, tp_plan, vocab_size, only=tensors.dtypes_of(state),
        adapter=adapter,
    )  # fmt: skip
    run = Run(threads, memory, progress)
    planned = proved(run, lambda: plans.draft(open_joined(ckpt, recipe, config), request, in_memory=True))
    made = {t.name for t in planned.tensors}
    tensors.require_apart(state, made, planned.aliases)
    again = tensors.untied(state, made, planned.aliases)
    tied = tensors.tied(state, made | again.keys())
    if strict:
        filled_or_tied = made | again.keys() | tied.keys()
        _require_same([n for n in state if n not in filled_or_tied], planned.left_out)
    device = tensors.device_of(state)
    real = tensors.made_real({n: state[n] for n in (*made, *again)}, device)
    filled = {n: real[n] for n in made}
    run.to_tensors(planned, [filled], device if device == "cpu" else _device(device))
    for name, holder in again.items():
        real[name].copy_(real[holder])
    tensors.assign(module, real, tied)
    return module


def _require_same(missing: Sequence[str], left_out: Sequence[str]) -> None:
    """Raises LayoutError where a module has names that the checkpoint lacks, or the other way round."""
    if missing or left_out:
        way = f"; {why}" if (why := strangers.wrapped(left_out)) else ""
        raise LayoutError(
            f"load_into: {len(missing)} tensors of the module are not in the checkpoint"
            f" ({', '.join(missing[:3]) or 'none'}), {len(left_out)} of the checkpoint are not in"
            f" the module ({', '.join(left_out[:3]) or 'none'}); strict=False loads what both have{way}"
        )


def stream(ckpt: Opened, names: Sequence[str]) -> Iterator[tuple[str, int, memoryview]]:
    """The dense bytes of tensors as stored, in order: (name, offset in bytes, at most a MiB of them).

    The memory is valid until the next step. What `diff` reads with, in bounded memory."""
    opened = ckpt if isinstance(ckpt, Checkpoint) else opening.open(ckpt)
    compare(opened)
    yield from leaves(((n, opened.entries[n].build()) for n in names), opened.extents)


def proved(run: Run, draft: Callable[[], Plan]) -> Plan:
    """The plan, on the run's clock, of a checkpoint whose replicas were compared. Raises SourceError."""
    planned = run.planned(draft)
    nbytes, notes = compare(planned.checkpoint)
    run.bytes_read += nbytes
    return replace(planned, notes=(*planned.notes, *notes))


def _quant(asked: str | Quant | None) -> Quant | None:
    return None if asked is None or asked == DENSE else Quant.of(asked)


def _client_state(ckpt: Checkpoint, names: Sequence[str]) -> dict[str, JSON]:
    """The plain values of the training checkpoint that are to be kept. Raises SourceError for others."""
    known = ckpt.saved.client_state or {}
    missing = [n for n in names if n not in known]
    if missing:
        raise SourceError(
            f"{ckpt.path}: no plain value {missing[0]!r} in the client state; "
            f"it has {', '.join(known) or 'none'}"
        )
    return {n: known[n] for n in names}


def _device(device: str | torch.device) -> str:
    """The device by its full name. Raises DeviceError where this build or machine cannot use it."""
    name = str(device)
    if name == "cpu":
        return name
    from .executors.cuda import usable

    return str(usable(name))


def _by_rank(out: State | Sequence[State], rank: int | None) -> list[State]:
    if isinstance(out, Mapping) == (rank is None):
        raise LayoutError("out: one dict of tensors goes with rank=, a list of dicts with all ranks")
    for state in [out] if isinstance(out, Mapping) else out:
        expect("out: a rank's tensors", state, Mapping)
    return [out] if isinstance(out, Mapping) else list(out)
