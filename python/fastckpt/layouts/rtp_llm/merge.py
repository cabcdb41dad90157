"""What rtp-llm's loader makes of a weight's sources before it is cut, as views.

Each function gives the tensor of the process function it is named after, and moves no element; what takes
arithmetic is computed when it is read (`finishes`). What only stacks, joins and transposes is done with views
where it is needed. Sources are [out, in]; H hidden, D head dim, N (Nq, Nk) heads, E experts, R low rank.
Source: rtp-llm's utils/model_weight.py and model_loader/ (2025's and 2026's), all of whose process functions
tests/layouts/catalogue.py has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ... import dtypes
from ...computed.finishes import requantised
from ...errors import LayoutError
from ...stored import constant
from ...views import View, cat, stack


def flat(views: Sequence[View]) -> View:
    """The sources' elements one after another, as a vector (get_tensor_from_scalar)."""
    return cat([v.reshape((v.numel,)) for v in views])


def merge_fp8(views: Sequence[View], name: str = "fp8") -> View:
    """Matrices of fp8, then a scale for each -> their outputs one after another, as values of the largest
    (merge_qkv_hf_fp8_with_scale)."""
    matrices, scales = views[: len(views) // 2], views[len(views) // 2 :]
    parts = zip(matrices, scales, strict=True)
    return cat([requantised(name, matrix, scale, scales) for matrix, scale in parts])


def stack_moe_w1(views: Sequence[View]) -> View:
    """E first and E second [I, H] -> [E, (first; second), H]; the engine's models list up, then gate."""
    half = len(views) // 2
    return cat([stack(views[:half]), stack(views[half:])], 1)


def merge_qkv_lora_b(views: Sequence[View]) -> View:
    """q [NqD, r], k, v [NkD, r] (or others) -> [3r, (Nq + 2Nk)D], block diagonal."""
    rank, width, at, out = views[0].shape[1], sum(v.shape[0] for v in views), 0, []
    for view in views:
        if view.shape[1] != rank:
            ranks = [v.shape[1] for v in views]
            raise LayoutError(f"layout rtp_llm: adapters of ranks {ranks} are joined, wanted one rank")
        out.append(view.T.pad(1, at, width - at - view.shape[0]))
        at += view.shape[0]
    return cat(out)


# ---- latent attention ----


def transpose_slice_k(kv_b: View, nope: int, value: int) -> View:
    """kv_b [N(dn + dv), R] -> [N, dn, R]: what absorbs a key."""
    return kv_b.split(0, nope + value).narrow(1, 0, nope)


def transpose_slice_v(kv_b: View, nope: int, value: int) -> View:
    """kv_b [N(dn + dv), R] -> [N, R, dv]: what absorbs a value."""
    return kv_b.split(0, nope + value).narrow(1, nope, value).permute((0, 2, 1))


def rope_apart(view: View, nope: int, rope: int) -> View:
    """[N * (dn + dr), ..] with each head's rope rows taken apart: even ones first (transpose_q_rope; with one
    head of R + dr rows transpose_kv_rope)."""
    each = view.split(0, nope + rope)
    pairs = each.narrow(1, nope, rope).split(1, 2).permute((0, 2, 1, 3)).merge(1)
    return cat([each.narrow(1, 0, nope), pairs], 1).merge(0)


def slopes(heads: int) -> View:
    """ALiBi's slopes [N], float32: powers of 2^(-8 / n) for the power of two n up to N, then every second one
    of twice n. Source: the ALiBi paper's get_slopes."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]

    n = 1 << (heads.bit_length() - 1)
    made = powers(n) + powers(2 * n)[::2][: heads - n]
    return constant(np.array(made, np.float32), dtypes.float32)
