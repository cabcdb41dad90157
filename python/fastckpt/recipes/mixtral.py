"""Mixtral: a mixture of experts in each layer.

The hub stores each expert as `block_sparse_moe.experts.{e}.w1` (gate), `w3` (up) and `w2` (down).
"""

from __future__ import annotations

from .decoder import Kind
from .mixture import Mixture
from .moe import Block

BLOCK = Block(hub="block_sparse_moe", gate="w1", up="w3", down="w2")
MIXTRAL = Mixture(
    Kind("mixtral", qkv_bias=False, o_bias=False),
    BLOCK,
    count=("num_local_experts",),
    width="intermediate_size",
)
