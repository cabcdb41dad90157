"""Files that FSDP's ranks save by themselves: what torch wrote, every way to cut a tensor, and broken ones.

tests/fixtures/fsdp holds what real/make_fsdp.py wrote with torch 2.6.0 and 2.13.0, and the tensors as torch
gathered them.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt import cli, sources
from fastckpt.dtypes import float32
from fastckpt.errors import SourceError
from fastckpt.sources.distributed import Boxed, Cut, Meshed, boxes_of, part_of
from fastckpt.sources.torchfile import Inert, Storage, Tensor
from layouts import tiny
from reading import refuses_a_copy_that_differs
from safetensors.torch import load_file
from torch.distributed.tensor import placement_types

pytest.importorskip("lzma")  # of the fixtures; a Python may be built without it
FIXTURES = Path(__file__).parents[1] / "fixtures" / "fsdp"
VERSIONS = sorted(p.name.removesuffix(".tar.xz") for p in FIXTURES.glob("*.tar.xz"))
CASES = ["fsdp2", "hsdp", "tp", "columns", "fsdp1", "fsdp1_mesh"]


@pytest.fixture(scope="session")
def unpacked(packed):
    """Where the cases of a version lie."""
    return partial(packed, "fsdp")


@pytest.fixture
def case(unpacked, tmp_path):
    """A copy of a case that may be broken."""
    return lambda name: Path(shutil.copytree(unpacked("torch-2.13.0") / name, tmp_path / name))


def rank_file(root, rank, world=4):
    return root / f"model_world_size_{world}_rank_{rank}.pt"


def check(root):
    want = load_file(root / "truth.safetensors")
    found = fastckpt.open(root)
    got = fastckpt.reshard(found, layout="same")[0]
    assert sorted(got) == sorted(want)
    assert all(got[n].dtype == want[n].dtype and torch.equal(got[n], want[n]) for n in want)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_torch_gathers(unpacked, version, name):
    found = check(unpacked(version) / name)
    assert found.format == "fsdp" and found.facts["ranks"] == 4
    if name in ("fsdp2", "hsdp", "tp"):
        assert dict(found.aliases) == {"head.weight": "words.weight"}


@pytest.mark.nightly
def test_what_the_installed_torch_writes(tmp_path):
    made = Path(__file__).parents[1] / "real/make_fsdp.py"
    subprocess.run([sys.executable, made, tmp_path], check=True, timeout=900)
    for name in CASES:
        check(tmp_path / name)


# ---- where a run puts them ----


def llama(root, world=2):
    """A save as verl has it: rows of a Llama's matrices over `world` ranks."""
    config, tensors, _ = tiny.made("llama")
    (root / "huggingface").mkdir(parents=True)
    (root / "huggingface/config.json").write_text(json.dumps(config))
    (root / "huggingface/tokenizer.json").write_text("{}")
    (root / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}))
    for rank in range(world):
        torch.save({n: dtensor(t, rank, world) for n, t in tensors.items()}, rank_file(root, rank, world))
        torch.save({}, root / f"optim_world_size_{world}_rank_{rank}.pt")
    return tensors, config


