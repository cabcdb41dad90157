"""Quantising on the way: against the straight cast of the same source, torch's own arithmetic, torch.ao."""

from __future__ import annotations

import shutil
import warnings
from functools import partial
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt.placement import Placement
from fastckpt.planning import plans
from fastckpt.planning.request import Request
from fastckpt.quantisation.schemes import SCHEMES, Quant
from fastckpt.running.runs import Report
from floors import GatherQuantise, Write
from inputs import Input
from measure import Bench, Figure, Goal, Step, of_floor, on, times_faster

MATRICES, ROWS, COLUMNS = 4, 4096, 4096
CAST = {"int8": 1.6, "fp8-block": 1.6}
"""Scheme -> the goal of its row."""


@pytest.fixture(scope="module")
def dense() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"layers.{i}.up_proj.weight": torch.randn(ROWS, COLUMNS) for i in range(MATRICES)}


SHAPE = f"{MATRICES} x {ROWS} x {COLUMNS} fp32 in memory"


@pytest.mark.parametrize(
    "scheme", ["int8", "fp8-block", "fp8", "int4-group", "awq-group", "gptq-group", "mxfp8", "mxfp4"]
)
def bench_against_the_cast(bench: Bench, dense: dict[str, torch.Tensor], scheme: str, threads: int) -> None:
    """Into tensors that exist; both include planning."""
    road = partial(fastckpt.reshard, dense, layout="same", threads=threads)
    cast, made = road(dtype="bfloat16"), road(quant=scheme)
    goal = Goal(CAST[scheme]) if scheme in CAST else None
    what = f"fp32 -> {scheme} / fp32 -> bf16, reused tensors, {on(threads)}"
    bench.measure(
        Figure(what, SHAPE, "of the cast", of_floor, goal),
        Step(scheme, partial(road, quant=scheme, out=made)),
        [Step("cast", partial(road, dtype="bfloat16", out=cast))],
        rounds=9,
    )


def eager(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As one would write it in torch."""
    if scheme == "int8":
        scale = x.abs().amax(1, keepdim=True) / 127.5
        return torch.clamp(torch.round(x / scale), -128, 127).to(torch.int8), scale
    boxes = x.view(x.shape[0] // 128, 128, x.shape[1] // 128, 128)
    scale = boxes.abs().amax((1, 3), keepdim=True) / 448
    values = torch.clamp(boxes / scale, -448, 448).view(x.shape).to(torch.float8_e4m3fn)
    return values, scale[:, 0, :, 0]


@pytest.mark.parametrize("scheme", ["int8", "fp8-block"])
def bench_against_eager(bench: Bench, dense: dict[str, torch.Tensor], scheme: str, threads: int) -> None:
    """Against torch's own operations on the same tensors, with torch's own threads; equal first."""
    road = partial(fastckpt.reshard, dense, layout="same", quant=scheme, threads=threads)
    (made,) = out = road()
    assert not isinstance(made, str)
    end = "_scale_inv" if scheme == "fp8-block" else "_scale"
    for name, x in dense.items():
        values, scale = eager(x, scheme)
        assert torch.equal(made[name].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(made[name + end], scale)
    bench.measure(
        Figure(
            f"fp32 -> {scheme} against eager torch, {on(threads)}",
            SHAPE,
            "x faster",
            times_faster,
            Goal(10, at_most=False),
        ),
        Step(scheme, lambda: road(out=out)),
        [Step("eager torch", lambda: [eager(x, scheme) for x in dense.values()])],
        rounds=5,
    )


def bench_against_quantize_dynamic(bench: Bench, threads: int) -> None:
    """The five-layer LSTM of the word language model: quantised values from its state dict."""
    quantization = pytest.importorskip("torch.ao.quantization")
    warnings.filterwarnings("ignore")
    lstm = torch.nn.LSTM(512, 256, 5).eval()
    model = torch.nn.Sequential(lstm)
    state = model.state_dict()
    road = partial(fastckpt.reshard, state, layout="same", quant="int8-dynamic", threads=threads)
    out = road()

    def theirs() -> None:
        quantization.quantize_dynamic(model, {torch.nn.LSTM}, dtype=torch.qint8)

    bench.measure(
        Figure(
            f"int8-dynamic against quantize_dynamic, {on(threads)}",
            "LSTM 512 -> 256, 5 layers",
            "x faster",
            times_faster,
            Goal(5, at_most=False),
        ),
        Step("int8-dynamic", lambda: road(out=out)),
        [Step("quantize_dynamic", theirs)],
        rounds=9,
    )


@pytest.mark.parametrize("scheme", ["int8", "fp8-block"])
def bench_to_files(bench: Bench, large: Input, work: Path, threads: int, scheme: str) -> None:
    """ZeRO to quantised files, the rest of the model in bf16; no fsync."""
    out = work / "out"
    road = partial(
        fastckpt.reshard,
        fastckpt.open(large.path),
        dtype="bfloat16",
        quant=scheme,
        max_shard_size=large.nbytes // 16,
        out=out,
        durable=False,
        threads=threads,
        allow_nonfinite=True,
    )
    told: dict[str, float | str] = {"input": large.origin}

    def run() -> None:
        report = road()
        assert isinstance(report, Report)
        told.update({f"{n}_s": min(s, float(told.get(f"{n}_s", s))) for n, s in report.phases.items()})

    request = Request(
        Placement(), dtype="bfloat16", quant=Quant(SCHEMES[scheme]), max_shard_size=large.nbytes // 16
    )
    plan = plans.draft(fastckpt.open(large.path), request)
    made = GatherQuantise(plan, threads)
    write = Write([f.nbytes for f in plan.files], str(work / "floor"), threads, durable=False)
    clear = partial(shutil.rmtree, out, ignore_errors=True)
    bench.measure(
        Figure(
            f"{scheme} and bf16, {len(plan.files)} files, warm, {on(threads)} / (C + W)",
            large.shape,
            "of C + W",
            of_floor,
            Goal(1.3),
        ),
        Step("reshard", run, clear, clear),
        [Step("C", made, made.ready), Step("W", write, write.clear, write.clear)],
        rounds=7,
        told=told,
    )


def bench_dequantise(bench: Bench, dense: dict[str, torch.Tensor], threads: int) -> None:
    """quant=none from fp8 blocks to bf16, against torch's own operations; equal first."""
    (source,) = fastckpt.reshard(dense, layout="same", quant="fp8-block")
    road = partial(fastckpt.reshard, source, layout="same", quant="none", dtype="bfloat16", threads=threads)
    (made,) = out = road()

    def theirs(name: str) -> torch.Tensor:
        boxes = source[name].float().view(ROWS // 128, 128, COLUMNS // 128, 128)
        return (boxes * source[name + "_scale_inv"][:, None, :, None]).to(torch.bfloat16).view(ROWS, COLUMNS)

    for name in dense:
        assert torch.equal(made[name], theirs(name))
    bench.measure(
        Figure(
            f"fp8-block -> bf16 against eager torch, {on(threads)}",
            SHAPE,
            "x faster",
            times_faster,
            Goal(3, at_most=False),
        ),
        Step("quant none", lambda: road(out=out)),
        [Step("eager torch", lambda: [theirs(name) for name in dense])],
        rounds=5,
    )
