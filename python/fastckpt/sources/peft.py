"""Reads the directory of a PEFT adapter: adapter_config.json beside adapter_model.safetensors or .bin.

Names are PEFT's own (`base_model.model.NAME.lora_A.weight`). `computed/adapters.py` knows what they mean.
"""

from __future__ import annotations

import os
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..errors import SourceError
from ..extents import File
from ..paths import is_file
from ..plainjson import read_json
from . import safetensors, statedict
from .options import Options

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

SHOWN = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "target_parameters")
"""Keys of the adapter's config that `facts` repeats, for people."""


def weights(path: str) -> str | None:
    """The file of an adapter's weights in a directory, None for none."""
    files = (os.path.join(path, name) for name in WEIGHTS)
    return next((f for f in files if is_file(f)), None)


def read_config(path: str) -> dict[str, JSON]:
    """The JSON object in an adapter_config.json. Raises SourceError."""
    return read_json(path, 1 << 20)


def matches(path: str) -> bool:
    """Whether `path` is a directory with an adapter's config and weights, and no whole model."""
    config = is_file(os.path.join(path, CONFIG))
    return config and weights(path) is not None and not safetensors.whole_model(path)


def read(path: str, options: Options) -> Checkpoint:
    """The adapter's tensors, and in `facts` what its config says. Raises SourceError."""
    config, file = os.path.join(path, CONFIG), weights(path)
    if file is None:
        raise SourceError(f"{path}: wanted an adapter's one file of weights, {' or '.join(WEIGHTS)}")
    settings = read_config(config)
    of_file = safetensors.read if file.endswith(safetensors.SUFFIX) else statedict.read
    found = of_file(file, options)
    facts = {**found.facts, **{k: settings.get(k) for k in SHOWN}}
    return replace(found, path=path, format="peft", facts=facts, beside=(File.at(config), *found.beside))
