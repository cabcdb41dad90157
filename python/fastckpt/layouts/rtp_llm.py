"""`rtp_llm`: rtp-llm's weights of one rank after its loader, the form its own dump has.

Each weight is made whole by its process function (`rtp_merge`), then cut by the strategy that the engine's
table has for it (`rtp_weights`, `rtp_split`). Matrices are [in, out]: q, k and v one kernel [hidden, (q | k |
v)], gate and up one [hidden, (gate | up)]; experts are [experts, (up; gate), hidden], up before gate, and
[experts, hidden, width]. The embedding is cut along hidden, lm_head padded to 8 * tp rows, then cut. fp8
matrices with factors of 128 x 128 blocks stay [out, in], as the engine's kernels for them want.
Source: rtp-llm's utils/model_weight.py (class W) and models/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from .. import dtypes
from ..errors import LayoutError
from ..model import Attention, Experts, Layer, Linear, Mla, Mlp, Model, Norm
from ..placement import Placement
from ..target import Target
from ..views import View
from .cuts import joined, require_even, require_heads, require_kv_heads
from .naming import Naming
from .rtp_merge import concat_t, stack_moe_w1, stacked, transpose, transpose_slice_k, transpose_slice_v
from .rtp_split import SPLITS, Cut
from .rtp_weights import NAMES, TABLES

Weights = Iterator[tuple[str, View]]
"""Whole weights by the names of class W."""


@dataclass(frozen=True, slots=True)
class RtpLlm:
    """Decoders with gated feed-forward blocks and norms without bias. `absorb`: latent attention gets the
    matrices kc and vc that absorb a key or a value, beside kv_b."""

    absorb: bool = True
    roles: ClassVar[Literal[True]] = True

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """The rank's tensors; a tied lm_head is written from the embedding, as the engine wants both.

        Every group of tp ranks cuts attention and dense blocks; experts are shared out to ep parts, each of
        whose tp * dp / ep ranks cut their widths. Raises LayoutError, before the first target, where heads, a
        feed-forward width or hidden do not divide, where kv heads neither divide nor repeat evenly, for pp,
        and for an ep that the ranks or the experts do not divide by; and for a role this layout has no name
        for."""
        _require(model, placement)
        return self._targets(model, placement)

    def naming(self, placement: Placement) -> Naming:
        """The names of the engine's dump, parts counted from 0."""
        stem = f"model-{placement.tp_rank:02d}-{placement.dp_rank:02d}-part-"
        return Naming("", f"{stem}00000.safetensors", stem + "{part:05d}.safetensors")

    def _targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        sizes = model.sizes
        cut = Cut(placement, sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.hidden)
        key = f"rank_{placement.tp_rank:02d}_{placement.dp_rank:02d}_{cut.experts[0]:02d}"
        yield _target(f"{key}.global", "embedding", model.embedding.weight, cut)
        for i, layer in enumerate(model.layers):
            blocks = _has_blocks(layer)
            for name, view in self._layer(layer, model, cut):
                by_head = _latent_cut(layer, cut) if name == "mla_fusedqkrope_no_lora_w" else cut
                yield _target(f"{key}.layers.{i}", name, view, by_head, "fp8_block" if blocks else "default")
        yield _target(f"{key}.global", "final_ln_gamma", _gamma(model.norm, "final_layernorm"), cut)
        yield _target(f"{key}.global", "lm_head", model.lm_head.weight, cut)

    def _layer(self, layer: Layer, model: Model, cut: Cut) -> Weights:
        for extra in (layer.attention_after, layer.mlp_after, layer.cross_norm):
            if extra is not None:
                raise LayoutError(f"layout rtp_llm has no place for {extra.name}")
        yield "pre_ln_gamma", _gamma(layer.attention_norm, layer.name)
        if isinstance(layer.attention, Mla):
            yield from self._latent(layer.attention, model, cut.place.tp)
        else:
            yield from _attention(layer.attention, model, cut.place.tp)
        yield "post_ln_gamma", _gamma(layer.mlp_norm, layer.name)
        if isinstance(layer.mlp, Experts):
            yield from _experts(layer.mlp, cut)
        else:
            yield from _mlp(layer.mlp, cut.place.tp)

    def _latent(self, attention: Mla, model: Model, tp: int) -> Weights:
        _no_bias(attention.q, attention.kv_a, attention.kv_b, attention.q_a)
        heads, blocks = model.sizes.heads, attention.o.scale is not None
        if attention.q_a is None:
            if blocks:
                raise LayoutError(f"layout rtp_llm has no place for the factors of {attention.q.name}")
            yield "mla_fusedqkrope_no_lora_w", concat_t([attention.q.weight, attention.kv_a.weight])
        else:
            low = joined(attention.q_a.name, [attention.q_a, attention.kv_a])
            yield from _matrix("mla_fusedqkrope", low, tp, axis=None)
            yield "mla_q_a_ln_gamma", _gamma(attention.q_norm, attention.q.name)
            yield from _matrix("mla_q_b", attention.q, tp, axis=0)
        yield "mla_kv_a_ln_gamma", _gamma(attention.kv_norm, attention.kv_a.name)
        yield from _matrix("mla_kv_b", attention.kv_b, tp, axis=0)
        if self.absorb:
            if blocks:
                raise LayoutError(
                    f"layout rtp_llm: kc and vc of {attention.kv_b.name} would have to be dequantised, which "
                    "is not done; absorb=false writes kv_b alone"
                )
            value = attention.o.weight.shape[1] // heads
            nope = attention.kv_b.weight.shape[0] // heads - value
            yield "mla_kc", transpose_slice_k([attention.kv_b.weight], nope, value)
            yield "mla_vc", transpose_slice_v([attention.kv_b.weight], nope, value)
        yield from _matrix("attn_o", attention.o, tp, axis=1)


