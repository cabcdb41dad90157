"""What a path, a dict of tensors or an opened checkpoint is to the verbs: one whole model, where it is one.

`sources` reads what lies there; what stands in `joining/` makes shards the model they were cut from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from . import sources
from .checkpoint import JSON, Checkpoint
from .collector import paused
from .errors import expect
from .joining import recorded
from .planning import configs
from .sources import ties
from .sources.megatron_args import FORMAT as MEGATRON
from .sources.served import SHARDS

TIES_UNSAID = ("dcp", "fsdp", "meta", "safetensors", "statedict")
"""Formats that do not, or not always, say which names are one tensor."""


def open(
    path: str | os.PathLike[str] | Mapping[str, object],
    *,
    tag: str | None = None,
    also: Iterable[str | os.PathLike[str]] = (),
    rename: Iterable[tuple[str, str]] = (),
    weights: str = "master",
    exclude_frozen: bool = False,
    check_crc: bool = False,
    replicas: str = "equal",
    recipe: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
) -> Checkpoint:
    """The checkpoint at `path`, as `sources.open` has it; the shards of a serving layout as a whole model.

    `recipe`: the file of a user's own recipe, where the shards were cut with one. `config`: where no
    config.json is beside, which model a Megatron checkpoint is of, and whether names are tied; without
    either it is given as it is.
    So are quantised shards, and those of an adapter alone, which cannot be joined: each tensor is named
    "rank/name". Raises SourceError for what is broken, missing, unknown or cannot be joined."""
    found = sources.open(
        path, tag=tag, also=also, rename=rename, weights=weights,
        exclude_frozen=exclude_frozen, check_crc=check_crc, replicas=replicas,
    )  # fmt: skip
    unsaid = found.format == MEGATRON and config is None and found.config is None
    return join(found, recipe, config) if found.joins and not unsaid else found


def open_joined(
    ckpt: str | os.PathLike[str] | Checkpoint | Mapping[str, object],
    recipe: str | None,
    config: str | os.PathLike[str] | Mapping[str, JSON] | None,
) -> Checkpoint:
    """What a verb was given, as one whole model. Raises SourceError for what cannot be opened or joined."""
    return join(ckpt if isinstance(ckpt, Checkpoint) else sources.open(ckpt), recipe, config)


@paused()
def join(
    ckpt: Checkpoint,
    recipe: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, JSON] | None = None,
) -> Checkpoint:
    """The model that an opened output's shards, or a Megatron run's, are of; any other checkpoint as it is,
    its names tied where the config says so and samples agree.

    `recipe`, `config` as in `open`. Raises SourceError where it is not said of which model the parts are, or
    they do not hold every element."""
    expect("config", config, str, os.PathLike, Mapping, type(None))
    expect("recipe", recipe, str, type(None))
    if ckpt.format == MEGATRON:
        from .joining import megatron

        return megatron.join(ckpt, recipe, config)
    if ckpt.format in TIES_UNSAID and (config is not None or ckpt.config is not None):
        return ties.tied(ckpt, configs.found(ckpt, config))
    return recorded.join(ckpt, recipe) if ckpt.format == SHARDS else ckpt
