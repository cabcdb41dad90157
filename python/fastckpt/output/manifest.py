"""The record of an output: what it was made from and the digest of every byte in it.

Law: a manifest that was read holds together: names stay inside the directory, every tensor lies in
a file of its shard, no two overlap. The schema is described in docs/formats.md.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice, repeat
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import JSON
from ..digest import LEAF, Digesting, digest
from ..dtypes import BY_NAME, DType
from ..errors import SourceError, WriteError
from ..paths import content, inside, is_directory, is_file
from ..plainjson import unique
from .files import SlotTable

SCHEMA = 1
NAME = "fastckpt.json"
"""The commit record: a directory without it is not an output."""
TRACE = ".fastckpt-"
"""What names of unfinished business inside an output directory begin with."""
_MAX_BYTES = 1 << 30
_MAX_NDIM = 64
_LINES = 1 << 10
"""Tensors whose values, and text, are made at once."""
_RANK = re.compile(r"fastckpt-rank-(0|[1-9][0-9]*)\.json")

T = TypeVar("T")


def rank_name(rank: int) -> str:
    """The file name of one rank's record."""
    return f"fastckpt-rank-{rank}.json"


def rank_of(name: str) -> int | None:
    """The rank whose record has that file name; None where it is no such record."""
    found = _RANK.fullmatch(name)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of an output: its path, format, tag and step ("" and None where it has none).

    `headers`: hex digest of the source's headers and pickles."""

    path: str
    format: str
    tag: str = ""
    step: int | None = None
    headers: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """What a run says of itself: source, fastckpt's version, layout, the placement's sizes, options.

    `options["allow_nonfinite"]` true: NaN and Inf in the output are no problem."""

    source: Origin
    version: str
    layout: str
    placement: Mapping[str, int]
    options: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file: its size, and the digest of its bytes that are no tensor's (headers, or all of a text)."""

    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor: where its `nbytes` lie, from `offset` of `file`, and their digest."""

    file: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    digest: str


Row = tuple[str, str, DType, tuple[int, ...], int, int, str]
"""A tensor's name, and what its entry says in that order."""


class TensorTable(Mapping[str, TensorEntry]):
    """The tensors of a rank's files, as columns that read as entries; names must differ."""

    __slots__ = ("_index", "_parts")

    def __init__(self) -> None:
        self._parts: list[tuple[str, SlotTable, NDArray[np.uint64]]] = []
        self._index: dict[str, tuple[int, int]] = {}  # of the first parts, as far as it was needed

    def add(self, file: str, slots: SlotTable, digests: NDArray[np.uint64]) -> None:
        """The tensors of one more file, with the digest of each."""
        self._parts.append((file, slots, digests))
        self._index = {}

    def __getitem__(self, name: str) -> TensorEntry:
        if not self._index:
            slots = enumerate(slots for _, slots, _ in self._parts)
            self._index = {n: (k, i) for k, table in slots for i, n in enumerate(table.names)}
        k, i = self._index[name]
        file, table, digests = self._parts[k]
        return TensorEntry(file, *table.kind(i), f"{digests[i]:016x}")

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(slots.names for _, slots, _ in self._parts)

    def __len__(self) -> int:
        return sum(len(slots) for _, slots, _ in self._parts)

    def items(self) -> ItemsView[str, TensorEntry]:
        """Names and entries, in order; made one by one."""
        return _Items(self)

    def rows(self) -> Iterator[Row]:
        """The same as plain values, for those who want nothing else of very many."""
        for file, slots, digests in self._parts:
            for k in range(0, len(slots), _LINES):
                some = slice(k, k + _LINES)
                kinds = slots.dtypes[some], slots.shapes[some]
                where = slots.offset[some].tolist(), slots.nbytes[some].tolist()
                found = map("{:016x}".format, digests[some].tolist())
                yield from zip(slots.names[some], repeat(file), *kinds, *where, found)


