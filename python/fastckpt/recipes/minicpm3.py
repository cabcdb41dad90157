"""MiniCPM 3: latent attention as DeepSeek-V2's in a decoder without experts. Source: transformers'
modeling_minicpm3.py and configuration_minicpm3.py."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import JSON, Checkpoint
from ..model import Model
from .claims import dim, integer
from .decoder import claimed, decoder
from .dense import Feeding, dense
from .kind import IGNORED, MLP_BIAS, TIED, FeedForward, Kind
from .known import Known
from .latent import attending, latent

KIND = Kind("minicpm3", mlp=FeedForward(bias=MLP_BIAS), vocabulary=TIED)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a MiniCPM 3 checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims, width = claimed(KIND, ckpt, config), dim(config, "intermediate_size")
    config = {**config, "rope_interleave": False}  # as transformers' class has it, without saying so
    if config.get("v_head_dim") is None:
        each = integer(config, "hidden_size") // integer(config, "num_attention_heads")
        config = {**config, "v_head_dim": each}
    return decoder(
        KIND,
        claims,
        config,
        vocab_size,
        attending(claims, config, latent),
        Feeding(dense(KIND.mlp, claims, config, width), {width.key: width.size}),
    )


FAMILIES = {"minicpm3": Known(recipe, IGNORED)}
