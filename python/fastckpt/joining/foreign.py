"""Serving shards that another program wrote, such as vLLM's sharded_state, as the model they are parts of.

They have no record, so the caller says how they were cut, and shows the model's config, or a checkpoint with
its names and shapes: the base model's, an earlier one, any of the same architecture; no tensor of it is read.
Law: every tensor of every rank has the name and shape that the layout makes, no rank, file or tensor is
missing or left over, and the shards hold every element. What cannot be seen from shapes (which of two orders
of gate and up) is the caller's word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from .. import layouts, opening, recipes
from ..checkpoint import JSON, Checkpoint
from ..dtypes import float32
from ..errors import LayoutError, SourceError, expect
from ..layouts import ByRoles, Layout, Naming
from ..paths import is_directory, is_file
from ..placement import Placement, grid_of
from ..plainjson import read_json
from ..sources import safetensors, served
from ..sources.assembly import assemble, sampled
from ..sources.options import Options
from ..sources.shards import find_shards
from .uniting import phantom_of, whole_of


def open_shards(
    path: str | os.PathLike[str],
    layout: str | Layout,
    like: str | os.PathLike[str] | Checkpoint | Mapping[str, JSON],
    *,
    placement: Placement | None = None,
    tp: int = 1,
    recipe: str | None = None,
    replicas: str = "equal",
) -> Checkpoint:
    """The model whose shards lie in `path`, cut by `layout` (by roles) for `placement`, or for `tp` ranks.

    `like`: a checkpoint with the names and shapes of the whole model, which gives the config too where `path`
    has none, or a config (a mapping, or the path of a config.json), whose model has the names that the hub
    gives it; `recipe` as in `reshard`, `replicas` as in `open`. Only headers are read. Raises SourceError
    where the shards are not what the layout makes of such a model, LayoutError where it cannot cut one,
    RecipeError."""
    expect("path", path, str, os.PathLike)
    expect("like", like, str, os.PathLike, Checkpoint, Mapping)
    made, grid = layouts.chosen(layout), grid_of(tp, placement)
    if not made.roles:
        raise LayoutError(f"shards of layout {layout} are not read: wanted hf, vllm, rtp_llm or megatron")
    where = os.fspath(path)
    options = Options(replicas=replicas)
    shards = replace(_read(where, made, grid), take_first=options.replicas == "first")
    if not isinstance(like, Checkpoint | Mapping):
        like = read_json(os.fspath(like)) if os.fspath(like).endswith("config.json") else opening.open(like)
    config = shards.config or like.config if isinstance(like, Checkpoint) else like
    if config is None:
        raise SourceError(f"{where}: no config.json, nor beside the checkpoint that it is like")
    find = recipes.find(config) if recipe is None else recipes.named(recipe)
    shards = replace(shards, config=config, recipe=recipe)
    if isinstance(like, Checkpoint):
        phantom = phantom_of(shards, {n: (e.dtype, e.shape) for n, e in like.entries.items()}, like.aliases)
    else:
        imagined = recipes.imagined(find, config)
        phantom = phantom_of(shards, {n: (float32, shape) for n, shape in imagined.items()}, {})
    return whole_of(shards, phantom, find(phantom, config), made, grid)


def _read(path: str, layout: ByRoles, grid: Placement) -> Checkpoint:
    """Every rank's tensors, named "rank/name", from the files the layout would write."""
    if not is_directory(path):
        raise SourceError(f"{path}: wanted a directory of shards")
    if served.matches(path):
        raise SourceError(f"{path}: has a record of fastckpt, and is opened by that")
    headers: list[safetensors.Header] = []
    found: dict[str, tuple[safetensors.Item, safetensors.Header]] = {}
    for p in grid.ranks():
        for file in _files(path, layout.naming(p), p):
            header = safetensors.read_header(file)
            headers.append(header)
            for name, item in header.items.items():
                if found.setdefault(f"{p.rank}/{name}", (item, header))[1] is not header:
                    raise SourceError(f"{file}: {name} of rank {p.rank} stands in another file too")
    read = {os.path.realpath(h.file.path) for h in headers}
    for directory, _, files in os.walk(path):
        for file in files:
            extra = os.path.join(directory, file)
            if file.endswith(safetensors.SUFFIX) and os.path.realpath(extra) not in read:
                sizes = f"tp {grid.tp}, pp {grid.pp}, dp {grid.dp}"
                raise SourceError(f"{extra}: is no file of these {grid.world} ranks ({sizes})")
    extents, entries = safetensors.tensors([(name, item, h.file) for name, (item, h) in found.items()])
    return assemble(
        path, served.SHARDS, entries, extents, Options(), files=[h.file for h in headers], search=[path],
        headers=[*(h.digest for h in headers), sampled(list(extents))],
    )  # fmt: skip


def _files(path: str, naming: Naming, p: Placement) -> list[str]:
    """A rank's files, by the layout's names for them. Raises SourceError where there are none."""
    directory = os.path.join(path, naming.directory)
    if naming.index is not None:
        if not is_directory(directory):
            raise SourceError(f"{directory}: rank {p.rank} of {p.world} is not there")
        found = list(find_shards(directory, safetensors.SUFFIX, safetensors.SINGLE, Options()).paths)
    else:
        found = []
        while is_file(file := os.path.join(directory, naming.part.format(part=len(found)))):
            found.append(file)
    if not found:
        raise SourceError(f"{directory}: no {naming.single}: rank {p.rank} of {p.world} is not there")
    return found