class _Items(ItemsView[str, TensorEntry]):
    _mapping: TensorTable

    def __iter__(self) -> Iterator[tuple[str, TensorEntry]]:
        return ((row[0], TensorEntry(*row[1:])) for row in self._mapping.rows())


@dataclass(frozen=True, slots=True)
class Shard:
    """Everything of one serving rank; `aliases`: further name -> the tensor it is."""

    rank: int
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """An output of `world` ranks, or with fewer shards a part of one.

    `key`: hex digest of the plan, which all parts share. `files`: what belongs to no single rank, such
    as config and tokenizer. `created`: UTC, ISO 8601."""

    key: str
    world: int
    created: str
    record: Record
    files: Mapping[str, FileEntry]
    shards: tuple[Shard, ...]

    @property
    def complete(self) -> bool:
        """Whether every rank is there."""
        return len(self.shards) == self.world and all(s.rank == k for k, s in enumerate(self.shards))

    def all_files(self) -> dict[str, FileEntry]:
        """Every file but the records themselves."""
        return {**self.files, **{name: entry for s in self.shards for name, entry in s.files.items()}}

    def missing(self, directory: str) -> str | None:
        """The first of these files that is not in a directory with its size, in words."""
        for name, entry in self.all_files().items():
            try:
                nbytes = os.stat(os.path.join(directory, name)).st_size
            except OSError as e:
                return f"{name}: {e.strerror}"
            if nbytes != entry.nbytes:
                return f"{name} has {nbytes} bytes, not {entry.nbytes}"
        return None

    def text(self) -> Iterator[bytes]:
        """The JSON in pieces, one file and one tensor a line; its last line digests all before it.

        Raises WriteError for options that are not JSON, before the first piece."""
        try:
            head = _head(self)
        except ValueError as e:
            raise WriteError(f"manifest: options are not plain JSON: {e}") from None
        return _digested(chain([head], _ranks(self.shards)))

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Manifest:
        """The manifest at `path`, or in the directory `path`. Raises SourceError saying what is wrong."""
        name = os.fspath(path)
        name = os.path.join(name, NAME) if is_directory(name) else name
        if not is_file(name):
            raise SourceError(f"{name}: no such file")
        return Manifest.parse(content(name, _MAX_BYTES + 1), name)

    @staticmethod
    def parse(text: bytes, name: str) -> Manifest:
        """The manifest in these bytes, which come from `name`. Raises SourceError saying what is wrong."""
        if len(text) > _MAX_BYTES:
            raise SourceError(f"{name}: a manifest has at most {_MAX_BYTES} bytes")
        head, tail = text[: -len(_TAIL) - 14], text[-len(_TAIL) - 14 :]
        if tail != _TAIL % digest(head).encode():
            raise SourceError(f"{name}: does not have its own digest: it was changed or damaged")
        try:
            return _parsed(json.loads(text, object_pairs_hook=unique, parse_constant=_refused))
        except RecursionError:
            raise SourceError(f"{name}: nested too deep") from None
        except (SourceError, ValueError) as e:
            raise SourceError(f"{name}: {e}") from None


def merged(parts: Sequence[Manifest]) -> Manifest:
    """The manifest of a whole set from those of its ranks, in any order.

    Raises WriteError where they were not made by one plan from one source."""
    parts = sorted(parts, key=lambda m: m.shards[0].rank)
    first, files = parts[0], dict(parts[0].files)
    for part in parts[1:]:
        here = f"rank {part.shards[0].rank}"
        for what, a, b in (
            ("plan key", first.key, part.key),
            ("world", first.world, part.world),
            ("source headers", first.record.source.headers, part.record.source.headers),
        ):
            if a != b:
                raise WriteError(f"{here} was made with {what} {b}, rank {first.shards[0].rank} with {a}")
        for name, entry in part.files.items():
            if files.setdefault(name, entry) != entry:
                raise WriteError(f"{here} has another {name} than the ranks before it")
    shards = tuple(s for p in parts for s in p.shards)
    return replace(first, created=max(p.created for p in parts), files=files, shards=shards)


# ---- writing ----


