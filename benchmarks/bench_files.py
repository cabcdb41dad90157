"""File to file: the road over its floors, and over what people do today."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fastckpt
import inputs
import peers
import pytest
import torch
from fastckpt.checkpoint import Checkpoint
from fastckpt.layouts import Layout
from fastckpt.layouts.same import Same
from fastckpt.placement import Placement
from fastckpt.planning import plans
from fastckpt.planning.binding import Binding
from fastckpt.planning.plans import Plan
from fastckpt.planning.request import Request
from fastckpt.reader import Mapped
from fastckpt.running import tensors
from floors import GatherCast, Memcpy, Write, drop_cache, source_runs, touch
from inputs import Input
from measure import Bench, Figure, Goal, Step, of_floor, times_faster
from safetensors.torch import load_file

TP = 8


@dataclass(frozen=True, slots=True)
class Job:
    """What is made of an input: the llama cut over eight ranks as transformers cuts it, the small tensors
    gathered and cast into one file."""

    tp: int
    layout: str | Layout
    styles: peers.Styles
    files: str

    @staticmethod
    def of(given: Input) -> Job:
        if given.shape.startswith(("large", "sharded")):
            return Job(TP, "hf", peers.LLAMA, f"TP-{TP} files")
        return Job(1, Same("safetensors"), peers.WHOLE, "one file")

    def plan(self, ckpt: Checkpoint) -> Plan:
        return plans.draft(ckpt, Request(Placement(tp=self.tp), layout=self.layout, dtype="bfloat16"))

    def run(
        self, ckpt: Checkpoint | str, threads: int, out: list[peers.Shard] | None = None
    ) -> list[peers.Shard]:
        """In memory, into fresh tensors or `out`."""
        return fastckpt.reshard(ckpt, self.tp, layout=self.layout, dtype="bfloat16", out=out, threads=threads)


class Road:
    """reshard of an opened checkpoint to bf16 TP files in a new directory, with its phases."""

    def __init__(
        self,
        of: Input,
        out: Path,
        threads: int,
        *,
        durable: bool,
        finite: bool = False,
        adapter: Path | None = None,
    ) -> None:
        self.opened = fastckpt.open(of.path)
        self.job = Job.of(of)
        self.out, self.threads, self.durable, self.finite = out, threads, durable, finite
        self.adapter = adapter
        self.told: dict[str, float | str] = {"input": of.origin}

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def __call__(self) -> None:
        report = fastckpt.reshard(
            self.opened, self.job.tp, layout=self.job.layout, dtype="bfloat16", out=self.out,
            durable=self.durable, threads=self.threads, allow_nonfinite=not self.finite, adapter=self.adapter,
        )  # fmt: skip
        phases = {name: seconds for name, seconds in report.phases.items()}
        self.told |= {f"{name}_s": min(s, float(self.told.get(f"{name}_s", s))) for name, s in phases.items()}
        self.told |= {"bytes_read": report.bytes_read, "bytes_written": report.bytes_written}

    @property
    def step(self) -> Step:
        return Step("reshard", self, self.clear, self.clear)


def write_floor(plan: Plan, work: Path, threads: int, *, durable: bool) -> Step:
    write = Write([f.nbytes for f in plan.files], str(work / "floor"), threads, durable=durable)
    return Step("W durable" if durable else "W", write, write.clear, write.clear)


@pytest.mark.parametrize("finite", [False, True], ids=["no scan", "scan"])
def bench_end_to_end(bench: Bench, either: Input, work: Path, threads: int, finite: bool) -> None:
    """Planning, copying, writing and the commit, over C + W, page cache warm, no fsync."""
    road = Road(either, work / "out", threads, durable=False, finite=finite)
    plan = road.job.plan(road.opened)
    what = (
        f"{road.job.files}, bf16, warm, {'with the NaN scan, ' if finite else ''}{threads} threads / (C + W)"
    )
    bench.measure(
        Figure(what, either.shape, "of C + W", of_floor, None if finite else Goal(1.0)),
        road.step,
        [Step("C", GatherCast(plan, threads)), write_floor(plan, work, threads, durable=False)],
        rounds=7,
        told=road.told,
    )


def bench_end_to_end_max(bench: Bench, large: Input, work: Path, threads: int) -> None:
    """The same over the larger of memcpy and write; the goal is for four real cores or more."""
    road = Road(large, work / "out", threads, durable=False)
    plan = road.job.plan(road.opened)
    binding = Binding.of(plan.extents)
    with Mapped(binding.places) as reader:
        memcpy = Memcpy(source_runs(plan, binding, [b.address for b in reader.buffers]), threads)
        write = write_floor(plan, work, threads, durable=False)
        larger = [0.0]

        def timed(subject: float, floor: float) -> float:
            return subject / max(larger[0], floor)

        # W is the floor of the rounds; M, which nothing disturbs, is its best of seven.
        larger[0] = min(Step("M", memcpy).seconds() for _ in range(7))
        road.told["M_s"] = larger[0]
        bench.measure(
            Figure(
                f"the same / max(M, W), {threads} threads", large.shape, "of max(M, W)", timed,
                Goal(1.25) if threads >= 4 else None,
            ),
            road.step, [write], rounds=7, told=road.told,
        )  # fmt: skip


def bench_durable(bench: Bench, either: Input, work: Path, threads: int) -> None:
    """Everything fsynced, over writing the same bytes with fsync and the same early writeback."""
    road = Road(either, work / "out", threads, durable=True)
    plan = road.job.plan(road.opened)
    bench.measure(
        Figure(
            f"{road.job.files}, bf16, durable, {threads} threads / W durable",
            either.shape,
            "of W",
            of_floor,
            Goal(1.15),
        ),
        road.step,
        [write_floor(plan, work, threads, durable=True)],
        rounds=7,
        told=road.told,
    )


def bench_adapter(bench: Bench, large: Input, work: Path, threads: int) -> None:
    """An adapter on every matrix of the layers, merged on the way, over the same run without it; no fsync."""
    adapter = inputs.adapter(work / "adapter", large)
    plain = Road(large, work / "plain", threads, durable=False)
    merging = Road(large, work / "merged", threads, durable=False, adapter=adapter)
    bench.measure(
        Figure(
            f"{merging.job.files}, bf16, warm, an adapter of rank {inputs.RANK} merged / without it",
            large.shape, "of the run without", of_floor,
        ),
        merging.step,
        [Step("without it", plain, plain.clear, plain.clear)],
        rounds=5, told=merging.told,
    )  # fmt: skip


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("road", ["zero_to_fp32", "get_fp32_state_dict_from_zero_checkpoint"])
def bench_zero_split(
    bench: Bench, large: Input, work: Path, threads: int, road: str, cold: bool, peer: None
) -> None:
    """ZeRO files to bf16 TP files: DeepSpeed's converter, or its dict in memory, then torch, against one
    pass; no fsync. The goals are for the converter."""
    goal = Goal(3 if cold else 20, at_most=False) if road == "zero_to_fp32" else None
    one_pass(bench, "ZeRO", large, f"{road} + torch split", goal, work, threads, cold=cold)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def bench_dcp_to_torch_save_split(bench: Bench, sharded: Input, work: Path, threads: int, cold: bool) -> None:
    """FSDP's files to bf16 TP files: torch's own converter, then torch, against one pass; no fsync."""
    one_pass(bench, "FSDP", sharded, "dcp_to_torch_save + torch split", None, work, threads, cold=cold)


def one_pass(
    bench: Bench, kind: str, of: Input, today: str, goal: Goal | None, work: Path, threads: int, *, cold: bool
) -> None:
    torch.set_num_threads(threads)
    road = Road(of, work / "out", threads, durable=False, finite=True)
    split = work / "split"
    theirs = partial(peers.SPLITS[today], of.path, str(split), TP, peers.LLAMA)
    source = partial(drop_cache if cold else touch, of.path)

    def clear() -> None:
        for made in (split, Path(f"{split}-whole")):
            shutil.rmtree(made, ignore_errors=True)
        source()

    def ours() -> None:
        road.opened = fastckpt.open(of.path)
        road()

    def before() -> None:
        road.clear()
        source()

    theirs()
    equal(road.job.run(of.path, threads), [load_file(split / f"rank-{r}.safetensors") for r in range(TP)])
    bench.measure(
        Figure(
            f"{kind} to bf16 TP-8 files against {today}, {'cold' if cold else 'warm'}",
            of.shape, "x faster", times_faster, goal,
        ),
        Step("reshard", ours, before, road.clear),
        [Step(today, theirs, clear, clear)],
        rounds=5, told=road.told,
    )  # fmt: skip


def bench_consolidate(bench: Bench, large: Input, work: Path, threads: int, peer: None) -> None:
    """The whole model as fp32 .bin files, against DeepSpeed's converter; no fsync."""
    whole_model(bench, large, peers.zero_to_fp32, Goal(6, at_most=False), work, threads)


