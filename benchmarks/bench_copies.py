"""Copies in memory: gather and cast, transposes, many small ones."""

from __future__ import annotations

from functools import partial

import fastckpt
import numpy as np
import pytest
import torch
from fastckpt.digest import LEAF
from fastckpt.dtypes import bfloat16, float32
from fastckpt.executors.cpu import Cpu, CpuRunner
from fastckpt.extents import Buffer, Extent, Extents, fresh
from fastckpt.placement import Placement
from fastckpt.planning import plans
from fastckpt.planning.batches import Batch, Slots, cut
from fastckpt.planning.binding import Binding
from fastckpt.planning.compiling import compile
from fastckpt.planning.copies import Table
from fastckpt.planning.request import Request
from fastckpt.reader import Mapped
from fastckpt.running import tensors
from fastckpt.running.limits import BAND
from fastckpt.stored import strided
from fastckpt.target import Target
from fastckpt.views import View, stack
from floors import Memcpy, batches, share, source_runs
from inputs import Input
from measure import Bench, Figure, Goal, Step, of_floor, on, times_faster


@pytest.mark.parametrize("fresh", [False, True], ids=["mapped", "fresh mapping"])
def bench_gather_cast(bench: Bench, either: Input, fresh: bool) -> None:
    """Gather, unpad and cast fp32 to bf16 into reused tensors, one thread, over memcpy of the source."""
    plan = plans.draft(
        fastckpt.open(either.path), Request(Placement(), layout="same", dtype="bfloat16"), in_memory=True
    )
    binding = Binding.of(plan.extents)
    states, made = tensors.allocate(plan)
    for t in states[0].values():
        t.fill_(1)
    rows = np.concatenate([b.rows for b in batches(plan, binding, apart=True)])
    # Without release the source stays mapped from round to round.
    executor = Cpu(recent_bytes=0)
    with Mapped(binding.places) as reader:
        runner = executor.bind(reader.buffers)
        memcpy = Memcpy(source_runs(plan, binding, [b.address for b in reader.buffers]), 1)

        def again() -> None:
            with Mapped(binding.places) as anew:
                executor.bind(anew.buffers).run(rows, made, 1)

        mapping = "fresh mapping" if fresh else "source mapped"
        what = f"gather + cast fp32 -> bf16, one thread, {mapping} / memcpy"
        bench.measure(
            Figure(what, either.shape, "of M", of_floor, None if fresh else Goal(0.65)),
            Step("gather + cast", again if fresh else partial(runner.run, rows, made, 1)),
            [Step("memcpy", memcpy)],
            rounds=11,
            told={"input": either.origin, "rows": len(rows)},
        )


