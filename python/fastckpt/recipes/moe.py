"""Mixtures of experts: how the hub stores the experts of a layer, one by one or in stacks.

transformers 5 trains with stacks (`experts.gate_up_proj` [experts, gate; up, hidden], `experts.down_proj`
[experts, hidden, width]) and saves most families expert by expert. Both are read; roles have the names that
are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ..model import Experts, Lazy, Linear, Mlp
from ..views import View
from .claims import Claims, Dim, absent


@dataclass(frozen=True, slots=True)
class Block:
    """What the hub calls a layer's mixture: the module `hub` holds the router (`gate`) and `experts`, each of
    which has the matrices `gate`, `up` and `down`. `correction`: the name within the module of what is added
    to the experts' scores when the router selects, "" for none. In training transformers calls it `mlp`."""

    hub: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    correction: str = ""


BLOCK = Block()
"""As most families have it."""


def experts(
    claims: Claims, layer: str, block: Block, count: Dim, width: Dim, hidden: Dim
) -> Callable[[], Experts]:
    """Claims the router of a layer, its correction and the experts, in either spelling."""
    hub, trained = f"{layer}.{block.hub}", f"{layer}.mlp"
    added = claims.parameter(f"{hub}.{block.correction}", count, kept=True) if block.correction else absent
    name = f"{hub}.experts"
    if f"{trained}.experts.gate_up_proj" not in claims:
        router = claims.linear(f"{hub}.gate", count, hidden)
        each = [_one(claims, f"{name}.{e}", block, width, hidden) for e in range(count.size)]
        return lambda: Experts(name, router(), Lazy(each), added())
    router = claims.linear(f"{hub}.gate", count, hidden, stored=f"{trained}.gate")
    gate_up = claims.tensor(f"{trained}.experts.gate_up_proj", count, width.times(2), hidden)
    down = claims.tensor(f"{trained}.experts.down_proj", count, hidden, width)
    return lambda: Experts(name, router(), _unstacked(name, block, gate_up(), down()), added())


def with_shared(
    build: Callable[[], Experts], shared: Callable[[], Mlp], gate: Callable[[], Linear | None] = absent
) -> Callable[[], Experts]:
    """The same experts beside a shared block and its gate."""
    return lambda: replace(build(), shared=shared(), shared_gate=gate())


def _one(claims: Claims, name: str, block: Block, width: Dim, hidden: Dim) -> Callable[[], Mlp]:
    gate = claims.linear(f"{name}.{block.gate}", width, hidden)
    up = claims.linear(f"{name}.{block.up}", width, hidden)
    down = claims.linear(f"{name}.{block.down}", hidden, width)
    return lambda: Mlp(gate(), up(), down())


def _unstacked(name: str, block: Block, gate_up: View, down: View) -> Lazy[Mlp]:
    """The experts of stacks `gate_up` [experts, gate; up, hidden] and `down` [experts, hidden, width]."""

    def expert(e: int) -> Mlp:
        both = gate_up.narrow(0, e, 1).reshape(gate_up.shape[1:])
        return Mlp(
            Linear(f"{name}.{e}.{block.gate}", both.part(0, 0, 2)),
            Linear(f"{name}.{e}.{block.up}", both.part(0, 1, 2)),
            Linear(f"{name}.{e}.{block.down}", down.narrow(0, e, 1).reshape(down.shape[1:])),
        )

    return Lazy([partial(expert, e) for e in range(gate_up.shape[0])])
