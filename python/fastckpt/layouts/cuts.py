"""The cuts that layouts are made of: heads, rows, columns, padded vocabularies, matrices joined as one.

Everything is in the model's own form: a Linear is [out, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import LayoutError
from ..mixers import Attention
from ..model import Sizes
from ..placement import Placement
from ..roles import Beside, Linear, Norm, Parameter
from ..views import View, cat


def out_part(linear: Linear, index: int, count: int) -> Linear:
    """Part `index` of `count` of a matrix's outputs, of its bias and of what stands beside it."""
    bias = None if linear.bias is None else linear.bias.part(0, index, count)
    return replace(_part(linear, 0, index, count), bias=bias)


def in_part(linear: Linear, index: int, count: int) -> Linear:
    """Part `index` of `count` of a matrix's inputs; the bias is whole, since it is added once."""
    return _part(linear, 1, index, count)


def rows_part(role: Parameter, index: int, count: int) -> Parameter:
    """Part `index` of `count` of a tensor's rows."""
    return replace(role, view=role.view.part(0, index, count))


def _part(linear: Linear, axis: int, index: int, count: int) -> Linear:
    length = linear.shape[axis] // count
    start = index * length
    beside = tuple(replace(b, view=_run(linear, b, axis, start, length)) for b in linear.beside)
    return replace(linear, weight=linear.weight.part(axis, index, count), beside=beside)


