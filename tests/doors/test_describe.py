"""What inspect, plan and diff say, against what the tensors are."""

from __future__ import annotations

import itertools
import json
import struct
import tracemalloc

import fastckpt
import numpy as np
import pytest
import torch
from fastckpt.doors.plan_description import describe_plan, ranges
from fastckpt.doors.text import counted, size, spelled
from fastckpt.errors import SourceError
from fastckpt.planning.compiling import compile
from fastckpt.planning.copies import item_sizes
from safetensors.torch import save_file
from zero_writer import write_zero

# ---- inspect ----


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Stage 3, two ranks: a frozen parameter, a buffer, a tied pair."""
    path = tmp_path_factory.mktemp("describe") / "mixed"
    params = {"a.weight": torch.randn(5, 3), "b.weight": torch.randn(7), "c.frozen": torch.randn(3, 3)}
    extra = {"frozen": ["c.frozen"], "buffers": {"steps": torch.arange(4)}, "tied": {"d.weight": "a.weight"}}
    write_zero(path, params, stage=3, world=2, **extra)
    return path


def test_a_fact_of_many_words_is_cut(tmp_path):
    write_zero(tmp_path, {"w": torch.ones(2)}, stage=2, world=1, client={"loops": ["word"] * 200})
    shown = fastckpt.inspect(tmp_path).text()
    line = next(line for line in shown.splitlines() if "client_state" in line)
    assert len(line) < 500 and line.endswith("characters more with --json")


def test_inspection_counts(mixed):
    found = fastckpt.inspect(mixed)
    assert found.parameters == ("a.weight", "b.weight")
    assert (found.frozen, found.buffers) == (("c.frozen",), ("steps",))
    assert dict(found.tied) == {"d.weight": "a.weight"}
    assert dict(found.dtypes) == {"bfloat16": (1, 18), "float32": (2, 88), "int64": (1, 32)}
    assert (found.tensors, found.elements, found.nbytes) == (4, 35, 138)
    assert found.biggest[0] == ("a.weight", "float32", (5, 3), 60)
    assert dict(found.files) == {str(p): p.stat().st_size for p in (mixed / "global_step2").iterdir()}
    assert any("moments" in x for x in found.unread)
    assert any("ZeroStageEnum" in x for x in found.inert)
    assert (found.family, found.config) == (None, None)


def test_inspection_text_and_json_agree(mixed):
    found = fastckpt.inspect(fastckpt.open(mixed))
    as_json = json.loads(json.dumps(found.json()))
    text = found.text()
    for name in (*found.parameters, *found.frozen, *found.buffers):
        assert name in text
    assert "d.weight = a.weight" in text
    assert as_json["tied"] == {"d.weight": "a.weight"}
    assert as_json["bytes"] == found.nbytes
    assert as_json["facts"]["stage"] == 3


def test_inspect_takes_what_open_gives(mixed):
    opened = fastckpt.open(mixed, rename=[("weight", "w")], exclude_frozen=True)
    found = fastckpt.inspect(opened, biggest=1)
    assert found.parameters == ("a.w", "b.w")
    assert found.frozen == ()
    assert len(found.biggest) == 1
    with pytest.raises(SourceError):
        fastckpt.inspect(mixed / "absent")


def test_a_family_that_does_not_fit_says_why(mixed, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard"}))
    found = fastckpt.inspect(tmp_path)
    assert found.family is None
    assert "unheard" in found.family_note
    assert "unheard" in found.text()


# ---- plans ----


def byte_runs(row) -> int:
    """The contiguous byte ranges a row reads, counted byte by byte."""
    item = item_sizes([int(row["src_dtype"])])[0]
    seen: set[int] = set()
    for index in itertools.product(*(range(n) for n in row["shape"].tolist())):
        at = int(row["src"]) + sum(i * s for i, s in zip(index, row["src_stride"].tolist(), strict=True))
        seen.update(range(at, at + item))
    return sum(1 for byte in seen if byte - 1 not in seen)


@pytest.mark.parametrize(
    "view",
    [
        lambda v: v,
        lambda v: v.T,
        lambda v: v.narrow(1, 2, 3),
        lambda v: v.narrow(0, 1, 4).T,
        lambda v: v.split(1, 2).permute((1, 0, 2)),
        lambda v: v.split(0, 3).permute((1, 2, 0)),
        lambda v: v.narrow(1, 3, 1),
    ],
)
def test_ranges_of_a_row(view):
    from fastckpt.dtypes import float32
    from fastckpt.extents import Buffer, Extent, Extents
    from fastckpt.stored import strided
    from fastckpt.target import Target

    extents = Extents([Extent(Buffer(None, 0, 192), 0, 192, "x")])
    chunk, _ = compile([Target("x", view(strided(extents, 0, float32, (6, 8))))], extents)
    assert ranges(chunk.rows).tolist() == [byte_runs(row) for row in chunk.rows]


def test_a_plan_says_which_bytes_go_where(mixed):
    plan = fastckpt.plan(mixed, layout="same", max_shard_size=64)
    found = describe_plan(plan)
    placed = {t.name: t for t in found.tensors}
    assert list(placed) == ["steps", "c.frozen", "a.weight", "b.weight"]
    a = placed["a.weight"]
    assert (a.dtype, a.shape, a.nbytes) == ("float32", (5, 3), 60)
    # 15 elements over two ranks: 8 and 7, each one run.
    assert [(r.ranges, r.nbytes) for r in a.taken] == [(1, 32), (1, 28)]
    for run in a.taken:
        with open(run.path, "rb") as f:
            assert run.last - run.first == run.nbytes <= len(f.read())
    assert sum(n for _, n in found.sources().values()) == found.needed_bytes == plan.needed_bytes
    assert found.output_bytes == 138
    assert sum(count for _, _, count, _ in found.files) == 4
    assert {path for _, path, _, _ in found.files} == {f.path for f in plan.files}
    as_json = json.loads(json.dumps(found.json()))
    assert as_json["tensors"][2]["from"][1]["bytes"] == 28
    assert all(name in found.text() for name in placed)


def test_a_plan_s_bytes_are_the_tensor_s(mixed):
    """Reading the ranges that are told gives the tensor."""
    found = describe_plan(fastckpt.plan(mixed, layout="same"))
    want = fastckpt.reshard(mixed, layout="same", rank=0)
    for t in found.tensors:
        got = b""
        for run in t.taken:
            with open(run.path, "rb") as f:
                f.seek(run.first)
                got += f.read(run.last - run.first)
        assert got == want[t.name].contiguous().view(torch.uint8).numpy().tobytes()


def test_a_plan_of_one_rank(mixed):
    plan = fastckpt.plan(mixed, tp=3, rank=1, tp_plan={"a.weight": "rowwise", "*": "replicate"})
    found = describe_plan(plan)
    assert (found.ranks, {t.rank for t in found.tensors}) == ((1,), {1})
    # its tied name is cut otherwise, so it is whole
    assert found.needed_bytes == sum(t.nbytes for t in found.tensors) == 138 - 40 + 60


def test_zero_rows_have_no_source():
    config = {
        "model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 1, "hidden_size": 8,
        "intermediate_size": 8, "vocab_size": 5, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    matrices = [f"self_attn.{n}" for n in attention] + [f"mlp.{n}" for n in mlp]
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    state = {f"model.layers.0.{n}.weight": torch.randn(8, 8) for n in matrices}
    state |= {f"model.{n}.weight": torch.randn(8) for n in norms}
    state["model.embed_tokens.weight"] = torch.randn(5, 8)
    found = describe_plan(fastckpt.plan(state, tp=2, layout="vllm", config=config))
    pad = next(t for t in found.tensors if t.rank == 1 and "embed" in t.name)
    assert pad.taken == ()
    assert "<- zeros" in found.text()
    assert all(r.path == "memory" for t in found.tensors for r in t.taken)


# ---- diff ----


def saved(path, tensors, config=None):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_checkpoint_equals_itself_in_another_format(mixed, tmp_path):
    fastckpt.consolidate(mixed, tmp_path / "bin", dtype=None, durable=False)
    found = fastckpt.diff(mixed, tmp_path / "bin")
    assert found.equal, found.text()
    assert found.tensors >= 4


def test_names_and_shapes(tmp_path):
    a = saved(tmp_path / "a", {"x": torch.zeros(2), "y": torch.zeros(2, 3), "z": torch.zeros(1)})
    b = saved(tmp_path / "b", {"x": torch.zeros(2), "y": torch.zeros(3, 2), "w": torch.zeros(1)})
    found = fastckpt.diff(a, b)
    assert (found.only_a, found.only_b) == (("z",), ("w",))
    assert found.shapes == (("y", (2, 3), (3, 2)),)
    assert (found.unequal, found.tensors, found.equal) == ((), 1, False)
    assert found.json()["shapes"] == [{"name": "y", "shapes": [[2, 3], [3, 2]]}]


def differences(tmp_path, a, b):
    found = fastckpt.diff(saved(tmp_path / "a", {"x": a}), saved(tmp_path / "b", {"x": b}))
    assert not found.equal
    (unequal,) = found.unequal
    return unequal.max_abs, unequal.differing


def test_values_of_one_type(tmp_path):
    a = torch.randn(300_000)
    b = a.clone()
    b[7] += 1
    b[299_999] -= 3
    assert differences(tmp_path, a, b) == ((a.double() - b.double()).abs().max().item(), 2)


@pytest.mark.parametrize("other", ["bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "int32"])
def test_values_across_types(tmp_path, other):
    a = torch.randn(700_001) * 8
    b = a.to(getattr(torch, other))
    apart = (a.double() - b.double()).abs()
    assert differences(tmp_path, a, b) == (apart.max().item(), int((apart != 0).sum()))


def test_a_type_alone_is_a_difference(tmp_path):
    assert differences(tmp_path, torch.ones(9), torch.ones(9, dtype=torch.bfloat16)) == (0.0, 0)


def test_nan_equals_nan_and_nothing_else(tmp_path):
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([nan, nan, inf, inf, 0.0, 1.0])
    b = torch.tensor([nan, 1.0, inf, -inf, -0.0, 1.0])
    assert differences(tmp_path, a, b) == (inf, 2)
    json.loads(json.dumps(fastckpt.diff(tmp_path / "a", tmp_path / "b").json(), allow_nan=False))


def test_every_ranks_copy_counts_in_shards_cut_alike(tmp_path):
    """A model joined of shards has the first rank's copy of what all hold."""
    plan = {"up": "colwise", "norm": "replicate"}
    held = {"up": torch.randn(8, 4), "norm": torch.ones(5)}
    for name in "cd":
        fastckpt.reshard(held, 2, tp_plan=plan, out=tmp_path / name)
    assert fastckpt.diff(tmp_path / "c", tmp_path / "d").equal
    fastckpt.reshard(held, 1, tp_plan=plan, out=tmp_path / "whole")
    assert fastckpt.diff(tmp_path / "whole", tmp_path / "d").equal
    shard = tmp_path / "d/rank-01/model.safetensors"
    ones, twos = (x.numpy().tobytes() for x in (held["norm"], torch.full((5,), 2.0)))
    shard.write_bytes(shard.read_bytes().replace(ones, twos))
    assert [u.name for u in fastckpt.diff(tmp_path / "c", tmp_path / "d").unequal] == ["1/norm"]


