"""Image towers: what makes hidden vectors of images beside the decoder of a vision-language model.

A tower's layers are a decoder's, under other names (`StoredLayer`); patches, positions, outer norms and most
projectors are carried, since no server cuts them. Names and shapes as transformers' modeling files have them,
sizes that a config leaves out as its config classes have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..checkpoint import JSON
from ..mixers import Attention
from ..model import Layer, Layers, Mlp, Sizes, Tower
from ..roles import Linear, Parameter
from .claims import Claims, Dim, Heads, absent, dim, section
from .fused import fused_attention

Config = Mapping[str, JSON]
Shapes = dict[str, tuple[Dim, ...]]
Built = tuple[Tower, tuple[Parameter, ...]]
"""A tower, and the tensors beside its layers and mergers."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """How a layer is stored. The names of its modules: norms; q, k, v (or all three as one) and o; gate (if
    any), up and down; and which of them have biases."""

    norms: tuple[str, str]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    norm_bias: bool = True
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True


def vision(config: Config, defaults: Mapping[str, int] | None = None) -> Config:
    """config's `vision_config`, with `defaults` for the sizes it leaves out; keys are spelled as in the whole
    config. Raises RecipeError where there is none."""
    return part(config, "vision_config", defaults)


def part(config: Config, key: str, defaults: Mapping[str, int] | None = None) -> Config:
    """`vision` of another part of a config."""
    return {f"{key}.{k}": v for k, v in {**(defaults or {}), **section(config, key)}.items()}


def of(said: Config, key: str, default: int | None = None) -> Dim:
    """The size under a key of `vision`. Raises RecipeError."""
    return dim(said, f"vision_config.{key}", default=default)


def carried(claims: Claims, at: str, shapes: Shapes) -> tuple[Parameter, ...]:
    """Claims the tensors of these names below the module `at`."""
    return tuple(claims.parameter(f"{at}.{name}", *dims)() for name, dims in shapes.items())


def norms(names: tuple[str, ...], size: Dim, *, bias: bool = True) -> Shapes:
    """Norms over an axis of that size."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{leaf}": (size,) for name in names for leaf in leaves}


def blocks(
    claims: Claims,
    at: str,
    count: Dim,
    block: StoredLayer,
    hidden: Dim,
    heads: Dim,
    width: Dim,
    mergers: tuple[Mlp, ...],
    kv: int | None = None,
) -> Tower:
    """Claims the layers `at`.{i} of a tower. `heads`: how many share the hidden size; `kv`: how many of keys
    and values there are, where that is not as many."""
    each = Heads.of(hidden, heads, kv)
    sizes = Sizes(hidden.size, 0, each.q, each.kv, each.dim, {width.key: width.size})
    layers = [_layer(claims, f"{at}.{i}", block, hidden, each, width) for i in range(count.size)]
    return Tower(Layers(layers), sizes, count.size, mergers)


def _layer(
    claims: Claims, name: str, block: StoredLayer, hidden: Dim, heads: Heads, width: Dim
) -> Callable[[], Layer]:
    before, between = (claims.norm(f"{name}.{n}", hidden, bias=block.norm_bias) for n in block.norms)
    *qkv, last = (f"{name}.{n}" for n in block.attention)
    o = claims.linear(last, hidden, hidden, bias=block.o_bias)
    if len(qkv) == 1:
        rows = Dim((heads.q + 2 * heads.kv) * heads.dim, "(heads + 2 * kv heads) * head size")
        whole = claims.linear(qkv[0], rows, hidden, bias=block.qkv_bias)
        attends = fused_attention(whole, o, heads)
    else:
        q, k, v = (claims.linear(n, hidden, hidden, bias=block.qkv_bias) for n in qkv)

        def attends() -> Attention:
            return Attention(q(), k(), v(), o())

    feeds = mlp(claims, name, block.mlp, width, hidden, bias=block.mlp_bias)
    return lambda: Layer(name, before(), attends(), between(), feeds())


def mlp(
    claims: Claims,
    at: str,
    names: tuple[str, ...],
    width: Dim,
    hidden: Dim,
    out: Dim | None = None,
    *,
    bias: bool = True,
) -> Callable[[], Mlp]:
    """Claims a block of the modules `names` below `at`: gate (if there are three), up, and down to `out`,
    `hidden` unless told."""
    *into, last = (f"{at}.{n}" for n in names)
    first = [claims.linear(n, width, hidden, bias=bias) for n in into]
    down = claims.linear(last, out or hidden, width, bias=bias)
    gate: Callable[[], Linear | None] = first[0] if len(first) == 2 else absent
    return lambda: Mlp(gate(), first[-1](), down())