def _run(linear: Linear, beside: Beside, axis: int, start: int, length: int) -> View:
    """What stands beside [start, start + length) of an axis of a quantised matrix.

    The run must begin and end with a block (or end with the matrix), or lie within one block, whose scale
    every such run then gets. Raises LayoutError for any other, and for a group of packed values that would be
    cut."""
    block, stop = beside.unit[axis], start + length
    if block == 0:
        return beside.view
    aligned = start % block == 0 and (stop % block == 0 or stop == linear.shape[axis])
    if not aligned and (start // block != (stop - 1) // block or linear.packed != (1, 1)):
        raise LayoutError(
            f"{linear.name}: [{start}, {stop}) of axis {axis} cuts a block of {block} that shares a scale"
        )
    return beside.view.narrow(axis, start // block, -(-stop // block) - start // block)


def joined(name: str, linears: Sequence[Linear]) -> Linear:
    """One matrix whose outputs are those of `linears` in order; `whole` is the last one's.

    Beside a quantised one stand the scales of all: blocks one after another, one scale a matrix as a vector
    of them; what goes by inputs alone (an order, a smoother) is the same for all, since they read one input.
    Raises LayoutError where some have a bias and some have none, where they are quantised differently, and
    where any but the last ends within a block."""
    biases = biases_of(name, linears)
    _require_alike(name, linears)
    return replace(
        linears[0],
        name=name,
        whole=linears[-1].whole,
        weight=cat([x.weight for x in linears]),
        bias=cat(biases) if biases else None,
        beside=tuple(_joined(name, linears, b) for b in linears[0].beside),
    )


def _joined(name: str, linears: Sequence[Linear], kind: Beside) -> Beside:
    block = kind.unit[0]
    if block == 0 and kind.unit[1] != 0:
        return kind
    for linear in linears[:-1] if block else ():
        if linear.shape[0] % block:
            raise LayoutError(
                f"{name}: {linear.shape[0]} rows of {linear.name} are no multiple of their block {block}, so "
                "the next part's scales would not fit"
            )
    view = cat([b.view for x in linears for b in x.beside if b.leaf == kind.leaf])
    return replace(kind, view=view, form="vector" if kind.form == "scalar" else kind.form)


def regrouped(name: str, parts: Sequence[Linear], rows: int) -> Linear:
    """Matrices as one, group by group; a group has `rows` of the last matrix, and an equal share of every
    matrix in turn. Of q, k and v, with a head's rows, it is a kv head's queries, itself and its value head.

    Raises LayoutError for matrices of which some have a bias and some none, that are quantised differently,
    with one scale a matrix, or with blocks that a share does not end with."""
    first, groups = parts[0], parts[-1].shape[0] // rows
    _require_alike(name, parts)

    def by_group(views: Sequence[View], unit: int = 1) -> View:
        for part in parts if unit > 1 else ():
            if part.shape[0] % (unit * groups):
                raise LayoutError(
                    f"{name or part.name}: {groups} shares of {part.shape[0]} rows of {part.name} do not end "
                    f"with blocks of {unit}"
                )
        return cat([x.split(0, x.shape[0] // groups) for x in views], 1).merge(0)

    def beside(k: int) -> Beside:
        kind = first.beside[k]
        if kind.unit == (0, 0) and len(parts) > 1:
            raise LayoutError(f"{name or first.name}: matrices with one scale each are not written as one")
        if kind.unit[0] == 0:
            return kind
        return replace(kind, view=by_group([x.beside[k].view for x in parts], kind.unit[0]))

    biases = biases_of(name or first.name, parts)
    return replace(
        first,
        name=name,
        weight=by_group([x.weight for x in parts], first.packed[0]),
        bias=by_group(biases) if biases else None,
        beside=tuple(beside(k) for k in range(len(first.beside))),
    )


def biases_of(name: str, linears: Sequence[Linear]) -> list[View]:
    """The biases of matrices that become one, or a stack. Raises LayoutError where only some have one."""
    biases = [x.bias for x in linears if x.bias is not None]
    if biases and len(biases) != len(linears):
        raise LayoutError(f"{name}: {len(biases)} of {len(linears)} parts have a bias, wanted all or none")
    return biases


def _require_alike(name: str, linears: Sequence[Linear]) -> None:
    """Raises LayoutError where matrices that become one are quantised differently."""
    first = linears[0]
    kinds = [(x.leaf, x.packed, [(b.leaf, b.unit) for b in x.beside]) for x in linears]
    for kind, linear in zip(kinds, linears, strict=True):
        if kind != kinds[0]:
            raise LayoutError(f"{name}: {linear.name} is not quantised as {first.name} is")


def qkv_part(attention: Attention, sizes: Sizes, placement: Placement) -> list[Linear]:
    """The rank's q, k and v; a gate stays with q, head by head, as the hub stores it. With fewer kv heads
    than ranks, tp / kv_heads neighbouring ranks hold the same one."""
    q = attention.q
    if attention.gate is not None:
        q = regrouped(q.name, [q, attention.gate], sizes.head_dim)
    kv_heads = _heads(attention, sizes)[1]
    kv = (out_part(x, *head_share(kv_heads, placement)) for x in (attention.k, attention.v))
    return [out_part(q, placement.tp_rank, placement.tp), *kv]


def norms_part(attention: Attention, sizes: Sizes, placement: Placement) -> Attention:
    """The rank's part of norms that tell the heads of q and of k apart, or norm them all at once, cut as
    those are."""

    def part(role: Norm | None, heads: int) -> Norm | None:
        return role and replace(role, weight=role.weight.part(0, *head_share(heads, placement)))

    heads, kv_heads = _heads(attention, sizes)
    return replace(attention, q_norm=part(attention.q_norm, heads), k_norm=part(attention.k_norm, kv_heads))


def _heads(attention: Attention, sizes: Sizes) -> tuple[int, int]:
    """How many query and kv heads a layer has."""
    return attention.heads or (sizes.heads, sizes.kv_heads)


def head_share(heads: int, placement: Placement) -> tuple[int, int]:
    """Which part of how many the rank holds of so many heads."""
    count = min(placement.tp, heads)
    return placement.tp_rank // (placement.tp // count), count


def padded_part(view: View, multiple: int, index: int, count: int) -> View:
    """Part `index` of `count` of the rows, after zero rows up to a multiple of `multiple`."""
    return view.pad(0, 0, -view.shape[0] % multiple).part(0, index, count)
