"""Attention and what stands in its place, as vLLM holds a rank's part of it, and what it calls that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ... import dtypes
from ...computed.finishes import minus_exp
from ...errors import LayoutError
from ...mixers import (
    Attends,
    Attention,
    Compressed,
    Compressor,
    DeltaNet,
    Mamba,
    MambaHeads,
    Mla,
    Queries,
    Selective,
    ShortConv,
)
from ...model import Model, Sizes
from ...placement import Placement
from ...roles import Linear, Parameter
from ...target import Target
from ..cuts import in_part, joined, norms_part, out_part, qkv_part, regrouped
from ..hub_form import norm, out_by_in
from ..mixer_cuts import (
    delta_part,
    delta_rest,
    delta_stored,
    mamba,
    mamba_part,
    queries_part,
    selective,
    selective_part,
    short_conv,
    short_conv_part,
)
from ..requirements import require_neighbours
from .families import CUT_NORMS, DELTA, HALVES, PAIRED, QWEN_DELTA, UNJOINED


def attention_part(
    attention: Attends, model: Model, placement: Placement, as_hub: bool, *, rates: bool
) -> Iterator[Target]:
    """The rank's part of a layer's attention; `as_hub` as in `heads_part`, `rates` as in `mixer_part`."""
    match attention:
        case Mla():
            if model.family not in HALVES:
                require_neighbours("vllm", attention)
            yield from _latent(attention, placement, model.family in UNJOINED)
        case Compressed():
            yield from _compressed(attention, placement)
        case DeltaNet():
            yield from _delta(attention, placement, model.family)
        case ShortConv():
            yield from short_conv(short_conv_part(attention, placement))
        case Selective():
            part = selective_part(attention, placement)
            yield from selective(part)
            yield _rates(part.a_log, rates)
        case Queries():
            yield from queries_part(attention, placement)
        case Attention():
            if attention.own_norms or model.family in CUT_NORMS:
                attention = norms_part(attention, model.sizes, placement)
            if model.family in PAIRED:
                attention = _in_halves(attention, model.sizes.head_dim)
            yield from heads_part(attention, model.sizes, placement, as_hub)


def heads_part(
    attention: Attention, sizes: Sizes, placement: Placement, as_hub: bool = False
) -> Iterator[Target]:
    """The rank's heads of attention; `as_hub`: where the hub stores q, k and v head by head, they stay so."""
    name = attention.fused or f"{parent(attention.q.name)}.qkv_proj"
    parts = qkv_part(attention, sizes, placement)
    grouped = as_hub and attention.grouped
    yield from out_by_in(regrouped(name, parts, sizes.head_dim) if grouped else joined(name, parts))
    yield from out_by_in(in_part(attention.o, placement.tp_rank, placement.tp))
    yield from norm(attention.q_norm)
    yield from norm(attention.k_norm)
    if attention.output_gate is not None:
        yield from out_by_in(out_part(attention.output_gate, placement.tp_rank, placement.tp))
    if attention.sinks is not None:
        sinks = attention.sinks.view.part(0, placement.tp_rank, placement.tp)
        yield Target(attention.sinks.name, sinks)


def _in_halves(attention: Attention, head_dim: int) -> Attention:
    """q and k with each head's even rows before its odd ones.

    Raises LayoutError for what is quantised or has biases, whose form in vLLM is not known."""

    def halves(linear: Linear) -> Linear:
        if linear.beside or linear.bias is not None:
            what = linear.beside[0].leaf if linear.beside else "bias"
            raise LayoutError(f"layout vllm: how vLLM orders {linear.name}.{what} is not known")
        pairs = linear.weight.split(0, head_dim).split(1, 2)
        return replace(linear, weight=pairs.permute((0, 2, 1, 3)).merge(1).merge(0))

    return replace(attention, q=halves(attention.q), k=halves(attention.k))