def test_bits_that_are_no_values(tmp_path):
    assert differences(tmp_path, torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == (0.0, 0)


def test_integers_are_exact(tmp_path):
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    a, b = torch.tensor([low, 2**60, 5]), torch.tensor([high, 2**60 + 1, 5])
    assert differences(tmp_path, a, b) == (float(2**64 - 1), 2)


@pytest.mark.parametrize(
    ("dtype", "a", "b", "apart"),
    [
        ("complex32", [0x3C00, 0x4000, 0, 0], [0x3C00, 0x4000, 0x4200, 0x4400], 5.0),  # 1 + 2i, 0; 3 + 4i
        ("float8_e8m0fnu", [0x7F7F], [0x7F82], 3.0),  # no value that numpy has: the codes
    ],
)
def test_types_that_numpy_does_not_have(dtype, a, b, apart):
    a, b = (
        fastckpt.open({"x": torch.from_numpy(np.array(x, np.uint16)).view(getattr(torch, dtype))})
        for x in (a, b)
    )
    (unequal,) = fastckpt.diff(a, b).unequal
    assert (unequal.max_abs, unequal.differing) == (apart, 1) and fastckpt.diff(a, a).equal


def test_bools(tmp_path):
    assert differences(tmp_path, torch.tensor([True, False]), torch.tensor([True, True])) == (1.0, 1)


def test_empty_tensors_and_scalars(tmp_path):
    tensors = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.0), "x": torch.ones(2)}
    assert fastckpt.diff(saved(tmp_path / "a", tensors), saved(tmp_path / "b", tensors)).equal


