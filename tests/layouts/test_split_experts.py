"""`split_experts`: experts that the hub stores in stacks, one by one, as quantised releases have them."""

from __future__ import annotations

import fastckpt
import pytest
import torch
from fastckpt.errors import LayoutError
from fastckpt.layouts import layout
from layouts import families
from reading import equal

SPLIT = layout("hf", {"split_experts": "true"})
STACKED = ("qwen3_vl_moe", "llama4_text")


def apart(name):
    """A family's config, its stacks, and what they are one by one: [experts, in, out] and not."""
    config, hub, _ = families.made(name)
    single = dict(hub)
    for stack in [n for n in hub if n.endswith(".experts.gate_up_proj")]:
        at = stack.removesuffix("gate_up_proj")
        ways = zip(single.pop(stack), single.pop(f"{at}down_proj"), strict=True)
        for e, (both, down) in enumerate(ways):
            if name == "llama4_text":
                both, down = both.T, down.T
            gate, up = both.chunk(2)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            single |= {f"{at}{e}.{n}.weight": x.contiguous() for n, x in parts.items()}
    return config, hub, single


@pytest.mark.parametrize("name", STACKED)
def test_each_expert_is_written_under_its_own_name_and_read_back(name, tmp_path):
    config, hub, single = apart(name)
    assert len(single) > len(hub)
    equal(fastckpt.reshard(hub, config=config, layout=SPLIT)[0], single)
    equal(fastckpt.reshard(single, config=config)[0], single)
    with pytest.raises(LayoutError, match="split_experts=true wants experts in stacks"):
        fastckpt.reshard(single, config=config, layout=SPLIT)  # which are apart already
    fastckpt.reshard(hub, 2, config=config, layout=SPLIT, out=tmp_path / "out", durable=False)
    equal(fastckpt.reshard(tmp_path / "out")[0], hub)  # what the shards were cut from


@pytest.mark.parametrize(("name", "served"), [*((n, "vllm") for n in STACKED), ("llama4_text", "rtp_llm")])
def test_servers_hold_the_same_of_either(name, served):
    config, hub, single = apart(name)
    one, other = (fastckpt.reshard(x, 2, config=config, layout=served) for x in (single, hub))
    for ours, theirs in zip(one, other, strict=True):
        equal(ours, theirs)


@pytest.mark.parametrize("name", STACKED)
def test_they_are_quantised_and_read_quantised(name, tmp_path):
    config, hub, single = apart(name)
    quantised, out = tmp_path / "quantised", tmp_path / "dense"
    fastckpt.reshard(hub, config=config, layout=SPLIT, quant="fp8-channel", out=quantised, durable=False)
    carried = fastckpt.reshard(quantised)[0]
    assert any(n.endswith(".experts.4.down_proj.weight_scale") for n in carried)
    fastckpt.reshard(quantised, quant="none", dtype="float32", out=out, durable=False)
    dense = fastckpt.reshard(out)[0]
    assert dense.keys() == single.keys()
    changed = {n for n, x in single.items() if not torch.equal(dense[n], x)}
    assert any(".experts.4.down_proj." in n for n in changed)
    assert not [n for n in changed if "visual." in n]
