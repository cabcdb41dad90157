"""Write a real checkpoint of DeepSpeed's AutoEP: a model of transformers' whose experts it spread over ranks,
two training steps on gloo ranks, and its truth.

    python make_autoep.py --world 4 --ep 2 --stage 2 --model qwen2_moe DIR

DIR gets what `engine.save_checkpoint` wrote, config.json, and truth.safetensors: the engine's parameters and
buffers under its own names, the experts of all ranks in one stack. In float32 that is also what the masters
are.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_rank import begin, free_port
from safetensors.torch import save_file
from torch import nn

SIZES: dict[str, object] = dict(
    hidden_size=8, intermediate_size=12, moe_intermediate_size=6, num_hidden_layers=2, vocab_size=24,
    num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=16,
    tie_word_embeddings=False,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("Mixtral", dict(num_local_experts=4)),
    "qwen2_moe": ("Qwen2Moe", dict(num_experts=4, shared_expert_intermediate_size=10)),
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=4, head_dim=4)),
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=4, q_lora_rank=6,
            qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, n_group=2, topk_group=1,
        ),
    ),
}  # fmt: skip


def built(name: str) -> nn.Module:
    import transformers

    family, own = MODELS[name]
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**SIZES | own)
    )
    return model


def train(rank: int, a: argparse.Namespace, port: int) -> None:
    begin(rank, a.world, port)
    import deepspeed
    from deepspeed.module_inject.auto_ep import AutoEP

    # DeepSpeed 0.19.8 stumbles over transformers 5.23 here, where it records the routers' outputs.
    AutoEP._retarget_transformers_output_recorders = lambda self, spec, layer: None
    torch.manual_seed(7)
    model = built(a.model)
    zero: dict[str, object] = {"stage": a.stage}
    if a.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0}
    if a.sub_group_size:
        zero |= {"sub_group_size": a.sub_group_size}
    if a.round_robin:
        zero |= {"round_robin_gradients": True}
    config = {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
        "bf16": {"enabled": a.dtype == "bfloat16"},
        "use_data_before_expert_parallelism": a.data_first,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": a.ep, "use_grouped_mm": False},
    }  # fmt: skip
    if a.tp > 1:
        config["tensor_parallel"] = {"autotp_size": a.tp, "preset_model": "mixtral"}
    if a.freeze:
        for name, p in model.named_parameters():
            p.requires_grad_(a.freeze not in name)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    for step in range(2):
        seed = torch.Generator().manual_seed(100 * step + rank // a.tp)
        ids = torch.randint(0, 24, (1, 8), generator=seed)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(a.out), tag="global_step2")
    whole = gathered(engine.module, a.stage)
    if rank == 0:
        save_file(whole, a.out / "truth.safetensors")
        model.config.save_pretrained(a.out)
        for script in a.out.glob("*.py"):  # DeepSpeed leaves its converter beside what it saves
            script.unlink()
        (a.out / "made.json").write_text(json.dumps({"deepspeed": deepspeed.__version__}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def gathered(model: nn.Module, stage: int) -> dict[str, torch.Tensor]:
    """The model's state, the experts of all ranks in their order; every rank must call it."""
    import deepspeed
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    group = {
        id(p): layer.ep_group
        for layer in model.modules()
        if isinstance(layer, AutoEPMoELayer)
        for p in layer.experts.parameters()
    }
    out = {name: b.detach().clone() for name, b in model.named_buffers() if name in model.state_dict()}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            t = p.detach().clone().contiguous()
        if id(p) in group:
            parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group[id(p)]))]
            dist.all_gather(parts, t, group=group[id(p)])
            t = torch.cat(parts)
        out[name] = t
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--ep", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--model", choices=MODELS, default="qwen3_moe")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--data-first", action="store_true")
    parser.add_argument("--round-robin", action="store_true")
    parser.add_argument("--sub-group-size", type=int, default=0)
    parser.add_argument("--freeze", default="", help="a part of the names of frozen parameters")
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    mp.spawn(train, args=(a, free_port()), nprocs=a.world, join=True)


if __name__ == "__main__":
    main()
