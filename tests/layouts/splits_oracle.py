"""rtp-llm's strategies in torch, one case each, from their definitions.

A case draws sizes and gives (tensor, sizes of the Cut, what rank r of the grid holds). Index formulas are
written out element by element or head by head; nothing here comes from the package.
"""

from __future__ import annotations

import math

import torch
from layouts.catalogue_oracle import Draw, zeros_like


class Grid:
    """tp x dp x ep and the rank's place."""

    def __init__(self, tp, dp=1, ep=1, rank=0):
        self.tp, self.dp, self.ep, self.rank = tp, dp, ep, rank
        self.r = rank % tp


def chunk(x, dim, count, index):
    n = x.shape[dim]
    assert n % count == 0
    return x.narrow(dim, index * (n // count), n // count)


def attention(d, grid):
    """Heads that tp can cut: (Nq, Nk, D, kv parts, kv index)."""
    kv = d.of(1, 2, 3, grid.tp)
    heads = kv * grid.tp * d.int(1, 2)
    parts = math.gcd(kv, grid.tp)
    return heads, kv, d.int(1, 3), parts, grid.r // (grid.tp // parts)


def sp_id(d, grid):
    x = d.t(3, 5)
    return x, {}, x


def plain(dim, ndim=2):
    def case(d, grid):
        shape = [d.int(1, 4) for _ in range(ndim)]
        shape[dim] *= grid.tp
        x = d.t(*shape)
        return x, {}, chunk(x, dim, grid.tp, grid.r)

    return case


def ffn(dim, halves=None):
    """`halves`: the axis of the two halves that are cut each on their own."""

    def case(d, grid):
        count = d.of(1, 2, 4)
        index = d.int(0, count - 1)
        shape = [2, 2]
        shape[dim] *= count * d.int(1, 3)
        if halves is not None:
            shape[halves] *= 2
        x = d.t(*shape)
        if halves is None:
            out = chunk(x, dim, count, index)
        else:
            out = torch.cat([chunk(h, dim, count, index) for h in x.chunk(2, halves)], halves)
        return x, {"ffn": (index, count)}, out

    return case


def pad8(d, grid):
    n = d.int(1, 40)
    x = d.t(n, 3) if d.int(0, 2) else d.t(n)
    p = math.ceil(n / (8 * grid.tp)) * 8 * grid.tp
    local = p // grid.tp
    out = zeros_like(x, local, *x.shape[1:])
    for i in range(local):
        if grid.r * local + i < n:
            out[i] = x[grid.r * local + i]
    return x, {}, out


def part_by_head(d, grid):
    heads, dim = grid.tp * d.int(1, 3), d.int(1, 3)
    x = d.t(3, heads * dim + d.int(0, 4))
    out = torch.cat([chunk(x[:, : heads * dim], 1, grid.tp, grid.r), x[:, heads * dim :]], 1)
    return x, {"heads": heads, "head_dim": dim}, out


def qkv_columns(x, n, k, w, grid, parts, index):
    q, a, b = x.split([n * w, k * w, k * w], 1)
    return torch.cat([chunk(q, 1, grid.tp, grid.r), chunk(a, 1, parts, index), chunk(b, 1, parts, index)], 1)


def by_head(transposed=False, vector=False):
    def case(d, grid):
        n, k, w, parts, index = attention(d, grid)
        wide = (n + 2 * k) * w
        x = d.t(wide) if vector else d.t(wide, 4) if transposed else d.t(4, wide)
        rows = x.reshape(wide, -1).t() if transposed else x.reshape(-1, wide)
        out = qkv_columns(rows, n, k, w, grid, parts, index)
        return x, {"heads": n, "kv_heads": k, "head_dim": w}, out.t() if transposed else out

    return case


def packed(zeros):
    """AWQ: 8 four-bit values of neighbouring columns an int32."""

    def case(d, grid):
        d = Draw(d.int(0, 1 << 20), torch.int32)
        n, k, w, parts, index = attention(d, grid)
        x = d.t(2 if zeros else 16, (n + 2 * k) * w)
        out = qkv_columns(x, n, k, w, grid, parts, index)
        return x, {"heads": n, "kv_heads": k, "head_dim": 8 * w, "hidden": 16, "bits": 4}, out

    return case


def qk_norm(d, grid):
    n, k, w, parts, index = attention(d, grid)
    x = d.t((n + k) * w)
    out = torch.cat([chunk(x[: n * w], 0, grid.tp, grid.r), chunk(x[n * w :], 0, parts, index)])[None]
    return x, {"heads": n, "kv_heads": k, "head_dim": w}, out


def block(transposed):
    def case(d, grid):
        n, k, w, parts, index = attention(d, grid)
        x = d.t(4, (n + 2 * k) * w)
        out = qkv_columns(x, n, k, w, grid, parts, index)
        sizes = {"heads": n, "kv_heads": k, "head_dim": 128 * w}
        return (x.t().contiguous(), sizes, out.t()) if transposed else (x, sizes, out)

    return case


def attn_gate(d, grid):
    heads, dim = grid.tp * d.int(1, 3), d.int(1, 3)
    x, each = d.t(3, heads * dim), heads // grid.tp * dim
    return x, {"heads": heads, "head_dim": dim}, x[:, grid.r * each : (grid.r + 1) * each]


def slopes(d, grid):
    heads = grid.tp * d.int(1, 3)
    x = d.t(heads)
    return x, {"heads": heads}, x[grid.r * (heads // grid.tp) : (grid.r + 1) * (heads // grid.tp)]


def moe(first):
    def case(d, grid):
        parts, at = (grid.tp * grid.dp // grid.ep, grid.rank // grid.ep) if grid.ep > 1 else (grid.tp, grid.r)
        e_at = grid.rank % grid.ep
        e, i, h = grid.ep * d.int(1, 3), parts * d.int(1, 3), d.int(1, 4)
        x = d.t(e, 2 * i, h) if first else d.t(e, h, i)
        mine = x[e_at * (e // grid.ep) : (e_at + 1) * (e // grid.ep)]
        if not first:
            return x, {}, chunk(mine, 2, parts, at)
        both = mine.reshape(mine.shape[0], 2, i, h)
        out = both[:, :, at * (i // parts) : (at + 1) * (i // parts)]
        return x, {}, out.reshape(mine.shape[0], -1, h)

    return case


def expert_part(d, grid):
    e = grid.ep * d.int(1, 3)
    x, k = d.t(e, 2, 3), e // grid.ep
    return x, {}, x[grid.rank % grid.ep * k : (grid.rank % grid.ep + 1) * k]


def linear(names, dim, blocks=False):
    """`names`: what lies along `dim`; `blocks`: factors of 128 each."""

    def case(d, grid):
        unit = 128 if blocks else 1
        k, v, dk, dv = grid.tp * d.int(1, 2), grid.tp * d.int(1, 2), unit * d.int(1, 3), unit * d.int(1, 3)
        heads = {"kv_heads": k, "head_dim": dk, "value_heads": v, "value_dim": dv}
        widths = [(k * dk if name in "qk" else v * dv) // unit for name in names]
        x = d.t(sum(widths), 4) if dim == 0 else d.t(4, sum(widths))
        parts = x.split(widths, dim)
        return x, heads, torch.cat([chunk(p, dim, grid.tp, grid.r) for p in parts], dim)

    return case


def of_values(dim, ndim=2, most=3):
    """Rows or columns of value heads, up to `most` each."""

    def case(d, grid):
        heads, size = grid.tp * d.int(1, 3), d.int(1, most)
        shape = [3] * ndim
        shape[dim] = heads * size
        x, mine = d.t(*shape), heads // grid.tp
        rows = [h * size + i for h in range(grid.r * mine, (grid.r + 1) * mine) for i in range(size)]
        return x, {"value_heads": heads}, x.index_select(dim, torch.tensor(rows))

    return case


def ba(d, grid):
    heads = grid.tp * d.int(1, 3)
    x = d.t(3, 2 * heads)
    return x, {"value_heads": heads}, torch.cat([chunk(p, 1, grid.tp, grid.r) for p in x.chunk(2, 1)], 1)


SPLITS = {
    "sp_id": sp_id,
    "sp_0": plain(0),
    "sp_1": plain(1),
    "sp_neg1": plain(-1, 3),
    "ffn_sp_0": ffn(0),
    "ffn_sp_neg1": ffn(-1),
    "sp_0_pad8": pad8,
    "sp_neg1_part_by_head": part_by_head,
    "get_sp_tensor": by_head(),
    "sp_head": packed(False),
    "sp_head_z": packed(True),
    "sp_head_s": by_head(),
    "sp_head_b": by_head(vector=True),
    "sp_head_lora": by_head(),
    "sp_head_qk_norm": qk_norm,
    "sp_head_gemm_a8": by_head(transposed=True),
    "sp_head_s_gemm_a8": by_head(vector=True),
    "sp_head_s_gemm_a8_channel": by_head(transposed=True),
    "sp_head_s_gemm_a4": by_head(transposed=True),
    "sp_head_s_gemm_a4_group": by_head(transposed=True),
    "get_sp_tensor_blocked": block(False),
    "sp_head_s_gemm_a8_block": block(True),
    "sp_attn_gate": attn_gate,
    "ffn_sp_neg1_w13": ffn(-1, -1),
    "ffn_sp_0_w13": ffn(0, -1),
    "sp_0_w13": ffn(0, 0),
    "sp_moe_w1": moe(True),
    "sp_moe_neg1": moe(False),
    "split_slopes_tp": slopes,
    "ep": expert_part,
    "split_qkvz": linear("qkvz", 1),
    "split_qkvz_t": linear("qkvz", 0, blocks=True),
    "split_qkvz_channel_scale": linear("qkvz", 0),
    "split_ba": ba,
    "split_head_linear": of_values(0, 1, 1),
    "split_conv1d": linear("qkv", 0),
    "split_out_linear": of_values(0),
    "split_out_linear_t": of_values(1),
    "split_kda_qkv": linear("qkv", 1),
    "split_kda_tp_dim1": plain(1),
    "split_kda_dt_bias": of_values(0, 1),
}

GRIDS = [(tp, 1, 1) for tp in (1, 2, 3, 4, 6)] + [(2, 2, 1), (2, 2, 2), (2, 2, 4), (4, 2, 4), (1, 4, 2)]
"""(tp, dp, ep)"""
