"""rtp-llm's tensor- and expert-parallel strategies as views: a whole processed tensor -> one rank's part.

Every strategy takes the tensor and a Cut, which says which rank it is and what sizes attention has. SPLITS
has those of TABLES by the reference's names; tests/layouts/catalogue.py has all, and says where ours differ,
and why. A remainder is always refused, and so are heads that tp does not divide and blocks that ranks would
share; the reference mostly drops, or cuts. Experts and their widths are cut as 2025's use_stack_weight did,
which with tp alone is today's moe_pure_tp_mode. Source: rtp-llm's utils/model_weight.py (2025's, 2026's)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ... import dtypes
from ...errors import LayoutError
from ...placement import Placement
from ...views import View, cat
from ..cuts import padded_part


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's place, and attention's sizes. `ffn`: (index, count) among the ranks that cut the
    feed-forward block (None: as tp).

    `bits`: of packed int4 or int8 values; `stack`: experts' widths are cut (use_stack_weight). Of linear
    attention there are `value_heads` of `value_dim`, and its keys are `kv_heads` of `head_dim`."""

    place: Placement
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    hidden: int = 0
    bits: int = 4
    ffn: tuple[int, int] | None = None
    stack: bool = True
    value_heads: int = 1
    value_dim: int = 1

    @property
    def tp(self) -> tuple[int, int]:
        """(index, count) among the ranks that cut attention."""
        return self.place.tp_rank, self.place.tp

    @property
    def ffn_tp(self) -> tuple[int, int]:
        """(index, count) among the ranks that cut the feed-forward block."""
        return self.tp if self.ffn is None else self.ffn

    @property
    def kv(self) -> tuple[int, int]:
        """(index, count) of the part of the kv heads that this rank reads: gcd(Nk, tp) parts, each shared by
        neighbouring ranks. Layouts refuse heads where neither of Nk and tp divides the other."""
        count = math.gcd(self.kv_heads, self.place.tp)
        return self.place.tp_rank // (self.place.tp // count), count

    @property
    def moe_tp(self) -> tuple[int, int]:
        """(index, count) among the ranks that cut one expert: tp * dp / ep of them, or tp where ep is 1; one
        where experts are held whole."""
        ranks = self.place.tp * self.place.dp
        if not self.stack:
            return 0, 1
        if self.place.ep == 1:
            return self.tp
        if ranks % self.place.ep:
            raise LayoutError(f"tp * dp = {ranks} does not divide by ep {self.place.ep}")
        return self.place.stage_rank // self.place.ep, ranks // self.place.ep

    @property
    def experts(self) -> tuple[int, int]:
        """(index, count) among the parts the experts are shared out to."""
        return self.place.stage_rank % self.place.ep, self.place.ep


Strategy = Callable[[View, Cut], View]


# ---- plain cuts ----


def sp_id(view: View, cut: Cut) -> View:
    """Whole on every rank."""
    return view


def sp_0(view: View, cut: Cut) -> View:
    """A part of axis 0."""
    return view.part(0, *cut.tp)


def sp_neg1(view: View, cut: Cut) -> View:
    """A part of the last axis."""
    return view.part(-1, *cut.tp)


def ffn_sp_0(view: View, cut: Cut) -> View:
    """A part of axis 0 among the feed-forward ranks."""
    return view.part(0, *cut.ffn_tp)


def ffn_sp_neg1(view: View, cut: Cut) -> View:
    """A part of the last axis among the feed-forward ranks."""
    return view.part(-1, *cut.ffn_tp)


def sp_0_pad8(view: View, cut: Cut) -> View:
    """Zero rows up to a multiple of 8 * tp, then a part of the rows (2025's: the last rank's)."""
    return padded_part(view, 8 * cut.place.tp, *cut.tp)


# ---- by head ----


def sp_neg1_part_by_head(view: View, cut: Cut) -> View:
    """Columns [0, ND) cut, those from ND on (latent keys, rope) whole."""
    wide = cut.heads * cut.head_dim
    return cat([view.narrow(1, 0, wide).part(1, *cut.tp), view.narrow(1, wide, view.shape[1] - wide)], 1)


