"""The cuts that layouts are made of: heads, rows, columns, padded vocabularies, and their refusals.

Everything is in the model's own form: a Linear is [out, in]. Sizes that do not divide are refused by the
`require_*` functions from sizes alone, before a view is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..errors import LayoutError
from ..model import Attention, Linear, Norm, Parameter, Sizes
from ..placement import Placement
from ..target import Target
from ..views import View, cat


def require_tensor_parallel(layout: str, placement: Placement) -> None:
    """Raises LayoutError for a placement that cuts by more than tensor parallelism."""
    for name in ("pp", "dp", "ep"):
        size = getattr(placement, name)
        if size != 1:
            raise LayoutError(f"layout {layout} does not cut by {name} yet: wanted {name} 1, got {size}")


def require_even(layout: str, placement: Placement, what: str, size: int) -> None:
    """Raises LayoutError where `size` does not divide by tp."""
    if size % placement.tp:
        raise LayoutError(f"layout {layout}: {what} {size} does not divide by tp {placement.tp}")


def require_heads(layout: str, placement: Placement, sizes: Sizes) -> None:
    """Raises LayoutError where query heads do not divide by tp."""
    require_even(layout, placement, "the number of attention heads", sizes.heads)


def require_decoder(layout: str, placement: Placement, sizes: Sizes) -> None:
    """Raises LayoutError where query heads or a feed-forward width do not divide by tp."""
    require_heads(layout, placement, sizes)
    for key, width in sizes.widths.items():
        require_even(layout, placement, key, width)


def require_kv_heads(layout: str, placement: Placement, sizes: Sizes) -> None:
    """Raises LayoutError where kv heads can neither be dealt out nor repeated evenly over tp ranks."""
    kv, tp = sizes.kv_heads, placement.tp
    if kv % tp and tp % kv:
        raise LayoutError(f"layout {layout}: neither do {kv} kv heads divide by tp {tp} nor tp by kv heads")


def out_part(linear: Linear, index: int, count: int) -> Linear:
    """Part `index` of `count` of a matrix's outputs, and of its bias and block factors."""
    rows = linear.weight.shape[0] // count
    bias = None if linear.bias is None else linear.bias.part(0, index, count)
    return replace(
        linear,
        weight=linear.weight.part(0, index, count),
        bias=bias,
        scale=_factors(linear, 0, index * rows, rows),
    )


def in_part(linear: Linear, index: int, count: int) -> Linear:
    """Part `index` of `count` of a matrix's inputs; the bias is whole, since it is added once."""
    columns = linear.weight.shape[1] // count
    return replace(
        linear,
        weight=linear.weight.part(1, index, count),
        scale=_factors(linear, 1, index * columns, columns),
    )


def _factors(linear: Linear, axis: int, start: int, length: int) -> View | None:
    """The block factors of [start, start + length) of an fp8 matrix's axis.

    The part begins on a block and ends with one (or with the matrix), or lies within one, whose factor every
    such part gets."""
    if linear.scale is None:
        return None
    block, stop = linear.block[axis], start + length
    aligned = start % block == 0 and (stop % block == 0 or stop == linear.weight.shape[axis])
    if not aligned and start // block != (stop - 1) // block:
        raise LayoutError(
            f"{linear.name}: [{start}, {stop}) of axis {axis} cuts a block of {block} that shares a factor"
        )
    return linear.scale.narrow(axis, start // block, -(-stop // block) - start // block)


def joined(name: str, linears: Sequence[Linear]) -> Linear:
    """One matrix whose outputs are those of `linears` in order. All have a bias or none has; likewise block
    factors, and then all but the last end with a block."""
    biases = [x.bias for x in linears if x.bias is not None]
    scales = [x.scale for x in linears if x.scale is not None]
    for what, found in (("a bias", biases), ("block factors", scales)):
        if found and len(found) != len(linears):
            raise LayoutError(f"{name}: {len(found)} of {len(linears)} parts have {what}, wanted all or none")
    first = linears[0]
    for linear in linears[:-1] if scales else ():
        if linear.weight.shape[0] % linear.block[0]:
            raise LayoutError(
                f"{name}: {linear.weight.shape[0]} rows of {linear.name} are no multiple of their block "
                f"{linear.block[0]}, so the next part's factors would not fit"
            )
    return replace(
        first,
        name=name,
        weight=cat([x.weight for x in linears]),
        bias=cat(biases) if biases else None,
        scale=cat(scales) if scales else None,
    )


def qkv_part(attention: Attention, sizes: Sizes, placement: Placement) -> list[Linear]:
    """The rank's q, k and v. With fewer kv heads than ranks, tp / kv_heads neighbouring ranks share one."""
    tp, rank = placement.tp, placement.tp_rank
    groups = min(tp, sizes.kv_heads)
    shared = rank // (tp // groups)
    q = out_part(attention.q, rank, tp)
    return [q, out_part(attention.k, shared, groups), out_part(attention.v, shared, groups)]


def regrouped(name: str, parts: Sequence[Linear], head_dim: int) -> Linear:
    """q, k and v as one matrix: for each kv head its query heads, itself and its value head."""
    q, k, v = parts
    kv_heads = k.weight.shape[0] // head_dim

    def by_group(views: Sequence[View]) -> View:
        return cat([x.split(0, x.shape[0] // kv_heads) for x in views], 1).merge(0)

    biases = [x.bias for x in (q, k, v) if x.bias is not None]
    weight = by_group([q.weight, k.weight, v.weight])
    return replace(q, name=name, weight=weight, bias=by_group(biases) if biases else None)


def padded_part(view: View, multiple: int, index: int, count: int) -> View:
    """Part `index` of `count` of the rows, after zero rows up to a multiple of `multiple`."""
    return view.pad(0, 0, -view.shape[0] % multiple).part(0, index, count)


def stored(linear: Linear) -> Iterator[Target]:
    """A matrix as the hub stores it: its weight, transposed where the hub has it so, bias and factors."""
    yield Target(f"{linear.name}.weight", linear.weight.T if linear.transposed else linear.weight)
    yield from bias(linear)
    if linear.scale is not None:
        yield Target(f"{linear.name}.weight_scale_inv", linear.scale)


def plain(linear: Linear) -> Iterator[Target]:
    """A matrix as [out, in], whatever the hub stores, with its bias and factors."""
    return stored(replace(linear, transposed=False))


def bias(linear: Linear) -> Iterator[Target]:
    """The bias of a matrix alone; nothing where it has none."""
    if linear.bias is not None:
        yield Target(linear.bias_name or f"{linear.name}.bias", linear.bias)


def norm(role: Norm | None) -> Iterator[Target]:
    """A norm under its hub name, whole; nothing for None."""
    if role is not None:
        yield Target(f"{role.name}.weight", role.weight)
        if role.bias is not None:
            yield Target(f"{role.name}.bias", role.bias)


def parameter(role: Parameter | None) -> Iterator[Target]:
    """A lone tensor under its hub name, whole; nothing for None."""
    if role is not None:
        yield Target(role.name, role.view)
