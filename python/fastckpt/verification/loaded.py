"""verify_tensors: whether tensors in memory, on a GPU or not, hold what a checkpoint says.

Law: bytes are compared by their digests; those on a GPU are digested there and only digests come back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..checkpoint import JSON, Checkpoint
from ..digest import digest
from ..errors import LayoutError, expect
from ..layouts import Layout
from ..opening import open_joined
from ..output.manifest import NAME, Manifest, Shard
from ..paths import is_file
from ..placement import Placement, grid_of
from ..planning import plans
from ..planning.request import Request
from ..road import proved
from ..running import tensors
from ..running.runs import Progress, Run
from ..sources.memory import has_memory
from .outputs import VerifyReport

if TYPE_CHECKING:
    import torch

    from ..road import Opened

    State = dict[str, torch.Tensor]


def verify_tensors(
    held: torch.nn.Module | Mapping[str, torch.Tensor],
    ckpt: Opened,
    tp: int = 1,
    rank: int | None = None,
    layout: str | Layout | None = None,
    *,
    placement: Placement | None = None,
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
    recipe: str | None = None,
    tp_plan: Mapping[str, str] | None = None,
    vocab_size: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Whether one rank's tensors, by name or a module's, are those of a checkpoint, byte for byte.

    Without `layout`, for what `reshard` wrote: its record says the digests of `rank`, and no weight is read.
    With it, and for any other checkpoint (then "same" is meant): the CPU makes what `load_into` with the same
    arguments would fill, cast to the tensors' own dtypes, and digests it. Problems name the tensor: missing,
    too much, another shape or dtype, other bytes. Raises as `load_into` does."""
    began = time.perf_counter()
    import torch

    expect("ckpt", ckpt, str, os.PathLike, Checkpoint, Mapping)
    state = dict(held) if isinstance(held, Mapping) else tensors.tensors_of(held)
    for name, tensor in state.items():
        expect(f"held: {name}", tensor, torch.Tensor)
        if not (tensor.is_meta or has_memory(tensor)):
            raise LayoutError(f"{name} is a {type(tensor).__name__}: its values do not lie in plain memory")
    grid = grid_of(tp, placement)
    record = None if layout is not None or isinstance(ckpt, (Checkpoint, Mapping)) else _record(ckpt)
    if record is not None:
        shard = _shard(record, rank)
        expected = {n: (t.dtype.name, t.shape, t.digest) for n, t in shard.tensors.items()}
        aliases = shard.aliases
    else:
        if rank is None and grid.world > 1:
            raise LayoutError(f"verify_tensors: say which of the {grid.world} ranks these are (rank=)")
        request = Request(
            grid, rank or 0, layout or "same", config, recipe, tp_plan, vocab_size,
            only=tensors.dtypes_of(state),
        )  # fmt: skip
        run = Run(threads, None, progress)
        planned = proved(run, lambda: plans.draft(open_joined(ckpt, recipe, config), request, in_memory=True))
        found = run.to_digests(planned)
        expected = {t.name: (t.dtype.name, t.shape, found[t.name]) for t in planned.tensors}
        expected |= {name: ("", (), "") for name in planned.left_out}
        aliases = planned.aliases
    problems = _compared(state, expected, aliases)
    size = sum(t.nbytes for t in state.values())
    return VerifyReport(not problems, 0, len(state), size, tuple(problems), (), time.perf_counter() - began)


Expected = dict[str, tuple[str, tuple[int, ...], str]]
"""Name -> dtype, shape and digest of what a tensor should be; ("", (), "") where it should only be there."""


def _compared(state: State, expected: Expected, aliases: Mapping[str, str]) -> list[str]:
    """What is wrong with the tensors, in words."""
    problems = [f"{n}: the checkpoint has it, these tensors do not" for n in expected if n not in state]
    tied = tensors.tied(state, set(expected)) | {a: n for a, n in aliases.items() if a in state}
    odd = [n for n in state if n not in expected and n not in tied]
    problems += [f"{n}: the checkpoint has no such tensor" for n in odd]
    fit = {}
    for name, t in state.items():
        dtype, shape, _ = expected.get(tied.get(name, name), ("", (), ""))
        got = str(t.dtype).removeprefix("torch."), tuple(t.shape)
        if t.is_meta:
            problems.append(f"{name}: it is on the meta device and holds nothing")
        elif dtype and got != (dtype, shape):
            problems.append(f"{name}: got {got[0]}{list(got[1])}, the checkpoint has {dtype}{list(shape)}")
        elif dtype:
            fit[name] = t
    for name, found in digests_of(fit).items():
        if found != expected[tied.get(name, name)][2]:
            problems.append(f"{name}: its bytes differ from the checkpoint's")
    return problems


def digests_of(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The digest of each tensor, taken where it lies; one that is not dense is made so first."""
    import torch

    on: dict[torch.device, State] = {}
    for name, t in state.items():
        on.setdefault(t.device, {})[name] = t.detach().resolve_conj().resolve_neg().contiguous()
    found: dict[str, str] = {}
    for device, mine in on.items():
        if device.type == "cuda":
            from ..running.gpu_sinks import digests

            found |= digests(mine)
        else:
            # A tensor of one element may have any stride.
            flat = {n: t.as_strided((t.numel(),), (1,)) for n, t in mine.items()}
            found |= {n: digest(t.view(torch.uint8).numpy()) for n, t in flat.items()}
    return found


def _record(path: str | os.PathLike[str]) -> Manifest | None:
    """The record of what `reshard` wrote there; None where it wrote nothing."""
    at = os.path.join(path, NAME)
    return Manifest.read(at) if is_file(at) else None


def _shard(record: Manifest, rank: int | None) -> Shard:
    """What a record says of a rank; of its only one where none is asked for. Raises LayoutError."""
    if rank is None and record.world > 1:
        raise LayoutError(f"verify_tensors: say which of the {record.world} ranks these are (rank=)")
    for shard in record.shards:
        if shard.rank == (rank or 0):
            return shard
    have = ", ".join(str(s.rank) for s in record.shards)
    raise LayoutError(f"verify_tensors: the record has no rank {rank}; it has {have or 'none'}")
