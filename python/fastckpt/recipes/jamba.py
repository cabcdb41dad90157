"""Jamba: mixers of Mamba's first version in place of most attention, experts in place of some blocks.

What x, z and the others are is in `model.Selective`. transformers' plan leaves all but experts, embedding and
head whole. Source: transformers' configuration_jamba.py and modeling_jamba.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..mixers import Selective
from ..model import HubCuts, Model
from ..roles import Parameter
from .claims import Claims, Dim, absent, dim, flag, integer
from .decoder import Kind, Norms
from .delta import Claim
from .fused import parts
from .known import Known
from .mixture import Mixture
from .mixture import recipe as mixture_recipe
from .moe import Block, saved_as


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


def _mixed(claims: Claims, config: Mapping[str, JSON], attends: Claim) -> Claim:
    """Attention in the layers that config says, a mixer in all others."""
    mixes, full = _mixers(claims, config), _every(config, "attn", 8, 4)
    return lambda layer: (attends if full(int(layer.rpartition(".")[2])) else mixes)(layer)


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
        qkv_bias=False,
        o_bias=False,
        mlp="feed_forward",
        norms=Norms(mlp="pre_ff_layernorm", last="model.final_layernorm"),
        mixed=_mixed,
        cuts=HubCuts(whole=frozenset({"attention", "mlp"})),
    ),
    Block(hub="feed_forward", router="router", trained="feed_forward"),
    width="intermediate_size",
    sparse=_sparse,
)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Jamba checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    model = mixture_recipe(ckpt, config, vocab_size=vocab_size, mixture=JAMBA)
    return replace(model, sizes=replace(model.sizes, channels=_width(config).size))


FAMILIES = {"jamba": Known(recipe, JAMBA.kind.ignored, partial(saved_as, JAMBA.block))}
