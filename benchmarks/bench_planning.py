"""Before the first tensor byte: opening, planning, kept plans, imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastckpt
import inputs
import pytest
from fastckpt.checkpoint import Checkpoint
from fastckpt.placement import Placement
from fastckpt.planning import plancache, plans
from fastckpt.planning.binding import Binding
from fastckpt.planning.request import Request
from fastckpt.quantisation.schemes import SCHEMES, Quant
from inputs import Input
from measure import Bench, Figure, Goal, Step, seconds, times_faster

RANKS = 1024


@pytest.mark.parametrize("frozen", [0, 80])
def bench_open(bench: Bench, folder: Path, frozen: int) -> None:
    """open() of a ZeRO-3 checkpoint of 1,024 ranks (2,048 sparse files), warm; frozen parameters lie in the
    model states of every rank, which are else left alone."""
    path = inputs.many_ranks(folder, RANKS, frozen)
    kind = f"723 tensors, {frozen} frozen, 2048 files" if frozen else "723 tensors, 2048 files"
    bench.measure(
        Figure("open() of 1,024 ZeRO-3 ranks, warm", kind, "s", seconds, Goal(5)),
        Step("open", lambda: fastckpt.open(path)),
        rounds=5,
    )


def bench_open_boxes(bench: Bench, boxes: Input) -> None:
    """open() of a DCP save of many ranks, warm: each box of each tensor is found."""
    bench.measure(
        Figure("open() of a DCP save, warm", boxes.shape, "s", seconds),
        Step("open", lambda: fastckpt.open(boxes.path)),
        rounds=5,
    )


@pytest.mark.parametrize("files", [False, True], ids=["in memory", "files"])
def bench_plan_small(bench: Bench, small: Input, files: bool) -> None:
    """Names, views, rows and file layouts of many small tensors of an opened checkpoint."""
    opened = fastckpt.open(small.path)
    request = Request(Placement(), layout="same", dtype="bfloat16")
    goal = Goal(1.0) if len(opened) == 100_000 else None
    bench.measure(
        Figure(
            f"planning {len(opened)} tensors, {'to files' if files else 'in memory'}",
            small.shape,
            "s",
            seconds,
            goal,
        ),
        Step("plan", lambda: plans.draft(opened, request, in_memory=not files)),
        rounds=5,
    )


def bench_plan_seventy(bench: Bench) -> None:
    """One TP-8 rank of a llama of 70B shape over 1,024 ZeRO-3 ranks, to vLLM's files."""
    opened = inputs.seventy(RANKS)
    request = Request(Placement(tp=8), rank=3, layout="vllm", dtype="bfloat16")
    rows = 0

    def run() -> None:
        nonlocal rows
        plan = plans.draft(opened, request)
        rows = sum(len(chunk.tensor) for chunk in plan.kept or ()) or rows

    bench.measure(
        Figure("planning one TP-8 rank of 70B over 1,024 ranks", "723 tensors", "s", seconds, Goal(3)),
        Step("plan", run),
        rounds=5,
    )


def bench_plan_deepseek(bench: Bench) -> None:
    """One of 16 expert-parallel ranks of DeepSeek-V3 with its scales, to vLLM's files."""
    opened = inputs.deepseek_v3()
    request = Request(Placement(dp=16, ep=16), rank=5, layout="vllm")
    told: dict[str, float | str] = {}

    def run() -> None:
        plan = plans.draft(opened, request)
        told["tensors"], told["GiB"] = len(plan.tensors), plan.output_bytes / 2**30

    bench.measure(
        Figure("planning one of 16 EP ranks of DeepSeek-V3", _count(opened), "s", seconds, Goal(3)),
        Step("plan", run),
        rounds=5,
        told=told,
    )


def _count(opened: Checkpoint) -> str:
    return f"{len(opened)} tensors"


def bench_kept_plan(
    bench: Bench, small: Input, folder: Path, monkeypatch: pytest.MonkeyPatch, work: Path
) -> None:
    """Look-up of a kept plan and its binding to the files as they are now."""
    monkeypatch.setenv("FASTCKPT_CACHE", str(work))
    opened = fastckpt.open(small.path)
    request = Request(Placement(), layout="same", dtype="bfloat16")
    plan = plans.draft(opened, request, in_memory=True)
    (key,) = [p.name for p in work.iterdir() if not p.name.startswith(".")]
    rows = sum(len(chunk.rows) for _, chunk in plan.chunks())

    def run() -> None:
        found = plancache.load(key, len(plan.extents))
        assert found is not None
        binding = Binding.of(opened.extents)
        for kept in found.chunks:
            binding.bind(kept.chunk().rows)

    bench.measure(
        Figure(
            "kept plan: look-up and rebind, per 10^4 rows",
            small.shape,
            "ms",
            lambda subject, floor: subject * 1e3 * 1e4 / rows,
            Goal(10),
        ),
        Step("look-up and rebind", run),
        rounds=9,
        told={"rows": rows},
    )


def bench_kept_quantised(bench: Bench, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    """The whole draft of a rank that is quantised, its plan kept, against making it anew."""
    opened = inputs.seventy(RANKS // 4)
    request = Request(Placement(tp=8), rank=3, layout="vllm", quant=Quant(SCHEMES["int8"]))

    def draft(folder: str) -> None:
        monkeypatch.setenv("FASTCKPT_CACHE", folder)
        plans.draft(opened, request, in_memory=True)

    bench.measure(
        Figure(
            "planning one TP-8 rank of 70B in int8, kept against anew",
            _count(opened),
            "x faster",
            times_faster,
        ),
        Step("kept", lambda: draft(str(work))),
        [Step("anew", lambda: draft("off"))],
        rounds=5,
    )


ROAD = "fastckpt.road, fastckpt.sources.zero, fastckpt.layouts.hf, fastckpt.recipes.llama"


@pytest.mark.parametrize("what", ["fastckpt", ROAD], ids=["fastckpt", "road"])
def bench_import(bench: Bench, what: str) -> None:
    """A fresh process that imports, less one that does not; byte code is kept, as installing keeps it."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}

    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, env=env)

    bench.measure(
        Figure(
            "import fastckpt" if what == "fastckpt" else "import all of a run of a llama from ZeRO to hf",
            "a fresh process",
            "ms",
            lambda subject, floor: (subject - floor) * 1e3,
            Goal(150),
        ),
        Step("import", lambda: start(f"import {what}, sys; assert 'torch' not in sys.modules")),
        [Step("python", lambda: start("pass"))],
        rounds=9,
    )
