"""Tied names of saves that do not say which names are one tensor: the config says so, and samples agree.

Law: that all bytes agree, a run proves before it takes one tensor for both (`Replica`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint, Entry
from ..digest import values_digest
from ..extents import File
from ..views import ZERO
from .samples import Agreement, samples


def tied(ckpt: Checkpoint, config: Mapping[str, JSON]) -> Checkpoint:
    """The checkpoint with the tensors of `vocab_size` rows and equal samples as one, where the config says
    `tie_word_embeddings`. Raises SourceError for a file that cannot be read."""
    config = with_decoder(config)
    if config.get("tie_word_embeddings") is not True:
        return ckpt
    rows = {
        n: e for n, e in ckpt.entries.items() if e.shape[:1] == (config.get("vocab_size"),) and _in_files(e)
    }
    held: dict[tuple[object, ...], str] = {}
    aliases, agreement = dict(ckpt.aliases), Agreement(ckpt.path)
    for (name, entry), seen in zip(rows.items(), samples(e.build for e in rows.values()), strict=True):
        holder = held.setdefault((entry.dtype, entry.shape, seen), name)
        if holder != name:
            aliases |= {a: holder for a, h in aliases.items() if h == name} | {name: holder}
            what = f"{holder} and {name}, which are one as tie_word_embeddings of the config says"
            agreement.add(what, rows[holder], entry, always=True)
    if aliases == ckpt.aliases:
        return ckpt
    return replace(
        ckpt,
        entries={n: e for n, e in ckpt.entries.items() if n not in aliases},
        aliases=aliases,
        replicas=(*ckpt.replicas, *agreement.replicas),
        structure=values_digest([ckpt.structure, aliases]),
    )


def with_decoder(config: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """A config with its decoder's keys: a vision-language model says itself whether it is tied."""
    decoder = config.get("text_config")
    return {**decoder, **config} if isinstance(decoder, dict) else config


def _in_files(entry: Entry) -> bool:
    view = entry.build()
    return all(isinstance(view.extents[i].where, File) for i in {*view.extent.tolist()} - {ZERO})
