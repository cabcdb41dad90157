"""Matrices that the hub stores as one: q, k and v, gate and up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import RecipeError
from ..model import Attention, Linear, Mlp
from ..views import View
from .claims import Heads


def fused_attention(
    qkv: Callable[[], Linear], o: Callable[[], Linear], heads: Heads, *, grouped: bool = False
) -> Callable[[], Attention]:
    """Attention whose q, k and v are rows of one matrix, under whose name they stay.

    `grouped`: for each kv head its query heads, then itself, then its value head (BLOOM, GPT-NeoX, Falcon,
    Megatron); else all of q, then all of k, then all of v."""
    groups = heads.kv if grouped else 1
    q_rows, kv_rows = heads.q // groups * heads.dim, heads.kv // groups * heads.dim

    def build() -> Attention:
        whole = qkv()
        q = _part(whole, groups, 0, q_rows)
        k = _part(whole, groups, q_rows, kv_rows)
        v = _part(whole, groups, q_rows + kv_rows, kv_rows)
        return Attention(q, k, v, o(), fused=whole.name, grouped=grouped)

    return build


def q_and_gate(whole: Linear, heads: int) -> tuple[Linear, Linear]:
    """q and its output gate, which one matrix holds head by head; both keep its name."""
    rows = whole.shape[0] // heads // 2
    return _part(whole, heads, 0, rows), _part(whole, heads, rows, rows)


def fused_mlp(
    gate_up: Callable[[], Linear], down: Callable[[], Linear], *, up_first: bool = False
) -> Callable[[], Mlp]:
    """A feed-forward block whose gate and up are the halves of one matrix, under whose name they stay."""

    def build() -> Mlp:
        whole = gate_up()
        rows = whole.shape[0] // 2
        gate, up = _part(whole, 1, 0, rows), _part(whole, 1, rows, rows)
        if up_first:
            gate, up = up, gate
        return Mlp(gate, up, down(), whole.name, up_first)

    return build


def _part(whole: Linear, groups: int, start: int, rows: int) -> Linear:
    """Of each of `groups` equal runs of outputs, the `rows` from `start` on."""

    def part(view: View, unit: int = 1) -> View:
        if start % unit or rows % unit:
            raise RecipeError(
                f"{whole.name}: a part of {rows} rows from {start} on does not end with blocks of {unit}"
            )
        run = view.split(0, view.shape[0] // groups)
        return run.narrow(1, start // unit, rows // unit).merge(0)

    if any(b.unit == (0, 0) for b in whole.beside):
        raise RecipeError(f"{whole.name}: a fused matrix with one scale for all of it is not read")
    return replace(
        whole,
        weight=part(whole.weight, whole.packed[0]),
        bias=None if whole.bias is None else part(whole.bias),
        beside=tuple(replace(b, view=part(b.view, b.unit[0])) if b.unit[0] else b for b in whole.beside),
    )
