"""Linear attention: which rows are what, told by transformers' own forward pass, and where they go."""

from __future__ import annotations

import importlib
from dataclasses import replace

import fastckpt
import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families
from layouts.family_oracle import cut
from layouts.test_rtp_llm import fp8
from reading import bits, memory, read, same, shard

KEYS, VALUES, KEY, VALUE = 8, 16, 6, 10
MODELS = ["qwen3_next", "qwen3_5", "qwen3_5_moe"]
AT = "model.layers.2.linear_attn."


def model_of(name, hub=None, **changes):
    config, files, _ = families.made(name)
    config = config | changes
    return recipes.find(config)(memory(files if hub is None else hub, 2), config)


def seen(name, monkeypatch):
    """What transformers takes for q, k, v, z, b and a: of each row of its matrices the number, and for q, k
    and v the channels of the convolution, in the order of the heads."""
    config, hub, _ = families.made(name)
    kind = families.transformers.AutoConfig.for_model(**config)
    module = families.transformers.AutoModelForCausalLM.from_config(kind).get_submodule(AT[:-1])
    source = importlib.import_module(type(module).__module__)
    out, start = {}, 0
    for leaf in [n for n, _ in module.named_children() if n.startswith("in_proj")]:
        rows = torch.arange(start, start + module.get_submodule(leaf).weight.shape[0], dtype=torch.float64)
        start += len(rows)
        module.get_submodule(leaf).register_forward_hook(lambda *_, rows=rows: rows.view(1, 1, -1))

    class Seen(Exception):
        pass

    def convolved(x, *_, **__):
        out["channels"] = x.flatten()
        return x

    def rule(q, k, v, *, g, beta, **_):
        out.update(q=q, k=k, v=v, a=g, b=beta)
        return v, None

    def normed(_, args):
        out["z"] = args[1]
        raise Seen

    monkeypatch.setattr(source, "causal_conv1d_fn", convolved)
    monkeypatch.setattr(source, "torch_chunk_gated_delta_rule", rule)
    monkeypatch.setattr(source.F, "softplus", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "sigmoid", lambda x: x)
    with torch.no_grad():
        module.A_log.zero_()
        module.dt_bias.zero_()
    module.norm.register_forward_pre_hook(normed)
    with pytest.raises(Seen):
        module(torch.zeros(1, 1, config["hidden_size"]))
    out["a"] = -out["a"]
    matrices = [hub[f"{AT}{n}.weight"] for n, _ in module.named_children() if n.startswith("in_proj")]
    return out, torch.cat(matrices), hub


@pytest.mark.parametrize("name", MODELS)
def test_which_rows_transformers_takes(name, monkeypatch):
    rows, matrices, hub = seen(name, monkeypatch)
    net = model_of(name).layers[2].attention
    for part in "qkvzba":
        want = matrices[rows[part].flatten().long()]
        assert (read(getattr(net, part).weight) == bits(want)).all(), part
    order = {int(row): channel for channel, row in enumerate(rows["channels"])}
    for part, kernel in zip("qkv", net.conv, strict=True):
        channels = [order[int(row)] for row in rows[part].flatten()]
        assert (read(kernel.view) == bits(hub[f"{AT}conv1d.weight"][channels])).all(), part


