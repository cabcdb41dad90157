"""An adapter kept apart in `rtp_llm`: a rank's A and B of a kernel are what that kernel gains."""

from __future__ import annotations

import inspect

import fastckpt
import pytest
import torch
from fastckpt.errors import LayoutError, SourceError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families, gated, tiny
from outputs import hub_directory
from peft_writer import settings, write
from safetensors.torch import load_file

ALPHA, RANK = 6, 4  # B is multiplied by 1.5
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ALL = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SA, FFN = "self_attention_weights.", "ffn_weights.intermediate_weight"


def whole_numbers(tensors, modules, flipped=False):
    """Pairs of small whole numbers, so that no product or sum is rounded."""
    g, out = torch.Generator().manual_seed(len(modules)), {}
    for m in modules:
        rows, columns = tensors[f"{m}.weight"].shape
        outputs, inputs = (columns, rows) if flipped else (rows, columns)
        out[m] = tuple(
            torch.randint(-4, 5, s, generator=g).float() for s in ((RANK, inputs), (outputs, RANK))
        )
    return out


def case(tmp_path, made, modules, prefix="model.layers.{}.", flipped=False, **changes):
    """(base, adapter, config, tensors, pairs) of a model whose first and last layers are adapted."""
    config, tensors, _ = made
    last = config.get("num_hidden_layers", config.get("n_layer")) - 1
    names = [prefix.format(i) + m for i in (0, last) for m in modules]
    pairs = whole_numbers(tensors, [n for n in names if f"{n}.weight" in tensors], flipped)
    told = settings(lora_alpha=ALPHA, r=RANK, fan_in_fan_out=flipped, **changes)
    return (
        hub_directory(tmp_path / "base", config, tensors),
        write(tmp_path / "adapter", told, pairs),
        config,
        tensors,
        pairs,
    )


def products(got):
    """What each pair of a rank adds to its kernel."""
    names = [n.removesuffix(".lora_A") for n in got if n.endswith(".lora_A")]
    assert sorted(got) == sorted(f"{n}.lora_{half}" for n in names for half in "AB")
    return {n: got[f"{n}.lora_A"] @ got[f"{n}.lora_B"] for n in names}


