"""The cuts that layouts are made of: heads, rows, columns, padded vocabularies, and their refusals.

Everything is in the model's own form: a Linear is [out, in]. Sizes that do not divide are refused by the
`require_*` functions from sizes alone, before a view is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import int64
from ..errors import LayoutError, expect
from ..mixers import (
    Attention,
    Compressed,
    DeltaHeads,
    DeltaNet,
    Mamba,
    MambaHeads,
    Mla,
    Queries,
    Selective,
    ShortConv,
)
from ..model import Experts, Layer, Mlp, Sizes
from ..placement import Placement
from ..roles import Beside, Linear, Norm, Parameter
from ..stored import constant
from ..target import Target
from ..views import View, cat

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def require_least(layout: str, made: object, least: int, *options: str) -> None:
    """Raises LayoutError where one of these options of a layout is less than `least`."""
    for name in options:
        expect(f"layout {layout}: {name}", size := getattr(made, name), int)
        if size < least:
            raise LayoutError(f"layout {layout}: {name} must be at least {least}, got {size}")


Subjects = Mapping[str, tuple[Callable[[], bool], str]]
"""Option -> whether the model and the placement have what it speaks of; what that is, for the message."""


def require_subjects(layout: str, made: DataclassInstance, subjects: Subjects) -> None:
    """Raises LayoutError for an option that is not as by default where it could not change anything.

    Options that allow something (`pad`, `replicate_kv`), or ask for a size that may hold already, are not
    among `subjects`."""
    for option in fields(made):
        value = getattr(made, option.name)
        if value != option.default and option.name in subjects:
            there, wanted = subjects[option.name]
            if not there():
                said = str(value).lower() if isinstance(value, bool) else value
                raise LayoutError(f"layout {layout}: {option.name}={said} wants {wanted}")


def require_tensor_parallel(layout: str, placement: Placement) -> None:
    """Raises LayoutError for a placement that cuts by more than tensor parallelism."""
    for name in ("pp", "dp", "ep"):
        size = getattr(placement, name)
        if size != 1:
            raise LayoutError(f"layout {layout} does not cut by {name} yet: wanted {name} 1, got {size}")


def require_even(layout: str, placement: Placement, what: str, size: int, instead: str = "") -> None:
    """Raises LayoutError where `size` does not divide by tp; `instead`: the way out, for the message."""
    if size % placement.tp:
        raise LayoutError(f"layout {layout}: {what} {size} does not divide by tp {placement.tp}{instead}")


def require_heads(layout: str, placement: Placement, sizes: Sizes, instead: str = "") -> None:
    """Raises LayoutError where tp does not divide the query heads, or neither divides nor is divided by the
    kv heads of any layer: those are dealt out evenly or repeated evenly."""
    tp = placement.tp
    for heads, kv in ((sizes.heads, sizes.kv_heads), *sizes.others):
        require_even(layout, placement, "the number of attention heads", heads, instead)
        if kv % tp and tp % kv:
            raise LayoutError(
                f"layout {layout}: neither do {kv} kv heads divide by tp {tp} nor tp by kv heads{instead}"
            )


def out_part(linear: Linear, index: int, count: int) -> Linear:
    """Part `index` of `count` of a matrix's outputs, of its bias and of what stands beside it."""
    bias = None if linear.bias is None else linear.bias.part(0, index, count)
    return replace(_part(linear, 0, index, count), bias=bias)


def in_part(linear: Linear, index: int, count: int) -> Linear:
    """Part `index` of `count` of a matrix's inputs; the bias is whole, since it is added once."""
    return _part(linear, 1, index, count)


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


def qkv_part(attention: Attention, sizes: Sizes, placement: Placement) -> list[Linear]:
    """The rank's q, k and v; a gate stays with q, head by head, as the hub stores it. With fewer kv heads
    than ranks, tp / kv_heads neighbouring ranks hold the same one."""
    q = attention.q
    if attention.gate is not None:
        q = regrouped(q.name, [q, attention.gate], sizes.head_dim)
    kv_heads = _heads(attention, sizes)[1]
    kv = (out_part(x, *_share(kv_heads, placement)) for x in (attention.k, attention.v))
    return [out_part(q, placement.tp_rank, placement.tp), *kv]


