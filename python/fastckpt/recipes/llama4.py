"""Llama 4, text: experts in two tensors [experts, in, out], in every layer or every second one; quantised
releases have them one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON
from ..errors import RecipeError
from ..model import Stacked
from .claims import integer
from .kind import FeedForward, Kind
from .mixture import Mixture, Shared, mixtures
from .moe import Block


def interleaved(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    """The layers `moe_layers`, or every `interleave_moe_layer_step`-th one (0: none)."""
    said = config.get("moe_layers")
    if said is not None and not isinstance(said, list):
        raise RecipeError(f"config: moe_layers must be a list of numbers, got {said!r}")
    if isinstance(said, list):
        return lambda layer: layer in said
    step = integer(config, "interleave_moe_layer_step", 1, least=0)
    return lambda layer: step > 0 and (layer + 1) % step == 0


LLAMA4_TEXT = Mixture(
    Kind("llama4_text", mlp=FeedForward("feed_forward", width=("intermediate_size_mlp",))),
    Block(
        hub="feed_forward",
        router="router",
        stacked=Stacked("experts.gate_up_proj", "experts.down_proj", transposed=True, singly=True),
        trained="feed_forward",
    ),
    count=("num_local_experts",),
    width="intermediate_size",
    sparse=interleaved,
    shared=Shared("feed_forward.shared_expert", count="", default=1),
)

FAMILIES = mixtures(LLAMA4_TEXT)
