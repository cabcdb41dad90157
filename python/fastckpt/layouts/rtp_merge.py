"""rtp-llm's process functions as views: what its loader makes of a weight's sources before it is cut.

Each function takes the sources in the reference's order and gives the tensor that its namesake gives, without
moving an element; what takes arithmetic is computed when it is read (`finishes`). MERGES lists all of them by
the reference's names, and says where we differ and why; the layout uses those that some family needs. Sources
are [out, in]; H hidden, D head dim, N (Nq, Nk) heads, I width, E experts, R low rank.
Source: rtp-llm's utils/model_weight.py and model_loader/ (2025's and 2026's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import dtypes
from ..computed.finishes import largest, multiple, plus_one, reciprocal, requantised
from ..dtypes import DType
from ..errors import LayoutError
from ..stored import constant
from ..views import View, cat, stack
from ..views import zeros as zero_view

Views = Sequence[View]


# ---- one source ----


def identity(views: Views) -> View:
    """The one source as it is."""
    if len(views) != 1:
        raise LayoutError(f"identity: wanted one source, got {len(views)}")
    return views[0]


def transpose(views: Views) -> View:
    """[out, in] -> [in, out]."""
    return identity(views).T


def shift_one(views: Views) -> View:
    """x + 1, made when it is read."""
    return plus_one(identity(views))


def flat(views: Views) -> View:
    """The sources' elements one after another, as a vector."""
    return cat([v.reshape((v.numel,)) for v in views])


def multiplied(views: Views, factor: float) -> View:
    """x * factor, made when it is read."""
    view = identity(views)
    return multiple("multipy_identity", view, factor).cast(view.dtype)


def reciprocals(views: Views, name: str = "a scale") -> View:
    """1 / x of the sources' elements one after another, as a float32 vector made when it is read."""
    return reciprocal(name, flat(views))


def max_scalar(views: Views, name: str = "a scale") -> View:
    """The largest element of all sources; a single source is left as it is."""
    if len(views) == 1:
        return views[0]
    row = flat(views)
    return largest(name, row.reshape((1, row.numel))).reshape(()).cast(row.dtype)


def half(views: Views, inter: int, index: int) -> View:
    """Rows [0, inter) for `index` 0, the rows from `inter` on for 1."""
    view = identity(views)
    return view.narrow(0, 0, inter) if index == 0 else view.narrow(0, inter, view.shape[0] - inter)


def half_t(views: Views, inter: int, index: int) -> View:
    """The transpose of `half`."""
    return half(views, inter, index).T


def run_t(views: Views, index: int, inter: int) -> View:
    """The transpose of rows [index * inter, (index + 1) * inter) (slice_index_transepose)."""
    return identity(views).narrow(0, index * inter, inter).T


def concat_fp8(views: Views) -> View:
    """The sources along axis 0, then `fp8_view` (qkv_concat_fp8)."""
    return fp8_view([cat(views)])


def pad_size(n: int, align: int) -> int:
    """How much `n` lacks to a multiple of `align`; 0 for `align` 0."""
    return -n % align if align else 0


def pad(views: Views, align: int, axis: int) -> View:
    """Zeros behind `axis` up to a multiple of `align` (0: none)."""
    view = identity(views)
    return view.pad(axis, 0, pad_size(view.shape[axis], align))


def transpose_pad(views: Views, align: int, axis: int) -> View:
    """The transpose of `pad`."""
    return pad(views, align, axis).T


def fp8_view(views: Views) -> View:
    """[m, n] -> [n, m] with the elements in the order they lie."""
    m, n = identity(views).shape
    return views[0].reshape((n, m))