def _heads(attention: Attention, sizes: Sizes) -> tuple[int, int]:
    """How many query and kv heads a layer has."""
    return attention.heads or (sizes.heads, sizes.kv_heads)


def queries_part(attention: Queries, placement: Placement) -> Iterator[Target]:
    """The rank's heads of attention without keys of its own; servers keep its form."""
    rank, tp = placement.tp_rank, placement.tp
    yield from stored(out_part(attention.q, rank, tp))
    yield from stored(in_part(attention.o, rank, tp))
    yield from norm(attention.q_norm)


def norms_part(attention: Attention, sizes: Sizes, placement: Placement) -> Attention:
    """The rank's part of norms that tell the heads of q and of k apart, or norm them all at once, cut as
    those are."""

    def part(role: Norm | None, heads: int) -> Norm | None:
        return role and replace(role, weight=role.weight.part(0, *_share(heads, placement)))

    heads, kv_heads = _heads(attention, sizes)
    return replace(attention, q_norm=part(attention.q_norm, heads), k_norm=part(attention.k_norm, kv_heads))


def _share(heads: int, placement: Placement) -> tuple[int, int]:
    """Which part of how many the rank holds of so many heads."""
    count = min(placement.tp, heads)
    return placement.tp_rank // (placement.tp // count), count


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


def require_delta(layout: str, placement: Placement, heads: DeltaHeads | None) -> None:
    """Raises LayoutError where tp does not divide the key heads of linear attention; value heads follow."""
    if heads is not None:
        require_even(layout, placement, "the number of linear attention's key heads", heads.keys)