def get_sp_tensor(view: View, cut: Cut) -> View:
    """Columns (q | k | v) cut by heads, kv heads shared by neighbouring ranks; a vector becomes one row."""
    return _qkv(view, cut, cut.head_dim)


def sp_head(view: View, cut: Cut) -> View:
    """As get_sp_tensor; the columns of a packed AWQ weight count 32 / bits heads' elements each."""
    packed = cut.head_dim * cut.bits // 32
    columns = (cut.heads + 2 * cut.kv_heads) * packed
    awq = view.ndim == 2 and view.dtype is dtypes.int32 and view.shape == (cut.hidden, columns)
    return _qkv(view, cut, packed if awq else cut.head_dim)


def sp_head_z(view: View, cut: Cut) -> View:
    """As get_sp_tensor on zeros that are packed along columns."""
    return _qkv(view, cut, cut.head_dim * cut.bits // 32)


def sp_head_gemm_a8(view: View, cut: Cut) -> View:
    """As get_sp_tensor on [out, in] (a vector [out] counts as [out, 1])."""
    table = view.reshape((view.shape[0], view.numel // view.shape[0]))
    return get_sp_tensor(table.T, cut).T


def sp_head_s_gemm_a8_block(view: View, cut: Cut) -> View:
    """Factors [(Nq + 2Nk)D / 128, in / 128] of 128 x 128 blocks, by heads.

    Raises LayoutError where a rank's q or kv rows do not end with a block."""
    q, kv = cut.heads * cut.head_dim, cut.kv_heads * cut.head_dim
    for what, rows, count in (("query", q, cut.place.tp), ("kv", kv, cut.kv[1])):
        if rows % (128 * count):
            raise LayoutError(f"{rows} {what} features in {count} parts are not whole blocks of 128")
    return by_kind(view, [(q // 128, cut.tp), (kv // 128, cut.kv), (kv // 128, cut.kv)], 0)


def sp_attn_gate(view: View, cut: Cut) -> View:
    """Columns of this rank's heads; one a head or D a head."""
    return _heads_part(view, 1, cut)


def split_slopes_tp(view: View, cut: Cut) -> View:
    """The slopes of this rank's heads."""
    return _heads_part(view, 0, cut)


def _heads_part(view: View, axis: int, cut: Cut) -> View:
    _require_even(cut)
    return view.part(axis, *cut.tp)


def _require_even(cut: Cut) -> None:
    if cut.heads % cut.place.tp:
        raise LayoutError(f"{cut.heads} heads do not divide by tp {cut.place.tp}")


def _qkv(view: View, cut: Cut, unit: int) -> View:
    """Columns (q | k | v) of `unit` a head."""
    _require_even(cut)
    q, kv = cut.heads * unit, cut.kv_heads * unit
    rows = view.reshape((view.numel // max(q + 2 * kv, 1), q + 2 * kv))
    return by_kind(rows, [(q, cut.tp), (kv, cut.kv), (kv, cut.kv)])


def by_kind(view: View, kinds: Sequence[tuple[int, tuple[int, int]]], axis: int = 1) -> View:
    """Runs of an axis one after another, each (length, (index, count)) cut on its own."""
    out, at = [], 0
    if sum(n for n, _ in kinds) != view.shape[axis]:
        raise LayoutError(f"runs of {[n for n, _ in kinds]} do not fit {view.shape} on axis {axis}")
    for length, (index, count) in kinds:
        out.append(view.narrow(axis, at, length).part(axis, index, count))
        at += length
    return cat(out, axis)


# ---- linear attention ----


def _linear(kinds: str, axis: int) -> Strategy:
    """Keys and values, or factors of their blocks of 128, one after another along an axis, each cut."""

    def cut_each(view: View, cut: Cut) -> View:
        k, v = cut.kv_heads * cut.head_dim, cut.value_heads * cut.value_dim
        widths = [k if kind in "qk" else v for kind in kinds]
        unit = 128 if view.shape[axis] * 128 == sum(widths) else 1
        return by_kind(view, [(n // unit, cut.tp) for n in widths], axis)

    return cut_each


split_qkvz = _linear("qkvz", 1)
split_qkvz_t = _linear("qkvz", 0)
split_conv1d = _linear("qkv", 0)


def split_ba(view: View, cut: Cut) -> View:
    """Both halves of the columns, each cut."""
    return cat([view.part(1, k, 2).part(1, *cut.tp) for k in range(2)], 1)


# ---- gate and up as one ----


def ffn_sp_neg1_w13(view: View, cut: Cut) -> View:
    """Both halves of the last axis, each cut."""
    return cat([ffn_sp_neg1(view.part(-1, k, 2), cut) for k in range(2)], -1)


def sp_0_w13(view: View, cut: Cut) -> View:
    """Both halves of axis 0, each cut."""
    return cat([ffn_sp_0(view.part(0, k, 2), cut) for k in range(2)])


# ---- experts ----


def sp_moe_w1(view: View, cut: Cut) -> View:
    """[E, 2I, ..]: this rank's experts, and of each half of their rows its part."""
    index, count = cut.moe_tp
    halves = [view.part(1, k, 2).part(1, index, count) for k in range(2)]
    return cat(halves, 1).part(0, *cut.experts)


def sp_moe_neg1(view: View, cut: Cut) -> View:
    """[E, .., I]: this rank's experts, and its part of their last axis."""
    return view.part(-1, *cut.moe_tp).part(0, *cut.experts)


def sp_ep(view: View, cut: Cut) -> View:
    """[E, ..]: this rank's experts."""
    return view.part(0, *cut.experts)


def phy2log(experts: int, physical: int, ep: int, nodes: int = 1) -> list[int]:
    """Which expert each of `physical` places holds; the first `experts` are shared out to `ep` parts.

    With (physical - experts) % ep == 0 a part holds its own experts, then the first of the next part's on
    its node; else the redundant ones stand behind all others. Raises LayoutError where places do not divide
    by ep or more than the experts are redundant."""
    extra = physical - experts
    if not 0 <= extra <= experts or physical % ep or ep % nodes:
        raise LayoutError(
            f"layout rtp_llm: physical_experts: {experts} experts do not fill {physical} places of {ep} "
            f"parts on {nodes} nodes"
        )
    if experts % ep:
        return [*range(experts), *range(extra)]
    own, more, a_node = experts // ep, extra // ep, ep // nodes
    out = []
    for r in range(ep):
        after = r // a_node * a_node + (r + 1) % a_node
        out += [*range(r * own, (r + 1) * own), *range(after * own, after * own + more)]
    return out


SPLITS: Mapping[str, Strategy] = {
    "sp_id": sp_id,
    "sp_0": sp_0,
    "sp_neg1": sp_neg1,
    "ffn_sp_0": ffn_sp_0,
    "ffn_sp_neg1": ffn_sp_neg1,
    "sp_0_pad8": sp_0_pad8,
    "sp_neg1_part_by_head": sp_neg1_part_by_head,
    "sp_head": sp_head,
    "sp_head_z": sp_head_z,
    "sp_head_s": get_sp_tensor,
    "sp_head_b": get_sp_tensor,
    "sp_head_lora": get_sp_tensor,
    "sp_head_gemm_a8": sp_head_gemm_a8,
    "sp_head_s_gemm_a8": get_sp_tensor,
    "sp_head_s_gemm_a8_channel": sp_head_gemm_a8,
    "sp_head_s_gemm_a8_block": sp_head_s_gemm_a8_block,
    "sp_attn_gate": sp_attn_gate,
    "ffn_sp_neg1_w13": ffn_sp_neg1_w13,
    "sp_0_w13": sp_0_w13,
    "sp_moe_w1": sp_moe_w1,
    "sp_moe_neg1": sp_moe_neg1,
    "split_slopes_tp": split_slopes_tp,
    "split_qkvz": split_qkvz,
    "split_qkvz_t": split_qkvz_t,
    "split_qkvz_channel_scale": split_qkvz_t,
    "split_ba": split_ba,
    "split_head_linear": sp_0,
    "split_conv1d": split_conv1d,
    "split_out_linear": sp_0,
    "split_out_linear_t": sp_neg1,
    "ep": sp_ep,
}
"""rtp-llm's name -> the strategy; `ep` is ours, for what its loader selects."""
