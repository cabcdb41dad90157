"""Model families: each recipe turns a checkpoint and its config into a Model.

A family is a file here and a line in RECIPES; a user's own function of the same signature works alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Model
from . import gpt2, llama, mixtral


class Recipe(Protocol):
    """Checks every name and shape against the config at once, then builds roles on demand.

    `vocab_size` says how many embedding rows count where the checkpoint's and config's differ. Raises
    RecipeError for a name that is missing, does not fit, or has no role."""

    def __call__(
        self, ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None
    ) -> Model: ...


RECIPES: dict[str, Recipe] = {
    "llama": llama.recipe,
    "mistral": partial(llama.recipe, kind=llama.MISTRAL),
    "qwen2": partial(llama.recipe, kind=llama.QWEN2),
    "qwen3": partial(llama.recipe, kind=llama.QWEN3),
    "mixtral": mixtral.recipe,
    "gpt2": gpt2.recipe,
}
"""transformers' `model_type` -> recipe."""


def find(config: Mapping[str, JSON]) -> Recipe:
    """The recipe for a config, by its `model_type`. Raises RecipeError naming those there are."""
    name = config.get("model_type")
    recipe = RECIPES.get(name) if isinstance(name, str) else None
    if recipe is None:
        raise RecipeError(
            f"config: no recipe for model_type {name!r}, known: {', '.join(RECIPES)}; "
            "a tp_plan of name patterns works without one"
        )
    return recipe
