"""Write what FSDP's ranks save by themselves, in every form that torch has, and the truth beside it.

    python make_fsdp.py DIR         # four ranks, on a CPU over gloo

DIR gets a directory a case, each with `model_world_size_4_rank_R.pt`, named as verl names them, and
truth.safetensors: fsdp2, hsdp (copies over two pairs of ranks), tp (tensor parallel within FSDP), columns
(axis 1 cut by FSDP), fsdp1 (no mesh, ShardedTensor) and fsdp1_mesh.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from gloo_rank import free_port
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1
from torch.distributed.fsdp import ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WORLD = 4


class Model(nn.Module):
    """Matrices whose rows do and do not divide, a vector shorter than the ranks are many, a scalar, a buffer,
    and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 6, bias=False)
        self.odd = nn.Linear(4, 7)
        self.short = nn.Parameter(torch.randn(3))
        self.register_buffer("places", torch.arange(5))
        self.words = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.words.weight


def cases(world: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    pairs = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ddp", "fsdp"))
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    for name, mesh in (("fsdp2", line), ("hsdp", pairs)):
        model = Model()
        fully_shard(model, mesh=mesh)
        yield name, model.state_dict()
    model = Model()
    parallelize_module(model, grid["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=grid["dp"])
    yield "tp", model.state_dict()
    model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(4, 3, bias=False))
    fully_shard(model, mesh=line, shard_placement_fn=lambda p: Shard(1))
    yield "columns", model.state_dict()
    for name, mesh in (("fsdp1", None), ("fsdp1_mesh", line)):
        model = Fsdp1(Model(), device_mesh=mesh, use_orig_params=True, device_id=torch.device("cpu"))
        kind = StateDictType.SHARDED_STATE_DICT
        with Fsdp1.state_dict_type(model, kind, ShardedStateDictConfig(offload_to_cpu=False)):
            yield name, model.state_dict()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as torch itself gathers it."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor().detach()
    if not hasattr(tensor, "local_shards"):
        return tensor.detach()
    out = torch.empty(tensor.size(), dtype=tensor.dtype) if dist.get_rank() == 0 else None
    tensor.gather(0, out)
    return torch.empty(0) if out is None else out


def save(rank: int, world: int, port: int, out: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for name, state in cases(world):
        (out / name).mkdir(parents=True, exist_ok=True)
        torch.save(state, out / name / f"model_world_size_{world}_rank_{rank}.pt")
        truth = {n: whole(t).clone() for n, t in state.items()}
        if rank == 0:
            save_file(truth, out / name / "truth.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    processes.spawn(save, (WORLD, free_port(), Path(sys.argv[1])), nprocs=WORLD)
