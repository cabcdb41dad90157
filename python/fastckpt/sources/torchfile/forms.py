"""Torch zips of one form: a save of many boxes holds thousands that differ in nothing but their values.

Law: a zip is of a form only where every byte in front of its storage and behind it is that of the one that
was read whole, but for what tells which values it holds: the storage's CRC32, which must be the same wherever
it stands, and the id that torch makes of the CRCs (`.data/serialization_id`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from ...extents import Extent
from .torchzip import Directory, Reader
from .zipentries import STREAMED

_PICKLE, _ID = b"data.pkl", b".data/serialization_id"
_IN_DESCRIPTOR, _IN_ENTRY = 4, 16
"""Where a record's CRC32 stands in the descriptor behind it, and in its entry of the directory."""


@dataclass(frozen=True, slots=True)
class Form:
    """What the zips of a form share: their `pickle`; all that lies in front of the storage, `head`; and of
    the bytes behind it, the first of which is `behind`, those of the ranges `fixed`, joined: `same`. Counted
    from `behind` too: `crcs`, where the CRC32 of the storage stands, and the `directory`."""

    pickle: bytes
    head: bytes
    behind: int
    fixed: tuple[slice, ...]
    same: bytes
    crcs: tuple[slice, slice]
    directory: slice

    @staticmethod
    def of(zip: Reader, storage: Extent) -> Form | None:
        """The form of a zip that was read whole, with one storage; None where it is not as torch writes them,
        with a checksum behind each record."""
        directory = Directory(zip)
        records, top = directory.records, directory.records.first.partition(b"/")[0] + b"/"
        held, named = records.get(top + b"data/" + storage.key.encode()), records.get(top + _PICKLE)
        if held is None or named is None or held.size != storage.nbytes:
            return None
        if not held.flags & STREAMED or not held.crc:
            return None
        begin = storage.offset - zip.begin
        behind = begin + storage.nbytes
        start = directory.start - behind
        crcs = _crc(_IN_DESCRIPTOR), _crc(start + held.at + _IN_ENTRY)
        loose = [*crcs]
        made = records.get(top + _ID)
        if made is not None and made.offset >= behind:
            loose += [slice(made.offset - behind, made.limit - behind), _crc(start + made.at + _IN_ENTRY)]
        pickle = zip.read(directory.locate(top + _PICKLE, named), named.size)
        tail = zip.read(behind, zip.nbytes - behind)
        fixed = _between(loose, len(tail))
        return Form(
            pickle, zip.read(0, begin), behind, fixed, _joined(tail, fixed), crcs,
            slice(start, start + directory.nbytes),
        )  # fmt: skip

    def digest(self, zip: Reader) -> str | None:
        """The digest of a zip of the same size, whose storage then begins behind `head`; None where it is of
        another form."""
        if zip.read(0, len(self.head)) != self.head:
            return None
        tail = zip.read(self.behind, zip.nbytes - self.behind)
        crc, again = (tail[place] for place in self.crcs)
        if crc != again or not any(crc) or _joined(tail, self.fixed) != self.same:
            return None
        return digest(self.pickle, xxhash.xxh3_64_hexdigest(tail[self.directory])).hexdigest()


def digest(pickle: bytes, directory: str) -> xxhash.xxh3_64:
    """The digest of a torch zip: of its pickle, and of the digest of its directory."""
    found = xxhash.xxh3_64(pickle)
    found.update(directory.encode())
    return found


def _crc(at: int) -> slice:
    return slice(at, at + 4)


def _between(loose: Iterable[slice], end: int) -> tuple[slice, ...]:
    """What lies between these ranges of [0, end)."""
    found, at = [], 0
    for part in sorted(loose, key=lambda part: part.start):
        found.append(slice(at, part.start))
        at = part.stop
    return (*found, slice(at, end))


def _joined(data: bytes, parts: Iterable[slice]) -> bytes:
    return b"".join([data[part] for part in parts])
