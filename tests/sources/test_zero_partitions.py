"""The offsets of ZeRO partitions against worked examples from real files, and lengths that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastckpt import dtypes
from fastckpt.errors import SourceError
from fastckpt.extents import Buffer, Extent, Extents
from fastckpt.sources.zero.partitions import Flat, chained, sliced
from zero_writer import aligned_partition, alignment_paddings, cut, sub_groups

FIRST = {"conv.weight": (7, 13, 3), "up.weight": (13, 7), "head.weight": (53, 13)}
SECOND = {"scale": (1,), "norm.weight": (13,), "norm.bias": (13,), "conv.bias": (7,), "up.bias": (13,)}


def flats(lengths):
    """Groups whose rank r is extent r; offsets zero; [(lengths of ranks), ...]."""
    table = Extents(Extent(Buffer(None, 0, 1 << 30), 0, 1 << 30, str(r)) for r in range(len(lengths[0])))
    ranks = np.arange(len(lengths[0]), dtype=np.int64)
    return [Flat(dtypes.float32, ranks, ranks * 0, np.array(n, np.int64)) for n in lengths], table


def entries(layout, table):
    return {name: entry for placed in layout for name, entry in placed.entries(table).items()}


def pieces(layout, name, table):
    """(rank, first element, elements) of each piece of a parameter."""
    v = entries(layout, table)[name].build()
    flat = v.reshape((v.numel,))
    assert flat.origin[:, 0].tolist() == [int(n) for n in np.cumsum([0, *flat.size[:, 0]])[:-1]]
    runs = zip(flat.extent, flat.offset, flat.size[:, 0], strict=True)
    return [(int(e), int(o), int(n)) for e, o, n in runs]


def test_stage_2_over_three_ranks():
    groups, table = flats([(352, 352, 349), (16, 16, 15)])
    layout = chained([FIRST, SECOND], None, groups, "here")
    assert pieces(layout, "up.weight", table) == [(0, 273, 79), (1, 0, 12)]
    assert pieces(layout, "head.weight", table) == [(1, 12, 340), (2, 0, 349)]
    assert pieces(layout, "norm.bias", table) == [(0, 14, 2), (1, 0, 11)]
    assert pieces(layout, "conv.bias", table) == [(1, 11, 5), (2, 0, 2)]
    assert pieces(layout, "up.bias", table) == [(2, 2, 13)]
    assert entries(layout, table)["head.weight"].build().shape == (53, 13)


def test_parameter_alignment_is_counted():
    groups, table = flats([(20, 20, 19), (4, 4, 1)])
    shapes = [{"a.weight": (5, 7), "b.weight": (3, 5), "c.weight": (3,)}, {"d": (5,), "e": (1,)}]
    layout = chained(shapes, [(5, 1, 0), (3, 0)], groups, "here")
    assert pieces(layout, "a.weight", table) == [(0, 0, 20), (1, 0, 15)]
    assert pieces(layout, "b.weight", table) == [(2, 0, 15)]
    assert pieces(layout, "c.weight", table) == [(2, 16, 3)]
    assert pieces(layout, "e", table) == [(2, 0, 1)]
    with pytest.raises(SourceError, match="group 0 holds 59 elements"):
        chained(shapes, None, groups, "here")


def test_bf16_optimizer_keeps_its_padding():
    groups, table = flats([(18, 18, 18), (2, 2, 2)])
    shapes = [{"a.weight": (5, 7), "b.weight": (3, 5), "c.weight": (3,)}, {"d": (5,), "e": (1,)}]
    layout = chained(shapes, None, groups, "here")
    assert pieces(layout, "b.weight", table) == [(1, 17, 1), (2, 0, 14)]


@pytest.mark.parametrize(
    ("numel", "world", "lengths"),
    [
        (83760, 5, [16752] * 5),
        (696, 5, [140, 140, 140, 140, 136]),
        (1100, 3, [368, 368, 364]),
        (5, 4, [2, 2, 1, 0]),
        (1, 3, [1, 0, 0]),
    ],
)
def test_lengths_of_real_files_are_what_the_writer_makes_and_the_reader_takes(numel, world, lengths):
    _, pads = cut(torch.zeros(numel), world)
    part = aligned_partition(numel, world)
    assert [part - p for p in pads] == lengths
    groups, table = flats([lengths])
    layout = chained([{"x": (numel,)}], None, groups, "here")
    assert sum(n for _, _, n in pieces(layout, "x", table)) == numel


def test_stage_3_over_three_ranks():
    groups, table = flats([(352,) * 3, (19,) * 3])
    layout = sliced([FIRST, SECOND], groups, "here")
    assert pieces(layout, "up.weight", table) == [(0, 91, 31), (1, 91, 31), (2, 91, 29)]
    assert pieces(layout, "head.weight", table) == [(0, 122, 230), (1, 122, 230), (2, 122, 229)]
    assert pieces(layout, "scale", table) == [(0, 0, 1)]
    assert pieces(layout, "conv.bias", table) == [(0, 11, 3), (1, 11, 3), (2, 11, 1)]


def test_stage_3_pad_may_fill_whole_ranks():
    groups, table = flats([(3,) * 5])
    layout = sliced([{"bias": (12,)}], groups, "here")
    assert pieces(layout, "bias", table) == [(r, 0, 3) for r in range(4)]


def test_stage_3_sub_groups_are_one_stream():
    """A dict a flat group, a dict an optimizer group, and one flat group for all read alike."""
    a, b, c = {"a": (7,), "b": (9,)}, {"c": (5,)}, {"d": (2,)}
    groups, _ = flats([(9,) * 2, (3,) * 2, (1,) * 2])

    def starts(shapes, flats):
        layout = sliced(shapes, flats, "here")
        return [dict(zip(p.names, p.start.tolist(), strict=True)) for p in layout]

    want = [{"a": 0, "b": 4}, {"c": 0}, {"d": 0}]
    assert starts([a, b, c], groups) == want
    assert starts([a | b, c], groups) == want
    assert starts([a | b | c], groups) == want
    whole, _ = flats([(13,) * 2])
    assert starts([a, b, c], whole) == [{"a": 0, "b": 4, "c": 9, "d": 12}]


def test_stage_3_refuses_a_parameter_across_flat_groups():
    groups, _ = flats([(6,) * 2, (7,) * 2])
    with pytest.raises(
        SourceError, match=r"b \[9\] needs elements \[4, 9\) of each rank's flat group 0, which has 6"
    ):
        sliced([{"a": (7,), "b": (9,), "c": (8,)}], groups, "here")


@pytest.mark.parametrize("lengths", [(9, 9, 8), (8, 8, 8), (10, 10, 10)])
def test_stage_3_lengths_that_do_not_fit(lengths):
    groups, _ = flats([lengths])
    with pytest.raises(SourceError, match="here"):
        sliced([{"a": (13,), "b": (12,)}], groups, "here")


@pytest.mark.parametrize(
    "lengths",
    [
        (352, 352, 348),  # one element short
        (352, 352, 350),  # one too many, yet not padded
        (352, 349, 352),  # the short one is not the last
        (354, 354, 354),  # a larger world's padding
        (0, 352, 352),
    ],
)
def test_stage_2_lengths_that_do_not_fit(lengths):
    groups, _ = flats([lengths])
    with pytest.raises(SourceError, match=r"group 0 holds .* its 3 parameters need 1053"):
        chained([FIRST], None, groups, "here")


def test_old_files_cut_without_alignment():
    groups, table = flats([(351, 351, 351)])
    layout = chained([FIRST], None, groups, "here")
    assert pieces(layout, "up.weight", table) == [(0, 273, 78), (1, 0, 13)]


def test_groups_must_be_as_many():
    groups, _ = flats([(352, 352, 349)])
    with pytest.raises(SourceError, match="2 groups in param_shapes, 1 groups of masters"):
        chained([FIRST, SECOND], None, groups, "here")


def test_the_writer_closes_sub_groups_as_deepspeed_does():
    numel = {n: 2568 * 2 for n in "abcdefgh"}
    assert sub_groups("abcdefgh", numel, 2, 10001) == [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    assert sub_groups("abcdefgh", numel, 2, None) == [list("abcdefgh")]
    assert alignment_paddings([35, 15, 3], 8) == [5, 1, 0]