def delta_part(net: DeltaNet, placement: Placement) -> DeltaNet:
    """The rank's key heads and the value heads that read them; the norm, of one head, is whole."""
    tp, rank = placement.tp, placement.tp_rank

    def rows(role: Parameter) -> Parameter:
        return replace(role, view=role.view.part(0, rank, tp))

    q, k, v, z, b, a = (out_part(x, rank, tp) for x in (net.q, net.k, net.v, net.z, net.b, net.a))
    conv_q, conv_k, conv_v = (rows(x) for x in net.conv)
    return replace(
        net,
        q=q,
        k=k,
        v=v,
        z=z,
        b=b,
        a=a,
        conv=(conv_q, conv_k, conv_v),
        a_log=rows(net.a_log),
        dt_bias=rows(net.dt_bias),
        o=in_part(net.o, rank, tp),
        groups=max(1, net.groups // tp),
        low=net.low,
    )


def delta_stored(net: DeltaNet) -> list[Linear]:
    """The matrices that read the hidden state, as the hub stores them."""
    apart = (net.q, net.k, net.v, net.z, net.b, net.a)
    together = [list(same) for _, same in groupby(apart, lambda x: x.name)]
    return [regrouped(x[-1].name, x, x[-1].shape[0] // net.groups) for x in together]


def delta_rest(net: DeltaNet) -> Iterator[Target]:
    """The kernels, as the hub stores them, and what is no matrix."""
    for name, same in groupby(net.conv, lambda x: x.name):
        yield Target(name, cat([x.view for x in same]))
    yield from parameter(net.a_log)
    yield from parameter(net.dt_bias)
    yield from norm(net.norm)


def require_mamba(layout: str, placement: Placement, heads: MambaHeads | None) -> None:
    """Raises LayoutError where tp does not divide the heads of Mamba's mixers, nor their groups, unless all
    heads are one group, which every rank then holds."""
    if heads is None:
        return
    require_even(layout, placement, "the number of Mamba's heads", heads.heads)
    if heads.groups > 1:
        require_even(layout, placement, "the number of groups of Mamba's heads", heads.groups)


def two_blocks(layout: str, layer: Layer) -> tuple[Attention | Mla | DeltaNet, Mlp | Experts]:
    """The attention and the feed-forward block of a layer. Raises LayoutError for one that has not just these
    two, or whose attention reads what other layers make or store otherwise."""
    if layer.mamba is not None:
        raise LayoutError(f"layout {layout} has no place for {layer.mamba.o.name}, of a Mamba mixer")
    if isinstance(layer.attention, ShortConv):
        raise LayoutError(
            f"layout {layout} has no place for {layer.attention.o.name}, of a short convolution"
        )
    if layer.attention is None or layer.mlp is None:
        raise LayoutError(f"layout {layout} has no place for {layer.name}, a layer of one block")
    for role in layer.whole:
        raise LayoutError(f"layout {layout} has no place for {role.name}")
    attention = layer.attention
    if isinstance(attention, Queries):
        raise LayoutError(f"layout {layout} has no place for {attention.q.name}, without keys of its own")
    if isinstance(attention, Selective):
        raise LayoutError(f"layout {layout} has no place for {attention.o.name}, of a Mamba mixer")
    if isinstance(attention, Compressed):
        raise LayoutError(f"layout {layout} has no place for {attention.o_a.name}, of compressed attention")
    if isinstance(attention, DeltaNet) and attention.low is not None:
        raise LayoutError(f"layout {layout} has no place for {attention.low[0].name}, of a low rank")
    if isinstance(attention, Attention) and (attention.heads or attention.values_are_keys):
        raise LayoutError(f"layout {layout} has no place for {attention.k.name}, unlike other layers' keys")
    return attention, layer.mlp


def mamba_part(mixer: Mamba, heads: MambaHeads, placement: Placement) -> Mamba:
    """The rank's heads and their groups. Source: vLLM's mamba_mixer2.py."""
    tp, rank = placement.tp, placement.tp_rank
    group = _share(heads.groups, placement)

    def rows(role: Parameter, index: int = rank, count: int = tp) -> Parameter:
        return replace(role, view=role.view.part(0, index, count))

    def channels(roles: tuple[Parameter, Parameter, Parameter]) -> tuple[Parameter, Parameter, Parameter]:
        x, b, c = roles
        return rows(x), rows(b, *group), rows(c, *group)

    z, x, dt = (out_part(each, rank, tp) for each in (mixer.z, mixer.x, mixer.dt))
    b, c = (out_part(each, *group) for each in (mixer.b, mixer.c))
    return Mamba(
        z=z,
        x=x,
        b=b,
        c=c,
        dt=dt,
        conv=channels(mixer.conv),
        conv_bias=mixer.conv_bias and channels(mixer.conv_bias),
        a_log=rows(mixer.a_log),
        d=rows(mixer.d),
        dt_bias=rows(mixer.dt_bias),
        norm=mixer.norm and replace(mixer.norm, weight=mixer.norm.weight.part(0, rank, tp)),
        o=in_part(mixer.o, rank, tp),
    )


def mamba(mixer: Mamba) -> Iterator[Target]:
    """All of a mixer, as the hub stores it, but for a_log."""
    yield from stored(joined(mixer.z.name, (mixer.z, mixer.x, mixer.b, mixer.c, mixer.dt)))
    for roles in (mixer.conv, mixer.conv_bias or ()):
        if roles:
            yield Target(roles[0].name, cat([role.view for role in roles]))
    yield from parameter(mixer.d)
    yield from parameter(mixer.dt_bias)
    yield from norm(mixer.norm)
    yield from stored(mixer.o)


def short_conv_part(conv: ShortConv, placement: Placement) -> ShortConv:
    """The rank's channels. Source: vLLM's layers/mamba/short_conv.py."""
    tp, rank = placement.tp, placement.tp_rank
    b, c, x = (out_part(each, rank, tp) for each in (conv.b, conv.c, conv.x))

    def rows(role: Parameter) -> Parameter:
        return replace(role, view=role.view.part(0, rank, tp))

    offset = conv.conv_bias and rows(conv.conv_bias)
    return ShortConv(b, c, x, rows(conv.conv), offset, in_part(conv.o, rank, tp))


def short_conv(conv: ShortConv) -> Iterator[Target]:
    """All of a short convolution, as the hub stores it."""
    yield from stored(joined(conv.b.name, (conv.b, conv.c, conv.x)))
    yield from parameter(conv.conv)
    yield from parameter(conv.conv_bias)
    yield from stored(conv.o)


def selective_part(mixer: Selective, placement: Placement) -> Selective:
    """The rank's channels. Source: vLLM's layers/mamba/mamba_mixer.py."""
    tp, rank = placement.tp, placement.tp_rank

    def rows(role: Parameter) -> Parameter:
        return replace(role, view=role.view.part(0, rank, tp))

    x, z, steps = (out_part(each, rank, tp) for each in (mixer.x, mixer.z, mixer.steps))
    return replace(
        mixer,
        x=x,
        z=z,
        conv=rows(mixer.conv),
        conv_bias=mixer.conv_bias and rows(mixer.conv_bias),
        select=in_part(mixer.select, rank, tp),
        steps=steps,
        a_log=rows(mixer.a_log),
        d=rows(mixer.d),
        o=in_part(mixer.o, rank, tp),
    )


def selective(mixer: Selective) -> Iterator[Target]:
    """All of a mixer of Mamba's first version, as the hub stores it, but for a_log."""
    for linear in (joined(mixer.x.name, (mixer.x, mixer.z)), mixer.select, mixer.steps, mixer.o):
        yield from stored(linear)
    for role in (mixer.conv, mixer.conv_bias, mixer.d):
        yield from parameter(role)
    for each in (mixer.dt_norm, mixer.b_norm, mixer.c_norm):
        yield from norm(each)


def padded_part(view: View, multiple: int, index: int, count: int) -> View:
    """Part `index` of `count` of the rows, after zero rows up to a multiple of `multiple`."""
    return view.pad(0, 0, -view.shape[0] % multiple).part(0, index, count)


def stored(linear: Linear) -> Iterator[Target]:
    """A matrix as the hub stores it: transposed where the hub has it so, with its bias and what stands beside
    it, and with its own (cut) sizes where the hub keeps sizes."""
    return _tensors(replace(linear, whole=linear.whole and linear.shape))


def _tensors(linear: Linear) -> Iterator[Target]:
    yield Target(f"{linear.name}.{linear.leaf}", linear.weight.T if linear.transposed else linear.weight)
    yield from bias(linear)
    for b in linear.beside:
        yield Target(f"{linear.name}.{b.leaf}", in_form(b))
    if linear.whole is not None:
        yield Target(f"{linear.name}.weight_shape", constant(np.array(linear.whole, np.int64), int64))


def in_form(beside: Beside) -> View:
    """What stands beside a matrix, shaped as the hub has it."""
    match beside.form:
        case "matrix":
            return beside.view
        case "transposed":
            return beside.view.T
        case "vector":
            return beside.view.reshape((beside.view.numel,))
        case "scalar":
            return beside.view.reshape(())


def plain(linear: Linear) -> Iterator[Target]:
    """A matrix as [out, in] whatever the hub stores (but a quantised one as it is), with its bias and what
    stands beside it, scalars as vectors of one, and with the hub's own sizes."""
    beside = tuple(replace(b, form="vector") if b.form == "scalar" else b for b in linear.beside)
    return _tensors(replace(linear, beside=beside) if beside else replace(linear, transposed=False))


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


def require_heads_alike(layout: str, attention: Attention) -> None:
    """Raises LayoutError unless all heads are of one size, without a gate that is a module of its own, and q
    and k are normed head by head, by the same weights, before the rotary positions."""
    norm, k, v = attention.q_norm, attention.k, attention.v
    if attention.output_gate is not None:
        raise LayoutError(f"layout {layout} has no place for {attention.output_gate.name}, an output gate")
    if k.shape[0] != v.shape[0]:
        raise LayoutError(f"layout {layout} has no place for {v.name}, of other rows than {k.name}")
    for other, what in (
        (attention.whole_norms, "a norm of all heads"),
        (attention.own_norms, "a norm with weights for each head"),
        (attention.rotated, "a norm after the rotary positions"),
    ):
        if other and norm is not None:
            raise LayoutError(f"layout {layout} has no place for {norm.name}, {what}")


def require_no_scalars(layout: str, mlp: Mlp) -> None:
    """Raises LayoutError for a block whose activation has learned numbers."""
    for role in mlp.scalars:
        raise LayoutError(f"layout {layout} has no place for {role.name}")


def parameter(role: Parameter | None) -> Iterator[Target]:
    """A lone tensor under its hub name, whole; nothing for None."""
    if role is not None:
        yield Target(role.name, role.view if role.shape is None else role.view.reshape(role.shape))
