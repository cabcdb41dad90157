"""Reads safetensors: a file, a sharded directory with its index, or a directory of files. Headers only.

Law: a header is taken as the format's description says and no laxer: at most 100,000,000 bytes of UTF-8
JSON that begins with {, no key twice, offsets that cover the data without hole or overlap.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xxhash

from ..checkpoint import JSON, Checkpoint, Entry
from ..dtypes import BY_SAFETENSORS, DType, in_elements
from ..errors import SourceError, ViewError
from ..extents import Extent, Extents, File
from ..output.manifest import NAME, TensorEntry
from ..paths import is_directory, is_file, listed
from ..plainjson import parse_json
from .assembly import Strided, assemble, sampled
from .options import Options
from .shards import find_shards

MAX_HEADER = 100_000_000
MAX_NDIM = 64

SUFFIX = ".safetensors"
SINGLE = "model.safetensors"

PIECES = "DCP_SHARDING_INFO"
"""Metadata of a file that holds pieces: where each lies in its tensor, but not how large that is, nor how
many files there are. Source: torch/distributed/checkpoint/hf_storage.py (save_distributed=True)."""

JOINED = "consolidated"
"""Where NeMo Automodel puts the whole model, below the pieces it was joined from."""


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of a file: dtype, shape, first byte in the file, bytes."""

    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors in the order of their data, `__metadata__`, xxh3-64 of the header's bytes."""

    file: File
    items: Mapping[str, Item]
    metadata: Mapping[str, str]
    digest: str


def matches(path: str) -> bool:
    """Whether `path` is a safetensors file, its index, or a directory that holds such files."""
    if is_directory(path):
        return bool(listed(path, "*" + SUFFIX))
    return path.endswith((SUFFIX, SUFFIX + ".index.json"))


def whole_model(path: str) -> bool:
    """Whether a directory holds the files save_pretrained gives a model."""
    return any(is_file(os.path.join(path, name)) for name in (SINGLE, SINGLE + ".index.json"))


def read(path: str, options: Options) -> Checkpoint:
    """The checkpoint in a file or directory. Raises SourceError."""
    options.refuse_zero_only(path)
    options.refuse_crc(path)
    shards = find_shards(path, SUFFIX, SINGLE, options)
    headers = [read_header(p) for p in shards.paths]
    pieces = [h for h in headers if PIECES in h.metadata]
    if pieces and shards.index is None:
        joined = os.path.join(os.path.dirname(pieces[0].file.path), JOINED)
        way = f"open {joined}" if whole_model(joined) else "torch's consolidate_safetensors_files joins them"
        raise SourceError(
            f"{pieces[0].file.path}: holds pieces of tensors, one rank's of a torch.distributed.checkpoint "
            f"save; {way}"
        )
    shards.check([list(h.items) for h in headers])
    held = sum(i.nbytes for h in headers for i in h.items.values())
    if pieces and held != shards.total:
        raise SourceError(
            f"{path}: its files hold {held} bytes, the index says {shards.total}: ranks wrote their pieces "
            "over one another's"
        )
    shards.check_omitted(lambda p: list(read_header(p).items))
    extents, entries = tensors([(name, item, h.file) for h in headers for name, item in h.items.items()])
    metadata: dict[str, JSON] = {k: v for h in headers for k, v in h.metadata.items() if k != PIECES}
    return assemble(
        path, "safetensors", entries, extents, options, files=[h.file for h in headers],
        search=[shards.directory], facts={"metadata": metadata}, unread=shards.unread,
        headers=[*(h.digest for h in headers), sampled(list(extents))],
    )  # fmt: skip


def tensors(items: Sequence[tuple[str, Item, File]]) -> tuple[Extents, dict[str, Entry]]:
    """An extent and an entry for each (name, place, file); names differ."""
    extents = Extents(Extent(file, item.offset, item.nbytes, name) for name, item, file in items)
    return extents, {n: Strided(i.shape, i.dtype, extents, k) for k, (n, i, _) in enumerate(items)}


def read_header(path: str) -> Header:
    """The header of a safetensors file. Raises SourceError saying which rule is broken."""
    file = File.at(path)
    try:
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if file.nbytes < 8:
                raise SourceError(f"{path}: {file.nbytes} bytes are too few for a safetensors file")
            if size > min(MAX_HEADER, file.nbytes - 8):
                raise SourceError(
                    f"{path}: header of {size} bytes in a file of {file.nbytes}; limit {MAX_HEADER}"
                )
            raw = f.read(size)
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}") from None
    if len(raw) != size or not raw.startswith(b"{"):
        raise SourceError(f"{path}: header begins with {raw[:8]!r}, wanted {{; or it ends early")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise SourceError(f"{path}: header is no UTF-8: {e}") from None
    table = parse_json(raw, path)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SourceError(f"{path}: __metadata__ is no map of strings")
    # What was parsed of a tensor is let go at once: of 10^5 it takes more than all that is kept.
    items = {name: _item(name, table.pop(name), 8 + size, path) for name in list(table)}
    ordered = dict(sorted(items.items(), key=lambda kv: (kv[1].offset, kv[1].nbytes)))
    at = 8 + size
    for name, item in ordered.items():
        if item.offset != at:
            what = "a hole before" if item.offset > at else "an overlap at"
            raise SourceError(f"{path}: {what} {name}: data at byte {item.offset}, wanted {at}")
        at += item.nbytes
    if at != file.nbytes:
        raise SourceError(f"{path}: data ends at byte {at}, the file has {file.nbytes}")
    return Header(file, ordered, {k: str(v) for k, v in metadata.items()}, xxhash.xxh3_64_hexdigest(raw))


def require(item: Item, entry: TensorEntry, where: str) -> None:
    """Raises SourceError where a file's header and the record of what was written say two things."""
    said = entry.dtype, entry.shape, entry.offset, entry.nbytes
    if (item.dtype, item.shape, item.offset, item.nbytes) != said:
        raise SourceError(
            f"{where} is {item.dtype}{list(item.shape)} at byte {item.offset}, "
            f"{NAME} says {entry.dtype}{list(entry.shape)} at {entry.offset}"
        )


def _item(name: str, spec: JSON, base: int, path: str) -> Item:
    if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "data_offsets"}:
        raise SourceError(f"{path}: {name[:80]!r}: wanted dtype, shape and data_offsets")
    dtype = BY_SAFETENSORS.get(str(spec["dtype"]))
    if dtype is None:
        raise SourceError(f"{path}: {name}: dtype {spec['dtype']!r} is none of {', '.join(BY_SAFETENSORS)}")
    shape, span = _ints(spec["shape"]), _ints(spec["data_offsets"])
    if shape is None or span is None or len(span) != 2 or span[1] < span[0] or len(shape) > MAX_NDIM:
        raise SourceError(
            f"{path}: {name}: shape {spec['shape']}, data_offsets {spec['data_offsets']} are no tensor's"
        )
    try:
        shape = in_elements(dtype, shape)
    except ViewError as e:
        raise SourceError(f"{path}: {name}: {e}") from None
    wanted = math.prod(shape) * dtype.itemsize
    if span[1] - span[0] != wanted:
        raise SourceError(
            f"{path}: {name}: {span[1] - span[0]} bytes for {dtype}{list(shape)}, wanted {wanted}"
        )
    return Item(dtype, shape, base + span[0], wanted)


def _ints(value: JSON) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    out = [n for n in value if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62]
    return tuple(out) if len(out) == len(value) else None
