"""Mixtral: Llama's decoder with a mixture of experts in each layer, in either of its two spellings.

The hub stores each expert (`block_sparse_moe.experts.{e}.w1` gate, `w3` up, `w2` down); transformers 5
trains with stacks (`mlp.experts.gate_up_proj` [experts, gate; up, hidden], `mlp.experts.down_proj`
[experts, hidden, width]). Roles carry the hub's names whichever was read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..model import Experts, Linear, Mlp, Model
from ..views import View
from .claims import Claims, Dim, integer
from .llama import Kind, decoder

MIXTRAL = Kind("mixtral", qkv_bias=False, o_bias=False)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Mixtral checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, "model.embed_tokens.weight")
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    width = Dim(integer(config, "intermediate_size"), "intermediate_size")
    count = Dim(integer(config, "num_local_experts"), "num_local_experts")
    pair = Dim(2 * width.size, "2 * intermediate_size")

    def experts(layer: str) -> Callable[[], Experts]:
        hub = f"{layer}.block_sparse_moe"
        if f"{layer}.mlp.experts.gate_up_proj" not in claims:
            router = claims.linear(f"{hub}.gate", count, hidden)
            each = [one(f"{hub}.experts.{e}") for e in range(count.size)]
            return lambda: Experts(f"{hub}.experts", router(), tuple(build() for build in each))
        router = claims.linear(f"{hub}.gate", count, hidden, stored=f"{layer}.mlp.gate")
        gate_up = claims.tensor(f"{layer}.mlp.experts.gate_up_proj", count, pair, hidden)
        down = claims.tensor(f"{layer}.mlp.experts.down_proj", count, hidden, width)
        return lambda: Experts(f"{hub}.experts", router(), unstacked(f"{hub}.experts", gate_up(), down()))

    def one(name: str) -> Callable[[], Mlp]:
        gate = claims.linear(f"{name}.w1", width, hidden)
        up = claims.linear(f"{name}.w3", width, hidden)
        down = claims.linear(f"{name}.w2", hidden, width)
        return lambda: Mlp(gate(), up(), down())

    return decoder(MIXTRAL, claims, config, vocab_size, experts, {width.key: width.size})


def unstacked(name: str, gate_up: View, down: View) -> tuple[Mlp, ...]:
    """The experts of stacks `gate_up` [experts, gate; up, hidden] and `down` [experts, hidden, width]."""

    def expert(e: int) -> Mlp:
        both = gate_up.narrow(0, e, 1).reshape(gate_up.shape[1:])
        return Mlp(
            Linear(f"{name}.{e}.w1", both.part(0, 0, 2)),
            Linear(f"{name}.{e}.w3", both.part(0, 1, 2)),
            Linear(f"{name}.{e}.w2", down.narrow(0, e, 1).reshape(down.shape[1:])),
        )

    return tuple(expert(e) for e in range(gate_up.shape[0]))
