"""The whole road, from a ZeRO checkpoint or tensors to every end, against torch alone."""

import errno
import fcntl
import itertools
import json
import os
import shutil
import subprocess
from functools import partial

import fastckpt
import numpy as np
import pytest
import torch
from fastckpt import dtypes, road, sources, stored
from fastckpt.dtypes import BY_NAME, DTYPES
from fastckpt.errors import (
    DeviceError,
    FastckptError,
    LayoutError,
    RecipeError,
    SourceError,
    ViewError,
    WriteError,
)
from fastckpt.executors import pick
from fastckpt.executors.cpu import built
from fastckpt.layouts import Naming
from fastckpt.layouts.same import Same
from fastckpt.output.writer import Output
from fastckpt.planning import plans
from fastckpt.reader import Mapped, Positioned
from fastckpt.running import limits, runs
from fastckpt.running.tensors import torch_dtype
from fastckpt.target import Target
from layouts import families, oracle, tiny
from reading import equal, refuses_what_is_written_to
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_types import of_torch
from zero_writer import write_zero

COMPILED = pytest.mark.skipif(not built(), reason="the compiled module is not built")
READERS = [pytest.param(Mapped, marks=COMPILED), Positioned]
LAYOUTS = {"hf": oracle.hf, "vllm": oracle.vllm, "rtp_llm": oracle.rtp_llm}


def zero(path, name, *, stage=3, world=3, **more):
    """A ZeRO checkpoint of a tiny model with its config beside, and what its weights are."""
    config, files, _ = tiny.made(name)
    params = {
        n: t.float()
        for n, t in files.items()
        if n != "lm_head.weight" or not config.get("tie_word_embeddings")
    }
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.get("tie_word_embeddings") else None
    truth = write_zero(path, params, stage=stage, world=world, tied=tied, **more)
    (path / "config.json").write_text(json.dumps(config))
    return config, truth


def wanted(layout, truth, config, tp, rank, dtype):
    cast = {
        n: t.to(dtype)
        for n, t in truth.items()
        if n != "lm_head.weight" or not config.get("tie_word_embeddings")
    }
    return LAYOUTS[layout](cast, config, tp, rank)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_to_shards_in_memory(tmp_path, layout, tp, stage):
    config, truth = zero(tmp_path, "mixtral", stage=stage)
    shards = fastckpt.reshard(tmp_path, tp, layout=layout, dtype="bfloat16")
    assert len(shards) == tp
    for rank, shard in enumerate(shards):
        equal(shard, wanted(layout, truth, config, tp, rank, torch.bfloat16))
    equal(fastckpt.reshard(tmp_path, tp, rank=tp - 1, layout=layout, dtype="bfloat16"), shards[-1])


def shard_files(out):
    return {p.relative_to(out).as_posix(): load_file(p) for p in sorted(out.rglob("*.safetensors"))}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("executor", [pytest.param("cpu", marks=COMPILED), "torch"])
def test_every_reader_and_executor_writes_the_same_files(tmp_path, monkeypatch, reader, executor):
    config, truth = zero(tmp_path / "in", "mixtral", world=4)
    chosen = pick(executor)
    monkeypatch.setattr(runs, "pick", lambda *_: chosen)
    monkeypatch.setattr(runs, "reader_of", lambda extents, binding, **_: reader(binding.places))
    out = tmp_path / "out"
    report = fastckpt.reshard(tmp_path / "in", 2, layout="vllm", dtype="bfloat16", out=out, threads=3)
    got = shard_files(out)
    assert sorted(got) == ["model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"]
    for rank, shard in enumerate(got.values()):
        equal(shard, wanted("vllm", truth, config, 2, rank, torch.bfloat16))
    assert report.bytes_read == report.bytes_needed
    assert fastckpt.verify(out).ok


def test_a_set_is_completed_by_its_last_rank(tmp_path):
    zero(tmp_path / "in", "mixtral")
    for rank in (1, 0):
        assert not (tmp_path / "out/fastckpt.json").exists()
        fastckpt.reshard(tmp_path / "in", 2, rank=rank, layout="hf", out=tmp_path / "out", durable=False)
    assert fastckpt.verify(tmp_path / "out").ok
    fastckpt.reshard(tmp_path / "in", 2, layout="hf", out=tmp_path / "whole", durable=False)
    parts, whole = shard_files(tmp_path / "out"), shard_files(tmp_path / "whole")
    assert sorted(parts) == sorted(whole)
    for name in whole:
        equal(parts[name], whole[name])
    again = fastckpt.reshard(tmp_path / "in", 2, rank=1, layout="hf", out=tmp_path / "out")
    assert again.bytes_read == again.bytes_written == 0 and "done already" in again.notes[-1]
    with pytest.raises(WriteError, match="another plan"):
        fastckpt.reshard(tmp_path / "in", 2, rank=1, layout="hf", out=tmp_path / "out", dtype="float16")


