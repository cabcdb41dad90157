"""One rank of transformers' tensor-parallel models, filled with a rank's slices; saves each model's logits.

    python tp_forward_families.py STORE FOLDER...

RANK and WORLD_SIZE are torch.distributed's; STORE is a file that does not exist yet, where the ranks meet. A
FOLDER holds config.json and rank-RR/model.safetensors, and gets logits.safetensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

IDS = torch.arange(24).reshape(2, 12) * 5 % 89 + 1


def stacked(slices: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    """The hub's names as transformers' modules hold them: experts in stacks, gate above up."""
    out = {n.replace("embed_out.", "lm_head."): x for n, x in slices.items()}
    for name in [n for n in names if n.endswith("experts.gate_up_proj") and n not in out]:
        at = name.removesuffix("gate_up_proj")
        each = range(sum(n.startswith(at) and n.endswith("gate_proj.weight") for n in out))
        gate, up, down = (
            torch.stack([out.pop(f"{at}{e}.{p}_proj.weight") for e in each]) for p in ("gate", "up", "down")
        )
        out |= {name: torch.cat([gate, up], 1), f"{at}down_proj": down}
    return out


def forward(folder: Path, rank: int, world: int) -> None:
    """The logits of the model in `folder`, from this rank's slices."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plan, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=world))
    model = type(model).maybe_distribute_model(model, plan, mesh).eval()
    held = {n: x for n, x in model.state_dict(keep_vars=True).items()}
    parts = {n: x.detach().to_local() if hasattr(x, "to_local") else x.detach() for n, x in held.items()}
    for part in parts.values():
        part.fill_(float("nan"))  # what no slice fills is seen
    slices = stacked(load_file(folder / f"rank-{rank:02d}" / "model.safetensors"), set(parts))
    for name, part in parts.items():
        if part.shape != slices[name].shape:
            raise SystemExit(f"{name}: slice {tuple(slices[name].shape)}, local part {tuple(part.shape)}")
        part.copy_(slices.pop(name))
    if slices:
        raise SystemExit(f"slices that the model lacks: {sorted(slices)}")
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    if rank == 0:
        save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")


def main(store: Path, folders: list[Path]) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for folder in folders:
        forward(folder, rank, world)
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(a) for a in sys.argv[2:]])
