"""`hf` at tp > 1 against transformers: the local parts of its own tensor-parallel model, bit for bit."""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import tiny
from layouts.slices import local_parts
from outputs import hub_directory
from reading import bits, memory, shard


def as_trained(got, experts):
    """A shard's bit patterns by the names transformers holds in memory: experts in stacks."""
    out = {n.replace("block_sparse_moe.gate", "mlp.gate"): torch.from_numpy(v) for n, (_, v) in got.items()}
    for name in [n for n in out if n.endswith("experts.0.w1.weight")]:
        hub = name.removesuffix("0.w1.weight")
        to = hub.replace("block_sparse_moe", "mlp")
        w1, w3, w2 = ([out.pop(f"{hub}{e}.{w}.weight") for e in range(experts)] for w in ("w1", "w3", "w2"))
        out[f"{to}gate_up_proj"] = torch.cat([torch.stack(w1), torch.stack(w3)], 1)
        out[f"{to}down_proj"] = torch.stack(w2)
    return out


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", ["biased", "qwen2", "qwen3", "mixtral"])
def test_every_rank_holds_what_transformers_cuts(name, tp, tmp_path):
    config, hub, _ = tiny.made(name)
    hub_directory(tmp_path, config, hub)
    model = recipes.find(config)(memory(hub), config)
    for place in Placement(tp=tp).ranks():
        got = as_trained(shard(layout("hf").targets(model, place)), config.get("num_local_experts"))
        whole = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        want = local_parts(whole, tp, place.rank)
        assert sorted(got) == sorted(want)
        for parameter, part in want.items():
            assert torch.equal(got[parameter], torch.from_numpy(bits(part))), parameter
