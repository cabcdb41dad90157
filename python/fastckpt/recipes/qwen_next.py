"""Qwen3-Next and Qwen3.5's text models: linear attention in most layers, output gates in the others.

They may carry a layer for multi-token prediction, which transformers leaves out: a checkpoint it trained has
none.
"""

from __future__ import annotations

from dataclasses import replace

from ..model import HubCuts
from .decoder import decoders
from .delta import StoredDelta, delta_net
from .kind import Further, Kind, Norms, QkNorm, SelfAttention
from .mixture import Mixture, every, mixtures, stepped
from .qwen_moe import SHARED

_NEXT = Kind(
    "qwen3_next",
    SelfAttention(qk_norm=QkNorm(), gated=True),
    norms=Norms(plus_one=True),
    mixer=delta_net(StoredDelta({"in_proj_qkvz": "qkvz", "in_proj_ba": "ba"}, grouped=True)),
    further=Further(
        layer="mtp.layers.0",
        at="mtp",
        join="fc",
        embedding_norm="pre_fc_norm_embedding",
        hidden_norm="pre_fc_norm_hidden",
        norm="norm",
    ),
    cuts=HubCuts(rows=True),
)
QWEN3_NEXT = Mixture(_NEXT, sparse=stepped, shared=SHARED)
QWEN3_5 = replace(
    _NEXT,
    family="qwen3_5_text",
    mixer=delta_net(
        StoredDelta({"in_proj_qkv": "qkv", "in_proj_z": "z", "in_proj_b": "b", "in_proj_a": "a"})
    ),
)
QWEN3_5_MOE = Mixture(replace(QWEN3_5, family="qwen3_5_moe_text"), sparse=every, shared=SHARED)

FAMILIES = mixtures(QWEN3_NEXT, QWEN3_5_MOE) | decoders(QWEN3_5)
