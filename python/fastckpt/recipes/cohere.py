"""Cohere's Command: attention and the feed-forward block, or experts, read one norm, side by side; embedding
and head are one."""

from __future__ import annotations

from dataclasses import replace

from ..model import HubCuts
from .decoder import decoders
from .kind import TIED, FeedForward, Kind, QkNorm, Said, SelfAttention
from .mixture import Mixture, Shared, mixtures, typed

COHERE2 = Kind("cohere2", vocabulary=TIED, parallel=True)
COHERE = replace(
    COHERE2, family="cohere", attention=SelfAttention(qk_norm=QkNorm(Said("use_qk_norm"), own=True))
)
COHERE2_MOE = Mixture(
    replace(
        COHERE2,
        family="cohere2_moe",
        mlp=FeedForward(width=("prefix_dense_intermediate_size", "intermediate_size")),
        cuts=HubCuts(whole=frozenset({"shared", "num_shared_experts * intermediate_size"})),
    ),
    count=("num_experts",),
    width="intermediate_size",
    sparse=typed(0),
    shared=Shared(count="num_shared_experts"),
)

FAMILIES = decoders(COHERE, COHERE2) | mixtures(COHERE2_MOE)
