"""Jamba: mixers of Mamba's first version in place of most attention, experts in place of some blocks.

What x, z and the others are is in `mixers.Selective`. transformers' plan leaves all but experts, embedding
and head whole. Source: transformers' configuration_jamba.py and modeling_jamba.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..checkpoint import JSON
from ..errors import RecipeError
from ..mixers import Selective
from ..model import HubCuts, Sizes
from ..roles import Parameter
from .claims import Claims, Dim, absent, dim, flag, integer
from .fused import parts
from .kind import UNBIASED, FeedForward, Kind, Mixer, Norms
from .mixture import Mixture, mixtures
from .moe import Block


def _every(config: Mapping[str, JSON], kind: str, period: int, offset: int) -> Callable[[int], bool]:
    """Which layers are of a kind: from one on every so many, as config's class has it. Raises RecipeError."""
    each = integer(config, f"{kind}_layer_period", period)
    first = integer(config, f"{kind}_layer_offset", offset, least=0)
    if first >= each:
        raise RecipeError(f"config: {kind}_layer_offset {first} is not below {kind}_layer_period {each}")
    return lambda layer: layer % each == first


def _sparse(config: Mapping[str, JSON]) -> Callable[[int], bool]:
    """Layers have experts where there is more than one."""
    several = integer(config, "num_experts", integer(config, "num_local_experts", 16)) > 1
    chosen = _every(config, "expert", 2, 1)
    return lambda layer: several and chosen(layer)


def _mixed(config: Mapping[str, JSON], count: int) -> list[bool]:
    """Which layers have a mixer in place of attention."""
    full = _every(config, "attn", 8, 4)
    return [not full(i) for i in range(count)]


def _sized(sizes: Sizes, config: Mapping[str, JSON]) -> Sizes:
    return replace(sizes, channels=_width(config).size)


def _width(config: Mapping[str, JSON]) -> Dim:
    return dim(config, "hidden_size").times(integer(config, "mamba_expand", 2))


def _mixers(claims: Claims, config: Mapping[str, JSON]) -> Callable[[str], Callable[[], Selective]]:
    hidden, width = dim(config, "hidden_size"), _width(config)
    state, kernel = dim(config, "mamba_d_state", default=16), dim(config, "mamba_d_conv", default=4)
    silent = {} if config.get("mamba_dt_rank") == "auto" else config
    rank = dim(silent, "mamba_dt_rank", default=-(-hidden.size // 16))
    three = Dim(rank.size + 2 * state.size, f"{rank.key} + 2 * {state.key}")
    bias = flag(config, "mamba_proj_bias", False)

    def claim(layer: str) -> Callable[[], Selective]:
        at = f"{layer}.mamba"
        both = claims.linear(f"{at}.in_proj", width.times(2), hidden, bias=bias)
        conv = claims.parameter(f"{at}.conv1d.weight", width, Dim(1, "1"), kernel)
        offset: Callable[[], Parameter | None] = absent
        if flag(config, "mamba_conv_bias", True):
            offset = claims.parameter(f"{at}.conv1d.bias", width)
        select, steps = (
            claims.linear(f"{at}.x_proj", three, width),
            claims.linear(f"{at}.dt_proj", width, rank, bias=True),
        )
        norms = [
            claims.norm(f"{at}.{name}_layernorm", size)
            for name, size in (("dt", rank), ("b", state), ("c", state))
        ]
        a_log = claims.parameter(f"{at}.A_log", width, state, kept=True)
        d = claims.parameter(f"{at}.D", width)
        o = claims.linear(f"{at}.out_proj", hidden, width, bias=bias)

        def build() -> Selective:
            x, z = parts(both(), 1, [width.size] * 2)
            dt_norm, b_norm, c_norm = (norm() for norm in norms)
            return Selective(
                x, z, conv(), offset(), select(), dt_norm, b_norm, c_norm, steps(), a_log(), d(), o()
            )  # fmt: skip

        return build

    return claim


JAMBA = Mixture(
    Kind(
        "jamba",
        UNBIASED,
        FeedForward("feed_forward"),
        Norms(mlp="pre_ff_layernorm", last="model.final_layernorm"),
        mixer=Mixer(_mixed, _mixers, _sized),
        cuts=HubCuts(whole=frozenset({"attention", "mlp"})),
    ),
    Block(hub="feed_forward", router="router", trained="feed_forward"),
    width="intermediate_size",
    sparse=_sparse,
)

FAMILIES = mixtures(JAMBA)
