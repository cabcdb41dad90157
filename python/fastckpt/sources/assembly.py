"""The last step of every source: names, neighbours and digests make what was found a Checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import xxhash

from ..checkpoint import JSON, Checkpoint, Entry, Replica, Saved, config_among
from ..dtypes import DType
from ..errors import SourceError
from ..extents import Extent, Extents, File
from ..paths import is_file, let_go
from ..plainjson import read_json
from ..stored import boxes, strided
from ..views import Rows, View, zeros
from .options import Options

SAMPLES, SAMPLE = 4096, 256
"""The most extents that `sampled` looks into, and the bytes it reads at the start and middle of each."""

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which trainers put a model's state dict."""

BESIDE = (
    "config.json", "hf_quant_config.json", "generation_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "normalizer.json", "tiktoken.model",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files that go with the weights and are copied to an output."""


def assemble(
    path: str,
    format: str,
    entries: Mapping[str, Entry],
    extents: Extents,
    options: Options,
    *,
    aliases: Mapping[str, str] | None = None,
    files: Sequence[File] = (),
    search: Sequence[str] = (),
    saved: Saved | None = None,
    notes: Sequence[str] = (),
    facts: Mapping[str, JSON] | None = None,
    unread: Sequence[str] = (),
    inert: Iterable[str] = (),
    layout: Iterable[bytes] = (),
    headers: Iterable[str] = (),
    replicas: tuple[Replica, ...] = (),
) -> Checkpoint:
    """The Checkpoint of what a source found.

    `search`: directories that may hold config.json and the like, the first one wins. `layout`: what shapes
    the views beyond names, shapes, dtypes and extents. `headers`: digests, in order, of headers and pickles,
    and of what `sampled` saw where those do not cover the values.
    Raises SourceError for names that collide, an alias without its holder, a config.json that is none."""
    aliases = aliases or {}
    for alias, holder in aliases.items():
        if holder not in entries:
            raise SourceError(f"{path}: {alias} is tied to {holder}, which is not there")
        if alias in entries:
            raise SourceError(f"{path}: {alias} is a tensor of its own and is tied to {holder}")
    renamed: Mapping[str, Entry] = entries
    tied = aliases
    if options.rename:
        names = options.names([*entries, *aliases], path)
        renamed, tied = _kept(entries, aliases, names)
        if gone := [n for n, new in names.items() if not new]:
            more = f" and {len(gone) - 8} more" if len(gone) > 8 else ""
            unread = [*unread, f"left out by rename: {', '.join(gone[:8])}{more}"]
        if not renamed:
            raise SourceError(f"{path}: rename= (--rename) leaves out every tensor")
    beside = neighbours(search)
    config = config_among(beside)
    return Checkpoint(
        path=path, format=format, entries=renamed, extents=extents, aliases=tied, files=tuple(files),
        config=None if config is None else read_json(config.path), beside=beside,
        saved=saved or Saved(), notes=tuple(notes),
        facts=facts or {}, unread=tuple(unread), inert=tuple(sorted(set(inert))),
        structure=_structure(format, renamed, tied, extents, layout),
        headers=xxhash.xxh3_64_hexdigest("\n".join(headers).encode()), replicas=replicas,
    )  # fmt: skip


def _kept(
    entries: Mapping[str, Entry], aliases: Mapping[str, str], names: Mapping[str, str]
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and tied names that keep a name; where a holder does not, its first alias is it."""
    kept = {names[n]: e for n, e in entries.items() if names[n]}
    tied: dict[str, str] = {}
    holders = {n: names[n] for n in entries}
    for alias, holder in aliases.items():
        if not (new := names[alias]):
            continue
        if holders[holder]:
            tied[new] = holders[holder]
        else:
            kept[new], holders[holder] = entries[holder], new
    return kept, tied


@dataclass(frozen=True, slots=True)
class Strided:
    """An entry that lies strided in one extent, by default dense from its start; offset and stride in
    elements. An empty one needs none."""

    shape: tuple[int, ...]
    dtype: DType
    extents: Extents
    extent: int
    offset: int = 0
    stride: tuple[int, ...] | None = None
    kind: str = "parameter"

    def build(self) -> View:
        """Its view. Raises SourceError where it leaves its extent."""
        if 0 in self.shape:
            return zeros(self.shape, self.dtype)
        return strided(
            self.extents, self.extent, self.dtype, self.shape, offset=self.offset, stride=self.stride
        )


@dataclass(frozen=True, slots=True, eq=False)
class Boxed:
    """An entry that lies in boxes, which tile it: `rows` of a view (`views`)."""

    shape: tuple[int, ...]
    dtype: DType
    extents: Extents
    rows: Rows | Sequence[Sequence[int]]
    kind: str = "parameter"

    def build(self) -> View:
        """Its view."""
        return boxes(self.extents, self.dtype, self.shape, self.rows)


def neighbours(directories: Sequence[str]) -> tuple[File, ...]:
    """The files of BESIDE in these directories, the first directory's where several have one."""
    found = {}
    for directory in reversed(directories):
        for name in BESIDE:
            if is_file(path := os.path.join(directory, name)):
                found[name] = File.at(path)
    return tuple(found[name] for name in BESIDE if name in found)


def sampled(extents: Sequence[Extent]) -> str:
    """Hex digest of a few bytes of the values, and of the files' sizes and times, for formats whose headers
    carry no checksum of the values.

    It tells two checkpoints of one shape apart, and one that was edited from what it was: the parts of a set
    must come from one. Raises SourceError."""
    seen = xxhash.xxh3_64()
    for file in {id(x.where): x.where for x in extents if isinstance(x.where, File)}.values():
        seen.update(f"{os.path.basename(file.path)}\n{file.nbytes} {file.mtime_ns}\n".encode())
    step = -(-len(extents) // SAMPLES) or 1
    descriptor, opened = -1, ""
    try:
        for extent in extents[::step]:
            if not isinstance(extent.where, File):
                continue
            if extent.where.path != opened:
                let_go(descriptor)
                descriptor, opened = os.open(extent.where.path, os.O_RDONLY), extent.where.path
            for at in {0, extent.nbytes // 2}:
                seen.update(os.pread(descriptor, min(SAMPLE, extent.nbytes - at), extent.offset + at))
    except OSError as e:
        raise SourceError(f"{opened or extent.where}: {e.strerror}") from None
    finally:
        let_go(descriptor)
    return str(seen.hexdigest())


def _structure(
    format: str,
    entries: Mapping[str, Entry],
    aliases: Mapping[str, str],
    extents: Extents,
    layout: Iterable[bytes],
) -> str:
    """Hex digest of everything that shapes the views; where a storage lies in its file is no part of it."""
    h = xxhash.xxh3_64()

    def feed(words: Iterable[object]) -> None:
        """One line a word, a stretch of them at a time with its length before it; an empty one at the end."""
        rest = iter(words)
        while some := list(islice(rest, 1 << 10)):
            text = "\n".join(map(repr, some)).encode()
            h.update(b"%d\n" % len(text))
            h.update(text)
        h.update(b"0\n")

    files: dict[int, str] = {}
    for x in extents:
        if id(x.where) not in files:
            files[id(x.where)] = os.path.basename(x.where.path) if isinstance(x.where, File) else ""
    feed([format])
    feed((name, e.shape, e.dtype.name, e.kind) for name, e in entries.items())
    feed(aliases.items())
    feed((files[id(x.where)], x.key, x.nbytes) for x in extents)
    for part in layout:
        feed([part])
    return h.hexdigest()
