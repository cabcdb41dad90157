"""Torch files (`torch.save`) without executing them: the pickled tree, and where each storage lies.

Law: a file is read by position, its pickle and headers only (with `check_crc` the wanted storages too);
storages that were not wanted are not touched. Whatever is wrong in the file is a SourceError naming it.

Two containers: the zip that torch writes since 1.6, and the legacy stream before (one pickle after
another, then the storages). Source: torch/serialization.py `_load` and `_legacy_load` of torch 2.13.
"""

from __future__ import annotations

import os
import struct
from collections.abc import MutableMapping
from dataclasses import dataclass, field

import xxhash

from ...digest import crc32
from ...errors import SourceError, naming
from ...extents import Extent, File
from ...paths import content, is_file
from ..assembly import sampled
from . import inertpickle, torchpickle
from .forms import Form, digest
from .inert import Inert, type_name
from .picklemachine import Short
from .torchpickle import Storage, Tensor, Tree, Wanted
from .torchzip import LOCAL, Directory, Reader, require_crc

__all__ = [
    "Inert",
    "Known",
    "Reader",
    "Storage",
    "Tensor",
    "TorchFile",
    "Tree",
    "Wanted",
    "embedded",
    "is_torch_file",
    "load",
    "pickled",
    "type_name",
]

MAX_PICKLE = 1 << 30
"""The longest pickle, in bytes."""

_FORMS = 16
"""The most forms of zips of one size that are told apart."""