def _require(model: Model, placement: Placement) -> None:
    """Raises LayoutError for what cannot be cut or has no place, from sizes and names alone."""
    sizes, ranks = model.sizes, placement.tp * placement.dp
    if placement.pp != 1:
        raise LayoutError(f"layout rtp_llm does not cut by pp yet: wanted pp 1, got {placement.pp}")
    if ranks % placement.ep:
        raise LayoutError(f"layout rtp_llm: tp * dp {ranks} does not divide by ep {placement.ep}")
    if placement.ep > 1 and (not sizes.experts or sizes.experts % placement.ep):
        raise LayoutError(f"layout rtp_llm: {sizes.experts} experts do not divide by ep {placement.ep}")
    if placement.dp > 1 and placement.ep == 1 and sizes.experts:
        raise LayoutError(
            f"layout rtp_llm: with dp {placement.dp} experts are shared out by ep, got ep 1: the engine's "
            "versions differ in who holds what"
        )
    require_heads("rtp_llm", placement, sizes)
    for key, width in sizes.widths.items():
        if key == sizes.expert_width and placement.ep > 1:
            cutting = ranks // placement.ep
            if width % cutting:
                raise LayoutError(f"layout rtp_llm: {key} {width} does not divide by tp * dp / ep {cutting}")
        else:
            require_even("rtp_llm", placement, key, width)
    require_kv_heads("rtp_llm", placement, sizes)
    require_even("rtp_llm", placement, "hidden_size", sizes.hidden)
    if model.encoder is not None:
        raise LayoutError(f"layout rtp_llm has no place for the encoder of {model.family}")
    if model.lm_head.bias is not None:
        raise LayoutError(f"layout rtp_llm has no place for the bias of {model.lm_head.name}")
    for extra in (model.positions, model.embedding_norm, *model.carried):
        if extra is not None:
            raise LayoutError(f"layout rtp_llm has no place for {extra.name} of {model.family}")


def _target(at: str, name: str, view: View, cut: Cut, table: str = "default") -> Target:
    """One rank's part. At one rank the engine's loader cuts nothing, and so pads nothing; its lm_head knows
    tp alone."""
    grid = cut.place
    if grid.tp > 1 or (name != "lm_head" and (grid.dp, grid.ep) != (1, 1)):
        view = SPLITS[TABLES[table][name]].view(view, cut)
    return Target(f"{at}.{NAMES[name]}", view)


def _has_blocks(layer: Layer) -> bool:
    """Whether the layer's matrices are fp8 with block factors."""
    return layer.attention.o.scale is not None


