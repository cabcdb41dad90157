"""The GPU's rows: ours against a copy of the same traffic and against plain torch, on whatever GPU is here.

python benchmarks/gpu.py [NAME...]     # rows whose name begins so; writes benchmarks/results/GPU-DATE.json

CUDA events around one call, median of at least 20, subject, floor and peer in turns; random data, working
sets past the cache, outputs poisoned first and compared with torch after. The floor is `copy_` of bytes that
make the same traffic (read + written).
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import fastckpt
import fastckpt._C as compiled
import numpy as np
import torch
from fastckpt.device import leaves
from fastckpt.dtypes import BY_NAME
from fastckpt.executors.cuda import Cuda
from fastckpt.extents import Buffer
from fastckpt.planner import COPY, LEAF
from safetensors.torch import save_file

ROUNDS = 21
GIB = 1 << 30
HERE = Path(__file__).parent

State = dict[str, torch.Tensor]
Act = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """`bytes`: read and written; `fraction_of_copy`: the floor's time by ours; `speedup_vs_eager`: torch's by
    ours, 0 where nothing was compared."""

    name: str
    shape: str
    ms: float
    bytes: int
    fraction_of_copy: float
    speedup_vs_eager: float


@dataclass(frozen=True, slots=True)
class Case:
    """What a row times: ours, the bytes it moves, plain torch doing the same, and whether ours is right."""

    name: str
    shape: str
    ours: Act
    nbytes: int
    eager: Act | None
    right: Callable[[], bool]


def timed(act: Act) -> float:
    """Milliseconds of one call on the GPU."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    act()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(case: Case) -> Row:
    """All three in turns, after a round that does not count."""
    half = torch.empty(case.nbytes // 2, dtype=torch.uint8, device="cuda").random_()
    into = torch.empty_like(half)
    acts: list[Act] = [case.ours, lambda: into.copy_(half)]
    if case.eager is not None:
        acts.append(case.eager)
    times: list[list[float]] = [[] for _ in acts]
    for k in range(ROUNDS + 1):
        for act, seen in zip(acts, times, strict=True):
            ms = timed(act)
            if k:
                seen.append(ms)
    if not case.right():
        raise SystemExit(f"{case.name}: wrong bytes")
    ours, floor, *peer = (statistics.median(t) for t in times)
    return Row(case.name, case.shape, ours, case.nbytes, floor / ours, peer[0] / ours if peer else 0.0)


def on(tensor: torch.Tensor) -> Buffer:
    return Buffer(tensor, tensor.data_ptr(), tensor.nbytes, str(tensor.device))


def one_row(source: torch.Tensor, out: torch.Tensor, shape: tuple[int, int], strides: tuple[int, int]) -> Act:
    """A single Copy row: `shape` in the order of `out`, `strides` of the source in elements."""
    row = np.zeros(1, COPY)
    s, d = source.element_size(), out.element_size()
    row["shape"][0] = [1, 1, *shape]
    row["src_stride"][0] = [0, 0, *(x * s for x in strides)]
    row["dst_stride"][0] = [0, 0, shape[1] * d, d]
    row["src"] = source.storage_offset() * s
    for side, t in (("src_dtype", source), ("dst_dtype", out)):
        row[side] = BY_NAME[str(t.dtype).removeprefix("torch.")].code
    whole = source.as_strided((source.untyped_storage().nbytes() // s,), (1,), 0)
    return Cuda().bind([on(whole)]).prepare(row, [on(out)]).run


def straight(src: torch.dtype, dst: torch.dtype, shift: int = 0) -> Case:
    """One long line, beginning `shift` elements past an aligned address."""
    n = 2 * GIB // src.itemsize
    source = torch.randn(n + shift, device="cuda").to(src)[shift:]
    out = torch.full((n,), math.nan, dtype=dst, device="cuda")
    name = f"gather_cast {short(src)}->{short(dst)}{' misaligned' if shift else ''}"
    return Case(
        name,
        f"{n}",
        one_row(source, out, (1, n), (n, 1)),
        n * (src.itemsize + dst.itemsize),
        lambda: source.to(dst),
        lambda: torch.equal(out, source.to(dst)),
    )


def pitched() -> Case:
    """A row-parallel cut: an eighth of every row."""
    source = torch.randn(65536, 8192, device="cuda")[:, 1024:2048]
    out = torch.full(source.shape, math.nan, dtype=torch.bfloat16, device="cuda")
    return Case(
        "gather_cast fp32->bf16 columns",
        "65536x8192, an eighth",
        one_row(source, out, (65536, 1024), (8192, 1)),
        source.numel() * 6,
        lambda: source.to(torch.bfloat16),
        lambda: torch.equal(out, source.to(torch.bfloat16)),
    )


def transposed(src: torch.dtype, dst: torch.dtype, rows: int, cols: int) -> Case:
    source = torch.randn(rows, cols, device="cuda").to(src)
    out = torch.full((cols, rows), math.nan, dtype=dst, device="cuda")
    return Case(
        f"transpose {short(src)}->{short(dst)}",
        f"{rows}x{cols}",
        one_row(source, out, (cols, rows), (1, cols)),
        rows * cols * (src.itemsize + dst.itemsize),
        lambda: source.t().contiguous().to(dst),
        lambda: torch.equal(out, source.t().to(dst)),
    )


def digested() -> Case:
    """Leaves of one tensor; the reading is the traffic."""
    source = torch.randint(0, 256, (8 * GIB,), dtype=torch.uint8, device="cuda")
    table, _ = leaves([(source.data_ptr(), source.nbytes)])
    held = torch.from_numpy(table.view(np.int64)).cuda()
    out = torch.zeros(len(table), dtype=torch.int64, device="cuda")

    def ours() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        compiled.launch_digests(held.data_ptr(), len(table), out.data_ptr(), stream)

    def right() -> bool:
        first = source[:LEAF].cpu().numpy()
        return int(out[0].item()) % (1 << 64) == compiled.digest64(first)

    return Case("digest xxh3-64 leaves", "8 GiB", ours, source.nbytes, None, right)


def short(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(str(dtype)[6:], str(dtype)[6:])


# ---- whole models: ZeRO-3 over 64 partitions in GPU memory to one rank of eight ----


def llama() -> tuple[dict[str, tuple[int, ...]], dict[str, int | str | bool]]:
    h, inner, kv, vocab, layers = 4096, 14336, 1024, 128256, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    for k in range(layers):
        p = f"model.layers.{k}."
        shapes |= {
            f"{p}self_attn.q_proj.weight": (h, h),
            f"{p}self_attn.k_proj.weight": (kv, h),
            f"{p}self_attn.v_proj.weight": (kv, h),
            f"{p}self_attn.o_proj.weight": (h, h),
            f"{p}mlp.gate_proj.weight": (inner, h),
            f"{p}mlp.up_proj.weight": (inner, h),
            f"{p}mlp.down_proj.weight": (h, inner),
            f"{p}input_layernorm.weight": (h,),
            f"{p}post_attention_layernorm.weight": (h,),
        }
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (vocab, h)}
    config: dict[str, int | str | bool] = {
        "model_type": "llama",
        "hidden_size": h,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    return shapes, config


def moe() -> tuple[dict[str, tuple[int, ...]], dict[str, int | str | bool]]:
    """A Mixtral of 52 layers of 64 small experts: 9,984 expert matrices."""
    h, inner, vocab, layers, experts = 1024, 512, 32000, 52, 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    for k in range(layers):
        p = f"model.layers.{k}."
        shapes |= {f"{p}self_attn.{n}_proj.weight": (h, h) for n in "qkvo"}
        shapes[f"{p}block_sparse_moe.gate.weight"] = (experts, h)
        for e in range(experts):
            w = f"{p}block_sparse_moe.experts.{e}."
            shapes |= {f"{w}w1.weight": (inner, h), f"{w}w2.weight": (h, inner), f"{w}w3.weight": (inner, h)}
        shapes |= {f"{p}input_layernorm.weight": (h,), f"{p}post_attention_layernorm.weight": (h,)}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (vocab, h)}
    config: dict[str, int | str | bool] = {
        "model_type": "mixtral",
        "hidden_size": h,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    return shapes, config


def cut(shapes: Mapping[str, tuple[int, ...]], world: int) -> list[State]:
    """Random fp32 slices of every rank, in one flat buffer a rank."""
    sizes = {n: -(-math.prod(s) // world) for n, s in shapes.items()}
    parts = []
    for _ in range(world):
        flat = torch.empty(sum(sizes.values()), device="cuda").normal_()
        parts.append(dict(zip(sizes, flat.split(list(sizes.values())), strict=True)))
    return parts


def gathered(parts: list[State], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([p[name] for p in parts])[: math.prod(shape)].view(shape)


def whole(kind: str, layout: str) -> Case:
    shapes, config = llama() if kind == "llama-8b" else moe()
    parts = cut(shapes, 64)
    ckpt = fastckpt.partitioned(parts, shapes)
    options = {"layout": layout, "config": config, "dtype": "bfloat16", "rank": 3}
    ready = fastckpt.prepare(ckpt, 8, **options)
    (out,) = ready.out
    for t in out.values():
        t.view(torch.uint8).fill_(0xA5)
    written = sum(t.nbytes for t in out.values())  # each from twice as many bytes

    def eager() -> State:
        """cat, narrow, view, t().contiguous(), to: one tensor after the other, as loaders do it."""
        made = {}
        for name, shape in shapes.items():
            x = gathered(parts, name, shape)
            if len(shape) == 2:
                axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")) else 0
                x = x.chunk(8, axis)[3].to(torch.bfloat16).contiguous()
                x = x.t().contiguous() if layout == "rtp_llm" else x
            made[name] = x.to(torch.bfloat16)
        return made

    def right() -> bool:
        """Against the CPU road on the same weights, every tensor."""
        held = {n: gathered(parts, n, s).cpu() for n, s in shapes.items()}
        wanted = fastckpt.reshard(held, 8, **options)
        return all(torch.equal(out[n].cpu(), wanted[n]) for n in wanted) and set(out) == set(wanted)

    return Case(
        f"model {kind} {layout}",
        f"{len(shapes)} tensors, 64 partitions, rank 3 of 8",
        ready.run,
        3 * written,
        eager,
        right,
    )


def peers() -> Iterator[Case]:
    """What torch has a kernel for: many tensors into many, and into one."""
    torch.cuda.empty_cache()
    for size in (1 << 10, 1 << 16, 1 << 22):
        count = min(20_000, GIB // size)
        source = torch.randint(0, 256, (count * size,), dtype=torch.uint8, device="cuda").split(size)
        out = [torch.zeros_like(s) for s in source]
        rows = np.zeros(count, COPY)
        rows["shape"], rows["src_stride"][:, 3], rows["dst_stride"][:, 3] = 1, 1, 1
        rows["shape"][:, 3] = size
        rows["src"] = np.arange(count) * size
        rows["dst_buffer"] = np.arange(count)
        rows["src_dtype"] = rows["dst_dtype"] = BY_NAME["uint8"].code
        whole_source = source[0].as_strided((count * size,), (1,), 0)
        run = Cuda().bind([on(whole_source)]).prepare(rows, [on(o) for o in out]).run
        into, given = list(out), list(source)
        yield Case(
            f"peer foreach_copy {size} B",
            f"{count} tensors",
            run,
            2 * count * size,
            lambda into=into, given=given: torch._foreach_copy_(into, given),
            lambda out=out, given=given: all(torch.equal(a, b) for a, b in zip(out, given, strict=True)),
        )
        one = torch.zeros(count * size, dtype=torch.uint8, device="cuda")
        rows = rows.copy()
        rows["src"], rows["src_buffer"] = 0, np.arange(count)
        rows["dst"], rows["dst_buffer"] = np.arange(count) * size, 0
        run = Cuda().bind([on(s) for s in source]).prepare(rows, [on(one)]).run
        yield Case(
            f"peer cat {size} B",
            f"{count} tensors",
            run,
            2 * count * size,
            lambda given=given: torch.cat(given),
            lambda one=one, given=given: torch.equal(one, torch.cat(given)),
        )


def files_to_gpu() -> Row:
    """fp32 safetensors in the page cache to bf16 on the GPU, against pinned H2D of the bytes that arrive.

    Time by the wall, planning included."""
    weights = {f"{k}": torch.randn(4096, 4096) for k in range(32)}
    nbytes = sum(t.numel() * 2 for t in weights.values())
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).random_()
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    out = {n: torch.zeros(t.shape, dtype=torch.bfloat16, device="cuda") for n, t in weights.items()}
    ours, floor, eager = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(weights, path)

        def load() -> None:
            fastckpt.reshard(folder, rank=0, layout="same", dtype="bfloat16", device="cuda", out=out)

        def plain() -> None:
            from safetensors.torch import load_file

            for name, t in load_file(path).items():
                out[name].copy_(t.cuda().to(torch.bfloat16))

        for k in range(6):
            for act, seen in (
                (load, ours),
                (lambda: there.copy_(pinned, non_blocking=True), floor),
                (plain, eager),
            ):
                torch.cuda.synchronize()
                began = time.perf_counter()
                act()
                torch.cuda.synchronize()
                if k:
                    seen.append(1e3 * (time.perf_counter() - began))
        load()
    for name, t in weights.items():
        if not torch.equal(out[name].cpu(), t.to(torch.bfloat16)):
            raise SystemExit(f"files_to_gpu: {name} differs")
    a, b, c = (statistics.median(x) for x in (ours, floor, eager))
    return Row("files_to_gpu fp32->bf16", "32 of 4096x4096, floor: pinned H2D", a, nbytes, b / a, c / a)


def cases() -> Iterator[Callable[[], Row]]:
    f32, bf16 = torch.float32, torch.bfloat16
    makers: dict[str, Callable[[], Case]] = {
        "gather_cast fp32->bf16": lambda: straight(f32, bf16),
        "gather_cast bf16->bf16": lambda: straight(bf16, bf16),
        "gather_cast bf16->fp32": lambda: straight(bf16, f32),
        "gather_cast fp32->bf16 misaligned": lambda: straight(f32, bf16, 1),
        "gather_cast bf16->bf16 misaligned": lambda: straight(bf16, bf16, 1),
        "gather_cast columns": pitched,
    }
    for src, dst in ((f32, f32), (bf16, bf16), (f32, bf16)):
        for rows, cols in ((4096, 4096), (16384, 8192), (14336, 4096)):
            name = f"transpose {short(src)}->{short(dst)} {rows}x{cols}"
            makers[name] = lambda s=src, d=dst, r=rows, c=cols: transposed(s, d, r, c)
    makers["digest"] = digested
    for kind in ("llama-8b", "moe"):
        for layout in ("vllm", "rtp_llm"):
            makers[f"model {kind} {layout}"] = lambda k=kind, y=layout: whole(k, y)
    for name, make in makers.items():
        if wanted(name):
            yield lambda make=make: measure(make())
    if wanted("peer"):
        for case in peers():
            yield lambda case=case: measure(case)
    if wanted("files_to_gpu"):
        yield files_to_gpu


def wanted(name: str) -> bool:
    return len(sys.argv) < 2 or any(name.startswith(a) for a in sys.argv[1:])


def main() -> int:
    gpu = torch.cuda.get_device_name()
    rows: list[Row] = []
    print(f"{'row':<44} {'shape':<44} {'ms':>9} {'GB/s':>7} {'of copy':>8} {'x eager':>8}")
    for make in cases():
        row = make()
        rows.append(row)
        rate = row.bytes / row.ms / 1e6
        print(
            f"{row.name:<44} {row.shape:<44} {row.ms:9.3f} {rate:7.0f} {row.fraction_of_copy:8.3f} "
            f"{row.speedup_vs_eager:8.1f}",
            flush=True,
        )
        torch.cuda.empty_cache()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "kernels": compiled.kernel_facts(),
        "rows": [asdict(r) for r in rows],
    }
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-{date.today()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for facts in compiled.kernel_facts():
        print(facts)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
