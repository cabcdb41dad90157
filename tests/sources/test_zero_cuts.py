"""What universal_checkpoint_info says of cuts: joined as DeepSpeed's own converter joins them, or refused."""

from __future__ import annotations

import re

import pytest
import torch
from fastckpt.errors import SourceError
from fastckpt.sources.zero.cuts import Cuts

NAME = "model.layers.0.w.weight"
EXACT = f"^{re.escape(NAME)}$"


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def join(info, parts, name=NAME):
    cut = Cuts(info, len(parts), "FILE").of(name, [tuple(p.shape) for p in parts])
    whole = torch.cat([parts[p.rank].narrow(cut.axis, p.start, p.length) for p in cut.pieces], cut.axis)
    assert tuple(whole.shape) == cut.shape
    for a, b in cut.same:
        one, other = (parts[p.rank].narrow(cut.axis, p.start, p.length) for p in (a, b))
        assert torch.equal(one, other)
    return whole


def refused(info, shapes, *words, name=NAME):
    with pytest.raises(SourceError) as e:
        Cuts(info, len(shapes), "FILE").of(name, shapes)
    for word in ("FILE", *words):
        assert word in str(e.value), str(e.value)


# ---- the lists ----

SUB = {"patterns": [EXACT], "shape": [(6, 2, 2), -1], "partition_dim": 0}
LISTS = {
    "default": ({}, [(3, 4), (5, 4)]),
    "rows": ({"parameter_with_row_parallelism_patterns": [r".*\.w\.weight"]}, [(4, 2), (4, 3)]),
    "replicated": ({"tp_replicated_parameter_patterns": [EXACT]}, [(4,), (4,)]),
    "averaged": ({"parameter_to_average_patterns": [r"model.layers.\d+.w.weight"]}, [(4,), (4,)]),
    "halves": ({"parameter_with_2_sub_params_cat_dim_0": [EXACT]}, [(6, 4), (2, 4), (4, 4)]),
    "vocabulary": ({"vocabulary_parameter_patterns": [EXACT], "original_vocab_size": 7}, [(4, 2), (4, 2)]),
    "vocabulary, uneven": (
        {"vocabulary_parameter_patterns": [EXACT], "original_vocab_size": 8}, [(2, 2), (5, 2), (3, 2)]),
    "one rank's rows alone": (
        {"vocabulary_parameter_patterns": [EXACT], "original_vocab_size": 3}, [(4, 2), (4, 2)]),
    "sub, old, a count": ({"parameter_with_sub_params": [SUB | {"shape": (3, -1)}]}, [(6, 4), (6, 4)]),
    "sub, old, sizes": ({"parameter_with_sub_params": [SUB]}, [(5, 4), (5, 4)]),
    "sub, widths": (
        {"universal_checkpoint_version": 0.4, "parameter_with_sub_params": [SUB],
         "sub_param_shard_widths": {EXACT: [[4, 2], [2, 0], [1, 1]]}}, [(7, 4), (3, 4)]),
    "sub, columns": (
        {"universal_checkpoint_version": 0.4,
         "parameter_with_sub_params": [SUB | {"shape": [4, (6, 2)], "partition_dim": 1}],
         "parameter_with_row_parallelism_patterns": [EXACT],
         "sub_param_shard_widths": {EXACT: [[2, 4], [1, 1]]}}, [(4, 3), (4, 5)]),
}  # fmt: skip


