"""rtp-llm's process functions in torch, one case each, from their definitions.

A case draws sizes and gives (sources, arguments of our function, what must come out). Index formulas are
written out element by element or head by head; nothing here comes from the package.
"""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.uint8]


class Draw:
    """Random sizes and tensors of one dtype, from a seed."""

    def __init__(self, seed, dtype=None):
        self.g = torch.Generator().manual_seed(seed)
        self.dtype = dtype or DTYPES[int(torch.randint(len(DTYPES), (), generator=self.g))]

    def int(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.g))

    def of(self, *choices):
        return choices[self.int(0, len(choices) - 1)]

    def t(self, *shape):
        raw = torch.randint(1, 255, (*shape, self.dtype.itemsize), generator=self.g, dtype=torch.uint8)
        return raw.view(self.dtype).reshape(shape)


def zeros_like(x, *shape):
    return torch.zeros(shape, dtype=x.dtype)


def padded(x, align, dim):
    lack = (align - x.shape[dim] % align) % align if align else 0
    shape = list(x.shape)
    shape[dim] = lack
    return torch.cat([x, zeros_like(x, *shape)], dim)


# ---- process functions ----


def identity(d):
    x = d.t(d.int(1, 5), d.int(1, 5))
    return [x], (), x


def transpose(d):
    x = d.t(d.int(1, 7), d.int(1, 7))
    return [x], (), x.t()


def from_scalar(d):
    x = d.t(1, d.int(1, 3))
    return [x], (), x.reshape(-1)


def list_from_scalar(d):
    xs = [d.t(d.int(1, 2)) for _ in range(3)]
    return xs, (), torch.cat([x.reshape(-1) for x in xs])


def half(index, t):
    def case(d):
        n = d.int(1, 5)
        x = d.t(n + d.int(1, 5), 3)
        out = x[:n] if index == 0 else x[n:]
        return [x], (n, index), out.t() if t else out

    return case


def concat(dim, t=False):
    def case(d):
        rows, cols = d.int(1, 4), d.int(1, 4)
        shapes = [(d.int(1, 4), cols) if dim == 0 else (rows, d.int(1, 4)) for _ in range(d.int(1, 3))]
        xs = [d.t(*s) for s in shapes]
        out = torch.cat(xs, dim)
        return xs, () if t else (dim,), out.t() if t else out

    return case


def b_half_merge(d):
    xs = [d.t(d.int(1, 3), 6) for _ in range(3)]
    return xs, (), torch.cat([x[:, :3] for x in xs] + [x[:, 3:] for x in xs])


def pad(t):
    def case(d):
        x, align, dim = d.t(d.int(1, 9), d.int(1, 9)), d.of(0, 1, 4, 8), d.int(0, 1)
        out = padded(x, align, dim)
        return [x], (align, dim), out.t() if t else out

    return case


def pad_w13(d):
    shape, align, dim = (d.int(1, 9), d.int(1, 9)), d.of(0, 4, 8), d.int(0, 1)
    xs = [d.t(*shape), d.t(*shape)]
    return xs, (align, dim), torch.cat([padded(x, align, dim) for x in xs], dim)


def w13_t(dim):
    def case(d):
        shape = (d.int(1, 5), d.int(1, 5))
        xs = [d.t(*shape), d.t(*shape)]
        return xs, (), torch.cat([x.t() for x in xs], dim)

    return case


def w13(dim):
    def case(d):
        shape = (d.int(1, 5), d.int(1, 5))
        xs = [d.t(*shape), d.t(*shape)]
        return xs, (dim % 2,), torch.cat(xs, dim)

    return case


def sizes(d):
    kv = d.int(1, 4)
    return kv * d.int(1, 3), kv, d.int(1, 3), d.int(1, 5)


def merge_qkv_hf(d):
    n, k, w, h = sizes(d)
    q, a, b = d.t(n * w, h), d.t(k * w, h), d.t(k * w, h)
    return [q, a, b], (), torch.cat([q.t(), a.t(), b.t()], 1)


def merge_qkv_b(d):
    n, k, w, _ = sizes(d)
    xs = [d.t(n * w), d.t(k * w), d.t(k * w)]
    return xs, (0,), torch.cat(xs)


