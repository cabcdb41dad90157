"""torch's zip file of tensors, laid out before a byte is written and without torch.

Law: the file equals what `torch.save(dict)` of torch 2.13 writes for contiguous CPU tensors, byte for
byte, but for the 40 digits of `.data/serialization_id`, which are our own digests of names and CRCs.
Format: https://github.com/pytorch/pytorch/blob/v2.13.0/caffe2/serialize/inline_container.cc
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..digest import crc32, digest64
from ..errors import WriteError
from .files import FileLayout, Frame, SlotTable, Spec, Specs, unique
from .pickling import Wrap, pickled

_ALIGN = 64
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_UTF8, _DESCRIPTOR = 0x0800, 0x0008


def torch_layout(
    path: str, tensors: Sequence[Spec], aliases: Mapping[str, str] | None = None, wrap: Wrap | None = None
) -> FileLayout:
    """The file `torch.save({name: tensor, ...}, path)` writes; aliases come last, as the same tensor.

    Every slot's CRC32 is needed to close it. Raises WriteError for names or values that do not fit."""
    aliases = dict(aliases or {})
    specs = Specs.of(tensors)
    unique(path, specs, aliases)
    root = os.path.splitext(os.path.basename(path))[0]
    root = root if root.isascii() else "archive"
    pickle = pickled(path, specs, aliases, wrap)
    known = [
        ("data.pkl", pickle),
        (".format_version", b"1"),
        (".storage_alignment", b"64"),
        ("byteorder", b"little"),
    ]
    fixed: list[Frame] = []
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
    sizes = specs.nbytes().tolist()
    named = zip(specs.names, sizes, strict=True)
    places = [add(f"data/{k}", None, nbytes, slot).data for k, (slot, nbytes) in enumerate(named)]
    slots = SlotTable.of(specs, places, sizes)
    add("version", b"3\n", 2)
    add(".data/serialization_id", None, 40)
    zipped = _Zip(path, tuple(members))
    return FileLayout(path, at + zipped.directory_nbytes, slots, tuple(fixed), aliases, True, zipped.seal)


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

    def seal(self, crcs: Mapping[str, int]) -> list[Frame]:
        missing = [m.slot for m in self.members if m.slot is not None and m.slot not in crcs]
        if missing:
            raise WriteError(f"{self.path}: no CRC32 given for {missing[0]} ({len(missing)} in all)")
        *members, last = (m if m.slot is None else replace(m, crc=crcs[m.slot]) for m in self.members)
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
