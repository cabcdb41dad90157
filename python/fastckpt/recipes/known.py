"""What a module of families offers: for each `model_type` its recipe and the names that are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from ..checkpoint import JSON, Checkpoint
from ..model import Model


class Recipe(Protocol):
    """Checks every name and shape against the config at once; roles are built when they are asked for.

    `vocab_size`: how many embedding rows count, where checkpoint and config differ. Raises RecipeError for a
    name that is missing, does not fit, or has no role."""

    def __call__(
        self, ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None
    ) -> Model: ...


def _nothing(name: str) -> tuple[str, ...]:
    return ()


class Known(NamedTuple):
    """A family's recipe, the patterns of names that it knows and leaves out, and what the hub calls a tensor
    of its experts by the name in training (`moe.saved_as`)."""

    recipe: Recipe
    ignored: tuple[str, ...] = ()
    saved_as: Callable[[str], tuple[str, ...]] = _nothing