_TAIL = b'"digest": "%s"\n}\n'


def _digested(text: Iterable[str]) -> Iterator[bytes]:
    """The text in pieces of about a MiB, and the last line."""
    held, digesting = bytearray(), Digesting()
    for part in text:
        held += part.encode()
        if len(held) >= LEAF:
            digesting.add(held)
            yield bytes(held)
            held.clear()
    digesting.add(held)
    yield bytes(held) + _TAIL % digesting.digest().encode()


def _head(m: Manifest) -> str:
    """What stands before the ranks."""
    r = m.record
    source: dict[str, JSON] = {
        "path": r.source.path,
        "format": r.source.format,
        "tag": r.source.tag,
        "step": r.source.step,
        "headers": r.source.headers,
    }
    items: dict[str, str] = {
        "schema": _json(SCHEMA),
        "version": _json(r.version),
        "created": _json(m.created),
        "source": _json(source),
        "key": _json(m.key),
        "layout": _json(r.layout),
        "placement": _json(dict(r.placement)),
        "world": _json(m.world),
        "options": _json(dict(r.options)),
        "files": _files(m.files),
    }
    return "{\n" + "".join(f"{_json(k)}: {v},\n" for k, v in items.items()) + '"ranks": ['


def _ranks(shards: Iterable[Shard]) -> Iterator[str]:
    """The ranks, and the end of their list."""
    for k, s in enumerate(shards):
        before = ",\n" if k else ""
        yield f'{before}{{"rank": {_json(s.rank)},\n"files": {_files(s.files)},\n"tensors": {{'
        rows, before = rows_of(s.tensors), ""
        while some := list(islice(rows, _LINES)):
            lines = [
                f"{_spell(name)}: {{{_kind(file, dtype.name, shape)}, "
                f'"offset": {offset}, "nbytes": {nbytes}, "digest": "{found}"}}'
                for name, file, dtype, shape, offset, nbytes, found in some
            ]
            yield before + ",\n".join(lines)
            before = ",\n"
        yield f'}},\n"aliases": {_json(dict(s.aliases))}}}'
    yield "],\n"


@lru_cache(maxsize=1 << 10)
def _kind(file: str, dtype: str, shape: tuple[int, ...]) -> str:
    """What an entry says of these: many tensors share them."""
    return f'"file": {_spell(file)}, "dtype": "{dtype}", "shape": {list(shape)}'


def rows_of(tensors: Mapping[str, TensorEntry]) -> Iterator[Row]:
    """The tensors as plain values; those that were read are entries already."""
    if isinstance(tensors, TensorTable):
        return tensors.rows()
    return ((n, t.file, t.dtype, t.shape, t.offset, t.nbytes, t.digest) for n, t in tensors.items())


def _files(files: Mapping[str, FileEntry]) -> str:
    entries = (f'{_spell(n)}: {{"nbytes": {f.nbytes}, "digest": "{f.digest}"}}' for n, f in files.items())
    return "{" + ",\n".join(entries) + "}"


_spell = json.encoder.encode_basestring_ascii
"""A string as json.dumps spells it, without its overhead."""


def _json(value: JSON) -> str:
    return json.dumps(value, allow_nan=False)


# ---- reading ----


def _refused(constant: str) -> JSON:
    raise SourceError(f"{constant} is not JSON")


def _get(d: Mapping[str, JSON], key: str, kind: type[T]) -> T:
    """The value of a key, of that very type (a bool is no int)."""
    if key not in d:
        raise SourceError(f"no key {key!r}")
    value = d[key]
    if type(value) is not kind:
        raise SourceError(f"{key}: wanted {kind.__name__}, got {type(value).__name__}")
    return value


def _size(d: Mapping[str, JSON], key: str) -> int:
    n = _get(d, key, int)
    if not 0 <= n < 1 << 62:
        raise SourceError(f"{key}: {n} is no size")
    return n


def _hex(d: Mapping[str, JSON], key: str) -> str:
    text = _get(d, key, str)
    if not re.fullmatch("[0-9a-f]{16}", text):
        raise SourceError(f"{key}: {text[:40]!r} is no digest")
    return text