def apart(hub, at):
    """q, k, v, z, b and a by the definition: Qwen3-Next's matrices hold them key head by key head."""
    group = VALUES // KEYS
    if f"{at}in_proj_qkvz.weight" in hub:
        qkvz = hub[f"{at}in_proj_qkvz.weight"].unflatten(0, (KEYS, -1))
        ba = hub[f"{at}in_proj_ba.weight"].unflatten(0, (KEYS, -1))
        parts = (*qkvz.split([KEY, KEY, group * VALUE, group * VALUE], 1), *ba.split(group, 1))
        return [x.flatten(0, 1) for x in parts]
    q, k, v = hub[f"{at}in_proj_qkv.weight"].split([KEYS * KEY, KEYS * KEY, VALUES * VALUE])
    return [q, k, v, *(hub[f"{at}in_proj_{p}.weight"] for p in "zba")]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_rtp_llm(name, tp):
    _, hub, _ = families.made(name)
    model = model_of(name)
    q, k, v, z, b, a = apart(hub, AT)
    kernels = hub[f"{AT}conv1d.weight"].split([KEYS * KEY, KEYS * KEY, VALUES * VALUE])
    for r, place in enumerate(Placement(tp=tp).ranks()):
        got = shard(layout("rtp_llm").targets(model, place))

        def mine(x, r=r):
            return cut(x, 0, tp, r)

        to = f"rank_{r:02d}_00_00.layers.2.linear_attn."
        want = {
            "in_proj_qkvz.weight": torch.cat([mine(x) for x in (q, k, v, z)]).t(),
            "in_proj_ba.weight": torch.cat([mine(b), mine(a)]).t(),
            "conv1d.weight": torch.cat([mine(x) for x in kernels]),
            "A_log": mine(hub[f"{AT}A_log"]),
            "dt_bias": mine(hub[f"{AT}dt_bias"]),
            "norm.weight": hub[f"{AT}norm.weight"],
            "out_proj.weight": cut(hub[f"{AT}out_proj.weight"].t(), 0, tp, r),
        }
        same({n: x for n, x in got.items() if n.startswith(to)}, {to + n: x for n, x in want.items()})


