"""The entries of a zip's central directory, as columns: a file may have a record for each of 10^5 tensors.

Law: names are unique; records are stored and unencrypted, lie before the directory, and none runs into the
next. Source of the format: APPNOTE.TXT 6.3 sections 4.3.12 and 4.5.3.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ...errors import SourceError

STREAMED, UTF8 = 0x0008, 0x0800
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF

_CENTRAL = np.dtype(
    [
        ("signature", "S4"), ("made", "<u2"), ("needed", "<u2"), ("flags", "<u2"), ("method", "<u2"),
        ("time", "<u4"), ("crc", "<u4"), ("packed", "<u4"), ("size", "<u4"), ("name", "<u2"),
        ("extra", "<u2"), ("comment", "<u2"), ("disk", "<u2"), ("internal", "<u2"), ("external", "<u4"),
        ("offset", "<u4"),
    ]
)  # fmt: skip
_FEW = 1 << 10
_SIGNATURE = b"PK\x01\x02"
_LENGTHS = struct.Struct("<3H").unpack_from

Ints = NDArray[np.int64]


class Record(NamedTuple):
    """One entry of the central directory: header `offset`, `size` in bytes, `crc`, `flags`, `limit`, the
    offset at which the next record or the directory begins, and `at`, where in the directory it stands."""

    offset: int
    size: int
    crc: int
    flags: int
    limit: int
    at: int


class Entries:
    """The entries of a central directory by name."""

    __slots__ = ("_at", "_crc", "_few", "_flags", "_limit", "_names", "_offset", "_size", "first")

    def __init__(self, raw: bytes, count: int, start: int) -> None:
        """`count` entries are all of `raw`, which begins at byte `start` of the file. Raises SourceError."""
        at = self._at = _walk(raw, count)
        table = _bytes_at(raw, at, 46).view(_CENTRAL).reshape(-1)
        length = table["name"].astype(np.int64)
        self.first = raw[at[0] + 46 : at[0] + 46 + length[0]] if count else b""
        self._crc, self._flags = table["crc"].copy(), table["flags"].copy()
        self._size, self._offset = table["size"].astype(np.int64), table["offset"].astype(np.int64)
        _check_kinds(raw, at, table)
        self._wide(raw, at, table)
        few = count <= _FEW  # a dict of very many names would take more than the columns
        self._few = _by_name(raw, at + 46, length) if few else {}
        self._names = {} if few else _by_length(raw, at + 46, length)
        self._limit = self._limits(raw, at, length, start)

    def get(self, name: bytes) -> Record | None:
        """The record of that name; None where there is none."""
        i = self._few.get(name)
        if i is None and len(name) in self._names:
            names, rows = self._names[len(name)]
            wanted = np.array(name, names.dtype)
            k = int(np.searchsorted(names, wanted))
            i = int(rows[k]) if k < len(names) and names[k] == wanted else None
        if i is None:
            return None
        columns = (self._offset, self._size, self._crc, self._flags, self._limit, self._at)
        return Record(*[column.item(i) for column in columns])

    def _wide(self, raw: bytes, at: Ints, table: NDArray[np.void]) -> None:
        """Sizes and offsets beyond 32 bits, and that what is stored has one size."""
        packed = table["packed"].astype(np.int64)
        columns = (self._size, packed, self._offset)
        for i in np.flatnonzero(np.any([column == FULL32 for column in columns], axis=0)).tolist():
            begin = int(at[i]) + 46 + int(table["name"][i])
            wide = zip64(raw[begin : begin + int(table["extra"][i])], _shown(raw, at, table, i))
            for column in columns:
                if column[i] == FULL32:
                    if not wide:
                        raise SourceError(f"record {_shown(raw, at, table, i)}: its zip64 sizes are missing")
                    column[i] = wide.pop(0)
        odd = np.flatnonzero(packed != self._size)
        if len(odd):
            raise SourceError(
                f"record {_shown(raw, at, table, odd[0])}: stored, but {packed[odd[0]]} bytes packed and "
                f"{self._size[odd[0]]} unpacked"
            )

    def _limits(self, raw: bytes, at: Ints, length: Ints, start: int) -> Ints:
        """Where the next record or the directory begins; refuses records that cannot lie apart."""
        order = np.argsort(self._offset, kind="stable")
        limit = np.empty(len(order), np.int64)
        limit[order] = np.append(self._offset[order][1:], start)
        over = np.flatnonzero(self._offset + 30 + length + self._size > limit)
        if len(over):
            i = over[0]
            shown = raw[at[i] + 46 : at[i] + 46 + length[i]].decode(errors="replace")
            raise SourceError(
                f"record {shown}: {self._size[i]} bytes from {self._offset[i]} run into {limit[i]}, "
                "where another record or the directory begins"
            )
        return limit


def _walk(raw: bytes, count: int) -> Ints:
    """Where each entry begins: 46 bytes, name, extra field, comment."""
    if 46 * count > len(raw):
        raise SourceError(f"the zip directory of {count} records has {len(raw)} bytes")
    out, at, last = [], 0, len(raw) - 46
    for _ in range(count):
        if at > last:
            raise SourceError(f"the zip directory is broken at its byte {at}")
        out.append(at)
        name, extra, comment = _LENGTHS(raw, at + 28)
        at += 46 + name + extra + comment
    if at != len(raw):
        raise SourceError(f"the zip directory of {len(raw)} bytes has entries of {at}")
    return np.array(out, np.int64)


def _bytes_at(raw: bytes, at: Ints, n: int) -> NDArray[np.uint8]:
    """The `n` bytes at each place: [places, n]."""
    if not len(at):
        return np.empty((0, n), np.uint8)
    return sliding_window_view(np.frombuffer(raw, np.uint8), n)[at]


def _check_kinds(raw: bytes, at: Ints, table: NDArray[np.void]) -> None:
    """Entries, stored, not encrypted, on this disk, named."""
    for i in np.flatnonzero(table["signature"] != _SIGNATURE)[:1]:
        raise SourceError(f"the zip directory is broken at its byte {at[i]}")
    for i in np.flatnonzero(table["method"])[:1]:
        raise SourceError(
            f"record {_shown(raw, at, table, i)}: compressed (method {table['method'][i]}); torch.save "
            "stores its records, only TorchScript archives hold compressed code"
        )
    odd = (table["flags"] & np.uint16(0xFFFF & ~(STREAMED | UTF8))) | table["disk"] | (table["name"] == 0)
    for i in np.flatnonzero(odd)[:1]:
        raise SourceError(
            f"record {_shown(raw, at, table, i)}: encrypted, on another disk or unnamed "
            f"(flags 0x{table['flags'][i]:04x})"
        )


def _by_name(raw: bytes, at: Ints, length: Ints) -> dict[bytes, int]:
    """Name -> row; refuses a name that stands twice."""
    out: dict[bytes, int] = {}
    for i, (begin, n) in enumerate(zip(at.tolist(), length.tolist(), strict=True)):
        if out.setdefault(raw[begin : begin + n], i) != i:
            raise SourceError(_twice(raw[begin : begin + n]))
    return out


def _twice(name: bytes) -> str:
    return f"record {name.decode(errors='replace')}: the name stands twice in the zip directory"


def _by_length(raw: bytes, at: Ints, length: Ints) -> dict[int, tuple[NDArray[np.bytes_], Ints]]:
    """Length -> the names of that length, sorted, and their rows; refuses a name that stands twice."""
    out = {}
    for n in np.unique(length).tolist():
        rows = np.flatnonzero(length == n)
        names = _bytes_at(raw, at[rows], n).view(f"S{n}").reshape(-1)
        order = np.argsort(names, kind="stable")
        names = names[order]
        for k in np.flatnonzero(names[1:] == names[:-1])[:1]:
            raise SourceError(_twice(names[k]))
        out[n] = names, rows[order]
    return out


def _shown(raw: bytes, at: Ints, table: NDArray[np.void], i: int) -> str:
    begin = int(at[i]) + 46
    return raw[begin : begin + int(table["name"][i])].decode(errors="replace")


def zip64(extra: bytes, shown: str) -> list[int]:
    """The 64-bit values of the zip64 field among the extra fields, in file order; [] without one."""
    at, found = 0, None
    while at + 4 <= len(extra):
        kind, n = struct.unpack_from("<HH", extra, at)
        if at + 4 + n > len(extra):
            break
        if kind == 1:
            if found is not None:
                raise SourceError(f"record {shown}: two zip64 fields")
            found = [v[0] for v in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + n // 8 * 8])]
        at += 4 + n
    return found or []
