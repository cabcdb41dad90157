"""gpt-oss: attention with sinks; experts stored as stacks, gate and up in turn, with biases.

transformers trains and saves stacks [in, out]; the hub's own files hold mxfp4, [out, in / 32, 16 bytes] and
an exponent for each 32 inputs. Those bytes are carried, and cut between exponents, as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import BlockStacks, Experts, HubCuts, Lazy, Mlp, Model, Stacks
from ..roles import Linear, Parameter
from ..views import View
from .attention import attention
from .claims import Claims, Dim, dim
from .decoder import ANCHOR, decoder
from .dense import Feeding
from .kind import IGNORED, Kind, SelfAttention
from .known import Known
from .quantised import quantised

GPT_OSS = Kind(
    "gpt_oss",
    SelfAttention(sinks="sinks"),
    cuts=HubCuts(whole=frozenset({"embedding", "attention", "experts", "intermediate_size"})),
)

GROUP = 32
"""Values of mxfp4 that share an exponent."""


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a gpt-oss checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    said = config.get("quantization_config")
    blocks = isinstance(said, dict) and said.get("quant_method") == "mxfp4"
    claims = Claims(ckpt, ANCHOR, form=None if blocks else quantised(config))
    if blocks and claims.imagined is None and "model.layers.0.mlp.experts.gate_up_proj" in claims:
        raise claims.called_quantised()
    hidden = dim(config, "hidden_size")
    width = dim(config, "intermediate_size")
    pair = width.times(2)
    count = dim(config, "num_local_experts")

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

    def block_experts(layer: str) -> Callable[[], Experts]:
        name = f"{layer}.mlp.experts"
        router = claims.linear(f"{layer}.mlp.router", count, hidden, bias=True)
        inner, outer = _groups(hidden), _groups(width)
        sixteen = Dim(GROUP // 2, "16 bytes")
        parts = (
            claims.parameter(f"{name}.gate_up_proj_blocks", count, pair, inner, sixteen),
            claims.parameter(f"{name}.gate_up_proj_scales", count, pair, inner),
            claims.parameter(f"{name}.gate_up_proj_bias", count, pair),
            claims.parameter(f"{name}.down_proj_blocks", count, hidden, outer, sixteen),
            claims.parameter(f"{name}.down_proj_scales", count, hidden, outer),
            claims.parameter(f"{name}.down_proj_bias", count, hidden),
        )
        alone = Lazy([partial(_in_blocks, name) for _ in range(count.size)])
        return lambda: Experts(name, router(), alone, stacks=BlockStacks(*(part() for part in parts)))

    model = decoder(
        GPT_OSS,
        claims,
        config,
        vocab_size,
        attention(GPT_OSS, claims, config),
        Feeding(block_experts if blocks else experts, {width.key: width.size}, count.size, width.key),
    )
    return replace(model, sizes=replace(model.sizes, block=GROUP)) if blocks else model


def _groups(size: Dim) -> Dim:
    if size.size % GROUP:
        raise RecipeError(f"config: {size.key} {size.size} is no multiple of mxfp4's {GROUP}")
    return Dim(size.size // GROUP, f"{size.key} / {GROUP}")


def _in_blocks(name: str) -> Mlp:
    raise RecipeError(
        f"{name}: experts in mxfp4 are read as stacks alone, which only layouts hf and vllm have a place "
        'for; quant="none" (--quant none) makes dense weights'
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


FAMILIES = {
    "gpt_oss": Known(recipe, IGNORED),
}
