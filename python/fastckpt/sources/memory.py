"""A dict of torch tensors or numpy arrays as a checkpoint: nothing is copied, views lie over the memory.

Law: a tensor's bytes are where its storage says, on its device; what has no plain strided storage (meta,
sparse, quantised, DTensor) is refused. Tensors over the same elements are one, under its first name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..checkpoint import Checkpoint, Entry, Single
from ..dtypes import BY_NAME, DTYPES, DType
from ..errors import SourceError, expect
from ..extents import Buffer, Extent, Extents
from ..stored import runs
from ..views import View, zeros
from .assembly import Strided, assemble
from .options import Options

if TYPE_CHECKING:
    import torch

NAME = "memory"

SAMPLES, SAMPLE = 4096, 64
"""The most tensors that `stamped` looks into, and how many elements of each, twice."""

_PLAIN = Options()


@dataclass(frozen=True, slots=True, eq=False)
class _Storage(Buffer):
    """The storage of a tensor, its owner, as it was opened: `.data =`, resize_ and FSDP give it another."""

    def check(self) -> None:
        """Raise SourceError where it has another."""
        tensor: torch.Tensor = self.owner  # type: ignore[assignment]
        now = tensor.untyped_storage()
        if (now.data_ptr(), now.nbytes()) != (self.address, self.nbytes):
            raise SourceError(
                f"memory: a tensor, now {tensor.dtype} {tuple(tensor.shape)}, has other memory than when it "
                "was opened (freed, resized, replaced); open the checkpoint again"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """One array: its buffer, and its place in it in elements."""

    buffer: Buffer
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for arrays over the same elements."""
        first = self.buffer.address + self.offset * self.dtype.itemsize
        return self.buffer.device, first, self.dtype.name, self.shape, self.stride


class _Buffers:
    """The buffers that arrays lie in, as extents; one for the same memory, by its first key."""

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self._known: dict[tuple[str, int, int], int] = {}

    def number(self, buffer: Buffer, key: str) -> int:
        """The number of its extent."""
        at = self._known.setdefault((buffer.device, buffer.address, buffer.nbytes), len(self.extents))
        if at == len(self.extents):
            self.extents.append(Extent(buffer, 0, buffer.nbytes, key))
        return at


def read(tensors: Mapping[str, object], options: Options = _PLAIN) -> Checkpoint:
    """The checkpoint of a state dict in memory. Raises SourceError naming the tensor that does not fit."""
    options.refuse_zero_only(NAME)
    options.refuse_also(NAME)
    options.refuse_crc(NAME)
    for name in tensors:
        expect("a tensor's name", name, str)
    held = {name: _hold(name, value) for name, value in tensors.items()}
    buffers = _Buffers()
    at = {name: buffers.number(h.buffer, name) for name, h in held.items()}
    first: dict[object, str] = {}
    aliases: dict[str, str] = {}
    for name, h in held.items():
        holder = first.setdefault(h.place, name) if 0 not in h.shape else name
        if holder != name:
            aliases[name] = holder
    table = Extents(buffers.extents)
    entries: dict[str, Entry] = {
        name: Strided(h.shape, h.dtype, table, at[name], h.offset, h.stride)
        for name, h in held.items()
        if name not in aliases
    }
    devices = sorted({h.buffer.device for h in held.values()})
    return assemble(
        NAME, NAME, entries, table, options, aliases=aliases,
        facts={"devices": ", ".join(devices)},
        layout=[repr([(at[n], h.offset, h.stride) for n, h in held.items()]).encode()],
    )  # fmt: skip


