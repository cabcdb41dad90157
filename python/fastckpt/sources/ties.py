"""Tied names of saves that do not say which names are one tensor: the config says so, and the bytes agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import xxhash

from ..checkpoint import JSON, Checkpoint
from ..extents import Extent, File
from ..views import View
from .torchzip import Reader

_CHUNK = 4 << 20


def tied(ckpt: Checkpoint, config: Mapping[str, JSON]) -> Checkpoint:
    """The checkpoint with the tensors of `vocab_size` rows and the same bytes as one, where the config says
    `tie_word_embeddings`. Raises SourceError for a file that cannot be read."""
    config = with_decoder(config)
    if config.get("tie_word_embeddings") is not True:
        return ckpt
    held: dict[str, View] = {}
    aliases = dict(ckpt.aliases)
    for name, entry in ckpt.entries.items():
        if entry.shape[:1] == (config.get("vocab_size"),):
            view = entry.build()
            holder = next((n for n, other in held.items() if _same(view, other)), None)
            if holder is None:
                held[name] = view
            else:
                aliases |= {a: holder for a, h in aliases.items() if h == name} | {name: holder}
    if aliases == ckpt.aliases:
        return ckpt
    return replace(
        ckpt,
        entries={n: e for n, e in ckpt.entries.items() if n not in aliases},
        aliases=aliases,
        structure=xxhash.xxh3_64_hexdigest(json.dumps([ckpt.structure, aliases]).encode()),
    )


def with_decoder(config: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """A config with its decoder's keys: a vision-language model says itself whether it is tied."""
    decoder = config.get("text_config")
    return {**decoder, **config} if isinstance(decoder, dict) else config


def _same(one: View, other: View) -> bool:
    """Whether two views have the same boxes, of the same bytes."""
    a, b = one.rows, other.rows
    if one.dtype is not other.dtype or a.shape != b.shape or (a[:, 1:] != b[:, 1:]).any():
        return False
    pairs = zip(a[:, 0].tolist(), b[:, 0].tolist(), strict=True)
    return all(_same_bytes(one.extents[i], other.extents[j]) for i, j in pairs)


def _same_bytes(a: Extent, b: Extent) -> bool:
    if not isinstance(a.where, File) or not isinstance(b.where, File) or a.nbytes != b.nbytes:
        return False
    with Reader(a.where) as one, Reader(b.where) as two:
        for at in range(0, a.nbytes, _CHUNK):
            n = min(_CHUNK, a.nbytes - at)
            if one.read_through(a.offset + at, n) != two.read_through(b.offset + at, n):
                return False
    return True
