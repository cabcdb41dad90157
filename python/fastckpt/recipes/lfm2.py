"""LFM2: in most layers a short gated convolution in place of attention; a mixture of experts in LFM2-MoE.

What b, c and x are is in `mixers.ShortConv`. Source: the modeling files of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..mixers import ShortConv
from ..model import HubCuts, Model, Sizes
from ..roles import Parameter
from .claims import Claims, Dim, absent, dim, each_layer, flag, integer, number
from .decoder import recipe as dense_recipe
from .fused import parts
from .kind import IGNORED, TIED, UNBIASED, FeedForward, Kind, Mixer, Norms, QkNorm
from .known import Known
from .mixture import Mixture, after
from .mixture import recipe as mixture_recipe
from .moe import Block, saved_as

WIDTH = "intermediate_size, adjusted"
"""The key of the width of a block that config's class makes of `intermediate_size`."""


def _convolved(config: Mapping[str, JSON], count: int) -> list[bool]:
    """Which layers have a convolution in place of attention."""
    return [kind == "conv" for kind in each_layer(config, "layer_types", count, ("conv", "full_attention"))]


def _sized(sizes: Sizes, config: Mapping[str, JSON]) -> Sizes:
    return replace(sizes, channels=sizes.hidden)


def _short_conv(claims: Claims, config: Mapping[str, JSON]) -> Callable[[str], Callable[[], ShortConv]]:
    hidden, kernel = dim(config, "hidden_size"), dim(config, "conv_L_cache", default=3)
    bias = flag(config, "conv_bias", False)

    def claim(layer: str) -> Callable[[], ShortConv]:
        at = f"{layer}.conv"
        whole = claims.linear(f"{at}.in_proj", hidden.times(3), hidden, bias=bias)
        conv = claims.parameter(f"{at}.conv.weight", hidden, Dim(1, "1"), kernel)
        offset: Callable[[], Parameter | None] = absent
        if bias:
            offset = claims.parameter(f"{at}.conv.bias", hidden)
        o = claims.linear(f"{at}.out_proj", hidden, hidden, bias=bias)

        def build() -> ShortConv:
            b, c, x = parts(whole(), 1, [hidden.size] * 3)
            return ShortConv(b, c, x, conv(), offset(), o())

        return build

    return claim


_LFM2 = Kind(
    "lfm2",
    replace(UNBIASED, qk_norm=QkNorm(q="q_layernorm", k="k_layernorm"), o="out_proj"),
    FeedForward("feed_forward", ("w1", "w3", "w2")),
    Norms("operator_norm", "ffn_norm", last="model.embedding_norm"),
    TIED,
    mixer=Mixer(_convolved, _short_conv, _sized),
)
LFM2 = replace(_LFM2, mlp=replace(_LFM2.mlp, width=(WIDTH,)))
LFM2_MOE = Mixture(
    replace(
        _LFM2,
        family="lfm2_moe",
        cuts=HubCuts(whole=frozenset({"attention", "mlp", "intermediate_size"})),
    ),
    Block(hub="feed_forward", gate="w1", up="w3", down="w2", trained="feed_forward"),
    count=("num_experts",),
    sparse=after("num_dense_layers", 2),
)


def lfm2(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a checkpoint of LFM2, whose blocks are of another width than `intermediate_size`. Raises
    RecipeError."""
    told = _told(config)
    width = integer(config, "block_ff_dim", integer(config, "intermediate_size", 12288))
    if flag(config, "block_auto_adjust_ff_dim", True):
        unit, width = integer(config, "block_multiple_of", 256), 2 * width // 3
        if "block_ffn_dim_multiplier" not in config or config["block_ffn_dim_multiplier"] is not None:
            width = int(number(config, "block_ffn_dim_multiplier", 1.0, least=0) * width)
            width = -(-width // unit) * unit
    return dense_recipe(ckpt, {**told, WIDTH: width}, vocab_size=vocab_size, kind=LFM2)


def lfm2_moe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a checkpoint of LFM2-MoE; its routing is corrected unless config says otherwise. Raises
    RecipeError."""
    corrected = flag(config, "use_expert_bias", True)
    block = replace(LFM2_MOE.block, correction="expert_bias" if corrected else "")
    return mixture_recipe(ckpt, _told(config), vocab_size=vocab_size, mixture=replace(LFM2_MOE, block=block))


def _told(config: Mapping[str, JSON]) -> dict[str, JSON]:
    """The config with what older ones say by other keys. Raises RecipeError."""
    told = dict(config)
    if config.get("tie_embedding") is not None:
        told["tie_word_embeddings"] = config["tie_embedding"]
    if config.get("layer_types") is None:
        count = integer(config, "num_hidden_layers")
        those = config.get("full_attn_idxs")
        if those is not None and (not isinstance(those, list) or any(i not in range(count) for i in those)):
            raise RecipeError(f"config: full_attn_idxs must be numbers of {count} layers, got {those!r}")
        full = range(count) if those is None else those
        told["layer_types"] = ["full_attention" if i in full else "conv" for i in range(count)]
    return told


FAMILIES = {
    "lfm2": Known(lfm2, IGNORED),
    "lfm2_moe": Known(lfm2_moe, IGNORED, partial(saved_as, LFM2_MOE.block)),
}
