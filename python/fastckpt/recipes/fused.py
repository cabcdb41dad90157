"""Matrices that the hub stores as one: q, k and v, gate and up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import RecipeError
from ..mixers import Attention
from ..model import Mlp
from ..roles import Linear
from ..views import View
from .claims import Heads


def fused_attention(
    qkv: Callable[[], Linear], o: Callable[[], Linear], heads: Heads, *, grouped: bool = False
) -> Callable[[], Attention]:
    """Attention whose q, k and v are rows of one matrix, under whose name they stay.

    `grouped`: for each kv head its query heads, then itself, then its value head (BLOOM, GPT-NeoX, Falcon,
    Megatron); else all of q, then all of k, then all of v."""
    groups = heads.kv if grouped else 1
    q_rows, kv_rows = heads.q * heads.dim, heads.kv * heads.dim

    def build() -> Attention:
        whole = qkv()
        q, k, v = parts(whole, groups, (q_rows, kv_rows, kv_rows))
        return Attention(q, k, v, o(), fused=whole.name, grouped=grouped)

    return build


def attention_of(
    q: Callable[[], Linear],
    k: Callable[[], Linear],
    v: Callable[[], Linear],
    o: Callable[[], Linear],
    *,
    gated: int,
) -> Callable[[], Attention]:
    """Attention whose q, k and v are matrices of their own. `gated`: of how many heads q's holds the output
    gate too, head by head [q; gate], both under its name; 0: it has none."""

    def build() -> Attention:
        if not gated:
            return Attention(q(), k(), v(), o())
        whole = q()
        queries, gate = parts(whole, gated, [whole.shape[0] // 2] * 2)
        return Attention(queries, k(), v(), o(), gate=gate)

    return build


def fused_mlp(
    gate_up: Callable[[], Linear], down: Callable[[], Linear], *, up_first: bool = False
) -> Callable[[], Mlp]:
    """A feed-forward block whose gate and up are the halves of one matrix, under whose name they stay."""

    def build() -> Mlp:
        whole = gate_up()
        gate, up = parts(whole, 1, [whole.shape[0] // 2] * 2)
        if up_first:
            gate, up = up, gate
        return Mlp(gate, up, down(), whole.name, up_first)

    return build


def parts(whole: Linear, groups: int, rows: Sequence[int]) -> list[Linear]:
    """The matrices that one holds, under its name: `rows` of each, an equal share of them in each of `groups`
    equal runs of outputs, in turn. Raises RecipeError where a share does not end with a block of scales."""
    shares = [n // groups for n in rows]
    return [_part(whole, groups, sum(shares[:k]), n) for k, n in enumerate(shares)]


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
