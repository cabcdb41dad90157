"""GraniteMoE, alone and beside a shared block: all experts in two tensors, gate and up as one."""

from __future__ import annotations

from dataclasses import replace

from ..model import HubCuts, Stacked
from .kind import FeedForward, Kind
from .mixture import Mixture, Shared, mixtures
from .moe import Block

GRANITEMOE = Mixture(
    Kind("granitemoe", cuts=HubCuts(whole=frozenset({"attention"}))),
    Block(
        hub="block_sparse_moe",
        router="router.layer",
        stacked=Stacked("input_linear.weight", "output_linear.weight"),
        trained="block_sparse_moe",
        trained_router="router",
    ),
    count=("num_local_experts",),
    width="intermediate_size",
)
GRANITEMOESHARED = replace(
    GRANITEMOE,
    kind=Kind(
        "granitemoeshared",
        mlp=FeedForward(matrices=("input_linear", "output_linear"), paired=True),
        cuts=HubCuts(whole=frozenset({"attention", "shared", "shared_intermediate_size"})),
    ),
    shared=Shared("shared_mlp", width="shared_intermediate_size"),
)

FAMILIES = mixtures(GRANITEMOE, GRANITEMOESHARED)
