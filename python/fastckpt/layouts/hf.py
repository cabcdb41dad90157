"""`hf`: the hub's names and forms; at tp > 1 each rank its slice, as transformers' tensor parallelism cuts.

transformers' base_model_tp_plan cuts q, k, v, gate and up by outputs, o and down by inputs, the embedding
(embedding_rowwise) and lm_head (colwise_gather_output) by vocabulary rows; the rest is whole on every rank.
A matrix the hub fuses is cut part by part, as its packed_colwise does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import LayoutError
from ..model import Attention, Experts, Mlp, Model
from ..placement import Placement
from ..target import Target
from .cuts import (
    in_part,
    joined,
    norm,
    out_part,
    qkv_part,
    require_decoder,
    require_even,
    require_kv_heads,
    require_tensor_parallel,
    stored,
)
from .naming import Naming, ranked


@dataclass(frozen=True, slots=True)
class Hf:
    """`replicate_kv`: with fewer kv heads than ranks, repeat them; transformers itself cannot run that."""

    replicate_kv: bool = False
    roles: ClassVar[Literal[True]] = True

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied lm_head is left out, the config says it is tied.

        Raises LayoutError, before the first target, where heads, kv heads, a feed-forward width or the
        vocabulary do not divide by tp, and for pp, dp or ep."""
        require_tensor_parallel("hf", placement)
        require_decoder("hf", placement, model.sizes)
        require_even("hf", placement, "vocab_size", model.sizes.vocab)
        require_kv_heads("hf", placement, model.sizes)
        if model.sizes.kv_heads % placement.tp and not self.replicate_kv:
            raise LayoutError(
                f"layout hf: {model.sizes.kv_heads} kv heads do not divide by tp {placement.tp}, and "
                "transformers cannot run replicas; replicate_kv=true writes them all the same"
            )
        return self._targets(model, placement)

    def naming(self, placement: Placement) -> Naming:
        """The hub's names, at tp > 1 inside `rank-00/` and so on."""
        return ranked(placement.tp, placement.tp_rank)

    def _targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        tp, rank = placement.tp, placement.tp_rank
        yield Target(f"{model.embedding.name}.weight", model.embedding.weight.part(0, rank, tp))
        if model.positions is not None:
            yield Target(f"{model.positions.name}.weight", model.positions.weight)
        for layer in model.layers:
            yield from norm(layer.attention_norm)
            yield from _attention(layer.attention, model, placement)
            yield from norm(layer.mlp_norm)
            if isinstance(layer.mlp, Experts):
                yield from stored(layer.mlp.router)
            for mlp in layer.mlp.experts if isinstance(layer.mlp, Experts) else (layer.mlp,):
                yield from _mlp(mlp, placement)
        yield from norm(model.norm)
        if not model.tied:
            yield from stored(out_part(model.lm_head, rank, tp))


def _attention(attention: Attention, model: Model, placement: Placement) -> Iterator[Target]:
    parts = qkv_part(attention, model, placement)
    for linear in parts if attention.fused is None else (joined(attention.fused, parts),):
        yield from stored(linear)
    yield from stored(in_part(attention.o, placement.tp_rank, placement.tp))
    yield from norm(attention.q_norm)
    yield from norm(attention.k_norm)


def _mlp(mlp: Mlp, placement: Placement) -> Iterator[Target]:
    for linear in (mlp.up,) if mlp.gate is None else (mlp.gate, mlp.up):
        yield from stored(out_part(linear, placement.tp_rank, placement.tp))
    yield from stored(in_part(mlp.down, placement.tp_rank, placement.tp))