def bench_consolidate_fsdp(bench: Bench, sharded: Input, work: Path, threads: int) -> None:
    """The whole model as one fp32 .bin file, against torch's converter; no fsync."""
    whole_model(bench, sharded, peers.dcp_to_torch_save, None, work, threads)


def bench_consolidate_boxes(bench: Bench, boxes: Input, work: Path, threads: int) -> None:
    """The same of many small boxes, each of which has a header of its own."""
    whole_model(bench, boxes, peers.dcp_to_torch_save, None, work, threads)


def whole_model(
    bench: Bench, of: Input, convert: Callable[[str, str], None], goal: Goal | None, work: Path, threads: int
) -> None:
    ours, theirs = work / "ours", work / "theirs"

    def clear(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def run() -> None:
        fastckpt.consolidate(of.path, ours, durable=False, threads=threads)

    name = convert.__name__
    bench.measure(
        Figure(f"consolidate to fp32 .bin against {name}, warm", of.shape, "x faster", times_faster, goal),
        Step("consolidate", run, partial(clear, ours), partial(clear, ours)),
        [Step(name, partial(convert, of.path, str(theirs)), partial(clear, theirs), partial(clear, theirs))],
        rounds=5, told={"input": of.origin},
    )  # fmt: skip


def bench_eager(bench: Bench, either: Input, threads: int, peer: None) -> None:
    """In memory, fresh tensors on both sides, against torch: map, cat, to, split."""
    torch.set_num_threads(threads)
    job = Job.of(either)
    equal(job.run(either.path, threads), peers.eager(either.path, job.tp, job.styles))
    bench.measure(
        Figure("in memory, fresh tensors, against eager torch", either.shape, "x faster", times_faster),
        Step("reshard", lambda: job.run(either.path, threads)),
        [Step("eager torch", partial(peers.eager, either.path, job.tp, job.styles))],
        rounds=5,
        told={"input": either.origin},
    )


def bench_careful(bench: Bench, either: Input, threads: int, peer: None) -> None:
    """In memory, tensors that exist on both sides, against torch's copy_ through one reused buffer."""
    torch.set_num_threads(threads)
    job = Job.of(either)
    plan = job.plan(fastckpt.open(either.path))
    ours, theirs = (tensors.allocate(plan)[0] for _ in range(2))
    most = max(
        4096, *(sum(p.numel() for p in parts) for _, _, parts in peers.pieces(*peers.partitions(either.path)))
    )
    reused = torch.ones(most, dtype=torch.bfloat16)
    bench.measure(
        Figure("in memory, reused tensors, against careful torch", either.shape, "x faster", times_faster),
        Step("reshard", lambda: job.run(either.path, threads, ours)),
        [Step("careful torch", partial(peers.careful, either.path, job.tp, job.styles, theirs, reused))],
        rounds=5,
        told={"input": either.origin},
    )  # fmt: skip
    equal(ours, theirs)


def bench_save_file(bench: Bench, either: Input, work: Path, threads: int) -> None:
    """The whole road against safetensors' save_file of its result alone; no fsync."""
    road = Road(either, work / "out", threads, durable=False, finite=True)
    made = road.job.run(road.opened, threads)
    saved = work / "saved"

    def clear() -> None:
        shutil.rmtree(saved, ignore_errors=True)

    bench.measure(
        Figure(
            f"{road.job.files}, bf16, warm / safetensors save_file of the result alone", either.shape,
            "of save_file", of_floor,
        ),
        road.step,
        [Step("save_file", partial(peers.save, made, str(saved)), clear, clear)],
        rounds=5, told=road.told,
    )  # fmt: skip


KINDS = {
    "reshard": "large",
    "reshard same": "small",
    "consolidate": "large",
    "zero_to_fp32": "large",
    "zero_to_fp32 + torch split": "large",
    "get_fp32_state_dict_from_zero_checkpoint + torch split": "large",
    "dcp_to_torch_save + torch split": "sharded",
}
"""What `probe.py` does -> of which input."""


@pytest.mark.parametrize("figure", ["memory", "reads"])
@pytest.mark.parametrize("kind", KINDS)
def bench_footprint(
    bench: Bench, kind: str, figure: str, request: pytest.FixtureRequest, work: Path, threads: int
) -> None:
    """A conversion in a fresh process, cold: peak memory over the imports; bytes fetched from storage."""
    if "zero" in kind:
        request.getfixturevalue("peer")
    of: Input = request.getfixturevalue(KINDS[kind])
    out = work / "out"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), kind, of.path, str(out), str(TP)]
    found: list[dict[str, float]] = []

    def run() -> None:
        for made in (out, Path(f"{out}-whole")):
            shutil.rmtree(made, ignore_errors=True)
        drop_cache(of.path)
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))

    bench.fixture.pedantic(run, rounds=3)  # type: ignore[attr-defined]
    told: dict[str, float | str] = {"input": of.origin, **found[-1]}
    if figure == "memory":
        goal = Goal(64 + 4 * threads) if kind.startswith(("reshard", "consolidate")) else None
        peaks = [f["peak"] / 2**20 for f in found]
        bench.record(f"{kind}: peak memory over the imports", of.shape, "MiB", peaks, goal, told)
    else:
        reads = [f["disk"] / of.nbytes for f in found]
        bench.record(f"{kind}: bytes from storage, cold / fp32 masters", of.shape, "x", reads, None, told)


def equal(ours: object, theirs: list[peers.Shard]) -> None:
    """Both made the same tensors, bit for bit: a benchmark of wrong results says nothing."""
    assert isinstance(ours, list)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n].view(torch.int16), b[n].view(torch.int16)) for n in a)
