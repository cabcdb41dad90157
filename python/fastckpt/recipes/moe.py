"""Mixtures of experts: how the hub stores the experts of a layer, one by one or in stacks.

transformers 5 trains with stacks (`experts.gate_up_proj` [experts, gate; up, hidden], `experts.down_proj`
[experts, hidden, width]) and saves most families expert by expert. Both are read; roles have the names that
are saved. DeepSpeed's AutoEP trains with three stacks (`experts.w1` gate, `w2` down, `w3` up, each [experts,
out, in]) and names of its own for what is beside them (deepspeed/module_inject/auto_ep_layer.py, 0.19.8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ..checkpoint import JSON
from ..model import Experts, Lazy, Mlp, Stacked
from ..roles import Linear, Parameter
from ..views import View
from .claims import Claims, Dim, absent, dim, flag


@dataclass(frozen=True, slots=True)
class Block:
    """What the hub calls a layer's mixture: the module `hub` ("": the layer's own) holds the `router` and
    `experts`, each of which has the matrices `gate` ("": it has none), `up` and `down`. `correction`: what is
    added to the experts' scores when the router selects, "" for nothing; `row`: it is stored [1, experts].
    `stacked`: the names within the module of two stacks, where the hub stores no expert on its own. `latent`:
    the names of the matrices before and after the experts, and config's key of how wide it is between, where
    that has a value. `exact`: the router keeps its dtype, whatever the others are cast to.

    `trained`, `trained_router`, `trained_correction`: what transformers calls them in training ("": as the
    hub does)."""

    hub: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    correction: str = ""
    row: bool = False
    stacked: Stacked | None = None
    latent: tuple[str, str, str] | None = None
    exact: bool = False
    trained: str = "mlp"
    trained_router: str = ""
    trained_correction: str = ""


BLOCK = Block()
"""As most families have it."""


AUTOEP_ROUTER, AUTOEP_CORRECTION = "router.gate", "router.e_score_correction_bias"
AUTOEP_SHARED, AUTOEP_SHARED_GATE = "shared_experts", "shared_experts_gate"


def has_autoep(claims: Claims, layer: str, block: Block) -> bool:
    """Whether AutoEP trained a layer's mixture."""
    return bool(block.gate and block.trained) and f"{layer}.{block.trained}.experts.w1" in claims


def saved_as(block: Block, name: str) -> tuple[str, ...]:
    """What the hub calls a tensor of a layer's experts, or of its router, that training calls `name`: one
    name, or with {} for an expert's number those of the matrices whose rows it has in turn; () for others."""
    layer, within, leaf = name.rpartition(f".{block.trained}.")
    if not within:
        return ()
    at = f"{layer}.{block.hub}" if block.hub else layer
    if leaf == f"{block.trained_router or block.router}.weight":
        return (f"{at}.{block.router}.weight",)
    halves = [half for half in (block.gate, block.up) if half]
    first = tuple(f"{at}.experts.{{}}.{half}.weight" for half in halves)
    last = (f"{at}.experts.{{}}.{block.down}.weight",)
    if block.stacked is not None and not block.stacked.singly:
        first, last = (f"{at}.{block.stacked.gate_up}",), (f"{at}.{block.stacked.down}",)
    in_training = "gate_up_proj" if block.gate else block.up
    return {f"experts.{in_training}": first, "experts.down_proj": last}.get(leaf, ())


def experts(
    claims: Claims, config: Mapping[str, JSON], layer: str, block: Block, sizes: tuple[Dim, Dim, Dim]
) -> Callable[[], Experts]:
    """Claims the router of a layer, its correction and the experts, in either spelling; `sizes`: how many
    there are, how wide, and how wide the hidden state is."""
    count, width, hidden = sizes
    hub, trained = (f"{layer}.{at}" if at else layer for at in (block.hub, block.trained))
    name, written, within = f"{hub}.experts", None, block.stacked
    if within is not None and not (within.singly and claims.has_matrix(f"{name}.0.{block.up}")):
        written = replace(within, gate_up=f"{hub}.{within.gate_up}", down=f"{hub}.{within.down}")
    at, stored, adds, found = hub, block.router, block.correction, written
    first = "gate_up_proj" if block.gate else block.up
    in_training = Stacked(f"{trained}.experts.{first}", f"{trained}.experts.down_proj")
    if in_training.gate_up in claims:
        at, found = trained, replace(in_training, transposed=written is not None and written.transposed)
        stored, adds = block.trained_router or stored, block.trained_correction or adds
    if autoep := has_autoep(claims, layer, block):
        at, stored, adds = trained, AUTOEP_ROUTER, AUTOEP_CORRECTION
    router = claims.linear(f"{hub}.{block.router}", count, hidden, stored=f"{at}.{stored}")
    if block.exact:
        router = partial(_as_stored, router)
    added = _correction(claims, block, hub, f"{at}.{adds}", count)
    reads, latent = _latent(claims, config, block, hub, hidden)
    if autoep:
        each_of = _in_three(claims, name, block, f"{trained}.experts", (count, width, reads))
    elif found is not None:
        each_of = _unstacked(claims, name, block, found, (count, width, reads))
    else:
        each = [_one(claims, f"{name}.{e}", block, width, reads) for e in range(count.size)]

        def each_of() -> Lazy[Mlp]:
            return Lazy(each)

    return lambda: Experts(name, router(), each_of(), added(), stacked=written, latent=latent())