_HEAD = 16 << 10
_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # LONG1 0x1950a86a20f9469cfc6c and STOP
_MAGIC_WITHIN = 32
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A torch file, opened.

    `root`: what was saved: plain values, Tensor, Storage, Inert. `extents`: one for each wanted storage
    that holds bytes; `Storage.extent` is the index, `Extent.key` the storage's key. `inert`: sorted
    names of the globals that stayed inert. `digest`: xxh3-64, hexadecimal, of the pickle and the zip
    directory, which holds the CRC32 of every storage (of a legacy file: of the pickles and of samples).
    `saved_as`: what a zip's records stand under: the name, without its ending, of the file that torch saved
    it as, `archive` where it was saved to a stream (caffe2/serialize/inline_container.cc); else empty."""

    root: object
    file: File
    extents: tuple[Extent, ...]
    inert: tuple[str, ...]
    digest: str
    saved_as: str = ""


def load(
    path: str | os.PathLike[str],
    *,
    check_crc: bool = False,
    wanted: Wanted | None = None,
    known: MutableMapping[bytes, Tree] | None = None,
) -> TorchFile:
    """The tree of a torch file and the extents of the tensors that `wanted` picks out of it.

    `wanted`: root -> tensors; without it every storage gets an extent. `known`: shares the trees of
    byte-identical pickles between loads that pass the same `wanted`; such files then share `root`.
    `check_crc`: also reads the wanted storages and compares their CRC32 with the file's, as the pickle's is.
    Raises SourceError, naming the path, for a file that is missing, no torch file, broken or too large."""
    file = File.at(path)
    with Reader(file) as reader, naming(file.path):
        head = reader.read(0, min(file.nbytes, _HEAD))  # small files: pickle and all
        if head[:4] == LOCAL:
            return _load_zip(reader, check_crc, wanted, known)
        if _MAGIC in head[:_MAGIC_WITHIN]:
            if check_crc:
                raise SourceError("a legacy torch file (not a zip) holds no checksums to compare")
            return _load_legacy(reader, wanted)
        if head[257:262] == b"ustar":
            raise SourceError(
                "a tar file of torch before 0.1.10; torch.load and torch.save it again to convert it"
            )
        raise SourceError(f"no torch file: it {f'starts with {head[:8]!r}' if head else 'has 0 bytes'}")


@dataclass(frozen=True, slots=True)
class Known:
    """What was read of one save's zips so far: trees by their pickles, and by their sizes the zips that the
    next ones are held against."""

    trees: dict[bytes, Tree] = field(default_factory=dict)
    forms: dict[int, list[tuple[Form, TorchFile]]] = field(default_factory=dict)


def embedded(reader: Reader, offset: int, nbytes: int, *, check_crc: bool, known: Known) -> TorchFile:
    """The torch zip that `nbytes` from `offset` of an open file are; the rest as in `load`. One of a form
    that is `known` shares the root of the first.

    Raises SourceError, which does not name the path."""
    window = reader.window(offset, nbytes)
    forms = known.forms.setdefault(nbytes, [])
    for form, first in forms if not check_crc else ():
        if (told := form.digest(window)) is not None:
            (of,) = first.extents
            extent = Extent(reader.file, window.begin + len(form.head), of.nbytes, of.key)
            return TorchFile(first.root, reader.file, (extent,), first.inert, told, first.saved_as)
    head = window.read(0, min(nbytes, 10))
    if not head.startswith(LOCAL):
        what = " (safetensors, SerializationFormat.SAFETENSORS)" if head[8:] == b'{"' else ""
        raise SourceError(f"no torch file: it starts with {head!r}{what}")
    found = _load_zip(window, check_crc, None, known.trees)
    if len(found.extents) == 1 and len(forms) < _FORMS:
        learned = Form.of(window, found.extents[0])
        forms += [(learned, found)] if learned else []
    return found


def pickled(path: str, *, save: int) -> tuple[object, str]:
    """(tree, digest) of a file that is one pickle, without tensors; an Inert may be a key. What may be built
    is limited by the bytes of the whole `save`.

    Raises SourceError, which does not name the path."""
    file = File.at(path)
    if file.nbytes > MAX_PICKLE:
        raise SourceError(f"has {file.nbytes} bytes; the limit is {MAX_PICKLE}")
    with Reader(file) as reader:
        data = reader.read_through(0, file.nbytes)
    return torchpickle.parse(data, file=save, record_keys=True).root, xxhash.xxh3_64_hexdigest(data)


def is_torch_file(path: str | os.PathLike[str]) -> bool:
    """Whether the file starts as torch files do (a zip record, or the legacy magic number)."""
    if not is_file(path):  # a pipe would be waited for
        return False
    head = content(os.fspath(path), _MAGIC_WITHIN)
    return head[:4] == LOCAL or _MAGIC in head


# ---- zip ----


def _load_zip(
    reader: Reader, check_crc: bool, wanted: Wanted | None, known: MutableMapping[bytes, Tree] | None
) -> TorchFile:
    directory = Directory(reader)
    records = directory.records
    top = records.first.partition(b"/")[0] + b"/"
    pickle = top + b"data.pkl"
    if records.get(top + b"constants.pkl") is not None:
        raise SourceError("a TorchScript archive (torch.jit.save); it holds a program, not a checkpoint")
    record = records.get(pickle)
    if record is None:
        raise SourceError(f"a zip file without {pickle.decode(errors='replace')}; not written by torch.save")
    _check_byteorder(reader, directory, top + b"byteorder")
    at, size = directory.locate(pickle, record), record.size
    if size > MAX_PICKLE:
        raise SourceError(f"its pickle has {size} bytes; the limit is {MAX_PICKLE}")
    data = reader.read(at, size)
    if record.crc:  # it says where every byte of a tensor lies
        require_crc(pickle, record, crc32(data))
    elif check_crc:
        directory.check_crc(pickle, record, at)
    tree = _parsed(data, wanted, known, reader.nbytes)
    extents, summed = [], True
    for s in tree.storages:
        name = top + b"data/" + s.key.encode(errors="surrogatepass")
        record = records.get(name)
        if record is None:
            raise SourceError(f"no record data/{s.key} for a storage of {s.nbytes} bytes")
        if record.size < s.nbytes:
            raise SourceError(f"record data/{s.key} has {record.size} bytes, its storage {s.nbytes}")
        offset = directory.locate(name, record)
        if check_crc:
            directory.check_crc(name, record, offset)
        extents.append(Extent(reader.file, reader.begin + offset, s.nbytes, s.key))
        summed &= record.crc != 0 or record.size == 0
    told = digest(data, directory.digest)
    if not summed:
        told.update(sampled(extents).encode())
    saved_as = top[:-1].decode(errors="replace")
    return TorchFile(tree.root, reader.file, tuple(extents), tree.inert, told.hexdigest(), saved_as)


def _check_byteorder(reader: Reader, directory: Directory, name: bytes) -> None:
    record = directory.records.get(name)
    if record is not None:
        order = reader.read(directory.locate(name, record), min(record.size, 16))
        if order != b"little":
            raise SourceError(f"its bytes are in {order!r} order; wanted little")


def _parsed(data: bytes, wanted: Wanted | None, known: MutableMapping[bytes, Tree] | None, file: int) -> Tree:
    if known is None:
        return _whole(data, wanted, file)
    tree = known.get(data)
    if tree is None:
        tree = known[data] = _whole(data, wanted, file)
    return tree


def _whole(data: bytes, wanted: Wanted | None, file: int) -> Tree:
    tree = torchpickle.parse(data, wanted=wanted, file=file)
    if tree.end != len(data):
        raise SourceError(f"its pickle ends at byte {tree.end} of {len(data)}")
    return tree


# ---- legacy ----


def _load_legacy(reader: Reader, wanted: Wanted | None) -> TorchFile:
    total = reader.file.nbytes
    n = 1 << 20
    while True:  # how long the pickles are is known only when they were read
        data = reader.read_through(0, min(n, total))
        try:
            tree, keys, end = _legacy_pickles(data, wanted, total)
            break
        except Short as e:
            if n >= total:
                raise SourceError(f"truncated: {e}") from None
            if n >= MAX_PICKLE:
                raise SourceError(f"its pickles have more than {MAX_PICKLE} bytes") from None
            n *= 4
    places, at = {}, end
    for key in keys:
        places[key] = at + 8
        at += 8 + tree.held[key]
    if at != total:
        raise SourceError(f"its storages end at byte {at}; the file has {total}")
    extents = []
    for s in tree.storages:
        part = tree.slices.get(s.key)
        holder, offset = (part.key, part.offset) if part else (s.key, 0)
        _check_count(reader, places[holder] - 8, holder, tree.held[holder], s)
        extents.append(Extent(reader.file, places[holder] + offset, s.nbytes, s.key))
    digest = xxhash.xxh3_64(data[:end])
    digest.update(sampled(extents).encode())  # there are no checksums in these files
    return TorchFile(tree.root, reader.file, tuple(extents), tree.inert, digest.hexdigest())


def _legacy_pickles(data: bytes, wanted: Wanted | None, file: int) -> tuple[Tree, list[str], int]:
    """(the tree, storage keys in file order, where the storages begin) of a legacy file's pickles."""
    magic = inertpickle.parse(data)
    protocol = inertpickle.parse(data, magic.end)
    if magic.root != _MAGIC_NUMBER or protocol.root != _LEGACY_PROTOCOL:
        raise SourceError(f"legacy protocol {protocol.root!r}; wanted {_LEGACY_PROTOCOL}")
    system = inertpickle.parse(data, protocol.end)
    if not isinstance(system.root, dict) or system.root.get("little_endian") is not True:
        raise SourceError("a legacy file whose bytes are not in little order")
    tree = torchpickle.parse(data, system.end, legacy=True, wanted=wanted, file=file)
    listed = inertpickle.parse(data, tree.end, file=file)
    keys = listed.root
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise SourceError("its list of storage keys is no list of strings")
    if len(keys) != len(tree.held) or set(keys) != tree.held.keys():
        raise SourceError(f"it lists {len(keys)} storages, its pickle names {len(tree.held)} or others")
    return tree, keys, listed.end


def _check_count(reader: Reader, at: int, key: str, nbytes: int, storage: Storage) -> None:
    """The count in front of a legacy storage, in elements, must be what the pickle says."""
    (count,) = struct.unpack("<q", reader.read(at, 8))
    itemsize = storage.dtype.itemsize if storage.dtype else 1
    if count * itemsize != nbytes:
        raise SourceError(
            f"storage {key} has {count} elements of {itemsize} bytes, but {nbytes} bytes in the pickle"
        )
