"""Write a real save of torchtitan's: one of its models under FSDP2 on two ranks, and its `to_hf` beside it.

    python make_torchtitan.py llama DIR           # or qwen3_moe, deepseek_v3

DIR gets step-1/ (what torch.distributed.checkpoint wrote), hf.json (the hub's config of that model, which
torchtitan does not write), truth.safetensors (the model by torchtitan's converter) and made.json. Wants
torchtitan 0.3, tyro and spmd_types.
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WORLD, DIM, WORDS, EXPERTS = 2, 16, 37, 3
HF = {
    "hidden_size": DIM, "vocab_size": WORDS, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def llama():
    from torchtitan.models import llama3 as of

    rope = of.ComplexRoPE.Config(dim=4, max_seq_len=32, theta=10000.0)
    layers = of._build_llama3_layers(
        n_layers=1, dim=DIM, n_heads=4, n_kv_heads=2, hidden_dim=24, rope=rope, attn_backend="flex"
    )
    hf = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return of.Llama3Model, of.Llama3StateDictAdapter, layers, hf


def qwen3_moe():
    from torchtitan.models import qwen3 as of

    rope = of.CosSinRoPE.Config(dim=8, max_seq_len=32, theta=10000.0)
    layers = of._build_qwen3_moe_layers(
        n_layers=1, dim=DIM, n_heads=4, n_kv_heads=2, head_dim=8, moe_hidden_dim=12, num_experts=EXPERTS,
        top_k=2, attn_backend="flex", moe_comm_backend="standard", rope=rope,
    )  # fmt: skip
    hf = {
        "model_type": "qwen3_moe", "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    }  # fmt: skip
    return of.Qwen3Model, of.Qwen3StateDictAdapter, layers, hf


def deepseek_v3():
    from torchtitan.models import deepseek_v3 as of

    layers = of._build_dsv3_layers(
        n_layers=2, n_dense_layers=1, dim=DIM, n_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=6, mscale=1.0, dense_hidden_dim=24, moe_hidden_dim=12,
        num_experts=EXPERTS, num_shared_experts=2, router_top_k=2, router_score_func="sigmoid",
        attn_backend="flex", moe_comm_backend="standard", non_blocking_capacity_factor=None,
        rope=of.ComplexRoPE.Config(dim=4, max_seq_len=32, theta=10000.0),
    )  # fmt: skip
    hf = {
        "model_type": "deepseek_v3", "num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": 12,
        "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "n_routed_experts": EXPERTS, "n_shared_experts": 2, "moe_intermediate_size": 12,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    }  # fmt: skip
    return of.DeepSeekV3Model, of.DeepSeekV3StateDictAdapter, layers, hf


MODELS = {made.__name__: made for made in (llama, qwen3_moe, deepseek_v3)}


def write(rank: int, name: str, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from torchtitan.components.checkpointer.base import ModelWrapper
    from torchtitan.models.common import Embedding, Linear, RMSNorm

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    kind, adapter, layers, hf = MODELS[name]()
    hf = HF | hf
    init = {"weight": torch.nn.init.ones_}
    config = kind.Config(
        dim=DIM, vocab_size=WORDS, layers=layers, enable_weight_tying=hf["tie_word_embeddings"],
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=init),
        tok_embeddings=Embedding.Config(num_embeddings=WORDS, embedding_dim=DIM, param_init=init),
        lm_head=Linear.Config(in_features=DIM, out_features=WORDS, param_init=init),
    )  # fmt: skip
    model = config.build()
    model.init_states()
    torch.manual_seed(0)  # every rank makes the same model
    with torch.no_grad():
        for name_of, x in [*model.named_parameters(), *model.named_buffers()]:
            if x.is_floating_point() and "rope" not in name_of:
                x.normal_()
    whole = {n: x.detach().clone() for n, x in model.state_dict().items()}
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # at a rate of 0: it makes the moments
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    beside = (
        {"optimizer": get_optimizer_state_dict(model, optimizer, options=flat)} if name == "llama" else {}
    )
    state = {**beside, "train_state": {"step": 1}, **ModelWrapper([model]).state_dict()}
    dcp.save(state, checkpoint_id=out / "step-1")
    if rank == 0:
        truth = adapter(config, None).to_hf(whole)
        save_file({n: x.clone().contiguous() for n, x in truth.items()}, out / "truth.safetensors")
        (out / "hf.json").write_text(json.dumps(hf, indent=1) + "\n")
        versions = {p: metadata.version(p) for p in ("torch", "torchtitan")}
        (out / "made.json").write_text(json.dumps(versions | {"world": WORLD}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    mp.spawn(write, args=(a.model, free_port(), a.out), nprocs=WORLD)


if __name__ == "__main__":
    main()