def merge_te_qkv(d):
    n, k, w, h = sizes(d)
    xs = [d.t(n * w, h), d.t(k * w, h), d.t(k * w, h)]
    return xs, (0,), torch.cat(xs)


def merge_qkv_transpose_concat0(d):
    n, _, w, h = sizes(d)
    xs = [d.t(n * w, h) for _ in range(3)]
    return xs, (), torch.cat([x.t() for x in xs], 0)


def merge_block_scale(d):
    xs = [d.t(d.int(1, 4), 3) for _ in range(3)]
    return xs, (), torch.cat(xs)


def trans_qkv(d):
    heads, dim, hidden = d.int(1, 4), d.int(1, 4), d.int(1, 5)
    x, out = d.t(heads * 3 * dim, hidden), None
    out = zeros_like(x, hidden, 3 * heads * dim)
    for n in range(heads):
        for j in range(3):
            for i in range(dim):
                out[:, (j * heads + n) * dim + i] = x[(n * 3 + j) * dim + i, :]
    return [x], (heads, dim), out


def trans_qkv_b(d):
    heads, dim = d.int(1, 4), d.int(1, 4)
    x = d.t(heads * 3 * dim)
    out = torch.stack([x[(n * 3 + j) * dim + i] for j in range(3) for n in range(heads) for i in range(dim)])
    return [x], (heads,), out


def trans_lora_qkv(d):
    heads, dim, rank = d.int(1, 4), d.int(1, 4), d.int(1, 5)
    x = d.t(heads * 3 * dim, rank)
    out = zeros_like(x, rank, 3, heads * dim)
    for n in range(heads):
        for j in range(3):
            for i in range(dim):
                out[:, j, n * dim + i] = x[(n * 3 + j) * dim + i, :]
    return [x], (heads, dim), out


