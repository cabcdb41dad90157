"""torch's zip file of tensors, laid out before a byte is written and without torch.

Law: the file equals what `torch.save(dict)` of torch 2.13 writes for contiguous CPU tensors, byte for
byte, but for the 40 digits of `.data/serialization_id`, which are our own digests of names and CRCs.
Format: https://github.com/pytorch/pytorch/blob/v2.13.0/caffe2/serialize/inline_container.cc
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint import JSON
from ..digest import crc32, digest64
from ..dtypes import DType
from ..errors import WriteError
from .files import FileLayout, Part, SlotTable, Spec, unique

_ALIGN = 64
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_UTF8, _DESCRIPTOR = 0x0800, 0x0008


@dataclass(frozen=True, slots=True)
class Wrap:
    """A single-file training checkpoint: {weights_key: tensors, **client_state}, of plain values."""

    weights_key: str
    client_state: Mapping[str, JSON]


def torch_layout(
    path: str, tensors: Sequence[Spec], aliases: Mapping[str, str] | None = None, wrap: Wrap | None = None
) -> FileLayout:
    """The file `torch.save({name: tensor, ...}, path)` writes; aliases come last, as the same tensor.

    Every slot's CRC32 is needed to close it. Raises WriteError for names or values that do not fit."""
    aliases = dict(aliases or {})
    unique(path, tensors)
    root = os.path.splitext(os.path.basename(path))[0]
    root = root if root.isascii() else "archive"
    pickle = _pickled(path, tensors, aliases, wrap)
    known = [
        ("data.pkl", pickle),
        (".format_version", b"1"),
        (".storage_alignment", b"64"),
        ("byteorder", b"little"),
    ]
    fixed: list[Part] = []
    members: list[_Member] = []
    at = 0

    def add(name: str, data: bytes | None, nbytes: int, slot: str | None = None) -> _Member:
        nonlocal at
        member = _Member(f"{root}/{name}".encode(), at, nbytes, slot, crc32(data) if data is not None else 0)
        fixed.append((at, member.local()))
        if data is not None:
            fixed.append((member.data, data + member.descriptor()))
        members.append(member)
        at = member.end
        return member

    for name, data in known:
        add(name, data, len(data))
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors]
    named = zip(tensors, sizes, strict=True)
    places = [add(f"data/{k}", None, nbytes, t[0]).data for k, (t, nbytes) in enumerate(named)]
    slots = SlotTable.of(tensors, places, sizes)
    add("version", b"3\n", 2)
    add(".data/serialization_id", None, 40)
    zipped = _Zip(path, tuple(members))
    return FileLayout(
        path, at + zipped.directory_nbytes, slots, tuple(fixed), aliases, True, zipped.seal
    )


# ---- zip ----


@dataclass(frozen=True, slots=True)
class _Member:
    """One record: its name, where its local header starts, its bytes; `slot` the tensor, None for none."""

    name: bytes
    start: int
    nbytes: int
    slot: str | None
    crc: int

    @property
    def flags(self) -> int:
        return _UTF8 | (_DESCRIPTOR if self.nbytes else 0)

    def zip64(self, packed: int) -> bytes:
        """The extra field of sizes and offsets beyond 32 bits; `packed`: what stands as compressed size."""
        fields = [self.nbytes, packed] if self.nbytes >= _U32 else []
        fields += [self.start] if self.start >= _U32 else []
        return struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""

    def local(self) -> bytes:
        """The local header; an extra field "FB" pads it so that the data start on 64 bytes."""
        extra = self.zip64(0)
        pad = -(self.start + 30 + len(self.name) + len(extra) + 4) % _ALIGN
        extra += struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        head = struct.pack(
            "<4s5H3I2H", b"PK\3\4", 0, self.flags, 0, 0, 0, 0, 0, 0, len(self.name), len(extra)
        )
        return head + self.name + extra

    @property
    def data(self) -> int:
        """The offset of the first byte of data."""
        start = self.start + 30 + len(self.name) + len(self.zip64(0)) + 4
        return start + -start % _ALIGN

    def descriptor(self) -> bytes:
        """CRC and sizes behind the data; 64-bit where the header has a zip64 field; none without data."""
        if not self.nbytes:
            return b""
        form = "<4sIQQ" if self.zip64(0) else "<4sIII"
        return struct.pack(form, b"PK\7\10", self.crc, self.nbytes, self.nbytes)

    @property
    def end(self) -> int:
        return self.data + self.nbytes + len(self.descriptor())

    def central(self) -> bytes:
        """The record of the central directory."""
        extra, nbytes = self.zip64(self.nbytes), min(self.nbytes, _U32)
        head = struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 0, 0, self.flags, 0, 0, 0, self.crc, nbytes, nbytes,
            len(self.name), len(extra), 0, 0, 0, 0, min(self.start, _U32),
        )  # fmt: skip
        return head + self.name + extra


