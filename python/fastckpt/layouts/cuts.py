"""The cuts that layouts are made of: heads, rows, columns, padded vocabularies, and their refusals.

Everything is in the model's own form: a Linear is [out, in]. Sizes that do not divide are refused by the
`require_*` functions from sizes alone, before a view is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import LayoutError
from ..model import Attention, Linear, Model, Norm, Sizes
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


def require_decoder(layout: str, placement: Placement, sizes: Sizes) -> None:
    """Raises LayoutError where query heads or a feed-forward width do not divide by tp."""
    require_even(layout, placement, "the number of attention heads", sizes.heads)
    for key, width in sizes.widths.items():
        require_even(layout, placement, key, width)


def require_kv_heads(layout: str, placement: Placement, sizes: Sizes) -> None:
    """Raises LayoutError where kv heads can neither be dealt out nor repeated evenly over tp ranks."""
    kv, tp = sizes.kv_heads, placement.tp
    if kv % tp and tp % kv:
        raise LayoutError(f"layout {layout}: neither do {kv} kv heads divide by tp {tp} nor tp by kv heads")


def out_part(linear: Linear, index: int, count: int) -> Linear:
    """Part `index` of `count` of a matrix's outputs, and of its bias."""
    bias = None if linear.bias is None else linear.bias.part(0, index, count)
    return Linear(linear.name, linear.weight.part(0, index, count), bias, linear.transposed)


def in_part(linear: Linear, index: int, count: int) -> Linear:
    """Part `index` of `count` of a matrix's inputs; the bias is whole, since it is added once."""
    return Linear(linear.name, linear.weight.part(1, index, count), linear.bias, linear.transposed)


def joined(name: str, linears: Sequence[Linear]) -> Linear:
    """One matrix whose outputs are those of `linears` in order. All have a bias or none has."""
    biases = [x.bias for x in linears if x.bias is not None]
    if biases and len(biases) != len(linears):
        raise LayoutError(f"{name}: {len(biases)} of {len(linears)} parts have a bias, wanted all or none")
    weight = cat([x.weight for x in linears])
    return Linear(name, weight, cat(biases) if biases else None, linears[0].transposed)


def qkv_part(attention: Attention, model: Model, placement: Placement) -> list[Linear]:
    """The rank's q, k and v. With fewer kv heads than ranks, tp / kv_heads neighbouring ranks share one."""
    tp, rank, kv = placement.tp, placement.tp_rank, model.sizes.kv_heads
    groups = min(tp, kv)
    shared = rank // (tp // groups)
    q = out_part(attention.q, rank, tp)
    return [q, out_part(attention.k, shared, groups), out_part(attention.v, shared, groups)]


def padded_part(view: View, multiple: int, index: int, count: int) -> View:
    """Part `index` of `count` of the rows, after zero rows up to a multiple of `multiple`."""
    return view.pad(0, 0, -view.shape[0] % multiple).part(0, index, count)


def stored(linear: Linear) -> Iterator[Target]:
    """A matrix as the hub stores it: `name`.weight, transposed where the hub has it so, and `name`.bias."""
    yield Target(f"{linear.name}.weight", linear.weight.T if linear.transposed else linear.weight)
    if linear.bias is not None:
        yield Target(f"{linear.name}.bias", linear.bias)


def plain(linear: Linear) -> Iterator[Target]:
    """A matrix as [out, in], whatever the hub stores: `name`.weight and `name`.bias."""
    return stored(Linear(linear.name, linear.weight, linear.bias))


def norm(role: Norm | None) -> Iterator[Target]:
    """A norm under its hub name, whole; nothing for None."""
    if role is not None:
        yield Target(f"{role.name}.weight", role.weight)
        if role.bias is not None:
            yield Target(f"{role.name}.bias", role.bias)
