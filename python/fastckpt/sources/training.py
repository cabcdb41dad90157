"""Reads a commit of the training side (docs/manager.md): the model that was saved in it.

The model is the state's only module, under its own names; of several modules each tensor keeps the name of
its place in the state; a state of no module is its tensors. A DeepSpeed engine's files are a ZeRO checkpoint
and read as one. What each rank had of its own is no part of a model.

Law: what says where bytes lie (the record, the table of shared tensors, the tree) is taken only with the
digest under which it was committed. Tensors are not read here; `verify` proves them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from ..checkpoint import JSON, Checkpoint, Single
from ..digest import digest
from ..dtypes import BY_NAME, DType
from ..errors import SourceError
from ..extents import Extent, Extents, File, content, inside, is_file
from ..stored import boxes, check_tiles
from ..views import dense_strides
from . import zero
from .assembly import RECORD, assemble, json_list, json_object, parse_json, read_json
from .options import Options

TABLE = "tensors.json"
SCHEMA = 1
_TAIL = b'"digest": "%s"\n}\n'
_OF_RANK = re.compile(r"rank-(\d+)/.+")
_MAX_BYTES = 1 << 30


def matches(path: str) -> bool:
    """Whether `path` is a directory with a commit record and the table of a training commit."""
    return all(is_file(os.path.join(path, name)) for name in (RECORD, TABLE))


def read(path: str, options: Options) -> Checkpoint:
    """The model in a commit. Raises SourceError where the commit is not whole or holds no model."""
    body = _record(path)
    tree = _document(path, body, "rank-00000/state.json", 0)
    parts = parts_of(tree.get("tree"))
    engines = [key for key, kind in parts.items() if kind == "engine"]
    modules = [key for key, kind in parts.items() if kind == "module"]
    if engines and not modules:
        if len(engines) > 1:
            raise SourceError(f"{path}: {len(engines)} engines; open the directory of one of them")
        found = zero.read(os.path.join(path, f"engine-{engines[0]}" if engines[0] else "engine"), options)
        return replace(found, facts={**found.facts, "commit": path})
    options.refuse_zero_only(path)
    options.refuse_also(path)
    options.refuse_crc(path)
    return _tensors(path, body, tree, modules, options)


def _tensors(
    path: str, body: Mapping[str, JSON], tree: Mapping[str, JSON], modules: list[str], options: Options
) -> Checkpoint:
    """The shared tensors of the modules, or of the whole state where there is none."""
    table = _document(path, body, TABLE, None)
    tied = json_object(tree.get("aliases"), f"{path}: aliases")
    names = names_in(tree.get("tree"))
    chosen = [n for n in names if not modules or any(not m or n.startswith(f"{m}.") for m in modules)]
    holders = {n: str(tied.get(n, n)) for n in chosen}
    own = [n for n in chosen if holders[n] not in table]
    if not chosen or len(own) == len(chosen):
        raise SourceError(f"{path}: no tensor of a model, or each rank has its own of all {len(chosen)}")
    if own and modules:
        raise SourceError(f"{path}: {own[0]} differs from rank to rank ({len(own)} such in all)")
    cut = len(modules[0]) + 1 if len(modules) == 1 and modules[0] else 0
    first: dict[str, str] = {}  # stored tensor -> the name it gets
    aliases: dict[str, str] = {}
    for name, held in holders.items():
        if held in table and first.setdefault(held, name[cut:]) != name[cut:]:
            aliases[name[cut:]] = first[held]
    stored = _Stored(path, body)
    made = {new: stored.tensor(held, table[held]) for held, new in first.items()}
    extents = Extents(stored.extents)
    rest = len(names) - len(chosen)
    unread = [f"{rest} tensors that are not the model's (optimizer and the like)"] if rest else []
    unread += [f"{n}: each rank has its own" for n in own]
    source = json_object(body.get("source"), f"{path}: source")
    return assemble(
        path, "training",
        {n: Single(shape, dtype, partial(boxes, extents, dtype, shape, rows))
         for n, (dtype, shape, rows) in made.items()},
        extents, options, aliases=aliases, files=tuple(stored.files.values()), search=[path],
        facts={"step": source.get("step"), "tag": source.get("tag"), "ranks": tree.get("world")},
        unread=unread, headers=[str(body.get("key"))],
        layout=(repr(rows).encode() for _, _, rows in made.values()),
    )  # fmt: skip


class _Stored:
    """Where a commit's tensors lie. `extents`, `files`: of those that `tensor` was asked for."""

    def __init__(self, path: str, body: Mapping[str, JSON]) -> None:
        self.path = path
        self.extents: list[Extent] = []
        self.files: dict[str, File] = {}
        self._places: dict[tuple[int, str], tuple[str, int, int]] = {}
        for shard in json_list(body.get("ranks"), f"{path}: ranks"):
            tensors = json_object(shard, f"{path}: a rank").get("tensors")
            for name, t in json_object(tensors, f"{path}: tensors").items():
                match t:
                    case {"file": str(file), "offset": int(offset), "nbytes": int(nbytes)} if (
                        rank := _OF_RANK.fullmatch(file)
                    ) and inside(file):
                        self._places[int(rank[1]), name] = file, offset, nbytes
                    case _:
                        raise SourceError(f"{path}: {name}: {t!r:.80} is no place of a tensor")

    def tensor(self, name: str, said: JSON) -> tuple[DType, tuple[int, ...], list[list[int]]]:
        """Its dtype, shape and fragments (as in `views`). Raises SourceError where boxes do not tile it."""
        match said:
            case {"dtype": str(kind), "shape": list(sizes), "boxes": list(listed)} if kind in BY_NAME:
                dtype, shape = BY_NAME[kind], _shape(sizes, name)
            case _:
                raise SourceError(f"{self.path}: {name}: {said!r:.80} is no entry of {TABLE}")
        rows, held = [], []
        for box in listed:
            match box:
                case [int(rank), list(at), list(size)] if (rank, name) in self._places:
                    origin, part = _shape(at, name), _shape(size, name)
                    extent = self._extent(name, rank, math.prod(part) * dtype.itemsize)
                case _:
                    raise SourceError(f"{self.path}: {name}: box {box!r:.80} is of no rank that is here")
            if 0 not in part:
                rows.append([len(self.extents), dtype.code, 0, *origin, *part, *dense_strides(part)])
                self.extents.append(extent)
                held.append((origin, part))
        if any(len(x) != len(shape) for box in held for x in box):
            raise SourceError(f"{self.path}: {name}: a box of other axes than {list(shape)}")
        if 0 not in shape:
            try:
                check_tiles(shape, held)
            except SourceError as e:
                raise SourceError(f"{self.path}: {name}: {e}") from None
        return dtype, shape, rows

    def _extent(self, name: str, rank: int, wanted: int) -> Extent:
        """A rank's part of a tensor, of `wanted` bytes."""
        file, offset, nbytes = self._places[rank, name]
        if nbytes != wanted:
            raise SourceError(f"{self.path}: {name}: rank {rank} holds {nbytes} bytes, its box has {wanted}")
        if file not in self.files:
            self.files[file] = File.at(os.path.join(self.path, file))
        return Extent(self.files[file], offset, wanted, f"{file}/{name}")


