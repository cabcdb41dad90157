"""Every process function and every strategy of rtp-llm, by name, against torch; and worked examples."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from fastckpt import dtypes
from fastckpt.errors import LayoutError, ViewError
from fastckpt.layouts.rtp_llm import split as ours
from fastckpt.layouts.rtp_llm.merge import slopes
from fastckpt.layouts.rtp_llm.split import Cut, phy2log
from fastckpt.layouts.rtp_llm.weights import NAMES, TABLES
from fastckpt.placement import Placement
from layouts import catalogue_oracle as oracle
from layouts import splits_oracle as splits
from layouts.catalogue import ABSENT, DIFFERS, MERGES, SPLITS
from reading import bits, elements, memory, read


def views_of(tensors, pieces=2):
    ckpt = memory({str(i): t for i, t in enumerate(tensors)}, pieces)
    return [ckpt[str(i)] for i in range(len(tensors))]


def merged(name, tensors, *args):
    view = MERGES[name].view(views_of(tensors), *args)
    return elements(view)


def split(name, tensor, grid, **sizes):
    cut = Cut(Placement(tp=grid.tp, dp=grid.dp, ep=grid.ep, rank=grid.rank), **sizes)
    return read(SPLITS[name].view(views_of([tensor])[0], cut))


def test_no_name_is_missing():
    assert set(MERGES) == set(oracle.MERGES) | oracle.NO_SOURCES | oracle.NO_VIEWS
    assert {n for n, row in MERGES.items() if row.view is None} == oracle.NO_VIEWS
    assert all(MERGES[n].differs for n in oracle.NO_VIEWS)
    assert set(SPLITS) == set(splits.SPLITS)


def test_the_layout_cuts_with_the_catalogue():
    assert all(SPLITS[name].view is view for name, view in ours.SPLITS.items())
    assert {strategy for table in TABLES.values() for strategy in table.values()} == set(ours.SPLITS)


def said():
    """The committed lists of the reference's names: heading -> words."""
    text = (Path(__file__).parent / "rtp_names.txt").read_text()
    return {block.partition("]")[0]: block.partition("]")[2].split() for block in text.split("\n[")[1:]}


def test_every_name_of_the_reference_has_a_row():
    lists = {"merges": MERGES, "strategies": SPLITS}
    found = {kind: [names for heading, names in said().items() if heading.startswith(kind)] for kind in lists}
    assert [len(x) for x in found.values()] == [3, 3]
    for kind, rows in lists.items():
        for names in found[kind]:
            assert set(names) <= set(rows), set(names) - set(rows)
    beyond = set(SPLITS) - {n for names in found["strategies"] for n in names}
    assert beyond == {"ep"}
    assert not set(MERGES) - {n for names in found["merges"] for n in names}


def test_every_weight_of_the_reference_is_written_or_says_why_not():
    text = (Path(__file__).parent / "rtp_weight_names.txt").read_text()
    theirs = dict(word.split("=") for word in text.split() if "=" in word)
    assert len(theirs) == 256
    for name, dumped in theirs.items():
        absent = any(fnmatchcase(name, pattern) for pattern in ABSENT)
        assert (NAMES.get(name) == dumped) != absent, name
    assert all(any(fnmatchcase(name, pattern) for name in theirs) for pattern in ABSENT)
    made = {f"ffn_w13_lora_{half}" for half in "ab"}  # the engine makes these of ffn_w13's name
    assert set(NAMES) - set(theirs) == made


TABLE_OF = {
    "default table": "default", "table of W8A8 int8": "int8", "table of fp8 by matrix": "fp8_tensor",
    "table of fp8 by blocks": "fp8_block", "table of fp8 by output": "fp8_channel",
    "table of 2025 alone": "default",
}  # fmt: skip
UNREAD = {"table of fp4 by groups"}


def test_every_table_is_the_references_or_says_why():
    tables = {
        h.partition(":")[0]: dict(w.split("=") for w in words) for h, words in said().items() if "table" in h
    }
    assert set(tables) == {*TABLE_OF, *UNREAD}
    differs = set()
    for heading, name in TABLE_OF.items():
        theirs = {n: strategy for n, strategy in (tables["default table"] | tables[heading]).items()
                  if n not in ABSENT}  # fmt: skip
        assert set(theirs) <= set(NAMES)
        differs |= {(name, w) for w, strategy in theirs.items() if TABLES[name][w] != strategy}
    assert differs == set(DIFFERS)
    assert all(DIFFERS.values())


@pytest.mark.parametrize("name", list(oracle.MERGES))
def test_process_functions(name):
    for seed in range(8):
        sources, args, want = oracle.MERGES[name](oracle.Draw(seed))
        got = merged(name, sources, *args)
        assert got.shape == tuple(want.shape), (seed, args)
        assert (got == bits(want)).all(), (seed, args)


