"""Write a real DCP save: two training steps of a small Llama under FSDP2, and the truth beside it.

    python make_dcp.py --world 3 DIR              # rows cut by FSDP over 3 ranks
    python make_dcp.py --world 4 --tp 2 DIR       # tensor parallel by 2 and FSDP by 2: boxes cut both ways

DIR gets config.json, pytorch_model_fsdp_0/ (what torch.distributed.checkpoint wrote; the directory is
accelerate's name for it), truth.safetensors (the whole state dict, gathered by torch) and made.json.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_rank import free_port
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

CUT = {
    **{f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"},
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def train(rank: int, world: int, tp: int, tied: bool, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=28, num_hidden_layers=1, vocab_size=37, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True, max_position_embeddings=32,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        if tp > 1:
            parallelize_module(layer, mesh["tp"], CUT)
        fully_shard(layer, mesh=mesh["dp"], mp_policy=mixed)
    fully_shard(model, mesh=mesh["dp"], mp_policy=mixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        made = torch.Generator().manual_seed(1000 * step + rank // tp)
        ids = torch.randint(0, 37, (2, 8), generator=made)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments, "step": 2}, checkpoint_id=out / "pytorch_model_fsdp_0")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_file({k: v.clone().contiguous() for k, v in whole.items()}, out / "truth.safetensors")
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(out)
        versions = {p: metadata.version(p) for p in ("torch", "transformers")}
        (out / "made.json").write_text(json.dumps(versions | {"world": world, "tp": tp}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    mp.spawn(train, args=(a.world, a.tp, a.tied, free_port(), a.out), nprocs=a.world)


if __name__ == "__main__":
    main()
