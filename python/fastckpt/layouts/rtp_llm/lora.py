"""An adapter kept apart, as rtp-llm's loader has it for every layer: A and B of a fused matrix are one pair.

A is [in, rank], B [rank, out]. Where the fused matrices were adapted one by one, their A stand side by side
and their B along a diagonal of blocks; one that was not adapted has zeros of the others' rank. B is
multiplied by the scale already (`model.Thin`). Source: rtp-llm's merge_qkv_lora_A and merge_qkv_lora_B, which
the engine has for q, k and v; gate and up go the same way here, since its own w13_lora functions do not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...mixers import Attention
from ...model import Experts, Layer
from ...roles import Linear, Thin
from ...views import View, cat, zeros
from .matrices import Whole
from .merge import merge_qkv_lora_b
from .roles import Making, mlp_matrices

Lookup = Callable[[Linear], Thin | None]
"""What an adapter adds to a matrix; None: nothing."""


def layer_pairs(layer: Layer, making: Making, thin: Lookup) -> Iterator[Whole]:
    """The pairs of a layer's attention and dense block; there are no names for others."""
    if isinstance(layer.attention, Attention):
        attention = layer.attention
        yield from _pair("attn_qkv_w", [attention.q, attention.k, attention.v], thin)
        yield from _pair("attn_o_w", [attention.o], thin)
    mlp = layer.mlp.shared if isinstance(layer.mlp, Experts) else layer.mlp
    if mlp is not None:
        for end, linears in mlp_matrices(mlp, making):
            yield from _pair(f"ffn_w{end}", linears, thin)


def _pair(name: str, linears: Sequence[Linear], thin: Lookup) -> Iterator[Whole]:
    """Raises LayoutError where the ranks of what is joined differ."""
    found = [thin(linear) for linear in linears]
    there = [f for f in found if f is not None]
    if not there:
        return
    if len({f.module for f in there}) == 1 and len(there) == len(found):  # the hub has them as one
        a, b = there[0].a.T, cat([f.b for f in there]).T
    else:
        first = there[0]
        a = cat([f.a if f else zeros(first.a.shape, first.a.dtype) for f in found]).T
        b = merge_qkv_lora_b([f.b if f else _nothing(x, first) for f, x in zip(found, linears, strict=True)])
    yield Whole(f"{name}_lora_a", a)
    yield Whole(f"{name}_lora_b", b)


def _nothing(linear: Linear, other: Thin) -> View:
    return zeros((linear.shape[0], other.b.shape[1]), other.b.dtype)
