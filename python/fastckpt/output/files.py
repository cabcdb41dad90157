"""How tensors lie in output files: safetensors layouts, and which tensor goes into which file.

Law: a layout is fixed before the first byte is written. `fixed`, the slots and what `closing` gives
tile the file: no hole, no overlap.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, DType, counted
from ..errors import LayoutError, WriteError

Spec = tuple[str, DType, tuple[int, ...]]
"""A tensor before it has a place: name, dtype, shape."""

Frame = tuple[int, bytes | bytearray]
"""Bytes of a file that are no tensor's: offset in the file, the bytes."""


def _no_head() -> Iterable[bytes]:
    return ()


def _no_end(crcs: Mapping[str, int]) -> list[Frame]:
    return []


@dataclass(frozen=True, slots=True, eq=False)
class Specs(Sequence[Spec]):
    """Tensors before they have a place, as columns that read as Specs."""

    names: Sequence[str]
    dtypes: Sequence[DType]
    shapes: Sequence[tuple[int, ...]]

    @staticmethod
    def of(tensors: Sequence[Spec]) -> Specs:
        """These tensors; the same columns where they are columns."""
        if isinstance(tensors, Specs):
            return tensors
        return Specs(*zip(*tensors, strict=True)) if tensors else Specs((), (), ())

    def at(self, rows: Sequence[int]) -> Specs:
        """The tensors of these numbers, in that order."""
        names, dtypes, shapes = self.names, self.dtypes, self.shapes
        return Specs([names[i] for i in rows], [dtypes[i] for i in rows], [shapes[i] for i in rows])

    def nbytes(self) -> NDArray[np.int64]:
        """The size of each tensor. Raises LayoutError where no offset reaches over all of them."""
        sizes = [math.prod(s) * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True)]
        if (total := sum(sizes)) >= 1 << 62:  # one stored element, again and again, may be of any size
            raise LayoutError(f"{len(self)} tensors, of {total} bytes: nothing has room for them")
        return np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, i: int) -> Spec: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[Spec]: ...

    def __getitem__(self, i: int | slice) -> Spec | Sequence[Spec]:
        if isinstance(i, slice):
            return Specs(self.names[i], self.dtypes[i], self.shapes[i])
        return self.names[i], self.dtypes[i], self.shapes[i]

    def __iter__(self) -> Iterator[Spec]:
        return zip(self.names, self.dtypes, self.shapes, strict=True)


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor's bytes in a file: `offset` of the first in the file, `nbytes` of them."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class SlotTable(Sequence[Slot]):
    """The tensors of a file in file order, as columns that read as Slots."""

    names: Sequence[str]
    dtypes: Sequence[DType]
    shapes: Sequence[tuple[int, ...]]
    offset: NDArray[np.int64]
    nbytes: NDArray[np.int64]

    @staticmethod
    def of(tensors: Sequence[Spec], offset: Iterable[int], nbytes: Iterable[int]) -> SlotTable:
        """These tensors at these places."""
        specs = Specs.of(tensors)
        where = (np.fromiter(column, np.int64) for column in (offset, nbytes))
        return SlotTable(specs.names, specs.dtypes, specs.shapes, *where)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, i: int) -> Slot: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[Slot]: ...

    def __getitem__(self, i: int | slice) -> Slot | Sequence[Slot]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return Slot(self.names[i], *self.kind(i))

    def kind(self, i: int) -> tuple[DType, tuple[int, ...], int, int]:
        """Dtype, shape, offset and size of one tensor."""
        return self.dtypes[i], self.shapes[i], int(self.offset[i]), int(self.nbytes[i])

    def __iter__(self) -> Iterator[Slot]:
        where = self.offset.tolist(), self.nbytes.tolist()
        return map(Slot, self.names, self.dtypes, self.shapes, *where)


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file before it is written.

    `path` is relative to the output directory, `nbytes` the final size, `slots` the tensors in file
    order, `fixed` the parts known before any tensor is, `aliases` further names: alias -> slot's name.
    `closing` makes the parts known only at the end, of slot name -> CRC32, which are needed where `crc` says
    so. `head` makes the bytes before all of these, in pieces: the header of very many tensors is not kept."""

    path: str
    nbytes: int
    slots: SlotTable
    fixed: tuple[Frame, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    crc: bool = False
    closing: Callable[[Mapping[str, int]], list[Frame]] = _no_end
    head: Callable[[], Iterable[bytes]] = _no_head


# ---- safetensors ----

# safetensors 0.8 sorts by its enum of types, descending, then by name
_TYPES = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F4", "BOOL",
)  # fmt: skip
_ORDER = {name: k for k, name in enumerate(_TYPES)}
_MAX_HEADER = 100_000_000
_LINES = 1 << 10
"""Tensors whose text is made at once."""


def safetensors_layout(
    path: str,
    tensors: Sequence[Spec],
    metadata: Mapping[str, str],
    aliases: Mapping[str, str] | None = None,
    *,
    keep_order: bool = False,
) -> FileLayout:
    """The file `safetensors.torch.save_file(tensors, path, metadata)` writes, byte for byte.

    Several metadata keys are sorted (the package leaves their order to chance). `keep_order` leaves
    tensors of one dtype in the order given instead of sorting them by name; both are valid files whose
    tensors lie aligned. `aliases` are only recorded: the format has no second name for bytes. Raises
    WriteError for a type or name the format cannot spell. Format: 8 bytes header length, JSON header
    padded with spaces to 8, the tensors; https://github.com/huggingface/safetensors."""
    specs = Specs.of(tensors)
    unique(path, specs, aliases or {})
    for name, dtype, shape in specs:
        if dtype.safetensors not in _ORDER:
            raise WriteError(f"{path}: {name} is {dtype}, which safetensors cannot spell")
        if dtype.packed > 1 and not shape:
            raise WriteError(f"{path}: {name} is one {dtype} without an axis, which safetensors cannot spell")
        if name == "__metadata__":
            raise WriteError(f"{path}: safetensors keeps the name __metadata__ for itself")
    rows = range(len(specs)) if keep_order else sorted(range(len(specs)), key=specs.names.__getitem__)
    types = [_ORDER[dtype.safetensors] for dtype in specs.dtypes]
    rows = sorted(rows, key=types.__getitem__)
    if rows != list(range(len(specs))):
        specs = specs.at(rows)
    nbytes = specs.nbytes()
    ends = np.cumsum(nbytes)
    slots = SlotTable.of(specs, ends - nbytes, nbytes)
    try:
        size = sum(len(piece) for piece in _header(slots, 0, metadata))
    except UnicodeEncodeError as e:
        raise WriteError(f"{path}: a name is not valid Unicode: {e}") from None
    size += -size % 8
    if size > _MAX_HEADER:
        raise WriteError(f"{path}: a header of {size} bytes; safetensors reads at most {_MAX_HEADER}; cut it")
    first = 8 + size
    slots = replace(slots, offset=slots.offset + first)
    head = partial(_head, slots, first, metadata)
    return FileLayout(path, first + int(nbytes.sum()), slots, (), dict(aliases or {}), head=head)


