"""Adds heads and widths of zeros, so that sizes which tp does not divide can be cut evenly.

The output of an added query head meets zero columns of o, that of an added unit of a feed-forward block zero
columns of down, so that the sums are the same numbers. `resized` says what the server's config must then say.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import LayoutError
from ..mixers import Attention, Compressed, Mla, Queries
from ..model import BlockStacks, Experts, Layer, Mlp, Model, Sizes, Stacks
from ..roles import Linear, Parameter
from ..views import View


def padded(model: Model, tp: int, experts: int, multiple: int) -> Model:
    """The model with heads that `tp` ranks can cut or repeat, and with widths of which each rank gets a
    multiple of `multiple`, and whole blocks where the source's scales are of blocks; `experts` ranks cut an
    expert's width.

    Query heads stay with the kv head they read: kv heads are added with all their query heads, or, where
    there are fewer kv heads than ranks, query heads are added to every kv head. Raises LayoutError for a
    model that is no decoder, and for a size that follows from another and would not divide; when a layer is
    built, for heads of a quantised matrix, or unlike other layers'."""
    if model.encoder is not None:
        raise LayoutError(f"pad: {model.family} has an encoder, which is not padded")
    sizes = _sizes(model.sizes, tp, experts, multiple)
    if sizes == model.sizes:
        return model

    def grown(layer: Layer) -> Layer:
        return _layer(layer, model.sizes, sizes)

    return replace(
        model,
        sizes=sizes,
        layers=model.layers.map(grown),
        predictions=model.predictions.map(lambda further: replace(further, layer=grown(further.layer))),
    )


def advice(model: Model) -> str:
    """What a message adds where a size does not divide: the option `pad`, for a model that it can pad."""
    if model.encoder is not None or model.quant_method or model.carried or model.sizes.others:
        return ""
    return "; pad=True (-L pad=true) pads with zeros"


def resized(family: str, old: Sizes, new: Sizes) -> dict[str, int]:
    """The config keys whose numbers change, with the new numbers, so that a server builds the padded model.

    Raises LayoutError where no key says a size that changed."""
    out: dict[str, int] = {}
    if (old.heads, old.kv_heads) != (new.heads, new.kv_heads):
        if new.head_keys is None:
            raise LayoutError(
                f"pad: the config of {family} has no keys to say {new.heads} heads of {new.head_dim}"
            )
        numbers = new.heads, new.kv_heads, new.head_dim
        out |= {key: n for key, n in zip(new.head_keys, numbers, strict=True) if key}
    for key, width in new.widths.items():
        if width == old.widths[key] or _factor(old, key):
            continue
        said = key.partition(" or ")[0]
        if not said.isidentifier():
            raise LayoutError(f"pad: the config of {family} has no key to say that {key} is {width}")
        out[said] = width
    if new.vocab != old.vocab:
        out[new.vocab_key] = new.vocab
    return out


def _factor(sizes: Sizes, key: str) -> int:
    """How many times an expert's width a width is, where the config has only that ("n_shared_experts * ...");
    0 for other widths."""
    follows = key != sizes.expert_width and key.endswith(f"* {sizes.expert_width}")
    return sizes.widths[key] // sizes.widths[sizes.expert_width] if follows else 0