def qkv_gather(d):
    n, k, w, h = sizes(d)
    g = n // k
    x = d.t((n + 2 * k) * w, h) if d.int(0, 3) else d.t((n + 2 * k) * w)
    blocks = [(i // g) * (g + 2) + i % g for i in range(n)]
    blocks += [i * (g + 2) + g for i in range(k)] + [i * (g + 2) + g + 1 for i in range(k)]
    rows = x.reshape(x.shape[0], -1)
    return [x], (n, k), torch.cat([rows[b * w : (b + 1) * w] for b in blocks]).t()


def qkv_transpose(d):
    h = d.int(1, 4)
    x = d.t(6, h * d.int(1, 3))
    return [x], (h,), x.reshape(h, -1)


def lora_a(d):
    xs = [d.t(2, 5), d.t(2, 5), d.t(2, 5)]
    return xs, (), torch.cat([x.t() for x in xs], 1)


def lora_b(d):
    n, k, w, r = sizes(d)
    q, a, b = d.t(n * w, r), d.t(k * w, r), d.t(k * w, r)
    out = zeros_like(q, 3 * r, (n + 2 * k) * w)
    out[:r, : n * w], out[r : 2 * r, n * w : (n + k) * w], out[2 * r :, (n + k) * w :] = q.t(), a.t(), b.t()
    return [q, a, b], (), out


def expand_scale(d):
    h = d.int(1, 5)
    xs = [d.t(1), d.t(h), d.t(1, 1), d.t(h, 1)]
    return xs, (h,), torch.cat([x.reshape(-1).expand(h) for x in xs])


def stack(t):
    def case(d):
        shape = (d.int(1, 4), d.int(1, 4))
        xs = [d.t(*shape) for _ in range(d.int(1, 4))]
        return xs, (), torch.stack([x.t() if t else x for x in xs])

    return case


def stack_pad(d):
    xs, align, dim = [d.t(3, 5) for _ in range(d.int(1, 3))], d.of(1, 4, 8), d.int(1, 2)
    return xs, (align, dim), padded(torch.stack(xs), align, dim)


def stack_moe_w1(align):
    def case(d):
        e, i = d.int(1, 3), d.int(1, 5)
        xs = [d.t(i, 3) for _ in range(2 * e)]
        a, b = torch.stack(xs[:e]), torch.stack(xs[e:])
        return xs, (align,) if align else (), torch.cat([padded(a, align, 1), padded(b, align, 1)], 1)

    return case


def stack_swapped(d):
    i, xs = 3, [d.t(6, 4) for _ in range(d.int(1, 4))]
    return xs, (), torch.stack([torch.cat([x[i:], x[:i]]) for x in xs])


def gate_up_proj(d):
    x = d.t(3, 4, 10)
    return [x], (), torch.stack([torch.cat([x[e, :, 5:].t(), x[e, :, :5].t()]) for e in range(3)])


def down_proj(d):
    x = d.t(3, 5, 4)
    return [x], (), torch.stack([x[e].t() for e in range(3)])


def kv_split(index, t=False):
    def case(d):
        n, dn, dv, r = d.int(1, 4), d.int(1, 3), d.int(1, 3), d.int(1, 4)
        x, rows = d.t(n * (dn + dv), r), []
        for h in range(n):
            one = x[h * (dn + dv) : (h + 1) * (dn + dv)]
            rows.append(one[:dn] if index == 0 else one[dn:])
        out = torch.cat(rows)
        return [x], (dn, dv, index), out.t() if t else out

    return case


def slice_kv(index):
    def case(d):
        n, dn, dv, r = d.int(1, 4), d.int(1, 3), d.int(1, 3), d.int(1, 4)
        x = d.t(n * (dn + dv), r)
        out = zeros_like(x, n, dn, r) if index == 0 else zeros_like(x, n, r, dv)
        for h in range(n):
            for c in range(r):
                for i in range(dn if index == 0 else dv):
                    if index == 0:
                        out[h, i, c] = x[h * (dn + dv) + i, c]
                    else:
                        out[h, c, i] = x[h * (dn + dv) + dn + i, c]
        return [x], (dn, dv), out

    return case


def mla_pad(t):
    def case(d):
        n, dn, dr, rows = d.int(1, 4), d.int(1, 3), d.int(0, 3), d.int(1, 4)
        x = d.t(rows, n * dn)
        each = [torch.cat([x[:, h * dn : (h + 1) * dn], zeros_like(x, rows, dr)], 1) for h in range(n)]
        out = torch.cat(each, 1)
        return [x], (n, dn, dr), out.t() if t else out

    return case


def mla_pad_scale(d):
    n, dn, dr, group, rows = d.int(1, 3), 4, d.of(0, 2, 4), 2, d.int(1, 3)
    x = d.t(rows, n * dn // group)
    return [x], (n, dn, dr, group), torch.cat([x, zeros_like(x, rows, n * dr // group)], 1)


def reorder(kinds):
    def case(d):
        groups = d.int(1, 3)
        parts = [d.int(1, 3) for _ in range(kinds)]
        x = d.t(groups * sum(parts), 2)
        rows = []
        for k in range(kinds):
            for g in range(groups):
                start = g * sum(parts) + sum(parts[:k])
                rows += range(start, start + parts[k])
        return [x], (groups, parts), x[rows]

    return case


def split_q_gate(d):
    n, w, part = d.int(1, 4), d.int(1, 3), d.int(0, 1)
    x = d.t(n * 2 * w, 3)
    rows = [(h * 2 + part) * w + i for h in range(n) for i in range(w)]
    return [x], (n, part), x[rows]


def q_rope(d):
    n, dn, rs = d.int(1, 3), d.int(1, 3), 2 * d.int(1, 4)
    x, rows = d.t(n * (dn + rs), 3), []
    for h in range(n):
        at = h * (dn + rs)
        rows += [at + i for i in range(dn)]
        rows += [at + dn + 2 * (j % (rs // 2)) + j // (rs // 2) for j in range(rs)]
    return [x], (n, dn, rs), x[rows]


def kv_rope(d):
    r, rs = d.int(1, 3), 2 * d.int(1, 4)
    x = d.t(r + rs, 3)
    return [x], (r, rs), x[[*range(r), *(r + 2 * (j % (rs // 2)) + j // (rs // 2) for j in range(rs))]]


def fp8_view(d):
    x = d.t(d.int(1, 5), d.int(1, 5))
    return [x], (), x.reshape(x.shape[1], x.shape[0])


def select_rows(d):
    x = d.t(7, 3)
    rows = [d.int(0, 6) for _ in range(4)]
    return [x], (rows,), x[rows]


# ---- what the models and schemes have beside the file of functions ----


def concat_fp8(d):
    xs = [d.t(d.int(1, 4), 3) for _ in range(3)]
    whole = torch.cat(xs)
    return xs, (), whole.reshape(whole.shape[1], whole.shape[0])


def moe_down(d):
    xs = [d.t(2, 5) for _ in range(d.int(1, 4))]
    return xs, (), torch.stack(xs).transpose(1, 2)


def gate_up(d):
    half = d.int(1, 4)
    x = d.t(d.int(1, 3), 2 * half, 3)
    return [x], (), torch.cat([x[:, half:], x[:, :half]], 1)


def run_t(d):
    index, inter = d.int(0, 2), d.int(1, 4)
    x = d.t(3 * inter, 5)
    return [x], (index, inter), x[index * inter : (index + 1) * inter].t()


def evens_first(x, heads):
    """Row h * D + i * D / 2 + j of the result is row h * D + 2 * j + i."""
    size = x.shape[0] // heads
    return x[[h * size + 2 * j + i for h in range(heads) for i in range(2) for j in range(size // 2)]]


def permute(d):
    heads = d.int(1, 3)
    x = d.t(heads * 2 * d.int(1, 3), 4)
    return [x], (heads,), evens_first(x, heads)


def merge_qkv(d):
    n, k, w, h = sizes(d)
    q, key, v = d.t(n * 2 * w, h), d.t(k * 2 * w, h), d.t(k * 2 * w, h)
    return [q, key, v], (n, k), torch.cat([evens_first(q, n), evens_first(key, k), v]).t()


# ---- arithmetic ----

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def floats(d, *shape):
    return (torch.randn(shape, generator=d.g) + 3).to(d.of(*FLOATS))


def plus_one(d):
    x = floats(d, d.int(1, 9))
    return [x], (), (x.float() + 1).to(x.dtype)


def multiplied(d):
    x, factor = floats(d, d.int(1, 5), d.int(1, 5)), d.of(1.0, 0.5, 1 / 3)
    return [x], (factor,), x * factor


def reciprocal(most):
    def case(d):
        shapes = [d.of((), (1,), (1, 2)) for _ in range(d.int(1, most))]
        dtype = d.of(*FLOATS)
        sources = [floats(d, *shape).to(dtype) for shape in shapes]
        return sources, (), torch.cat([(1.0 / x.float()).reshape(-1) for x in sources])

    return case


def largest(d):
    shape, dtype = (d.int(1, 3),), d.of(*FLOATS)
    sources = [floats(d, *shape).to(dtype) for _ in range(d.int(1, 4))]
    return sources, (), sources[0] if len(sources) == 1 else torch.stack(sources).max()


def larger_ones(d):
    experts, dtype = d.int(1, 4), d.of(*FLOATS)
    first, second = ([floats(d).to(dtype) for _ in range(experts)] for _ in range(2))
    return (
        [*first, *second],
        (),
        torch.stack([torch.maximum(a, b) for a, b in zip(first, second, strict=True)]),
    )


def merge_qkv_fp8(d):
    """Values and scales of every size; all values that float8_e4m3fn has but NaN."""
    into, scales = d.int(1, 5), [torch.rand(d.of((), (1,)), generator=d.g) + 0.01 for _ in range(3)]
    raw = [torch.randint(0, 256, (d.int(1, 90), into), dtype=torch.uint8, generator=d.g) for _ in range(3)]
    q = [torch.where((x & 127) == 127, 0, x).to(torch.uint8).view(torch.float8_e4m3fn) for x in raw]
    most = torch.cat([s.reshape(1) for s in scales]).max()
    dense = torch.cat([x.float() * s for x, s in zip(q, scales, strict=True)])
    return [*q, *scales], (), (dense / most).to(torch.float8_e4m3fn)


MERGES = {
    "identity": identity,
    "transpose": transpose,
    "get_tensor_from_scalar": from_scalar,
    "get_list_tensor_from_scalar": list_from_scalar,
    "w_half1": half(0, False),
    "w_half2": half(1, False),
    "w_half1_t": half(0, True),
    "w_half2_t": half(1, True),
    "concat_0": concat(0),
    "concat_1": concat(1),
    "concat_0_tranpose": concat(0, True),
    "b_half_merge": b_half_merge,
    "pad": pad(False),
    "transpose_pad": pad(True),
    "pad_w13": pad_w13,
    "transpose_w13": w13_t(-1),
    "transpose_w13_2": w13_t(0),
    "concat_w13": w13(-1),
    "concat_w13_2": w13(0),
    "w13": w13_t(-1),
    "merge_qkv_hf": merge_qkv_hf,
    "merge_qkv_b": merge_qkv_b,
    "merge_te_qkv": merge_te_qkv,
    "merge_qkv_transpose_concat0": merge_qkv_transpose_concat0,
    "merge_block_scale": merge_block_scale,
    "trans_qkv": trans_qkv,
    "trans_qkv_b": trans_qkv_b,
    "qkv_gather": qkv_gather,
    "qkv_transpose": qkv_transpose,
    "trans_lora_qkv": trans_lora_qkv,
    "merge_qkv_lora_A": lora_a,
    "merge_qkv_lora_B": lora_b,
    "expand_scale": expand_scale,
    "stack_": stack(False),
    "stack_0": stack(False),
    "transpose_stack": stack(True),
    "stack_pad": stack_pad,
    "stack_moe_w1": stack_moe_w1(0),
    "stack_moe_w1_pad": stack_moe_w1(4),
    "transpose_stack_moe_w1": stack_swapped,
    "convert_gate_up_proj_": gate_up_proj,
    "convert_down_proj_": down_proj,
    "kv_split": kv_split(1),
    "kv_split1": kv_split(0, True),
    "kv_split2": kv_split(1, True),
    "transpose_slice_k": slice_kv(0),
    "transpose_slice_v": slice_kv(1),
    "mla_pad": mla_pad(False),
    "mla_pad_t": mla_pad(True),
    "mla_pad_scale": mla_pad_scale,
    "merge_qkvz_transpose_reorder": concat(0, True),
    "merge_ba_transpose_reorder": concat(0, True),
    "reorder_qkvz": reorder(4),
    "reorder_ba": reorder(2),
    "split_q_gate": split_q_gate,
    "choose_available": identity,
    "transpose_q_rope": q_rope,
    "transpose_kv_rope": kv_rope,
    "fp8_view": fp8_view,
    "select_output_vocab_rows": select_rows,
    "shift_one": plus_one,
    "plus_one": plus_one,
    "qkv_concat_fp8": concat_fp8,
    "transpose_moe_down": moe_down,
    "merge_conv1d": concat(0),
    "transpose_gate_up": gate_up,
    "slice_index_transepose": run_t,
    "scale_reshape": from_scalar,
    "permute": permute,
    "merge_qkv": merge_qkv,
    "qkv_rerange": qkv_gather,
    "multipy_identity": multiplied,
    "div": reciprocal(1),
    "get_tensor_reciprocal": reciprocal(1),
    "get_list_tensor_reciprocal": reciprocal(3),
    "max_scalar": largest,
    "stack_moe_w1_s2": larger_ones,
    "merge_qkv_hf_fp8_with_scale": merge_qkv_fp8,
}

NO_SOURCES = {"zeros", "ones", "one_scales", "get_slopes", "slopes"}

NO_VIEWS = {
    "multipy_identitys", "tolerate_failed", "per_block_cast_to_fp8", "per_channel_cast_to_fp8",
    "quantize_weight_to_fp8", "quantize_weight_to_int4b", "repack_compressed_int4_to_cutlass", "get_pad_size",
    "yarn_get_mscale", "sp_0_pad8_size", "is_v4_weight", "hidden_to_inter", "merge_qkv_scale",
    "to_float32_tensor", "merge_qkv_hf_fp8_with_scale_t", "dequant_weight_split_k", "dequant_weight_split_v",
}  # fmt: skip