def _as_stored(build: Callable[[], Linear]) -> Linear:
    return replace(role := build(), weight=role.weight.as_stored())


def _latent(
    claims: Claims, config: Mapping[str, JSON], block: Block, hub: str, hidden: Dim
) -> tuple[Dim, Callable[[], tuple[Linear, Linear] | None]]:
    """What experts read, and what claims the matrices around them."""
    if block.latent is None or config.get(block.latent[2]) is None:
        return hidden, absent
    first, last, key = block.latent
    rank, bias = dim(config, key), flag(config, "mlp_bias", False)
    before = claims.linear(f"{hub}.{first}", rank, hidden, bias=bias)
    after = claims.linear(f"{hub}.{last}", hidden, rank, bias=bias)
    return rank, lambda: (before(), after())


def _correction(
    claims: Claims, block: Block, hub: str, stored: str, count: Dim
) -> Callable[[], Parameter | None]:
    if not block.correction:
        return absent
    name, shape = f"{hub}.{block.correction}", (Dim(1, "1"), count) if block.row else (count,)
    build = claims.parameter(name, *shape, kept=True, stored=stored)
    if not block.row:
        return build

    def vector() -> Parameter:
        view = build().view
        return Parameter(name, view.reshape((count.size,)), view.shape)

    return vector


def with_shared(
    build: Callable[[], Experts], shared: Callable[[], Mlp], gate: Callable[[], Linear | None] = absent
) -> Callable[[], Experts]:
    """The same experts beside a shared block and its gate."""
    return lambda: replace(build(), shared=shared(), shared_gate=gate())


def _one(claims: Claims, name: str, block: Block, width: Dim, hidden: Dim) -> Callable[[], Mlp]:
    gate = claims.linear(f"{name}.{block.gate}", width, hidden) if block.gate else absent
    up = claims.linear(f"{name}.{block.up}", width, hidden)
    down = claims.linear(f"{name}.{block.down}", hidden, width)
    return lambda: Mlp(gate(), up(), down())


def _unstacked(
    claims: Claims, name: str, block: Block, stored: Stacked, sizes: tuple[Dim, Dim, Dim]
) -> Callable[[], Lazy[Mlp]]:
    """Claims the stacks of that many experts, of that width, that read so many features."""
    count, width, hidden = sizes
    wide, narrow = (width.times(2) if block.gate else width, hidden), (hidden, width)
    gate_up = claims.tensor(stored.gate_up, count, *(wide[::-1] if stored.transposed else wide))
    down = claims.tensor(stored.down, count, *(narrow[::-1] if stored.transposed else narrow))

    def of(stack: View, e: int) -> View:
        return _nth(stack, e).T if stored.transposed else _nth(stack, e)

    def expert(first: View, second: View, e: int) -> Mlp:
        both, down = of(first, e), Linear(f"{name}.{e}.{block.down}", of(second, e))
        if not block.gate:
            return Mlp(None, Linear(f"{name}.{e}.{block.up}", both), down)
        gate, up = both.part(0, 0, 2), both.part(0, 1, 2)
        return Mlp(Linear(f"{name}.{e}.{block.gate}", gate), Linear(f"{name}.{e}.{block.up}", up), down)

    def build() -> Lazy[Mlp]:
        first, second = gate_up(), down()
        return Lazy([partial(expert, first, second, e) for e in range(count.size)])

    return build


def _in_three(
    claims: Claims, name: str, block: Block, stored: str, sizes: tuple[Dim, Dim, Dim]
) -> Callable[[], Lazy[Mlp]]:
    """Claims AutoEP's stacks of the module `stored`; `sizes` as in `_unstacked`."""
    count, width, hidden = sizes
    gate, up = (claims.tensor(f"{stored}.{w}", count, width, hidden) for w in ("w1", "w3"))
    down = claims.tensor(f"{stored}.w2", count, hidden, width)

    def expert(stacks: Mapping[str, View], e: int) -> Mlp:
        first, second, last = (Linear(f"{name}.{e}.{leaf}", _nth(s, e)) for leaf, s in stacks.items())
        return Mlp(first, second, last)

    def build() -> Lazy[Mlp]:
        stacks = {block.gate: gate(), block.up: up(), block.down: down()}
        return Lazy([partial(expert, stacks, e) for e in range(count.size)])

    return build


def _nth(stack: View, e: int) -> View:
    return stack.narrow(0, e, 1).reshape(stack.shape[1:])