def parts_of(name, shapes):
    alike = name in ("replicated", "averaged")
    return [drawn(shape, 0 if alike else k) for k, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_joined_as_deepspeed_converts_them(name, tmp_path):
    convert = pytest.importorskip("deepspeed.checkpoint.ds_to_universal")
    info, shapes = LISTS[name]
    parts = parts_of(name, shapes)
    for rank, part in enumerate(parts):
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            convert._save_checkpoint(str(tmp_path / "cut" / NAME / str(rank) / f"{state}.00"), part.flatten())
    convert.merge_tp_slices(info, str(tmp_path / "whole"), str(tmp_path / "cut"), len(parts), (NAME, shapes))
    wanted = torch.load(tmp_path / "whole" / NAME / "fp32.pt", weights_only=False)["param"]
    assert torch.equal(join(info, parts), wanted)


# ---- the map ----


def maps(affine):
    """Maps of DeepSpeed's own builders: of wholes cut evenly, unevenly, by sub-parameters, not at all."""
    yield affine.replicated_map((3, 4), 3)
    yield affine.replicated_map((5,), 2)
    yield affine.replicated_map((), 2)
    for axis, sizes, shape in (
        (0, (2, 3), (5, 4)),
        (1, (1, 2, 1), (5, 4)),
        (0, (2, 0, 4), (6,)),
        (1, (1, 2), (2, 3, 2)),
    ):
        yield affine.contiguous_split_map(shape, sizes, axis)
    for axis, shape in ((0, (10, 3)), (1, (3, 10)), (0, (10,))):
        yield affine.sub_param_map(shape, (6, 2, 2), [[4, 2], [2, 0], [1, 1]], axis)
        yield affine.segmented_map(shape, [(6, False), (4, True)], axis, 2, [[4, 2]])
    yield affine.block_gather_map((8, 3), {0: [0, 1, 3], 1: [2]}, 2, 0)
    yield affine.block_gather_map((8,), {0: [3, 0], 1: [1, 2]}, 2, 0)


def test_maps_are_joined_as_deepspeed_cut_them():
    affine = pytest.importorskip("deepspeed.checkpoint.affine")
    for found in maps(affine):
        whole = drawn(found.logical_shape)
        parts = [found.extract(whole, rank) for rank in sorted(found.shard_shapes)]
        info = {"affine_map": {"version": 1, "params": {EXACT: found.to_dict()}}}
        if whole.dim():
            assert torch.equal(join(info, parts), whole), found
        else:
            assert Cuts(info, 2, "FILE").of(NAME, [(), ()]).shape == ()


def affine_info(**changes):
    """Two ranks with two rows each of [4, 3]; `changes` of the second one's piece."""
    pieces = [
        {"shape": [2, 3], "source": [6 * rank, [3, 1]], "dest": [0, [3, 1]], "locations": [rank]}
        for rank in (0, 1)
    ]
    pieces[1] |= changes
    ranks = {rank: {"shard_shape": [2, 3], "pieces": [piece]} for rank, piece in enumerate(pieces)}
    return {"affine_map": {"version": 1, "params": {EXACT: {"logical_shape": [4, 3], "ranks": ranks}}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": 0.5}, "0.5 times its value"),
        ({"source": [0, [3, 1]], "shape": [1, 3]}, "do not make [4, 3]"),
        ({"source": [3, [3, 1]]}, "do not make [4, 3]"),
        ({"source": [9, [3, 1]]}, "leaves [4, 3]"),
        ({"source": [7, [3, 1]]}, "leaves [4, 3]"),
        ({"source": [6, [1, 4]]}, "not read"),
        ({"source": [6, [3]]}, "not read"),
        ({"source": [-6, [3, 1]]}, "a piece"),
        ({"source": 6}, "a list"),
        ({"source": []}, "a piece"),
        ({"shape": [2, 3, 1]}, "a piece"),
        ({"shape": [2, 2]}, "axes [0, 1]"),
        ({"dest": [3, [3, 1]]}, "leaves [2, 3]"),
        ({"shape": [10**18, 3]}, "leaves"),
        ({"shape": [10**30, 3]}, "below 2^62"),
    ],
)
def test_maps_that_do_not_fit(changes, words):
    refused(affine_info(**changes), [(2, 3), (2, 3)], words)


def test_a_map_that_takes_a_part_s_rows_twice():
    info = affine_info()
    (piece,) = info["affine_map"]["params"][EXACT]["ranks"][1]["pieces"]
    rows = [piece | {"shape": [1, 3], "source": [k, [3, 1]], "dest": [0, [3, 1]]} for k in (6, 9)]
    info["affine_map"]["params"][EXACT]["ranks"][1]["pieces"] = rows
    refused(info, [(2, 3), (2, 3)], "rank 1: pieces [(0, 1), (0, 1)] do not make its [2, 3]")


def test_maps_of_other_ranks_shapes_and_versions():
    refused(affine_info(), [(2, 3), (3, 3)], "rank 1 holds [3, 3], not [2, 3]")
    refused(affine_info(), [(2, 3)] * 3, "wanted 3")
    refused({"affine_map": {"version": 2, "params": {}}}, [(2, 3)] * 2, "of version 2")
    refused({"affine_map": {"version": 1, "params": {EXACT: 3}}}, [(2, 3)] * 2, "wanted a dict")


# ---- what is not known ----


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (None, "is not there: nothing says along which axis"),
        ({"universal_checkpoint_version": 0.5}, "of version 0.5"),
        ({"universal_checkpoint_version": "x"}, "of version 'x'"),
        ({"expert_parameter_patterns": ["x"]}, "says expert_parameter_patterns"),
        ({"tp_replicated_parameter_patterns": [3]}, "wanted patterns, got 3"),
        ({"tp_replicated_parameter_patterns": "x"}, "wanted a list"),
        ({"tp_replicated_parameter_patterns": ["(a+)+b"]}, "is not read"),
        ({"tp_replicated_parameter_patterns": [".*.*.*x"]}, "is not read"),
        ({"tp_replicated_parameter_patterns": ["model.*", r".*\.w\..*"]}, "speak of it"),
        ({"vocabulary_parameter_patterns": [EXACT]}, "original_vocab_size None, padded None of [4, 4]"),
        ({"vocabulary_parameter_patterns": [EXACT], "original_vocab_size": 5}, "original_vocab_size 5"),
        ({"vocabulary_parameter_patterns": [EXACT], "original_vocab_size": True}, "original_vocab_size True"),
        ({"vocabulary_parameter_patterns": [EXACT], "original_vocab_size": 3, "padded_vocab_size": 8},
         "original_vocab_size 3, padded 8 of [4, 4]"),
        ({"affine_map": {"params": {"^other$": {}}}}, "neither affine_map nor a list speaks of it"),
        ({"parameter_with_sub_params": [SUB | {"shape": (10**15, -1)}]}, "equal parts of 4"),
        ({"parameter_with_sub_params": [SUB | {"shape": (3, -1)}]}, "3 equal parts of 4"),
        ({"parameter_with_sub_params": [SUB | {"shape": (0, -1)}]}, "0 equal parts of 4"),
        ({"parameter_with_sub_params": [SUB | {"shape": [(1, 3), -1]}]}, "nothing says how"),
        ({"parameter_with_sub_params": [SUB | {"shape": [(2, 2), 7]}]}, "axis 1 is said to be 7"),
        ({"parameter_with_sub_params": [SUB | {"shape": [(2, 2)]}]}, "partition_dim 0 of parts"),
        ({"universal_checkpoint_version": 0.4, "parameter_with_sub_params": [SUB]}, "wanted a list"),
        ({"universal_checkpoint_version": 0.4, "parameter_with_sub_params": [SUB],
          "sub_param_shard_widths": {EXACT: [[1, 1], [1, 1]]}}, "over 2 ranks, wanted those of"),
        ({"autotp_unsupported_parameter_patterns": {EXACT: "odd"}}, "cannot be undone: odd"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(info, words):
    refused(info, [(2, 4), (2, 4)], words)


def test_shapes_that_do_not_fit_what_is_said():
    refused({"tp_replicated_parameter_patterns": [EXACT]}, [(2,), (3,)], "whole on every rank")
    refused({}, [(2, 3), (2, 4)], "along axis 0")
    refused({}, [(), ()], "cut along axis 0")
    refused({}, [(2, 3), (2,)], "parts of shapes")
    refused({"parameter_with_row_parallelism_patterns": [EXACT]}, [(2,), (2,)], "cut along axis 1")
    refused({"parameter_with_2_sub_params_cat_dim_0": [EXACT]}, [(3, 2), (2, 2)], "two parts in")


def test_one_rank_holds_the_whole():
    cut = Cuts(None, 1, "FILE").of(NAME, [(3, 4)])
    assert cut.shape == (3, 4) and not cut.same


MEGATRON = {  # what Megatron-DeepSpeed's GPTModelPipe says of itself
    "universal_checkpoint_version": 0.2,
    "original_vocab_size": 7,
    "padded_vocab_size": 8,
    "vocabulary_parameter_patterns": [r"tied_modules.embed.word_embeddings.weight"],
    "pipeline_replicated_parameter_patterns": [
        r"tied_modules.embed.word_embeddings.weight",
        r"tied_modules.embed.position_embeddings.weight",
    ],
    "tp_replicated_parameter_patterns": [
        r"tied_modules.embed.position_embeddings.weight",
        r"\d+.input_layernorm.weight",
        r"\d+.self_attention.dense.bias",
        r"\d+.weight",
        r"\d+.bias",
    ],
    "parameter_with_row_parallelism_patterns": [
        r"\d+.mlp.dense_4h_to_h.weight",
        r"\d+.self_attention.dense.weight",
    ],
}


@pytest.mark.parametrize(
    ("name", "shape", "whole"),
    [
        ("tied_modules.embed.word_embeddings.weight", (4, 3), (7, 3)),
        ("tied_modules.embed.position_embeddings.weight", (4, 3), (4, 3)),
        ("3.input_layernorm.weight", (4,), (4,)),
        ("31.self_attention.query_key_value.weight", (6, 4), (12, 4)),
        ("31.self_attention.query_key_value.bias", (6,), (12,)),
        ("31.self_attention.dense.weight", (4, 2), (4, 4)),
        ("31.self_attention.dense.bias", (4,), (4,)),
        ("3.mlp.dense_h_to_4h.weight", (8, 4), (16, 4)),
        ("3.mlp.dense_4h_to_h.weight", (4, 8), (4, 16)),
        ("32.weight", (4,), (4,)),
    ],
)
def test_the_lists_of_megatron_deepspeed(name, shape, whole):
    cuts = Cuts(MEGATRON, 2, "FILE")
    assert cuts.of(name, [shape, shape]).shape == whole
    assert cuts.over_stages(name) == name.startswith("tied_modules")


def test_lists_that_match_nothing():
    """Megatron-DeepSpeed says the same of a model without a pipeline, whose names are others."""
    names = ["language_model.encoder.layers.0.input_layernorm.weight", "language_model.output_layer.weight"]
    with pytest.raises(SourceError, match=r"tp_replicated_parameter_patterns matches no parameter"):
        Cuts(MEGATRON, 2, "FILE").check_used(names)
    Cuts(MEGATRON, 2, "FILE").check_used(["3.input_layernorm.weight", "3.mlp.dense_4h_to_h.weight"])
    Cuts(MEGATRON, 1, "FILE").check_used(names)  # what is cut over one rank is whole