def partitioned(parts: Sequence[Mapping[str, object]], shapes: Mapping[str, Sequence[int]]) -> Checkpoint:
    """The checkpoint of parameters that lie in flat slices, as ZeRO-3 ranks hold them.

    `parts[r][name]`: rank r's 1-D slice of the parameter, a tensor or an array; one after the other they
    begin with it, and what follows (the padding) is not read. `shapes` has every name that they have. Raises
    SourceError naming what does not fit."""
    expect("parts", parts, Sequence)
    expect("shapes", shapes, Mapping)
    for name, shape in shapes.items():
        expect("a tensor's name", name, str)
        expect(f"{name}: its shape", shape, Sequence)
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise SourceError(f"{name}: {tuple(shape)} is no shape")
    buffers = _Buffers()
    slices: dict[str, list[tuple[int, _Held]]] = {name: [] for name in shapes}
    for rank, part in enumerate(parts):
        if more := [name for name in part if name not in shapes]:
            raise SourceError(f"{more[0]}: partition {rank} of {len(parts)} has it, and no shape is given")
        for name in shapes:
            if name not in part:
                raise SourceError(f"{name}: partition {rank} of {len(parts)} does not have it")
            h = _hold(name, part[name])
            if len(h.shape) != 1 or (h.shape[0] > 1 and h.stride != (1,)):
                raise SourceError(
                    f"{name}: partition {rank} is {h.shape} with strides {h.stride}, wanted flat"
                )
            slices[name].append((buffers.number(h.buffer, f"{rank}/{name}"), h))
    table = Extents(buffers.extents)
    entries: dict[str, Entry] = {}
    for name, given in shapes.items():
        shape, held = tuple(given), slices[name]
        dtypes = sorted({h.dtype.name for _, h in held})
        if len(dtypes) != 1:
            raise SourceError(f"{name}: partitions of {', '.join(dtypes) or 'no dtype'}, wanted one")
        total = sum(h.shape[0] for _, h in held)
        if total < math.prod(shape):
            raise SourceError(
                f"{name}: {shape} needs {math.prod(shape)} elements, its partitions have {total}"
            )
        columns = np.array([(at, h.offset, h.shape[0]) for at, h in held], np.int64).reshape(-1, 3)
        columns = columns[columns[:, 2] > 0]
        dtype = held[0][1].dtype
        entries[name] = Single(shape, dtype, partial(_joined, table, dtype, columns, shape), "parameter")
    layout = [repr([(n, [(at, h.offset, h.shape) for at, h in held]) for n, held in slices.items()]).encode()]
    return assemble(NAME, NAME, entries, table, _PLAIN, facts={"partitions": len(parts)}, layout=layout)


