"""Two gloo ranks of transformers' tensor parallelism, filled with our slices, give the unsharded logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest
import torch
from layouts import families
from layouts.tp_forward_families import IDS
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("tp_forward_families.py")
NAMES = ["gemma2", "phi3", "glm4", "gpt_neox", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]


def run_ranks(*arguments: Path) -> None:
    """The script on two gloo ranks; fails with what they printed."""
    ranks = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(said)


@pytest.mark.nightly
def test_slices_give_the_unsharded_logits(tmp_path: Path) -> None:
    wanted = {}
    for name in NAMES:
        # transformers 5.23 cannot distribute a tied pair: its plan names a parameter that is not there.
        config = families.made(name)[0] | {"tie_word_embeddings": False}
        torch.manual_seed(7)
        kind = families.transformers.AutoConfig.for_model(**config)
        model = families.transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32).eval()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.normal_(std=0.2)
            wanted[name] = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path / "hub" / name)
        fastckpt.reshard(tmp_path / "hub" / name, tp=2, layout="hf", out=tmp_path / name, durable=False)
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == config["model_type"]
    run_ranks(tmp_path / "store", *(tmp_path / name for name in NAMES))
    for name, want in wanted.items():
        got = load_file(tmp_path / name / "logits.safetensors")["logits"]
        # Two ranks add in another order: this is the one comparison of these tests that is not exact.
        assert got.shape == want.shape
        assert want.abs().max().item() > 0.05
        assert (got - want).abs().max().item() <= 1e-5 * max(1.0, want.abs().max().item()), name
