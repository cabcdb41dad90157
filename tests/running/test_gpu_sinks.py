"""Tensors on a GPU, as far as that goes on the host: tables of whole plans, and batches sent in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastckpt import load_into, prepare, reshard
from fastckpt.digest import LEAF, combine, digest
from fastckpt.errors import DeviceError, ViewError
from fastckpt.executors import pick
from fastckpt.executors.tiles import tile
from fastckpt.extents import Buffer
from fastckpt.layouts.same import Same
from fastckpt.pipeline import feed
from fastckpt.placement import Placement
from fastckpt.planning import plans
from fastckpt.planning.batches import cut
from fastckpt.planning.binding import Binding
from fastckpt.planning.request import Request
from fastckpt.reader import Positioned
from fastckpt.running import gpu_sinks, gpu_sources, tensors
from fastckpt.sources import open as open_checkpoint

_C = pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

PLAN = {"up": "colwise", "tied": "colwise", "down": "rowwise", "*": "replicate"}


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tall = torch.randn(640, 1000)
    return {
        "up": tall,
        "down": torch.randn(333, 1024).to(torch.bfloat16),
        "turned": torch.randn(300, 513).t(),
        "large": torch.randn(1_100_000),
        "norm": torch.randn(7),
        "empty": torch.empty(0, 4),
        "count": torch.arange(9),
        "tied": tall,
    }


def planned(tp: int, dtype: str | None) -> plans.Plan:
    wanted = Request(Placement(tp=tp), layout="hf", tp_plan=PLAN, dtype=dtype)
    return plans.draft(open_checkpoint(state()), wanted, in_memory=True)


@pytest.mark.parametrize(("tp", "dtype"), [(1, None), (2, "bfloat16")])
def test_a_whole_plan_in_one_table(tp: int, dtype: str | None) -> None:
    """The table that a GPU would get, run on the host: the tensors that reshard makes."""
    drafted = planned(tp, dtype)
    binding = Binding.of(drafted.extents)
    states, buffers = tensors.allocate(drafted)
    rows = gpu_sources.placed(drafted, binding)
    sources = np.array([p.address for p in binding.places], np.uint64)
    made = tile(rows, sources, np.array([b.address for b in buffers], np.uint64))
    for t in states[0].values():
        t.view(torch.uint8).fill_(0xA5)
    _C.run_tiles_on_host(made.rows.view(np.uint8), made.owner, made.sources, made.destinations, 3)
    tensors.tie(states, drafted.aliases)
    wanted = reshard(state(), tp, layout="hf", tp_plan=PLAN, dtype=dtype)
    compare(states, wanted)


def test_a_row_that_writes_outside_its_tensor() -> None:
    """As a plan that was kept, and is no longer what it was, might have: `cut` refuses it too."""
    drafted = planned(1, None)
    binding = Binding.of(drafted.extents)
    first, chunk = next(iter(drafted.chunks()))
    chunk.rows["dst"][-1] += 1
    with pytest.raises(ViewError, match="a row writes outside its tensor"):
        gpu_sources.gathered(drafted, binding, first, chunk)
    with pytest.raises(ViewError, match="a row writes outside its tensor"):
        list(cut(chunk, first, drafted.slots(), binding))


def test_sources_on_several_gpus() -> None:
    places = [Buffer(None, 0, 4, f"cuda:{i}") for i in (1, 0, 1)]
    with pytest.raises(DeviceError, match=r"the sources lie on cuda:0, cuda:1; bring them to one GPU first"):
        gpu_sources.Resident(Binding(tuple(places), *[np.zeros(3, np.int64)] * 3))


def compare(got: object, wanted: object) -> None:
    assert isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name
        assert a["tied"] is a["up"]


def test_batches_are_sent_in_pieces() -> None:
    """The road from files to a GPU, with the host in its place: large tensors in several batches, small ones
    several in one."""
    drafted = planned(2, "bfloat16")
    states, buffers = tensors.allocate(drafted)
    binding, slots = Binding.of(drafted.extents), drafted.slots()
    sink = gpu_sinks.ToDevice(slots, buffers, "cpu")
    with Positioned(binding.places) as reader:
        workers = [sink.worker(reader.lane(pick(None)), 2 * LEAF) for _ in range(2)]
        batches = [
            b for first, chunk in drafted.chunks() for b in cut(chunk, first, slots, binding, band=2 * LEAF)
        ]
        sizes = [len(gpu_sinks.pieces(b, slots)) for b in batches]
        assert max(sizes) > 1 and len(batches) > len(drafted.ranks)
        feed(batches, workers, lambda _: None)
    sink.close()
    tensors.tie(states, drafted.aliases)
    compare(states, reshard(state(), 2, layout="hf", tp_plan=PLAN, dtype="bfloat16"))


def test_what_needs_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for ask in (
        lambda: reshard(state(), layout=Same(), device="cuda"),
        lambda: prepare(state(), layout=Same()),
        lambda: reshard(state(), layout=Same(), device="cuda:1", out="nowhere"),
    ):
        with pytest.raises(DeviceError, match="device 'cuda"):
            ask()
    with pytest.raises(DeviceError, match="prepare: wanted tensors on a GPU"):
        prepare(state(), layout=Same(), device="cpu")


def test_a_module_on_meta_and_the_host_is_filled_on_the_host() -> None:
    weights = {"0.weight": torch.randn(4, 3), "1.weight": torch.randn(2, 4)}
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 2, bias=False, device="meta")
    )
    load_into(module, weights)
    assert torch.equal(module[0].weight, weights["0.weight"])
    assert torch.equal(module[1].weight, weights["1.weight"]) and module[1].weight.device.type == "cpu"


def test_digests_of_leaves_by_the_body_of_the_gpu() -> None:
    """Around every size at which XXH3 changes its formula, aligned and not: the digest of the CPU."""
    rng = np.random.default_rng(41)
    data = rng.integers(0, 256, (1 << 20) + 4096, dtype=np.uint8)
    sizes = [*range(1, 260), 511, 1023, 1024, 1025, 1039, 1040, 1088, 4096, 65_537, (1 << 20) - 1, 1 << 20]
    spans = [(int(at), n) for n in sizes for at in ((0, 1, 4, 8, 11) if n > 300 else rng.integers(0, 64, 2))]
    table = np.array([(data.ctypes.data + at, n) for at, n in spans], np.uint64)
    out = np.zeros(len(table), np.uint64)
    _C.run_digests_on_host(table, out)
    for (at, n), got in zip(spans, out.tolist(), strict=True):
        assert got == _C.digest64(data[at : at + n]), (at, n)


def test_tensors_are_digested_by_leaves() -> None:
    data = np.random.default_rng(42).integers(0, 256, 3 << 20, dtype=np.uint8)
    spans = [(0, 5), (16, 0), (64, (2 << 20) + 1), (7, 1 << 20)]
    table, counts = gpu_sinks.leaves([(data.ctypes.data + at, n) for at, n in spans])
    out = np.zeros(len(table), np.uint64)
    _C.run_digests_on_host(table, out)
    assert counts.tolist() == [1, 0, 3, 1]
    ends = np.cumsum(counts)
    for (at, n), end, count in zip(spans, ends.tolist(), counts.tolist(), strict=True):
        assert combine(out[end - count : end]) == digest(data[at : at + n])
    with pytest.raises(DeviceError, match="digests: a is on cpu"):
        gpu_sinks.digests({"a": torch.zeros(3)})