MODELS = {
    "qwen2": (tiny.made, "model.layers.{}.", ALL, False),
    "q and v": (tiny.made, "model.layers.{}.", QKV[::2], False),
    "phi3": (families.made, "model.layers.{}.",
             ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"), False),
    "falcon-new": (families.made, "transformer.h.{}.",
                   ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h",
                    "mlp.dense_4h_to_h"), False),
    "bloom": (families.made, "transformer.h.{}.", ("self_attention.query_key_value",), False),
    "gpt2": (tiny.made, "transformer.h.{}.", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), True),
    "qwen2_moe": (families.made, "model.layers.{}.",
                  (*ALL[:4], *(f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down"))), False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("qwen2", dict(tp=8)),
        ("q and v", dict(tp=1)),
        ("phi3", dict(tp=2)),
        ("falcon-new", dict(tp=2)),
        ("bloom", dict(tp=4)),
        ("gpt2", dict(tp=2)),
        ("qwen2_moe", dict(tp=2, dp=2, ep=2)),
    ],
)
def test_each_ranks_product_is_what_its_kernel_gains(tmp_path, name, grid):
    """Against the layout's own kernels of a model that holds 1.5 * B @ A and else zeros."""
    make, prefix, modules, flipped = MODELS[name]
    made = make("qwen2" if name == "q and v" else name)
    if name == "qwen2_moe":  # an even number of experts
        config, tensors, more = made
        tensors = {
            n: x[:4] if n.endswith("mlp.gate.weight") else x
            for n, x in tensors.items()
            if "experts.4" not in n
        }
        made = config | {"num_experts": 4}, tensors, more
    base, adapter, config, tensors, pairs = case(tmp_path, made, modules, prefix, flipped)
    gained = {n: torch.zeros(x.shape) for n, x in tensors.items()}
    for m, (a, b) in pairs.items():
        gained[f"{m}.weight"] = (ALPHA / RANK * (b @ a)).T.contiguous() if flipped else ALPHA / RANK * (b @ a)
    kernels = fastckpt.reshard(gained, config=config, layout="rtp_llm", placement=Placement(**grid))
    seen = 0
    ranks = fastckpt.reshard(base, layout="rtp_llm", adapter=adapter, apart=True, placement=Placement(**grid))
    for got, want in zip(ranks, kernels, strict=True):
        found = products(got)
        for n, x in want.items():
            if n.endswith(".kernel") and x.any():
                assert torch.equal(found.pop(n), x), n
                seen += 1
        assert not found
    assert seen


@pytest.mark.parametrize(("tp", "w13"), [(1, "true"), (2, "true"), (4, "false"), (8, "true")])
def test_blocks_along_the_diagonal(tmp_path, tp, w13):
    """A side by side, B along a diagonal: zeros where k was not adapted; o and down give A's rows away."""
    modules = (*QKV[::2], *ALL[3:])
    base, adapter, config, _, pairs = case(tmp_path, tiny.made("qwen2"), modules)
    heads, kv = 8, config["num_key_value_heads"]
    size, width = 64 // heads, config["intermediate_size"]
    at = "model.layers.0."
    q, v, o, gate, up, down = (pairs[at + m] for m in modules)
    ranks = fastckpt.reshard(
        base,
        tp=tp,
        layout=layout("rtp_llm", {"w13": w13}),
        adapter=adapter,
        apart=True,
        dtype="bfloat16",
    )
    for r, got in enumerate(ranks):
        to = f"rank_{r:02d}_00_00.layers.0."
        mine = slice(r * 64 // tp, (r + 1) * 64 // tp)
        kvs = sorted({h * kv // heads for h in range(r * heads // tp, (r + 1) * heads // tp)})
        rows = torch.cat([torch.arange(h * size, (h + 1) * size) for h in kvs])
        b = torch.zeros(3 * RANK, 64 // tp + 2 * len(rows))
        b[:RANK, : 64 // tp] = 1.5 * q[1][mine].t()
        b[2 * RANK :, 64 // tp + len(rows) :] = 1.5 * v[1][rows].t()
        want = {
            f"{SA}query_weight": (torch.cat([q[0].t(), torch.zeros(64, RANK), v[0].t()], 1), b),
            f"{SA}attention_output_weight": (o[0].t()[mine], 1.5 * o[1].t()),
        }
        part = slice(r * width // tp, (r + 1) * width // tp)
        halves = [1.5 * x[1][part].t() for x in (gate, up)]
        want[f"{FFN}2"] = down[0].t()[part], 1.5 * down[1].t()
        if w13 == "true":
            want[f"{FFN}13"] = torch.cat([gate[0].t(), up[0].t()], 1), torch.block_diag(*halves)
        else:
            want[FFN], want[f"{FFN}3"] = (gate[0].t(), halves[0]), (up[0].t(), halves[1])
        for name, pair in want.items():
            for half, x in zip("AB", pair, strict=True):
                found = got.pop(f"{to}{name}.kernel.lora_{half}")
                assert found.dtype == torch.bfloat16 and torch.equal(found, x.bfloat16()), (name, half)
        assert all(".layers.1." in n for n in got)


def test_fewer_ranks_cut_the_feed_forward_block(tmp_path):
    """With ffn_tp A and B go with the kernel: rank 3 of 4 has what rank 1 of 2 has."""
    base, adapter, *_ = case(tmp_path, tiny.made("qwen2"), ALL)
    four = fastckpt.reshard(base, 4, layout=layout("rtp_llm", {"ffn_tp": "2"}), adapter=adapter, apart=True)
    two = fastckpt.reshard(base, 2, layout="rtp_llm", adapter=adapter, apart=True)
    for r, got in enumerate(four):
        want = {n: x for n, x in two[r % 2].items() if ".ffn_weights." in n}
        assert len(want) == 8
        for n, x in want.items():
            assert torch.equal(got[n.replace(f"rank_{r % 2:02d}", f"rank_{r:02d}")], x), n


def test_an_adapter_in_training(tmp_path):
    """A checkpoint of the adapted model holds base and adapter; the directory beside it the config alone."""
    config, tensors, _ = tiny.made("qwen2")
    pairs = whole_numbers(tensors, [f"model.layers.0.{m}" for m in ALL])
    state = {f"base_model.model.{n}": x for n, x in tensors.items()}
    for m, (a, b) in pairs.items():
        state[f"base_model.model.{m}.base_layer.weight"] = state.pop(f"base_model.model.{m}.weight")
        state |= {f"base_model.model.{m}.lora_{half}.default.weight": x for half, x in (("A", a), ("B", b))}
        bias = f"base_model.model.{m}.bias"
        if bias in state:
            state[f"base_model.model.{m}.base_layer.bias"] = state.pop(bias)
    apart = write(tmp_path / "adapter", settings(), pairs)
    asked = dict(layout="rtp_llm", tp=2, config=config, apart=True)
    want = fastckpt.reshard(tensors, adapter=apart, **asked)
    (apart / "adapter_model.safetensors").unlink()
    for got, one in zip(fastckpt.reshard(state, adapter=apart, **asked), want, strict=True):
        assert sorted(got) == sorted(one) and all(torch.equal(got[n], x) for n, x in one.items())


def test_files_of_every_rank(tmp_path):
    base, adapter, *_ = case(tmp_path, tiny.made("qwen2"), ALL)
    report = fastckpt.reshard(
        base, tp=2, layout="rtp_llm", adapter=adapter, apart=True, out=tmp_path / "out", durable=False
    )
    names = {p.name for p in (tmp_path / "out").iterdir()}
    parts = {f"adapter_model-{rank:02d}-00-part-00000.safetensors" for rank in range(2)}
    assert names == parts | {"fastckpt.json"}
    for rank, got in enumerate(fastckpt.reshard(base, tp=2, layout="rtp_llm", adapter=adapter, apart=True)):
        held = load_file(tmp_path / "out" / f"adapter_model-{rank:02d}-00-part-00000.safetensors")
        assert sorted(held) == sorted(got) and all(torch.equal(held[n], x) for n, x in got.items())
    merged = fastckpt.reshard(
        base, tp=2, layout="rtp_llm", adapter=adapter, out=tmp_path / "m", durable=False
    )
    assert merged.key != report.key
    assert f"1/rank_01_00_00.layers.0.{SA}query_weight.kernel.lora_A" in fastckpt.open(tmp_path / "out")
    with pytest.raises(SourceError, match="an adapter alone, cut for a layout"):
        fastckpt.reshard(tmp_path / "out", layout="hf")


def test_its_scale_is_multiplied_in_float32_and_rounded_once(tmp_path):
    """Root-scaled: 6 / sqrt(4) for a rank of 4, 5 / sqrt(3) for one with its own."""
    config, tensors, _ = tiny.made("qwen2")
    torch.manual_seed(5)
    name = "model.layers.1.self_attn.o_proj"
    pairs = {name: (torch.randn(3, 64), torch.randn(64, 3))}
    told = settings(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"o_proj": 3}, alpha_pattern={"o_proj": 5}
    )
    adapter = write(tmp_path / "adapter", told, pairs)
    base = hub_directory(tmp_path / "base", config, tensors)
    got = fastckpt.reshard(base, layout="rtp_llm", adapter=adapter, apart=True, dtype="bfloat16")[0]
    b = got[f"rank_00_00_00.layers.1.{SA}attention_output_weight.kernel.lora_B"]
    assert torch.equal(b, (pairs[name][1] * torch.tensor(5 / 3**0.5)).t().bfloat16())


@pytest.mark.parametrize(
    ("name", "modules", "message"),
    [
        ("qwen2", ["lm_head"], "no place for all of lm_head"),
        (
            "qwen3_moe",
            ["model.layers.1.mlp.experts.1.up_proj"],
            r"no place for all of model.*experts\.1\.up_proj",
        ),
        ("deepseek_v3", ["model.layers.0.self_attn.kv_b_proj"], r"no place for all of .*kv_b_proj"),
    ],
)
def test_what_has_no_name_is_refused(tmp_path, name, modules, message):
    config, tensors, _ = (tiny if name in tiny.MODELS else families).made(name)
    adapter = write(tmp_path / "adapter", settings(), whole_numbers(tensors, modules))
    base = hub_directory(tmp_path / "base", config, tensors)
    with pytest.raises(LayoutError, match=message):
        fastckpt.reshard(base, layout="rtp_llm", adapter=adapter, apart=True)


def test_replaced_tensors_and_unlike_ranks_are_refused(tmp_path):
    config, tensors, _ = tiny.made("qwen2")
    base = hub_directory(tmp_path / "base", config, tensors)
    pairs = whole_numbers(tensors, [f"model.layers.0.{m}" for m in QKV])
    saved = {"lm_head.weight": tensors["lm_head.weight"]}
    adapter = write(tmp_path / "saved", settings(), pairs, saved)
    with pytest.raises(LayoutError, match=r"no place for lm_head\.weight beside a base"):
        fastckpt.reshard(base, layout="rtp_llm", adapter=adapter, apart=True)
    name = f"model.layers.0.{QKV[1]}"
    pairs[name] = pairs[name][0][:2], pairs[name][1][:, :2]
    adapter = write(tmp_path / "ranks", settings(rank_pattern={"k_proj": 2}), pairs)
    with pytest.raises(LayoutError, match=r"ranks \[4, 2, 4\] are joined"):
        fastckpt.reshard(base, layout="rtp_llm", adapter=adapter, apart=True)


def test_a_part_that_has_no_name_is_refused(tmp_path):
    """Output gates lie among the rows of q, and the engine has no names for what an adapter adds to them."""
    config, tensors = gated.made()
    name = "model.layers.0.self_attn.q_proj"
    adapter = write(tmp_path / "adapter", settings(), whole_numbers(tensors, [name]))
    base = hub_directory(tmp_path / "base", config, tensors)
    mine = tmp_path / "mine.py"
    source = inspect.getsource(gated)
    told = source[source.index("AT =") : source.index("def model")]
    mine.write_text(f"from fastckpt.recipes.names import Names\n{told}")
    with pytest.raises(LayoutError, match=f"no place for all of {name}"):
        fastckpt.reshard(base, layout="rtp_llm", adapter=adapter, apart=True, recipe=str(mine))
