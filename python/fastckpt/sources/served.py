"""Reads what `reshard` itself wrote: a directory whose commit record is fastckpt.json.

Law: only a complete output is read; the tensors come from the files' own headers, the record says which
files they are and which names are tied (docs/formats.md). Where one rank holds the model under its own names,
that is a checkpoint; the shards of a serving layout are given as they are, for `joining` to put together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace

import xxhash

from ..checkpoint import JSON, Checkpoint
from ..errors import SourceError
from ..extents import File, inside, is_directory, is_file
from ..plainjson import json_object, read_json
from .assembly import RECORD, assemble
from .options import Options

SHARDS = "shards"
"""The format of an output whose tensors are parts: an entry for each rank's tensor, named "rank/name"."""
SCHEMA = 1
_MAX_BYTES = 1 << 30


def matches(path: str) -> bool:
    """Whether `path` is a directory with the commit record, or with the record of a rank alone."""
    return is_directory(path) and (is_file(os.path.join(path, RECORD)) or bool(_parts(path)))


def read(path: str, options: Options) -> Checkpoint:
    """The checkpoint in an output, or its shards. Raises SourceError for an incomplete one."""
    from . import safetensors, statedict  # `matches`, which every run asks, needs neither

    options.refuse_also(path)
    record = os.path.join(path, RECORD)
    if not is_file(record):
        raise SourceError(f"{path}: an incomplete output: {', '.join(_parts(path))} without {RECORD}")
    body = read_json(record, _MAX_BYTES)
    if body.get("schema") != SCHEMA:
        raise SourceError(f"{record}: schema {body.get('schema')}, this version reads {SCHEMA}")
    ranks, world = body.get("ranks"), body.get("world")
    if not isinstance(ranks, list) or not ranks or len(ranks) != world:
        raise SourceError(f"{record}: says {world} ranks and does not list as many")
    if world != 1 or body.get("layout") not in ("same", "hf"):
        return _shards(path, body, ranks, options)
    shard = json_object(ranks[0], f"{record}: a rank")
    files, tensors, tied = (
        json_object(shard.get(key), f"{record}: {key}") for key in ("files", "tensors", "aliases")
    )
    of_safetensors = any(n.endswith(safetensors.SUFFIX) for n in files)
    found = safetensors.read(path, options) if of_safetensors else statedict.read(path, options)
    names = options.names([*tensors, *tied], record)
    for old in tensors:
        if names[old] and names[old] not in found:
            raise SourceError(f"{path}: {old} is in {RECORD} and in no file")
    aliases = dict(found.aliases)
    for alias, holder in tied.items():
        if not names[alias]:
            continue
        if not isinstance(holder, str) or names.get(holder) not in found.entries:
            raise SourceError(f"{record}: alias {alias} of {holder}, which is no tensor")
        aliases[names[alias]] = names[holder]
    facts = {"layout": body.get("layout"), "made from": body.get("source"), "created": body.get("created")}
    return replace(found, format="served", aliases=aliases, facts={**found.facts, **facts})


def _shards(path: str, body: Mapping[str, JSON], ranks: list[JSON], options: Options) -> Checkpoint:
    """Every rank's tensors, named "rank/name"."""
    from . import safetensors

    options.refuse_zero_only(path)
    options.refuse_crc(path)
    if options.rename:
        raise SourceError(f"{path}: the names of shards in layout {body.get('layout')!r} cannot be changed")
    record = os.path.join(path, RECORD)
    found: list[tuple[str, safetensors.Item, File]] = []
    headers: list[str] = []
    files: list[File] = []
    for k, shard in enumerate(ranks):
        if not isinstance(shard, dict) or shard.get("rank") != k:
            raise SourceError(f"{record}: its ranks are not 0, 1, .. in order")
        tensors = json_object(shard.get("tensors"), f"{record}: tensors")
        names = set(tensors)
        headers.append(xxhash.xxh3_64_hexdigest(json.dumps(tensors).encode()))  # digests of values in it
        for file in json_object(shard.get("files"), f"{record}: files"):
            if not file.endswith(safetensors.SUFFIX):
                continue
            if not inside(file):
                raise SourceError(f"{record}: file {file!r} leaves the directory")
            header = safetensors.read_header(os.path.join(path, file))
            headers.append(header.digest)
            files.append(header.file)
            for name, item in header.items.items():
                if name not in names:
                    raise SourceError(f"{path}: {file} holds {name}, which {RECORD} does not name there")
                names.remove(name)
                found.append((f"{k}/{name}", item, header.file))
        if names:
            raise SourceError(f"{path}: {min(names)} of rank {k} is in {RECORD} and in no file")
    extents, entries = safetensors.tensors(found)
    facts = {key: body.get(key) for key in ("layout", "placement", "created")}
    told = body.get("options")
    if isinstance(told, dict) and told.get("quant") is not None:
        facts["quant"] = told["quant"]
    match told:
        case {"adapter": ["apart", *_]}:
            facts["adapter"] = "apart"
    return assemble(
        path, SHARDS, entries, extents, options, files=files, search=[path],
        facts=facts | {"made from": body.get("source")}, headers=headers,
    )  # fmt: skip


def _parts(path: str) -> list[str]:
    """The records of single ranks."""
    return sorted(n for n in os.listdir(path) if n.startswith("fastckpt-rank-") and n.endswith(".json"))
