"""The shards of an output of fastckpt as the whole model they were cut from.

Its record names the layout, its options and the grid; `uniting` reads that layout backwards. Nothing is read
but headers and the record.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from .. import layouts, recipes
from ..checkpoint import JSON, Cast, Checkpoint
from ..collector import paused
from ..digest import digest, values_digest
from ..dtypes import BY_NAME, DType
from ..errors import SourceError
from ..layouts import ByRoles
from ..layouts.patterns import Patterns
from ..model import Model
from ..output.manifest import Manifest
from ..paths import content
from ..placement import Placement
from ..target import Target
from .uniting import over_ranks, phantom_of, united

CUT_FROM = "cut_from"
"""The record's option that says what the shards were cut from."""


def cut_from(ckpt: Checkpoint, world: int, layout: str) -> dict[str, JSON]:
    """What a record must keep of the tensors an output was cut from, so that it can be joined again; nothing
    where the output holds them whole, under their own names."""
    if uncut(layout, world):
        return {}
    tensors: dict[str, JSON] = {n: [e.dtype.name, list(e.shape)] for n, e in ckpt.entries.items()}
    return {CUT_FROM: {"tensors": tensors, "aliases": dict(ckpt.aliases), "layouts": layouts.VERSION}}


def uncut(layout: str, world: int) -> bool:
    """Whether an output holds the tensors whole, under their own names."""
    return layout == "same" or (layout == "hf" and world == 1)


def join(ckpt: Checkpoint, recipe: str | None) -> Checkpoint:
    """The model that an opened output's shards are of; `recipe` as in `opening.open`.

    Its recipe is one that was asked for, its config has the sizes from before they were padded. Names, shapes
    and tied names are those of the checkpoint it was cut from, dtypes those that were served; what the recipe
    left out is in `unread`. Raises SourceError where the record does not tell enough, or the shards do not
    hold every element."""
    manifest = Manifest.read(ckpt.path)
    record = manifest.record.options
    phantom = _phantom(ckpt, manifest)
    digests = {f"{s.rank}/{name}": t.digest for s in manifest.shards for name, t in s.tensors.items()}
    targets = _targets(ckpt, phantom, manifest, recipe)
    found = united(ckpt, phantom, manifest.record.layout, targets, digests)
    was = _map(record.get("resized", {}), ckpt, "resized")
    return replace(
        found,
        config=_config(ckpt, manifest) if was else ckpt.config,
        recipe=_recipe(ckpt, manifest, recipe),
        unpadded=was,
        structure=values_digest([ckpt.structure, record, dict(ckpt.config or {})]),
    )


@paused()
def would_hold(
    ckpt: Checkpoint, manifest: Manifest, layout: ByRoles, dtype: DType
) -> list[tuple[int, Target]]:
    """What every rank of an opened output would hold by another layout, as (rank, target): names, shapes and
    dtypes, floats cast to `dtype`, and no bytes behind them.

    Raises SourceError as `join` does, RecipeError and LayoutError where the layout cannot cut this model."""
    phantom = _phantom(ckpt, manifest)
    cast = Cast(phantom.entries, dtype)  # but for fp8, whose bytes are a quantised matrix's
    entries = {n: e if e.dtype.itemsize == 1 else cast[n] for n, e in phantom.entries.items()}
    model = _model(ckpt, replace(phantom, entries=entries), manifest)
    return list(over_ranks(partial(layout.targets, model), grid(ckpt.path, manifest)))


def grid(path: str, manifest: Manifest) -> Placement:
    """The grid an output was made for. Raises SourceError where it has another number of ranks."""
    sizes = manifest.record.placement
    found = Placement(*(sizes.get(axis, 1) for axis in ("tp", "pp", "dp", "ep")))
    if found.world != manifest.world:
        raise SourceError(f"{path}: {manifest.world} ranks, and a placement of {found.world}")
    return found


# ---- the layout again ----


def _targets(
    ckpt: Checkpoint, phantom: Checkpoint, manifest: Manifest, recipe: str | None
) -> Iterator[tuple[int, Target]]:
    """Every rank's targets over the phantom, as (rank, target)."""
    record, name = manifest.record.options, manifest.record.layout
    placed = grid(ckpt.path, manifest)
    if record.get("tp_plan") is not None:
        patterns = Patterns({k: str(v) for k, v in _map(record["tp_plan"], ckpt, "tp_plan").items()})
        return over_ranks(partial(patterns.targets, phantom), placed)
    texts = _map(record.get("layout_fields"), ckpt, "layout_fields")
    layout = layouts.layout(name, {k: str(v) for k, v in texts.items()})
    if not layout.roles:
        raise SourceError(f"{ckpt.path}: layout {name} of {placed.world} ranks cannot be joined")
    model = _model(ckpt, phantom, manifest, recipe)
    return over_ranks(partial(layout.targets, model), placed)


