"""Reads what `reshard` itself wrote: a directory whose commit record is fastckpt.json.

Law: only a complete output is read, and only where one rank holds the whole model; the tensors come from
the files' own headers, the record says which files they are and which names are tied (docs/formats.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..errors import SourceError
from . import safetensors, statedict
from .assembly import read_json
from .options import Options

RECORD = "fastckpt.json"
SCHEMA = 1
_MAX_BYTES = 1 << 30


def matches(path: str) -> bool:
    """Whether `path` is a directory with the commit record, or with the record of a rank alone."""
    return os.path.isdir(path) and (os.path.isfile(os.path.join(path, RECORD)) or bool(_parts(path)))


def read(path: str, options: Options) -> Checkpoint:
    """The checkpoint in an output of one rank. Raises SourceError for an incomplete one and for one of
    several ranks, whose tensors are slices."""
    record = os.path.join(path, RECORD)
    if not os.path.isfile(record):
        raise SourceError(f"{path}: an incomplete output: {', '.join(_parts(path))} without {RECORD}")
    body = read_json(record, _MAX_BYTES)
    if body.get("schema") != SCHEMA:
        raise SourceError(f"{record}: schema {body.get('schema')}, this version reads {SCHEMA}")
    ranks = body.get("ranks")
    if not isinstance(ranks, list) or body.get("world") != 1 or len(ranks) != 1:
        raise SourceError(
            f"{path}: an output of {body.get('world')} ranks in layout {body.get('layout')!r}: "
            "each rank holds slices; wanted an output of one rank"
        )
    shard = ranks[0]
    if not isinstance(shard, dict):
        raise SourceError(f"{record}: a rank is no JSON object")
    of_safetensors = any(n.endswith(safetensors.SUFFIX) for n in _map(shard, "files", record))
    found = safetensors.read(path, options) if of_safetensors else statedict.read(path, options)
    names = options.names([*_map(shard, "tensors", record), *_map(shard, "aliases", record)], record)
    for old in _map(shard, "tensors", record):
        if names[old] not in found:
            raise SourceError(f"{path}: {old} is in {RECORD} and in no file")
    aliases = dict(found.aliases)
    for alias, holder in _map(shard, "aliases", record).items():
        if not isinstance(holder, str) or names.get(holder) not in found.entries:
            raise SourceError(f"{record}: alias {alias} of {holder}, which is no tensor")
        aliases[names[alias]] = names[holder]
    facts = {"layout": body.get("layout"), "made from": body.get("source"), "created": body.get("created")}
    return replace(
        found, format="served", aliases=aliases, facts={**found.facts, **facts, "tied": dict(aliases)}
    )


def _parts(path: str) -> list[str]:
    """The records of single ranks."""
    return sorted(n for n in os.listdir(path) if n.startswith("fastckpt-rank-") and n.endswith(".json"))


def _map(shard: Mapping[str, JSON], key: str, record: str) -> Mapping[str, JSON]:
    value = shard.get(key)
    if not isinstance(value, dict):
        raise SourceError(f"{record}: {key} is no JSON object")
    return value