def dtensor(tensor, rank, world):
    """A DTensor of rows, as the rank that has them would make it, without a group of processes."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mesh = object.__new__(DeviceMesh)
    mesh.__dict__.update({"_coordinate_on_dim": (rank,), "_mesh_dim_names": ("fsdp",)})
    spec = object.__new__(DTensorSpec)
    meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
    spec.__dict__.update({"mesh": mesh, "placements": (Shard(0),), "tensor_meta": meta})
    local = tensor.chunk(world)[rank].clone()
    out = torch.Tensor._make_wrapper_subclass(DTensor, tensor.size(), dtype=tensor.dtype)
    out._local_tensor, out._spec = local, spec
    return out


def test_the_directories_of_a_run(tmp_path, capsys):
    tensors, _ = llama(tmp_path / "global_step_20/actor")
    shutil.copytree(tmp_path / "global_step_20/actor", tmp_path / "global_step_20/critic")
    shutil.copytree(tmp_path / "global_step_20", tmp_path / "global_step_10")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    for path in (tmp_path, tmp_path / "global_step_20", tmp_path / "global_step_20/actor"):
        found = fastckpt.open(path)
        assert found.files[0].path.startswith(str(tmp_path / "global_step_20/actor"))
        got = fastckpt.reshard(found, layout="same")[0]
        assert all(torch.equal(got[n], t) for n, t in tensors.items())
    assert "critic: another model" in fastckpt.open(tmp_path).unread
    assert "optim_world_size_*: 2 files of ranks" in fastckpt.open(tmp_path).unread
    for tag in ("10", "global_step_10"):
        assert "global_step_10/actor" in fastckpt.open(tmp_path, tag=tag).files[0].path
    for path, tag, why in (
        (tmp_path, "30", "no save '30'; there is global_step_10, global_step_20"),
        (tmp_path, "../x", "'../x' is no save"),
        (tmp_path, "actor", "'actor' is no save"),
        (tmp_path / "global_step_20", "10", "no save '10'; there is none"),
    ):
        with pytest.raises(SourceError, match=why):
            fastckpt.open(path, tag=tag)
    for path in (tmp_path / "global_step_20").glob("*/model_*"):
        path.unlink()  # interrupted: its predecessor is not taken in its place
    with pytest.raises(SourceError, match="global_step_20: no model_world_size_N_rank_R"):
        fastckpt.open(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "fsdp" in capsys.readouterr().out


@pytest.mark.parametrize(("layout", "tp"), [("hf", 1), ("vllm", 2), ("rtp_llm", 2)])
def test_shards_are_those_of_the_whole_model(tmp_path, layout, tp):
    tensors, config = llama(tmp_path / "actor", world=3)
    want = fastckpt.reshard(tensors, tp=tp, layout=layout, config=config)
    got = fastckpt.reshard(tmp_path / "actor", tp=tp, layout=layout)
    for a, b in zip(got, want, strict=True):
        assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in b)
    fastckpt.reshard(tmp_path, out=tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").exists()


def test_files_of_several_nodes(case, tmp_path):
    root = case("tp")
    (tmp_path / "node1").mkdir()
    for rank in (2, 3):
        shutil.move(rank_file(root, rank), tmp_path / "node1")
    with pytest.raises(
        SourceError, match=r"files of 2 of 4 ranks missing: rank 2, 3; .* which also= \(--also\) names"
    ):
        fastckpt.open(root)
    want = load_file(root / "truth.safetensors")
    got = fastckpt.reshard(fastckpt.open(root, also=[tmp_path / "node1"]), layout="same")[0]
    assert all(torch.equal(got[n], want[n]) for n in want)
    shutil.copy(rank_file(root, 1), tmp_path / "node1")
    with pytest.raises(SourceError, match=r"rank 1 is in .* too"):
        fastckpt.open(root, also=[tmp_path / "node1"])


@pytest.mark.parametrize("name", CASES)
def test_accelerate_s_names_do_not_say_of_how_many(case, name):
    root = case(name)
    for rank in range(4):
        rank_file(root, rank).rename(root / f"pytorch_model_fsdp_0_rank{rank}.bin")
    (root / "pytorch_model_fsdp_1_rank0.bin").write_bytes(b"")
    assert "pytorch_model_fsdp_1_rank*: 1 files of ranks" in check(root).unread
    (root / "pytorch_model_fsdp_0_rank3.bin").unlink()
    with pytest.raises(SourceError, match="of 3 ranks: "):
        fastckpt.open(root)
    (root / "pytorch_model_fsdp_0_rank0.bin").unlink()
    with pytest.raises(SourceError, match="files of 1 of 3 ranks missing: rank 0"):
        fastckpt.open(root)


def test_one_rank_s_file_by_itself(tmp_path):
    part = dtensor(torch.ones(4, 2), 0, 2)
    torch.save({"w": part}, tmp_path / "rank0.pt")
    with pytest.raises(
        SourceError, match=r"w: is the part of one rank \(torch.*DTensor\).*model_world_size_N"
    ):
        fastckpt.open(tmp_path / "rank0.pt")
    torch.save({"a._flat_param": part}, tmp_path / "rank0.pt")
    with pytest.raises(SourceError, match=r"flat parameters .*save SHARDED_STATE_DICT or FULL_STATE_DICT"):
        fastckpt.open(tmp_path / "rank0.pt")


# ---- every way to cut ----


def held(shape, at=0):
    stride, n = [], 1
    for size in reversed(shape):
        stride.insert(0, n)
        n *= size
    return Tensor(Storage(str(at), float32, n, 0), float32, 0, tuple(shape), tuple(stride))


def cut_by_torch(tensor, mesh, placements, coordinate):
    """The part at a coordinate, cut by torch's own placements from the mesh's first axis to its last."""
    for placement, count, at in zip(placements, mesh, coordinate, strict=True):
        if placement is not None:
            parts, _ = placement._split_tensor(tensor, count, with_padding=False, contiguous=False)
            tensor = parts[at] if at < len(parts) else tensor.narrow(placement.dim, 0, 0)
    return tensor


def region(begin, size):
    return tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))


def test_every_cut_is_torch_s():
    chosen = random.Random(5)
    strided = refused = 0
    for _ in range(600):
        shape = [chosen.choice([1, 2, 3, 4, 6, 7, 8, 12, 24]) for _ in range(chosen.randint(1, 3))]
        mesh = [chosen.choice([1, 2, 3, 4]) for _ in range(chosen.randint(1, 3))]
        placements = []
        for _ in mesh:
            axis, factor = chosen.randrange(len(shape)), chosen.choice([1, 1, 2, 3])
            kinds = [
                None, placement_types.Shard(axis), placement_types._StridedShard(axis, split_factor=factor)
            ]  # fmt: skip
            placements.append(chosen.choice(kinds))
        whole = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
        coordinates = [*itertools.product(*map(range, mesh))]
        cuts = tuple(None if p is None else Cut(p.dim, getattr(p, "split_factor", 1)) for p in placements)
        try:
            locals_ = [cut_by_torch(whole, mesh, placements, c) for c in coordinates]
        except (AssertionError, RuntimeError):
            continue  # torch refuses it
        parts = {
            r: Meshed(tuple(shape), held(t.shape, r), c, cuts)
            for r, (t, c) in enumerate(zip(locals_, coordinates, strict=True))
        }
        out = torch.full(shape, -1.0)
        try:
            boxes = list(boxes_of(parts))
        except SourceError as e:
            assert "in doubt" in str(e) and any(c and c.factor > 1 for c in cuts)
            refused += 1
            continue
        for box in boxes:
            out[region(box.origin, box.size)] = locals_[box.rank][region(box.start, box.size)]
        assert torch.equal(out, whole), (shape, mesh, placements)
        strided += any(c and c.factor > 1 for c in cuts)
    assert strided > 20 and refused > 20


# ---- what is wrong ----


def test_parts_that_do_not_fit():
    cuts = (Cut(0),)
    good = {r: Meshed((4, 2), held((2, 2)), (r,), cuts) for r in range(2)}
    assert len(list(boxes_of(good))) == 2
    for parts, why in (
        ({0: good[0], 1: Meshed((4, 2), held((1, 2)), (1,), cuts)}, r"rank 1 holds \[1, 2\]; .* is \[2, 2\]"),
        ({0: good[0], 1: Meshed((4, 3), held((2, 3)), (1,), cuts)}, "several forms or shapes"),
        ({0: good[0], 1: Boxed((4, 2), ())}, "several forms or shapes"),
        ({0: good[0], 1: Meshed((4, 2), held((4, 1)), (1,), (Cut(1),))}, "several placements"),
        ({1: Meshed((4, 2), held((2, 2)), (1,), cuts)}, "are missing"),
    ):
        with pytest.raises(SourceError, match=why):
            list(boxes_of(parts))


def dtensor_tree(**changes):
    mesh = Inert("torch.distributed.device_mesh.DeviceMesh", state={"_coordinate_on_dim": [0]})
    shard = Inert("torch.distributed.tensor.placement_types.Shard", state={"dim": 0})
    spec = {"mesh": mesh, "placements": (shard,)} | changes
    name = "torch.distributed.tensor._dtensor_spec.DTensorSpec"
    state = {"_local_tensor": held((2, 2)), "_spec": Inert(name, state=spec)}
    kind = Inert("torch.distributed.tensor.DTensor")
    func = Inert("torch._utils._rebuild_wrapper_subclass")
    return Inert("torch._tensor._rebuild_from_type_v2", (func, kind, (kind, float32, (2, 2)), (None, state)))


def test_records_that_are_not_read():
    part = part_of(dtensor_tree())
    assert isinstance(part, Meshed)
    assert (part.shape, part.local.shape, part.coordinate, part.cuts) == ((2, 2), (2, 2), (0,), (Cut(0),))
    partial = Inert("torch.distributed.tensor.placement_types.Partial", state={"reduce_op": "sum"})
    for changes, why in (
        ({"placements": (partial,)}, "Partial is not"),
        ({"placements": (Inert("x.Shard"),)}, "wanted fields"),
        ({"placements": (Inert("x.Shard", state={"dim": 2}),)}, "2 axes cut along axis 2"),
        ({"placements": (Inert("x._StridedShard", state={"dim": 0, "split_factor": 1 << 40}),)}, "runs"),
        ({"placements": ()}, "0 placements"),
        ({"placements": None}, "placements: wanted a list"),
        ({"mesh": Inert("m", state={"_coordinate_on_dim": None})}, "coordinate in its mesh"),
        ({"mesh": Inert("m", state={"_coordinate_on_dim": [-1]})}, "coordinate in its mesh"),
        ({"mesh": None}, "wanted an object of torch.distributed"),
        ({"shard_order": (Inert("x.ShardOrderEntry", (0, (1, 0))),)}, "another order"),
        ({"shard_order": (Inert("x.ShardOrderEntry"),)}, "another order"),
    ):
        with pytest.raises(SourceError, match=why):
            part_of(dtensor_tree(**changes))
    for (changed, func), why in (
        (({"_local_tensor": 3}, None), "a DTensor's part is int"),
        (
            ({}, Inert("torch._utils._rebuild_tensor_v2")),
            "DTensor made by torch._utils._rebuild_tensor_v2 is",
        ),
    ):
        whole = dtensor_tree()
        made, kind, args, (_, state) = whole.args
        with pytest.raises(SourceError, match=why):
            part_of(replace(whole, args=(func or made, kind, args, (None, state | changed))))
    assert part_of(Inert("torch._tensor._rebuild_from_type_v2", ())) is None
    assert part_of(3) is None


def sharded_tree(kind="_shard.sharded_tensor.api.ShardedTensor", tensor=None, **record):
    said = {"shard_offsets": [0, 0], "shard_sizes": [2, 2]} | record
    metadata = Inert("torch.distributed._shard.metadata.ShardMetadata", state=said)
    shard = {"tensor": held((2, 2)) if tensor is None else tensor, "metadata": metadata}
    shards = [Inert("torch.distributed._shard.sharded_tensor.shard.Shard", state=shard)]
    kind, func = Inert(f"torch.distributed.{kind}"), Inert("torch._utils._rebuild_wrapper_subclass")
    return Inert("torch._tensor._rebuild_from_type_v2", (func, kind, (kind, float32, (4, 2)), (shards,)))


def test_sharded_tensors_that_are_not_read():
    part = part_of(sharded_tree())
    assert isinstance(part, Boxed) and (part.shape, part.boxes[0][0]) == ((4, 2), (0, 0))
    for changes, why in (
        ({"kind": "nn.Other"}, "a tensor of torch.distributed.nn.Other is not read"),
        ({"tensor": 3}, "part is int"),
        ({"shard_sizes": [2, 1]}, r"part has \[2, 2\], its record says \[2, 1\] at \[0, 0\] of \[4, 2\]"),
        ({"tensor": held((2,)), "shard_sizes": [2]}, r"part has \[2\], its record says \[2\] at \[0, 0\] of"),
        ({"shard_offsets": [0]}, r"part has \[2, 2\], its record says \[2, 2\] at \[0\] of \[4, 2\]"),
    ):
        with pytest.raises(SourceError, match=why):
            part_of(sharded_tree(**changes))


def test_files_that_do_not_fit(case, tmp_path):
    for name, breaks, why in (
        ("fsdp2", lambda d: rank_file(d, 3).unlink(), "files of 1 of 4 ranks missing: rank 3"),
        ("hsdp", lambda d: shutil.copy(rank_file(d, 0), rank_file(d, 0, 2)), r"world sizes \[2, 4\]"),
        ("tp", lambda d: shutil.copy(rank_file(d, 0), rank_file(d, 4)), "of rank 4, but the run had 4 ranks"),
        ("columns", lambda d: shutil.copy(rank_file(d, 0), rank_file(d, 1)), "missing"),
        ("fsdp1", lambda d: shutil.copy(rank_file(d, 0), rank_file(d, 1)), "its boxes have"),
        (
            "fsdp1_mesh",
            lambda d: (d / "fsdp_config.json").write_text('{"world_size": 8}'),
            "world_size 8, the files are of 4",
        ),
    ):
        root = case(name)
        breaks(root)
        with pytest.raises(SourceError, match=why):
            fastckpt.open(root)


def resaved(root, rank, change):
    state = torch.load(rank_file(root, rank), weights_only=False)
    change(state)
    torch.save(state, rank_file(root, rank))


@pytest.mark.parametrize("rank", [1, 3])
def test_ranks_of_two_saves(case, rank):
    """What two ranks hold must be one: a buffer, and the copies of pairs of ranks."""
    root = case("hsdp")
    resaved(root, rank, lambda state: state["places"].add_(1))
    with pytest.raises(SourceError, match=f"places, which ranks 0 and {rank} both hold: two values"):
        fastckpt.open(root)


def test_one_element_that_differs(case):
    refuses_a_copy_that_differs(case("hsdp"))


def plain(root, states):
    root.mkdir()
    for rank, state in enumerate(states):
        torch.save(state, rank_file(root, rank, len(states)))
    return root


def test_a_world_beyond_any_run(tmp_path):
    root = plain(tmp_path / "a", [{"w": torch.ones(2)}])
    rank_file(root, 0, 1).rename(rank_file(root, 0, 10**12))
    with pytest.raises(SourceError, match="999999999999 of 1000000000000 ranks missing: rank 1, 2"):
        fastckpt.open(root)


def test_tensors_that_every_rank_has_whole(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    root = plain(tmp_path / "a", [{"w": w, "none": torch.empty(0, 3)}] * 2)
    got = fastckpt.reshard(fastckpt.open(root), layout="same")[0]
    assert torch.equal(got["w"], w) and got["none"].shape == (0, 3)
    for k, (second, why) in enumerate((
        ({"w": w + 1}, "two values"),
        ({"w": w.reshape(3, 2)}, "whole, in shapes"),
        ({"w": w.double()}, "dtypes .'float32', 'float64'."),
        ({"v": w}, "only one of ranks 0 and 1 holds v"),
        ({3: w}, "a tensor's name is 3"),
        ([w], "wanted a state dict, got list"),
        ({"w": dtensor(w, 1, 2)}, "whole on rank 0, a part of it on rank 1"),
        ({"w": w.to_sparse()}, "is not read"),
        ({"w": w, "more": {"deep": [w]}}, "more: holds a tensor"),
    )):  # fmt: skip
        with pytest.raises(SourceError, match=why):
            fastckpt.open(plain(tmp_path / f"b{k}", [{"w": w}, second]))
    with pytest.raises(SourceError, match="its ranks hold no tensor"):
        fastckpt.open(plain(tmp_path / "none", [{"step": 3}] * 2))
    for path in root.iterdir():
        path.unlink()
    torch.save({"w": w}, rank_file(root, 0, 10**15))
    with pytest.raises(SourceError, match=f"files of {10**15 - 1} of {10**15} ranks missing: rank 1, 2, "):
        fastckpt.open(root)


def test_names_of_ranks_may_be_swapped(case):
    """Where a part lies is in the file, not in its name."""
    root = case("tp")
    rank_file(root, 1).rename(root / "x")
    rank_file(root, 2).rename(rank_file(root, 1))
    (root / "x").rename(rank_file(root, 2))
    check(root)


def test_options_that_mean_nothing(case):
    root = case("fsdp2")
    for options in ({"weights": "module"}, {"exclude_frozen": True}, {"tag": "3"}):
        with pytest.raises(SourceError, match=r"asked for|no save '3'"):
            sources.open(root, **options)
    sources.open(root, check_crc=True)
