"""Families that transformers has no plan for: each rank's elements alone, summed over ranks, are the model.

A rank's model is the whole one with every element zeroed that the rank does not hold; what its attention and
feed-forward blocks make of the same input is added up. A query head apart from its kv head would show.
"""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families, tiny
from reading import memory, shard

BLOCKS = {
    "falcon-mqa": ("self_attention", "mlp"),
    "falcon-new": ("self_attention", "mlp"),
    "falcon-11b": ("self_attention", "mlp"),
    "falcon-rw": ("self_attention", "mlp"),
    "bloom": ("self_attention", "mlp"),
    "gpt2": ("attn", "mlp"),
}
IDS = torch.arange(24).reshape(2, 12) * 5 % 89 + 1
ADDED_ONCE = ("dense.bias", "dense_4h_to_h.bias", "c_proj.bias")


def numbered(name):
    if name != "gpt2":
        return families.made(name)[:2]
    config, hub, _ = tiny.made(name)
    hub = {n: x.clone() for n, x in hub.items()}
    families.number(hub)
    return config, hub


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_parts_add_up(name, tp):
    config, ids = numbered(name)
    torch.manual_seed(3)
    values = torch.randn(2**21)
    recipe = recipes.find(config)
    placed = layout("hf", {"replicate_kv": "true"})
    kind = families.transformers.AutoConfig.for_model(**config)

    def model_of(tensors):
        model = families.transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32).eval()
        missing = model.load_state_dict(tensors, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}
        model.tie_weights()
        return model

    real = {n: values[x.long()] * 0.2 for n, x in ids.items()}
    held = []
    for p in Placement(tp=tp).ranks():
        got = shard(placed.targets(recipe(memory(ids), config), p))
        parts = {}
        for n, x in ids.items():
            mine = torch.isin(x, torch.from_numpy(got[n][1].view("f4")).flatten())
            once = n.endswith(ADDED_ONCE) and p.rank
            parts[n] = real[n] * mine * (0 if once else 1)
        held.append(model_of(parts))
    whole = model_of(real)
    with torch.no_grad():
        want = whole(input_ids=IDS, use_cache=False).logits
        for path, module in whole.named_modules():
            if path.count(".") == 3 and path.rpartition(".")[2] in BLOCKS[name]:
                peers = [m.get_submodule(path) for m in held]
                module.register_forward_hook(summed(peers, residual=name == "bloom"), with_kwargs=True)
        got = whole(input_ids=IDS, use_cache=False).logits
    assert want.abs().max() > 0.05
    # Ranks add in another order than one model does: not exact.
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


def summed(peers, *, residual):
    """A hook that puts the sum of the peers' outputs in place of the module's own."""

    def hook(_, args, kwargs, output):
        total = 0
        for rank, peer in enumerate(peers):
            mine = args
            if residual and rank:  # BLOOM's blocks add the residual themselves
                mine = (args[0], torch.zeros_like(args[1]), *args[2:])
            made = peer(*mine, **kwargs)
            total = total + (made[0] if isinstance(made, tuple) else made)
        return (total, *output[1:]) if isinstance(output, tuple) else total

    return hook