# ---- the tree of a state ----


def _node(tree: JSON) -> tuple[str, JSON]:
    """A node's tag and content; ("", value) of a plain value."""
    return next(iter(tree.items())) if isinstance(tree, dict) and tree else ("", tree)


def _pairs(content: JSON) -> Iterator[tuple[str, JSON]]:
    for pair in content if isinstance(content, list) else ():
        if isinstance(pair, list) and len(pair) == 2:
            yield str(pair[0]), pair[1]


def parts_of(tree: JSON) -> dict[str, str]:
    """What a state is made of: key ("" for a whole that is no dict) -> "module", "object", "engine" or
    "value"."""
    tag, content = _node(tree)
    out = {}
    for key, node in _pairs(content) if tag == "dict" else [("", tree)]:
        match _node(node):
            case "state", [str(kind), *_]:
                out[key] = kind
            case inner, _:
                out[key] = "engine" if inner == "engine" else "value"
    return out


def names_in(tree: JSON) -> list[str]:
    """The names of a tree's tensors, in order."""
    tag, content = _node(tree)
    if tag in ("tensor", "array"):
        return [str(content)]
    if tag in ("dict", "ordered"):
        return [n for _, value in _pairs(content) for n in names_in(value)]
    if tag in ("list", "tuple", "set", "frozenset", "state") and isinstance(content, list):
        return [n for value in content for n in names_in(value)]
    return []


# ---- the commit's own files ----


def _record(path: str) -> dict[str, JSON]:
    """The commit record, whole and with its own digest."""
    where = os.path.join(path, RECORD)
    body = read_json(where, _MAX_BYTES)
    text = content(where, _MAX_BYTES)
    head = text[: -len(_TAIL) - 14]
    if text[len(head) :] != _TAIL % digest(head).encode():
        raise SourceError(f"{where}: does not have its own digest: it was changed or damaged")
    ranks = json_list(body.get("ranks"), f"{where}: ranks")
    whole = ranks and len(ranks) == body.get("world")
    if body.get("schema") != SCHEMA or body.get("layout") != "training" or not whole:
        raise SourceError(f"{where}: is no whole training commit of schema {SCHEMA}")
    return body


def _document(path: str, body: Mapping[str, JSON], name: str, rank: int | None) -> dict[str, JSON]:
    """A JSON file of the commit, with the digest of the record."""
    of = body
    if rank is not None:
        of = json_object(json_list(body.get("ranks"), f"{path}: ranks")[rank], f"{path}: rank {rank}")
    entry = json_object(of.get("files"), f"{path}: files").get(name)
    data = content(os.path.join(path, name), _MAX_BYTES)
    if not isinstance(entry, dict) or digest(data) != entry.get("digest"):
        raise SourceError(f"{path}: {name}: its bytes differ from the commit's digest")
    return parse_json(data, os.path.join(path, name))


def _shape(value: JSON, what: str) -> tuple[int, ...]:
    sizes = value if isinstance(value, list) else [None]
    out = tuple(n for n in sizes if type(n) is int and n >= 0)
    if len(out) != len(sizes):
        raise SourceError(f"{what}: {value!r:.80} is no shape")
    return out
