"""rtp-llm's catalogue by its own names: every process function and strategy as views, what differs, and why.

What the layout runs is the package's; a function that it does not need, as no recipe has such a weight, is a
line here. `test_catalogue.py` compares all of them with `catalogue_oracle.py` and `splits_oracle.py`, and the
tables with the reference's lists. Sources of a process function are a list of views, [out, in] each, and come
first.
Source: rtp-llm's utils/model_weight.py (class W) and model_loader/ (2025's and 2026's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from fastckpt import dtypes
from fastckpt.computed.finishes import largest, multiple, plus_one, reciprocal
from fastckpt.layouts.rtp_llm import merge as m
from fastckpt.layouts.rtp_llm import split as s
from fastckpt.layouts.rtp_llm.merge import flat, slopes, stack_moe_w1
from fastckpt.layouts.rtp_llm.split import by_kind
from fastckpt.layouts.rtp_llm.weights import TABLES
from fastckpt.stored import constant
from fastckpt.views import View, cat, stack, zeros


@dataclass(frozen=True)
class Row:
    """`view` makes what the reference's function makes; `differs`: where ours differs, and why (or why there
    is no view)."""

    view: Callable[..., View] | None
    differs: str = ""


# ---- process functions ----


def pad(view, align, axis):
    return view.pad(axis, 0, -view.shape[axis] % align if align else 0)


def half(view, inter, index):
    return view.narrow(0, 0, inter) if index == 0 else view.narrow(0, inter, view.shape[0] - inter)


def fp8_view(view):
    return view.reshape((view.shape[1], view.shape[0]))


def max_scalar(views):
    row = flat(views)
    made = largest("a scale", row.reshape((1, row.numel))).reshape(()).cast(row.dtype)
    return views[0] if len(views) == 1 else made


def stack_moe_w1_pad(views, align):
    n = len(views) // 2
    return cat([pad(stack(views[:n]), align, 1), pad(stack(views[n:]), align, 1)], 1)


def max_of_pairs(views):
    pairs = stack_moe_w1([v.reshape((1,)) for v in views])
    return largest("a scale", pairs).cast(pairs.dtype)


def expand_scale(views, hidden):
    rows = [v.reshape((v.numel,)) for v in views]
    return cat([cat([row] * hidden) if row.numel == 1 else row for row in rows])


def trans_qkv(view, heads):
    """[N * (q, k, v) * D, H] -> [H, (q | k | v) of all heads]."""
    each = view.reshape((heads, 3, view.shape[0] // heads // 3, view.numel // view.shape[0]))
    return each.permute((1, 0, 2, 3)).merge(0).merge(0).T


def trans_qkv_b(views, heads):
    return trans_qkv(views[0], heads).reshape((views[0].numel,))


def qkv_gather(views, heads, kv_heads):
    """[Nk * (g q heads, k, v) * D, H] -> [H, q | k | v], g = Nq / Nk; a vector gives [1, ..]."""
    rows = views[0].reshape((views[0].shape[0], views[0].numel // views[0].shape[0]))
    shared, d = heads // kv_heads, rows.shape[0] // (heads + 2 * kv_heads)
    groups = rows.split(0, (shared + 2) * d)
    kinds = ((0, shared), (shared, 1), (shared + 1, 1))
    return cat([groups.narrow(1, a * d, n * d).merge(0) for a, n in kinds]).T


def permute(view, heads):
    return m.rope_apart(view, 0, view.shape[0] // heads)


def reorder_grouped(views, groups, parts):
    """Rows grouped per key head, `parts` rows of each kind in a group, to all rows of each kind in turn."""
    grouped, starts = views[0].split(0, sum(parts)), np.cumsum([0, *parts]).tolist()
    return cat([grouped.narrow(1, at, n).merge(0) for at, n in zip(starts, parts, strict=False)])


def swapped(pairs):
    return cat([pairs.part(1, 1, 2), pairs.part(1, 0, 2)], 1)


def kv_split(views, nope, value, index):
    heads = views[0].split(0, nope + value)
    return (heads.narrow(1, 0, nope) if index == 0 else heads.narrow(1, nope, value)).merge(0)


def mla_pad(views, heads, nope, rope):
    each = views[0].reshape((views[0].numel // (heads * nope), heads, nope))
    return each.pad(2, 0, rope).merge(1)


def mla_pad_scale(views, heads, nope, rope, group):
    width = heads * nope // group
    return views[0].reshape((views[0].numel // width, width)).pad(1, 0, heads * rope // group)


def ones(shape, dtype):
    return constant(np.ones(shape, np.float32), dtypes.float32).cast(dtype)


ROUNDED = "rounded once, after the sum; the reference rounds to the served dtype before it too"
QUANTISES = "quantises: quant schemes do, not a layout"
KERNEL = "kernel format, made by the engine after loading"
FLOAT32 = "divided in float32, to which the reference's loader casts the source; 0 is refused"
NO_RUN = "does not run: torch.max along an axis gives a pair; "
DENSE = "dequantises: that is `--quant none` before a layout; the layout has the blocks' factors beside"
PADS = "zeros have the tensor's dtype, the reference's are fp16"
DTYPE = "of the dtype asked for, the reference's is fp16 until the loader casts it"

MERGES = {
    "identity": Row(lambda v: v[0], "a missing tensor is refused, never None"),
    "transpose": Row(lambda v: v[0].T),
    "multipy_identity": Row(lambda v, factor: multiple("x", v[0], factor).cast(v[0].dtype)),
    "multipy_identitys": Row(None, "a name that nothing calls in the versions read"),
    "shift_one": Row(lambda v: plus_one(v[0]), ROUNDED),
    "plus_one": Row(lambda v: plus_one(v[0]), ROUNDED),
    "div": Row(lambda v: reciprocal("a scale", flat(v)), FLOAT32 + "; a vector"),
    "get_tensor_reciprocal": Row(lambda v: reciprocal("a scale", flat(v)), FLOAT32),
    "get_tensor_from_scalar": Row(flat),
    "get_list_tensor_reciprocal": Row(lambda v: reciprocal("a scale", flat(v)), FLOAT32),
    "get_list_tensor_from_scalar": Row(flat, "the list of sources is left as it is"),
    "max_scalar": Row(max_scalar),
    "zeros": Row(zeros, DTYPE),
    "ones": Row(ones, DTYPE),
    "w_half1": Row(lambda v, inter, index: half(v[0], inter, index)),
    "w_half2": Row(lambda v, inter, index: half(v[0], inter, index)),
    "w_half1_t": Row(lambda v, inter, index: half(v[0], inter, index).T),
    "w_half2_t": Row(lambda v, inter, index: half(v[0], inter, index).T),
    "concat_0": Row(cat),
    "concat_1": Row(cat),
    "concat_0_tranpose": Row(lambda v: cat(v).T),
    "b_half_merge": Row(lambda v: cat([x.part(-1, k, 2) for k in range(2) for x in v])),
    "pad": Row(lambda v, align, axis: pad(v[0], align, axis), "pads any number of axes"),
    "transpose_pad": Row(lambda v, align, axis: pad(v[0], align, axis).T),
    "pad_w13": Row(lambda v, align, axis: cat([pad(x, align, axis) for x in v], axis)),
    "transpose_w13": Row(lambda v: cat(v).T),
    "transpose_w13_2": Row(lambda v: cat([x.T for x in v])),
    "concat_w13": Row(cat),
    "concat_w13_2": Row(cat),
    "w13": Row(lambda v: cat(v).T),
    "merge_qkv_hf": Row(lambda v: cat(v).T),
    "merge_qkv_b": Row(cat),
    "merge_te_qkv": Row(cat),
    "merge_qkv_transpose_concat0": Row(lambda v: cat([x.T for x in v])),
    "merge_block_scale": Row(cat),
    "trans_qkv": Row(
        lambda v, heads, d: trans_qkv(v[0], heads),
        "the head size is always given: H // N is wrong where H != N * D",
    ),
    "trans_qkv_b": Row(trans_qkv_b, "the head size is the vector's, not H // N"),
    "qkv_gather": Row(qkv_gather),
    "qkv_transpose": Row(lambda v, hidden: v[0].reshape((hidden, v[0].numel // hidden))),
    "trans_lora_qkv": Row(lambda v, heads, d: trans_qkv(v[0], heads).split(1, heads * d)),
    "merge_qkv_lora_A": Row(
        lambda v: cat(v).T, "a missing source's zeros (`lora`) have the others' dtype, not fp32"
    ),
    "merge_qkv_lora_B": Row(m.merge_qkv_lora_b),
    "expand_scale": Row(expand_scale),
    "stack_": Row(stack),
    "stack_0": Row(stack),
    "transpose_stack": Row(lambda v: stack(v).permute((0, 2, 1))),
    "stack_pad": Row(
        lambda v, align, axis: pad(stack(v), align, axis),
        PADS + "; align 0 pads nothing, the reference raises",
    ),
    "stack_moe_w1": Row(stack_moe_w1),
    "stack_moe_w1_pad": Row(stack_moe_w1_pad, PADS),
    "stack_moe_w1_s2": Row(max_of_pairs),
    "transpose_stack_moe_w1": Row(lambda v: swapped(stack(v))),
    "convert_gate_up_proj_": Row(lambda v: swapped(v[0].permute((0, 2, 1)))),
    "convert_down_proj_": Row(lambda v: v[0].permute((0, 2, 1))),
    "get_pad_size": Row(None, "a number, no tensor"),
    "sp_0_pad8_size": Row(None, "a number, no tensor: cuts.padded_part has it"),
    "is_v4_weight": Row(None, "says which names are DeepSeek V4's: no tensor"),
    "hidden_to_inter": Row(None, "a number, no tensor: the config says the width"),
    "yarn_get_mscale": Row(None, "a number, no tensor: `rope` has it"),
    "kv_split": Row(kv_split),
    "kv_split1": Row(lambda v, *sizes: kv_split(v, *sizes).T),
    "kv_split2": Row(lambda v, *sizes: kv_split(v, *sizes).T),
    "transpose_slice_k": Row(lambda v, *sizes: m.transpose_slice_k(v[0], *sizes)),
    "transpose_slice_v": Row(lambda v, *sizes: m.transpose_slice_v(v[0], *sizes)),
    "mla_pad": Row(mla_pad),
    "mla_pad_t": Row(lambda v, *sizes: mla_pad(v, *sizes).T),
    "mla_pad_scale": Row(mla_pad_scale),
    "merge_qkvz_transpose_reorder": Row(lambda v: cat(v).T),
    "merge_ba_transpose_reorder": Row(lambda v: cat(v).T),
    "reorder_qkvz": Row(reorder_grouped),
    "reorder_ba": Row(reorder_grouped),
    "split_q_gate": Row(
        lambda v, heads, part: v[0].split(0, v[0].shape[0] // heads).part(1, part, 2).merge(0)
    ),
    "get_slopes": Row(slopes),
    "slopes": Row(slopes),
    "choose_available": Row(
        lambda v: v[0], "the recipe says which source there is; a missing one is refused"
    ),
    "tolerate_failed": Row(None, "errors are not hidden"),
    "transpose_q_rope": Row(
        lambda v, heads, nope, rope: m.rope_apart(v[0], nope, rope), "its source is left as it is"
    ),
    "transpose_kv_rope": Row(
        lambda v, rank, rope: m.rope_apart(v[0], rank, rope), "its source is left as it is"
    ),
    "per_block_cast_to_fp8": Row(None, QUANTISES),
    "per_channel_cast_to_fp8": Row(None, QUANTISES),
    "quantize_weight_to_fp8": Row(None, QUANTISES),
    "merge_qkv_hf_fp8_with_scale": Row(m.merge_fp8, "the kernel; finishes.largest has the scale"),
    "quantize_weight_to_int4b": Row(None, QUANTISES),
    "fp8_view": Row(lambda v: fp8_view(v[0])),
    "qkv_concat_fp8": Row(lambda v: fp8_view(cat(v))),
    "transpose_moe_down": Row(lambda v: stack(v).permute((0, 2, 1))),
    "merge_qkv_scale": Row(None, NO_RUN + "finishes.largest has what it means"),
    "merge_qkv_hf_fp8_with_scale_t": Row(None, NO_RUN + "it calls merge_qkv_scale"),
    "dequant_weight_split_k": Row(None, DENSE),
    "dequant_weight_split_v": Row(None, DENSE),
    "to_float32_tensor": Row(None, "a cast"),
    "merge_conv1d": Row(cat),
    "transpose_gate_up": Row(lambda v: swapped(v[0])),
    "slice_index_transepose": Row(lambda v, index, inter: v[0].narrow(0, index * inter, inter).T),
    "scale_reshape": Row(flat),
    "permute": Row(lambda v, heads: permute(v[0], heads)),
    "merge_qkv": Row(lambda v, n, k: cat([permute(v[0], n), permute(v[1], k), v[2]]).T),
    "qkv_rerange": Row(qkv_gather),
    "repack_compressed_int4_to_cutlass": Row(None, KERNEL),
    "select_output_vocab_rows": Row(lambda v, rows: cat([v[0].narrow(0, row, 1) for row in rows])),
    "one_scales": Row(ones, DTYPE),
}


# ---- strategies ----


def sp_1(view, cut):
    return view.part(1, *cut.tp)


def linear_qkv(view, cut):
    return s.split_conv1d(view.T, cut).T


def sp_head_qk_norm(view, cut):
    row = view.reshape((1, view.numel))
    return by_kind(row, [(cut.heads * cut.head_dim, cut.tp), (cut.kv_heads * cut.head_dim, cut.kv)])


REMAINDER = "a remainder is refused, the reference drops it"
HEADS = "heads that tp does not divide are refused, the reference cuts inside a head"
BLOCKS = "ranks that would share a block of 128 are refused"
STACK = "experts and widths cut as use_stack_weight did; with tp alone that is today's moe_pure_tp_mode"

SPLITS = {
    "sp_id": Row(s.sp_id),
    "sp_0": Row(s.sp_0, REMAINDER),
    "sp_1": Row(sp_1, REMAINDER),
    "sp_neg1": Row(s.sp_neg1),
    "ffn_sp_0": Row(s.ffn_sp_0, REMAINDER),
    "ffn_sp_neg1": Row(s.ffn_sp_neg1, REMAINDER),
    "sp_0_pad8": Row(s.sp_0_pad8, "as today's: 2025's put all padding on the last rank"),
    "sp_neg1_part_by_head": Row(s.sp_neg1_part_by_head, REMAINDER),
    "get_sp_tensor": Row(s.get_sp_tensor, HEADS),
    "sp_head": Row(s.sp_head, HEADS),
    "sp_head_z": Row(s.sp_head_z, HEADS),
    "sp_head_s": Row(s.get_sp_tensor, HEADS),
    "sp_head_b": Row(s.get_sp_tensor, HEADS),
    "sp_head_lora": Row(s.get_sp_tensor, HEADS),
    "sp_head_qk_norm": Row(sp_head_qk_norm),
    "sp_head_gemm_a8": Row(s.sp_head_gemm_a8, HEADS),
    "sp_head_s_gemm_a8": Row(s.get_sp_tensor, HEADS),
    "sp_head_s_gemm_a8_channel": Row(s.sp_head_gemm_a8, HEADS),
    "sp_head_s_gemm_a4": Row(s.sp_head_gemm_a8, HEADS),
    "sp_head_s_gemm_a4_group": Row(s.sp_head_gemm_a8, HEADS),
    "get_sp_tensor_blocked": Row(lambda view, cut: s.sp_head_s_gemm_a8_block(view.T, cut).T, BLOCKS),
    "sp_head_s_gemm_a8_block": Row(s.sp_head_s_gemm_a8_block, BLOCKS),
    "sp_attn_gate": Row(s.sp_attn_gate, REMAINDER),
    "ffn_sp_neg1_w13": Row(s.ffn_sp_neg1_w13, REMAINDER),
    "ffn_sp_0_w13": Row(s.ffn_sp_0, REMAINDER),
    "sp_0_w13": Row(s.sp_0_w13, REMAINDER),
    "sp_moe_w1": Row(s.sp_moe_w1, STACK),
    "sp_moe_neg1": Row(s.sp_moe_neg1, STACK),
    "split_slopes_tp": Row(s.split_slopes_tp, REMAINDER),
    "ep": Row(s.sp_ep, "a remainder of experts is refused, the reference drops it"),
    "split_qkvz": Row(s.split_qkvz, REMAINDER),
    "split_qkvz_t": Row(s.split_qkvz_t, REMAINDER),
    "split_qkvz_channel_scale": Row(s.split_qkvz_t, REMAINDER),
    "split_ba": Row(s.split_ba, REMAINDER),
    "split_head_linear": Row(s.sp_0, REMAINDER),
    "split_conv1d": Row(s.split_conv1d, REMAINDER),
    "split_out_linear": Row(s.sp_0, REMAINDER),
    "split_out_linear_t": Row(s.sp_neg1, REMAINDER),
    "split_kda_qkv": Row(linear_qkv, REMAINDER),
    "split_kda_tp_dim1": Row(sp_1, REMAINDER),
    "split_kda_dt_bias": Row(s.sp_0, REMAINDER),
}


# ---- weights ----

KDA = "Kimi's linear attention: no recipe"
ABSENT = {
    "attn_ln_*": "norms within blocks: no recipe has any",
    "ffn_ln_*": "norms within blocks: no recipe has any",
    "cross_attn_*": "an encoder beside a decoder is refused",
    "eagle3_*": "a model that drafts: no recipe",
    "ffn_act_s": "divides activations, in a form of AWQ that is not read",
    "linear_attn_qkv_w": KDA,
    "linear_attn_?_w": KDA,
    "linear_attn_?_?_w": KDA,
    "linear_attn_dt_b_kda": KDA,
    "mla_fusedqkrope_no_lora_s": "quantised queries without a low rank are refused",
    "mla_indexer_*": "sparse latent attention: no recipe",
    "mla_k_nope_[ws]": "2025's half of kv_b",
    "mla_v_[ws]": "2025's half of kv_b",
    "multi_tokens_predict_*": "layers of multi-token prediction are left out",
    "prefix_w": "trained prefixes: no recipe",
    "qk_ln_gamma": "one norm over q and k together: no recipe",
    "v4_*": "DeepSeek V4: no recipe",
    "vision_*_s*": "quantised vision experts are refused",
    **dict.fromkeys(("attn_*_s2", "ffn_w*_s2", "moe_w?_s2", "*_i_s"), "fp4 by groups: no source is read"),
}
"""Patterns of W's names that are never written -> why."""

