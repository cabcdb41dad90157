"""Slices of `reshard(tp=2, layout="hf")` in transformers' tensor-parallel model give the unsharded logits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fastckpt
import pytest
import torch
from real.tp_forward import IDS
from real.truth import read_truth
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SCRIPT = Path(__file__).with_name("tp_forward.py")
WORLD = 2


def run_ranks(*arguments: Path) -> None:
    """The script on two gloo ranks; fails with what they printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = []
    for rank in range(WORLD):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [p.returncode for p in ranks] == [0] * WORLD, "\n".join(said)


@pytest.mark.parametrize("name", ["kept/z3-llama-w2-even", "made/z2-mixtral-w2-even"])
def test_slices_give_the_unsharded_logits(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    truth = read_truth(checkpoint(name))
    assert truth.master is not None
    whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(truth.path), dtype=torch.float32)
    whole.load_state_dict(truth.master)
    with torch.no_grad():
        wanted = whole.eval()(input_ids=IDS).logits
    fastckpt.reshard(truth.path, tp=WORLD, layout="hf", out=tmp_path / "served", durable=False)
    run_ranks(truth.path, tmp_path / "served", tmp_path / "logits.safetensors")
    got = load_file(tmp_path / "logits.safetensors")["logits"]
    # Two ranks add in another order: this is the one comparison of the tests that is not exact.
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max().item() <= 1e-5
    assert wanted.abs().max().item() > 0.05
