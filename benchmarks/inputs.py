"""What is measured: a llama of few large tensors, a model of many small ones, and shapes too large to write.

python inputs.py OUT NBYTES      # the llama, by two ranks of the DeepSpeed that is installed
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastckpt.checkpoint import Checkpoint, Single
from fastckpt.dtypes import float32
from fastckpt.extents import Extent, Extents, File
from fastckpt.views import View, runs
from real import make_zero
from torch import nn
from zero_writer import write_zero

WORLD = 2
NAME = "llama-bench"


@dataclass(frozen=True, slots=True)
class Llama:
    """Sizes of a llama; eight kv heads, so that eight serving ranks can share it."""

    hidden: int
    inner: int
    vocab: int
    layers: int
    heads: int = 16
    kv_heads: int = 8

    @staticmethod
    def of(nbytes: int) -> Llama:
        """The llama whose fp32 parameters take at least `nbytes`."""
        one = Llama(2048, 5632, 32000, 1) if nbytes >= 512 << 20 else Llama(512, 1408, 8192, 1)
        shapes = one.shapes()
        layer = sum(math.prod(s) for n, s in shapes.items() if ".layers." in n)
        rest = sum(math.prod(s) for n, s in shapes.items()) - layer
        return replace(one, layers=max(1, -(-(nbytes // 4 - rest) // layer)))

    def config(self) -> dict[str, int | bool | str]:
        return {
            "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "vocab_size": self.vocab, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "max_position_embeddings": 64, "tie_word_embeddings": False,
        }  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        h, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for k in range(self.layers):
            layer = f"model.layers.{k}."
            out |= {
                f"{layer}self_attn.q_proj.weight": (h, h), f"{layer}self_attn.k_proj.weight": (kv, h),
                f"{layer}self_attn.v_proj.weight": (kv, h), f"{layer}self_attn.o_proj.weight": (h, h),
                f"{layer}mlp.gate_proj.weight": (self.inner, h),
                f"{layer}mlp.up_proj.weight": (self.inner, h),
                f"{layer}mlp.down_proj.weight": (h, self.inner),
                f"{layer}input_layernorm.weight": (h,), f"{layer}post_attention_layernorm.weight": (h,),
            }  # fmt: skip
        return out | {"model.norm.weight": (h,), "lm_head.weight": (self.vocab, h)}

    def module(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**self.config()))


@dataclass(frozen=True, slots=True)
class Input:
    """A checkpoint on disk: `shape` names it in the table, `origin` says who wrote it."""

    path: str
    shape: str
    origin: str
    nbytes: int


def large(folder: Path, nbytes: int, deepspeed: str | None) -> Input:
    """The llama, ZeRO-3 over two ranks; written by DeepSpeed of that version, or from its formulas."""
    sizes = Llama.of(nbytes)
    path = folder / f"large-{nbytes}-{deepspeed or 'formulas'}"
    if not path.exists():
        half = path.with_suffix(".partial")
        shutil.rmtree(half, ignore_errors=True)
        if deepspeed:
            env = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                "OMP_NUM_THREADS": "1",
            }
            subprocess.run([sys.executable, __file__, str(half), str(nbytes)], check=True, env=env)
            for name in ("module.safetensors", "master.safetensors"):
                (half / NAME / name).unlink()
            (half / NAME).rename(path)
            shutil.rmtree(half)
        else:
            seed = torch.Generator().manual_seed(7)
            weights = {n: torch.randn(s, generator=seed) * 0.02 for n, s in sizes.shapes().items()}
            write_zero(half, weights, stage=3, world=WORLD)
            (half / "config.json").write_text(json.dumps({"model_type": "llama", **sizes.config()}))
            half.rename(path)
    count = sizes.shapes()
    total = sum(math.prod(s) * 4 for s in count.values())
    origin = f"DeepSpeed {deepspeed}" if deepspeed else "DeepSpeed's formulas"
    return Input(str(path), f"large: {len(count)} tensors, {_size(total)}", origin, total)


def small(folder: Path, count: int) -> Input:
    """So many tensors of 1 KiB, ZeRO-3 over two ranks, from DeepSpeed's formulas."""
    path = folder / f"small-{count}"
    if not path.exists():
        half = path.with_suffix(".partial")
        shutil.rmtree(half, ignore_errors=True)
        seed = torch.Generator().manual_seed(7)
        values = torch.randn(count, 16, 16, generator=seed)
        weights = {f"model.layers.{k // 100}.part.{k % 100}.weight": values[k] for k in range(count)}
        write_zero(half, weights, stage=3, world=WORLD)
        half.rename(path)
    total = count * 1024
    return Input(str(path), f"small: {count} tensors, {_size(total)}", "DeepSpeed's formulas", total)


def many_ranks(folder: Path, world: int) -> str:
    """A llama-like ZeRO-3 checkpoint of `world` ranks, 723 tensors in two groups, as sparse files."""
    path = folder / f"ranks-{world}"
    if not path.exists():
        half = path.with_suffix(".partial")
        shutil.rmtree(half, ignore_errors=True)
        weights = {
            f"model.layers.{k // 9}.x{k % 9}.weight": torch.full((37, 29), float(k)) for k in range(723)
        }
        names = list(weights)
        write_zero(half, weights, stage=3, world=world, groups=[names[::2], names[1::2]], sparse=True)
        half.rename(path)
    return str(path)


def seventy(world: int) -> Checkpoint:
    """A llama of 70B shape over `world` ZeRO-3 ranks, of files that do not exist: enough to plan from."""
    sizes = Llama(8192, 28672, 128256, 80, heads=64)
    shapes = sizes.shapes()
    parts = {n: -(-math.prod(s) // world) for n, s in shapes.items()}
    nbytes = 4 * sum(parts.values())
    extents = Extents([Extent(File(f"rank-{r}.pt", nbytes), 0, nbytes, "0") for r in range(world)])
    ranks = np.arange(world, dtype=np.int64)
    entries = {}
    at = 0
    for name, shape in shapes.items():
        entries[name] = Single(shape, float32, partial(_gathered, extents, ranks, at, parts[name], shape))
        at += parts[name]
    config = {"model_type": "llama", **sizes.config()}
    return Checkpoint("seventy", "zero", entries, extents, config=config, structure="seventy")


def _gathered(extents: Extents, ranks: np.ndarray, at: int, part: int, shape: tuple[int, ...]) -> View:
    """The view of a parameter from one piece a rank."""
    flat = runs(extents, float32, ranks, np.full(len(ranks), at), np.full(len(ranks), part))
    return flat.narrow(0, 0, math.prod(shape)).reshape(shape)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 29 else f"{nbytes / 2**20:.0f} MiB"


def _train(rank: int, sizes: Llama, out: Path, port: int) -> None:
    """One rank of the DeepSpeed run."""
    make_zero.MODELS[NAME] = sizes.module
    make_zero.worker(rank, [make_zero.Run(NAME, NAME, 3, WORLD)], out, port)


def main() -> int:
    import torch.multiprocessing as mp

    out, nbytes = Path(sys.argv[1]), int(sys.argv[2])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_train, args=(Llama.of(nbytes), out, port), nprocs=WORLD, join=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