def _model(ckpt: Checkpoint, phantom: Checkpoint, manifest: Manifest, recipe: str | None = None) -> Model:
    """The phantom by roles, as the recipe read it that the shards were made with."""
    config, options = _config(ckpt, manifest), manifest.record.options
    vocab, asked = options.get("vocab_size"), _recipe(ckpt, manifest, recipe)
    find = recipes.find(config) if asked is None else recipes.named(asked)
    model = recipes.model(find, phantom, config, vocab if isinstance(vocab, int) else None)
    if model.family != options.get("family"):
        raise SourceError(
            f"{ckpt.path}: cut with the recipe {options.get('family')}, and {asked or 'its config'} is for "
            f"{model.family}"
        )
    return model


def _recipe(ckpt: Checkpoint, manifest: Manifest, given: str | None) -> str | None:
    """The recipe that was asked for by name, if any. A file's is the user's to name: a record runs none."""
    named = manifest.record.options.get("recipe")
    if not isinstance(named, str):
        return None
    if not named.endswith(".py"):
        return named
    if given is None or not given.endswith(".py"):
        raise SourceError(
            f"{ckpt.path}: cut with a recipe of a file, {named}, which is not run unless you name it: "
            "recipe= (--recipe FILE)"
        )
    return given


def _config(ckpt: Checkpoint, manifest: Manifest) -> Mapping[str, JSON]:
    """The config the shards were cut by: the sizes it says decide what lies where."""
    path = os.path.join(ckpt.path, "config.json")
    if ckpt.config is None or path not in {f.path for f in ckpt.beside}:
        raise SourceError(f"{ckpt.path}: no config.json, which says how the shards were cut")
    recorded = manifest.files.get("config.json")
    if recorded is None or digest(content(path)) != recorded.digest:
        raise SourceError(f"{path}: was changed since the shards were cut; put the one of then back")
    was = _map(manifest.record.options.get("resized", {}), ckpt, "resized")  # before they were padded
    return {k: v for k, v in {**ckpt.config, **was}.items() if v is not None or k not in was}


def _phantom(ckpt: Checkpoint, manifest: Manifest) -> Checkpoint:
    """The checkpoint the shards were cut from, with an extent a tensor and no byte behind it."""
    record = manifest.record.options
    quant = record.get("quant")
    if quant is not None:
        scheme = quant.get("scheme") if isinstance(quant, dict) else quant
        raise SourceError(
            f"{ckpt.path}: quantised to {scheme} as it was cut, which cannot be taken back; "
            "take the checkpoint it was cut from"
        )
    match record.get("adapter"):
        case ["apart", *_]:
            raise SourceError(f"{ckpt.path}: an adapter alone, cut for a layout; open the adapter itself")
    if not isinstance(record.get(CUT_FROM), dict):
        raise SourceError(
            f"{ckpt.path}: its record does not tell what the shards were cut from: made by an older version"
        )
    source = _map(record[CUT_FROM], ckpt, CUT_FROM)
    version = source.get("layouts")
    if version != layouts.VERSION:
        raise SourceError(
            f"{ckpt.path}: cut by version {version} of the layouts (fastckpt {manifest.record.version}); "
            f"this one knows version {layouts.VERSION}, which may cut elsewhere"
        )
    tensors = _map(source.get("tensors"), ckpt, "tensors")
    kinds = {name: _kind(f"{ckpt.path}: {name}", recorded) for name, recorded in tensors.items()}
    aliases = {a: str(h) for a, h in _map(source.get("aliases"), ckpt, "aliases").items()}
    for alias, holder in aliases.items():
        if holder not in kinds:
            raise SourceError(f"{ckpt.path}: its record ties {alias} to {holder}, which is no tensor of it")
    return phantom_of(ckpt, kinds, aliases)


def _kind(where: str, recorded: JSON) -> tuple[DType, tuple[int, ...]]:
    """The dtype and shape that a record says. Raises SourceError for what is none."""
    match recorded:
        case [str(dtype), list(shape)] if dtype in BY_NAME:
            dims = tuple(n for n in shape if isinstance(n, int) and n >= 0)
        case _:
            raise SourceError(f"{where}: {recorded!r} is no dtype and shape")
    if len(dims) != len(shape) or math.prod(dims) > 1 << 62:
        raise SourceError(f"{where}: {shape} is no shape")
    return BY_NAME[dtype], dims


def _map(value: JSON, ckpt: Checkpoint, what: str) -> Mapping[str, JSON]:
    if not isinstance(value, dict):
        raise SourceError(f"{ckpt.path}: the record's {what} is no JSON object")
    return value