@dataclass(frozen=True, slots=True)
class _Zip:
    """All records of a file, the serialization id last; `seal` makes what follows from the CRCs."""

    path: str
    members: tuple[_Member, ...]

    @property
    def directory_nbytes(self) -> int:
        return sum(46 + len(m.name) + len(m.zip64(0)) for m in self.members) + 56 + 20 + 22

    def seal(self, crcs: Mapping[str, int]) -> list[Part]:
        missing = [m.slot for m in self.members if m.slot is not None and m.slot not in crcs]
        if missing:
            raise WriteError(f"{self.path}: no CRC32 given for {missing[0]} ({len(missing)} in all)")
        *members, last = (
            m if m.slot is None else replace(m, crc=crcs[m.slot]) for m in self.members
        )
        names = digest64(b"\n".join(m.name for m in members))
        values = digest64(struct.pack(f"<{len(members)}I", *(m.crc for m in members)))
        identity = f"{names:020d}{values:020d}".encode()
        last = replace(last, crc=crc32(identity))
        parts = [(m.data + m.nbytes, m.descriptor()) for m in members if m.slot is not None and m.nbytes]
        directory = b"".join(m.central() for m in (*members, last))
        n = len(self.members)
        end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, n, n, len(directory), last.end)
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, last.end + len(directory), 1)
        end = struct.pack(
            "<4s4H2IH", b"PK\5\6", 0, 0, min(n, _U16), min(n, _U16),
            min(len(directory), _U32), min(last.end, _U32), 0,
        )  # fmt: skip
        return [*parts, (last.data, identity + last.descriptor() + directory + end64 + locator + end)]


# ---- pickle ----

_BATCH = 1000
_MAX_DEPTH = 100


def _pickled(path: str, tensors: Sequence[Spec], aliases: Mapping[str, str], wrap: Wrap | None) -> bytes:
    writer = _Pickle(path)
    if wrap is None:
        writer.tensors(tensors, aliases)
    else:
        if wrap.weights_key in wrap.client_state:
            raise WriteError(f"{path}: client state has a key {wrap.weights_key!r} of its own")
        writer.mapping([wrap.weights_key, *wrap.client_state], lambda k: (
            writer.tensors(tensors, aliases) if k == wrap.weights_key else writer.value(wrap.client_state[k])
        ))  # fmt: skip
    return bytes(writer.out + b".")


