"""gpt-oss: attention with sinks; experts stored as stacks, [in, out], gate and up in turn, with biases.

The mxfp4 files of the hub are not read; transformers saves the dequantised form that this reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..model import Experts, HubCuts, Lazy, Linear, Mlp, Model, Parameter, Stacks
from ..views import View
from .claims import Claims, Dim, integer
from .decoder import ANCHOR, Kind, decoder
from .quantised import quantised

GPT_OSS = Kind(
    "gpt_oss",
    sinks=True,
    cuts=HubCuts(whole=frozenset({"embedding", "attention", "experts", "intermediate_size"})),
)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a gpt-oss checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, ANCHOR, form=quantised(config))
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    width = Dim(integer(config, "intermediate_size"), "intermediate_size")
    pair = Dim(2 * width.size, "2 * intermediate_size")
    count = Dim(integer(config, "num_local_experts"), "num_local_experts")

    def experts(layer: str) -> Callable[[], Experts]:
        name = f"{layer}.mlp.experts"
        router = claims.linear(f"{layer}.mlp.router", count, hidden, bias=True)
        gate_up = claims.parameter(f"{name}.gate_up_proj", count, hidden, pair)
        gate_up_bias = claims.parameter(f"{name}.gate_up_proj_bias", count, pair)
        down = claims.parameter(f"{name}.down_proj", count, width, hidden)
        down_bias = claims.parameter(f"{name}.down_proj_bias", count, hidden)

        def build() -> Experts:
            stacks = Stacks(gate_up(), gate_up_bias(), down(), down_bias())
            each = [partial(_expert, name, stacks, e) for e in range(count.size)]
            return Experts(name, router(), Lazy(each), stacks=stacks)

        return build

    return decoder(
        GPT_OSS,
        claims,
        config,
        vocab_size,
        experts,
        {width.key: width.size},
        experts=count.size,
        expert_width=width.key,
    )


def _expert(name: str, stacks: Stacks, e: int) -> Mlp:
    def of(stack: Parameter) -> View:
        return stack.view.narrow(0, e, 1).reshape(stack.view.shape[1:])

    def half(which: int, role: str) -> Linear:
        weight, bias = (_every_second(of(x), which) for x in (stacks.gate_up, stacks.gate_up_bias))
        return Linear(f"{name}.{e}.{role}", weight.T, bias)

    down = Linear(f"{name}.{e}.down_proj", of(stacks.down).T, of(stacks.down_bias))
    return Mlp(half(0, "gate_proj"), half(1, "up_proj"), down)


def _every_second(view: View, which: int) -> View:
    """result[.., i] == view[.., 2 * i + which]."""
    last = view.ndim - 1
    return view.split(last, 2).narrow(last + 1, which, 1).merge(last)