def fp8_model():
    """A Qwen3-Next whose matrices are bytes with factors of 128 x 128 blocks, as the hub's fp8 files have it:
    all but b and a, the kernels and the routers."""
    config = families.made("qwen3_next")[0] | dict(
        hidden_size=128, head_dim=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=32,
        num_hidden_layers=2, layer_types=None, full_attention_interval=2, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=128, linear_value_head_dim=128, num_experts=2,
        moe_intermediate_size=256, shared_expert_intermediate_size=256, mlp_only_layers=[],
    )  # fmt: skip
    shapes = recipes.imagined(recipes.find(config), config)
    dense = ("in_proj_ba.weight", "conv1d.weight", "gate.weight")
    plain = {n: s for n, s in shapes.items() if n.endswith(dense)}
    said, hub = fp8(config, {n: s for n, s in shapes.items() if n not in plain})
    at = 1
    for name, shape in plain.items():
        hub[name] = torch.arange(at, at + torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        at += hub[name].numel()
    return said, hub


@pytest.mark.parametrize("tp", [1, 2])
def test_fp8_blocks(tp):
    config, hub = fp8_model()
    model = recipes.find(config)(memory(hub), config)
    at = "model.layers.0.linear_attn."
    for r, place in enumerate(Placement(tp=tp).ranks()):
        vllm, rtp = (shard(layout(n).targets(model, place)) for n in ("vllm", "rtp_llm"))
        to = f"rank_{r:02d}_00_00.layers.0.linear_attn."
        for leaf, kind, block in (("weight", "weight", 128), ("weight_scale_inv", "scale", 1)):
            qkvz, out = hub[f"{at}in_proj_qkvz.{leaf}"], hub[f"{at}out_proj.{leaf}"]
            name = f"{at}in_proj_qkvz.{leaf}"
            same({name: vllm[name]}, {name: cut(qkvz, 0, tp, r)})
            groups = qkvz.unflatten(0, (2, -1)).split([block, block, 2 * block, 2 * block], 1)
            parts = [cut(x.flatten(0, 1), 0, tp, r) for x in groups]
            want = {f"{to}in_proj_qkvz.{kind}": torch.cat(parts), f"{to}out_proj.{kind}": cut(out, 1, tp, r)}
            same({n: rtp[n] for n in want}, want)
            name = f"model.layers.1.self_attn.qkv_proj.{leaf}"
            q, k, v = (hub[f"model.layers.1.self_attn.{p}_proj.{leaf}"] for p in "qkv")
            same({name: vllm[name]}, {name: torch.cat([cut(x, 0, tp, r) for x in (q, k, v)])})
    same(shard(layout("hf").targets(model, Placement())), hub)


def further(hub, config, of="model.layers.1."):
    """The same tensors with a layer for multi-token prediction, as the hub's files have it."""
    out, hidden = dict(hub), config["hidden_size"]
    out |= {n.replace(of, "mtp.layers.0."): x + 0.5 for n, x in hub.items() if n.startswith(of)}
    out["mtp.fc.weight"] = torch.arange(2.0 * hidden**2).view(hidden, 2 * hidden)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        out[f"mtp.{name}.weight"] = torch.arange(float(hidden)) + len(name)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_multi_token_prediction(name):
    """They are written to the hub's form, and left out of every server's."""
    config, hub, _ = families.made(name)
    only = {"mlp_only_layers": []} if name == "qwen3_next" else {}
    more = further(hub, config)
    if only:  # the layer has experts as the first one has
        more |= {n.replace("layers.2.", "layers.0."): x for n, x in hub.items() if "layers.2.mlp." in n}
        more = {n: x for n, x in more.items() if not (n in hub and n.startswith("model.layers.0.mlp.") and
                n.replace("layers.0.", "layers.2.") not in hub)}  # fmt: skip
    model = model_of(name, more, **only)
    assert len(model.predictions) == 1
    same(shard(layout("hf").targets(model, Placement())), more)
    for served in ("vllm", "rtp_llm"):
        assert not [t.name for t in layout(served).targets(model, Placement()) if "mtp" in t.name]
    with pytest.raises(RecipeError, match=r"no place for mtp\.more"):
        model_of(name, more | {"mtp.more": torch.ones(1)}, **only)


@pytest.mark.parametrize("name", ["qwen3_5-images", "qwen3_5_moe-images"])
def test_the_same_beside_an_image_tower(name):
    config, hub, _ = families.made(name)
    more = further(hub, config["text_config"], "model.language_model.layers.1.")
    model = model_of(name, more)
    assert len(model.predictions) == 1
    same(shard(layout("hf").targets(model, Placement())), more)
    assert not [t.name for t in layout("vllm").targets(model, Placement()) if "mtp" in t.name]


def test_which_layers_config_says():
    config, hub, _ = families.made("qwen3_next")
    silent = {k: v for k, v in config.items() if k != "layer_types"}
    with pytest.raises(RecipeError, match=r"layers\.1\.linear_attn\.in_proj_qkvz"):
        recipes.find(config)(memory(hub), silent)
    for types in (["full_attention"] * 2, ["sliding_attention"] * 3, "linear_attention"):
        with pytest.raises(RecipeError, match="layer_types must be 3 of linear_attention and"):
            model_of("qwen3_next", layer_types=types)
    with pytest.raises(RecipeError, match="linear_num_value_heads 12 is no multiple of"):
        model_of("qwen3_next", linear_num_value_heads=12)


def test_rates_are_not_rounded():
    """Asked for bfloat16, A_log keeps float32, in which vLLM holds it; rtp-llm has it in its own dtype."""
    config, hub, _ = families.made("qwen3_5")
    held = {}
    for served in ("hf", "vllm", "rtp_llm"):
        (state,) = fastckpt.reshard(hub, config=config, layout=served, dtype="bfloat16")
        held[served] = {str(x.dtype) for n, x in state.items() if n.endswith("A_log")}
        assert {str(x.dtype) for n, x in state.items() if n.endswith("dt_bias")} == {"torch.bfloat16"}
    assert held == {"hf": {"torch.float32"}, "vllm": {"torch.float32"}, "rtp_llm": {"torch.bfloat16"}}


def test_heads_that_ranks_cannot_share():
    model = model_of("qwen3_next")
    few = replace(model, sizes=replace(model.sizes, delta=replace(model.sizes.delta, keys=2)))
    for served in ("vllm", "rtp_llm"):
        with pytest.raises(LayoutError, match="linear attention's key heads 2 does not divide by tp 4"):
            layout(served).targets(few, Placement(tp=4))
