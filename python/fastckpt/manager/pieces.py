"""Tensors as they are saved: what this rank holds of each, in host memory, and which rank writes it.

Law: a tensor that all ranks hold with equal bytes is written once, and so is each box of a tensor that is
cut over a mesh; what differs from rank to rank is each rank's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoint import JSON
from ..dtypes import BY_NAME, DType
from ..errors import ManagerError, SourceError
from ..sources.memory import has_memory
from ..sources.training import Shared
from ..stored import check_tiles

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types that are no DTensor for sure; importing DTensor takes half a second."""


@dataclass(frozen=True, slots=True)
class Box:
    """Where a local part lies in a tensor of `whole` shape: `offset` of its first element on each axis."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What this rank holds of one tensor: dense bytes in host memory; `box` where it is cut over a mesh."""

    name: str
    dtype: DType
    data: torch.Tensor
    box: Box | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is held here."""
        return tuple(self.data.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of what is held here."""
        return self.data.numel() * self.dtype.itemsize


@dataclass(slots=True)
class Taken:
    """A snapshot: the pieces by name, names that are the same memory as another's, and the host buffers that
    it holds, by name."""

    pieces: dict[str, Piece] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


class Snapshots:
    """Takes tensors to host memory. A snapshot has its host buffers to itself until `give_back`: the next one
    uses them again only then, however the two saves overlap."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: Mapping[str, torch.Tensor], *, copy: bool) -> Taken:
        """A snapshot of `tensors`; without `copy`, dense CPU tensors are taken as they are, not copied.

        Raises ManagerError for a tensor without plain memory of its own."""
        taken, moved = Taken(), set[torch.device]()
        first: dict[object, str] = {}
        alive = []  # an address says that two tensors are one only while both are held
        for name, tensor in tensors.items():
            local, box = _local(name, tensor)
            if local is None:
                continue
            alive.append(local)
            place = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride(), box)
            holder = first.setdefault(place, name) if local.numel() else name
            if holder != name:
                taken.aliases[name] = holder
                continue
            host = local
            if copy or local.device.type != "cpu":
                host = taken.buffers[name] = self._buffer(name, local)
                with torch.inference_mode():  # in which the buffer may have been made, by an earlier save
                    host.copy_(local, non_blocking=True)
                if local.device.type != "cpu":
                    moved.add(local.device)
            dtype = BY_NAME.get(str(local.dtype).removeprefix("torch."))
            if dtype is None:
                raise ManagerError(f"state: {name} is {local.dtype}, which fastckpt does not know")
            taken.pieces[name] = Piece(name, dtype, host.contiguous(), box)
        for device in moved:  # the current one need not be where they lie
            torch.accelerator.synchronize(device)
        return taken

    def give_back(self, taken: Taken) -> None:
        """The snapshot is no longer needed."""
        self._buffers, taken.buffers = taken.buffers, {}

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        kept = self._buffers.pop(name, None)
        if kept is None or kept.shape != like.shape or kept.dtype != like.dtype:
            pin = like.device.type == "cuda"
            kept = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pin)
        return kept


def raw(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a dense CPU tensor, where they lie. (One of a single element may have any stride.)"""
    flat: NDArray[np.uint8] = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return flat


def box_of(name: str, tensor: torch.Tensor) -> Box | None:
    """This rank's box of a tensor cut over a mesh; None for any other tensor.

    Raises ManagerError for a cut that is no box (partial sums, strided shards)."""
    if type(tensor) in PLAIN:
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return None
    for placement in tensor.placements:
        if type(placement) not in (Shard, Replicate):
            raise ManagerError(f"{name}: placement {placement} is no plain shard; redistribute it first")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(tensor.shape), tuple(offset))


def _local(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor | None, Box | None]:
    """The plain tensor this rank holds, and its box; None where it holds nothing of it."""
    box = box_of(name, tensor)
    if box is not None:
        from torch.distributed.tensor import DTensor

        if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
            return None, None
        tensor = tensor.to_local()
        if tensor.numel() == 0 and 0 not in box.whole:  # a whole without elements is somebody's to write
            return None, None
    if hasattr(tensor, "ds_id"):
        raise ManagerError(f"state: {name} is partitioned by DeepSpeed; give the engine, not its module")
    if not has_memory(tensor):
        raise ManagerError(
            f"state: {name}: a {type(tensor).__name__} of {tensor.layout} on {tensor.device} has no plain "
            "memory (or no more)"
        )
    return tensor.detach().resolve_conj().resolve_neg(), box


# ---- which rank writes what ----


