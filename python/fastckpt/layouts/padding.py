"""Zero heads and zero widths, so that sizes which tp does not divide can be cut evenly.

A zero query head's output is multiplied by zero columns of o, a zero unit of a feed-forward block by zero
columns of down: the sums are the same numbers. The server's config must say the padded sizes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..errors import LayoutError
from ..model import Attention, Experts, Layer, Layers, Lazy, Linear, Mla, Mlp, Model, Parameter, Sizes, Stacks
from ..views import View


def padded(model: Model, tp: int, experts: int) -> Model:
    """The model with heads that `tp` can cut or repeat, and with widths that divide by `tp`, an expert's by
    `experts`, the ranks that cut it; between blocks of fp8 where it has them.

    Query heads stay with the kv head they read: kv heads are added with all their queries, or, where there
    are fewer kv heads than ranks, queries to every kv head. A layer raises LayoutError where heads of a
    matrix with block factors would have to move."""
    sizes = _sizes(model.sizes, tp, experts)
    layers = [partial(_layer, model, sizes, i, tp, experts) for i in range(len(model.layers))]
    return replace(model, sizes=sizes, layers=Layers(layers))


def _sizes(sizes: Sizes, tp: int, experts: int) -> Sizes:
    kv, group = sizes.kv_heads, sizes.heads // sizes.kv_heads
    if kv >= tp:
        kv = _up(kv, tp)
    else:
        kv = next(n for n in range(kv, tp + 1) if tp % n == 0)
        group = _up(group, tp // kv)
    widths = {
        key: _up(width, experts if key == sizes.expert_width else tp) for key, width in sizes.widths.items()
    }
    return replace(sizes, heads=kv * group, kv_heads=kv, widths=widths)


def _layer(model: Model, new: Sizes, index: int, tp: int, experts: int) -> Layer:
    layer, old = model.layers[index], model.sizes
    attention, mlp = layer.attention, layer.mlp
    if (old.heads, old.kv_heads) != (new.heads, new.kv_heads):
        if isinstance(attention, Mla):
            attention = _latent(attention, old, new)
        else:
            attention = _attention(attention, old, new)
    return replace(
        layer,
        attention=attention,
        mlp=_experts(mlp, tp, experts) if isinstance(mlp, Experts) else _mlp(mlp, tp),
    )


def _attention(attention: Attention, old: Sizes, new: Sizes) -> Attention:
    if attention.q.beside or attention.o.beside:
        raise LayoutError(f"{attention.q.name}: heads of a quantised matrix cannot be padded")
    kv, d, sinks = new.kv_heads - old.kv_heads, old.head_dim, attention.sinks

    def queries(view: View, axis: int, each: int) -> View:
        """`each` elements of an axis a query head: more queries for every kv head, then more kv heads."""
        of_kv = old.heads // old.kv_heads
        more = new.heads // new.kv_heads - of_kv
        return view.split(axis, of_kv * each).pad(axis + 1, 0, more * each).pad(axis, 0, kv).merge(axis)

    q, o = attention.q, attention.o
    return replace(
        attention,
        q=replace(q, weight=queries(q.weight, 0, d), bias=None if q.bias is None else queries(q.bias, 0, d)),
        k=_out_padded(attention.k, new.kv_heads * d),
        v=_out_padded(attention.v, new.kv_heads * d),
        o=replace(o, weight=queries(o.weight, 1, d)),
        sinks=None if sinks is None else Parameter(sinks.name, queries(sinks.view, 0, 1)),
    )


def _latent(attention: Mla, old: Sizes, new: Sizes) -> Mla:
    def rows(linear: Linear) -> Linear:
        return _out_padded(linear, linear.weight.shape[0] // old.heads * new.heads)

    columns = attention.o.weight.shape[1] // old.heads * new.heads
    return replace(
        attention, q=rows(attention.q), kv_b=rows(attention.kv_b), o=_in_padded(attention.o, columns)
    )


def _experts(moe: Experts, tp: int, experts: int) -> Experts:
    each = [partial(_expert, moe, e, experts) for e in range(len(moe.experts))]
    shared = None if moe.shared is None else _mlp(moe.shared, tp)
    stacks = None if moe.stacks is None else _stacks(moe.stacks, experts)
    return replace(moe, experts=Lazy(each), shared=shared, stacks=stacks)


def _stacks(stacks: Stacks, count: int) -> Stacks:
    width = _up(stacks.down.view.shape[1], count)

    def grown(role: Parameter, axis: int, size: int) -> Parameter:
        return Parameter(role.name, _grown(role.view, axis, size))

    return Stacks(
        grown(stacks.gate_up, 2, 2 * width),
        grown(stacks.gate_up_bias, 1, 2 * width),
        grown(stacks.down, 1, width),
        stacks.down_bias,
    )


def _expert(moe: Experts, index: int, count: int) -> Mlp:
    return _mlp(moe.experts[index], count)


def _mlp(mlp: Mlp, count: int) -> Mlp:
    """The same block as wide as `count` ranks can cut."""
    block = max((b.unit[0] for b in mlp.up.beside), default=1)
    width = _up(mlp.up.shape[0], count * max(block, 1))
    gate = None if mlp.gate is None else _out_padded(mlp.gate, width)
    return replace(mlp, gate=gate, up=_out_padded(mlp.up, width), down=_in_padded(mlp.down, width))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _out_padded(linear: Linear, size: int) -> Linear:
    bias = None if linear.bias is None else _grown(linear.bias, 0, size)
    return replace(_padded(linear, 0, size), bias=bias)


def _in_padded(linear: Linear, size: int) -> Linear:
    return _padded(linear, 1, size)


def _padded(linear: Linear, axis: int, size: int) -> Linear:
    """Raises LayoutError for packed values, in which a zero is no zero."""
    if linear.packed != (1, 1) and size != linear.shape[axis]:
        raise LayoutError(f"{linear.name}: a matrix of packed values cannot be padded")
    beside = tuple(
        replace(b, view=_grown(b.view, axis, -(-size // b.unit[axis]))) if b.unit[axis] else b
        for b in linear.beside
    )
    return replace(linear, weight=_grown(linear.weight, axis, size // linear.packed[axis]), beside=beside)


def _grown(view: View, axis: int, size: int) -> View:
    return view.pad(axis, 0, size - view.shape[axis])