@pytest.mark.parametrize("name", list(splits.SPLITS))
def test_strategies(name):
    for seed, (tp, dp, ep) in enumerate(splits.GRIDS):
        ranks = tp * dp
        for rank in {0, ranks // 2, ranks - 1}:
            grid = splits.Grid(tp, dp, ep, rank)
            tensor, sizes, want = splits.SPLITS[name](oracle.Draw(seed), grid)
            got = split(name, tensor, grid, **sizes)
            assert got.shape == tuple(want.shape), (grid.tp, rank, sizes)
            assert (got == bits(want)).all(), (grid.tp, rank, sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constants(dtype):
    ours = dtypes.dtype(str(dtype))
    assert (read(MERGES["zeros"].view((2, 3), ours)) == bits(torch.zeros(2, 3, dtype=dtype))).all()
    assert (read(MERGES["ones"].view((3,), dtypes.float32)) == bits(torch.ones(3))).all()
    assert MERGES["ones"].view((3,), ours).dtype is ours


# ---- worked examples: numbers that upstream code gave ----


def column(n):
    return torch.arange(n, dtype=torch.int32)[:, None]


def rows_of(name, n, *args, start=0):
    return merged(name, [column(n) + start], *args).flatten().tolist()


def part(name, values, tp, rank, **sizes):
    return split(name, torch.tensor(values, dtype=torch.int32), splits.Grid(tp, rank=rank), **sizes).tolist()


def test_fused_heads_by_hand():
    assert rows_of("qkv_gather", 8, 4, 2) == [0, 1, 4, 5, 2, 6, 3, 7]
    assert rows_of("trans_qkv", 12, 2, 2) == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    got = merged("trans_qkv_b", [torch.arange(12, dtype=torch.int32)], 2)
    assert got.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert rows_of("split_q_gate", 12, 2, 0) == [0, 1, 2, 6, 7, 8]
    assert rows_of("split_q_gate", 12, 2, 1) == [3, 4, 5, 9, 10, 11]


def test_head_cuts_by_hand():
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 2}
    assert part("get_sp_tensor", [list(range(1, 17))], 2, 1, **heads) == [[5, 6, 7, 8, 11, 12, 15, 16]]
    norm = part("sp_head_qk_norm", list(range(1, 33)), 6, 3, heads=12, kv_heads=4, head_dim=2)
    assert norm == [[13, 14, 15, 16, 29, 30, 31, 32]]
    block = {"heads": 4, "kv_heads": 2, "head_dim": 128}
    assert part("sp_head_s_gemm_a8_block", [[i] for i in range(8)], 2, 1, **block) == [[2], [3], [5], [7]]


@pytest.mark.parametrize(
    ("heads", "kv", "tp", "ranks", "each"),
    [
        (8, 2, 4, [0, 0, 1, 1], 1),
        (8, 1, 4, [0, 0, 0, 0], 1),
        (12, 4, 6, [0, 0, 0, 1, 1, 1], 2),
        (12, 2, 3, [0, 0, 0], 2),
        (6, 3, 2, [0, 0], 3),
    ],
)
def test_kv_ranks_by_hand(heads, kv, tp, ranks, each):
    cuts = [Cut(Placement(tp=tp, rank=r), heads, kv) for r in range(tp)]
    assert [c.kv[0] for c in cuts] == ranks
    assert {kv // c.kv[1] for c in cuts} == {each}


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_factors_that_ranks_share_are_refused(tp):
    with pytest.raises(LayoutError, match=r"features in \d parts are not whole blocks of 128"):
        part("sp_head_s_gemm_a8_block", [[0]] * 6, tp, 0, heads=8, kv_heads=2, head_dim=64)


@pytest.mark.parametrize(
    ("rows", "tp", "local", "data"),
    [(10, 2, 8, [8, 2]), (10, 4, 8, [8, 2, 0, 0]), (17, 2, 16, [16, 1])],
)
def test_padded_vocabulary_by_hand(rows, tp, local, data):
    for r in range(tp):
        got = part("sp_0_pad8", [[i + 1] for i in range(rows)], tp, r)
        assert len(got) == local
        assert sum(v != 0 for (v,) in got) == data[r]
    assert part("sp_0_pad8", list(range(1, 11)), 2, 1) == [9, 10, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(1010, 2, 1024), (32001, 2, 32016), (32000, 3, 32016)])
def test_vocabulary_sizes_by_hand(vocab, tp, padded):
    head = views_of([torch.ones(vocab, 1)])[0]
    got = [SPLITS["sp_0_pad8"].view(head, Cut(Placement(tp=tp, rank=r))).shape[0] for r in range(tp)]
    assert got == [padded // tp] * tp


def test_packed_weights_by_hand():
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 64}
    grid = splits.Grid(2, rank=1)
    assert split("sp_head", torch.ones(64, 16, dtype=torch.int32), grid, **sizes).shape == (64, 8)
    assert split("sp_head", torch.ones(8, 128, dtype=torch.int32), grid, **sizes).shape == (8, 64)
    assert split("sp_head_z", torch.ones(2, 16, dtype=torch.int32), grid, **sizes).shape == (2, 8)


def test_experts_by_hand():
    x = torch.arange(8, dtype=torch.int32)[None, :, None].repeat(2, 1, 3)
    got = split("sp_moe_w1", x, splits.Grid(2, rank=1))
    assert got[0, :, 0].tolist() == [2, 3, 6, 7]
    a, b = (torch.tensor([[v], [v + 1]], dtype=torch.int32) for v in (1, 11))
    assert merged("stack_moe_w1_pad", [a, b], 4).flatten().tolist() == [1, 2, 0, 0, 11, 12, 0, 0]
    w1, w3 = (torch.tensor([[v], [v + 2], [v + 4]], dtype=torch.int32) for v in (1, 101))
    assert merged("pad_w13", [w1, w3], 4, 0).flatten().tolist() == [1, 3, 5, 0, 101, 103, 105, 0]


def test_runs_that_are_not_all_there():
    view = memory({"x": torch.ones(3, 9)})["x"]
    with pytest.raises(LayoutError, match=r"runs of \[2, 2, 2, 2\] do not fit \(3, 9\) on axis 1"):
        ours.split_qkvz(view, Cut(Placement(), head_dim=2, value_dim=2))


def test_redundant_experts_by_hand():
    assert phy2log(8, 12, 4, 2) == [0, 1, 2, 2, 3, 0, 4, 5, 6, 6, 7, 4]
    assert phy2log(8, 12, 2, 1) == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 0, 1]
    assert phy2log(8, 10, 10) == [*range(8), 0, 1]
    with pytest.raises(LayoutError, match="8 experts do not fill 17 places"):
        phy2log(8, 17, 1)


