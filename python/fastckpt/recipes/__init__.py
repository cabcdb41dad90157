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
from . import (
    bert,
    chatglm,
    decoder,
    deepseek,
    gemma,
    glm,
    gpt2,
    gpt_oss,
    llama,
    mixtral,
    neox,
    phi3,
    qwen_moe,
    t5,
    whisper,
)


class Recipe(Protocol):
    """Checks every name and shape against the config at once, then builds roles on demand.

    `vocab_size` says how many embedding rows count where the checkpoint's and config's differ. Raises
    RecipeError for a name that is missing, does not fit, or has no role."""

    def __call__(
        self, ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None
    ) -> Model: ...


RECIPES: dict[str, Recipe] = {
    "llama": partial(decoder.recipe, kind=llama.LLAMA),
    "mistral": partial(decoder.recipe, kind=llama.MISTRAL),
    "qwen2": partial(decoder.recipe, kind=llama.QWEN2),
    "qwen3": partial(decoder.recipe, kind=llama.QWEN3),
    "gemma": partial(decoder.recipe, kind=gemma.GEMMA),
    "gemma2": partial(decoder.recipe, kind=gemma.GEMMA2),
    "gemma3_text": partial(decoder.recipe, kind=gemma.GEMMA3),
    "phi3": partial(decoder.recipe, kind=phi3.PHI3),
    "glm": partial(decoder.recipe, kind=glm.GLM),
    "glm4": partial(decoder.recipe, kind=glm.GLM4),
    "mixtral": mixtral.recipe,
    "qwen2_moe": partial(qwen_moe.recipe, kind=qwen_moe.QWEN2_MOE),
    "qwen3_moe": qwen_moe.recipe,
    "glm4_moe": partial(deepseek.recipe, family=deepseek.GLM4_MOE),
    "deepseek_v2": partial(deepseek.recipe, family=deepseek.V2),
    "deepseek_v3": deepseek.recipe,
    "gpt_oss": gpt_oss.recipe,
    "gpt2": gpt2.recipe,
    "gpt_neox": neox.neox,
    "bloom": neox.bloom,
    "falcon": neox.falcon,
    "chatglm": chatglm.recipe,
    "bert": bert.recipe,
    "roberta": partial(bert.recipe, names=bert.ROBERTA),
    "t5": t5.recipe,
    "whisper": whisper.recipe,
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
