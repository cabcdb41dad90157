"""Mixtral, Phi-3.5-MoE and MiniMax-M2: a mixture of experts in each layer.

The hub stores each expert as `block_sparse_moe.experts.{e}.w1` (gate), `w3` (up) and `w2` (down).
"""

from __future__ import annotations

from dataclasses import replace

from ..model import HubCuts
from .kind import UNBIASED, Kind, Norms, QkNorm, Said, Vocabulary
from .meta import Meta
from .mixture import Mixture, mixtures
from .moe import Block

BLOCK = Block(hub="block_sparse_moe", gate="w1", up="w3", down="w2")
META = Meta(
    pairs=True,
    names={"feed_forward.gate.weight": "block_sparse_moe.gate.weight"}
    | {
        f"feed_forward.experts.{{e}}.{name}.weight": f"block_sparse_moe.experts.{{e}}.{name}.weight"
        for name in (BLOCK.gate, BLOCK.up, BLOCK.down)
    },
)
"""Mistral's, of Mixtral 8x22B and later."""
MIXTRAL = Mixture(
    Kind("mixtral", UNBIASED, meta=META),
    BLOCK,
    count=("num_local_experts",),
    width="intermediate_size",
)
PHIMOE = replace(
    MIXTRAL,
    kind=Kind(
        "phimoe",
        norms=Norms(bias=True),
        vocabulary=Vocabulary(head_bias=Said("lm_head_bias")),
        cuts=HubCuts(whole=frozenset({"attention"})),
    ),
    block=replace(BLOCK, trained_router="router"),
)
MINIMAX_M2 = replace(
    MIXTRAL,
    kind=Kind("minimax_m2", replace(UNBIASED, qk_norm=QkNorm(whole=True))),
    block=replace(BLOCK, correction="e_score_correction_bias"),
)

FAMILIES = mixtures(MIXTRAL, PHIMOE, MINIMAX_M2)
