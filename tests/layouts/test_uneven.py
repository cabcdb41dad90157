"""Sizes that the ranks do not divide: each has an option that pads, and transformers runs what was padded."""

from __future__ import annotations

import json

import fastckpt
import pytest
import torch
from fastckpt.errors import LayoutError
from fastckpt.layouts import layout as layout_of
from layouts import families, tiny
from safetensors.torch import load_file, save_file

transformers = families.transformers
IDS = torch.arange(16).reshape(2, 8) * 7 % 89 + 1
SMALL = dict(
    vocab_size=101, hidden_size=48, intermediate_size=30, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=3, head_dim=8, max_position_embeddings=32, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip
PADDED = dict(num_attention_heads=8, num_key_value_heads=4, intermediate_size=32, vocab_size=104)
EXPERTS = dict(moe_intermediate_size=9, num_experts_per_tok=2)
CASES = {
    "llama": ("Llama", {}, {}),
    "qwen3": ("Qwen3", {}, {}),
    "tied": ("Qwen3", dict(tie_word_embeddings=True), {}),
    "gemma2": ("Gemma2", {}, {}),
    "phi3": ("Phi3", {}, {}),
    "mixtral": ("Mixtral", dict(num_local_experts=3), {}),
    "qwen2_moe": (
        "Qwen2Moe", EXPERTS | dict(num_experts=3, shared_expert_intermediate_size=15, mlp_only_layers=[0]),
        dict(moe_intermediate_size=12, shared_expert_intermediate_size=16),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        EXPERTS | dict(
            n_routed_experts=3, n_shared_experts=2, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24,
            qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, n_group=1, topk_group=1,
            num_key_value_heads=6, head_dim=4,
        ),
        dict(moe_intermediate_size=12, num_key_value_heads=8),
    ),
}  # fmt: skip


def model_of(family, sizes, seed=5):
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for x in model.state_dict().values():
            x.normal_(std=0.2)
    return model


def logits_of(model):
    model.set_experts_implementation("eager")  # the default wants widths of multiples of 16 bytes
    with torch.no_grad():
        return model(input_ids=IDS).logits


def put_together(folder, tp, wanted):
    """The ranks' slices side by side, where that makes a tensor of the wanted shape."""
    ranks = [load_file(folder / f"rank-{r:02d}" / "model.safetensors") for r in range(tp)]
    out = {}
    for name, first in ranks[0].items():
        shape = wanted[name]
        dims = [d for d, n in enumerate(shape) if n != first.shape[d]]
        out[name] = torch.cat([r[name] for r in ranks], dims[0]) if dims else first
        assert tuple(out[name].shape) == shape, name
    return out


@pytest.mark.parametrize("case", CASES)
def test_transformers_runs_the_padded_model(case, tmp_path):
    """config.json says the padded sizes: the model it builds takes the slices, and gives the same logits."""
    family, changes, more = CASES[case]
    model = model_of(family, SMALL | changes)
    model.save_pretrained(tmp_path / "hub")
    layout = layout_of("hf", {"pad": "true", "vocab_padding": "8"})
    out = tmp_path / "out"
    report = fastckpt.reshard(tmp_path / "hub", tp=4, layout=layout, out=out, durable=False)
    said = json.loads((out / "config.json").read_text())
    want = PADDED | more
    assert {k: said[k] for k in want} == want
    assert any("config.json says so" in note for note in report.notes)
    built = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(out), dtype=torch.float32
    )
    built.save_pretrained(tmp_path / "shape")
    shapes = {n: tuple(x.shape) for n, x in load_file(tmp_path / "shape" / "model.safetensors").items()}
    whole = put_together(out, 4, shapes)
    assert sorted(whole) == sorted(shapes)
    (tmp_path / "whole").mkdir()
    save_file(
        {n: x.contiguous() for n, x in whole.items()},
        tmp_path / "whole" / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "whole" / "config.json").write_text((out / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    logits, wanted = logits_of(again), logits_of(model)
    assert logits.shape[-1] == 104 and not logits[..., 101:].any()
    assert (logits[..., :101] - wanted).abs().max().item() <= 1e-5 * wanted.abs().max().item()
    # and the way back is the model before it was padded
    back = fastckpt.open(out)
    hub = load_file(tmp_path / "hub" / "model.safetensors")
    got = fastckpt.reshard(back, layout="same")[0]
    assert sorted(got) == sorted(hub)
    assert all(torch.equal(got[n], hub[n]) for n in hub)


def test_vllm_says_the_padded_sizes_too(tmp_path):
    model_of("Qwen3", SMALL | dict(num_key_value_heads=2)).save_pretrained(tmp_path / "hub")
    out = tmp_path / "out"
    layout = layout_of("vllm", {"pad": "true"})
    fastckpt.reshard(tmp_path / "hub", tp=4, layout=layout, out=out, durable=False)
    said = json.loads((out / "config.json").read_text())
    assert (said["num_attention_heads"], said["num_key_value_heads"], said["head_dim"]) == (8, 2, 8)
    assert (said["intermediate_size"], said["vocab_size"]) == (32, 101)
    got = load_file(out / "model-rank-3-part-0.safetensors")
    hub = load_file(tmp_path / "hub" / "model.safetensors")
    at = "model.layers.0.self_attn."
    qkv = got[f"{at}qkv_proj.weight"]
    # Three queries read each kv head and became four: rank 3 has the third of kv head 1, and one of zeros.
    assert torch.equal(qkv[:8], hub[f"{at}q_proj.weight"][40:48]) and not qkv[8:16].any()
    assert torch.equal(qkv[16:24], hub[f"{at}k_proj.weight"][8:])
    assert {x.dtype for x in got.values()} == {torch.float32}


def test_nothing_changes_where_all_divides(tmp_path):
    config, hub, _ = tiny.made("qwen2")
    for name in ("hf", "vllm"):
        layout = layout_of(name, {"pad": "true"})
        for a, b in zip(
            fastckpt.reshard(hub, tp=4, config=config, layout=layout),
            fastckpt.reshard(hub, tp=4, config=config, layout=name),
            strict=True,
        ):
            assert sorted(a) == sorted(b) and all(torch.equal(a[n], b[n]) for n in a)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file({n: x.contiguous() for n, x in hub.items()}, tmp_path / name / "model.safetensors")
        fastckpt.reshard(tmp_path / name, tp=4, layout=layout, out=tmp_path / f"{name}-out", durable=False)
        assert json.loads((tmp_path / f"{name}-out" / "config.json").read_text()) == config


REFUSED = [
    ("gpt_neox", dict(tp=3), "the config of gpt_neox has no keys to say 9 heads of 8"),
    ("bloom", dict(tp=3), "the config of bloom has no keys to say 9 heads"),
    ("t5", dict(tp=3), "t5 has an encoder, which is not padded"),
]


@pytest.mark.parametrize(("name", "grid", "message"), REFUSED)
def test_what_no_config_can_say_is_refused(name, grid, message, tmp_path):
    config, hub, _ = families.made(name)
    layout = layout_of("hf", {"pad": "true", "vocab_padding": "3"})
    with pytest.raises(LayoutError, match=message):
        fastckpt.reshard(hub, config=config, layout=layout, out=tmp_path / "out", **grid)
    assert not (tmp_path / "out").exists()


def test_shared_experts_that_cannot_follow():
    config, hub, _ = families.made("deepseek_v3")
    layout = layout_of("vllm", {"pad": "true", "vocab_padding": "48"})
    from fastckpt.placement import Placement

    with pytest.raises(LayoutError, match=r"n_shared_experts \* moe_intermediate_size would be 24"):
        fastckpt.reshard(hub, config=config, layout=layout, placement=Placement(tp=16, ep=16))


def test_groups_of_a_quantised_row_cut():
    """A group that a cut would tear is refused; `multiple` makes each rank's columns whole groups."""
    torch.manual_seed(1)
    config = dict(
        SMALL,
        model_type="llama",
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=160,
    )
    kind = transformers.AutoConfig.for_model(**config)
    hub = {n: x.detach() for n, x in transformers.AutoModelForCausalLM.from_config(kind).state_dict().items()}
    options = dict(config=config, tp=2, quant="int4-group32")
    with pytest.raises(LayoutError, match="columns divide by the group 32"):
        fastckpt.reshard(hub, layout="vllm", **options)
    layout = layout_of("vllm", {"pad": "true", "multiple": "32"})
    got = fastckpt.reshard(hub, layout=layout, **options)
    wide = dict(hub)
    for i in range(2):
        for p, dim in (("gate", 0), ("up", 0), ("down", 1)):
            name = f"model.layers.{i}.mlp.{p}_proj.weight"
            more = list(hub[name].shape)
            more[dim] = 32
            wide[name] = torch.cat([hub[name], torch.zeros(more)], dim)
    want = fastckpt.reshard(wide, layout="vllm", **options | dict(config=config | {"intermediate_size": 192}))
    for a, b in zip(got, want, strict=True):
        assert sorted(a) == sorted(b)
        assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", ["hf", "vllm", "rtp_llm", "megatron"])
def test_a_remainder_is_refused_or_padded_and_never_dropped(name):
    """At every tp a layout takes, its ranks hold every element."""
    config, hub, _ = tiny.made("qwen3")
    taken = []
    for tp in range(1, 9):
        try:
            ranks = fastckpt.reshard(hub, tp=tp, config=config, layout=name)
        except LayoutError as e:
            assert "does not divide" in str(e) or "neither" in str(e), tp
            continue
        taken.append(tp)
        held = {float(x) for r in ranks for y in r.values() for x in y.flatten().tolist()}
        assert {float(x) for y in hub.values() for x in y.flatten().tolist()} <= held
    assert set(taken) >= {1, 2, 4, 8}
