"""Mamba-2 mixers, and which blocks each layer of a hybrid has.

What z, x, b, c and dt are is in `mixers.Mamba`. Source: the modeling files of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import JSON
from ..errors import RecipeError
from ..mixers import Mamba, MambaHeads
from ..roles import Parameter
from .claims import Claims, Dim, absent, dim, each_layer, flag, integer
from .fused import parts

Blocks = frozenset[str]
"""What a layer has: of "attention", "mamba" and "mlp" (a feed-forward block, with experts or without)."""

TWO = frozenset({"attention", "mlp"})
"""A layer of most decoders."""

KINDS = {
    "full_attention": "attention",
    "attention": "attention",
    "linear_attention": "mamba",
    "mamba": "mamba",
}
"""What config's `layer_types` say, by transformers' names and by the hub's older ones."""


@dataclass(frozen=True, slots=True)
class StoredMamba:
    """How the hub stores a Mamba, in the module `at` of a layer. `blocks`: what each layer of a config has,
    of so many. Of config's keys, `heads`, `dim`, `groups`, `state` and `kernel` say its sizes, `conv_bias`,
    `in_bias` and `out_bias` its biases, and `norm` whether it has a norm ("": it always has)."""

    blocks: Callable[[Mapping[str, JSON], int], Sequence[Blocks]]
    at: str = "mamba"
    heads: str = "mamba_n_heads"
    dim: str = "mamba_d_head"
    groups: str = "mamba_n_groups"
    state: str = "mamba_d_state"
    kernel: str = "mamba_d_conv"
    conv_bias: str = "mamba_conv_bias"
    in_bias: str = "mamba_proj_bias"
    out_bias: str = "mamba_proj_bias"
    norm: str = ""


def every(config: Mapping[str, JSON], count: int) -> list[Blocks]:
    """All layers have attention and a mixer side by side."""
    return [TWO | {"mamba"}] * count


def typed(config: Mapping[str, JSON], count: int) -> list[Blocks]:
    """Layers have what `layer_types` says, a mixer where there is none. Raises RecipeError."""
    if config.get("layer_types") is None:
        return [frozenset({"mamba", "mlp"})] * count
    return [frozenset({KINDS[kind], "mlp"}) for kind in each_layer(config, "layer_types", count, [*KINDS])]


def listed(config: Mapping[str, JSON], count: int) -> list[Blocks]:
    """Layers have attention that `attn_layer_indices` names, all others a mixer. Raises RecipeError."""
    those = config.get("attn_layer_indices") or []
    if not isinstance(those, list) or any(i not in range(count) for i in those):
        raise RecipeError(f"config: attn_layer_indices must be numbers of {count} layers, got {those!r}")
    return [TWO if i in those else frozenset({"mamba", "mlp"}) for i in range(count)]


def heads_of(stored: StoredMamba, config: Mapping[str, JSON]) -> MambaHeads:
    """The heads of the mixers that a config says. Raises RecipeError where they do not share the groups
    evenly."""
    count, said = integer(config, stored.heads), config.get(stored.dim)
    width = integer(
        config, "mamba_d_ssm", integer(config, "mamba_expand", 2) * integer(config, "hidden_size")
    )
    silent = {} if said == "auto" else config
    heads = MambaHeads(
        heads=count,
        groups=integer(config, stored.groups),
        dim=integer(silent, stored.dim, width // count),
        state=integer(config, stored.state),
    )
    if heads.heads % heads.groups:
        raise RecipeError(f"config: {stored.heads} {count} is no multiple of {stored.groups} {heads.groups}")
    return heads


def mixers(
    stored: StoredMamba, claims: Claims, config: Mapping[str, JSON]
) -> Callable[[str], Callable[[], Mamba]]:
    """What claims the mixer of a layer by the layer's name."""
    sizes, hidden = heads_of(stored, config), dim(config, "hidden_size")
    heads, kernel = Dim(sizes.heads, stored.heads), dim(config, stored.kernel)
    width = Dim(sizes.heads * sizes.dim, f"{stored.heads} * {stored.dim}")
    state = Dim(sizes.groups * sizes.state, f"{stored.groups} * {stored.state}")
    rows, channels = (width, width, state, state, heads), (width, state, state)
    normed = not stored.norm or flag(config, stored.norm, False)

    def together(held: Sequence[Dim]) -> Dim:
        return Dim(sum(each.size for each in held), " + ".join(each.key for each in held))

    def claim(layer: str) -> Callable[[], Mamba]:
        at, both = f"{layer}.{stored.at}", together(channels)
        matrix = claims.linear(
            f"{at}.in_proj", together(rows), hidden, bias=flag(config, stored.in_bias, False)
        )
        kernels = claims.parameter(f"{at}.conv1d.weight", both, Dim(1, "1"), kernel)
        conv_bias = (
            claims.parameter(f"{at}.conv1d.bias", both) if flag(config, stored.conv_bias, True) else absent
        )
        a_log = claims.parameter(f"{at}.A_log", heads, kept=True)
        d, dt_bias = (claims.parameter(f"{at}.{name}", heads) for name in ("D", "dt_bias"))
        norm = claims.norm(f"{at}.norm", width) if normed else absent
        o = claims.linear(f"{at}.out_proj", hidden, width, bias=flag(config, stored.out_bias, False))

        def apart(whole: Parameter) -> tuple[Parameter, Parameter, Parameter]:
            x, b, c = (
                Parameter(whole.name, whole.view.narrow(0, start, size))
                for start, size in (
                    (0, width.size), (width.size, state.size), (width.size + state.size, state.size)
                )
            )  # fmt: skip
            return x, b, c

        def build() -> Mamba:
            z, x, b, c, dt = parts(matrix(), 1, [each.size for each in rows])
            bias = conv_bias()
            biases = None if bias is None else apart(bias)
            return Mamba(
                z, x, b, c, dt, apart(kernels()), biases, a_log(), d(), dt_bias(), norm(), o()
            )  # fmt: skip

        return build

    return claim
