"""What a module of families offers: for each `model_type` its recipe and the names that are left out."""

from __future__ import annotations

from collections.abc import Mapping
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


class Known(NamedTuple):
    """A family's recipe, and the patterns of names that it knows and leaves out."""

    recipe: Recipe
    ignored: tuple[str, ...] = ()
