"""Matrices that the hub stores as one: q, k and v, gate and up."""

from __future__ import annotations

from dataclasses import replace

from ..errors import RecipeError
from ..model import Linear
from ..views import View


def qkv_parts(
    whole: Linear, heads: int, kv_heads: int, head_dim: int, *, grouped: bool = False
) -> tuple[Linear, Linear, Linear]:
    """q, k and v of a matrix that holds all three, each under its name.

    `grouped`: for each kv head its query heads, then itself, then its value head (BLOOM, GPT-NeoX, Falcon,
    Megatron); else all of q, then all of k, then all of v."""
    groups = kv_heads if grouped else 1
    q, kv = heads // groups * head_dim, kv_heads // groups * head_dim
    return _part(whole, groups, 0, q), _part(whole, groups, q, kv), _part(whole, groups, q + kv, kv)


def q_gate_parts(whole: Linear, heads: int) -> tuple[Linear, Linear]:
    """q and its output gate of a matrix that holds both head by head, each under its name."""
    rows = whole.shape[0] // heads // 2
    return _part(whole, heads, 0, rows), _part(whole, heads, rows, rows)


def gate_up_parts(whole: Linear) -> tuple[Linear, Linear]:
    """gate and up of a matrix that holds [gate; up], both under its name."""
    half = whole.shape[0] // 2
    return _part(whole, 1, 0, half), _part(whole, 1, half, half)


def _part(whole: Linear, groups: int, start: int, rows: int) -> Linear:
    """Of each of `groups` equal runs of outputs, the `rows` from `start` on."""

    def part(view: View, unit: int = 1) -> View:
        if start % unit or rows % unit:
            raise RecipeError(f"{whole.name}: {start} and {rows} rows do not end with blocks of {unit}")
        run = view.split(0, view.shape[0] // groups)
        return run.narrow(1, start // unit, rows // unit).merge(0)

    if any(b.unit == (0, 0) for b in whole.beside):
        raise RecipeError(f"{whole.name}: one scale of a fused matrix is not read")
    return replace(
        whole,
        weight=part(whole.weight, whole.packed[0]),
        bias=None if whole.bias is None else part(whole.bias),
        beside=tuple(replace(b, view=part(b.view, b.unit[0])) if b.unit[0] else b for b in whole.beside),
    )
