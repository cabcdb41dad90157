"""Reads a commit of the training side (docs/manager.md): the model that was saved in it.

The model is the state's only module, under its own names; of several modules each tensor keeps the name of
its place in the state; a state of no module is its tensors. A DeepSpeed engine's files are a ZeRO checkpoint
and read as one. What each rank had of its own is no part of a model.

Law: what says where bytes lie (the record, the table of shared tensors, the tree) is taken only with the
digest under which it was committed, and files' headers must say the same. Tensors are not read here; `verify`
proves them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..checkpoint import JSON, Checkpoint, Saved
from ..digest import digest
from ..dtypes import BY_NAME, DType
from ..errors import SourceError, naming
from ..extents import Extent, Extents, File
from ..output.manifest import NAME, Manifest, TensorEntry
from ..paths import content, is_file
from ..plainjson import parse_json
from ..stored import check_tiles
from ..views import dense_strides
from . import zero
from .assembly import Boxed, assemble
from .options import Options
from .plain_values import integers

if TYPE_CHECKING:
    from .safetensors import Header

SCHEMA = 1
LAYOUT = "training"
"""What the record of a commit says in place of a serving layout."""
TABLE = "tensors.json"
"""The file that says which tensors are shared by ranks, and who holds which box."""
ENGINE, STATE = "engine", "state"
"""Tags of a tree: a DeepSpeed engine, and any other object with a state dict."""
_OF_RANK = re.compile(r"rank-(\d+)/.+")
_MAX_BYTES = 1 << 30

Sizes = tuple[int, ...]


def rank_directory(rank: int) -> str:
    """Where a rank's part lies in a commit."""
    return f"rank-{rank:05d}"


def engine_directory(name: str) -> str:
    """Where an engine's files lie in a commit."""
    return f"engine-{name}" if name else "engine"


def matches(path: str) -> bool:
    """Whether `path` is a directory with a commit record and the table of a training commit."""
    return all(is_file(os.path.join(path, name)) for name in (NAME, TABLE))


def read(path: str, options: Options) -> Checkpoint:
    """The model in a commit. Raises SourceError where the commit is not whole or holds no model."""
    manifest = Manifest.read(path)
    if manifest.record.layout != LAYOUT or not manifest.shards or not manifest.complete:
        raise SourceError(f"{os.path.join(path, NAME)}: is no whole training commit")
    commit = CommitFiles(path, manifest)
    state = commit.state(0)
    parts = parts_of(state.get("tree"))
    engines = [key for key, kind in parts.items() if kind == ENGINE]
    modules = [key for key, kind in parts.items() if kind == "module"]
    if engines and not modules:
        if len(engines) > 1:
            raise SourceError(f"{path}: {len(engines)} engines; open the directory of one of them")
        found = zero.read(os.path.join(path, engine_directory(engines[0])), options)
        return replace(found, facts={**found.facts, "commit": path})
    options.refuse_zero_only(path)
    options.refuse_also(path)
    options.refuse_crc(path)
    tied = aliases_of(state)
    for alias, holder in tied.items():
        if alias in commit.table:
            raise SourceError(f"{path}: {alias} is a tensor of its own and is tied to {holder}")
    names = names_in(state.get("tree"))
    chosen = [n for n in names if not modules or any(not m or n.startswith(f"{m}.") for m in modules)]
    own = [n for n in chosen if tied.get(n, n) not in commit.table]
    if not chosen or len(own) == len(chosen):
        raise SourceError(f"{path}: no tensor of a model, or each rank has its own of all {len(chosen)}")
    if own and modules:
        raise SourceError(f"{path}: {own[0]} differs from rank to rank ({len(own)} such in all)")
    cut = len(modules[0]) + 1 if len(modules) == 1 and modules[0] else 0
    rest = len(names) - len(chosen)
    unread = [f"{rest} tensors that are not the model's (optimizer and the like)"] if rest else []
    unread += [f"{n}: each rank has its own" for n in own]
    held = {n[cut:]: tied.get(n, n) for n in chosen if tied.get(n, n) in commit.table}
    return commit.checkpoint(held, options, unread=unread)