HALVES = "[gate; up] lie on axis 0, of which ffn_sp_0_w13 gives gate to the first ranks and up to the last"
FFN_RANKS = "cut among the feed-forward ranks, as what it goes with; the reference's are attention's"
SELECTED = "this rank's experts; the reference selected them when it loaded"
WHOLE_SCALE = "a scale for every output is whole; the reference's default cuts it as the weight's inputs"

DIFFERS = {
    **dict.fromkeys((("int8", "ffn_w13"), ("int8", "ffn_s13")), HALVES),
    ("int8", "moe_s2"): WHOLE_SCALE,
    **{
        (table, name): FFN_RANKS
        for table in ("fp8_block", "fp8_channel")
        for name in ("ffn_w1", "ffn_s1", "ffn_w3", "ffn_s3", "ffn_w2", "ffn_s2")
        if (table, name) != ("fp8_channel", "ffn_s2")
    },
    **{(t, n): FFN_RANKS for t in TABLES for n in ("ffn_w1_lora_b", "ffn_w3_lora_b", "ffn_w2_lora_a")},
    **dict.fromkeys((("fp8_tensor", "moe_s1"), ("fp8_tensor", "moe_s2")), SELECTED),
    ("fp8_channel", "moe_s2"): SELECTED,
}
"""(table, W's name) -> why its strategy in `weights.TABLES` is not the reference's."""
