"""The zip container of torch files: where each record's bytes lie, from the central directory.

Law: a record's place is given out only after its own header, its descriptor and the central directory
agree on it; records are stored, unencrypted, of unique names, inside the file, and none overlaps another.

Source of the format: APPNOTE.TXT 6.3 sections 4.3 and 4.5.3; what torch writes of it (flag bit 3, padding
in the local extra field, 16 and 24 byte descriptors) was seen in files of torch 2.13.
"""

from __future__ import annotations

import os
import struct

import xxhash

from ...digest import crc32
from ...errors import SourceError
from ...extents import File
from ...paths import let_go
from .zipentries import FULL16, FULL32, STREAMED, Entries, Record, zip64

MAX_DIRECTORY = 256 << 20
"""The longest central directory, in bytes."""

MAX_RECORDS = 1 << 20
"""The most records in one file."""

LOCAL = b"PK\x03\x04"
_DESCRIPTOR = b"PK\x07\x08"
_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_TAIL = 16 << 10
_AHEAD = 4 << 10
_CHUNK = 4 << 20


class Reader:
    """Positioned reads of one file, or of a window of one; the last block read is kept for the next.

    Offsets count from the start of the window, which begins at byte `begin` of the file and has `nbytes`."""

    __slots__ = ("_block", "_start", "begin", "fd", "file", "nbytes")

    def __init__(self, file: File) -> None:
        """Opens `file`; close it with `with`. Raises SourceError when the system does or the file changed."""
        self.file, self.begin, self.nbytes = file, 0, file.nbytes
        self._start, self._block = 0, b""
        self.fd = -1
        try:
            self.fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            s = os.fstat(self.fd)
        except OSError as e:
            let_go(self.fd)
            raise SourceError(f"{file.path}: {e.strerror}") from None
        if (s.st_size, s.st_mtime_ns, s.st_ino) != (file.nbytes, file.mtime_ns, file.inode):
            let_go(self.fd)
            raise SourceError(f"{file.path}: it changed while it was opened")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        let_go(self.fd)

    def window(self, begin: int, nbytes: int) -> Reader:
        """A reader of `nbytes` from `begin`, good as long as this one is open. Raises SourceError where the
        file has no such bytes."""
        if begin < 0 or nbytes < 0 or begin + nbytes > self.nbytes:
            raise SourceError(f"bytes [{begin}, {begin + nbytes}) are outside a file of {self.nbytes}")
        found = Reader.__new__(Reader)
        found.file, found.begin, found.nbytes, found.fd = self.file, self.begin + begin, nbytes, self.fd
        found._start, found._block = 0, b""
        return found

    def read(self, offset: int, n: int) -> bytes:
        """`n` bytes from `offset`, out of the kept block where it has them."""
        at = offset - self._start
        if at < 0 or at + n > len(self._block):
            self._block = self.read_through(offset, min(max(n, _AHEAD), self.nbytes - offset), n)
            self._start, at = offset, 0
        return self._block[at : at + n]

    def read_through(self, offset: int, n: int, needed: int | None = None) -> bytes:
        """`n` bytes from `offset`, nothing kept. Raises SourceError when there are fewer than `needed`."""
        needed = n if needed is None else needed
        if offset < 0 or n < 0 or offset + needed > self.nbytes:
            raise SourceError(f"bytes [{offset}, {offset + needed}) are outside a file of {self.nbytes}")
        parts: list[bytes] = []
        got = 0
        while got < n:
            try:
                part = os.pread(self.fd, n - got, self.begin + offset + got)
            except OSError as e:
                raise SourceError(f"reading at {offset + got}: {e.strerror}") from None
            if not part:
                break
            parts.append(part)
            got += len(part)
        if got < needed:
            raise SourceError(
                f"the file, of {self.file.nbytes} bytes, now ends at {self.begin + offset + got}"
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def crc32(self, offset: int, n: int) -> int:
        """The CRC32 of `n` bytes from `offset`, read in chunks."""
        crc = 0
        for at in range(offset, offset + n, _CHUNK):
            crc = crc32(self.read_through(at, min(_CHUNK, offset + n - at)), crc)
        return crc


def require_crc(name: bytes, record: Record, crc: int) -> None:
    """Raises SourceError where a record's bytes have another CRC32 than the file says."""
    if crc != record.crc:
        raise SourceError(
            f"record {name.decode(errors='replace')}: its bytes have CRC32 {crc:08x}, "
            f"the file says {record.crc:08x}"
        )


class Directory:
    """The central directory of a zip file, which begins at byte `start` and has `nbytes`: records by name,
    checked as the module says; `digest` is the xxh3-64 of its bytes, hexadecimal."""

    __slots__ = ("_reader", "digest", "nbytes", "records", "start")

    def __init__(self, reader: Reader) -> None:
        """Reads the directory at the end of the file. Raises SourceError for what is not as it should be."""
        self._reader = reader
        self.start, raw, count = _central(reader)
        self.records = Entries(raw, count, self.start)
        self.nbytes = len(raw)
        self.digest = xxhash.xxh3_64_hexdigest(raw)

    def locate(self, name: bytes, record: Record) -> int:
        """The offset of the first byte of a record, after its local header and descriptor were checked."""
        reader = self._reader
        head = reader.read(record.offset, 30)
        flags, method, crc, packed, size, name_len, extra_len = struct.unpack("<6xHH4xIIIHH", head)
        data: int = record.offset + 30 + name_len + extra_len
        shown = name.decode(errors="replace")
        if head[:4] != LOCAL:
            raise SourceError(f"record {shown}: no local header at {record.offset}")
        if data + record.size > record.limit:
            raise SourceError(
                f"record {shown}: its bytes [{data}, {data + record.size}) run into {record.limit}, "
                "where another record begins"
            )
        rest = reader.read(record.offset + 30, name_len + extra_len)
        if rest[:name_len] != name:
            raise SourceError(f"record {shown}: its local header names {rest[:name_len]!r}")
        if method != 0 or flags != record.flags:
            raise SourceError(
                f"record {shown}: local flags 0x{flags:04x} and method {method}, "
                f"central 0x{record.flags:04x} and 0"
            )
        wide = zip64(rest[name_len:], shown)
        if record.flags & STREAMED:
            said = crc in (0, record.crc) and all(
                n in (0, FULL32, record.size) for n in (packed, size)
            )  # zero, and given behind the data instead
        else:
            sizes = [size, packed]
            for k in (0, 1):
                if sizes[k] == FULL32 and wide:
                    sizes[k] = wide.pop(0)
            said = crc == record.crc and sizes == [record.size, record.size]
        if not said:
            raise SourceError(f"record {shown}: its local header disagrees with the directory on size or CRC")
        if record.flags & STREAMED:
            self._check_descriptor(shown, data + record.size, record)
        return data

    def check_crc(self, name: bytes, record: Record, data: int) -> None:
        """Reads a record, whose bytes begin at `data`; raises SourceError when its CRC32 is another."""
        if record.crc == 0 and record.size:
            raise SourceError(
                f"record {name.decode(errors='replace')}: holds no checksum to compare: saved after "
                "torch.serialization.set_crc32_options(False)"
            )
        require_crc(name, record, self._reader.crc32(data, record.size))

    def _check_descriptor(self, shown: str, at: int, record: Record) -> None:
        found = self._reader.read(at, min(24, record.limit - at))
        long = struct.pack("<4sIQQ", _DESCRIPTOR, record.crc, record.size, record.size)
        short = long[:0]
        if record.size < FULL32:
            short = struct.pack("<4sIII", _DESCRIPTOR, record.crc, record.size, record.size)
        if found != long and (not short or found[:16] != short):
            raise SourceError(f"record {shown}: its descriptor at {at} disagrees with the directory")


def _central(reader: Reader) -> tuple[int, bytes, int]:
    """(offset, bytes, entries) of the central directory, which must end where the end records begin."""
    total = reader.nbytes
    n = min(_TAIL, total)
    tail = reader.read_through(total - n, n)
    if n < 22 or tail[-22:-18] != _END:
        raise SourceError(f"no zip end record at the end of its {total} bytes: truncated, or no torch file")
    disk, disk0, here, count, size, start, comment = struct.unpack("<HHHHIIH", tail[-18:])
    end = total - 22
    if n >= 98 and tail[-42:-38] == _LOCATOR:
        first, end64, disks = struct.unpack("<IQI", tail[-38:-22])
        wide = tail[-98:-42]
        if end64 != total - 98 or wide[:4] != _END64 or struct.unpack("<Q", wide[4:12])[0] != 44:
            raise SourceError("the zip64 end record is not where its locator says")
        disk64, disk640, here64, count64, size64, start64 = struct.unpack("<IIQQQQ", wide[16:])
        agree = (
            here in (here64, FULL16)
            and count in (count64, FULL16)
            and size in (size64, FULL32)
            and start in (start64, FULL32)
        )
        if first or disks > 1 or disk64 or disk640 or not agree:
            raise SourceError("the zip and zip64 end records disagree")
        here, count, size, start, end = here64, count64, size64, start64, end64
    if disk or disk0 or here != count or comment:
        raise SourceError("the zip end record speaks of several disks or a comment")
    if start + size != end or size > MAX_DIRECTORY or count > MAX_RECORDS:
        raise SourceError(
            f"the zip directory of {count} records lies at [{start}, {start + size}); it must end at {end} "
            f"and have at most {MAX_RECORDS} records in {MAX_DIRECTORY} bytes"
        )
    have = total - n
    raw = tail[start - have : end - have] if start >= have else reader.read_through(start, size)
    return start, raw, count
