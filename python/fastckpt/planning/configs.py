"""The model's config.json: where it is found, the dtype it names, and the one that goes beside an output."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from .. import dtypes
from ..checkpoint import JSON, Checkpoint
from ..dtypes import DType
from ..errors import RecipeError, ViewError
from ..paths import is_directory
from ..plainjson import read_json
from .request import Request


def found(ckpt: Checkpoint, given: str | os.PathLike[str] | Mapping[str, JSON] | None) -> Mapping[str, JSON]:
    """The model's config: given as a mapping or a path, or found beside the checkpoint."""
    if isinstance(given, Mapping):
        try:
            json.dumps(dict(given))
        except (TypeError, ValueError) as e:
            raise RecipeError(f"config: wanted plain values, as config.json holds them: {e}") from None
        return given
    if given is None:
        if ckpt.config is None:
            raise RecipeError(
                f"{ckpt.path}: no config.json beside it: config= (--config) says where one is; with layout "
                "'same' or a tp_plan= (--tp-plan) none is needed"
            )
        return ckpt.config
    path = os.fspath(given)
    if is_directory(path):
        path = os.path.join(path, "config.json")
    return read_json(path)


def sized(config: Mapping[str, JSON], sizes: Mapping[str, JSON]) -> dict[str, JSON]:
    """The keys of a config that change with these sizes of its decoder, and what they become: the sizes stand
    in `text_config` where it has one."""
    within = config.get("text_config")
    if not sizes or not isinstance(within, dict):
        return dict(sizes)
    return {"text_config": {**within, **sizes}}


def text(
    config: Mapping[str, JSON] | None,
    request: Request,
    resized: Mapping[str, JSON] | None = None,
    changed: Mapping[str, JSON] | None = None,
) -> bytes | None:
    """The config.json to write in place of the one beside the checkpoint, if another was asked for, if it
    names another dtype than the floats get, if its decoder is `resized`, or if other keys are `changed`."""
    if config is None:
        return None
    cast = dtype(config, request.dtype)
    typed = {} if cast is None else _typed(config, cast)
    if not (request.config is not None or request.vocab_size or typed or resized or changed):
        return None
    told = {**config, **typed}
    if request.vocab_size is not None:
        told |= sized(told, {"vocab_size": request.vocab_size})
    told |= sized(told, resized or {})
    told |= changed or {}
    return (json.dumps(told, indent=2) + "\n").encode()


def older(config: Mapping[str, JSON], cast: DType | None) -> dict[str, JSON]:
    """What transformers 4 called what a config of transformers 5 says of dtype and rotary positions, where it
    does not say that too; `cast`: what the floats become. A program that knows those keys alone takes its own
    defaults for what they lack."""
    here, there = dtypes.CONFIG_KEYS
    told: dict[str, JSON] = {there: config.get(here) if cast is None else cast.name}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        kind = rope.get("rope_type") or rope.get("type") or "default"
        alone = "rope_theta", "partial_rotary_factor"
        told |= {key: rope.get(key) for key in alone}
        scaling = {key: value for key, value in rope.items() if key not in alone}
        told["rope_scaling"] = {**scaling, "type": kind} if kind != "default" else None
    return {key: value for key, value in told.items() if value is not None and config.get(key) is None}


def _typed(config: Mapping[str, JSON], cast: DType) -> dict[str, JSON]:
    """The keys of a config, and of those within it, that name another dtype than `cast`, and what they
    become: programs load by what a config says, and round without a word what the files hold."""
    typed: dict[str, JSON] = {
        k: cast.name for k in dtypes.CONFIG_KEYS if config.get(k) not in (None, cast.name)
    }
    within = {k: v for k, v in config.items() if k.endswith("_config") and k != "quantization_config"}
    for key, part in within.items():
        if isinstance(part, dict):
            typed[key] = {**part, **_typed(part, cast)}
    return {key: value for key, value in typed.items() if value != config[key]}


def quantised(config: bytes | None, spelled: Mapping[str, JSON]) -> bytes | None:
    """The config.json with its `quantization_config`, where there is one."""
    if config is None or not spelled:
        return config
    return (json.dumps({**json.loads(config), "quantization_config": spelled}, indent=2) + "\n").encode()


def dtype(config: Mapping[str, JSON] | None, asked: str | DType | None) -> DType | None:
    """What the floats become: the dtype asked for, for "auto" the config's, for None as they are stored.

    Raises ViewError for one that floats are never cast to."""
    if asked is None:
        return None
    named = dtypes.of_config(config or {}) if asked == "auto" else dtypes.dtype(asked)
    if named is None:
        raise RecipeError('dtype "auto": the config names no dtype or torch_dtype')
    if named.kind != "float":
        floats = ", ".join(d.name for d in dtypes.DTYPES if d.kind == "float")
        raise ViewError(f"dtype {named}: floats are cast to floats alone ({floats})")
    return named


def require_scales(cast: DType | None) -> None:
    """Raises ViewError for fp8 as a file's dtype: without scales, weights are cut off without a word."""
    if cast in (dtypes.float8_e4m3fn, dtypes.float8_e5m2):
        raise ViewError(
            f"dtype {cast}: a cast alone writes no scales, and what is too large or small is lost; "
            "quant= (--quant fp8, fp8-channel, fp8-block, ...) writes fp8 with its scales"
        )
