"""A run's directory: a file that names the last save, and a directory for each.

Megatron-LM has `iter_NNNNNNN` and `release` (megatron/training/checkpointing.py: get_checkpoint_name,
read_metadata), verl `global_step_N`, with the models of its roles in it (0.9.1, trainer/ppo/ray_trainer.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ..errors import SourceError
from ..paths import content, is_directory, is_file, listed

TRACKER = "latest_checkpointed_iteration.txt"
HUB = "huggingface"
"""Where verl puts config.json and the tokenizer."""

_SAVE = re.compile(r"iter_\d{7,}|release|global_step_\d+")
_MODELS = ("actor", "policy")
"""Where in a save the model lies that is trained to be served."""


def is_run(path: str) -> bool:
    """Whether a directory says which save is its last."""
    return is_file(os.path.join(path, TRACKER))


def saves(path: str) -> list[str]:
    """The names of a run's saves."""
    return [n for n in listed(path, "*") if _SAVE.fullmatch(n) and is_directory(os.path.join(path, n))]


def chosen(path: str, tag: str | None) -> str:
    """The directory of a save: of `tag`, or of the one that the tracker names; `path` where neither is.

    Raises SourceError for a save that is not there."""
    if tag is None:
        if not is_run(path):
            return path
        tag = content(os.path.join(path, TRACKER), 64).decode(errors="replace").strip()
    number = tag.isascii() and tag.isdigit()
    names = [f"iter_{int(tag):07d}", f"global_step_{int(tag)}"] if number else [tag]
    if not any(map(_SAVE.fullmatch, names)):
        raise SourceError(
            f"{path}: {tag!r} is no save; wanted a number, iter_NNNNNNN, release or global_step_N"
        )
    for name in names:
        if is_directory(root := os.path.join(path, name)):
            return root
    raise SourceError(f"{path}: no save {tag!r}; there is {', '.join(saves(path)) or 'none'}")


def models(save: str) -> Iterator[str]:
    """The directories in which the model of a save may lie."""
    return filter(is_directory, (save, *(os.path.join(save, name) for name in _MODELS)))
