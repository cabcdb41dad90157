"""Copy rows: every executor and instruction set gives the bytes of the torch executor, and only those."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
from fastckpt import executors
from fastckpt.dtypes import BY_NAME, DTYPES, DType, castable
from fastckpt.errors import DeviceError
from fastckpt.executors import cpu
from fastckpt.executors.torch import Torch
from fastckpt.extents import Buffer

_C = pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

COPY = np.dtype(
    [
        ("src", "<u8"),
        ("dst", "<u8"),
        ("src_stride", "<i8", (4,)),
        ("dst_stride", "<i8", (4,)),
        ("shape", "<u4", (4,)),
        ("src_buffer", "<u4"),
        ("dst_buffer", "<u4"),
        ("first_tile", "<u8"),
        ("src_dtype", "u1"),
        ("dst_dtype", "u1"),
        ("path", "u1"),
        ("reserved", "u1", (13,)),
    ]
)
PAIRS = [(s, d) for s in DTYPES for d in DTYPES if castable(s, d)]

TRANSPOSED = [
    "float32 bfloat16",
    "float32 float32",
    "bfloat16 bfloat16",
    "bfloat16 float32",
    "float32 float8_e4m3fn",
    "int8 int8",
    "int64 int64",
    "float64 float16",
]

EVEN = [
    "float32 bfloat16",
    "bfloat16 float32",
    "bfloat16 float16",
    "float32 float8_e4m3fn",
    "int8 int8",
]


def buffer(array: np.ndarray) -> Buffer:
    return Buffer(array, array.ctypes.data, array.nbytes)


def row(
    src: DType,
    dst: DType,
    shape: Sequence[int],
    src_stride: Sequence[int],
    dst_stride: Sequence[int],
    at: tuple[int, int] = (0, 0),
    zero: bool = False,
) -> np.ndarray:
    """One row; strides in bytes; axes are padded on the left."""
    pad = 4 - len(shape)
    r = np.zeros(1, COPY)
    r["shape"][0] = [1] * pad + list(shape)
    r["src_stride"][0] = [0] * pad + list(src_stride)
    r["dst_stride"][0] = [0] * pad + list(dst_stride)
    r["src"], r["dst"] = at
    r["src_dtype"], r["dst_dtype"] = src.code, dst.code
    r["src_buffer"] = 0xFFFFFFFF if zero else 0
    return r


Case = tuple[np.ndarray, np.ndarray, int]
"""A row, its source, and the bytes of its destination, those behind what it fills among them."""


def transposes(
    rng: np.random.Generator,
    src: DType,
    dst: DType,
    sides: Iterable[tuple[int, int]],
    places: Sequence[tuple[int, int]],
) -> Iterator[Case]:
    """Transposes of so many rows and columns; each with lines so many elements longer, from such a byte."""
    for rows, cols in sides:
        for pad, at in places:
            pitch = (cols + pad) * src.itemsize
            strides = (src.itemsize, pitch), ((rows + pad) * dst.itemsize, dst.itemsize)
            made = row(src, dst, (cols, rows), *strides, (at, at))
            yield made, noise(rng, at + rows * pitch), at + cols * (rows + pad) * dst.itemsize + 64


def lines(
    rng: np.random.Generator,
    src: DType,
    dst: DType,
    sizes: Iterable[tuple[int, int]],
    places: Sequence[int],
) -> Iterator[Case]:
    """So many lines of so many elements, close together or not, at each of these bytes of the destination and
    as far before byte 24 of the source."""
    s, d = src.itemsize, dst.itemsize
    for count, n in sizes:
        for at in places:
            for wide in (n, n + 1, n + 16) if count > 1 else (n,):
                made = row(src, dst, (count, n), (wide * s, s), (wide * d, d), (24 - at, at))
                yield made, noise(rng, 24 + count * wide * s), 88 + count * wide * d


def many_rows(rng: np.random.Generator, count: int, longest: int) -> Case:
    """Rows of up to so many fp32, all of them bf16 side by side."""
    sizes = rng.integers(1, longest, count)
    ends = np.cumsum(sizes)
    rows = np.repeat(row(BY_NAME["float32"], BY_NAME["bfloat16"], (1,), (4,), (2,)), count)
    rows["shape"][:, 3] = sizes
    rows["src"], rows["dst"] = (ends - sizes) * 4, (ends - sizes) * 2
    return rows, noise(rng, int(ends[-1]) * 4), int(ends[-1]) * 2 + 64


def even_lines(rng: np.random.Generator, src: DType, dst: DType) -> Iterator[Case]:
    """Planes of lines whose lengths and distances are multiples of 16 bytes, shorter and longer than a tile
    of a GPU's; zeros; NaN here and there."""
    s, d = src.itemsize, dst.itemsize
    shapes = ((1, 1, 16, 64), (1, 1, 70, 32), (2, 3, 5, 48), (1, 2, 300, 32), (3, 1, 2, 640), (1, 1, 9, 1040))
    for k, (*planes, lines, n) in enumerate(shapes):
        wide, tall = n + 16 * (k % 3), lines + k % 2
        size = wide * tall * planes[1]
        stride = [(size * x, wide * tall * x, wide * x, x) for x in (s, d)]
        for at in (0 if k % 4 < 3 else 4, 16 - s):
            source = noise(rng, at + planes[0] * size * s)
            if k % 2:
                source[s - 1 :: s] &= 0x3F  # no exponent of ones
            zero = src is dst and k % 4 == 1
            made = row(src, dst, (*planes, lines, n), *stride, (at, 0), zero)
            yield made, source, planes[0] * size * d + 64