def test_many_files_and_an_index(tmp_path):
    config, truth = zero(tmp_path / "in", "mixtral")
    fastckpt.reshard(tmp_path / "in", layout="hf", out=tmp_path / "out", max_shard_size="60KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = shard_files(tmp_path / "out")
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    merged = {n: t for part in files.values() for n, t in part.items()}
    equal(merged, wanted("hf", truth, config, 1, 0, torch.float32))
    assert all(n in files[f] for n, f in index["weight_map"].items())


def test_the_callers_tensors_are_filled_in_place(tmp_path):
    zero(tmp_path, "mixtral")
    fresh = fastckpt.reshard(tmp_path, 2, layout="vllm", dtype="bfloat16")
    own = [{n: torch.full_like(t, 7) for n, t in shard.items()} for shard in fresh]
    where = [{n: t.data_ptr() for n, t in shard.items()} for shard in own]
    report = fastckpt.reshard(tmp_path, 2, layout="vllm", dtype="bfloat16", out=own)
    assert report.out is None and report.tensors == sum(map(len, own))
    for got, want, pointers in zip(own, fresh, where, strict=True):
        equal(got, want)
        assert {n: t.data_ptr() for n, t in got.items()} == pointers
    one = {n: torch.zeros_like(t) for n, t in fresh[1].items()}
    fastckpt.reshard(tmp_path, 2, rank=1, layout="vllm", dtype="bfloat16", out=one)
    equal(one, fresh[1])

    name = next(iter(one))
    for broken, message in (
        ({**one, name: one[name].float()}, "torch.bfloat16"),
        ({**one, name: one[name][:-1]}, "wanted"),
        ({**one, "more": one[name]}, "such as more"),
        ({n: t for n, t in one.items() if n != name}, f"no tensor {name}"),
        ({**one, name: one[name].t().contiguous().t()}, "not contiguous"),
    ):
        with pytest.raises(LayoutError, match=message):
            fastckpt.reshard(tmp_path, 2, rank=1, layout="vllm", dtype="bfloat16", out=broken)
    with pytest.raises(LayoutError, match="list of dicts"):
        fastckpt.reshard(tmp_path, 2, layout="vllm", out=one)


class Wrapped(torch.Tensor):
    """As DTensor: a tensor whose memory is another's."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0]


def test_values_that_lie_in_no_plain_memory_are_not_filled():
    negated = torch._neg_view(torch.zeros(3))
    conjugated = torch.zeros(3, dtype=torch.complex64).conj()
    nested = torch.nested.nested_tensor([torch.zeros(3)])
    for odd in (negated, conjugated, nested, Wrapped(torch.zeros(3))):
        given = {"w": torch.ones(3, dtype=odd.dtype)}
        with pytest.raises(LayoutError, match=r"w is a .*plain memory"):
            fastckpt.reshard(given, rank=0, layout="same", out={"w": odd})
    module = torch.nn.Linear(3, 1, bias=False)
    module.weight = torch.nn.Parameter(Wrapped(torch.zeros(1, 3)), requires_grad=False)
    with pytest.raises(LayoutError, match="plain memory"):
        fastckpt.load_into(module, {"weight": torch.ones(1, 3)})
    with pytest.raises(LayoutError, match="plain memory"):
        fastckpt.verify_tensors(module, {"weight": torch.ones(1, 3)})
    for odd in (torch.ones(3).to_sparse(), torch.nn.UninitializedParameter()):
        with pytest.raises(LayoutError, match="plain memory"):
            fastckpt.verify_tensors({"w": odd}, {"w": torch.ones(3)})
    assert fastckpt.verify_tensors({"w": torch._neg_view(torch.ones(3))}, {"w": -torch.ones(3)}).ok
    assert not fastckpt.verify_tensors({"w": torch._neg_view(torch.ones(3))}, {"w": torch.ones(3)}).ok


def test_memory_that_was_freed_is_not_filled():
    given, freed = {"w": torch.ones(64, 64)}, torch.zeros(64, 64)
    freed.untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match=r"plain memory \(or no more"):
        fastckpt.reshard(given, rank=0, layout="same", out={"w": freed})
    with FakeTensorMode(), pytest.raises(DeviceError, match="FakeTensorMode"):
        fastckpt.reshard(given, layout="same")


def test_memory_that_is_filled_twice_or_read_later_is_refused():
    base = torch.arange(16.0).view(4, 4)
    with pytest.raises(LayoutError, match="same memory"):
        fastckpt.reshard({"w": base.t()}, rank=0, layout="same", out={"w": base})
    assert torch.equal(base, torch.arange(16.0).view(4, 4))
    room = torch.zeros(8)
    given = {"a": torch.ones(2, 3), "b": torch.ones(6)}
    with pytest.raises(LayoutError, match="a and b lie over the same memory"):
        fastckpt.reshard(given, rank=0, layout="same", out={"a": room[:6].view(2, 3), "b": room[2:]})
    apart = torch.zeros(12)
    fastckpt.reshard(given, rank=0, layout="same", out={"a": apart[:6].view(2, 3), "b": apart[6:]})
    assert torch.equal(apart, torch.ones(12))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda table: table, None),
        (lambda table: table.clone(), "head is tied to table but is not the same memory"),
        (lambda table: table.t(), "head is tied to table but is not the same memory"),
        (lambda table: table.view(torch.int32), "head is tied to table but is not the same memory"),
        (lambda table: 5, "head of rank 0: wanted Tensor, got int 5"),
    ],
)
def test_a_tied_name_of_the_caller_s_is_the_same_tensor(head, message):
    table, room = torch.randn(3, 3), torch.zeros(3, 3)
    asked = partial(fastckpt.reshard, {"table": table, "head": table}, rank=0, layout="same")
    if message is None:
        asked(out={"table": room, "head": head(room)})
        assert torch.equal(room, table)
        return
    with pytest.raises(FastckptError, match=f"^out: {message}"):
        asked(out={"table": room, "head": head(room)})
    assert not room.any()


def test_tensors_of_the_caller_s_that_do_not_fit():
    given = {"w": torch.ones(2)}
    with pytest.raises(LayoutError, match="out: wanted 1 dicts of tensors, got 2"):
        fastckpt.reshard(given, layout="same", out=[{"w": torch.zeros(2)}] * 2)
    with pytest.raises(DeviceError, match="out: w is on meta, wanted cpu"):
        fastckpt.reshard(given, layout="same", out=[{"w": torch.zeros(2, device="meta")}])


def test_a_dtype_that_torch_lacks(monkeypatch):
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)
    with pytest.raises(LayoutError, match=r"this torch \(.*\) has no dtype float8_e8m0fnu"):
        torch_dtype.__wrapped__(BY_NAME["float8_e8m0fnu"])


@pytest.mark.parametrize("quant", [None, "int8"])
def test_little_is_moved_by_the_callers_thread(monkeypatch, quant):
    state = {"a.up_proj.weight": torch.randn(64, 128), "b": torch.randn(3)}
    road = {"layout": "same", "quant": quant, "threads": 2}
    want = fastckpt.reshard(state, **road)[0]
    monkeypatch.setattr(runs, "SMALL", 1 << 20)
    monkeypatch.setattr(runs, "feed", lambda *_: pytest.fail("threads were started"))
    told = []
    got = fastckpt.reshard(state, **road, progress=lambda *now: told.append(now))[0]
    assert got.keys() == want.keys() and all(torch.equal(got[n], x) for n, x in want.items())
    assert told[-1][:2] == (sum(t.nbytes for t in got.values()),) * 2
    with pytest.raises(SourceError, match=r"up_proj\.weight: NaN"):
        fastckpt.reshard({"a.up_proj.weight": torch.full((8, 128), torch.nan)}, layout="same", quant="int8")


def test_tensors_in_memory_are_a_checkpoint():
    config, files, _ = tiny.made("mixtral")
    shards = fastckpt.reshard(files, 2, layout="vllm", config=config)
    for rank, shard in enumerate(shards):
        equal(shard, oracle.vllm(files, config, 2, rank))
    with pytest.raises(RecipeError, match="config"):
        fastckpt.reshard(files, 2, layout="vllm")


@pytest.mark.parametrize("form", ["safetensors", "legacy"])
def test_ranks_of_two_checkpoints_make_no_set(tmp_path, form):
    """Headers of these formats say nothing of the values; a set must still come from one checkpoint."""
    for name in "ab":
        state = {"w": torch.randn(8, 6)}
        if form == "safetensors":
            save_file(state, tmp_path / f"{name}.safetensors")
        else:
            torch.save(state, tmp_path / f"{name}.legacy", _use_new_zipfile_serialization=False)
    a, b = (tmp_path / f"{name}.{form}" for name in "ab")
    asked = {"tp_plan": {"*": "colwise"}, "out": tmp_path / "out", "durable": False}
    fastckpt.reshard(a, 2, rank=0, **asked)
    for rank in (0, 1):
        with pytest.raises(WriteError, match="another plan"):
            fastckpt.reshard(b, 2, rank=rank, **asked)
    fastckpt.reshard(a, 2, rank=1, **asked)
    assert fastckpt.verify(tmp_path / "out").ok


@pytest.mark.parametrize("dtype", sorted({d.name for d in DTYPES}))
def test_every_type_is_carried_as_bytes(tmp_path, dtype):
    """What torch.save can write comes out of both containers and of memory, bit for bit, even when a cast of
    the floats is asked for."""
    raw = torch.arange(64, dtype=torch.uint8) % (2 if dtype == "bool" else 0x37)
    given = {"w": raw.view(of_torch(BY_NAME[dtype])).reshape(2, -1), "f": torch.ones(3)}
    torch.save(given, tmp_path / "x.pt")
    asked = None if BY_NAME[dtype].kind == "float" else "bfloat16"
    (state,) = fastckpt.reshard(tmp_path / "x.pt", layout="same", dtype=asked)
    assert state["w"].dtype == given["w"].dtype and state["w"].shape == given["w"].shape
    assert torch.equal(state["w"].view(torch.uint8), given["w"].view(torch.uint8))
    fastckpt.consolidate(tmp_path / "x.pt", tmp_path / "bin", dtype=None, durable=False)
    outs = [tmp_path / "bin"]
    loaded = torch.load(tmp_path / "bin/pytorch_model.bin")["w"]
    assert torch.equal(loaded.view(torch.uint8), raw.reshape(2, -1))
    if BY_NAME[dtype].safetensors:
        outs.append(tmp_path / "st")
        fastckpt.reshard(tmp_path / "x.pt", layout="same", out=tmp_path / "st", durable=False)
    for out in outs:
        assert fastckpt.verify(out).ok
        assert fastckpt.diff(tmp_path / "x.pt", out).equal


class Scaled:
    """A layout of one's own, with a constant beside each tensor that is made anew for every target."""

    roles = False

    def targets(self, ckpt, placement):
        for name in ckpt:
            yield Target(name, ckpt[name])
            yield Target(f"{name}.slopes", stored.constant(np.arange(3, dtype=np.float32), dtypes.float32))
            yield Target(f"{name}.size", stored.constant(np.int64(len(name)), dtypes.int64))

    def naming(self, placement):
        return Naming("", "model.safetensors", "model-{part}-of-{parts}.safetensors")


@pytest.mark.parametrize("kept", [0, 1 << 18])
def test_constants_are_the_same_when_a_plan_is_compiled_again(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(plans, "KEPT_ROWS", kept)
    given = {f"{'x' * k}": torch.randn(3, 4) for k in range(1, 5)}
    want = {f"{n}.slopes": torch.tensor([0.0, 1.0, 2.0]) for n in given} | given
    want |= {f"{n}.size": torch.tensor(len(n)) for n in given}
    (state,) = fastckpt.reshard(given, layout=Scaled())
    assert state.keys() == want.keys() and all(torch.equal(state[n], want[n]) for n in want)
    save_file(given, tmp_path / "x.safetensors")
    planned = fastckpt.plan(tmp_path / "x.safetensors", layout=Scaled())
    assert (planned.kept is None) == (kept == 0)
    assert len(planned.extents) == 4 + 1 + 4  # slopes are one for all


def test_what_is_computed_is_the_same_when_a_plan_is_compiled_again(monkeypatch):
    """1 + a norm has an extent that the layout adds to the table, anew each time."""
    config, hub, *_ = families.made("gemma")
    want = fastckpt.reshard(hub, 2, layout="rtp_llm", config=config)
    monkeypatch.setattr(plans, "KEPT_ROWS", 0)
    got = fastckpt.reshard(hub, 2, layout="rtp_llm", config=config)
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Twice(Scaled):
    """One name for two tensors."""

    def targets(self, ckpt, placement):
        yield from (Target("w", ckpt[name]) for name in ckpt)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    for out in (None, tmp_path / "out"):
        with pytest.raises(LayoutError, match="two tensors named w on rank 0"):
            fastckpt.reshard({"a": torch.ones(2), "b": torch.zeros(2)}, layout=Twice(), out=out)


class Wavering(Scaled):
    """Other tensors, or other constants, each time it is asked."""

    def __init__(self, how):
        self.how, self.asked = how, 0

    def targets(self, ckpt, placement):
        self.asked += 1
        names = [*ckpt]
        yield Target("slope", stored.constant(np.float32(self.asked * (self.how == "value")), dtypes.float32))
        for name in names[:: -1 if self.how == "order" and self.asked > 1 else 1]:
            yield Target(name, ckpt[name])
        if self.how == "fewer" and self.asked == 1:
            yield Target("last", ckpt[names[0]])


@pytest.mark.parametrize("how", ["order", "fewer", "value"])
def test_a_layout_that_wavers_is_refused(monkeypatch, how):
    """Rows that are compiled again go to the tensors that were planned."""
    monkeypatch.setattr(plans, "KEPT_ROWS", 0)
    with pytest.raises(LayoutError, match="makes other tensors than when it was planned"):
        fastckpt.reshard({"a": torch.ones(3), "b": torch.zeros(3)}, layout=Wavering(how))


def test_only_outputs_are_overwritten(tmp_path):
    write_zero(tmp_path / "in", {"w": torch.ones(5)}, stage=3, world=2)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/precious").write_text("mine")
    with pytest.raises(WriteError, match="it is no output of fastckpt"):
        fastckpt.reshard(tmp_path / "in", layout="same", out=tmp_path / "home", overwrite=True)
    assert (tmp_path / "home/precious").read_text() == "mine"


def test_not_a_number_is_refused_unless_allowed(tmp_path):
    value = torch.ones(5, 7)
    value[3, 2] = float("nan")
    write_zero(tmp_path / "in", {"a": torch.ones(3), "b": value}, stage=3, world=2)
    with pytest.raises(SourceError, match="b: 1 values"):
        fastckpt.reshard(tmp_path / "in", layout="same", out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in"]
    fastckpt.reshard(tmp_path / "in", layout="same", out=tmp_path / "out", allow_nonfinite=True)
    assert fastckpt.verify(tmp_path / "out").ok
    with pytest.raises(SourceError, match="infinite"):  # made by the cast
        large = {"a": torch.full((3,), 1e5)}
        write_zero(tmp_path / "large", large, stage=3, world=2, model_dtype=torch.float32)
        fastckpt.reshard(tmp_path / "large", layout="same", dtype="float16", out=tmp_path / "other")


@pytest.mark.parametrize("dtype", ["complex64", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_what_verify_counts_as_not_finite_is_refused(tmp_path, dtype):
    kind = of_torch(BY_NAME[dtype])
    byte = torch.tensor([255 if dtype == "float8_e8m0fnu" else 128], dtype=torch.uint8)
    odd = torch.tensor([complex(1, float("nan"))]) if kind.is_complex else byte.view(kind)
    held = {"a": torch.ones(300), "b": odd, "n": torch.arange(5)}
    with pytest.raises(SourceError, match=f"b: . values of one MiB of its {dtype}"):
        fastckpt.reshard(held, layout=Same("bin"), out=tmp_path / "out")
    with pytest.raises(SourceError, match="b: "):
        fastckpt.reshard({"b": held["b"]}, layout=Same("bin"), out=tmp_path / "out")
    fastckpt.reshard(held, layout=Same("bin"), out=tmp_path / "out", allow_nonfinite=True)
    assert fastckpt.verify(tmp_path / "out").ok


@pytest.mark.parametrize("dtype", ["fp8", "float8_e5m2"])
def test_no_file_of_fp8_without_scales(tmp_path, dtype):
    """1e6 became 448 and infinity too, which no check of the output sees."""
    held = {"w": torch.tensor([1.0, 1e6, float("inf")])}
    kind = of_torch(fastckpt.dtype(dtype))
    made = fastckpt.reshard(held, layout="same", dtype=dtype)[0]["w"]
    assert made.dtype == kind and torch.equal(made[:1].float(), held["w"][:1])
    for make in (fastckpt.reshard, fastckpt.consolidate):
        options = {"layout": "same"} if make is fastckpt.reshard else {}
        with pytest.raises(ViewError, match=r"writes no scales.*--quant fp8"):
            make(held, dtype=dtype, out=tmp_path / "out", allow_nonfinite=True, **options)
    assert not (tmp_path / "out").exists()


def test_memory_and_threads_are_bounded(tmp_path):
    _, truth = zero(tmp_path / "in", "mixtral")
    with pytest.raises(WriteError, match="too few"):
        fastckpt.reshard(tmp_path / "in", memory="1MB")
    with pytest.raises(WriteError, match="threads"):
        fastckpt.reshard(tmp_path / "in", threads=0)
    small = fastckpt.reshard(tmp_path / "in", layout="same", memory="70MiB", threads=16)[0]
    equal(small, truth)


def test_a_source_cut_short_while_it_is_read_is_an_error(tmp_path):
    zero(tmp_path / "in", "mixtral", world=2)
    opened = fastckpt.open(tmp_path / "in")
    victim = max(tmp_path.rglob("*optim_states.pt"), key=lambda p: p.stat().st_size)
    with open(victim, "r+b") as f:
        f.truncate(victim.stat().st_size // 2)
    with pytest.raises(SourceError, match="changed since"):
        fastckpt.reshard(opened, layout="same", out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in"]


@pytest.mark.parametrize("reader", READERS)
def test_a_source_cut_short_under_the_reader_is_an_error(tmp_path, monkeypatch, reader):
    write_zero(tmp_path / "in", {"w": torch.randn(3 << 20)}, stage=3, world=1)
    victim = max(tmp_path.rglob("*optim_states.pt"), key=lambda p: p.stat().st_size)

    def short(extents, binding, **_):
        opened = reader(binding.places)
        opened.lane(pick(None))
        with open(victim, "r+b") as f:
            f.truncate(1 << 20)
        return opened

    monkeypatch.setattr(runs, "reader_of", short)
    with pytest.raises(SourceError, match=victim.name):
        fastckpt.reshard(tmp_path / "in", layout="same", out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_a_kept_plan_gives_the_same_bytes(tmp_path, monkeypatch):
    """The second checkpoint of a run has other values and another pickle; its plan is not made again."""
    config, truth = zero(tmp_path / "one", "mixtral", step=2)
    plan = fastckpt.plan(tmp_path / "one", 2, layout="vllm", dtype="bfloat16")
    moved = {n: t + 1 for n, t in truth.items()}
    write_zero(
        tmp_path / "two", moved, stage=3, world=3, step=99, tag="global_step99", client={"note": "x" * 999}
    )
    (tmp_path / "two/config.json").write_text((tmp_path / "one/config.json").read_text())
    monkeypatch.setattr("fastckpt.planning.plans._compiled", lambda *_: pytest.fail("planned again"))
    second = fastckpt.plan(tmp_path / "two", 2, layout="vllm", dtype="bfloat16")
    assert second.key != plan.key, "another checkpoint is another set"
    shards = fastckpt.reshard(tmp_path / "two", 2, layout="vllm", dtype="bfloat16")
    for rank, shard in enumerate(shards):
        equal(shard, wanted("vllm", moved, config, 2, rank, torch.bfloat16))


def test_a_kept_plan_knows_which_memory_a_tensor_lies_in():
    one, two = torch.arange(8.0), torch.arange(8.0) + 100
    for third in (one, two):
        held = {"a": one[:4], "b": two[:4], "c": third[4:]}
        equal(fastckpt.reshard(held, layout="same")[0], held)


@pytest.mark.parametrize("rank", [None, 0])
@pytest.mark.parametrize("where", ["in", "in/global_step2", "more", "linked", "config"])
def test_overwriting_never_removes_what_is_read(tmp_path, where, rank):
    zero(tmp_path / "in", "mixtral")
    for name, moved in (
        ("more", "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"),
        ("config", "config.json"),
    ):
        (tmp_path / name).mkdir()
        at = next((tmp_path / "in").rglob(moved))
        at.rename(tmp_path / name / moved)
    (tmp_path / "in/config.json").symlink_to("../config/config.json")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/global_step2").symlink_to("../in/global_step2")
    (tmp_path / "linked/latest").write_text("global_step2")
    (tmp_path / "linked/config.json").symlink_to("../config/config.json")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    source = sources.open(tmp_path / ("linked" if where == "linked" else "in"), also=[tmp_path / "more"])
    with pytest.raises(WriteError, match="which this run reads"):
        fastckpt.reshard(source, out=tmp_path / where, rank=rank, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("compiled", [True, False])
def test_a_source_written_to_while_it_is_read_is_refused(tmp_path, monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(runs, "built", lambda: False)
    write_zero(tmp_path / "in", {f"w{i}": torch.randn(1 << 18) for i in range(32)}, stage=3, world=2)
    source = next((tmp_path / "in").rglob("*rank_1*optim*"))
    refuses_what_is_written_to(source, tmp_path / "in")


def test_a_damaged_kept_plan_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCKPT_CACHE", str(tmp_path / "plans"))
    _, truth = zero(tmp_path / "in", "mixtral")
    equal(fastckpt.reshard(tmp_path / "in", layout="same")[0], truth)
    for path in (tmp_path / "plans").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    equal(fastckpt.reshard(tmp_path / "in", layout="same")[0], truth)


def test_a_kept_plan_under_anothers_name_is_not_used(tmp_path, monkeypatch):
    plans = tmp_path / "plans"
    monkeypatch.setenv("FASTCKPT_CACHE", str(plans))
    truth = [
        write_zero(tmp_path / n, {"w": torch.randn(4, k)}, stage=3, world=2) for n, k in (("a", 2), ("b", 4))
    ]
    first = fastckpt.reshard(tmp_path / "a", layout="same")
    (of_a,) = plans.iterdir()
    fastckpt.reshard(tmp_path / "b", layout="same")
    (of_b,) = set(plans.iterdir()) - {of_a}
    of_b.write_bytes(of_a.read_bytes())
    equal(fastckpt.reshard(tmp_path / "b", layout="same")[0], truth[1])
    equal(first[0], truth[0])


def test_a_plan_that_cannot_be_kept_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("FASTCKPT_CACHE", str(tmp_path / "plans"))
    truth = write_zero(tmp_path / "in", {"w": torch.randn(4, 2)}, stage=3, world=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        equal(fastckpt.reshard(tmp_path / "in", layout="same")[0], truth)
    assert not list((tmp_path / "plans").iterdir())


def test_bands_of_any_number_of_threads_stay_within_the_promise():
    for threads in range(1, 257):
        assert 4 << 20 <= limits.band(threads) <= limits.BAND
        assert threads * limits.band(threads) <= (16 << 20) + threads * (4 << 20)


def test_stream_gives_every_byte_in_order(tmp_path):
    truth = write_zero(
        tmp_path,
        {"a": torch.randn(3, 5), "b": torch.randn(700_001), "c": torch.randn(0, 4)},
        stage=3,
        world=3,
    )
    got = {}
    for name, offset, data in road.stream(tmp_path, ["b", "a"]):
        assert offset == len(got.setdefault(name, bytearray())) and 0 < len(data) <= 1 << 20
        got[name] += data
    assert list(got) == ["b", "a"]
    assert {n: bytes(v) for n, v in got.items()} == {n: truth[n].numpy().tobytes() for n in ("b", "a")}


def test_plan_says_what_reshard_does(tmp_path):
    zero(tmp_path, "mixtral")
    plan = fastckpt.plan(tmp_path, 4, layout="vllm", dtype="bfloat16")
    one = fastckpt.plan(tmp_path, 4, rank=3, layout="vllm", dtype="bfloat16")
    assert one.key == plan.key and one.ranks == (3,) and plan.ranks == (0, 1, 2, 3)
    ends = {}
    for t in plan.tensors:
        ends.setdefault(t.file, []).append((t.offset, t.offset + t.nbytes))
    for number, pieces in ends.items():
        pieces.sort()
        assert (
            all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
            and pieces[-1][1] == plan.files[number].nbytes
        )
    assert plan.needed_bytes >= plan.output_bytes
    assert plan.slots().leaves == len(plan.tensors) - sum(t.nbytes == 0 for t in plan.tensors)


def test_what_does_not_go_together(tmp_path):
    zero(tmp_path, "mixtral")
    with pytest.raises(LayoutError, match="differ"):
        fastckpt.reshard(tmp_path, 2, placement=fastckpt.Placement(tp=4))
    with pytest.raises(LayoutError, match=r"rank 2 is outside the 2 ranks of tp 2, pp 1, dp 1, ep 1$"):
        fastckpt.reshard(tmp_path, 2, rank=2)
    with pytest.raises(LayoutError, match="no layout"):
        fastckpt.reshard(tmp_path, 2, layout="vlm")
    with pytest.raises(LayoutError, match="goes with layout hf"):
        fastckpt.reshard(tmp_path, 2, layout="vllm", tp_plan={"*": "replicate"})
    with pytest.raises(RecipeError, match="names no dtype"):
        fastckpt.reshard(
            tmp_path,
            2,
            config={**json.loads((tmp_path / "config.json").read_text()), "dtype": None, "torch_dtype": None},
            dtype="auto",
        )
    got = fastckpt.reshard(tmp_path, layout="same", dtype="auto", config={"dtype": "float16"})[0]
    assert {t.dtype for t in got.values()} == {torch.float16}
    assert np.isfinite(got["lm_head.weight"].float().numpy()).all()


def test_config_and_tokenizer_go_with_the_weights(tmp_path):
    config, truth = zero(tmp_path / "in", "mixtral")
    (tmp_path / "in/tokenizer.json").write_text("{}")
    fastckpt.reshard(tmp_path / "in", layout="hf", out=tmp_path / "plain")
    assert json.loads((tmp_path / "plain/config.json").read_text()) == config
    assert (tmp_path / "plain/tokenizer.json").read_text() == "{}"
    with pytest.raises(RecipeError, match="208"):
        fastckpt.reshard(tmp_path / "in", config={**config, "vocab_size": 200})
    fastckpt.reshard(tmp_path / "in", layout="hf", out=tmp_path / "fewer", vocab_size=200)
    assert json.loads((tmp_path / "fewer/config.json").read_text()) == {**config, "vocab_size": 200}
    (fewer,) = shard_files(tmp_path / "fewer").values()
    assert torch.equal(fewer["lm_head.weight"], truth["lm_head.weight"][:200])
    fastckpt.reshard(tmp_path / "in", layout="same", out=tmp_path / "other", config={"a": 1})
    assert json.loads((tmp_path / "other/config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("layout", ["hf", "vllm", "same"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_names_the_dtype_that_was_asked_for(tmp_path, layout, key):
    """Loaders go by it, and round float16 to bfloat16 without a word."""
    config, _ = zero(tmp_path / "in", "mixtral")
    dtypeless = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    within = {"hidden_size": 4, "dtype": "float32"}
    before = {**dtypeless, key: "bfloat16", "vision_config": within, "quantum": {"dtype": "bfloat16"}}
    for told, wanted in (
        (before, {**before, key: "float16", "vision_config": {**within, "dtype": "float16"}}),
        ({**dtypeless, key: None}, {**dtypeless, key: None}),
        (dtypeless, dtypeless),
    ):
        (tmp_path / "in/config.json").write_text(json.dumps(told))
        out = tmp_path / "out"
        fastckpt.reshard(tmp_path / "in", layout=layout, dtype="float16", out=out, overwrite=out.exists())
        assert json.loads((out / "config.json").read_text()) == wanted
        fastckpt.reshard(tmp_path / "in", layout=layout, out=out, overwrite=True)
        assert json.loads((out / "config.json").read_text()) == told


def test_rtp_llm_finds_what_it_reads_under_older_keys(tmp_path):
    """It reads those alone, and serves as float16, and by its own rotary positions, what has none."""
    config, _ = zero(tmp_path / "in", "mixtral")
    gone = ("dtype", "torch_dtype", "rope_parameters", "rope_theta", "rope_scaling")
    plain = {k: v for k, v in config.items() if k not in gone}
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "partial_rotary_factor": 0.5}
    yarn, by_kind = {"rope_parameters": rope}, {"rope_parameters": {"full_attention": rope}}
    for k, (told, dtype, wanted) in enumerate((
        ({"dtype": "bfloat16"}, None, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, "bfloat16", {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, "bfloat16", {"torch_dtype": "bfloat16"}),
        ({}, "bfloat16", {"torch_dtype": "bfloat16"}),
        ({}, None, {}),
        (yarn, None, yarn | {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_scaling": {
            "rope_type": "yarn", "type": "yarn", "factor": 4.0
        }}),
        (yarn | {"rope_theta": 7.0, "rope_scaling": {}}, None,
         yarn | {"rope_theta": 7.0, "rope_scaling": {}, "partial_rotary_factor": 0.5}),
        (by_kind, None, by_kind),
    )):  # fmt: skip
        (tmp_path / "in/config.json").write_text(json.dumps(plain | told))
        for layout, says in (("rtp_llm", wanted), ("hf", {k: wanted[k] for k in told})):
            out = tmp_path / f"{layout}{k}"
            fastckpt.reshard(tmp_path / "in", layout=layout, dtype=dtype, out=out)
            assert json.loads((out / "config.json").read_text()) == plain | says
    again = fastckpt.plan(fastckpt.open(tmp_path / "rtp_llm5"), layout="hf")
    assert json.loads(again.config) == plain | yarn  # as it was


def test_a_config_that_is_not_the_one_the_weights_were_cut_by_does_not_go_with_them(tmp_path):
    config, _ = zero(tmp_path / "in", "mixtral")
    beside = tmp_path / "in/config.json"

    def changed(*_):
        beside.write_text(json.dumps(config | {"num_attention_heads": 4}))

    opened = fastckpt.open(tmp_path / "in")
    for rank in (None, 0):
        beside.write_text(json.dumps(config))
        with pytest.raises(SourceError, match=r"config\.json: changed since"):
            fastckpt.reshard(
                tmp_path / "in", 2, layout="vllm", rank=rank, out=tmp_path / "out", progress=changed
            )
    with pytest.raises(SourceError, match=r"config\.json: changed since"):
        fastckpt.reshard(opened, 2, layout="vllm", out=tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]
    fastckpt.reshard(opened, 2, layout="vllm", config=config, out=tmp_path / "out")


def test_files_that_somebody_removes_meanwhile_make_no_output(tmp_path):
    def removed(done, total, phase):
        for path in tmp_path.glob(".out*"):
            shutil.rmtree(path)

    with pytest.raises(WriteError, match="somebody removed what this run wrote"):
        fastckpt.reshard({"w": torch.ones(3)}, layout="same", out=tmp_path / "out", progress=removed)
    assert os.listdir(tmp_path) == []


def test_staging_that_another_process_holds_is_not_swept(tmp_path):
    """A live run of another container has a number that is dead here; its lock tells."""
    write_zero(tmp_path / "in", {"w": torch.ones(5)}, stage=3, world=2)
    dead = subprocess.Popen(["true"])
    dead.wait()
    with Output(tmp_path / "out", key="k"):
        (mine,) = (p.name for p in tmp_path.iterdir() if p.name.startswith(".out."))
    host = mine.removeprefix(".out.fastckpt-").rsplit("-", 2)[0]
    held, left = (tmp_path / f".out.fastckpt-{host}-{dead.pid}-{n:08x}" for n in (1, 2))
    held.mkdir()
    left.mkdir()
    lock = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fastckpt.reshard(tmp_path / "in", layout="same", out=tmp_path / "out", durable=False)
        assert held.exists() and not left.exists()
    finally:
        os.close(lock)
