"""Write a real checkpoint of DeepSpeed's MoE layers: two training steps on gloo ranks, and its truth.

    python make_moe.py --world 4 --ep 2 --stage 2 DIR

DIR gets what `engine.save_checkpoint` wrote, and truth.safetensors: the model as it trains, with every expert
under its global number. In float32 that is also what the masters are.

DeepSpeed orders groups of experts by a set of their names. `--seeds 0,1` gives even ranks PYTHONHASHSEED 0,
odd ones 1, so that they disagree wherever there are groups of two sizes (world 4, ep 4).
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_rank import begin, free_port
from safetensors.torch import save_file
from torch import nn

EXPERTS = (4, 2)
"""Experts of the first and of the second MoE layer."""


def train(rank: int, a: argparse.Namespace, port: int) -> None:
    begin(rank, a.world, port)
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(rank)  # experts differ from rank to rank, the rest is broadcast

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp = nn.Linear(5, 6)
            self.moe = nn.ModuleList(
                MoE(6, nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)), num_experts=n,
                    ep_size=min(a.ep, n), k=1)
                for n in EXPERTS
            )  # fmt: skip
            self.out = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x, loss = self.inp(x), torch.zeros(())
            for layer in self.moe:
                x, more, _ = layer(x)
                loss = loss + 0.01 * more
            return nn.functional.cross_entropy(self.out(x).float(), y) + loss

    model = Net()
    params = {"params": list(model.parameters()), "name": "parameters"}
    groups = split_params_into_different_moe_groups_for_optimizer(params)
    config = {
        "train_micro_batch_size_per_gpu": 8, "steps_per_print": 10**9, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": a.stage},
        "bf16": {"enabled": a.dtype == "bfloat16"},
        "use_data_before_expert_parallelism": a.data_first,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(2):
        x, y = torch.randn(8, 5, dtype=getattr(torch, a.dtype)), torch.randint(0, 3, (8,))
        engine.backward(engine(x, y))
        engine.step()
    engine.save_checkpoint(str(a.out), tag="global_step2")
    every: list[dict[str, torch.Tensor]] = [{} for _ in range(a.world)]
    dist.all_gather_object(every, _numbered(model))
    if rank == 0:
        whole = {name: t for part in every for name, t in part.items()}
        save_file({name: t.contiguous() for name, t in whole.items()}, a.out / "truth.safetensors")
        for script in a.out.glob("*.py"):  # DeepSpeed leaves its converter beside what it saves
            script.unlink()
        (a.out / "made.json").write_text(json.dumps({"deepspeed": deepspeed.__version__}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def _numbered(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's state, its experts under their global numbers, which its process group tells."""
    first = {
        f"moe.{k}.": layer.num_local_experts * dist.get_rank(_group(layer))
        for k, layer in enumerate(model.moe)
    }

    def name(old: str) -> str:
        found = re.fullmatch(r"(moe\.\d+\.)(.*deepspeed_experts\.)(\d+)(\..*)", old)
        return f"{found[1]}{found[2]}{first[found[1]] + int(found[3])}{found[4]}" if found else old

    return {name(n): t.detach().clone() for n, t in model.state_dict().items()}


def _group(layer: nn.Module) -> dist.ProcessGroup:
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group(layer.expert_group_name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--ep", type=int, default=2)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2), default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--data-first", action="store_true")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = [mp.get_context("spawn").Process(target=train, args=(rank, a, port)) for rank in range(a.world)]
    for rank, process in enumerate(ranks):
        os.environ["PYTHONHASHSEED"] = str(a.seeds[rank % len(a.seeds)])
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"exit codes {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main()
