"""Cohere's Command: attention and the feed-forward block, or experts, read one norm, side by side; embedding
and head are one."""

from __future__ import annotations

from dataclasses import replace

from ..model import HubCuts
from .decoder import Kind, Said
from .decoder import families as kinds
from .mixture import Mixture, Shared, typed
from .mixture import families as mixtures

COHERE = Kind("cohere", qk_norm=Said("use_qk_norm"), own_norms=True, parallel=True, tied=True)
COHERE2 = Kind("cohere2", parallel=True, tied=True)
COHERE2_MOE = Mixture(
    replace(
        COHERE2,
        family="cohere2_moe",
        width=("prefix_dense_intermediate_size", "intermediate_size"),
        cuts=HubCuts(whole=frozenset({"shared", "num_shared_experts * intermediate_size"})),
    ),
    count=("num_experts",),
    width="intermediate_size",
    sparse=typed(0),
    shared=Shared(count="num_shared_experts"),
)

FAMILIES = kinds(COHERE, COHERE2) | mixtures(COHERE2_MOE)
