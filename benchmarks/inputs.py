"""What is measured: a llama of few large tensors, a model of many small ones, and shapes too large to write.

python inputs.py deepspeed OUT NBYTES      # the llama, by two ranks of the DeepSpeed that is installed
python inputs.py fsdp OUT NBYTES           # its rows cut over two ranks, by torch.distributed.checkpoint
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import fastckpt
import numpy as np
import torch
from fastckpt.checkpoint import Checkpoint, Single
from fastckpt.dtypes import DType, bfloat16, float8_e4m3fn, float32
from fastckpt.extents import Extent, Extents, File
from fastckpt.stored import runs, strided
from fastckpt.views import View
from real import make_zero
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from zero_writer import write_zero

WORLD = 2
NAME = "llama-bench"
RANK = 16
"""Of adapters."""


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
            _write("deepspeed", half, nbytes)
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


def adapter(folder: Path, of: Input) -> Path:
    """A PEFT adapter of rank RANK on every matrix of the layers of a llama, in `folder`."""
    tensors = {}
    for name, entry in fastckpt.open(of.path).entries.items():
        if ".layers." in name and len(entry.shape) == 2:
            thin = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{thin}.lora_A.weight"] = torch.randn(RANK, entry.shape[1])
            tensors[f"{thin}.lora_B.weight"] = torch.randn(entry.shape[0], RANK) * 0.01
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": "all-linear",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def sharded(folder: Path, nbytes: int) -> Input:
    """One of the same shapes as FSDP 2 leaves it: rows cut over two ranks, torch.distributed.checkpoint."""
    sizes = Llama.of(nbytes)
    path = folder / f"sharded-{nbytes}"
    if not path.exists():
        half = path.with_suffix(".partial")
        shutil.rmtree(half, ignore_errors=True)
        _write("fsdp", half, nbytes)
        (half / "config.json").write_text(json.dumps({"model_type": "llama", **sizes.config()}))
        half.rename(path)
    shapes = sizes.shapes()
    total = sum(math.prod(s) * 4 for s in shapes.values())
    return Input(
        str(path), f"sharded: {len(shapes)} tensors, {_size(total)}", f"torch {torch.__version__}", total
    )


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


def many_ranks(folder: Path, world: int, frozen: int = 0) -> str:
    """A llama-like ZeRO-3 checkpoint of `world` ranks, 723 tensors in two groups, as sparse files.

    `frozen`: so many of them were not trained, and lie in every rank's model states."""
    path = folder / (f"ranks-{world}-frozen-{frozen}" if frozen else f"ranks-{world}")
    if not path.exists():
        half = path.with_suffix(".partial")
        shutil.rmtree(half, ignore_errors=True)
        weights = {
            f"model.layers.{k // 9}.x{k % 9}.weight": torch.full((37, 29), float(k)) for k in range(723)
        }
        idle, names = list(weights)[:frozen], list(weights)[frozen:]
        groups = [names[::2], names[1::2]]
        write_zero(half, weights, stage=3, world=world, groups=groups, frozen=idle, sparse=True)
        half.rename(path)
    return str(path)


def boxes(folder: Path, world: int) -> Input:
    """What FSDP 2 leaves of 723 tensors over `world` ranks: a DCP save whose boxes hold 64 bytes each."""
    path = folder / f"boxes-{world}"
    if not path.exists():
        half = path.with_suffix(".partial")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        size, shape = torch.Size([2, 8]), torch.Size([2 * world, 8])
        ends, places, tensors = [0] * world, {}, {}
        files = [(half / f"__{rank}_0.distcp").open("wb") for rank in range(world)]
        for name in (f"model.layers.{k // 9}.x{k % 9}.weight" for k in range(723)):
            chunks = []
            for rank, file in enumerate(files):
                at = torch.Size([2 * rank, 0])
                torch.save(torch.full(size, float(rank)), held := io.BytesIO())
                nbytes = file.write(held.getbuffer())
                chunks.append(ChunkStorageMetadata(at, size))
                places[MetadataIndex(name, at)] = _StorageInfo(f"__{rank}_0.distcp", ends[rank], nbytes)
                ends[rank] += nbytes
            tensors[name] = TensorStorageMetadata(TensorProperties(torch.float32), shape, chunks)
        for file in files:
            file.close()
        (half / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, {}, places)))
        half.rename(path)
    count = 723 * world
    return Input(
        str(path), f"boxes: {count} of 723 tensors, {_size(count * 64)}", "torch's formats", count * 64
    )


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


