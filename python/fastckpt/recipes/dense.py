"""Feed-forward blocks without experts, as most families store them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..checkpoint import JSON
from ..model import Experts, Mlp
from ..roles import Linear
from .claims import Claims, Dim, dim
from .fused import fused_mlp
from .kind import GATED, FeedForward, has


@dataclass(frozen=True, slots=True)
class Feeding:
    """The feed-forward blocks of a model's layers: `claim` claims that of one by the layer's name, and
    returns what builds it; the others as in Sizes."""

    claim: Callable[[str], Callable[[], Mlp | Experts]]
    widths: Mapping[str, int]
    experts: int = 0
    expert_width: str = ""
    shared_width: str = ""


def dense(
    stored: FeedForward,
    claims: Claims,
    config: Mapping[str, JSON],
    width: Dim,
    at: str = "",
    trained: str = "",
) -> Callable[[str], Callable[[], Mlp]]:
    """What claims the block of a layer by the layer's name, that wide; of the module `at` ("": as stored), or
    `trained`, its name in training, where that is another."""
    hidden, at = dim(config, "hidden_size"), at or stored.at
    bias = has(config, stored.bias)
    matrices = stored.matrices
    if len(matrices) == 3:
        return lambda layer: gated(
            claims,
            f"{layer}.{at}",
            width,
            hidden,
            matrices,
            bias=bias,
            trained=trained and f"{layer}.{trained}",
        )
    first, last = matrices
    if stored.paired:
        return lambda layer: fused_mlp(
            claims.linear(f"{layer}.{at}.{first}", width.times(2), hidden, bias=bias),
            claims.linear(f"{layer}.{at}.{last}", hidden, width, bias=bias),
        )

    def claim(layer: str) -> Callable[[], Mlp]:
        up = claims.linear(f"{layer}.{at}.{first}", width, hidden, bias=bias)
        down = claims.linear(f"{layer}.{at}.{last}", hidden, width, bias=bias)
        scalars = [
            claims.parameter(f"{layer}.{at}.{name}", *(Dim(n, "1") for n in shape))
            for name, shape in stored.scalars
        ]
        return lambda: Mlp(None, up(), down(), scalars=tuple(build() for build in scalars))

    return claim


def gated(
    claims: Claims,
    at: str,
    width: Dim,
    hidden: Dim,
    matrices: tuple[str, str, str] = GATED,
    *,
    bias: bool = False,
    trained: str = "",
) -> Callable[[], Mlp]:
    """Claims the `matrices` gate, up and down of the module `at`, which may be stored as `trained`."""
    first, second, last = matrices
    stored = trained if trained and claims.has_matrix(f"{trained}.{second}") else at

    def linear(leaf: str, out: Dim, into: Dim) -> Callable[[], Linear]:
        return claims.linear(f"{at}.{leaf}", out, into, bias=bias, stored=f"{stored}.{leaf}")

    gate, up, down = linear(first, width, hidden), linear(second, width, hidden), linear(last, hidden, width)
    return lambda: Mlp(gate(), up(), down())