class _Pickle:
    """The opcodes CPython's pickler writes, protocol 2, for dicts of tensors and plain values."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.out = bytearray(b"\x80\x02")
        self._memo: dict[str, int] = {}
        self._count = 0

    def put(self) -> int:
        """Number the value just written; the pickler numbers every one, used again or not."""
        k = self._count
        self._count += 1
        self.out += b"q" + bytes((k,)) if k < 256 else b"r" + struct.pack("<I", k)
        return k

    def get(self, k: int) -> None:
        self.out += b"h" + bytes((k,)) if k < 256 else b"j" + struct.pack("<I", k)

    def named(self, key: str, opcodes: bytes) -> None:
        """A global or constant string: written once, got from the memo after."""
        if key in self._memo:
            self.get(self._memo[key])
        else:
            self.out += opcodes
            self._memo[key] = self.put()

    def glob(self, module: str, name: str) -> None:
        self.named(f"{module} {name}", f"c{module}\n{name}\n".encode())

    def word(self, text: str) -> None:
        self.named(f"'{text}", self.encoded(text))

    def encoded(self, text: str) -> bytes:
        raw = text.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw

    def string(self, text: str) -> None:
        self.out += self.encoded(text)
        self.put()

    def integer(self, n: int) -> None:
        if 0 <= n < 1 << 8:
            self.out += b"K" + bytes((n,))
        elif 0 <= n < 1 << 16:
            self.out += b"M" + struct.pack("<H", n)
        elif -(1 << 31) <= n < 1 << 31:
            self.out += b"J" + struct.pack("<i", n)
        else:
            raw = n.to_bytes((n.bit_length() >> 3) + 1, "little", signed=True)
            if n < 0 and raw[-1] == 0xFF and raw[-2] & 0x80:
                raw = raw[:-1]
            if len(raw) > 255:
                raise WriteError(f"{self.path}: an integer of {len(raw)} bytes")
            self.out += b"\x8a" + bytes((len(raw),)) + raw

    def integers(self, values: Sequence[int]) -> None:
        """A tuple of integers."""
        if not values:
            self.out += b")"
            return
        if len(values) > 3:
            self.out += b"("
        for n in values:
            self.integer(n)
        self.out += b"\x85\x86\x87t"[min(len(values), 4) - 1 : min(len(values), 4)]
        self.put()

    def mapping(self, keys: Sequence[str], value: Callable[[str], None]) -> None:
        """A dict: each key, then what `value(key)` writes, a thousand pairs a batch."""
        self.out += b"}"
        self.put()
        if len(keys) == 1:
            self.string(keys[0])
            value(keys[0])
            self.out += b"s"
            return
        # a full last batch is followed by an empty one, as CPython does
        for first in range(0, len(keys) + 1, _BATCH) if keys else ():
            self.out += b"("
            for key in keys[first : first + _BATCH]:
                self.string(key)
                value(key)
            self.out += b"u"

    def value(self, value: JSON, depth: int = 0) -> None:
        """A plain value."""
        if depth > _MAX_DEPTH:
            raise WriteError(f"{self.path}: client state is nested deeper than {_MAX_DEPTH}")
        if value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            self.string(value)
        elif isinstance(value, dict):
            inner = value
            self.mapping(list(inner), lambda k: self.value(inner[k], depth + 1))
        elif isinstance(value, list):
            self.sequence(value, depth)
        else:
            raise WriteError(f"{self.path}: client state holds a {type(value).__name__}; wanted plain values")

    def sequence(self, values: Sequence[JSON], depth: int) -> None:
        self.out += b"]"
        self.put()
        if len(values) == 1:
            self.value(values[0], depth + 1)
            self.out += b"a"
            return
        for first in range(0, len(values), _BATCH):
            self.out += b"("
            for item in values[first : first + _BATCH]:
                self.value(item, depth + 1)
            self.out += b"e"

    def tensors(self, tensors: Sequence[Spec], aliases: Mapping[str, str]) -> None:
        """The dict of tensors; tensor k lies in storage k; an alias gets its holder's tensor again."""
        specs = {t[0]: (k, t[1], t[2]) for k, t in enumerate(tensors)}
        for alias, holder in aliases.items():
            if alias in specs or holder not in specs:
                raise WriteError(
                    f"{self.path}: alias {alias} of {holder}: the one must be new, the other a tensor"
                )
        made: dict[str, int] = {}

        def write(name: str) -> None:
            if name in aliases:
                self.get(made[aliases[name]])
            else:
                made[name] = self.tensor(*specs[name])

        self.mapping([*specs, *aliases], write)

    def tensor(self, key: int, dtype: DType, shape: tuple[int, ...]) -> int:
        """A contiguous tensor that is the whole of storage `key`; its number in the memo."""
        typed = bool(dtype.storage)  # newer types have no typed storage: torch keeps bytes and the type
        numel = math.prod(shape)
        self.glob("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"(("
        self.word("storage")
        self.glob(*(("torch", dtype.storage) if typed else ("torch.storage", "UntypedStorage")))
        self.string(str(key))
        self.word("cpu")
        self.integer(numel if typed else numel * dtype.itemsize)
        self.out += b"t"
        self.put()
        self.out += b"QK\x00"
        self.integers(shape)
        self.integers([math.prod(max(n, 1) for n in shape[a + 1 :]) for a in range(len(shape))])
        self.out += b"\x89"
        self.glob("collections", "OrderedDict")
        self.out += b")R"
        self.put()
        if not typed:
            self.glob("torch", dtype.name)
        self.out += b"t"
        self.put()
        self.out += b"R"
        return self.put()