def deepseek_v3() -> Checkpoint:
    """DeepSeek-V3 as the hub has it, of a file that does not exist: fp8 and a scale for 128 x 128."""
    shapes: dict[str, tuple[DType, tuple[int, ...]]] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = float8_e4m3fn, (rows, columns)
        shapes[f"{name}.weight_scale_inv"] = float32, (-(-rows // 128), -(-columns // 128))

    def mlp(name: str, inner: int) -> None:
        matrix(f"{name}.gate_proj", inner, 7168)
        matrix(f"{name}.up_proj", inner, 7168)
        matrix(f"{name}.down_proj", 7168, inner)

    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = bfloat16, (129280, 7168)
    shapes["model.norm.weight"] = bfloat16, (7168,)
    for k in range(61):
        layer = f"model.layers.{k}"
        attention = f"{layer}.self_attn"
        shapes[f"{layer}.input_layernorm.weight"] = bfloat16, (7168,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = bfloat16, (7168,)
        matrix(f"{attention}.q_a_proj", 1536, 7168)
        shapes[f"{attention}.q_a_layernorm.weight"] = bfloat16, (1536,)
        matrix(f"{attention}.q_b_proj", 24576, 1536)
        matrix(f"{attention}.kv_a_proj_with_mqa", 576, 7168)
        shapes[f"{attention}.kv_a_layernorm.weight"] = bfloat16, (512,)
        matrix(f"{attention}.kv_b_proj", 32768, 512)
        matrix(f"{attention}.o_proj", 7168, 16384)
        if k < 3:
            mlp(f"{layer}.mlp", 18432)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = bfloat16, (256, 7168)
        shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = float32, (256,)
        mlp(f"{layer}.mlp.shared_experts", 2048)
        for e in range(256):
            mlp(f"{layer}.mlp.experts.{e}", 2048)
    sizes = [math.prod(s) * d.itemsize for d, s in shapes.values()]
    file = File("model.safetensors", sum(sizes))
    starts = accumulate(sizes, initial=0)
    extents = Extents([Extent(file, at, n, name) for name, at, n in zip(shapes, starts, sizes, strict=False)])
    entries = {
        name: Single(shape, dtype, partial(strided, extents, k, dtype, shape))
        for k, (name, (dtype, shape)) in enumerate(shapes.items())
    }
    config = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280, "num_nextn_predict_layers": 0,
        "topk_method": "noaux_tc", "tie_word_embeddings": False, "attention_bias": False,
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
    }  # fmt: skip
    return Checkpoint("deepseek", "safetensors", entries, extents, config=config, structure="deepseek_v3")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 29 else f"{nbytes / 2**20:.0f} MiB"


def _write(what: str, out: Path, nbytes: int) -> None:
    """Runs this file: its ranks are processes that start anew."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, what, str(out), str(nbytes)], check=True, env=env)


def _train(rank: int, sizes: Llama, out: Path, port: int) -> None:
    """One rank of the DeepSpeed run."""
    make_zero.MODELS[NAME] = sizes.module
    make_zero.worker(rank, [make_zero.Run(NAME, NAME, 3, WORLD)], out, port)


def _save(rank: int, sizes: Llama, out: Path, port: int) -> None:
    """One rank of the save of rows."""
    import torch.distributed as dist
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    mesh, seed = init_device_mesh("cpu", (WORLD,)), torch.Generator().manual_seed(7 + rank)
    weights = {
        name: DTensor.from_local(torch.randn(rows // WORLD, *rest, generator=seed) * 0.02, mesh, [Shard(0)])
        for name, (rows, *rest) in sizes.shapes().items()
    }
    checkpoint.save(weights, checkpoint_id=out)
    dist.destroy_process_group()


def main() -> int:
    import torch.multiprocessing as mp

    what, out, nbytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    rank = {"deepspeed": _train, "fsdp": _save}[what]
    mp.spawn(rank, args=(Llama.of(nbytes), out, port), nprocs=WORLD, join=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