def _latent(attention: Mla, placement: Placement, apart: bool) -> Iterator[Target]:
    tp, rank = placement.tp, placement.tp_rank
    if attention.q_a is None:
        yield from out_by_in(attention.kv_a)
    elif apart:
        yield from out_by_in(attention.q_a)
        yield from out_by_in(attention.kv_a)
    else:
        name = f"{parent(attention.q_a.name)}.fused_qkv_a_proj"
        yield from out_by_in(joined(name, [attention.q_a, attention.kv_a]))
    yield from norm(attention.q_norm)
    yield from out_by_in(out_part(attention.q, rank, tp))
    yield from norm(attention.kv_norm)
    yield from out_by_in(out_part(attention.kv_b, rank, tp))
    yield from out_by_in(in_part(attention.o, rank, tp))
    if attention.indexer is not None:
        k, weights = attention.indexer.k, attention.indexer.weights
        yield from out_by_in(attention.indexer.q)
        yield from out_by_in(joined(f"{parent(k.name)}.wk_weights_proj", [k, weights]))
        yield from norm(attention.indexer.k_norm)


def _compressed(attention: Compressed, placement: Placement) -> Iterator[Target]:
    """The rank's heads, and their groups' rows; what makes entries, and chooses among them, is whole."""
    tp, rank = placement.tp, placement.tp_rank
    both = (attention.q_a, attention.kv)
    yield from out_by_in(joined(f"{parent(attention.kv.name)}.fused_wqa_wkv", both))
    yield from norm(attention.q_norm)
    yield from out_by_in(out_part(attention.q, rank, tp))
    yield from norm(attention.kv_norm)
    yield from out_by_in(out_part(attention.o_a, rank, tp))
    yield from out_by_in(in_part(attention.o, rank, tp))
    yield Target(attention.sinks.name, attention.sinks.view.part(0, rank, tp))
    if attention.compressor is not None:
        yield from _compressor(attention.compressor)
    if attention.indexer is not None:
        yield from out_by_in(attention.indexer.q)
        yield from out_by_in(attention.indexer.weights)
        yield from _compressor(attention.indexer.keys)


def _compressor(role: Compressor) -> Iterator[Target]:
    yield from out_by_in(joined(f"{parent(role.kv.name)}.fused_wkv_wgate", (role.kv, role.gate)))
    yield Target(role.positions.name, role.positions.view)
    yield from norm(role.norm)


def _delta(net: DeltaNet, placement: Placement, family: str) -> Iterator[Target]:
    part, at = delta_part(net, placement), parent(net.q.name)
    apart = {"q": part.q, "k": part.k, "v": part.v, "z": part.z, "b": part.b, "a": part.a}
    if part.low is not None:
        apart |= zip("fg", part.low, strict=True)
    matrices = delta_stored(part)
    if net.q.name != net.z.name:
        both = DELTA.get(family, QWEN_DELTA)
        matrices = [joined(f"{at}.{name}", [apart.pop(x) for x in held]) for name, held in both.items()]
        matrices += apart.values()
    for linear in (*matrices, part.o):
        yield from out_by_in(linear)
    q, k, v = (replace(x, name=f"{at}.conv1d.weight") for x in part.conv)
    a_log = replace(part.a_log, view=part.a_log.view.cast(dtypes.float32), shape=None)
    yield from delta_rest(replace(part, a_log=a_log, conv=(q, k, v)))


def mixer_part(mixer: Mamba, heads: MambaHeads, placement: Placement, *, rates: bool) -> Iterator[Target]:
    """The rank's part of a mixer; with `rates` it has vLLM's A in place of A_log."""
    part = mamba_part(mixer, heads, placement)
    yield from mamba(part)
    yield _rates(part.a_log, rates)


def _rates(a_log: Parameter, rates: bool) -> Target:
    if rates:
        return Target(f"{parent(a_log.name)}.A", minus_exp(a_log.view))
    return Target(a_log.name, a_log.view.cast(dtypes.float32))


def parent(name: str) -> str:
    """The module that a module lies in."""
    return name.rpartition(".")[0]