def test_rope_by_hand():
    assert rows_of("transpose_kv_rope", 8, 2, 6) == [0, 1, 2, 4, 6, 3, 5, 7]
    assert rows_of("transpose_q_rope", 10, 2, 1, 4) == [0, 1, 3, 2, 4, 5, 6, 8, 7, 9]


def test_lora_and_scales_by_hand():
    q, k, v = (torch.ones(n, 2, dtype=torch.int32) for n in (8, 4, 4))
    got = merged("merge_qkv_lora_B", [q, k, v])
    want = torch.zeros(6, 16, dtype=torch.int32)
    want[0:2, 0:8] = want[2:4, 8:12] = want[4:6, 12:16] = 1
    assert (got == bits(want)).all()
    scales = [torch.tensor(x, dtype=torch.int32) for x in (1, [2], [0, 1, 2, 3])]
    assert merged("expand_scale", scales, 4).tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 0, 1, 2, 3]


def test_slopes_by_hand():
    got = read(slopes(6)).view("f4").tolist()
    assert got == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    eight = read(slopes(8)).view("f4").tolist()
    assert eight == [math.pow(2, -(i + 1)) for i in range(8)]


def test_latent_padding_by_hand():
    x = torch.arange(1, 13, dtype=torch.int32)[None]
    got = merged("mla_pad", [x], 3, 4, 3)[0].tolist()
    assert [i for i, v in enumerate(got) if v == 0] == [4, 5, 6, 11, 12, 13, 18, 19, 20]
    scale = merged("mla_pad_scale", [x[:, :6]], 3, 4, 2, 2)[0].tolist()
    assert scale == [1, 2, 3, 4, 5, 6, 0, 0, 0]


def test_linear_attention_by_hand():
    heads = {"kv_heads": 2, "head_dim": 3, "value_heads": 4, "value_dim": 2}
    qkvz = part("split_qkvz", [list(range(28))], 2, 1, **heads)
    assert qkvz == [[3, 4, 5, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27]]
    assert part("split_ba", [list(range(8))], 2, 1, **heads) == [[2, 3, 6, 7]]
    conv = part("split_conv1d", [[i] for i in range(20)], 2, 1, **heads)
    assert [r for (r,) in conv] == [3, 4, 5, 9, 10, 11, 16, 17, 18, 19]
    assert part("split_out_linear", [[i] for i in range(8)], 2, 1, **heads) == [[4], [5], [6], [7]]


# ---- where we differ on purpose: refusals ----


@pytest.mark.parametrize("name", ["sp_0", "sp_1", "sp_neg1", "ffn_sp_0", "ffn_sp_neg1"])
def test_remainders_are_refused(name):
    with pytest.raises(ViewError, match="does not divide by 4"):
        part(name, [[0] * 10] * 10, 4, 0)


def test_heads_are_not_cut():
    with pytest.raises(LayoutError, match="3 heads do not divide by tp 2"):
        part("get_sp_tensor", [[0] * 10], 2, 0, heads=3, kv_heads=1, head_dim=2)


def test_grids_that_do_not_fit():
    with pytest.raises(LayoutError, match=r"tp \* dp = 4 does not divide by ep 3"):
        _ = Cut(Placement(tp=2, dp=2, ep=3)).moe_tp
    assert Cut(Placement(tp=2, dp=2, ep=2, rank=3)).moe_tp == (1, 2)