def _sizes(sizes: Sizes, tp: int, experts: int, multiple: int) -> Sizes:
    kv, group = sizes.kv_heads, sizes.heads // sizes.kv_heads
    if kv >= tp:
        kv = round_up(kv, tp)
    else:
        kv = next(n for n in range(kv, tp + 1) if tp % n == 0)
        group = round_up(group, tp // kv)
    unit = math.lcm(sizes.block, multiple)
    widths = {
        key: round_up(width, unit * (experts if key == sizes.expert_width else tp))
        for key, width in sizes.widths.items()
    }
    for key in widths:
        if factor := _factor(sizes, key):
            widths[key] = factor * widths[sizes.expert_width]
            if widths[key] % (unit * tp):
                raise LayoutError(
                    f"pad: {key} would be {widths[key]}, which does not divide by tp {tp} times {unit}"
                )
    return replace(sizes, heads=kv * group, kv_heads=kv, widths=widths)


def _layer(layer: Layer, old: Sizes, new: Sizes) -> Layer:
    if layer.vision is not None:
        raise LayoutError(f"pad: the image tower beside {layer.name} is as wide, and is not padded")
    attention, mlp = layer.attention, layer.mlp
    if isinstance(attention, Queries) or (isinstance(attention, Attention) and attention.heads):
        raise LayoutError(f"pad: {layer.name} has heads of its own number and size, and is not padded")
    if (old.heads, old.kv_heads) != (new.heads, new.kv_heads):
        if isinstance(attention, Compressed):
            raise LayoutError(f"pad: heads share rows of {attention.o_a.name}, and none are added")
        if isinstance(attention, Mla):
            attention = _latent(attention, old, new)
        elif isinstance(attention, Attention):  # linear attention has heads of its own
            attention = _attention(attention, old, new)
    if isinstance(mlp, Experts):
        return replace(layer, attention=attention, mlp=_experts(mlp, new))
    if mlp is None:
        return replace(layer, attention=attention)
    dense = {old.widths[k]: w for k, w in new.widths.items() if k not in (new.expert_width, new.shared_width)}
    return replace(layer, attention=attention, mlp=_mlp(mlp, dense[mlp.up.shape[0]]))


def _attention(attention: Attention, old: Sizes, new: Sizes) -> Attention:
    if attention.q.beside or attention.o.beside:
        raise LayoutError(f"{attention.q.name}: heads of a quantised matrix cannot be padded")
    norm = attention.q_norm
    if norm is not None and (attention.whole_norms or attention.own_norms):
        raise LayoutError(f"pad: {norm.name} tells heads apart or norms them all at once: none are added")
    if attention.k.shape[0] != attention.v.shape[0]:
        raise LayoutError(f"pad: the heads of {attention.v.name} are of another size: none are added")
    if attention.output_gate is not None:
        raise LayoutError(f"pad: {attention.output_gate.name} is not padded")
    kv, d, sinks = new.kv_heads - old.kv_heads, old.head_dim, attention.sinks

    def queries(view: View, axis: int, each: int) -> View:
        """`each` elements of an axis a query head: more queries for every kv head, then more kv heads."""
        of_kv = old.heads // old.kv_heads
        more = new.heads // new.kv_heads - of_kv
        return view.split(axis, of_kv * each).pad(axis + 1, 0, more * each).pad(axis, 0, kv).merge(axis)

    def rows(linear: Linear) -> Linear:
        bias = None if linear.bias is None else queries(linear.bias, 0, d)
        return replace(linear, weight=queries(linear.weight, 0, d), bias=bias)

    o = attention.o
    return replace(
        attention,
        q=rows(attention.q),
        gate=None if attention.gate is None else rows(attention.gate),
        k=_out_padded(attention.k, new.kv_heads * d),
        v=_out_padded(attention.v, new.kv_heads * d),
        o=replace(o, weight=queries(o.weight, 1, d)),
        sinks=None if sinks is None else Parameter(sinks.name, queries(sinks.view, 0, 1)),
    )


def _latent(attention: Mla, old: Sizes, new: Sizes) -> Mla:
    def rows(linear: Linear) -> Linear:
        return _out_padded(linear, linear.shape[0] // old.heads * new.heads)

    columns = attention.o.shape[1] // old.heads * new.heads
    return replace(
        attention, q=rows(attention.q), kv_b=rows(attention.kv_b), o=_in_padded(attention.o, columns)
    )


def _experts(moe: Experts, new: Sizes) -> Experts:
    width = new.widths[new.expert_width]
    experts = moe.experts.map(lambda expert: _mlp(expert, width))
    shared = None if moe.shared is None else _mlp(moe.shared, new.widths[new.shared_width])
    stacks = None if moe.stacks is None else _stacks(moe.stacks, width)
    return replace(moe, experts=experts, shared=shared, stacks=stacks)


def _stacks(stacks: Stacks | BlockStacks, width: int) -> Stacks | BlockStacks:
    def grown(role: Parameter, axis: int, size: int) -> Parameter:
        return Parameter(role.name, _grown(role.view, axis, size))

    if isinstance(stacks, BlockStacks):  # a byte of zeros is two zeros
        groups = width // (stacks.down.view.shape[3] * 2)
        return BlockStacks(
            grown(stacks.gate_up, 1, 2 * width),
            grown(stacks.gate_up_scales, 1, 2 * width),
            grown(stacks.gate_up_bias, 1, 2 * width),
            grown(stacks.down, 2, groups),
            grown(stacks.down_scales, 2, groups),
            stacks.down_bias,
        )
    return Stacks(
        grown(stacks.gate_up, 2, 2 * width),
        grown(stacks.gate_up_bias, 1, 2 * width),
        grown(stacks.down, 1, width),
        stacks.down_bias,
    )


def _mlp(mlp: Mlp, width: int) -> Mlp:
    gate = None if mlp.gate is None else _out_padded(mlp.gate, width)
    return replace(mlp, gate=gate, up=_out_padded(mlp.up, width), down=_in_padded(mlp.down, width))


def round_up(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `size`."""
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