def test_a_tied_name_that_one_side_leaves_out(tmp_path):
    path = tmp_path / "zero"
    write_zero(path, {"embed": torch.randn(4, 3)}, stage=3, world=2, tied={"head": "embed"})
    weights = fastckpt.consolidate(path)
    untied = saved(tmp_path / "untied", {"embed": weights["embed"]}, {"tie_word_embeddings": False})
    tied = saved(tmp_path / "tied", {"embed": weights["embed"]}, {"tie_word_embeddings": True})
    found = fastckpt.diff(path, tied)
    assert (found.equal, found.ties, found.only_a) == (True, ("head",), ())
    found = fastckpt.diff(path, untied)
    assert (found.equal, found.ties, found.only_a) == (False, (), ("head",))
    both = saved(tmp_path / "both", {"embed": weights["embed"], "head": weights["embed"] + 1})
    assert [u.name for u in fastckpt.diff(path, both).unequal] == ["head"]


def test_diff_tells_its_progress(tmp_path):
    a = saved(tmp_path / "a", {"x": torch.zeros(5), "y": torch.zeros(3)})
    told = []
    fastckpt.diff(a, a, progress=lambda *x: told.append(x))
    assert told == [(20, 32, "compare"), (32, 32, "compare")]


def test_text_lists_some_and_counts_the_rest(tmp_path):
    a = saved(tmp_path / "a", {f"t{i:02}": torch.zeros(1) for i in range(30)})
    b = saved(tmp_path / "b", {"x": torch.zeros(1)})
    text = fastckpt.diff(a, b).text()
    assert "only in a (30)" in text
    assert "... 10 more" in text
    assert "t29" not in text