def qkv_transpose(views: Views, hidden: int) -> View:
    """[.., ..] -> [H, ..] with the elements in the order they lie."""
    view = identity(views)
    return view.reshape((hidden, view.numel // hidden))


def split_q_gate(views: Views, heads: int, part: int) -> View:
    """[N * (q, gate) * d, in] -> [N * d, in]: the queries (`part` 0) or the gates (1) of every head."""
    view = identity(views)
    each = view.split(0, view.shape[0] // heads)
    return each.part(1, part, 2).merge(0)


# ---- several sources ----


def concat(views: Views, axis: int) -> View:
    """The sources one after another along `axis`."""
    return cat(views, axis)


def concat_t(views: Views) -> View:
    """The sources' outputs one after another, transposed: [in, out + out + ..]."""
    return cat(views).T


def b_half_merge(views: Views) -> View:
    """Every source's first half of the last axis along axis 0, then every second half."""
    return cat([v.part(-1, k, 2) for k in range(2) for v in views])


def pad_w13(views: Views, align: int, axis: int) -> View:
    """w1 and w3 along `axis`, each with its own zeros: [w1 | 0 | w3 | 0]."""
    return cat([pad([v], align, axis) for v in views], axis)


def merge_block_scale(views: Views) -> View:
    """The block factors of q, k and v along axis 0."""
    if len(views) != 3:
        raise LayoutError(f"merge_block_scale: wanted q, k and v, got {len(views)} sources")
    return cat(views)


def merge_qkv_transpose_concat0(views: Views) -> View:
    """q, k, v [ND, H] -> [3H, ND]."""
    return cat([v.T for v in views])


def merge_fp8(views: Views, name: str = "fp8") -> View:
    """Matrices of fp8, then a scale for each -> their outputs one after another, as values of the largest."""
    matrices, scales = views[: len(views) // 2], views[len(views) // 2 :]
    parts = zip(matrices, scales, strict=True)
    return cat([requantised(name, matrix, scale, scales) for matrix, scale in parts])


def expand_scale(views: Views, hidden: int) -> View:
    """Scalars repeated to vectors of `hidden`, and such vectors, one after another."""
    out = []
    for view in views:
        if view.numel not in (1, hidden):
            raise LayoutError(f"expand_scale: wanted 1 or {hidden} elements, got {view.shape}")
        row = view.reshape((view.numel,))
        out.append(cat([row] * hidden) if view.numel == 1 else row)
    return cat(out)


def select_rows(views: Views, rows: Sequence[int]) -> View:
    """The rows of a table in the order asked for (select_output_vocab_rows)."""
    table = identity(views)
    return cat([table.narrow(0, row, 1) for row in rows])


# ---- fused q, k and v ----


def trans_qkv(views: Views, heads: int, head_dim: int) -> View:
    """[N * (q, k, v) * D, H] -> [H, (q | k | v) of all heads]."""
    view = identity(views)
    return _by_kind(view.reshape((heads, 3, head_dim, view.shape[1]))).T


def trans_qkv_b(views: Views, heads: int) -> View:
    """[N * (q, k, v) * D] -> [(q; k; v) of all heads]."""
    view = identity(views)
    return _by_kind(view.reshape((heads, 3, view.numel // (3 * heads), 1))).reshape((view.numel,))


def trans_lora_qkv(views: Views, heads: int, head_dim: int) -> View:
    """[N * (q, k, v) * D, r] -> [r, 3, ND]."""
    whole = trans_qkv(views, heads, head_dim)
    return whole.split(1, heads * head_dim)


def _by_kind(view: View) -> View:
    """[N, 3, D, H] -> [3 * N * D, H]."""
    return view.permute((1, 0, 2, 3)).merge(0).merge(0)


def qkv_gather(views: Views, heads: int, kv_heads: int) -> View:
    """[Nk * (g q heads, k, v) * D, H] -> [H, q | k | v], g = Nq / Nk; a vector gives [1, ..]."""
    view = identity(views)
    view = view.reshape((view.shape[0], view.numel // view.shape[0]))
    shared = heads // kv_heads
    head_dim = view.shape[0] // (heads + 2 * kv_heads)
    groups = view.split(0, (shared + 2) * head_dim)
    kinds = ((0, shared), (shared, 1), (shared + 1, 1))
    return cat([groups.narrow(1, a * head_dim, n * head_dim).merge(0) for a, n in kinds]).T


def permute(views: Views, heads: int) -> View:
    """[N * D, H] with each head's rows taken apart: even ones first (Llama's own checkpoints)."""
    view = identity(views)
    return q_rope(views, heads, 0, view.shape[0] // heads)


def merge_qkv(views: Views, heads: int, kv_heads: int) -> View:
    """q, k, v of Llama's own checkpoints -> [H, q | k | v], q's and k's heads as `permute` has them."""
    q, k, v = views
    return concat_t([permute([q], heads), permute([k], kv_heads), v])


def reorder_grouped(views: Views, groups: int, parts: Sequence[int]) -> View:
    """Rows grouped per key head, `parts` rows of each kind in a group, to all rows of the first kind, then
    all of the second, .. (reorder_qkvz, reorder_ba: qwen3-next)."""
    grouped = identity(views).split(0, sum(parts))
    if grouped.shape[0] != groups:
        raise LayoutError(f"reorder: {groups} groups of {sum(parts)} rows do not fit {views[0].shape}")
    out, at = [], 0
    for rows in parts:
        out.append(grouped.narrow(1, at, rows).merge(0))
        at += rows
    return cat(out)


# ---- LoRA ----


def merge_qkv_lora_a(views: Sequence[View | None]) -> View:
    """Of q, k and v (or others) [r, H] -> [H, 3r]; a missing one is zeros."""
    there = [v for v in views if v is not None]
    if not there:
        raise LayoutError("merge_qkv_lora_A: wanted one of the sources at least")
    return cat([zero_view(there[0].shape, there[0].dtype) if v is None else v for v in views]).T


def merge_qkv_lora_b(views: Views) -> View:
    """q [NqD, r], k, v [NkD, r] (or others) -> [3r, (Nq + 2Nk)D], block diagonal."""
    rank, width, at, out = views[0].shape[1], sum(v.shape[0] for v in views), 0, []
    for view in views:
        if view.shape[1] != rank:
            raise LayoutError(f"merge_qkv_lora_B: ranks {[v.shape[1] for v in views]} differ")
        out.append(view.T.pad(1, at, width - at - view.shape[0]))
        at += view.shape[0]
    return cat(out)


# ---- experts ----


def stacked(views: Views) -> View:
    """E x [a, b] -> [E, a, b]."""
    return stack(views)


def transpose_stack(views: Views) -> View:
    """E x [a, b] -> [E, b, a]."""
    return stack(views).permute((0, 2, 1))


def stack_pad(views: Views, align: int, axis: int) -> View:
    """E x [a, b] -> [E, a, b] with zeros behind `axis` (1 or 2) up to a multiple of `align`."""
    return pad([stack(views)], align, axis)


def stack_moe_w1(views: Views) -> View:
    """E first and E second [I, H] -> [E, (first; second), H]; the engine's models list up, then gate."""
    return stack_moe_w1_pad(views, 0)


def stack_moe_w1_pad(views: Views, align: int) -> View:
    """As `stack_moe_w1`, each half with its own zeros: rows [first; 0; second; 0]."""
    if len(views) % 2:
        raise LayoutError(f"stack_moe_w1: {len(views)} sources are not two lists of one length")
    half = len(views) // 2
    return cat([stack_pad(views[:half], align, 1), stack_pad(views[half:], align, 1)], 1)


def max_of_pairs(views: Views, name: str = "a scale") -> View:
    """E first and E second scalars -> [E], the larger of each pair (stack_moe_w1_s2)."""
    pairs = stack_moe_w1([v.reshape((1,)) for v in views])
    return largest(name, pairs).cast(pairs.dtype)


def stack_swapped(views: Views) -> View:
    """E x [gate; up] -> [E, (up; gate), H] (transpose_stack_moe_w1)."""
    return _swapped(stack(views))


def swapped(views: Views) -> View:
    """[E, (gate; up), H] -> [E, (up; gate), H] (transpose_gate_up)."""
    return _swapped(identity(views))


def convert_gate_up_proj(views: Views) -> View:
    """[E, H, (gate | up)] -> [E, (up; gate), H]."""
    return _swapped(identity(views).permute((0, 2, 1)))


def convert_down_proj(views: Views) -> View:
    """[E, I, H] -> [E, H, I]."""
    return identity(views).permute((0, 2, 1))


def _swapped(pairs: View) -> View:
    return cat([pairs.part(1, 1, 2), pairs.part(1, 0, 2)], 1)


# ---- latent attention ----


def kv_split(views: Views, nope: int, value: int, index: int) -> View:
    """kv_b [N(dn + dv), R] -> the keys [N * dn, R] for `index` 0, the values [N * dv, R] for 1."""
    return _kv_heads(views, nope, value, index).merge(0)


def kv_split_t(views: Views, nope: int, value: int, index: int) -> View:
    """The transpose of `kv_split`."""
    return kv_split(views, nope, value, index).T


def transpose_slice_k(views: Views, nope: int, value: int) -> View:
    """kv_b [N(dn + dv), R] -> [N, dn, R]: what absorbs a key."""
    return _kv_heads(views, nope, value, 0)


def transpose_slice_v(views: Views, nope: int, value: int) -> View:
    """kv_b [N(dn + dv), R] -> [N, R, dv]: what absorbs a value."""
    return _kv_heads(views, nope, value, 1).permute((0, 2, 1))


def _kv_heads(views: Views, nope: int, value: int, index: int) -> View:
    heads = identity(views).split(0, nope + value)
    return heads.narrow(1, 0, nope) if index == 0 else heads.narrow(1, nope, value)


def mla_pad(views: Views, heads: int, nope: int, rope: int) -> View:
    """[.., N * dn] -> [.., N * (dn + dr)], zeros behind each head."""
    each = identity(views).reshape((views[0].numel // (heads * nope), heads, nope))
    return each.pad(2, 0, rope).merge(1)


def mla_pad_t(views: Views, heads: int, nope: int, rope: int) -> View:
    """The transpose of `mla_pad`."""
    return mla_pad(views, heads, nope, rope).T


def mla_pad_scale(views: Views, heads: int, nope: int, rope: int, group: int) -> View:
    """[.., N * dn / group] -> [.., N * (dn + dr) / group], all zeros at the end."""
    width = heads * nope // group
    rows = identity(views).reshape((views[0].numel // width, width))
    return rows.pad(1, 0, heads * rope // group)


def q_rope(views: Views, heads: int, nope: int, rope: int) -> View:
    """q [N * (dn + dr), ..] with each head's rope rows taken apart: even ones first (transpose_q_rope)."""
    each = identity(views).split(0, nope + rope)
    pairs = each.narrow(1, nope, rope).split(1, 2).permute((0, 2, 1, 3)).merge(1)
    if each.shape[0] != heads:
        raise LayoutError(f"transpose_q_rope: {heads} heads of {nope + rope} do not fit {views[0].shape}")
    return cat([each.narrow(1, 0, nope), pairs], 1).merge(0)


def kv_rope(views: Views, rank: int, rope: int) -> View:
    """kv_a [R + dr, ..] with its rope rows taken apart: even ones first (transpose_kv_rope)."""
    view = identity(views)
    pairs = view.narrow(0, rank, rope).split(0, 2).permute((1, 0, 2)).merge(0)
    return cat([view.narrow(0, 0, rank), pairs])


# ---- constants ----


def zeros(shape: Sequence[int], dtype: DType) -> View:
    """Zeros."""
    return zero_view(shape, dtype)


def ones(shape: Sequence[int], dtype: DType) -> View:
    """Ones of float32, cast."""
    return constant(np.ones(shape, np.float32), dtypes.float32).cast(dtype)


def slopes(heads: int) -> View:
    """ALiBi's slopes [N], float32: powers of 2^(-8 / n) for the power of two n up to N, then every second one
    of twice n. Source: the ALiBi paper's get_slopes."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]

    n = 1 << (heads.bit_length() - 1)
    made = powers(n) + powers(2 * n)[::2][: heads - n]
    return constant(np.array(made, np.float32), dtypes.float32)


@dataclass(frozen=True, slots=True)
class Merge:
    """A row of the catalogue: `view` makes what a process function makes; `differs`: where ours differs from
    the reference, and why (or why there is no view)."""

    view: Callable[..., View] | None
    differs: str = ""


_ROUNDED = "rounded once, after the sum; the reference rounds to the served dtype before it too"
_QUANTISES = "quantises: quant schemes do, not a layout"
_KERNEL = "kernel format, made by the engine after loading"
_FLOAT32 = "divided in float32, to which the reference's loader casts the source; 0 is refused"
_NO_RUN = "does not run: torch.max along an axis gives a pair; "
_DENSE = "dequantises: that is `--quant none` before a layout; the layout has the blocks' factors beside"
_PADS = "zeros have the tensor's dtype, the reference's are fp16"
_DTYPE = "of the dtype asked for, the reference's is fp16 until the loader casts it"

MERGES: Mapping[str, Merge] = {
    "identity": Merge(identity, "a missing tensor is refused, never None"),
    "transpose": Merge(transpose),
    "multipy_identity": Merge(multiplied),
    "multipy_identitys": Merge(None, "a name that nothing calls in the versions read"),
    "shift_one": Merge(shift_one, _ROUNDED),
    "plus_one": Merge(shift_one, _ROUNDED),
    "div": Merge(reciprocals, _FLOAT32 + "; a vector"),
    "get_tensor_reciprocal": Merge(reciprocals, _FLOAT32),
    "get_tensor_from_scalar": Merge(flat),
    "get_list_tensor_reciprocal": Merge(reciprocals, _FLOAT32),
    "get_list_tensor_from_scalar": Merge(flat, "the list of sources is left as it is"),
    "max_scalar": Merge(max_scalar),
    "zeros": Merge(zeros, _DTYPE),
    "ones": Merge(ones, _DTYPE),
    "w_half1": Merge(half),
    "w_half2": Merge(half),
    "w_half1_t": Merge(half_t),
    "w_half2_t": Merge(half_t),
    "concat_0": Merge(concat),
    "concat_1": Merge(concat),
    "concat_0_tranpose": Merge(concat_t),
    "b_half_merge": Merge(b_half_merge),
    "pad": Merge(pad, "pads any number of axes"),
    "transpose_pad": Merge(transpose_pad),
    "pad_w13": Merge(pad_w13),
    "transpose_w13": Merge(concat_t),
    "transpose_w13_2": Merge(merge_qkv_transpose_concat0),
    "concat_w13": Merge(concat),
    "concat_w13_2": Merge(concat),
    "w13": Merge(concat_t),
    "merge_qkv_hf": Merge(concat_t),
    "merge_qkv_b": Merge(concat),
    "merge_te_qkv": Merge(concat),
    "merge_qkv_transpose_concat0": Merge(merge_qkv_transpose_concat0),
    "merge_block_scale": Merge(merge_block_scale),
    "trans_qkv": Merge(trans_qkv, "the head size is always given: H // N is wrong where H != N * D"),
    "trans_qkv_b": Merge(trans_qkv_b, "the head size is the vector's, not H // N"),
    "qkv_gather": Merge(qkv_gather),
    "qkv_transpose": Merge(qkv_transpose),
    "trans_lora_qkv": Merge(trans_lora_qkv),
    "merge_qkv_lora_A": Merge(merge_qkv_lora_a, "a missing source's zeros have the others' dtype, not fp32"),
    "merge_qkv_lora_B": Merge(merge_qkv_lora_b),
    "expand_scale": Merge(expand_scale),
    "stack_": Merge(stacked),
    "stack_0": Merge(stacked),
    "transpose_stack": Merge(transpose_stack),
    "stack_pad": Merge(stack_pad, _PADS + "; align 0 pads nothing, the reference raises"),
    "stack_moe_w1": Merge(stack_moe_w1),
    "stack_moe_w1_pad": Merge(stack_moe_w1_pad, _PADS),
    "stack_moe_w1_s2": Merge(max_of_pairs),
    "transpose_stack_moe_w1": Merge(stack_swapped),
    "convert_gate_up_proj_": Merge(convert_gate_up_proj),
    "convert_down_proj_": Merge(convert_down_proj),
    "get_pad_size": Merge(None, "a number, no tensor: pad_size"),
    "sp_0_pad8_size": Merge(None, "a number, no tensor: cuts.padded_part has it"),
    "is_v4_weight": Merge(None, "says which names are DeepSeek V4's: no tensor"),
    "hidden_to_inter": Merge(None, "a number, no tensor: the config says the width"),
    "yarn_get_mscale": Merge(None, "a number, no tensor: rtp_rope has it"),
    "kv_split": Merge(kv_split),
    "kv_split1": Merge(kv_split_t),
    "kv_split2": Merge(kv_split_t),
    "transpose_slice_k": Merge(transpose_slice_k),
    "transpose_slice_v": Merge(transpose_slice_v),
    "mla_pad": Merge(mla_pad),
    "mla_pad_t": Merge(mla_pad_t),
    "mla_pad_scale": Merge(mla_pad_scale),
    "merge_qkvz_transpose_reorder": Merge(concat_t),
    "merge_ba_transpose_reorder": Merge(concat_t),
    "reorder_qkvz": Merge(reorder_grouped),
    "reorder_ba": Merge(reorder_grouped),
    "split_q_gate": Merge(split_q_gate),
    "get_slopes": Merge(slopes),
    "slopes": Merge(slopes),
    "choose_available": Merge(identity, "the recipe says which source there is; a missing one is refused"),
    "tolerate_failed": Merge(None, "errors are not hidden"),
    "transpose_q_rope": Merge(q_rope, "its source is left as it is"),
    "transpose_kv_rope": Merge(kv_rope, "its source is left as it is"),
    "per_block_cast_to_fp8": Merge(None, _QUANTISES),
    "per_channel_cast_to_fp8": Merge(None, _QUANTISES),
    "quantize_weight_to_fp8": Merge(None, _QUANTISES),
    "merge_qkv_hf_fp8_with_scale": Merge(merge_fp8, "the kernel; max_scalar has the scale"),
    "quantize_weight_to_int4b": Merge(None, _QUANTISES),
    "fp8_view": Merge(fp8_view),
    "qkv_concat_fp8": Merge(concat_fp8),
    "transpose_moe_down": Merge(transpose_stack),
    "merge_qkv_scale": Merge(None, _NO_RUN + "max_scalar has what it means"),
    "merge_qkv_hf_fp8_with_scale_t": Merge(None, _NO_RUN + "it calls merge_qkv_scale"),
    "dequant_weight_split_k": Merge(None, _DENSE),
    "dequant_weight_split_v": Merge(None, _DENSE),
    "to_float32_tensor": Merge(None, "a cast"),
    "merge_conv1d": Merge(concat),
    "transpose_gate_up": Merge(swapped),
    "slice_index_transepose": Merge(run_t),
    "scale_reshape": Merge(flat),
    "permute": Merge(permute),
    "merge_qkv": Merge(merge_qkv),
    "qkv_rerange": Merge(qkv_gather),
    "repack_compressed_int4_to_cutlass": Merge(None, _KERNEL),
    "select_output_vocab_rows": Merge(select_rows),
    "one_scales": Merge(ones, _DTYPE),
}
"""rtp-llm's name -> its row."""
