"""Every conversion, exhaustively where the type is small, equals torch's `.to()`; NaN has our own table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastckpt import finite
from fastckpt.dtypes import BY_NAME, DType
from fastckpt.executors import Executor
from fastckpt.executors.cpu import Cpu
from fastckpt.executors.torch import Torch
from fastckpt.extents import Buffer
from fastckpt.planning.copies import COPY

_C = pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

FLOATS = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float64"]
QUIET_NAN = {"float32": 0x7FC00000, "bfloat16": 0x7FC0, "float16": 0x7E00, "float8_e4m3fn": 0x7F,
             "float8_e5m2": 0x7F, "float64": 0x7FF8 << 48}  # fmt: skip
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
EXECUTORS: list[Executor] = [Torch(), *(Cpu(isa) for isa in _C.isas())]


def patterns(src: DType) -> np.ndarray:
    """Bit patterns of a type: all of them up to two bytes, else edges and a random million."""
    if src.itemsize <= 2:
        return np.arange(1 << (8 * src.itemsize), dtype=UNSIGNED[src.itemsize])
    rng = np.random.default_rng(7)
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    edges = np.concatenate([high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0xFFFF)])
    single = np.concatenate([edges, rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32)])
    if src.itemsize == 4:
        return single
    wide = single[:600_000].view(np.float32)
    wide = wide[~np.isnan(wide)].astype(np.float64).view(np.uint64)
    ties = wide + np.uint64(1 << 28)  # halfway between two singles
    return np.concatenate(
        [wide, ties, ties + np.uint64(1), rng.integers(0, 1 << 64, 300_000, dtype=np.uint64)]
    )


def converted(executor: Executor, bits: np.ndarray, src: DType, dst: DType, step: int) -> np.ndarray:
    """`bits` through one row; with `step` 2 each element is followed by a gap on both sides."""
    source = np.repeat(bits, step)
    out = np.zeros(len(source), UNSIGNED[dst.itemsize])
    rows = np.zeros(1, COPY)
    rows["shape"][0] = [1, 1, 1, len(bits)]
    rows["src_stride"][0, 3], rows["dst_stride"][0, 3] = src.itemsize * step, dst.itemsize * step
    rows["src_dtype"], rows["dst_dtype"] = src.code, dst.code
    executor.bind([Buffer(source, source.ctypes.data, source.nbytes)]).run(
        rows, [Buffer(out, out.ctypes.data, out.nbytes)]
    )
    return out[::step]


@pytest.mark.parametrize("dst", FLOATS)
@pytest.mark.parametrize("src", FLOATS)
def test_every_value(src: str, dst: str) -> None:
    if src == dst:
        return
    s, d = BY_NAME[src], BY_NAME[dst]
    bits = patterns(s)
    values = torch.from_numpy(bits).view(getattr(torch, src))
    limit = values.float().clamp(-448, 448) if dst == "float8_e4m3fn" else values
    to = limit.to(getattr(torch, dst))
    wanted = to.view(torch.uint8).numpy().view(UNSIGNED[d.itemsize]).copy()
    nan = values.double().isnan().numpy()
    sign = (bits >> np.uint64(8 * s.itemsize - 1)).astype(np.uint64) << np.uint64(8 * d.itemsize - 1)
    wanted[nan] = (sign | np.uint64(QUIET_NAN[dst])).astype(wanted.dtype)[nan]
    for executor in EXECUTORS:
        for step in (1, 2):
            got = converted(executor, bits, s, d, step)
            wrong = np.flatnonzero(got != wanted)
            assert not len(wrong), [f"{x[i]:#x}" for i in wrong[:1] for x in (bits, got, wanted)]


def test_equal_types_keep_nan_payloads() -> None:
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC12345], np.uint32)
    for executor in EXECUTORS:
        assert np.array_equal(converted(executor, bits, BY_NAME["float32"], BY_NAME["float32"], 1), bits)


def test_flushed_denormals_of_the_caller_change_nothing() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    f16, bf16 = BY_NAME["float16"], BY_NAME["bfloat16"]
    wanted = converted(Cpu(), bits, f16, bf16, 1)
    torch.set_flush_denormal(True)
    try:
        for isa in _C.isas():
            assert np.array_equal(converted(Cpu(isa), bits, f16, bf16, 1), wanted)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", [*FLOATS, "int32", "bool", "complex64"])
def test_nonfinite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    d = BY_NAME[name]
    rng = np.random.default_rng(8)
    raw = rng.integers(0, 256, 8 * 30_001, dtype=np.uint8)
    if d.itemsize > 2:  # make them frequent
        raw[rng.integers(0, len(raw) // d.itemsize, 5000) * d.itemsize + d.itemsize - 1] = 0x7F
        raw[rng.integers(0, len(raw) // d.itemsize, 5000) * d.itemsize + d.itemsize - 2] = 0xFF
    if d.kind in ("int", "bool"):
        assert _C.nonfinite(raw, d.code) == finite.nonfinite(raw, d) == 0
        return
    monkeypatch.setattr(finite, "_C", None)  # numpy's, where nothing is compiled
    for n in (0, 1, 127, 128, 129, 30_001):
        part = raw[: n * d.itemsize]
        real = torch.from_numpy(part).view(torch.float32 if name == "complex64" else getattr(torch, name))
        assert _C.nonfinite(part, d.code) == int((~real.double().isfinite()).sum())
        assert finite.nonfinite(part, d) == int((~real.double().isfinite()).sum())
    with pytest.raises(ValueError, match="no dtype has the code 99"):
        _C.nonfinite(raw, 99)
