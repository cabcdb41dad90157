"""What torch puts into a pickle: storages by persistent id, tensors by their rebuild functions.

Law: a Tensor lies inside its storage and its bytes mean what its dtype says. A tensor whose bytes mean
something else (conjugate or negative views, quantised, sparse, a subclass with its own rules) stays inert.

Source of the formats: torch/_utils.py, torch/_tensor.py and torch/serialization.py of torch 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ... import dtypes
from ...dtypes import DType
from ...errors import SourceError
from . import inertpickle
from .inert import Inert
from .picklemachine import DICT_ITEM, DICT_NAME, INERT, PLAIN, Call, Machine

MAX_NDIM = 64
"""The most axes of a tensor."""

MAX_BYTES = 1 << 62
"""The largest storage."""

STORAGE, TENSOR = 112, 96
"""Bytes of a record and the numbers in it."""


@dataclass(slots=True, eq=False)
class Storage:
    """One storage of a torch file.

    `key`: its name in the file ("" for all empty ones of a zip, which lie nowhere). `dtype`: of a typed
    storage, None of an untyped one. `nbytes`: its size. `extent`: its index in `TorchFile.extents`, -1
    when it is empty or was not wanted; set once, while the file is loaded. `blank`: a tensor of it without
    elements, shared by all that are equal."""

    key: str
    dtype: DType | None
    nbytes: int
    extent: int = -1
    blank: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A dense tensor: elements of `dtype` at `offset + sum(index * stride)` of `storage`, in elements.

    `attributes`: what Python code has set on it, None for nothing."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False
    attributes: Mapping[object, object] | None = field(default=None, compare=False, repr=False)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def flat(self) -> bool:
        """Whether it is one dense axis."""
        return len(self.shape) == 1 and (self.numel <= 1 or self.stride == (1,))


Wanted = Callable[[object], Iterable[Tensor]]


@dataclass(frozen=True, slots=True)
class Slice:
    """Where a legacy storage view lies: `nbytes` at `offset` of the storage `key` that the file holds."""

    key: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tree:
    """A torch pickle read: its `root`, the offset `end` after it, the `storages` that get an extent, in
    extent order, the names of `inert` globals, the bytes of every storage the file must hold (`held`),
    and the storages that are a slice of another (`slices`)."""

    root: object
    end: int
    storages: tuple[Storage, ...]
    inert: tuple[str, ...]
    held: dict[str, int]
    slices: dict[str, Slice]


def parse(
    data: bytes,
    start: int = 0,
    *,
    legacy: bool = False,
    wanted: Wanted | None = None,
    file: int | None = None,
    record_keys: bool = False,
) -> Tree:
    """The torch pickle at `data[start]`; storages of the tensors `wanted` picks out of the root (all
    storages without it) get extent numbers. `legacy` allows the persistent ids of non-zip files. `file` and
    `record_keys`: see `inertpickle.parse`.

    Raises inertpickle.Short where the bytes end early, SourceError for whatever else is wrong."""
    storages = _Storages(legacy)
    parsed = inertpickle.parse(
        data, start, values=_DTYPES, calls=_CALLS, persistent=storages.find, file=file,
        record_keys=record_keys,
    )  # fmt: skip
    if wanted is None:
        chosen: Iterable[Storage] = storages.all()
    else:
        chosen = (t.storage for t in wanted(parsed.root))
    ordered: list[Storage] = []
    for s in chosen:
        if s.extent < 0 and s.nbytes:
            s.extent = len(ordered)
            ordered.append(s)
    inert = tuple(sorted(parsed.globals - _EXPECTED))
    return Tree(parsed.root, parsed.end, tuple(ordered), inert, storages.held, storages.slices)


class _Storages:
    """The storages a pickle names: one record a key and dtype, whose sizes must not contradict."""

    __slots__ = ("_known", "_others", "held", "legacy", "slices")

    def __init__(self, legacy: bool) -> None:
        self.legacy = legacy
        self._known: dict[str, Storage] = {}  # the first record of each key
        self._others: dict[tuple[str, DType | None], Storage] = {}  # seen as another dtype; empty ones
        self.held: dict[str, int] = {}  # of legacy files, whose storages are found by their sizes
        self.slices: dict[str, Slice] = {}

    def all(self) -> Iterable[Storage]:
        """Every record."""
        return (*self._known.values(), *self._others.values())

    def find(self, pid: object, m: Machine) -> object:
        """The record of a persistent id: ("storage", type, key, location, numel), legacy files add the
        view (key, offset, numel) or None."""
        if not isinstance(pid, tuple) or not pid:
            raise SourceError(f"a persistent id is a {type(pid).__name__}; wanted a tuple")
        if self.legacy and pid[0] == "module" and len(pid) == 4:
            return pid[1]  # ("module", class, file, source text)
        parts = 6 if self.legacy else 5
        if pid[0] != "storage" or len(pid) != parts:
            raise SourceError(f"a persistent id has {len(pid)} parts; wanted a storage of {parts}")
        kind, key, location = pid[1:4]
        numel = _size(pid[4], "numel of a storage")
        if not isinstance(kind, Inert) or not isinstance(key, str) or not isinstance(location, str):
            raise SourceError("a storage's type, key or location is not what it should be")
        if kind.name not in _STORAGES:
            m.spend(INERT + 64)
            return Inert(kind.name, (key, location, numel))
        dtype = _STORAGES[kind.name]
        nbytes = numel * (dtype.itemsize if dtype else 1)
        if nbytes > MAX_BYTES:
            raise SourceError(f"storage {key} has {nbytes} bytes")
        if not self.legacy:
            if nbytes == 0:  # a stage-3 model file has one for each of its parameters
                return self._other("", dtype, 0, m)
            return self._record(key, dtype, nbytes, m)
        if self.held.setdefault(key, nbytes) != nbytes:
            raise SourceError(f"storage {key} has {nbytes} bytes here and {self.held[key]} before")
        if key in self.slices:
            raise SourceError(f"storage {key} is held and is a slice of {self.slices[key].key}")
        m.spend(DICT_NAME)
        if pid[5] is not None:
            return self._slice(key, dtype, numel, pid[5], m)
        return self._record(key, dtype, nbytes, m)

    def _slice(self, key: str, dtype: DType | None, numel: int, view: object, m: Machine) -> Storage:
        if not isinstance(view, tuple) or len(view) != 3 or not isinstance(view[0], str):
            raise SourceError(f"the view of storage {key} is not (key, offset, numel)")
        itemsize = dtype.itemsize if dtype else 1
        name, offset, size = view[0], _size(view[1], "offset"), _size(view[2], "numel")
        if offset + size > numel:
            raise SourceError(f"elements [{offset}, {offset + size}) of storage {key}, which has {numel}")
        m.spend(DICT_NAME + 128)
        found = Slice(key, offset * itemsize, size * itemsize)
        if name in self.held or self.slices.setdefault(name, found) != found:
            raise SourceError(f"storage {name} is a slice of {key} here and something else before")
        return self._record(name, dtype, found.nbytes, m)

    def _record(self, key: str, dtype: DType | None, nbytes: int, m: Machine) -> Storage:
        first = self._known.get(key)
        if first is None:
            m.spend(DICT_NAME + STORAGE)
            first = self._known[key] = Storage(key, dtype, nbytes)
        if first.nbytes != nbytes:
            raise SourceError(f"storage {key} has {nbytes} bytes here and {first.nbytes} before")
        if first.dtype is dtype:
            return first
        byte, before = (d or dtypes.uint8 for d in (dtype, first.dtype))  # an untyped storage holds bytes
        if nbytes and byte is not before:
            raise SourceError(f"storage {key} holds {byte} here and {before} before")
        return self._other(key, dtype, nbytes, m)

    def _other(self, key: str, dtype: DType | None, nbytes: int, m: Machine) -> Storage:
        found = self._others.get((key, dtype))
        if found is None:
            m.spend(DICT_ITEM + STORAGE + 72)
            found = self._others[key, dtype] = Storage(key, dtype, nbytes)
        return found


# ---- the rebuild functions: args -> Tensor, or Inert where the bytes mean something else ----


def _size(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_BYTES:
        shown = value if type(value) is int and value.bit_length() < 128 else type(value).__name__
        raise SourceError(f"{what} is {shown}; wanted an integer in [0, 2^62)")
    return value


def _sizes(value: object, what: str) -> tuple[int, ...]:
    """The value itself, which is a tuple of sizes."""
    if not isinstance(value, tuple) or len(value) > MAX_NDIM:
        raise SourceError(f"the {what} is no tuple of at most {MAX_NDIM} integers")
    for v in value:
        _size(v, what)
    return value


def _tensor(
    name: str, args: tuple[object, ...], m: Machine, dtype: object, grad: object, metadata: object
) -> object:
    storage = args[0]
    if isinstance(storage, Inert) or isinstance(dtype, Inert) or metadata:
        m.spend(INERT)
        return Inert(name, args)
    if not isinstance(storage, Storage):
        raise SourceError(f"its storage is a {type(storage).__name__}")
    if dtype is None:
        dtype = storage.dtype or dtypes.uint8
    if not isinstance(dtype, DType):
        raise SourceError(f"its dtype is a {type(dtype).__name__}")
    if type(grad) is not bool:
        raise SourceError(f"its requires_grad is a {type(grad).__name__}")
    offset = _size(args[1], "offset")
    shape, stride = _sizes(args[2], "shape"), _sizes(args[3], "stride")
    if len(shape) != len(stride):
        raise SourceError(f"shape {shape} and stride {stride} differ in length")
    if 0 not in shape:
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        needed = (last + 1) * dtype.itemsize
        if needed > storage.nbytes or math.prod(shape) > MAX_BYTES:
            raise SourceError(
                f"{dtype} {shape} of stride {stride} from element {offset} needs {needed} bytes "
                f"of storage {storage.key}, which has {storage.nbytes}"
            )
    made = storage.blank
    if made is None or (dtype, offset, shape, stride, grad) != (
        made.dtype, made.offset, made.shape, made.stride, made.requires_grad,
    ):  # fmt: skip
        m.spend(TENSOR + (32 if offset > 256 else 0))
        made = Tensor(storage, dtype, offset, shape, stride, grad)
        if 0 in shape:
            storage.blank = made
    return made


def _rebuild_tensor(args: tuple[object, ...], m: Machine) -> object:
    if len(args) != 4:
        raise SourceError(f"{len(args)} arguments; wanted 4")
    return _tensor("torch._utils._rebuild_tensor", args, m, None, False, None)


def _rebuild_tensor_v2(args: tuple[object, ...], m: Machine) -> object:
    if len(args) not in (6, 7):
        raise SourceError(f"{len(args)} arguments; wanted 6 or 7")
    metadata = args[6] if len(args) == 7 else None
    return _tensor("torch._utils._rebuild_tensor_v2", args, m, None, args[4], metadata)


def _rebuild_tensor_v3(args: tuple[object, ...], m: Machine) -> object:
    if len(args) not in (7, 8):
        raise SourceError(f"{len(args)} arguments; wanted 7 or 8")
    if args[6] is None:
        raise SourceError("its dtype is None")
    metadata = args[7] if len(args) == 8 else None
    return _tensor("torch._utils._rebuild_tensor_v3", args, m, args[6], args[4], metadata)


def _rebuild_parameter(args: tuple[object, ...], m: Machine) -> object:
    if len(args) not in (3, 4):
        raise SourceError(f"{len(args)} arguments; wanted 3 or 4")
    m.spend(TENSOR + INERT)
    if isinstance(args[0], Inert):
        return Inert("torch._utils._rebuild_parameter", args)
    if not isinstance(args[0], Tensor) or type(args[1]) is not bool:
        raise SourceError("it is not made of a tensor and a bool")
    return replace(args[0], requires_grad=args[1])


def _rebuild_from_type(args: tuple[object, ...], m: Machine) -> object:
    """(function, type, arguments, state): a tensor with attributes of Python."""
    if len(args) != 4 or not isinstance(args[0], Inert) or not isinstance(args[1], Inert):
        raise SourceError("wanted a function, a type, arguments and state")
    function, inner = args[0], args[2]
    rebuild = _REBUILDS.get(function.name)
    if rebuild is None or args[1].name not in _TENSORS:
        m.spend(INERT)
        return Inert("torch._tensor._rebuild_from_type_v2", args)
    if not isinstance(inner, tuple):
        raise SourceError(f"the arguments of {function.name} are a {type(inner).__name__}")
    made, state = rebuild(inner, m), args[3]
    if not isinstance(made, Tensor) or not isinstance(state, dict):
        return made
    m.spend(TENSOR)
    return replace(made, attributes=state)


def _torch_size(args: tuple[object, ...], m: Machine) -> object:
    if len(args) != 1 or not isinstance(args[0], (tuple, list)):
        raise SourceError("wanted one tuple")
    if isinstance(args[0], list):
        m.spend(64 + 8 * len(args[0]))
    return _sizes(tuple(args[0]), "shape")


def _device(args: tuple[object, ...], m: Machine) -> object:
    if not 1 <= len(args) <= 2 or not isinstance(args[0], str):
        raise SourceError("wanted a device type and an index")
    m.spend(128 + len(args[0]))
    return args[0] if len(args) == 1 else f"{args[0]}:{_size(args[1], 'index')}"


_REBUILDS: dict[str, Call] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_CALLS: dict[str, Call] = {
    **_REBUILDS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _torch_size,
    "torch.device": _device,
}
_TENSORS = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
_DTYPES: dict[str, object] = {f"torch.{d.name}": d for d in dtypes.DTYPES}
_STORAGES: dict[str, DType | None] = {
    **{f"torch.{d.storage}": d for d in dtypes.DTYPES if d.storage},
    **{f"torch.cuda.{d.storage}": d for d in dtypes.DTYPES if d.storage},
    "torch.UntypedStorage": None,
    "torch.storage.UntypedStorage": None,
}
_EXPECTED = frozenset({*_CALLS, *_STORAGES, *_TENSORS, *PLAIN})
