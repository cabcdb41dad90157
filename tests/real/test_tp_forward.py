"""Slices of a real ZeRO checkpoint, in a tensor-parallel model on two ranks, give the unsharded logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fastckpt
import pytest
import torch
from real.truth import read_truth
from tp_forward import IDS, run_ranks, same_logits
from transformers import AutoConfig, AutoModelForCausalLM

NIGHTLY = ("made/z3-qwen3_moe-w2", "made/z3-deepseek_v3-w2", "made/z3-bloom-w2")


@pytest.mark.parametrize(
    "name",
    [
        "kept/z3-llama-w2-even",
        "made/z2-mixtral-w2-even",
        "made/z3-gpt_neox-w2",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY),
    ],
)
def test_slices_give_the_unsharded_logits(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    truth = read_truth(checkpoint(name))
    assert truth.master is not None
    whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(truth.path), dtype=torch.float32)
    whole.load_state_dict({**truth.master, **{a: truth.master[h] for a, h in truth.shared.items()}})
    with torch.no_grad():
        wanted = whole.eval()(input_ids=IDS).logits
    fastckpt.reshard(truth.path, tp=2, layout="hf", out=tmp_path / "served", durable=False)
    run_ranks(tmp_path / "store", [tmp_path / "served"])
    same_logits(tmp_path / "served", wanted)
