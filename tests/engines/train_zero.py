"""Train a hub model one step under DeepSpeed ZeRO on gloo ranks: python train_zero.py HUB OUT STAGE WORLD.

OUT becomes what HF's Trainer leaves: `latest`, `global_step1/`, and the model's config.json beside them.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")


def rank(index: int, world: int, port: int, hub: str, out: str, stage: int) -> None:
    os.environ |= {
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # leaves 64 MiB in /dev/shm; gloo does
    deepspeed.init_distributed(dist_backend="gloo")
    model = AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())
    tokens = torch.arange(16).view(1, 16) * 7 % 300 + index
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(out)


def main(hub: str, out: str, stage: str, world: str) -> None:
    import multiprocessing

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    ranks = [start(target=rank, args=(r, int(world), port, hub, out, int(stage))) for r in range(int(world))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(1)
    shutil.copy(os.path.join(hub, "config.json"), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