def test_names_of_a_wrapper_are_told_with_the_way_out(tmp_path):
    a = saved(tmp_path / "a", {"x": torch.zeros(1)})
    b = saved(tmp_path / "b", {"_orig_mod.x": torch.zeros(1)})
    assert r"(--rename '_orig_mod\.=') takes it out" in fastckpt.diff(a, b).text()
    assert fastckpt.diff(a, b, rename=[(r"_orig_mod\.", "")]).equal


def test_words():
    assert [size(n) for n in (0, 999, 1000, 1_234_567)] == ["0 B", "999 B", "1.00 kB", "1.23 MB"]
    assert size(5 * 10**15) == "5000.00 TB"
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert spelled({"a": [1, True, None], "b": []}) == "a 1, yes, none, b none"


def test_memory_stays_small(tmp_path):
    """One 64 MiB tensor a side: comparing it must not hold it."""
    small = saved(tmp_path / "small", {"x": torch.zeros(1)})
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 24], "data_offsets": [0, 1 << 26]}}).encode()
    file = struct.pack("<Q", len(header)) + header + bytes(1 << 26)
    paths = [tmp_path / f"{side}.safetensors" for side in "ab"]
    for path in paths:
        path.write_bytes(file)
    assert fastckpt.diff(small, small).equal  # what is imported on the way does not count
    tracemalloc.start()
    try:
        assert fastckpt.diff(*paths).equal
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


def test_bits_that_differ_in_no_value_are_counted(tmp_path):
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    a = torch.cat([torch.tensor([0.0, 1.0, -0.0]), nan])
    b = torch.cat([torch.tensor([-0.0, 2.0, -0.0]), nan.flip(0)])
    one, two = ({"x": t, "y": t[:1].clone()} for t in (a, b))
    found = fastckpt.diff(saved(tmp_path / "a", one), saved(tmp_path / "b", two))
    assert [(u.name, u.differing, u.bits) for u in found.unequal] == [("x", 1, 3), ("y", 0, 1)]
    assert "x: float32, max abs diff 1, 1 element, 3 elements in bits alone" in found.text()
    assert "y: float32, all values equal, 1 element in bits alone" in found.text()
    found = fastckpt.diff(saved(tmp_path / "c", {"y": one["y"]}), saved(tmp_path / "d", {"y": two["y"]}))
    assert not found.equal and "different, but in no value: 1 tensor" in found.text()
    assert found.json()["unequal"][0]["bits"] == 1
