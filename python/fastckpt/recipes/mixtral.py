"""Mixtral: the decoder with a mixture of experts in each layer.

The hub stores each expert as `block_sparse_moe.experts.{e}.w1` (gate), `w3` (up) and `w2` (down).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import JSON, Checkpoint
from ..model import Model
from .claims import Claims, dim
from .decoder import ANCHOR, Kind, decoder
from .moe import Block, experts
from .quantised import quantised

MIXTRAL = Kind("mixtral", qkv_bias=False, o_bias=False)
BLOCK = Block(hub="block_sparse_moe", gate="w1", up="w3", down="w2")


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Mixtral checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, ANCHOR, form=quantised(config))
    hidden = dim(config, "hidden_size")
    width = dim(config, "intermediate_size")
    count = dim(config, "num_local_experts")
    return decoder(
        MIXTRAL,
        claims,
        config,
        vocab_size,
        lambda layer: experts(claims, layer, BLOCK, count, width, hidden),
        {width.key: width.size},
        experts=count.size,
        expert_width=width.key,
    )
