"""One rank of transformers' tensor-parallel model, filled with a rank's slices; prints nothing, saves logits.

    python tp_forward.py CONFIG_DIR SHARDS_DIR OUT.safetensors

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are torch.distributed's. SHARDS_DIR/rank-RR holds the slices.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

IDS = torch.arange(24).reshape(2, 12) * 5 % 89


def local(parameter: nn.Parameter) -> torch.Tensor:
    """The part of a parameter that lies on this rank."""
    whole = parameter.detach()
    return whole.to_local() if hasattr(whole, "to_local") else whole


def stacked(slices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The hub's names, an expert each, as transformers' modules hold them: experts stacked, gate above up."""
    out: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in slices.items():
        block, found, rest = name.partition(".block_sparse_moe.")
        if not found:
            out[name] = tensor
        elif rest == "gate.weight":
            out[f"{block}.mlp.gate.weight"] = tensor
        else:
            _, number, which, _ = rest.split(".")  # experts.3.w1.weight
            experts.setdefault(block, {}).setdefault(int(number), {})[which] = tensor
    for block, by_number in experts.items():
        each = [by_number[e] for e in range(len(by_number))]
        gate_up = [torch.cat([w["w1"], w["w3"]]) for w in each]
        out[f"{block}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"{block}.mlp.experts.down_proj"] = torch.stack([w["w2"] for w in each])
    return out


def main(config: Path, shards: Path, out: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.float32)
    plan, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=world))
    model = type(model).maybe_distribute_model(model, plan, mesh).eval()
    for parameter in model.parameters():
        local(parameter).fill_(float("nan"))  # what no slice fills is seen
    slices: dict[str, torch.Tensor] = {}
    for path in (shards / f"rank-{rank:02d}").glob("*.safetensors"):
        slices |= load_file(path)
    slices = stacked(slices)
    for name, parameter in model.named_parameters():
        part = local(parameter)
        if part.shape != slices[name].shape:
            raise SystemExit(f"{name}: slice {tuple(slices[name].shape)}, local part {tuple(part.shape)}")
        part.copy_(slices.pop(name))
    if slices:
        raise SystemExit(f"slices that the model lacks: {sorted(slices)}")
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    if rank == 0:
        save_file({"logits": logits.contiguous()}, out)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
