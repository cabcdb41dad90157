"""Linear attention by the gated delta rule, in the layers that config says.

What q, k, v, z, b and a are is in `mixers.DeltaNet`. Source: the modeling files of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ..checkpoint import JSON
from ..errors import RecipeError
from ..mixers import DeltaHeads, DeltaNet
from ..model import Sizes
from ..roles import Linear, Parameter
from ..views import cat
from .claims import Claims, Dim, dim, each_layer, integer
from .fused import parts
from .kind import Mixer, Norms


def heads_of(config: Mapping[str, JSON]) -> DeltaHeads:
    """The heads of linear attention that a config says. Raises RecipeError where the value heads do not share
    the key heads evenly."""
    heads = DeltaHeads(
        keys=integer(config, "linear_num_key_heads"),
        values=integer(config, "linear_num_value_heads"),
        key_dim=integer(config, "linear_key_head_dim"),
        value_dim=integer(config, "linear_value_head_dim"),
    )
    if heads.values % heads.keys:
        raise RecipeError(
            f"config: linear_num_value_heads {heads.values} is no multiple of linear_num_key_heads "
            f"{heads.keys}"
        )
    return heads


@dataclass(frozen=True, slots=True)
class StoredDelta:
    """How the hub stores a DeltaNet, in the module `at` of a layer. `matrices`: module -> the initials of
    what it holds, `grouped`: key head by key head, else one matrix after another; `low`: the modules of the
    matrices before a and z, () where there are none. `conv`: the modules of the kernels of q, k and v, or of
    all of them; in training they are always one, `conv1d`. `rates`: the shape of A_log around its heads,
    where they are not all of it. `norm`, `o`: the modules of those."""

    matrices: Mapping[str, str]
    grouped: bool = False
    at: str = "linear_attn"
    low: tuple[str, ...] = ()
    conv: tuple[str, ...] = ("conv1d",)
    rates: Callable[[int], tuple[int, ...]] | None = None
    norm: str = "norm"
    o: str = "out_proj"


def delta_net(stored: StoredDelta, norms: Norms | None = None) -> Mixer:
    """Linear attention in the layers that config says; `norms`: of those layers, where they are others."""
    return Mixer(_linear, partial(_delta_net, stored), _sized, norms)


def _linear(config: Mapping[str, JSON], count: int) -> list[bool]:
    """Which of `count` layers have linear attention: as `layer_types` says, or without it all but every
    `full_attention_interval`-th."""
    if config.get("layer_types") is None:
        every = integer(config, "full_attention_interval", 4)
        return [bool((i + 1) % every) for i in range(count)]
    types = each_layer(config, "layer_types", count, ("linear_attention", "full_attention"))
    return [kind == "linear_attention" for kind in types]


def _sized(sizes: Sizes, config: Mapping[str, JSON]) -> Sizes:
    return replace(sizes, delta=heads_of(config))


def _delta_net(
    stored: StoredDelta, claims: Claims, config: Mapping[str, JSON]
) -> Callable[[str], Callable[[], DeltaNet]]:
    heads, hidden = heads_of(config), dim(config, "hidden_size")
    keys = Dim(heads.keys * heads.key_dim, "linear_num_key_heads * linear_key_head_dim")
    values = Dim(heads.values * heads.value_dim, "linear_num_value_heads * linear_value_head_dim")
    each = Dim(heads.values, "linear_num_value_heads")
    rank, rated = Dim(heads.value_dim, "linear_value_head_dim"), keys if stored.low else each
    rows = {"q": keys, "k": keys, "v": values, "z": values, "b": each, "a": rated}
    groups = heads.keys if stored.grouped else 1

    def claim(layer: str) -> Callable[[], DeltaNet]:
        at = f"{layer}.{stored.at}"
        wholes = {
            held: claims.linear(
                f"{at}.{module}", _together(rows, held), rank if stored.low and held in "az" else hidden
            )
            for module, held in stored.matrices.items()
        }
        low = [claims.linear(f"{at}.{module}", rank, hidden) for module in stored.low]
        conv = _kernels(stored, claims, config, at, rows)
        shape = stored.rates(heads.values) if stored.rates is not None else (heads.values,)
        a_log = claims.parameter(f"{at}.A_log", *(Dim(n, each.key) for n in shape), kept=True)
        dt_bias = claims.parameter(f"{at}.dt_bias", rated)
        norm = claims.norm(f"{at}.{stored.norm}", rank)
        o = claims.linear(f"{at}.{stored.o}", hidden, values)

        def build() -> DeltaNet:
            found: dict[str, Linear] = {}
            for held, whole in wholes.items():
                each_rows = [rows[part].size for part in held]
                apart = parts(whole(), groups, each_rows) if len(held) > 1 else [whole()]
                found |= zip(held, apart, strict=True)
            rates, before = a_log().view, [linear() for linear in low]
            return DeltaNet(
                found["q"], found["k"], found["v"], found["z"], found["b"], found["a"], conv(),
                Parameter(f"{at}.A_log", rates.reshape((heads.values,)), stored.rates and shape),
                dt_bias(), norm(), o(),
                groups, (before[0], before[1]) if before else None,
            )  # fmt: skip

        return build

    return claim


def _together(rows: Mapping[str, Dim], held: str) -> Dim:
    return Dim(sum(rows[part].size for part in held), " + ".join(rows[part].key for part in held))


def _kernels(
    stored: StoredDelta, claims: Claims, config: Mapping[str, JSON], at: str, rows: Mapping[str, Dim]
) -> Callable[[], tuple[Parameter, Parameter, Parameter]]:
    """Claims the kernels of q, k and v: one tensor, or three whose rows follow one another; transformers 5.23
    saves three of as many rows each, whatever they are of."""
    kernel, whole = dim(config, "linear_conv_kernel_dim"), _together(rows, "qkv")
    own = [f"{at}.{module}.weight" for module in stored.conv]
    names = own if f"{at}.conv1d.weight" not in claims else [f"{at}.conv1d.weight"]
    lengths = [rows[part] for part in "qkv"] if len(names) > 1 else [whole]
    third = -(-whole.size // 3)
    thirds = [Dim(n, f"{whole.key}, cut in three") for n in (third, third, whole.size - 2 * third)]
    if len(names) > 1 and claims.shape(names[0], lengths[0], Dim(1, "1"), kernel)[:1] == (third,):
        lengths = thirds
    held = [claims.tensor(n, d, Dim(1, "1"), kernel) for n, d in zip(names, lengths, strict=True)]

    def build() -> tuple[Parameter, Parameter, Parameter]:
        view, start, found = cat([view() for view in held]), 0, []
        for part, name in zip("qkv", own * (3 // len(own)), strict=True):
            found.append(Parameter(name, view.narrow(0, start, rows[part].size)))
            start += rows[part].size
        q, k, v = found
        return q, k, v

    return build
