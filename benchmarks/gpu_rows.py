"""Single rows, peers and files on a GPU, for gpu.py: what is timed, what it moves, whether it is right."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fastckpt
import fastckpt._C as compiled
import numpy as np
import torch
from fastckpt.digest import LEAF
from fastckpt.dtypes import BY_NAME
from fastckpt.executors.cuda import Cuda, quantise
from fastckpt.extents import Buffer
from fastckpt.planning.copies import COPY
from fastckpt.quantisation import rounding
from fastckpt.quantisation.quantrows import There, tiled
from fastckpt.quantisation.schemes import SCHEMES
from fastckpt.running.gpu_sinks import leaves

State = dict[str, torch.Tensor]
Act = Callable[[], object]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """What a row times: ours, the bytes it reads and writes, torch doing the same, whether ours is right.

    `floor`: what ours is a fraction of; None is a copy of as many bytes. `wall`: seconds of the wall, for
    what the host takes part in."""

    name: str
    shape: str
    ours: Act
    nbytes: int
    eager: Act | None
    right: Callable[[], bool]
    floor: Act | None = None
    wall: bool = False


Makers = Iterator[tuple[str, Callable[[], Case]]]


def on(tensor: torch.Tensor) -> Buffer:
    return Buffer(tensor, tensor.data_ptr(), tensor.nbytes, str(tensor.device))


def run_of(rows: np.ndarray, source: torch.Tensor, out: torch.Tensor) -> Act:
    """Rows from the whole storage behind `source` into `out`, ready to run."""
    for side, t in (("src_dtype", source), ("dst_dtype", out)):
        rows[side] = BY_NAME[str(t.dtype).removeprefix("torch.")].code
    size = source.element_size()
    whole = source.as_strided((source.untyped_storage().nbytes() // size,), (1,), 0)
    return Cuda().bind([on(whole)]).prepare(rows, [on(out)]).run


def lines(source: torch.Tensor, out: torch.Tensor, shape: tuple[int, int], pitch: int) -> Act:
    """`shape` lines of the source, `pitch` elements apart."""
    row = np.zeros(1, COPY)
    s, d = source.element_size(), out.element_size()
    row["shape"][0] = [1, 1, *shape]
    row["src_stride"][0], row["dst_stride"][0] = [0, 0, pitch * s, s], [0, 0, shape[1] * d, d]
    row["src"] = source.storage_offset() * s
    return run_of(row, source, out)


def straight(src: torch.dtype, dst: torch.dtype, shift: int, nbytes: int) -> Case:
    """One long line, beginning `shift` elements past an aligned address."""
    n = nbytes // src.itemsize
    source = torch.randn((n + shift,), device="cuda").to(src)[shift:]
    out = torch.full((n,), math.nan, dtype=dst, device="cuda")
    return Case(
        f"gather_cast {short(src)}->{short(dst)}{' misaligned' if shift else ''}",
        f"{n}",
        lines(source, out, (1, n), n),
        n * (src.itemsize + dst.itemsize),
        lambda: source.to(dst, copy=True),
        lambda: torch.equal(out, source.to(dst)),
    )


def pitched(shift: int, nbytes: int) -> Case:
    """A row-parallel cut: an eighth of every row, beginning `shift` elements past an aligned address."""
    high = nbytes // (8192 * 4)
    source = torch.randn((high, 8192), device="cuda")[:, 1024 + shift : 2048 + shift]
    out = torch.full((high, 1024), math.nan, dtype=torch.bfloat16, device="cuda")
    return Case(
        f"gather_cast fp32->bf16 columns{' misaligned' if shift else ''}",
        f"{high}x8192, an eighth",
        lines(source, out, (high, 1024), 8192),
        source.numel() * 6,
        lambda: source.to(torch.bfloat16),
        lambda: torch.equal(out, source.to(torch.bfloat16)),
    )


def slivers(nbytes: int) -> Case:
    """What a rank takes of row-parallel expert matrices in partitions: 16 rows of each, 64 columns of 512."""
    count = nbytes // (16 * 512 * 4)
    source = torch.randn((count, 16, 512), device="cuda")[:, :, 192:256]
    out = torch.full((count, 16, 64), math.nan, dtype=torch.bfloat16, device="cuda")
    table = np.zeros(count, COPY)
    table["shape"] = [1, 1, 16, 64]
    table["src_stride"], table["dst_stride"] = [0, 0, 2048, 4], [0, 0, 128, 2]
    table["src"], table["dst"] = 768 + np.arange(count) * (16 * 2048), np.arange(count) * 2048
    return Case(
        "gather_cast fp32->bf16 slivers",
        f"{count} of 16x512, an eighth",
        run_of(table, source, out),
        source.numel() * 6,
        lambda: source.to(torch.bfloat16),
        lambda: torch.equal(out, source.to(torch.bfloat16)),
    )


def transposed(src: torch.dtype, dst: torch.dtype, rows: int, cols: int, nbytes: int, parts: int = 1) -> Case:
    """As many matrices as are well past the cache in one launch, a Copy row for each of `parts` that hold as
    many rows of one."""
    s, d = src.itemsize, dst.itemsize
    count, high = max(1, nbytes // (rows * cols * s)), rows // parts
    source = torch.randn((count, rows, cols), device="cuda").to(src)
    out = torch.full((count, cols, rows), math.nan, dtype=dst, device="cuda")
    table = np.zeros(count * parts, COPY)
    table["shape"] = [1, 1, cols, high]
    table["src_stride"], table["dst_stride"] = [0, 0, s, cols * s], [0, 0, rows * d, d]
    matrix, part = np.divmod(np.arange(count * parts), parts)
    table["src"] = (matrix * rows + part * high) * cols * s
    table["dst"] = (matrix * rows * cols + part * high) * d
    return Case(
        f"transpose {short(src)}->{short(dst)} {rows}x{cols}{f' in {parts} parts' if parts > 1 else ''}",
        f"{count} of {rows}x{cols}",
        run_of(table, source, out),
        count * rows * cols * (s + d),
        lambda: source.transpose(1, 2).contiguous().to(dst),
        lambda: torch.equal(out, source.transpose(1, 2).to(dst)),
    )


def digested(nbytes: int) -> Case:
    """Leaves of one tensor; the reading is the traffic."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
    table, _ = leaves([(source.data_ptr(), source.nbytes)])
    held = torch.from_numpy(table.view(np.int64)).cuda()
    out = torch.zeros((len(table),), dtype=torch.int64, device="cuda")

    def ours() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        compiled.launch_digests(held.data_ptr(), len(table), out.data_ptr(), stream)

    def right() -> bool:
        got = out.cpu().numpy().view(np.uint64)
        chosen = {0, len(table) // 2, len(table) - 1}
        data = {k: source[k * LEAF : (k + 1) * LEAF].cpu().numpy() for k in chosen}
        return all(int(got[k]) == compiled.digest64(data[k]) for k in chosen)

    return Case(f"digest xxh3-64, {nbytes >> 20} leaves", f"{nbytes >> 20} MiB", ours, nbytes, None, right)


def quantised(name: str, src: torch.dtype, rows: int, columns: int, nbytes: int) -> Case:
    """Matrices past the cache in one launch, which finds their scales too."""
    scheme, dtype = SCHEMES[name], BY_NAME[str(src).removeprefix("torch.")]
    count = max(1, nbytes // (rows * columns * src.itemsize))
    source = torch.randn((count, rows, columns), device="cuda").to(src)
    out = torch.full((count, rows, columns), 0x55, dtype=torch.uint8, device="cuda")
    scales = torch.zeros((count, *scheme.grid(rows, columns)), device="cuda")
    bad = torch.zeros((1,), dtype=torch.int32, device="cuda")
    parts = []
    for k in range(count):
        to = out[k].data_ptr(), scales[k].data_ptr()
        there = There(scheme, dtype, rows, columns, rows, *to, bad=bad.data_ptr())
        parts.append(there.part(0, rows, source[k].data_ptr(), columns * src.itemsize))
    table, owner, tiles = tiled(parts)
    held = [torch.from_numpy(column.view(np.uint8)).to("cuda") for column in (table, owner)]

    def eager() -> torch.Tensor:
        x = source.float()
        if scheme.block == (1, 0):
            return (x / (x.abs().amax(2, keepdim=True) / 127.5)).round().clamp(-128, 127).to(torch.int8)
        blocks = x.view(count, rows // 128, 128, columns // 128, 128)
        scale = blocks.abs().amax((2, 4), keepdim=True) / 448
        return (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    def right() -> bool:
        values = np.empty(rows * columns, np.uint8)
        for k in {0, count - 1}:
            dense = source[k].cpu().view(torch.uint8).numpy().reshape(-1)
            found = rounding.quantise(dense, dtype, rows, columns, scheme, None, values)
            if found is None or not np.array_equal(out[k].cpu().numpy().reshape(-1), values):
                return False
            if not np.array_equal(scales[k].cpu().numpy(), found.scales):
                return False
        return True

    return Case(
        f"quantise {name} {short(src)}",
        f"{count} of {rows}x{columns}",
        lambda: quantise(held[0], held[1], 0, int(tiles[-1])),
        source.nbytes + out.nbytes + scales.nbytes,
        eager,
        right,
    )


def short(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(str(dtype)[6:], str(dtype)[6:])


# ---- what torch has a kernel for ----


def many(size: int, nbytes: int) -> tuple[np.ndarray, list[torch.Tensor], torch.Tensor]:
    """Rows of `size` bytes each, the runs they read, and those as one."""
    count = min(1 << 16, nbytes // size)
    whole = torch.randint(0, 256, (count * size,), dtype=torch.uint8, device="cuda")
    rows = np.zeros(count, COPY)
    rows["shape"], rows["src_stride"][:, 3], rows["dst_stride"][:, 3] = 1, 1, 1
    rows["shape"][:, 3] = size
    rows["src_dtype"] = rows["dst_dtype"] = BY_NAME["uint8"].code
    return rows, list(whole.split(size)), whole


def foreach_copy(size: int, nbytes: int) -> Case:
    """Many tensors into many."""
    rows, given, whole = many(size, nbytes)
    into = [torch.zeros((size,), dtype=torch.uint8, device="cuda") for _ in given]
    rows["src"], rows["dst_buffer"] = np.arange(len(rows)) * size, np.arange(len(rows))
    return Case(
        f"peer foreach_copy {size} B",
        f"{len(rows)} tensors",
        Cuda().bind([on(whole)]).prepare(rows, [on(o) for o in into]).run,
        2 * len(rows) * size,
        lambda: torch._foreach_copy_(into, given),
        lambda: torch.equal(torch.cat(into), whole),
    )


def cat(size: int, nbytes: int) -> Case:
    """Many tensors into one."""
    rows, given, whole = many(size, nbytes)
    one = torch.zeros((len(rows) * size,), dtype=torch.uint8, device="cuda")
    rows["src_buffer"], rows["dst"] = np.arange(len(rows)), np.arange(len(rows)) * size
    return Case(
        f"peer cat {size} B",
        f"{len(rows)} tensors",
        Cuda().bind([on(s) for s in given]).prepare(rows, [on(one)]).run,
        2 * len(rows) * size,
        lambda: torch.cat(given),
        lambda: torch.equal(one, whole),
    )


def chunk_cat(dst: torch.dtype, nbytes: int) -> Case:
    """FSDP2's kernel: every tensor cut in eight along its rows, the pieces of a rank side by side."""
    shapes = [(1024, 1024), (512, 4096), (8, 1000), (2048, 24)]
    count = max(1, nbytes // (2 * sum(a * b for a, b in shapes)))
    sizes = [a * b for a, b in shapes * count]
    given = [torch.randn((a, b), device="cuda").to(torch.bfloat16) for a, b in shapes * count]
    total, d = sum(sizes) // 8, dst.itemsize
    out = torch.full((8, total), math.nan, dtype=dst, device="cuda")
    into = torch.empty((8, total), dtype=dst, device="cuda")
    rows = np.zeros(len(given), COPY)
    each = np.array(sizes) // 8
    rows["shape"] = 1
    rows["shape"][:, 2], rows["shape"][:, 3] = 8, each
    rows["src_stride"][:, 2], rows["src_stride"][:, 3] = each * 2, 2
    rows["dst_stride"][:, 2], rows["dst_stride"][:, 3] = total * d, d
    rows["src_buffer"], rows["dst"] = np.arange(len(given)), (np.cumsum(each) - each) * d
    rows["src_dtype"], rows["dst_dtype"] = (BY_NAME[str(t)[6:]].code for t in (torch.bfloat16, dst))

    def peer() -> torch.Tensor:
        return torch._chunk_cat(given, 0, 8, out=into)

    return Case(
        f"peer chunk_cat bf16->{short(dst)}",
        f"{len(given)} tensors to 8 ranks",
        Cuda().bind([on(t) for t in given]).prepare(rows, [on(out)]).run,
        sum(sizes) * (2 + d),
        peer,
        lambda: torch.equal(out, peer()),
    )


# ---- files ----


def files_to_gpu(src: torch.dtype, small: bool) -> Case:
    """safetensors in the page cache to bf16 on the GPU, against pinned H2D of the bytes that arrive.

    Time by the wall, planning included: enough bytes (2 GiB arrive) that its two milliseconds are a small
    part, and few enough that a slow disk keeps nobody waiting."""
    from safetensors.torch import load_file, save_file

    count, side = (2, 128) if small else (64, 4096)
    weights = {f"{k}": torch.randn((side, side), device="cuda").to(src).cpu() for k in range(count)}
    nbytes = sum(t.numel() * 2 for t in weights.values())
    there = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
    pinned = torch.empty((nbytes,), dtype=torch.uint8, pin_memory=True)
    pinned.copy_(there)
    out = {n: torch.zeros(tuple(t.shape), dtype=torch.bfloat16, device="cuda") for n, t in weights.items()}
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "model.safetensors"
    save_file(weights, path)

    def load() -> None:
        fastckpt.reshard(path.parent, rank=0, layout="same", dtype="bfloat16", device="cuda", out=out)

    def plain() -> None:
        for name, t in load_file(path).items():
            out[name].copy_(t.cuda().to(torch.bfloat16))

    def right() -> bool:
        assert path.is_relative_to(folder.name)  # it goes with the last who names it
        load()
        return all(torch.equal(out[n].cpu(), t.to(torch.bfloat16)) for n, t in weights.items())

    return Case(
        f"files_to_gpu {short(src)}->bf16",
        f"{count} of {side}x{side}, floor: pinned H2D",
        load,
        nbytes,
        plain,
        right,
        floor=lambda: there.copy_(pinned, non_blocking=True),
        wall=True,
    )


def cases(small: bool) -> Makers:
    """The rows by name, in the order of what is asked first of a GPU."""
    f32, bf16 = torch.float32, torch.bfloat16
    two, one = (1 << 20, 1 << 19) if small else (2 << 30, 1 << 30)
    for src, dst, shift in ((f32, bf16, 0), (bf16, bf16, 0), (bf16, f32, 0), (f32, bf16, 1), (bf16, bf16, 1)):
        name = f"gather_cast {short(src)}->{short(dst)}{' misaligned' if shift else ''}"
        yield name, lambda s=src, d=dst, k=shift: straight(s, d, k, two)
    yield "gather_cast fp32->bf16 columns", lambda: pitched(0, two)
    yield "gather_cast fp32->bf16 columns misaligned", lambda: pitched(1, two)
    yield "gather_cast fp32->bf16 slivers", lambda: slivers(two)
    for src, dst in ((f32, f32), (bf16, bf16), (f32, bf16)):
        for rows, cols in ((128, 256),) if small else ((4096, 4096), (16384, 8192), (14336, 4096)):
            name = f"transpose {short(src)}->{short(dst)} {rows}x{cols}"
            yield name, lambda s=src, d=dst, r=rows, c=cols: transposed(s, d, r, c, one)
    rows, cols, parts = (128, 256, 8) if small else (1024, 4096, 64)
    for src in (f32, bf16):
        name = f"transpose {short(src)}->bf16 {rows}x{cols} in {parts} parts"
        yield name, lambda s=src, r=rows, c=cols, p=parts: transposed(s, bf16, r, c, one, p)
    for nbytes in (4 << 20,) if small else (2 << 30, 8 << 30):
        yield f"digest xxh3-64, {nbytes >> 20} leaves", lambda n=nbytes: digested(n)
    for scheme in ("fp8-block", "int8"):
        for src in (bf16, f32):
            side = 256 if small else 4096
            name = f"quantise {scheme} {short(src)}"
            yield name, lambda n=scheme, s=src, k=side: quantised(n, s, k, k, one)
    for size in (1 << 10, 1 << 16, 1 << 22):
        n = 2 * size if small else one
        yield f"peer foreach_copy {size} B", lambda s=size, n=n: foreach_copy(s, n)
        yield f"peer cat {size} B", lambda s=size, n=n: cat(s, n)
    for dst in (bf16, f32):
        yield f"peer chunk_cat bf16->{short(dst)}", lambda d=dst: chunk_cat(d, 1 if small else one)
    for src in (f32, bf16):
        yield f"files_to_gpu {short(src)}->bf16", lambda s=src: files_to_gpu(s, small)
