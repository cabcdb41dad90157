"""gpt-oss with experts in mxfp4: carried by hf, cut between exponents by vllm, made dense, and made."""

from __future__ import annotations

import json

import fastckpt
import pytest
import quant_oracle
import torch
from fastckpt.errors import FastckptError, LayoutError, RecipeError, SourceError
from fastckpt.layouts import layout as layout_of
from layouts import families
from reading import equal

transformers = pytest.importorskip("transformers")
convert_moe_packed_tensors = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors

HIDDEN, WIDTH, EXPERTS = 64, 96, 3


def hub():
    """(config, tensors) with a byte of two values, the first in the low half, and an exponent a 32 inputs."""
    config, tensors, _ = families.made("gpt_oss")
    torch.manual_seed(2)
    out = {}
    for name, x in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")) or "experts" not in name:
            out[name] = x
            continue
        _, into, outs = x.shape
        out[f"{name}_blocks"] = torch.randint(0, 256, (EXPERTS, outs, into // 32, 16), dtype=torch.uint8)
        out[f"{name}_scales"] = torch.randint(110, 140, (EXPERTS, outs, into // 32), dtype=torch.uint8)
    return config | {"quantization_config": {"quant_method": "mxfp4"}}, out


def dense(packed, scales):
    """[experts, out, in] of bytes [experts, out, in / 2] and exponents [experts, out, in / 32]."""
    return quant_oracle.pairs(packed) * (2.0 ** (scales.float() - 127)).repeat_interleave(32, -1)


@pytest.mark.parametrize("tp", [1, 2])
def test_hf_carries_the_experts_whole(tp):
    config, tensors = hub()
    for got in fastckpt.reshard(tensors, tp=tp, config=config, dtype="bfloat16"):
        for name, x in tensors.items():
            if "experts" in name:
                assert torch.equal(got[name], x.bfloat16() if x.is_floating_point() else x), name


@pytest.mark.parametrize("tp", [1, 3])
def test_vllm_cuts_between_exponents(tp):
    """What a rank holds means the rows, or columns, that it serves of the dequantised matrices."""
    config, tensors = hub()
    options = layout_of("vllm", {"vocab_padding": "48"})
    grid = dict(tp=1) if tp == 1 else dict(placement=fastckpt.Placement(tp=1, dp=3))
    for rank, got in enumerate(fastckpt.reshard(tensors, config=config, layout=options, **grid)):
        for i in range(2):
            at = f"model.layers.{i}.mlp.experts."
            for end, name, dim in (("w13", "gate_up_proj", 1), ("w2", "down_proj", 2)):
                whole = dense(tensors[f"{at}{name}_blocks"].flatten(2), tensors[f"{at}{name}_scales"])
                mine = dense(got[f"{at}{end}_weight"], got[f"{at}{end}_weight_scale"])
                assert torch.equal(mine, whole.chunk(tp, dim)[rank])
            assert torch.equal(got[f"{at}w13_bias"], tensors[f"{at}gate_up_proj_bias"].chunk(tp, 1)[rank])


def test_experts_that_end_within_a_group_are_padded():
    config, tensors = hub()
    with pytest.raises(LayoutError, match="3 groups do not divide by 2"):
        fastckpt.reshard(tensors, tp=2, config=config, layout="vllm")
    ranks = fastckpt.reshard(tensors, tp=2, config=config, layout=layout_of("vllm", {"pad": "true"}))
    at = "model.layers.1.mlp.experts."
    for end, name, dim in (("w13", "gate_up_proj", 1), ("w2", "down_proj", 2)):
        whole = dense(tensors[f"{at}{name}_blocks"].flatten(2), tensors[f"{at}{name}_scales"])
        both = torch.cat([dense(r[f"{at}{end}_weight"], r[f"{at}{end}_weight_scale"]) for r in ranks], dim)
        size = whole.shape[dim]
        assert torch.equal(both.narrow(dim, 0, size), whole)
        assert both.shape[dim] > size and not both.narrow(dim, size, both.shape[dim] - size).any()


def test_expert_parallel_ranks():
    config, tensors = hub()
    grid = fastckpt.Placement(tp=2, ep=2)
    got = fastckpt.reshard(tensors, config=config, layout="vllm", placement=grid)
    at = "model.layers.0.mlp.experts."
    both = torch.cat([r[f"{at}w2_weight"] for r in got])
    assert torch.equal(both, tensors[f"{at}down_proj_blocks"].flatten(2))


@pytest.mark.parametrize("served", ["rtp_llm", "megatron"])
def test_layouts_without_a_place_say_so(served, tmp_path):
    config, tensors = hub()
    with pytest.raises(FastckptError, match=r"(no|have a) place for"):
        fastckpt.reshard(tensors, config=config, layout=served, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dense_experts_that_the_config_calls_mxfp4_are_refused():
    """Trained from the hub's release, which was made dense."""
    config, tensors, *_ = families.made("gpt_oss")
    with pytest.raises(RecipeError, match="says quantization_config, and no matrix is quantised"):
        fastckpt.plan(tensors, config=config | {"quantization_config": {"quant_method": "mxfp4"}})


def test_sizes_that_are_none():
    config, tensors = hub()
    name = "model.layers.0.mlp.experts.down_proj_scales"
    with pytest.raises(RecipeError, match=r"down_proj_scales: got shape \(3, 64, 2\), wanted \(3, 64, 3\)"):
        fastckpt.reshard(tensors | {name: tensors[name][..., :2].contiguous()}, config=config)
    with pytest.raises(RecipeError, match="no multiple of mxfp4's 32"):
        fastckpt.reshard(tensors, config=config | {"intermediate_size": 95})
    other = {"quant_method": "mxfp4"}
    with pytest.raises(RecipeError, match="is not read"):
        fastckpt.reshard(
            families.made("qwen3_moe")[1],
            config=families.made("qwen3_moe")[0] | {"quantization_config": other},
        )


def densified(tensors):
    """What transformers makes of the hub's tensors to train them, in bfloat16."""
    out = {n: x for n, x in tensors.items() if not n.endswith(("_blocks", "_scales"))}
    for name in (n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")):
        blocks, scales = tensors[f"{name}_blocks"].clone(), tensors[f"{name}_scales"].clone()
        out[name] = convert_moe_packed_tensors(blocks, scales)
    return out


@pytest.mark.parametrize("served, tp", [("hf", 1), ("hf", 2), ("vllm", 2)])
def test_dense_as_transformers_makes_them(served, tp):
    config, tensors = hub()
    for name in (n for n in tensors if n.endswith("_scales")):  # also what bfloat16 must round to zero or not
        tensors[name][0, 0] = torch.tensor([0, 254, 1])[: tensors[name].shape[2]]
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    got = fastckpt.reshard(
        tensors, tp, config=config, layout=served, quant="none", dtype="bfloat16", allow_nonfinite=True
    )
    want = fastckpt.reshard(
        densified(tensors), tp, config=plain, layout=served, dtype="bfloat16", allow_nonfinite=True
    )
    for a, b in zip(got, want, strict=True):
        equal(a, b)


def test_dense_files_are_a_model_without_a_word_of_mxfp4(tmp_path):
    config, tensors = hub()
    fastckpt.reshard(tensors, config=config | {"dtype": "bfloat16"}, quant="none", out=tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    (got,) = fastckpt.reshard(tmp_path / "out")
    want = densified(tensors)
    equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_experts_become_mxfp4_again(tmp_path, dtype):
    config, tensors = families.made("gpt_oss")[:2]
    torch.manual_seed(9)
    experts = [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    tensors = tensors | {n: torch.randn(tensors[n].shape) for n in experts}  # others are made of it too
    fastckpt.reshard(tensors, config=config, quant="mxfp4-experts", dtype=dtype, out=tmp_path / "q")
    assert fastckpt.verify(tmp_path / "q").ok
    (got,) = fastckpt.reshard(tmp_path / "q")
    want = {n: x.to(getattr(torch, dtype)) for n, x in tensors.items()}
    for name in experts:
        turned = want.pop(name).transpose(1, 2)
        values, scales = quant_oracle.quantised(turned.flatten(0, 1), "mxfp4")
        want[f"{name}_blocks"] = values.reshape(*turned.shape[:2], -1, 16)
        want[f"{name}_scales"] = (torch.log2(scales) + 127).to(torch.uint8).reshape(*turned.shape[:2], -1)
    equal(got, want)
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "mxfp4" and "lm_head" in said["modules_to_not_convert"]
    ranks = fastckpt.reshard(tensors, 2, config=config, quant="mxfp4-experts", dtype=dtype)
    for rank in ranks:  # which transformers' ranks all hold whole
        equal(*({n: x for n, x in held.items() if "experts" in n} for held in (rank, want)))


def test_what_was_mxfp4_once_loses_nothing_when_it_is_again():
    config, tensors = hub()
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    dense = densified(tensors)
    (made,) = fastckpt.reshard(dense, config=plain, quant="mxfp4-experts", dtype="bfloat16")
    said = plain | {"quantization_config": {"quant_method": "mxfp4"}}
    (again,) = fastckpt.reshard(made, config=said, quant="none", dtype="bfloat16")
    equal(again, {n: x.bfloat16() for n, x in dense.items()})


def test_transformers_loads_them(tmp_path):
    """Opt-in: its weights are those that `--quant none` makes of the same files."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    config = transformers.GptOssConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(4)
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hub")
    fastckpt.reshard(tmp_path / "hub", quant="mxfp4-experts", out=tmp_path / "q")
    fastckpt.reshard(tmp_path / "q", quant="none", dtype="bfloat16", out=tmp_path / "dense")
    models = transformers.AutoModelForCausalLM
    a, b = (models.from_pretrained(tmp_path / x, dtype=torch.bfloat16) for x in ("q", "dense"))
    equal(a.state_dict(), b.state_dict())


def test_only_gpt_oss_has_such_stacks():
    config, tensors = families.made("gpt_oss")[:2]
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(LayoutError, match="no stack of experts"):
        quant = fastckpt.Quant(fastckpt.SCHEMES["mxfp4-experts"], include=("*q_proj.weight",))
        fastckpt.reshard(tensors, config=config, quant=quant)
    with pytest.raises(LayoutError, match="no tensor is a matrix known by name"):
        fastckpt.reshard({"a.q_proj.weight": torch.randn(32, 32)}, layout="same", quant="mxfp4-experts")
    with pytest.raises(LayoutError, match="which have biases"):
        fastckpt.reshard({name: torch.randn(2, 64, 32)}, layout="same", quant="mxfp4-experts")
    with pytest.raises(LayoutError, match="inputs that divide by 32"):
        odd = {name: torch.randn(2, 48, 32), f"{name}_bias": torch.randn(2, 32)}
        fastckpt.reshard(odd, layout="same", quant="mxfp4-experts")
    with pytest.raises(LayoutError, match="layout vllm has no place for quantisation scheme mxfp4-experts"):
        fastckpt.reshard(tensors, config=config, layout="vllm", quant="mxfp4-experts")


def test_bytes_that_are_no_mxfp4_are_refused():
    config, tensors = hub()
    name = "model.layers.0.mlp.experts.down_proj"
    for part, wrong, why in (
        ("scales", tensors[f"{name}_scales"][..., :2].contiguous(), "do not fit scales of"),
        ("blocks", tensors[f"{name}_blocks"].to(torch.int8), "got blocks of int8"),
        ("scales", torch.full_like(tensors[f"{name}_scales"], 255), "exponent is 255"),
    ):
        with pytest.raises(SourceError, match=f"down_proj: .*{why}"):
            fastckpt.reshard(tensors | {f"{name}_{part}": wrong}, config=config, quant="none")


def test_the_way_to_dense_weights_is_advised():
    config, tensors = hub()
    with pytest.raises(FastckptError, match="--quant none"):
        fastckpt.reshard(tensors, config=config, quant="int8")