def stamped(ckpt: Checkpoint) -> Checkpoint:
    """A checkpoint in memory with a few elements of its tensors for headers, any other as it is.

    Files tell by their headers which step they are of; the ranks of a set that are made one by one must come
    from one. What a tensor does not use of its storage is not looked at: it may differ from rank to rank."""
    if ckpt.format != NAME:
        return ckpt
    seen, names = xxhash.xxh3_64(), list(ckpt.entries)
    for name in names[:: -(-len(names) // SAMPLES) or 1]:
        for where, at, nbytes in _sample(ckpt[name]):
            there = where.part(at, nbytes) if where.device == "cpu" else _on_device(where, at, nbytes)
            seen.update(there.tobytes())
    return replace(ckpt, headers=seen.hexdigest())


def _sample(view: View) -> Iterator[tuple[Buffer, int, int]]:
    """Where the elements looked at lie, of the first line and of a middle one: buffer, offset, bytes."""
    line = view if view.shape else view.reshape((1,))
    for middle in (False, True) if view.numel else ():
        part, last = line, len(line.shape) - 1
        for axis, size in enumerate(line.shape):
            at = size // 2 if middle else 0
            part = part.narrow(axis, at, 1 if axis < last else min(SAMPLE, size - at))
        columns = part.extent, part.stored, part.offset, part.size[:, -1], part.stride[:, -1]
        for extent, stored, offset, count, stride in zip(*(c.tolist() for c in columns), strict=True):
            where, itemsize = view.extents[extent].where, DTYPES[stored].itemsize
            if isinstance(where, Buffer):  # the first alone of those that lie apart
                yield where, offset * itemsize, (count if stride == 1 else 1) * itemsize


def _on_device(where: Buffer, at: int, nbytes: int) -> NDArray[np.uint8]:
    """Some bytes of the storage of a tensor on a GPU."""
    import torch

    assert isinstance(where.owner, torch.Tensor)  # nothing else lies there
    storage = where.owner.untyped_storage()
    held = torch.empty(0, dtype=torch.uint8, device=where.owner.device).set_(storage)
    found: NDArray[np.uint8] = held[at : at + nbytes].cpu().numpy()
    return found


def _joined(table: Extents, dtype: DType, columns: NDArray[np.int64], shape: tuple[int, ...]) -> View:
    if 0 in shape:
        return zeros(shape, dtype)
    flat = runs(table, dtype, columns[:, 0], columns[:, 1], columns[:, 2])
    return flat.narrow(0, 0, math.prod(shape)).reshape(shape)


def _hold(name: str, value: object) -> _Held:
    if isinstance(value, np.ndarray) and not hasattr(value, "mask"):  # whose values are not all its memory's
        return _array(name, value)
    # Who has not imported torch holds no tensor.
    if "torch" in sys.modules:
        import torch

        if isinstance(value, torch.Tensor):
            return _tensor(name, value)
    raise SourceError(f"{name}: wanted a torch tensor or a numpy array, got {type(value).__name__}")


def _array(name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> _Held:
    dtype = BY_NAME.get(value.dtype.name)
    if dtype is None or not value.dtype.isnative or sys.byteorder != "little":
        raise SourceError(
            f"{name}: numpy dtype {value.dtype.str} is none of {', '.join(BY_NAME)}, little-endian"
        )
    if any(s < 0 or s % dtype.itemsize for s in value.strides):
        raise SourceError(
            f"{name}: strides of {value.strides} bytes are negative or cut elements; copy it first"
        )
    stride = tuple(s // dtype.itemsize for s in value.strides)
    span = 0 if 0 in value.shape else 1 + sum((n - 1) * s for n, s in zip(value.shape, stride, strict=True))
    return _Held(Buffer(value, value.ctypes.data, span * dtype.itemsize), dtype, value.shape, 0, stride)


def lies_as_is(value: torch.Tensor) -> bool:
    """Whether a tensor's values are what its memory holds: none is conjugated or negated when it is read."""
    return has_memory(value) and not (value.is_conj() or value.is_neg())


def has_memory(value: torch.Tensor) -> bool:
    """Whether a tensor lies strided in a storage: no meta, sparse, quantised, nested, lazy or wrapped tensor
    (DTensor), none whose storage was freed."""
    import torch

    wrapped = type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if wrapped or torch.nn.parameter.is_lazy(value) or value.layout is not torch.strided:
        return False
    if value.is_meta or value.is_quantized or value.is_nested:
        return False
    try:
        storage = value.untyped_storage()
        storage.data_ptr()
    except RuntimeError:  # of vmap and grad, functional ones, zeros that lie nowhere
        return False
    end = value.storage_offset() + value.numel()
    if not value.is_contiguous():
        end = (
            value.storage_offset()
            + 1
            + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        )
    return value.numel() == 0 or end * value.itemsize <= storage.nbytes()


def _tensor(name: str, value: torch.Tensor) -> _Held:
    dtype = BY_NAME.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or not lies_as_is(value):
        raise SourceError(
            f"{name}: {type(value).__name__} of {value.dtype}, {value.layout} on {value.device} has no plain "
            "strided memory (or no more); make it dense and local first"
        )
    storage = value.untyped_storage()
    buffer = _Storage(value, storage.data_ptr(), storage.nbytes(), str(value.device))
    return _Held(buffer, dtype, tuple(value.shape), int(value.storage_offset()), tuple(value.stride()))
