"""Rows on a GPU: the CPU executor's bytes, every conversion, 64-bit offsets, graphs, no waiting."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from executors import test_copy_rows as copy_rows
from executors.test_casts import converted, patterns
from executors.test_copy_rows import EVEN, PAIRS, TRANSPOSED, noise, random_row, row
from executors.test_copy_rows import buffer as host
from fastckpt.dtypes import BY_NAME, castable
from fastckpt.errors import DeviceError
from fastckpt.executors.cpu import Cpu
from fastckpt.executors.cuda import Cuda
from fastckpt.extents import Buffer

SMALL = (8, 640), (11, 140), (16, 300), (20, 384), (63, 65), (129, 160)
LARGE = (128, 128), (1024, 2048), (1025, 2051)
"""Rows and columns of what is transposed."""


def there(array: np.ndarray, shift: int = 0) -> tuple[torch.Tensor, Buffer]:
    """The bytes on the GPU, `shift` bytes past an aligned address."""
    held = torch.zeros(array.nbytes + shift, dtype=torch.uint8, device="cuda")
    held[shift:] = torch.from_numpy(array)
    return held, Buffer(held, held.data_ptr() + shift, array.nbytes, str(held.device))


def same(rows: np.ndarray, source: np.ndarray, out: np.ndarray, shift: int = 0) -> None:
    wanted = out.copy()
    Cpu().bind([host(source)]).run(rows, [host(wanted)])
    _, from_there = there(source)
    held, to_there = there(out, shift)
    Cuda().bind([from_there]).run(rows, [to_there])
    copy_rows.require_equal(held[shift:].cpu().numpy(), wanted, rows)


def test_small_random_rows() -> None:
    rng = np.random.default_rng(31)
    for k, (src, dst) in enumerate(PAIRS):
        for budget in (1, 40, 700, 6000):
            r, n, m = random_row(rng, src, dst, budget)
            same(r, noise(rng, n), noise(rng, m + 64), k % 17)


@pytest.mark.parametrize("names", EVEN)
def test_small_even_lines(names: str) -> None:
    src, dst = (BY_NAME[n] for n in names.split())
    rng = np.random.default_rng(35)
    for r, source, nbytes in copy_rows.even_lines(rng, src, dst):
        same(r, source, noise(rng, nbytes))


@pytest.mark.parametrize("names", TRANSPOSED)
@pytest.mark.parametrize("sides", [SMALL, LARGE], ids=["small", "large"])
def test_transposes(names: str, sides: Sequence[tuple[int, int]]) -> None:
    src, dst = (BY_NAME[n] for n in names.split())
    rng = np.random.default_rng(32)
    for r, source, nbytes in copy_rows.transposes(rng, src, dst, sides, [(0, 0), (3, 1), (64, 16)]):
        same(r, source, noise(rng, nbytes))


@pytest.mark.parametrize("names", ["float32 bfloat16", "bfloat16 bfloat16", "bfloat16 float32", "int8 int8"])
def test_lines(names: str) -> None:
    src, dst = (BY_NAME[n] for n in names.split())
    rng = np.random.default_rng(33)
    sizes = [(1, 31), (1, 1_000_001), (2, 8193), (1000, 129), (4096, 512)]
    for r, source, nbytes in copy_rows.lines(rng, src, dst, sizes, (0, 1, dst.itemsize, 8)):
        same(r, source, noise(rng, nbytes), int(r["dst"][0]))


class There:
    """The GPU with sources and destinations of the host: what the tests of casts run."""

    name = "cuda"

    def bind(self, sources: Sequence[Buffer]) -> There:
        self.runner = Cuda().bind(sources)
        return self

    def run(self, rows: np.ndarray, destinations: Sequence[Buffer], threads: int = 1) -> None:
        for d in destinations:
            held = torch.zeros(d.nbytes, dtype=torch.uint8, device="cuda")
            self.runner.run(rows, [Buffer(held, held.data_ptr(), d.nbytes, str(held.device))])
            assert isinstance(d.owner, np.ndarray)
            d.owner.view(np.uint8)[:] = held.cpu().numpy()


@pytest.mark.parametrize(
    ("src", "dst"), [(s, d) for s, d in PAIRS if s is not d and castable(s, d)], ids=lambda d: d.name
)
def test_every_value(src, dst) -> None:
    bits = patterns(src)
    for step in (1, 2):
        got, wanted = (converted(e, bits, src, dst, step) for e in (There(), Cpu()))
        wrong = np.flatnonzero(got != wanted)
        assert not len(wrong), [f"{x[i]:#x}" for i in wrong[:1] for x in (bits, got, wanted)]


def test_offsets_beyond_four_gib() -> None:
    source = torch.randint(0, 256, (5 << 30,), dtype=torch.uint8, device="cuda")
    out = torch.zeros_like(source)
    u8 = BY_NAME["uint8"]
    n = 1 << 20
    rows = np.concatenate(
        [
            row(u8, u8, (5 << 10, n), (n, 1), (n, 1)),
            row(u8, u8, (n, 1 << 9), (1, n), (1 << 9, 1), (9 << 29, 9 << 29)),
        ]
    )
    where = str(source.device)
    runner = Cuda().bind([Buffer(source, source.data_ptr(), source.nbytes, where)])
    runner.run(rows[:1], [Buffer(out, out.data_ptr(), out.nbytes, where)])
    assert torch.equal(out, source)
    runner.run(rows[1:], [Buffer(out, out.data_ptr(), out.nbytes, where)])
    far = slice(9 << 29, (9 << 29) + (n << 9))
    assert torch.equal(out[far].view(n, 1 << 9), source[far].view(1 << 9, n).t())


def test_a_table_of_many_rows() -> None:
    rng = np.random.default_rng(34)
    rows, source, nbytes = copy_rows.many_rows(rng, 100_000, 700)
    same(rng.permutation(rows), source, noise(rng, nbytes))


def prepared(n: int = 1 << 20):
    f32, bf16 = BY_NAME["float32"], BY_NAME["bfloat16"]
    source = torch.randn(n, device="cuda")
    out = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    where = str(source.device)
    runner = Cuda().bind([Buffer(source, source.data_ptr(), source.nbytes, where)])
    made = runner.prepare(row(f32, bf16, (n,), (4,), (2,)), [Buffer(out, out.data_ptr(), out.nbytes, where)])
    return source, out, made


def test_running_again_waits_for_nothing_and_allocates_nothing() -> None:
    source, out, made = prepared()
    made.run()
    torch.cuda.synchronize()
    source.normal_()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.run()
        after = torch.cuda.memory_allocated()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert before == after
    assert torch.equal(out, source.to(torch.bfloat16))


def test_the_stream_is_the_callers() -> None:
    source, out, made = prepared(1 << 24)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        source.fill_(2.5)
        made.run()
    torch.cuda.current_stream().wait_stream(side)
    assert bool((out == 2.5).all())


def test_another_stream_waits_for_the_table() -> None:
    source = torch.randn(1 << 20, device="cuda")
    out = torch.zeros(1 << 20, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    f32, bf16, where = BY_NAME["float32"], BY_NAME["bfloat16"], str(source.device)
    runner = Cuda().bind([Buffer(source, source.data_ptr(), source.nbytes, where)])
    made = runner.prepare(
        row(f32, bf16, (1 << 20,), (4,), (2,)), [Buffer(out, out.data_ptr(), out.nbytes, where)]
    )
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        made.run()
    side.synchronize()
    assert torch.equal(out, source.to(torch.bfloat16))


def test_a_graph_replays_it() -> None:
    source, out, made = prepared()
    made.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made.run()
    for _ in range(3):
        source.normal_()
        graph.replay()
        assert torch.equal(out, source.to(torch.bfloat16))


def test_what_has_not_run_is_not_captured() -> None:
    _, _, made = prepared()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(DeviceError, match="run this once before"):
        made.run()


def test_memory_is_kept_until_it_is_done() -> None:
    source, out, made = prepared(1 << 24)
    wanted = source.to(torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        made.run()
    del source, made
    torch.full((1 << 24,), 7.0, device="cuda")  # would take the source's memory
    side.synchronize()
    assert torch.equal(out, wanted)


def test_memory_is_given_back_when_it_is_done() -> None:
    source, _, made = prepared()
    gone = weakref.ref(source)
    made.run()
    del source, made
    torch.cuda.synchronize()
    gc.collect()
    assert gone() is None


def test_buffers_of_the_host_are_refused_as_destinations() -> None:
    u8 = BY_NAME["uint8"]
    a = np.zeros(4, np.uint8)
    with pytest.raises(DeviceError, match=r"wanted buffers on cuda:\d, got one on cpu"):
        Cuda().bind([]).run(row(u8, u8, (4,), (1,), (1,), zero=True), [host(a)])
    with pytest.raises(DeviceError, match="this machine has"):
        Cuda("cuda:99")


def test_the_kernels_use_no_local_memory() -> None:
    import fastckpt._C as compiled

    least = {"rows": 4, "transpose": 4, "general": 4, "digest": 8, "quantise": 3}  # blocks at once
    for facts in compiled.kernel_facts():
        assert facts["local_bytes"] == 0, facts
        assert facts["blocks_per_multiprocessor"] >= least.pop(facts["name"]), facts
    assert not least