def _head(slots: SlotTable, first: int, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes before `first`, where the first tensor lies: the header, and its length before it."""
    left = first - 8
    yield left.to_bytes(8, "little")
    for piece in _header(slots, first, metadata):
        left -= len(piece)
        yield piece
    yield b" " * left


def _header(slots: SlotTable, first: int, metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The JSON header in pieces; its offsets count from `first`."""
    spell = json.encoder.encode_basestring  # as json.dumps(name, ensure_ascii=False), without its overhead
    before = "{"
    if metadata:
        pairs = ",".join(f"{spell(k)}:{spell(v)}" for k, v in sorted(metadata.items()))
        yield f'{{"__metadata__":{{{pairs}}}'.encode()
        before = ","
    for k in range(0, len(slots), _LINES):
        some = slice(k, k + _LINES)
        begin = slots.offset[some] - first
        places = begin.tolist(), (begin + slots.nbytes[some]).tolist()
        lines = [
            f'{spell(name)}:{{{_kind(dtype.code, shape)},"data_offsets":[{start},{stop}]}}'
            for name, dtype, shape, start, stop in zip(
                slots.names[some], slots.dtypes[some], slots.shapes[some], *places, strict=True
            )
        ]
        yield (before + ",".join(lines)).encode()
        before = ","
    yield b"}" if before == "," else b"{}"


@lru_cache(maxsize=1 << 10)
def _kind(code: int, shape: tuple[int, ...]) -> str:
    """The header's words for a dtype and shape: many tensors share one."""
    dtype = DTYPES[code]
    return f'"dtype":"{dtype.safetensors}","shape":[{",".join(map(str, counted(dtype, shape)))}]'


# ---- which tensor goes into which file ----


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one file, in order, and the aliases that go with them."""

    path: str
    tensors: Specs
    aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Split:
    """How tensors fall into files; `total` counts the bytes of all tensors once."""

    groups: tuple[Group, ...]
    total: int

    @property
    def index(self) -> bytes | None:
        """The index JSON as DeepSpeed's converter writes it; None for a single file, which needs none."""
        if len(self.groups) == 1:
            return None
        where = {t: g.path for g in self.groups for t in (*g.tensors.names, *g.aliases)}
        index = {"metadata": {"total_size": self.total}, "weight_map": where}
        return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def split(
    tensors: Sequence[Spec],
    max_shard_size: str | int | None,
    name: Callable[[int, int], str],
    aliases: Mapping[str, str] | None = None,
) -> Split:
    """Tensors into files of at most `max_shard_size`, grouped as huggingface_hub's
    split_torch_state_dict_into_shards does: in order, a larger tensor alone; None means one file.

    `name(part, parts)` names a file, parts counted from 0; an alias lies in its holder's file."""
    aliases = aliases or {}
    specs = Specs.of(tensors)
    unique(name(0, 1), specs, aliases)
    sizes = specs.nbytes().tolist()
    total = sum(sizes)
    if max_shard_size is None:
        return Split((Group(name(0, 1), specs, dict(aliases)),), total)
    limit = parse_size(max_shard_size, "max_shard_size")
    groups: list[list[int]] = []
    current: list[int] = []
    held = 0
    for i, n in enumerate(sizes):
        if n > limit:
            groups.append([i])
            continue
        if held + n > limit:
            groups.append(current)
            current, held = [], 0
        current.append(i)
        held += n
    if current or not groups:
        groups.append(current)
    also: dict[str, list[str]] = {}
    for alias, holder in aliases.items():
        also.setdefault(holder, []).append(alias)
    out = []
    for k, group in enumerate(groups):
        own = specs if len(groups) == 1 else specs.at(group)
        held_by = {a: t for t in own.names for a in also.get(t, ())} if also else {}
        out.append(Group(name(k, len(groups)), own, held_by))
    return Split(tuple(out), total)


_UNITS = {u + s: b**k for k, u in enumerate("KMGT", 1) for s, b in (("B", 1000), ("IB", 1024))}


def parse_size(size: str | int, of: str = "size") -> int:
    """Bytes of "5GB" (10^9, as huggingface_hub), "5GiB" (2^30) or a number; `of`: whose they are. Raises
    LayoutError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(found[2].upper()) if found and found[2] else 1
    nbytes = float(found[1]) * unit if found and unit else 0
    if not 1 <= nbytes < 1 << 62:
        raise LayoutError(
            f"{of} {size!r}: wanted a number of bytes from 1 on, or one with KB, MB, GB, TB, KiB, MiB, GiB, "
            "TiB"
        )
    return int(nbytes)


def unique(path: str, tensors: Specs, aliases: Mapping[str, str]) -> None:
    """Refuses two tensors of one name, and an alias that is one or of none, with a WriteError that names
    `path`."""
    names = set(tensors.names)
    if len(names) != len(tensors):
        raise WriteError(f"{path}: two tensors named {Counter(tensors.names).most_common(1)[0][0]}")
    for alias, holder in aliases.items():
        if alias in names or holder not in names:
            raise WriteError(f"{path}: alias {alias} of {holder}: the one must be new, the other a tensor")
