"""What the roles of a layer become for rtp-llm: whole weights under the names of class W, not yet cut.

One matrix or norm: `matrices`. Source: rtp-llm's models/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ... import dtypes
from ...computed.finishes import largest
from ...errors import LayoutError
from ...mixers import Attention, DeltaNet, Mla
from ...model import Experts, Layer, Mlp, Model
from ...roles import Linear
from ...views import cat, stack
from ..requirements import (
    require_alike,
    require_heads_alike,
    require_known,
    require_neighbours,
    require_no_scalars,
    two_blocks,
)
from .matrices import (
    Whole,
    beside_name,
    inputs,
    matrix,
    no_bias,
    norm,
    table_of,
    vectors,
    whole_blocks,
    with_one_scale,
)
from .merge import flat, rope_apart, stack_moe_w1, transpose_slice_k, transpose_slice_v
from .split import Cut

_READS_THE_KEY = (
    "; RTP-LLM reads the key since its commit 68a3f843b of 2026-03-09, for models of its class DeepSeekV2: "
    "let such an engine load layout hf"
)


@dataclass(frozen=True, slots=True)
class Making:
    """The choices that shape weights; as the fields of RtpLlm."""

    absorb: bool = True
    w13: bool = True
    split_rope: bool = False
    one_scale: bool = False


def layer_weights(
    layer: Layer, model: Model, cut: Cut, making: Making, experts: Sequence[int]
) -> Iterator[Whole]:
    """A layer's weights; `experts`: which expert each place of a mixture holds.

    Raises LayoutError for a role the engine has no name for."""
    require_known("rtp_llm", layer, vision=True)
    attention, mlp = two_blocks("rtp_llm", layer)
    yield from _norms(layer, model)
    if isinstance(attention, Mla):
        yield from _latent(attention, model.sizes.heads, cut, making)
    elif isinstance(attention, DeltaNet):
        yield from _delta(attention, model, cut)
    else:
        yield from _attention(attention, model, cut, making)
    if isinstance(mlp, Experts):
        yield from _experts(mlp, cut, making, experts)
    else:
        yield from _mlp(mlp, cut, making)
    if layer.vision is not None:
        yield from _attention(layer.vision.attention, model, cut, making, "vision_")
        yield from _mlp(layer.vision.mlp, cut, replace(making, w13=False), "vision_")


def of_w13(layer: Layer) -> bool:
    """Whether `w13` decides how a block of it is stored."""
    mlp = layer.mlp.shared if isinstance(layer.mlp, Experts) else layer.mlp
    return mlp is not None and len(mlp_matrices(mlp, Making())) == 2 and mlp.gate is not None


def of_one_scale(layer: Layer) -> bool:
    """Whether `one_scale` requantises any of it: q, k and v, or its experts."""
    qkv = [layer.attention.q] if isinstance(layer.attention, Attention) else []
    experts = [layer.mlp.experts[0].up] if isinstance(layer.mlp, Experts) else []
    return any(table_of(x) == "fp8_tensor" for x in (*qkv, *experts))


def _norms(layer: Layer, model: Model) -> Iterator[Whole]:
    """Norms before the blocks (side by side in a parallel layer), or after their sums as BERT has them."""
    before, after = layer.attention_norm, layer.attention_after
    if before is None and model.norm is None:
        yield from norm("post_ln", after)
        yield from norm("post_ln_2", layer.mlp_norm)
        yield from norm("post_ffn_ln", layer.mlp_after)
        return
    for extra in (after, layer.mlp_after):
        if extra is not None:
            raise LayoutError(f"layout rtp_llm has no place for {extra.name}")
    if before is None:
        raise LayoutError(f"layout rtp_llm wants a norm before the attention of {layer.name}")
    both = model.parallel and layer.mlp_norm is not None
    yield from norm("pre_attn_ln" if both else "pre_ln", before)
    yield from norm("pre_ln" if both else "post_ln", layer.mlp_norm)


# ---- attention ----


def _attention(attention: Attention, model: Model, cut: Cut, making: Making, of: str = "") -> Iterator[Whole]:
    if attention.sinks is not None:
        raise LayoutError(
            f"layout rtp_llm has no place for the attention of {attention.o.name} ({model.family})"
        )
    if not model.alibi:  # Jina's BERT, whose norms of all heads the engine has
        require_heads_alike("rtp_llm", attention)
    qkv = [attention.q, attention.k, attention.v]
    for one in qkv:
        _whole_heads(one, cut)
    yield from matrix(f"{of}attn_qkv_", qkv, (None, 1), one_scale=making.one_scale)
    yield from matrix(f"{of}attn_o_", [attention.o], (1, cut.place.tp))
    if attention.gate is not None:
        _require_plain_or_fp8("an output gate", attention.gate)
        yield from matrix("attn_gate_", [attention.gate], (0, cut.place.tp))
    yield from norm("q_ln", attention.q_norm)
    yield from norm("k_ln", attention.k_norm)


def _whole_heads(linear: Linear, cut: Cut) -> None:
    """Raises LayoutError where heads of packed values do not begin with an int32."""
    for unit in (linear.packed[0], *(b.unit[0] for b in linear.beside if linear.packed != (1, 1))):
        if unit > 1 and cut.head_dim % unit:
            raise LayoutError(
                f"layout rtp_llm: heads of {cut.head_dim} of {linear.name} do not begin with one of its "
                f"{unit} packed values"
            )


def _latent(attention: Mla, heads: int, cut: Cut, making: Making) -> Iterator[Whole]:
    require_neighbours("rtp_llm", attention, _READS_THE_KEY)
    if attention.indexer is not None:
        raise LayoutError(f"layout rtp_llm has no place for {attention.indexer.q.name}, an indexer")
    no_bias(attention.q, attention.kv_a, attention.kv_b, attention.q_a)
    q, kv_a, kv_b, o = attention.q, attention.kv_a, attention.kv_b, attention.o
    for linear in filter(None, (q, kv_a, kv_b, o, attention.q_a)):
        if linear.packed != (1, 1) or table_of(linear) not in ("default", "fp8_block"):
            raise LayoutError(
                f"layout rtp_llm: latent attention's {linear.name} is neither plain nor fp8 by blocks"
            )
    tp, rank = cut.place.tp, kv_b.shape[1]
    value = o.shape[1] // heads
    nope, rope = kv_b.shape[0] // heads - value, kv_a.shape[0] - rank
    if making.split_rope:
        q, kv_a = _rope_apart(q, nope, rope), _rope_apart(kv_a, rank, rope)
    if attention.q_a is None:
        if q.beside or kv_a.beside:
            raise LayoutError(f"layout rtp_llm has no place for the scales of {q.name}")
        yield Whole("mla_fusedqkrope_no_lora_w", cat([q.weight, kv_a.weight]).T)
    else:
        yield from matrix("mla_fusedqkrope_", [attention.q_a, kv_a], (None, 1))
        yield from norm("mla_q_a_ln", attention.q_norm)
        yield from matrix("mla_q_b_", [q], (0, tp))
    yield from norm("mla_kv_a_ln", attention.kv_norm)
    yield from matrix("mla_kv_b_", [kv_b], (0, tp))
    if making.absorb:
        yield from _absorbing(kv_b, nope, value)
    yield from matrix("attn_o_", [o], (1, tp))


def _delta(net: DeltaNet, model: Model, cut: Cut) -> Iterator[Whole]:
    """(q | k | v | z) and (b | a), of all heads; the kernels stay [rows, 1, kernel]."""
    qkvz = [net.q, net.k, net.v, net.z]
    _require_plain_or_fp8("linear attention", *qkvz, net.o)
    no_bias(net.b, net.a)
    for linear in (net.b, net.a):
        if linear.beside:
            raise LayoutError(f"layout rtp_llm has no place for {linear.name}.{linear.beside[0].leaf}")
    for linear in qkvz:
        whole_blocks(linear, 0, cut.place.tp, followed=True)
    yield from matrix("linear_attn_qkvz_", qkvz, (None, 1))
    yield from matrix("linear_attn_ba_", [net.b, net.a], (None, 1))
    yield Whole("linear_attn_conv1d_w", cat([x.view for x in net.conv]))
    yield Whole("linear_attn_alog", net.a_log.view.cast(model.embedding.weight.dtype))
    yield Whole("linear_attn_dt_b", net.dt_bias.view)
    yield Whole("linear_attn_norm_w", net.norm.weight)
    yield from matrix("linear_attn_out_", [net.o], (1, cut.place.tp))


def _require_plain_or_fp8(of: str, *linears: Linear) -> None:
    """Raises LayoutError for a form in which the engine does not have these matrices."""
    no_bias(*linears)
    for linear in linears:
        if table_of(linear) not in ("default", "fp8_block", "fp8_channel") or linear.packed != (1, 1):
            raise LayoutError(
                f"layout rtp_llm has no place for {of} like {linear.name}: wanted plain matrices, or fp8 by "
                "blocks or by output"
            )


def _absorbing(kv_b: Linear, nope: int, value: int) -> Iterator[Whole]:
    """kc and vc; of an fp8 matrix with the factors of their blocks, where heads end with blocks."""
    yield Whole("mla_kc", transpose_slice_k(kv_b.weight, nope, value))
    yield Whole("mla_vc", transpose_slice_v(kv_b.weight, nope, value))
    for b in kv_b.beside:
        if nope % b.unit[0] or value % b.unit[0]:
            raise LayoutError(
                f"layout rtp_llm: kc and vc of {kv_b.name}, heads of {nope} and {value}, do not end with "
                f"blocks of {b.unit[0]}; absorb=False (-L absorb=false) writes kv_b alone"
            )
        units = nope // b.unit[0], value // b.unit[0]
        yield Whole("mla_kc_s", transpose_slice_k(b.view, *units))
        yield Whole("mla_vc_s", transpose_slice_v(b.view, *units))


def _rope_apart(linear: Linear, before: int, rope: int) -> Linear:
    if linear.beside:
        raise LayoutError(f"layout rtp_llm: split_rope would tear the blocks of {linear.name}")
    return Linear(linear.name, rope_apart(linear.weight, before, rope))


# ---- feed-forward blocks ----


def mlp_matrices(mlp: Mlp, making: Making) -> list[tuple[str, list[Linear]]]:
    """What stands behind W's names of a block's matrices, and which they are: gate (w1), up (w3), or both as
    w13, and down (w2); a block without a gate has w3 and w2, one whose hub stores up first (Jina's BERT) w1
    and w3."""
    if mlp.gate is None:
        first = [("3", [mlp.up])]
    elif making.w13 and not mlp.up_first:
        first = [("13", [mlp.gate, mlp.up])]
    else:
        first = [("1", [mlp.gate]), ("3", [mlp.up])]
    return [*first, ("2", [mlp.down])]


def _mlp(mlp: Mlp, cut: Cut, making: Making, of: str = "") -> Iterator[Whole]:
    """`of`: what stands before W's names."""
    require_no_scalars("rtp_llm", mlp)
    ranks = cut.ffn_tp[1]
    for end, linears in mlp_matrices(mlp, making):
        if len(linears) > 1:
            whole_blocks(linears[0], 0, ranks)
        axis = 1 if end == "2" else None if len(linears) > 1 else 0
        yield from matrix(f"{of}ffn_", linears, (axis, ranks), end)


def _experts(moe: Experts, cut: Cut, making: Making, order: Sequence[int]) -> Iterator[Whole]:
    no_bias(moe.router)
    yield Whole("moe_gate", moe.router.weight.T)
    if moe.correction is not None:
        yield Whole("e_score_correction_b", moe.correction.view)
    mlps = [moe.experts[e] for e in range(len(moe.experts))]
    for mlp in mlps:
        if mlp.gate is None:
            raise LayoutError(f"layout rtp_llm has no place for {mlp.up.name}, an expert without a gate")
    ups, gates = [mlps[e].up for e in order], [g for e in order if (g := mlps[e].gate) is not None]
    yield from _stacks("1", [*ups, *gates], 0, cut, making)
    yield from _stacks("2", [mlps[e].down for e in order], 1, cut, making)
    if moe.shared is not None:
        yield from _mlp(moe.shared, cut, making)
    if moe.shared_gate is not None:
        no_bias(moe.shared_gate)
        yield Whole("shared_expert_gate", moe.shared_gate.weight.T)


def _stacks(end: str, linears: Sequence[Linear], axis: int, cut: Cut, making: Making) -> Iterator[Whole]:
    """Experts' matrices as a stack, always [experts, out, in]; of w1 all up matrices, then all gates."""
    first, table = linears[0], table_of(linears[0])
    require_alike("rtp_llm", first.name, linears)
    no_bias(*linears)
    if first.leaf == "weight_packed":
        _require_int4(first, cut)
    for linear in linears:
        whole_blocks(linear, axis, cut.moe_tp[1], followed=end == "1")
    make = stack_moe_w1 if end == "1" else stack
    one_scale = making.one_scale and table == "fp8_tensor"
    if one_scale and end == "1":
        half = len(linears) // 2
        pairs = zip(linears[:half], linears[half:], strict=True)
        yield Whole("moe_w1", stack([with_one_scale(pair) for pair in pairs]), table)
    else:
        yield Whole(f"moe_w{end}", make([x.weight for x in linears]), table)
    for k, b in enumerate(first.beside):
        if table == "fp8_tensor" and b.leaf in ("weight_scale", "input_scale"):
            yield from _expert_scalars(end, linears, b.leaf, one_scale=one_scale)
        elif name := beside_name("moe_", end, first, b):
            views = [x.beside[k].view for x in linears]
            if b.leaf == "weight_scale" and table == "default":
                views = [v.cast(dtypes.bfloat16) for v in views]
            if table == "int8":
                views = [v.reshape((v.numel,)) for v in views]
            yield Whole(name, make(views), table)


def _require_int4(linear: Linear, cut: Cut) -> None:
    """Raises LayoutError for an expert of compressed-tensors that the engine does not read: it takes four
    bits by groups, and repacks an expert for its kernel before it would cut it."""
    scales = linear.part("weight_scale")
    if linear.packed != (1, 8) or scales is None or not scales.unit[1]:
        raise LayoutError(f"layout rtp_llm: {linear.name}: wanted four bits by groups, as the engine reads")
    if cut.moe_tp[1] > 1:
        raise LayoutError(
            f"layout rtp_llm: {linear.name}: the engine repacks whole experts of compressed-tensors, so "
            f"{cut.moe_tp[1]} ranks do not cut one: wanted ep = tp * dp, or use_stack_weight=False "
            "(-L use_stack_weight=false)"
        )


def _expert_scalars(end: str, linears: Sequence[Linear], leaf: str, *, one_scale: bool) -> Iterator[Whole]:
    """One number a matrix: [experts, (up, gate)] for w1, [experts] for w2. With one scale the larger one of
    up and gate [experts], and of inputs the largest of all of the rank's experts."""
    name, scales = f"{linears[0].name}.{leaf}", vectors(linears, leaf)
    view = stack_moe_w1(scales) if end == "1" else flat(scales)
    if leaf != "input_scale":
        pairs = partial(largest, name) if one_scale and end == "1" else None
        yield Whole(f"moe_s{end}", view, "fp8_tensor", finish=pairs)
        return
    yield from inputs(f"moe_{end}", scales, view, "fp8_tensor", name, one_scale=one_scale)