@dataclass(frozen=True, slots=True)
class Shared:
    """A tensor that is not one rank's own: `boxes` (owner, offset, shape); one box is the whole tensor where
    every rank holds it. There is one owner a box on each disk."""

    dtype: DType
    shape: Sizes
    boxes: tuple[tuple[int, Sizes, Sizes], ...]
    everywhere: bool

    def json(self) -> JSON:
        """For the table."""
        boxes: list[JSON] = [[r, list(o), list(s)] for r, o, s in self.boxes]
        kind: dict[str, JSON] = {"dtype": self.dtype.name, "shape": list(self.shape)}
        return {**kind, "everywhere": self.everywhere, "boxes": boxes}

    @staticmethod
    def of(where: str, said: JSON) -> Shared:
        """From the table. Raises SourceError for anything else."""
        match said:
            case {
                "dtype": str(dtype),
                "shape": list(shape),
                "everywhere": bool(everywhere),
                "boxes": list(listed),
            } if dtype in BY_NAME:
                found = tuple(_box(where, box) for box in listed)
            case _:
                raise SourceError(f"{where}: {said!r:.80} is no entry of {TABLE}")
        if any(len(sizes) != len(shape) for _, *box in found for sizes in box):
            raise SourceError(f"{where}: a box of other axes than {shape}")
        return Shared(BY_NAME[dtype], integers(shape, where), found, everywhere)


class CommitFiles:
    """A commit's own files, each as it was committed. `manifest`: its record."""

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._files = manifest.all_files()
        self._headers: dict[str, Header] = {}

    def document(self, name: str) -> dict[str, JSON]:
        """A JSON file of it. Raises SourceError where it is not the one committed."""
        entry = self._files.get(name)
        if entry is None:
            raise SourceError(f"{self.path}: no {name} in the commit; it holds {len(self._files)} files")
        where = os.path.join(self.path, name)
        data = content(where, _MAX_BYTES)
        if digest(data) != entry.digest:
            raise SourceError(f"{self.path}: {name}: its bytes differ from the commit's digest")
        return parse_json(data, where)

    def state(self, rank: int) -> dict[str, JSON]:
        """What a rank saved but for its tensors: their tree, and their tied names."""
        state = self.document(f"{rank_directory(rank)}/state.json")
        if state.get("schema") != SCHEMA or state.get("rank") != rank or "tree" not in state:
            raise SourceError(
                f"{self.path}: state of rank {rank}: schema {state.get('schema')}, rank {state.get('rank')}; "
                f"wanted schema {SCHEMA}"
            )
        return state

    @cached_property
    def table(self) -> dict[str, Shared]:
        """The tensors that ranks share, by name."""
        return {n: Shared.of(f"{self.path}: {n}", said) for n, said in self.document(TABLE).items()}

    @cached_property
    def places(self) -> dict[tuple[int, str], TensorEntry]:
        """(rank, name) -> where what the rank wrote of a tensor lies, on this disk."""
        out = {}
        for shard in self.manifest.shards:
            for name, entry in shard.tensors.items():
                found = _OF_RANK.fullmatch(entry.file)
                if found is None:
                    raise SourceError(f"{self.path}: {name} lies in {entry.file}, which is no rank's file")
                out[int(found[1]), name] = entry
        return out

    def entry(self, rank: int, name: str) -> TensorEntry:
        """Where the part of a tensor that a rank wrote lies. Raises SourceError where it is not here."""
        found = self.places.get((rank, name))
        if found is None:
            raise SourceError(
                f"{self.path}: {name}: the part of rank {rank} is not on this disk; bring the ranks' "
                "directories together"
            )
        return found

    def file(self, name: str, entry: TensorEntry) -> File:
        """Where a stored tensor lies, if it lies there as it was committed. Raises SourceError."""
        from . import safetensors  # `matches`, which every run asks, needs none

        header = self._headers.get(entry.file)
        if header is None:
            header = self._headers[entry.file] = safetensors.read_header(os.path.join(self.path, entry.file))
        if name not in header.items:
            raise SourceError(f"{self.path}: {name} is in {NAME} and not in {entry.file}")
        safetensors.require(header.items[name], entry, f"{self.path}: {entry.file}: {name}")
        return header.file

    def checkpoint(
        self,
        names: Mapping[str, str],
        options: Options | None = None,
        *,
        own: Mapping[str, TensorEntry] | None = None,
        unread: Sequence[str] = (),
    ) -> Checkpoint:
        """Tensors as a checkpoint. `names`: new name -> the stored tensor's; those of one tensor are tied.
        `own`: tensors of one rank that are asked for too. Raises SourceError where boxes do not tile one."""
        first: dict[str, str] = {}  # stored tensor -> the name it gets
        aliases = {new: first[held] for new, held in names.items() if first.setdefault(held, new) != new}
        extents: list[Extent] = []
        files: dict[str, File] = {}
        made = {}
        for held, new in first.items():
            dtype, shape, parts = self._parts(held, own or {})
            rows = []
            for entry, origin, size in parts:
                files[entry.file] = self.file(held, entry)
                if 0 not in size:
                    rows.append([len(extents), dtype.code, 0, *origin, *size, *dense_strides(size)])
                    extents.append(
                        Extent(files[entry.file], entry.offset, entry.nbytes, f"{entry.file}/{held}")
                    )
            made[new] = dtype, shape, rows
        every, record = Extents(extents), self.manifest.record
        return assemble(
            self.path, "training",
            {n: Boxed(shape, dtype, every, rows) for n, (dtype, shape, rows) in made.items()},
            every, options or Options(), aliases=aliases, files=tuple(files.values()), search=[self.path],
            saved=Saved(record.source.tag, record.source.step),
            facts={"ranks": record.placement.get("ranks")}, unread=unread, headers=[self.manifest.key],
            layout=(repr(rows).encode() for _, _, rows in made.values()),
        )  # fmt: skip

    def _parts(
        self, name: str, own: Mapping[str, TensorEntry]
    ) -> tuple[DType, Sizes, list[tuple[TensorEntry, Sizes, Sizes]]]:
        """A stored tensor's dtype, shape and boxes: what is stored, offset, size."""
        shared = self.table.get(name)
        if shared is None:
            e = own[name]
            return e.dtype, e.shape, [(e, (0,) * len(e.shape), e.shape)]
        parts = [(self.entry(rank, name), origin, size) for rank, origin, size in shared.boxes]
        for entry, _, size in parts:
            if entry.shape != size or entry.dtype is not shared.dtype:
                raise SourceError(
                    f"{self.path}: {name}: {entry.file} holds {entry.dtype}{list(entry.shape)}, "
                    f"{TABLE} says {shared.dtype}{list(size)}"
                )
        if 0 not in shared.shape:
            with naming(f"{self.path}: {name}"):
                check_tiles(shared.shape, [(origin, size) for _, origin, size in parts if 0 not in size])
        return shared.dtype, shared.shape, parts


