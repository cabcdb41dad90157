"""`vllm`: vLLM's model format, the state dict of one rank after its load_weights.

Matrices are [out, in]. q, k and v are one `qkv_proj` [q_r; k_r; v_r], gate and up one `gate_up_proj`
[gate_r; up_r], experts `w13_weight` [experts, gate_r; up_r, hidden] and `w2_weight` [experts, hidden,
width / tp]; the vocabulary is padded with zero rows, then cut. Source: vLLM's layers/linear.py,
vocab_parallel_embedding.py and fused_moe/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import LayoutError
from ..model import Attention, Experts, Mlp, Model
from ..placement import Placement
from ..target import Target
from ..views import cat, stack
from .cuts import (
    in_part,
    joined,
    norm,
    out_part,
    padded_part,
    plain,
    qkv_part,
    require_decoder,
    require_even,
    require_kv_heads,
    require_tensor_parallel,
)
from .naming import Naming


@dataclass(frozen=True, slots=True)
class Vllm:
    """`vocab_padding`: the vocabulary is padded to a multiple of it (vLLM's DEFAULT_VOCAB_PADDING_SIZE)."""

    vocab_padding: int = 64
    roles: ClassVar[Literal[True]] = True

    def __post_init__(self) -> None:
        if self.vocab_padding < 1:
            raise LayoutError(f"layout vllm: vocab_padding must be at least 1, got {self.vocab_padding}")

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied lm_head is the embedding's parameter and left out.

        Raises LayoutError, before the first target, where heads, a feed-forward width or the padded
        vocabulary do not divide by tp, where kv heads neither divide nor repeat evenly, and for pp, dp
        or ep."""
        require_tensor_parallel("vllm", placement)
        require_decoder("vllm", placement, model.sizes)
        require_kv_heads("vllm", placement, model.sizes)
        rows = model.sizes.vocab + -model.sizes.vocab % self.vocab_padding
        require_even("vllm", placement, f"vocab_size {model.sizes.vocab}, padded to", rows)
        return self._targets(model, placement)

    def naming(self, placement: Placement) -> Naming:
        """The pattern of vLLM's sharded_state loader, parts counted from 0."""
        stem = f"model-rank-{placement.tp_rank}"
        return Naming("", f"{stem}-part-0.safetensors", stem + "-part-{part}.safetensors")

    def _targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        tp, rank, multiple = placement.tp, placement.tp_rank, self.vocab_padding
        rows = padded_part(model.embedding.weight, multiple, rank, tp)
        yield Target(f"{model.embedding.name}.weight", rows)
        if model.positions is not None:
            yield Target(f"{model.positions.name}.weight", model.positions.weight)
        for layer in model.layers:
            yield from norm(layer.attention_norm)
            yield from _attention(layer.attention, model, placement)
            yield from norm(layer.mlp_norm)
            if isinstance(layer.mlp, Experts):
                yield from _experts(layer.mlp, placement)
            else:
                yield from _mlp(layer.mlp, placement)
        yield from norm(model.norm)
        if not model.tied:
            rows = padded_part(model.lm_head.weight, multiple, rank, tp)
            yield Target(f"{model.lm_head.name}.weight", rows)


def _attention(attention: Attention, model: Model, placement: Placement) -> Iterator[Target]:
    name = attention.fused or f"{_parent(attention.q.name)}.qkv_proj"
    yield from plain(joined(name, qkv_part(attention, model, placement)))
    yield from plain(in_part(attention.o, placement.tp_rank, placement.tp))
    yield from norm(attention.q_norm)
    yield from norm(attention.k_norm)


def _mlp(mlp: Mlp, placement: Placement) -> Iterator[Target]:
    rank, tp = placement.tp_rank, placement.tp
    up = out_part(mlp.up, rank, tp)
    if mlp.gate is not None:
        up = joined(f"{_parent(mlp.up.name)}.gate_up_proj", [out_part(mlp.gate, rank, tp), up])
    yield from plain(up)
    yield from plain(in_part(mlp.down, rank, tp))


def _experts(moe: Experts, placement: Placement) -> Iterator[Target]:
    rank, tp = placement.tp_rank, placement.tp
    yield from plain(moe.router)
    w13 = [cat([x.weight.part(0, rank, tp) for x in (e.gate, e.up) if x is not None]) for e in moe.experts]
    yield Target(f"{moe.name}.w13_weight", stack(w13))
    yield Target(f"{moe.name}.w2_weight", stack([e.down.weight.part(1, rank, tp) for e in moe.experts]))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
