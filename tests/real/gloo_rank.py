"""Processes as the ranks of a trainer, on a CPU over gloo."""

from __future__ import annotations

import os
import socket

import torch


def free_port() -> int:
    """A port that ranks may meet at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def begin(rank: int, world: int, port: int) -> None:
    """Join the other ranks of DeepSpeed, who meet at `port`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # leaves 64 MiB in /dev/shm; gloo does
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