def _latent_cut(layer: Layer, cut: Cut) -> Cut:
    """The cut of latent attention's queries, whose heads are wider than its values'."""
    rows = layer.attention.q.weight.shape[0]
    return Cut(cut.place, cut.heads, cut.kv_heads, rows // cut.heads, cut.hidden)


def _attention(attention: Attention, model: Model, tp: int) -> Weights:
    if attention.sinks is not None or attention.relative is not None:
        raise LayoutError(
            f"layout rtp_llm has no place for the attention of {attention.o.name} ({model.family})"
        )
    qkv = joined(attention.q.name, [attention.q, attention.k, attention.v])
    yield from _matrix("attn_qkv", qkv, tp, axis=None)  # its strategy checks heads against blocks
    yield from _matrix("attn_o", attention.o, tp, axis=1)
    for name, role in (("q_ln_gamma", attention.q_norm), ("k_ln_gamma", attention.k_norm)):
        if role is not None:
            yield name, _gamma(role, role.name)


def _mlp(mlp: Mlp, tp: int) -> Weights:
    gate = _gate(mlp)
    _whole_blocks(gate, 0, tp)
    yield from _matrix("ffn_", joined(gate.name, [gate, mlp.up]), tp, axis=None, suffix="13")
    yield from _matrix("ffn_", mlp.down, tp, axis=1, suffix="2")


def _experts(moe: Experts, cut: Cut) -> Weights:
    if moe.stacks is not None:
        raise LayoutError(f"layout rtp_llm has no place for what {moe.name} has beside experts' matrices")
    _no_bias(moe.router)
    yield "moe_gate", transpose([moe.router.weight])
    if moe.correction is not None:
        yield "e_score_correction_b", moe.correction.view.cast(dtypes.float32)
    ups, gates = [e.up for e in moe.experts], [_gate(e) for e in moe.experts]
    downs = [e.down for e in moe.experts]
    _no_bias(*ups, *gates, *downs)
    yield "moe_w1", stack_moe_w1([x.weight for x in (*ups, *gates)])
    yield "moe_w2", stacked([x.weight for x in downs])
    factors = [[x.scale for x in some if x.scale is not None] for some in ((*ups, *gates), downs)]
    if factors[0] or factors[1]:
        for axis, some in ((0, (*ups, *gates)), (1, downs)):
            for linear in some:
                _whole_blocks(linear, axis, cut.moe_tp[1])
        yield "moe_s1", stack_moe_w1(factors[0])
        yield "moe_s2", stacked(factors[1])
    if moe.shared is not None:
        yield from _mlp(moe.shared, cut.place.tp)
    if moe.shared_gate is not None:
        _no_bias(moe.shared_gate)
        yield "shared_expert_gate", transpose([moe.shared_gate.weight])


def _matrix(name: str, linear: Linear, tp: int, *, axis: int | None, suffix: str = "") -> Weights:
    """A matrix, its bias and its block factors as `{name}_w`, `_b` and `_s`; with a `suffix` as
    `{name}w{suffix}` and so on. `axis`: which one tp cuts, of [out, in]; factors must follow it."""
    stem, end = (name, suffix) if suffix else (f"{name}_", "")
    if linear.scale is None:
        yield f"{stem}w{end}", transpose([linear.weight])
    else:
        _whole_blocks(linear, axis or 0, tp if axis is not None else 1)
        yield f"{stem}w{end}", linear.weight
        yield f"{stem}s{end}", linear.scale
    if linear.bias is not None:
        yield f"{stem}b{end}", linear.bias


def _whole_blocks(linear: Linear, axis: int, tp: int) -> None:
    """Raises LayoutError where tp cuts a block that shares a factor, or blocks are not of 128 x 128."""
    size = linear.weight.shape[axis]
    if linear.scale is not None and linear.block != (128, 128):
        raise LayoutError(f"layout rtp_llm wants blocks of 128 x 128, {linear.name} has {linear.block}")
    if linear.scale is not None and tp > 1 and size % (linear.block[axis] * tp):
        raise LayoutError(
            f"layout rtp_llm: {linear.name} has {size} on axis {axis}, which tp {tp} does not cut into whole "
            f"blocks of {linear.block[axis]}"
        )


def _no_bias(*linears: Linear | None) -> None:
    for linear in linears:
        if linear is not None and linear.bias is not None:
            raise LayoutError(f"layout rtp_llm has no place for {linear.name}.bias")


def _gamma(role: Norm | None, where: str) -> View:
    if role is None:
        raise LayoutError(f"layout rtp_llm wants a norm in {where}, and there is none")
    if role.bias is not None:
        raise LayoutError(f"layout rtp_llm has no place for {role.name}.bias")
    if role.plus_one:
        raise LayoutError(f"layout rtp_llm wants 1 + {role.name}.weight, which is not made yet")
    return role.weight


def _gate(mlp: Mlp) -> Linear:
    if mlp.gate is None:
        raise LayoutError(f"layout rtp_llm has no place for {mlp.up.name}, a block without a gate")
    return mlp.gate