def _objects(d: Mapping[str, JSON], key: str) -> Iterable[tuple[str, dict[str, JSON]]]:
    for name in (all_of := _get(d, key, dict)):
        yield name, _get(all_of, name, dict)


def _parsed(body: Mapping[str, JSON]) -> Manifest:
    schema = _get(body, "schema", int)
    if schema != SCHEMA:
        raise SourceError(f"schema {schema}; this version reads {SCHEMA}")
    source = _get(body, "source", dict)
    step = source.get("step")
    origin = Origin(
        _get(source, "path", str),
        _get(source, "format", str),
        _get(source, "tag", str),
        None if step is None else _get(source, "step", int),
        _get(source, "headers", str),
    )
    sizes = _get(body, "placement", dict)
    placement = {name: _get(sizes, name, int) for name in sizes}
    record = Record(
        origin, _get(body, "version", str), _get(body, "layout", str), placement, _get(body, "options", dict)
    )
    world = _size(body, "world")
    shards = [_shard(s) for s in _get(body, "ranks", list)]
    ranks = [s.rank for s in shards]
    if ranks != sorted(set(ranks)) or any(r >= world for r in ranks):
        raise SourceError(f"ranks {ranks[:8]} are not ascending ranks below {world}")
    files = _read_files(body)
    names = [*files, *(name for s in shards for name in s.files)]
    if len(set(names)) != len(names):
        raise SourceError("a file belongs to two ranks")
    return Manifest(_get(body, "key", str), world, _get(body, "created", str), record, files, tuple(shards))


def _read_files(d: Mapping[str, JSON]) -> dict[str, FileEntry]:
    out = {name: FileEntry(_size(f, "nbytes"), _hex(f, "digest")) for name, f in _objects(d, "files")}
    for name in out:
        if not inside(name):
            raise SourceError(f"file name {name!r} leaves the directory")
    return out


def _shard(body: JSON) -> Shard:
    if not isinstance(body, dict):
        raise SourceError("a rank is a JSON object")
    rank, files = _size(body, "rank"), _read_files(body)
    tensors: dict[str, TensorEntry] = {}
    for name, t in _objects(body, "tensors"):
        try:
            tensors[name] = _tensor(t, files)
        except SourceError as e:
            raise SourceError(f"rank {rank}: {name}: {e}") from None
    end: dict[str, int] = {}
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < end.get(entry.file, 0):
            raise SourceError(f"rank {rank}: {name} overlaps another tensor of {entry.file}")
        end[entry.file] = entry.offset + entry.nbytes
    names = _get(body, "aliases", dict)
    aliases = {alias: _get(names, alias, str) for alias in names}
    for alias, holder in aliases.items():
        if alias in tensors or holder not in tensors:
            raise SourceError(
                f"rank {rank}: alias {alias} of {holder}: the one must be new, the other a tensor"
            )
    return Shard(rank, files, tensors, aliases)


def _tensor(t: Mapping[str, JSON], files: Mapping[str, FileEntry]) -> TensorEntry:
    file, dtype = _get(t, "file", str), BY_NAME.get(_get(t, "dtype", str))
    shape = tuple(_get(t, "shape", list))
    offset, nbytes = _size(t, "offset"), _size(t, "nbytes")
    if dtype is None:
        raise SourceError(f"no dtype {t['dtype']!r}")
    if len(shape) > _MAX_NDIM or any(type(n) is not int or not 0 <= n < 1 << 62 for n in shape):
        raise SourceError(f"{shape[:8]} is no shape")
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise SourceError(f"shape {shape} of {dtype} is not {nbytes} bytes")
    if file not in files or offset + nbytes > files[file].nbytes:
        raise SourceError(f"bytes [{offset}, {offset + nbytes}) do not lie in a file of the rank ({file})")
    return TensorEntry(file, dtype, shape, offset, nbytes, _hex(t, "digest"))
