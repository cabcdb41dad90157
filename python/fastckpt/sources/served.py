"""Reads what `reshard` itself wrote: a directory whose commit record is fastckpt.json.

Law: only a complete output is read; the files' own headers say what they hold, and the record must say the
same (docs/formats.md); it tells which names are tied. Where one rank holds the model under its own names,
that is a checkpoint; the shards of a serving layout are given as they are, for `joining` to put together.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace

import xxhash

from ..checkpoint import JSON, Checkpoint
from ..errors import SourceError
from ..extents import File
from ..output.manifest import NAME, Manifest, rank_of
from ..paths import is_directory, is_file
from .assembly import assemble
from .options import Options

SHARDS = "shards"
"""The format of an output whose tensors are parts: an entry for each rank's tensor, named "rank/name"."""


def matches(path: str) -> bool:
    """Whether `path` is a directory with the commit record, or with the record of a rank alone."""
    return is_directory(path) and (is_file(os.path.join(path, NAME)) or bool(_parts(path)))


def read(path: str, options: Options) -> Checkpoint:
    """The checkpoint in an output, or its shards. Raises SourceError for an incomplete one."""
    from . import safetensors, statedict  # `matches`, which every run asks, needs neither

    options.refuse_also(path)
    if not is_file(record := os.path.join(path, NAME)):
        raise SourceError(f"{path}: an incomplete output: {', '.join(_parts(path))} without {NAME}")
    manifest = Manifest.read(record)
    if not manifest.complete or not manifest.shards:
        raise SourceError(f"{record}: lists {len(manifest.shards)} of {manifest.world} ranks")
    if manifest.world != 1 or manifest.record.layout not in ("same", "hf"):
        return _shards(path, manifest, options)
    shard = manifest.shards[0]
    of_safetensors = any(n.endswith(safetensors.SUFFIX) for n in shard.files)
    found = safetensors.read(path, options) if of_safetensors else statedict.read(path, options)
    names = options.names([*shard.tensors, *shard.aliases], record)
    for old, entry in shard.tensors.items():
        if not (name := names[old]):
            continue
        if name not in found:
            raise SourceError(f"{path}: {old} is in {NAME} and in no file")
        held = found.entries[found.aliases.get(name, name)]
        if (held.dtype, held.shape) != (entry.dtype, entry.shape):
            raise SourceError(
                f"{path}: {old} is {held.dtype}{list(held.shape)}, "
                f"{NAME} says {entry.dtype}{list(entry.shape)}"
            )
    tied = {names[alias]: names[holder] for alias, holder in shard.aliases.items() if names[alias]}
    for alias, holder in shard.aliases.items():
        if names[alias] and names[holder] not in found.entries:
            raise SourceError(
                f"{record}: {alias} is tied to {holder}, which rename leaves out: not of one alone"
            )
    return replace(
        found, format="served", aliases={**found.aliases, **tied}, facts={**found.facts, **_facts(manifest)}
    )


def _shards(path: str, manifest: Manifest, options: Options) -> Checkpoint:
    """Every rank's tensors, named "rank/name"."""
    from . import safetensors

    options.refuse_zero_only(path)
    options.refuse_crc(path)
    if options.rename:
        layout = manifest.record.layout
        raise SourceError(f"{path}: the names of shards in layout {layout!r} cannot be changed")
    found: list[tuple[str, safetensors.Item, File]] = []
    headers: list[str] = []
    files: list[File] = []
    for shard in manifest.shards:
        left = dict(shard.tensors)
        values = "\n".join(t.digest for t in shard.tensors.values())
        headers.append(xxhash.xxh3_64_hexdigest(values.encode()))
        for file in shard.files:
            if not file.endswith(safetensors.SUFFIX):
                continue
            header = safetensors.read_header(os.path.join(path, file))
            headers.append(header.digest)
            files.append(header.file)
            for name, item in header.items.items():
                entry = left.pop(name, None)
                if entry is None or entry.file != file:
                    raise SourceError(f"{path}: {file} holds {name}, which {NAME} does not name there")
                safetensors.require(item, entry, f"{path}: {file}: {name}")
                found.append((f"{shard.rank}/{name}", item, header.file))
        if left:
            raise SourceError(f"{path}: {min(left)} of rank {shard.rank} is in {NAME} and in no file")
    extents, entries = safetensors.tensors(found)
    facts = _facts(manifest)
    facts["placement"] = {**manifest.record.placement}
    quant = manifest.record.options.get("quant")
    if quant is not None:
        facts["quant"] = quant
    match manifest.record.options.get("adapter"):
        case ["apart", *_]:
            facts["adapter"] = "apart"
    shards = assemble(
        path, SHARDS, entries, extents, options, files=files, search=[path], facts=facts, headers=headers
    )
    return replace(shards, joins="quant" not in facts and "adapter" not in facts)


def _facts(manifest: Manifest) -> dict[str, JSON]:
    return {
        "layout": manifest.record.layout,
        "made from": asdict(manifest.record.source),
        "created": manifest.created,
    }


def _parts(path: str) -> list[str]:
    """The records of single ranks."""
    return sorted(name for name in os.listdir(path) if rank_of(name) is not None)