# ---- the tree of a state ----


def tag_of(tree: JSON) -> tuple[str, JSON]:
    """A node's tag and content; ("", value) of a plain value."""
    return next(iter(tree.items())) if isinstance(tree, dict) and tree else ("", tree)


def pairs_of(content: JSON) -> Iterator[tuple[str | int | float | bool | None, JSON]]:
    """The keys and values of a dict's node."""
    for pair in content if isinstance(content, list) else ():
        match pair:
            case [str() | int() | float() | None as key, value]:
                yield key, value


def items_of(content: JSON) -> list[JSON]:
    """The values of a list's node."""
    return content if isinstance(content, list) else []


def parts_of(tree: JSON) -> dict[str, str]:
    """What a state is made of: key ("" for a whole that is no dict) -> "module", "object", "engine" or
    "value"."""
    tag, content = tag_of(tree)
    out = {}
    for key, node in pairs_of(content) if tag == "dict" else [("", tree)]:
        match tag_of(node):
            case inner, [str(kind), *_] if inner == STATE:
                out[str(key)] = kind
            case inner, _:
                out[str(key)] = ENGINE if inner == ENGINE else "value"
    return out


def names_in(tree: JSON) -> list[str]:
    """The names of a tree's tensors, in order."""
    tag, content = tag_of(tree)
    if tag in ("tensor", "array"):
        return [str(content)]
    if tag in ("dict", "ordered"):
        return [n for _, value in pairs_of(content) for n in names_in(value)]
    if tag in ("list", "tuple", "set", "frozenset", STATE):
        return [n for value in items_of(content) for n in names_in(value)]
    return []


def aliases_of(state: Mapping[str, JSON]) -> dict[str, str]:
    """Tied names of a rank's state -> the tensor that each is."""
    held = state.get("aliases")
    return {a: str(h) for a, h in held.items()} if isinstance(held, dict) else {}


def _box(where: str, said: JSON) -> tuple[int, Sizes, Sizes]:
    match said:
        case [int(rank), list(offset), list(size)]:
            return rank, integers(offset, where), integers(size, where)
    raise SourceError(f"{where}: {said!r:.80} is no box of {TABLE}")
