"""Megatron-LM's checkpoints, written without it: a file a rank, or whole tensors in torch's DCP."""

from __future__ import annotations

import argparse
import json
import random

import fastckpt
import numpy as np
import torch
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from outputs import hub_directory
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

ARGS = dict(
    num_layers=2, hidden_size=64, num_attention_heads=8, group_query_attention=True, num_query_groups=2,
    kv_channels=8, ffn_hidden_size=96, padded_vocab_size=256, vocab_size=None, rotary_interleaved=False,
    make_vocab_size_divisible_by=64, untie_embeddings_and_output_weights=True, apply_layernorm_1p=False,
    pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None, num_experts=None,
    expert_model_parallel_size=1, expert_tensor_parallel_size=None, rank=0, world_size=4,
)  # fmt: skip


def written(tmp_path, made, tp=2, options=None, change=None, ep=1, **args):
    """(Megatron-LM's directories of ranks, the config, the hub's tensors). `change` edits a rank's state."""
    config, hub, *_ = made
    folder = hub_directory(tmp_path / "hub", config, hub)
    root = tmp_path / "run" / "iter_0000007"
    placed = layout("megatron", {"vocab_padding": "64", **(options or {})})
    grid = Placement(tp=tp, dp=ep, ep=ep)
    for p, held in zip(grid.ranks(), fastckpt.reshard(folder, placement=grid, layout=placed), strict=True):
        held = {n: x.clone() for n, x in held.items()}
        said = ARGS | dict(tensor_model_parallel_size=tp, expert_model_parallel_size=ep)
        said |= dict(rank=p.rank, world_size=grid.world) | args
        state = {"args": argparse.Namespace(**said), "checkpoint_version": 3.0, "iteration": 7, "model": held}
        state["optimizer"] = {"fp32_from_fp16_params": [[x.float() for x in held.values()]]}
        state["rng_state"] = [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ]
        if change is not None:
            change(p.rank, state)
        at = root / f"mp_rank_{p.tp_rank:02d}{f'_{p.rank // tp:03d}' if ep > 1 else ''}"
        at.mkdir(parents=True)
        torch.save(state, at / "model_optim_rng.pt")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    return tmp_path / "run", config, hub


def dist(tmp_path, tensors, *, record="torch_dist", args=ARGS, common=True):
    """A save of whole tensors under Megatron's keys."""
    root = tmp_path / "dist"
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(root))
    if record is not None:
        (root / "metadata.json").write_text(json.dumps({"sharded_backend": record}))
    if common:
        said = None if args is None else argparse.Namespace(**args)
        torch.save({"args": said, "iteration": 7, "checkpoint_version": 3.0}, root / "common.pt")
    return root


def keys_of(tmp_path, made):
    """A model's tensors under the keys of a homogeneous model: layers stacked."""
    config, hub, *_ = made
    folder = tmp_path / "whole"
    folder.mkdir()
    save_file({n: x.contiguous() for n, x in hub.items()}, folder / "model.safetensors")
    placed = layout("megatron", {"vocab_padding": "64"})
    (held,) = fastckpt.reshard(folder, layout=placed, config=config)
    out = {n: x for n, x in held.items() if ".layers." not in n}
    for name in [n.removeprefix("decoder.layers.0.") for n in held if n.startswith("decoder.layers.0.")]:
        out[f"decoder.layers.{name}"] = torch.stack([held[f"decoder.layers.{i}.{name}"] for i in range(2)])
    return out