def laid_out(
    rng: np.random.Generator, shape: Sequence[int], order: Sequence[int], item: int
) -> tuple[list[int], int]:
    """Strides in bytes with the axes of `order` from outermost to innermost, padded at random; all bytes."""
    stride = [0] * len(shape)
    step = item if rng.random() < 0.8 else item * int(rng.integers(2, 4))
    for axis in reversed(order):
        stride[axis] = step
        step = step * shape[axis] + int(rng.choice([0, 0, 1, 7])) * item
    return stride, sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + item


def random_row(rng: np.random.Generator, src: DType, dst: DType, budget: int) -> tuple[np.ndarray, int, int]:
    """A row of at most `budget` elements, and the bytes of its source and destination."""
    ndim = int(rng.integers(0, 5))
    shape: list[int] = []
    for _ in range(ndim):
        left = max(1, budget // max(1, int(np.prod(shape))))
        shape.append(int(rng.integers(1, min(300, left) + 1)))
    rng.shuffle(shape)
    from_stride, from_bytes = laid_out(rng, shape, rng.permutation(ndim).tolist(), src.itemsize)
    to_stride, to_bytes = laid_out(rng, shape, range(ndim), dst.itemsize)
    at = (int(rng.integers(0, 70)), int(rng.integers(0, 70)))
    zero = rng.random() < 0.05
    return row(src, dst, shape, from_stride, to_stride, at, zero), at[0] + from_bytes, at[1] + to_bytes


def noise(rng: np.random.Generator, nbytes: int) -> np.ndarray:
    return rng.integers(0, 256, nbytes, dtype=np.uint8)


def require_equal(got: np.ndarray, wanted: np.ndarray, rows: np.ndarray, who: str = "") -> None:
    """Fails at the first byte that differs."""
    if not np.array_equal(got, wanted):
        at = int(np.flatnonzero(got != wanted)[0])
        pytest.fail(f"{who}byte {at}: got {got[at]:#x}, wanted {wanted[at]:#x}, row {rows[0]}")


def same(rows: np.ndarray, source: np.ndarray, out: np.ndarray, threads: Sequence[int] = (1,)) -> None:
    """Run on copies of `out`, with each instruction set and with torch; every byte must agree, guards too."""
    wanted = out.copy()
    Torch().bind([buffer(source)]).run(rows, [buffer(wanted)])
    for isa in _C.isas():
        for n in threads:
            got = out.copy()
            cpu.Cpu(isa).bind([buffer(source)]).run(rows, [buffer(got)], n)
            require_equal(got, wanted, rows, f"{isa}, ")


def test_random_rows() -> None:
    rng = np.random.default_rng(1)
    for src, dst in PAIRS:
        for budget in (1, 40, 700, 6000):
            r, n, m = random_row(rng, src, dst, budget)
            same(r, noise(rng, n), noise(rng, m + 64))


@pytest.mark.nightly
def test_random_rows_many() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        for src, dst in PAIRS:
            r, n, m = random_row(rng, src, dst, int(rng.integers(1, 30_000)))
            same(r, noise(rng, n), noise(rng, m + 64), (1, 3))


@pytest.mark.parametrize("names", TRANSPOSED)
def test_transposes(names: str) -> None:
    """Every edge of the tiles: rows and columns around the sizes of a block and a tile, aligned and not."""
    src, dst = (BY_NAME[n] for n in names.split())
    rng = np.random.default_rng(3)
    sides = [
        (1, 300), (16, 16), (31, 17), (32, 16), (33, 47), (64, 512), (65, 513), (130, 530), (300, 9),
        (257, 1041), (530, 260),
    ]  # fmt: skip
    places = [(0, 0), (3, 1), (5, dst.itemsize * 3), (64, 64)]
    for r, source, nbytes in transposes(rng, src, dst, sides, places):
        same(r, source, noise(rng, nbytes))


@pytest.mark.parametrize("names", ["float32 bfloat16", "float32 float16"])
def test_lines_at_every_place_in_a_cache_line(names: str) -> None:
    """From a buffer that ends with the line's last element: nothing behind it may be read."""
    src, dst = (BY_NAME[n] for n in names.split())
    rng = np.random.default_rng(8)
    for length in (511, 512, 575, 1601):
        for at in (*range(0, 64, 4), 3):
            source, out = noise(rng, at + length * 4), noise(rng, length * 2 + 128)
            same(row(src, dst, (length,), (4,), (2,), (at, at % 10)), source, out)


@pytest.mark.parametrize("names", ["float32 bfloat16", "float32 float32", "bfloat16 float32"])
def test_large_rows_stream_past_the_cache(names: str) -> None:
    """Outputs past the streaming threshold: a line, padded lines and a transpose, at odd offsets."""
    src, dst = (BY_NAME[n] for n in names.split())
    s, d = src.itemsize, dst.itemsize
    rng = np.random.default_rng(4)
    n = (6 << 20) // d + 100_013
    source = noise(rng, n * s + 64)
    out = np.zeros(n * d + 4096 + 64, np.uint8)
    out = out[-out.ctypes.data % 64 :]
    out[:] = 0xA5
    for first, at in ((3, 0), (3, 2 * d), (3, 1), (4, 0), (60, 2 * d)):
        same(row(src, dst, (n,), (s,), (d,), (first, at)), source, out, (1, 3))
    lines = n // 1664
    same(row(src, dst, (lines, 1601), (1601 * s, s), (1664 * d, d)), source, out, (1, 3))
    for at in (0, 5 * d):
        same(row(src, dst, (lines, 1600), (s, lines * s), (1664 * d, d), (0, at)), source, out, (1, 3))
    columns = n // 1600 // 64 * 64  # whole lines of the source, however the first one lies
    for first, at in ((0, 0), (s, 3 * d), (7 * s, 0), (2, d)):
        turned = row(src, dst, (columns - 9, 1600), (s, columns * s), (1600 * d, d), (first, at))
        same(turned, source, out, (1, 3))


def test_many_small_rows() -> None:
    rng = np.random.default_rng(5)
    rows, source, nbytes = many_rows(rng, 1000, 70)
    same(rows, source, noise(rng, nbytes), (1, 2))


def test_where_the_system_starts_no_more_threads() -> None:
    """The threads that there are do the work; RLIMIT_NPROC binds no root, so root becomes another user."""
    program = """
import os, resource, threading
import numpy as np
from fastckpt.executors import cpu
from fastckpt.extents import Buffer
from fastckpt.planning.copies import COPY
source = np.arange(1 << 23, dtype=np.uint32)
got = np.zeros_like(source)
rows = np.zeros(1, COPY)
rows["shape"], rows["src_stride"], rows["dst_stride"] = (1, 1, 1, 1 << 23), (0, 0, 0, 4), (0, 0, 0, 4)
rows["src_dtype"] = rows["dst_dtype"] = CODE
buffers = [Buffer(a, a.ctypes.data, a.nbytes) for a in (source, got)]
runner = cpu.Cpu(None).bind(buffers[:1])
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
if os.getuid() == 0:
    os.setuid(54321)
try:
    threading.Thread(target=int).start()
except RuntimeError:
    runner.run(rows, buffers[1:], 4)
    print(np.array_equal(got, source))
""".replace("CODE", str(BY_NAME["int32"].code))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_same_type_rows_are_numpy_copies() -> None:
    """The reference itself against numpy: a permuted, strided copy of integers."""
    rng = np.random.default_rng(6)
    source = rng.integers(0, 1 << 30, (5, 6, 7, 8), dtype=np.int32)
    view = source[1:4, ::2].transpose(2, 0, 3, 1)
    wanted = np.ascontiguousarray(view)
    int32 = BY_NAME["int32"]
    r = row(
        int32, int32, view.shape, view.strides, wanted.strides, (view.ctypes.data - source.ctypes.data, 0)
    )
    for executor in (Torch(), cpu.Cpu()):
        got = np.zeros_like(wanted)
        executor.bind([buffer(source)]).run(r, [buffer(got)])
        assert got.tobytes() == wanted.tobytes()


def test_several_buffers_and_zero_rows() -> None:
    int8 = BY_NAME["int8"]
    a, b = np.arange(10, dtype=np.int8), np.arange(10, 20, dtype=np.int8)
    rows = np.concatenate([row(int8, int8, (4,), (1,), (1,)), row(int8, int8, (4,), (1,), (1,), (2, 4)),
                           row(int8, int8, (2, 2), (0, 0), (4, 2), (0, 0), zero=True)])  # fmt: skip
    rows["src_buffer"][1], rows["dst_buffer"][2] = 1, 1
    for executor in (Torch(), cpu.Cpu()):
        x, y = np.full(9, -1, np.int8), np.full(9, -1, np.int8)
        executor.bind([buffer(a), buffer(b)]).run(rows, [buffer(x), buffer(y)])
        assert x.tolist() == [0, 1, 2, 3, 12, 13, 14, 15, -1]
        assert y.tolist() == [0, -1, 0, -1, 0, -1, 0, -1, -1]


def test_the_row_is_the_plans_and_the_compilers() -> None:
    from fastckpt.planning import copies

    wanted = [(name, of[1], of[0].itemsize) for name, of in COPY.fields.items()]
    assert _C.fields() == wanted and _C.copy_bytes == COPY.itemsize == 128
    assert copies.COPY == COPY
    other = np.dtype({"names": ["src"], "formats": ["<u8"], "itemsize": 128})
    with pytest.raises(DeviceError, match=r"copy\.h wants"):
        cpu.Cpu().bind([]).run(np.zeros(1, other), [])


def test_refusals() -> None:
    f32, i32 = BY_NAME["float32"], BY_NAME["int32"]
    a = np.zeros(4, np.float32)
    runner = cpu.Cpu().bind([buffer(a)])
    for threads in (1, 2):
        with pytest.raises(DeviceError, match="row 0: no conversion of dtype code 0 to 9"):
            runner.run(row(f32, i32, (4,), (4,), (4,)), [buffer(a)], threads)
        for name in ("src_buffer", "dst_buffer"):
            r = row(f32, f32, (4,), (4,), (4,))
            r[name] = 3
            with pytest.raises(DeviceError, match="buffer 3 of 1"):
                runner.run(r, [buffer(a)], threads)
    with pytest.raises(DeviceError, match="no conversion of float32 to int32"):
        Torch().bind([buffer(a)]).run(row(f32, i32, (4,), (4,), (4,)), [buffer(a)])
    with pytest.raises(DeviceError, match="main memory"):
        cpu.Cpu().bind([Buffer(None, 0, 4, "cuda")])
    with pytest.raises(DeviceError, match="no instruction set 'sse9'"):
        cpu.Cpu("sse9")
    with pytest.raises(DeviceError, match="no executor 'tpu'; known: cpu, torch"):
        executors.pick("tpu")


def test_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    assert executors.pick().name == "cpu" and executors.pick("torch").name == "torch"
    monkeypatch.setattr(cpu, "_C", None)
    assert executors.pick().name == "torch"
    with pytest.raises(DeviceError, match="not built"):
        executors.pick("cpu")
