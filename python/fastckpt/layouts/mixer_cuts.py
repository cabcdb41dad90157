"""What stands in place of attention, or beside it: a rank's part, and all of it as the hub stores it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from ..mixers import DeltaNet, Mamba, MambaHeads, Queries, Selective, ShortConv
from ..placement import Placement
from ..roles import Linear, Parameter
from ..target import Target
from ..views import cat
from .cuts import head_share, in_part, joined, out_part, regrouped, rows_part
from .hub_form import norm, parameter, stored


def queries_part(attention: Queries, placement: Placement) -> Iterator[Target]:
    """The rank's heads of attention without keys of its own; servers keep its form."""
    rank, tp = placement.tp_rank, placement.tp
    yield from stored(out_part(attention.q, rank, tp))
    yield from stored(in_part(attention.o, rank, tp))
    yield from norm(attention.q_norm)


def delta_part(net: DeltaNet, placement: Placement) -> DeltaNet:
    """The rank's key heads and the value heads that read them; the norm, of one head, is whole."""
    part = placement.tp_rank, placement.tp
    q, k, v, z, b, a = (out_part(x, *part) for x in (net.q, net.k, net.v, net.z, net.b, net.a))
    conv_q, conv_k, conv_v = (rows_part(x, *part) for x in net.conv)
    return replace(
        net,
        q=q,
        k=k,
        v=v,
        z=z,
        b=b,
        a=a,
        conv=(conv_q, conv_k, conv_v),
        a_log=rows_part(net.a_log, *part),
        dt_bias=rows_part(net.dt_bias, *part),
        o=in_part(net.o, *part),
        groups=max(1, net.groups // placement.tp),
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


def mamba_part(mixer: Mamba, heads: MambaHeads, placement: Placement) -> Mamba:
    """The rank's heads and their groups. Source: vLLM's mamba_mixer2.py."""
    part, group = (placement.tp_rank, placement.tp), head_share(heads.groups, placement)

    def channels(roles: tuple[Parameter, Parameter, Parameter]) -> tuple[Parameter, Parameter, Parameter]:
        x, b, c = roles
        return rows_part(x, *part), rows_part(b, *group), rows_part(c, *group)

    z, x, dt = (out_part(each, *part) for each in (mixer.z, mixer.x, mixer.dt))
    b, c = (out_part(each, *group) for each in (mixer.b, mixer.c))
    return Mamba(
        z=z,
        x=x,
        b=b,
        c=c,
        dt=dt,
        conv=channels(mixer.conv),
        conv_bias=mixer.conv_bias and channels(mixer.conv_bias),
        a_log=rows_part(mixer.a_log, *part),
        d=rows_part(mixer.d, *part),
        dt_bias=rows_part(mixer.dt_bias, *part),
        norm=mixer.norm and replace(mixer.norm, weight=mixer.norm.weight.part(0, *part)),
        o=in_part(mixer.o, *part),
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
    part = placement.tp_rank, placement.tp
    b, c, x = (out_part(each, *part) for each in (conv.b, conv.c, conv.x))
    kernels, offset = rows_part(conv.conv, *part), conv.conv_bias and rows_part(conv.conv_bias, *part)
    return ShortConv(b, c, x, kernels, offset, in_part(conv.o, *part))


def short_conv(conv: ShortConv) -> Iterator[Target]:
    """All of a short convolution, as the hub stores it."""
    yield from stored(joined(conv.b.name, (conv.b, conv.c, conv.x)))
    yield from parameter(conv.conv)
    yield from parameter(conv.conv_bias)
    yield from stored(conv.o)


def selective_part(mixer: Selective, placement: Placement) -> Selective:
    """The rank's channels. Source: vLLM's layers/mamba/mamba_mixer.py."""
    part = placement.tp_rank, placement.tp
    x, z, steps = (out_part(each, *part) for each in (mixer.x, mixer.z, mixer.steps))
    return replace(
        mixer,
        x=x,
        z=z,
        conv=rows_part(mixer.conv, *part),
        conv_bias=mixer.conv_bias and rows_part(mixer.conv_bias, *part),
        select=in_part(mixer.select, *part),
        steps=steps,
        a_log=rows_part(mixer.a_log, *part),
        d=rows_part(mixer.d, *part),
        o=in_part(mixer.o, *part),
    )


def selective(mixer: Selective) -> Iterator[Target]:
    """All of a mixer of Mamba's first version, as the hub stores it, but for a_log."""
    for linear in (joined(mixer.x.name, (mixer.x, mixer.z)), mixer.select, mixer.steps, mixer.o):
        yield from stored(linear)
    for role in (mixer.conv, mixer.conv_bias, mixer.d):
        yield from parameter(role)
    for each in (mixer.dt_norm, mixer.b_norm, mixer.c_norm):
        yield from norm(each)