class Square:
    """A matrix and its copies: cast as it is, or transposed and cast, at once or through staging."""

    def __init__(self, rows: int, columns: int) -> None:
        self.source = np.random.default_rng(7).standard_normal((rows, columns), np.float32)
        held = Buffer(self.source, self.source.ctypes.data, self.source.nbytes)
        self.extents = Extents([Extent(held, 0, held.nbytes)])
        self.view = strided(self.extents, 0, float32, (rows, columns)).cast(bfloat16)
        self.made = torch.ones(rows * columns, dtype=torch.bfloat16)
        self.into = Buffer(self.made, self.made.data_ptr(), self.made.nbytes)
        self.held = held

    def cut(self, turned: bool, band: int) -> list[Batch]:
        target = Target("m", self.view.permute((1, 0)) if turned else self.view)
        chunk, extents = compile([target], self.extents)
        slots = Slots.of([0], [0], [self.into.nbytes])
        return list(cut(chunk, 0, slots, Binding.of(extents), stage=band, band=band))

    def whole(self, turned: bool) -> Table:
        (batch,) = self.cut(turned, -(-self.into.nbytes // LEAF) * LEAF)
        return batch.rows

    def bound(self, isa: str | None = None) -> CpuRunner:
        return Cpu(isa).bind([self.held])


@pytest.fixture(params=["square", "wide"])
def square(request: pytest.FixtureRequest, size: int) -> Square:
    side = 8192 if size >= 512 << 20 else 4096
    return Square(side, side) if request.param == "square" else Square(side // 2, side // 4096 * 5632)


@pytest.mark.parametrize(
    ("isa", "threads", "goal"),
    [(None, 0, 0.85), (None, 1, 0.60), ("avx2", 0, 0.70), ("avx2", 1, None), ("portable", 0, None)],
    ids=["all cores", "one thread", "avx2", "avx2 one thread", "portable"],
)
def bench_transpose(
    bench: Bench,
    square: Square,
    isa: str | None,
    threads: int,
    goal: float | None,
    request: pytest.FixtureRequest,
) -> None:
    """Transpose and cast, over the straight cast (best instructions) of the same elements and threads."""
    threads = threads or int(request.config.getoption("--threads"))
    straight, turned = square.whole(False), square.whole(True)
    best = square.bound()
    runner = square.bound(isa)
    what = f"straight cast / transpose + cast fp32 -> bf16, {isa or 'best instructions'}, {on(threads)}"
    bench.measure(
        Figure(
            what, _dims(square), "of the cast's speed", times_faster, goal and Goal(goal, at_most=False)
        ),
        Step("transpose", partial(runner.run, turned, [square.into], threads)),
        [Step("cast", partial(best.run, straight, [square.into], threads))],
        rounds=15,
    )  # fmt: skip


@pytest.mark.parametrize("both", [False, True], ids=["one thread", "all cores"])
def bench_transpose_staged(bench: Bench, square: Square, both: bool, threads: int) -> None:
    """As on the way to a file, but unwritten: transposed into 8 MiB bands, against cast into 1 MiB."""
    threads = threads if both else 1
    runner = square.bound()
    staging = [fresh(BAND) for _ in range(threads)]
    for each in staging:
        each[:] = 1
    free = list(staging)

    def staged(found: list[Batch]) -> None:
        def run(batch: Batch) -> None:
            into = free.pop()
            runner.run(batch.rows, [Buffer(into, into.ctypes.data, batch.stop - batch.start)], 1)
            free.append(into)

        share([partial(run, batch) for batch in found], threads)

    bench.measure(
        Figure(
            f"staged cast / staged transpose + cast (to file), {on(threads)}", _dims(square),
            "of the cast's speed", times_faster, Goal(0.70, at_most=False),
        ),
        Step("bands", partial(staged, square.cut(True, BAND))),
        [Step("staged cast", partial(staged, square.cut(False, LEAF)))],
        rounds=15,
    )  # fmt: skip


def bench_transpose_torch(bench: Bench, square: Square, threads: int) -> None:
    """Transpose and cast against torch's copy_ of the transposed matrix, the same threads."""
    source = torch.from_numpy(square.source)
    out = torch.ones(source.shape[::-1], dtype=torch.bfloat16)
    torch.set_num_threads(threads)
    bench.measure(
        Figure(
            "transpose + cast fp32 -> bf16 against torch's out.copy_(m.t())", _dims(square), "x faster",
            times_faster, Goal(20, at_most=False),
        ),
        Step("transpose", partial(square.bound().run, square.whole(True), [square.into], threads)),
        [Step("copy_", lambda: out.copy_(source.t()))],
        rounds=5,
    )  # fmt: skip
    assert torch.equal(square.made.view(torch.int16), out.view(-1).view(torch.int16))


def bench_small_copies(bench: Bench) -> None:
    """10^5 copies of 1 KiB in source order, over one straight cast of the same bytes, one thread."""
    count, length = 100_000, 256
    source = np.random.default_rng(7).standard_normal(count * length, np.float32)
    held = Buffer(source, source.ctypes.data, source.nbytes)
    extents = Extents([Extent(held, 0, held.nbytes)])
    made = torch.ones(count * length, dtype=torch.bfloat16)
    into = [Buffer(made, made.data_ptr(), made.nbytes)]

    def rows(pieces: int) -> Table:
        n = count * length // pieces
        views = [strided(extents, 0, float32, (n,), offset=k * n).cast(bfloat16) for k in range(pieces)]
        chunk, table = compile([Target(str(k), v) for k, v in enumerate(views)], extents)
        slots = Slots.of([0] * pieces, [k * n * 2 for k in range(pieces)], [n * 2] * pieces)
        whole = -(-made.nbytes // LEAF) * LEAF
        found = list(cut(chunk, 0, slots, Binding.of(table), stage=whole, band=whole))
        return np.concatenate([b.rows for b in found])

    runner = Cpu().bind([held])
    many = rows(count)
    assert len(many) == count
    bench.measure(
        Figure(
            "many small copies above the straight cast, one thread", "100000 copies of 1 KiB", "ns a copy",
            lambda subject, floor: (subject - floor) / count * 1e9, Goal(10),
        ),
        Step("copies", partial(runner.run, many, into, 1)),
        [Step("cast", partial(runner.run, rows(1), into, 1))],
        rounds=21,
    )  # fmt: skip


@pytest.mark.parametrize("turned", [False, True], ids=["stacked", "turned"])
def bench_experts(bench: Bench, turned: bool) -> None:
    """Experts from places of their own into one stack, over one tensor as large, likewise turned or not."""
    experts, rows, columns = 4096, 64, 64
    source = np.ones((experts, rows, columns), np.uint16)
    held = Buffer(source, source.ctypes.data, source.nbytes)
    extents = Extents([Extent(held, 0, held.nbytes)])
    made = torch.ones(source.size, dtype=torch.bfloat16)  # on a cache line, as stagings and tensors are
    into = [Buffer(made, made.data_ptr(), made.nbytes)]

    def rows_of(view: View) -> Table:
        chunk, table = compile([Target("x", view)], extents)
        size = made.nbytes
        (batch,) = cut(chunk, 0, Slots.of([0], [0], [size]), Binding.of(table), stage=size, band=size)
        return batch.rows

    def expert(k: int) -> View:
        view = strided(extents, 0, bfloat16, (rows, columns), offset=k * rows * columns)
        return view.T if turned else view

    apart = rows_of(stack([expert(k * 1021 % experts) for k in range(experts)]))
    whole = strided(extents, 0, bfloat16, source.shape)
    one = rows_of(whole.permute((0, 2, 1)) if turned else whole)
    assert len(apart) == experts and len(one) == 1
    runner = Cpu().bind([held])
    bench.measure(
        Figure(
            f"experts {'transposed and ' if turned else ''}stacked, above one tensor as large, one thread",
            "4096 experts of 8 KiB", "us an expert",
            lambda subject, floor: (subject - floor) / experts * 1e6, Goal(5),
        ),
        Step("stack", partial(runner.run, apart, into, 1)),
        [Step("one tensor", partial(runner.run, one, into, 1))],
        rounds=21,
    )  # fmt: skip


def _dims(square: Square) -> str:
    return " x ".join(map(str, square.source.shape))