@dataclass(frozen=True, slots=True)
class Claim:
    """What one rank says it holds under a name; `offset` and `whole` only of a box."""

    dtype: str
    shape: tuple[int, ...]
    digest: str
    whole: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None

    def json(self) -> JSON:
        """For the other ranks."""
        boxed: list[JSON] = (
            [list(self.whole), list(self.offset)]
            if self.whole is not None and self.offset is not None
            else []
        )
        return [self.dtype, list(self.shape), self.digest, *boxed]

    @staticmethod
    def of(said: JSON) -> Claim:
        """What another rank said."""
        match said:
            case [str(dtype), list(shape), str(digest)]:
                return Claim(dtype, sizes(shape), digest)
            case [str(dtype), list(shape), str(digest), list(whole), list(offset)]:
                return Claim(dtype, sizes(shape), digest, sizes(whole), sizes(offset))
            case _:
                raise ManagerError(f"a rank claims {said!r}, which is no tensor")

    def __str__(self) -> str:
        cut = "" if self.whole is None else f", a part of {self.whole}"
        return f"{self.dtype} {self.shape}{cut}"

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * BY_NAME[self.dtype].itemsize


def shared(claims: Sequence[Mapping[str, Claim]], disk: Sequence[int]) -> dict[str, Shared]:
    """The tensors that are written once on the disk that the ranks `disk` share; the same on each of them.

    `claims` by rank. Owners are chosen so that every rank writes about as much. Raises ManagerError where
    ranks that should hold the same box hold other bytes."""
    out = {}
    by_name: dict[str, dict[int, Claim]] = {}
    for rank, said in enumerate(claims):
        for name, claim in said.items():
            by_name.setdefault(name, {})[rank] = claim
    names = sorted(by_name)
    every = {n for n in names if len(by_name[n]) == len(claims) and _alike(by_name[n].values())}
    load = {
        rank: sum(c.nbytes for n, c in claims[rank].items() if c.whole is None and n not in every)
        for rank in disk
    }
    for name in sorted(every, key=lambda n: (-claims[0][n].nbytes, n)):  # one order in every process
        claim = claims[0][name]
        owner = min(disk, key=lambda r: (load[r], r))
        load[owner] += claim.nbytes
        whole = (owner, (0,) * len(claim.shape), claim.shape)
        out[name] = Shared(BY_NAME[claim.dtype], claim.shape, (whole,), True)
    for name in names:
        held = by_name[name]
        if any(claim.whole is not None for claim in held.values()):
            out[name] = _cut(name, held, load)
    return out


def _cut(name: str, held: Mapping[int, Claim], load: dict[int, int]) -> Shared:
    """A tensor that is cut over the ranks that `held` parts of it; what is written is added to the `load` of
    the disk's ranks. Raises ManagerError where the parts do not make one tensor."""
    where, first = next((rank, claim) for rank, claim in held.items() if claim.whole is not None)
    boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for rank, claim in held.items():
        if (claim.dtype, claim.whole) != (first.dtype, first.whole) or claim.offset is None:
            raise ManagerError(
                f"state: {name} is {claim} on rank {rank}, {first} on rank {where}; wanted parts of one "
                "tensor, or a name of its own for each"
            )
        box = boxes.setdefault((claim.offset, claim.shape), [])
        if box and held[box[0]].digest != claim.digest:
            raise ManagerError(
                f"state: {name} is replicated, but ranks {box[0]} and {rank} hold different bytes at "
                f"{claim.offset}: the ranks have drifted apart"
            )
        box.append(rank)
    placed = []
    for (offset, shape), ranks in sorted(boxes.items()):
        near = [r for r in ranks if r in load]
        owner = min(near, key=lambda r: (load[r], r)) if near else ranks[0]
        if near:
            load[owner] += held[owner].nbytes
        placed.append((owner, offset, shape))
    whole = first.whole or ()
    try:
        check_tiles(whole, [(offset, size) for _, offset, size in placed if 0 not in size])
    except SourceError as e:
        raise ManagerError(f"state: {name} is cut over the ranks, but {e}") from None
    return Shared(BY_NAME[first.dtype], whole, tuple(placed), False)


def _alike(claims: Collection[Claim]) -> bool:
    """Whether ranks hold a tensor that is not cut, with the same bytes."""
    first = next(iter(claims))
    return first.whole is None and all(c == first for c in claims)


def sizes(values: Sequence[JSON]) -> tuple[int, ...]:
    """A shape or offset that was JSON. Raises ManagerError for anything else."""
    out = tuple(v for v in values if isinstance(v, int) and v >= 0)
    if len(out) != len(values):
        raise ManagerError(f"{list(values)[:8]} is no shape")
    return out
