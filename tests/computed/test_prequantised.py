"""Quantised before the layout: rtp_llm and vLLM's scale for every matrix it fuses, against plain torch.

The hub's matrices are quantised uncut in plain torch, then placed by the oracle that quantised checkpoints
are held to (`layouts.test_rtp_quantised`). AWQ's and GPTQ's words come from layout `hf`, read as loaders do.
"""

from __future__ import annotations

import functools
import json
import random
from itertools import pairwise

import fastckpt
import peft_writer
import pytest
import quant_oracle
import reading
import torch
from fastckpt.cli import main
from fastckpt.computed import prequantised
from fastckpt.computed.prequantised import _parts as parts_of
from fastckpt.errors import LayoutError, RecipeError, SourceError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from fastckpt.quantisation import rounding
from fastckpt.quantisation.schemes import SCHEMES, Quant
from layouts.quantised import HEADS, KV, D
from layouts.test_rtp_quantised import experts, heads, once, packed, rowwise
from reading import equal
from safetensors.torch import load_file
from zero_writer import write_zero

HIDDEN, WIDTH, EXPERTS = 256, 512, 4
AT = "model.layers.0."
EIGHT = {"int8": "int8", "fp8": "fp8-tensor", "fp8-channel": "fp8-channel"}
"""Scheme -> the same form among `layouts.quantised.CONFIGS`."""
PAIR = ("gate", "up")
FOUR = ("awq-group32", "gptq-group32", "gptq-group32-zero")


@functools.cache
def model(count=0, head=D, dtype=torch.float32):
    """(config, tensors) of one layer: a Llama, or a Qwen3-MoE of so many experts."""
    config = {
        "model_type": "qwen3_moe" if count else "llama", "vocab_size": 64, "hidden_size": HIDDEN,
        "intermediate_size": WIDTH, "head_dim": head, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    rows = {"q": HEADS * head, "k": KV * head, "v": KV * head}
    shapes = {f"{AT}self_attn.{p}_proj.weight": (n, HIDDEN) for p, n in rows.items()}
    shapes[f"{AT}self_attn.o_proj.weight"] = (HIDDEN, HEADS * head)
    for block in [f"{AT}mlp.experts.{e}." for e in range(count)] or [f"{AT}mlp."]:
        shapes |= {f"{block}{p}_proj.weight": (WIDTH, HIDDEN) for p in PAIR}
        shapes[f"{block}down_proj.weight"] = (HIDDEN, WIDTH)
    shapes |= {n: (64, HIDDEN) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    norms = ("model.norm", f"{AT}input_layernorm", f"{AT}post_attention_layernorm")
    shapes |= {f"{n}.weight": (HIDDEN,) for n in norms}
    if count:
        config |= {"num_experts": count, "moe_intermediate_size": WIDTH, "decoder_sparse_step": 1,
                   "mlp_only_layers": []}  # fmt: skip
        shapes[f"{AT}mlp.gate.weight"] = (count, HIDDEN)
        shapes |= {f"{AT}self_attn.{p}_norm.weight": (head,) for p in "qk"}
    torch.manual_seed(count + head)
    made = {n: torch.randn(s) * torch.randn(s[0], *[1] * (len(s) - 1)).exp() for n, s in shapes.items()}
    return config, {n: x.to(dtype) for n, x in made.items()}


@functools.cache
def hub(scheme, count=0, head=D, dtype=torch.float32):
    """The hub's quantised checkpoint."""
    config, tensors = model(count, head, dtype)
    if scheme in FOUR:
        (out,) = fastckpt.reshard(tensors, config=config, quant=scheme)
        kind = quant_oracle.GROUPS[scheme][0]
        for name, x in tensors.items():
            if "_proj" in name:
                got = quant_oracle.read_back(out, name.removesuffix("weight"), kind)
                assert all(map(torch.equal, got, quant_oracle.grouped(x, scheme)))
        return out
    out = {}
    for name, x in tensors.items():
        out[name] = x
        if "_proj" in name:
            out[name], scales = quant_oracle.quantised(x, scheme)
            end = "_scale_inv" if scheme == "fp8-block" else "_scale"
            out[name + end] = scales.reshape(-1) if scheme == "fp8" else scales
    return out


def blocks(t, tp, r):
    """fp8 by blocks of 128 x 128, heads of 128."""
    out, a, m = {}, f"{AT}self_attn.", f"{AT}mlp."
    for leaf, name, unit in (("weight", "kernel", 128), ("weight_scale_inv", "weight_only_quant_scale", 1)):
        to = f"self_attention_weights.query_weight.{name}"
        out[to] = heads(t, a, leaf, tp, r, 0, unit)
        out[f"self_attention_weights.attention_output_weight.{name}"] = t[f"{a}o_proj.{leaf}"].chunk(tp, 1)[r]
        both = [t[f"{m}{p}_proj.{leaf}"].chunk(tp)[r] for p in PAIR]
        out[f"ffn_weights.intermediate_weight13.{name}"] = torch.cat(both)
        out[f"ffn_weights.intermediate_weight2.{name}"] = t[f"{m}down_proj.{leaf}"].chunk(tp, 1)[r]
    return out


def wanted(scheme, t, tp, r):
    if scheme == "fp8-block":
        return blocks(t, tp, r)
    if scheme in FOUR:
        return packed(t, AT, tp, r, scheme.startswith("awq"), 8)
    return rowwise(t, AT, tp, r, EIGHT[scheme])


def check(shard, want, place="rank_{:02d}_00_00", rank=0):
    """Kernels, scales and zeros; what stays dense has layouts' tests of its own."""
    at = f"{place.format(rank)}.layers.0."
    got = {n: x for n, x in shard.items() if any(k in n for k in ("query", "output", "intermediate"))}
    equal(got, {at + n: x for n, x in want.items()})


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("scheme", [*EIGHT, "fp8-block", *FOUR])
def test_rtp_llm(scheme, tp):
    head = 128 if scheme == "fp8-block" else D
    t, (config, tensors) = hub(scheme, 0, head), model(0, head)
    shards = fastckpt.reshard(tensors, tp, layout="rtp_llm", config=config, quant=scheme)
    for r, shard in enumerate(shards):
        check(shard, wanted(scheme, t, tp, r), rank=r)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-channel", "awq-group32", "gptq-group32"])
def test_rtp_llm_experts(scheme, tp, ep):
    """With ep 2 of 4 ranks a rank holds some experts and a part of their widths: scales of the whole ones."""
    t, (config, tensors) = hub(scheme, EXPERTS), model(EXPERTS)
    placement = Placement(tp=tp, ep=ep)
    made = fastckpt.reshard(tensors, placement=placement, layout="rtp_llm", config=config, quant=scheme)
    for r, shard in enumerate(made):
        form = EIGHT.get(scheme, scheme.partition("-")[0])
        moe = experts(t, AT, form, EXPERTS, tp, ep, r)
        check(shard, wanted(scheme, t, tp, r) | moe, f"rank_{{:02d}}_00_{r % ep:02d}", r)


def test_one_scale_of_what_is_joined():
    """As the engine loads such a checkpoint: rounded once to each matrix's scale, then to the largest."""
    t, (config, tensors) = hub("fp8"), model()
    asked = layout("rtp_llm", {"one_scale": "true"})
    shard = fastckpt.reshard(tensors, layout=asked, config=config, quant="fp8", rank=0)
    at = "rank_00_00_00.layers.0.self_attention_weights.query_weight."
    values, scale = once(t, [f"{AT}self_attn.{p}_proj." for p in "qkv"], [slice(None)] * 3)
    got = {n: shard[at + n] for n in ("kernel", "weight_only_quant_scale")}
    equal(got, {"kernel": values, "weight_only_quant_scale": scale})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int8", "gptq-group32-zero"])
def test_sixteen_bits_are_quantised_as_they_are(scheme, dtype):
    config, tensors = model()
    t = hub(scheme, 0, D, dtype)
    for given, name in ((model(0, D, dtype)[1], None), (tensors, str(dtype)[6:])):
        shard = fastckpt.reshard(given, 2, layout="rtp_llm", config=config, quant=scheme, rank=1, dtype=name)
        check(shard, wanted(scheme, t, 2, 1), rank=1)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_vllm_keeps_a_scale_for_each_matrix_it_fuses(tp):
    """tp 8: each of four kv heads on two ranks."""
    t, (config, tensors) = hub("fp8"), model()
    a, m = f"{AT}self_attn.", f"{AT}mlp."
    for r, shard in enumerate(fastckpt.reshard(tensors, tp, layout="vllm", config=config, quant="fp8")):
        kv = max(D, KV * D // tp)
        q, k, v = (t[f"{a}{p}_proj.weight"] for p in "qkv")
        gate, up = (t[f"{m}{p}_proj.weight"] for p in PAIR)
        at = r * KV * D // tp // kv * kv
        want = {
            f"{a}qkv_proj.weight": torch.cat([q.chunk(tp)[r], k[at : at + kv], v[at : at + kv]]),
            f"{a}qkv_proj.weight_scale": torch.cat([t[f"{a}{p}_proj.weight_scale"] for p in "qkv"]),
            f"{a}o_proj.weight": t[f"{a}o_proj.weight"].chunk(tp, 1)[r],
            f"{a}o_proj.weight_scale": t[f"{a}o_proj.weight_scale"],
            f"{m}gate_up_proj.weight": torch.cat([x.chunk(tp)[r] for x in (gate, up)]),
            f"{m}gate_up_proj.weight_scale": torch.cat([t[f"{m}{p}_proj.weight_scale"] for p in PAIR]),
            f"{m}down_proj.weight": t[f"{m}down_proj.weight"].chunk(tp, 1)[r],
            f"{m}down_proj.weight_scale": t[f"{m}down_proj.weight_scale"],
        }  # fmt: skip
        equal({n: x for n, x in shard.items() if "_proj" in n}, want)


def test_vllm_keeps_scales_of_experts_apart():
    t, (config, tensors) = hub("fp8", EXPERTS), model(EXPERTS)
    shard = fastckpt.reshard(tensors, 2, layout="vllm", config=config, quant="fp8", rank=1)
    each = [f"{AT}mlp.experts.{e}." for e in range(EXPERTS)]
    pairs = [torch.cat([t[f"{e}{p}_proj.weight"].chunk(2)[1] for p in PAIR]) for e in each]
    scales = [torch.cat([t[f"{e}{p}_proj.weight_scale"] for p in PAIR]) for e in each]
    want = {
        "w13_weight": torch.stack(pairs),
        "w13_weight_scale": torch.stack(scales),
        "w2_weight": torch.stack([t[f"{e}down_proj.weight"].chunk(2, 1)[1] for e in each]),
        "w2_weight_scale": torch.stack([t[f"{e}down_proj.weight_scale"] for e in each]),
    }
    got = {n: x for n, x in shard.items() if ".experts." in n}
    equal(got, {f"{AT}mlp.experts.{n}": x for n, x in want.items()})


# ---- on the road ----


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-block", "awq-group32"])
def test_from_zero_files_to_files(tmp_path, scheme, capsys):
    head = 128 if scheme == "fp8-block" else D
    t, (config, tensors) = hub(scheme, 0, head), model(0, head)
    write_zero(tmp_path / "in", dict(tensors), stage=3, world=3)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    asked = dict(layout="rtp_llm", quant=scheme)
    report = fastckpt.reshard(tmp_path / "in", 2, out=tmp_path / "out", threads=2, **asked)
    for r in range(2):
        file = tmp_path / "out" / f"model-{r:02d}-00-part-00000.safetensors"
        check(load_file(file), wanted(scheme, t, 2, r), rank=r)
    assert fastckpt.verify(tmp_path / "out").ok
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == {"fp8-b": "fp8", "awq-g": "awq"}.get(scheme[:5], "compressed-tensors")
    matrices = {n for n in tensors if "_proj" in n}
    assert report.errors.keys() == {f"{r}/{n}" for r in range(2) for n in matrices}
    assert {x.name for x in fastckpt.inspect(tmp_path / "out").losses} == matrices
    assert main(["inspect", str(tmp_path / "out"), "--plot", str(tmp_path / "a.png")]) == 0
    assert f"quantised to {scheme} (14 tensors" in capsys.readouterr().out
    dense = sum(x.numel() * 4 for x in tensors.values())
    assert dense <= report.bytes_needed <= dense + 2 * 4 * 4 * HIDDEN * 64
    assert report.bytes_read <= 1.01 * report.bytes_needed
    for r in (1, 0):
        fastckpt.reshard(tmp_path / "in", 2, rank=r, out=tmp_path / "each", threads=1, **asked)
    for path in (tmp_path / "out").glob("*"):
        if path.name != "fastckpt.json":
            assert path.read_bytes() == (tmp_path / "each" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("scheme", ["int8", "fp8-block"])
def test_what_the_values_were_made_of_is_not_read_again(tmp_path, scheme):
    config, tensors = model(0, 128 if scheme == "fp8-block" else D)
    report = fastckpt.reshard(
        tensors, 2, layout="rtp_llm", config=config, quant=scheme, out=tmp_path / "out", threads=1
    )
    assert report.bytes_scanned < sum(4 * t.numel() for n, t in tensors.items() if "_proj" in n) / 2


ODD = ("int8", "fp8", "fp8-channel", "fp8-block", "awq-group32", "gptq-group64-zero")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("scheme", ODD)
def test_figures_are_those_of_the_other_road(tmp_path, monkeypatch, scheme, native):
    """Widths that no batch divides: values, scales and figures equal those of layout `hf`."""
    if not native:
        monkeypatch.setattr(rounding, "_C", None)
    monkeypatch.setattr(prequantised, "PIECE", 100_000)
    config, tensors = model(0, 128)
    wide = 1600 if native else 576
    config = config | {"intermediate_size": wide}
    torch.manual_seed(3)
    shapes = {"gate": (wide, HIDDEN), "up": (wide, HIDDEN), "down": (HIDDEN, wide)}
    tensors = tensors | {f"{AT}mlp.{p}_proj.weight": torch.randn(s) for p, s in shapes.items()}
    if scheme == "fp8-block":
        config = config | {"intermediate_size": WIDTH}
        tensors = model(0, 128)[1]
    told = [
        fastckpt.reshard(tensors, layout=name, config=config, quant=scheme, out=tmp_path / name)
        for name in ("hf", "rtp_llm")
    ]
    stem = SCHEMES[scheme].values or "weight"
    own = {n.removesuffix(stem) + "weight": told[0].errors[n] for n in told[0].errors}
    assert own.keys() == told[1].errors.keys()
    for name, figures in own.items():
        other = told[1].errors[name]
        assert (figures["scheme"], figures["dense_bytes"]) == (other["scheme"], other["dense_bytes"])
        for key in ("max_error", "rms_error", "snr_db", "cosine"):
            assert other[key] == pytest.approx(figures[key], rel=2e-5), (name, key)


def test_a_batch_that_ends_within_a_row():
    """A down of several batches, most of which begin somewhere in a row of 12296 bytes."""
    wide = 12296
    config, tensors = model()
    config = config | {"intermediate_size": wide}
    torch.manual_seed(4)
    shapes = {"gate": (wide, HIDDEN), "up": (wide, HIDDEN), "down": (HIDDEN, wide)}
    tensors = tensors | {f"{AT}mlp.{p}_proj.weight": torch.randn(s) for p, s in shapes.items()}
    for scheme in ("int8", "fp8"):
        shard = fastckpt.reshard(tensors, layout="rtp_llm", config=config, quant=scheme, rank=0, threads=3)
        values, scales = quant_oracle.quantised(tensors[f"{AT}mlp.down_proj.weight"], scheme)
        at = "rank_00_00_00.layers.0.ffn_weights.intermediate_weight2."
        assert torch.equal(shard[f"{at}kernel"].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(shard[f"{at}weight_only_quant_scale"], scales.flatten())


class Asked:
    """Gives the dense elements of views of memory, and keeps the sum of the errors it is told."""

    def __init__(self):
        self.error = rounding.Error()

    def dense(self, view, *, scan=False):
        return reading.read(view)

    def add_error(self, matrix, error):
        self.error += error


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "fp8-channel", "fp8-block", "int4-group32", *FOUR])
def test_any_box_of_a_part_is_that_of_the_whole(monkeypatch, scheme, native):
    """Also one that begins and ends within a block, whose scale it shares with what lies outside."""
    if not native:
        monkeypatch.setattr(rounding, "_C", None)
    monkeypatch.setattr(prequantised, "PIECE", 40_000)
    torch.manual_seed(5)
    entry = reading.memory({"a.weight": torch.randn(264, 320)}).entries["a.weight"]
    rng, asked = random.Random(5), Asked()
    whole = {
        p.kind: p.box(asked, 0, p.shape[0], 0, p.shape[1])
        for p in parts_of("a.weight", entry, SCHEMES[scheme])
    }
    total, asked = asked.error, Asked()
    for part in parts_of("a.weight", entry, SCHEMES[scheme]):
        outputs = scheme in FOUR and part.shape[1] == 264  # of which eight share a word of zero points
        rows, columns = (
            [0, *sorted(rng.sample(range(unit, n, unit), min(n // unit - 1, 4))), n]
            for n, unit in zip(part.shape, (1, 8 if outputs else 1), strict=True)
        )
        for r0, r1 in rng.sample(list(pairwise(rows)), len(rows) - 1):
            for c0, c1 in pairwise(columns):
                got = part.box(asked, r0, r1, c0, c1)
                assert got.tobytes() == whole[part.kind][r0:r1, c0:c1].tobytes(), (part.kind, r0, r1, c0, c1)
    assert asked.error.values == total.values == 264 * 320
    for figure in ("biggest", "difference", "dense", "quantised", "both"):
        assert getattr(asked.error, figure) == pytest.approx(getattr(total, figure), rel=2e-6), figure


@pytest.mark.parametrize("scheme", ["int8", "fp8-channel", "fp8-block", *FOUR])
def test_scales_that_are_asked_for_first_are_of_finite_values(scheme):
    dense = torch.ones(264, 320)
    dense[263, 319] = float("nan")
    entry = reading.memory({"a.weight": dense}).entries["a.weight"]
    scales = next(p for p in parts_of("a.weight", entry, SCHEMES[scheme]) if p.kind == "scales")
    with pytest.raises(SourceError, match=r"a\.weight: NaN or infinite"):
        scales.box(Asked(), 0, scales.shape[0], 0, scales.shape[1])


def test_an_adapter_is_merged_first(tmp_path):
    config, tensors = model()
    pairs = peft_writer.thin(tensors, [f"{AT}self_attn.o_proj"])
    peft_writer.write(tmp_path / "lora", peft_writer.settings(target_modules=["o_proj"]), pairs)
    asked = dict(layout="rtp_llm", config=config, rank=0)
    dense = fastckpt.reshard(tensors, adapter=tmp_path / "lora", config=config, rank=0)
    want = fastckpt.reshard(dense, quant="int8", **asked)
    got = fastckpt.reshard(tensors, adapter=tmp_path / "lora", quant="int8", **asked)
    equal(got, want)
    base = fastckpt.reshard(tensors, quant="int8", **asked)
    name = "rank_00_00_00.layers.0.self_attention_weights.attention_output_weight.kernel"
    assert not torch.equal(got[name], base[name])


# ---- bad inputs ----


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-block", "awq-group32"])
def test_values_that_are_not_finite_are_refused(tmp_path, scheme, bad):
    config, tensors = model(0, 128)
    name = f"{AT}mlp.down_proj.weight"
    broken = dict(tensors) | {name: tensors[name].clone()}
    broken[name][131, 77] = bad
    for allow in (False, True):
        with pytest.raises(SourceError, match=r"down_proj\.weight: NaN or infinite"):
            fastckpt.reshard(
                broken, 2, layout="rtp_llm", config=config, quant=scheme, out=tmp_path / "out",
                allow_nonfinite=allow,
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-block"])
def test_zeros_have_scale_one(scheme):
    config, tensors = model(0, 128)
    zeroed = dict(tensors) | {f"{AT}mlp.down_proj.weight": torch.zeros(HIDDEN, WIDTH)}
    shard = fastckpt.reshard(zeroed, layout="rtp_llm", config=config, quant=scheme, rank=0)
    at = "rank_00_00_00.layers.0.ffn_weights.intermediate_weight2."
    assert not shard[f"{at}kernel"].float().any() and (shard[f"{at}weight_only_quant_scale"] == 1).all()


def refused(match, *, to="rtp_llm", quant="int8", tp=1, count=0, config=None, tensors=None):
    told, made = model(count)
    with pytest.raises(LayoutError, match=match):
        fastckpt.reshard(tensors or made, tp, layout=to, config=told | (config or {}), quant=quant)


def test_what_does_not_fit_is_refused():
    refused("q_proj is compressed-tensors' packed .* take awq-group or gptq-group", quant="int4-group")
    experts_alone = Quant(SCHEMES["int4-group32-zero"], exclude=("*self_attn*",))
    refused(r"no place for .*up_proj\.weight_zero_point", quant=experts_alone, count=EXPERTS)
    refused("has no place for quantisation scheme int8-dynamic", quant="int8-dynamic")
    refused("no multiple of their block 128", quant="fp8-block", tp=8)
    refused("quantised already", config={"quantization_config": {"quant_method": "awq"}})
    refused("no tensor is a matrix", quant=Quant(SCHEMES["int8"], exclude=("*",)))
    refused(r"'\*\.nose\.\*' names no tensor", quant=Quant(SCHEMES["int8"], include=("*.nose.*",)))
    refused("columns divide by the group 128", quant="awq-group",
            tensors={f"{AT}self_attn.q_proj.weight": torch.zeros(8, 200)})  # fmt: skip
    refused("rows divide by 8", quant="awq-group",
            tensors={f"{AT}self_attn.q_proj.weight": torch.zeros(12, 128)})  # fmt: skip
    refused("a stack of matrices", quant=Quant(SCHEMES["int8"], include=("*gate_up_proj",)),
            tensors={f"{AT}mlp.experts.gate_up_proj": torch.zeros(2, 8, 8)})  # fmt: skip


def test_stacks_of_experts_do_not_stay_dense_in_silence():
    """As transformers 5 saves them."""
    made = dict(model(EXPERTS)[1])
    block = f"{AT}mlp.experts."
    each = [{p: made.pop(f"{block}{e}.{p}_proj.weight") for p in (*PAIR, "down")} for e in range(EXPERTS)]
    made[f"{block}gate_up_proj"] = torch.stack([torch.cat([x["gate"], x["up"]]) for x in each])
    made[f"{block}down_proj"] = torch.stack([x["down"] for x in each])
    for to in ("rtp_llm", "same"):
        refused("experts.gate_up_proj .* would stay dense", count=EXPERTS, tensors=made, to=to)
    asked = Quant(SCHEMES["int8"], exclude=("*.experts.*",))
    state = fastckpt.reshard(made, layout="same", quant=asked, rank=0)
    assert state[f"{block}down_proj"].dtype == torch.float32


def test_a_recipe_without_a_place_for_scales_is_refused_by_the_layout_s_name():
    told, made = model()
    asked = Quant(SCHEMES["int8"], include=("lm_head.weight",))
    with pytest.raises(RecipeError, match=r"layout rtp_llm, which places what is quantised.*lm_head"):
        fastckpt.reshard(made, layout="rtp_llm", config=told, quant=asked)


def test_what_is_quantised_already_is_refused():
    refused("is int8: wanted float32", tensors=hub("int8"))


def test_a_tied_head_stays_dense():
    config, tensors = model()
    config = config | {"tie_word_embeddings": True}
    tied = {n: x for n, x in tensors.items() if n != "lm_head.weight"}
    shard = fastckpt.reshard(tied, layout="rtp_llm", config=config, quant="int8", rank=0)
    assert torch.equal(shard["rank_00_00_00.global.lm_head"], tied["model.embed_tokens.weight"])
    check(shard, wanted("int8", hub("int8"), 1, 0))


def test_matrices_that_are_tied():
    _, tensors = model()
    names = [f"{AT}self_attn.{p}_proj.weight" for p in "kv"]
    tied = tensors | dict.fromkeys(names, tensors[names[0]])
    refused(f"{names[1]} is tied to {names[0]}, and would not find its scales", tensors=tied)


def test_a_pattern_takes_away():
    config, tensors = model()
    quant = Quant(SCHEMES["int8"], exclude=("*.down_proj.weight",))
    shard = fastckpt.reshard(tensors, layout="rtp_llm", config=config, quant=quant, rank=0)
    at = "rank_00_00_00.layers.0.ffn_weights."
    down = tensors[f"{AT}mlp.down_proj.weight"]
    assert torch.equal(shard[f"{at}intermediate_weight2.kernel"], down.T)
    assert f"{at}intermediate_weight2.weight_only_quant_scale" not in shard
    assert shard[f"{at}intermediate_weight13.kernel"].dtype == torch.int8


def test_megatron_says_that_it_has_no_form():
    refused("megatron-core stores no quantised", to="megatron", quant="fp8")


def test_a_kept_plan_makes_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCKPT_CACHE", str(tmp_path / "cache"))
    config, tensors = model()
    fastckpt.reshard(tensors, config=config, out=tmp_path / "in")
    asked = dict(layout="rtp_llm", quant="gptq-group32", tp=2, overwrite=True)
    reports = [fastckpt.reshard(tmp_path / "in", out=tmp_path / "out", **asked) for _ in range(2)]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # and the dense one's
    first, second = reports
    assert (first.digests, first.errors) == (second.digests, second.errors)
    assert first.bytes_needed == second.bytes_needed
    other = fastckpt.reshard(tmp_path / "in", out=tmp_path / "out", **asked | {"quant": "gptq-group64"})
    assert other.digests != first.digests and len(list((tmp_path / "cache").iterdir())) == 3


# ---- an engine's names, and the way back ----

ENGINE = "vllm==0.32"


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-channel"])
def test_an_engine_has_more_beside(tmp_path, scheme):
    """What vLLM's sharded_state loader asks for where compressed-tensors quantised a model; seen by
    tests/engines/test_vllm_quantised.py."""
    config, tensors = model()
    config = config | {"dtype": "float32"}
    asked = layout("vllm", {"engine": ENGINE})
    plain = fastckpt.reshard(tensors, 2, layout="vllm", config=config, quant=scheme)
    fastckpt.reshard(tensors, 2, layout=asked, config=config, quant=scheme, out=tmp_path / "out")
    for r, want in enumerate(plain):
        got = load_file(tmp_path / "out" / f"model-rank-{r}-part-0.safetensors")
        at = f"{AT}self_attn.attn."
        more = {f"{at}_{x}_scale": torch.ones(()) for x in ("k", "q", "v", "prob")}
        more |= {f"{at}{x}_scale": torch.ones(1) for x in "qkv"}
        more |= {f"{at}{x}_zero_point": torch.zeros(1) for x in "qkv"}
        equal(got, want | more)
    assert fastckpt.verify(tmp_path / "out", engine=ENGINE).problems == ()
    back = fastckpt.reshard(tmp_path / "out", rank=0)
    equal(back, hub(scheme))


INT4 = ("int4-group32", "int4-group32-zero", "awq-group32", "gptq-group32")


@pytest.mark.parametrize("count", [0, EXPERTS])
@pytest.mark.parametrize("scheme", INT4)
@pytest.mark.parametrize("engine", [ENGINE, ""])
def test_vllms_four_bits_are_those_of_a_quantised_source(tmp_path, engine, scheme, count):
    """Quantised on the way to the ranks, or in files of the hub first; what vLLM holds of the latter:
    tests/engines/test_vllm_quantised.py."""
    config, tensors = model(count)
    config = config | {"dtype": "bfloat16"}
    placement = Placement(tp=2, ep=2 if count else 1)
    asked = layout("vllm", {"engine": engine} if engine else {})
    fastckpt.reshard(tensors, config=config, quant=scheme, out=tmp_path / "hub", dtype="bfloat16")
    want = fastckpt.reshard(tmp_path / "hub", placement=placement, layout=asked)
    given = dict(placement=placement, layout=asked, config=config, quant=scheme, dtype="bfloat16")
    got = fastckpt.reshard(tensors, **given)
    for mine, theirs in zip(got, want, strict=True):
        if not count and not engine:  # a rank's own sizes and groups, not the uncut matrix's
            mine, theirs = (
                {n: x for n, x in s.items() if not n.endswith(("shape", "g_idx"))} for s in (mine, theirs)
            )
        equal(mine, theirs)
    if engine:
        fastckpt.reshard(tensors, **given, out=tmp_path / "out")
        assert fastckpt.verify(tmp_path / "out", engine=ENGINE).problems == ()
        back = fastckpt.reshard(tmp_path / "out", rank=0)
        hub = load_file(tmp_path / "hub" / "model.safetensors")
        equal(back, {n: x.to(back[n].dtype) for n, x in hub.items() if not n.endswith("g_idx")})


@pytest.mark.parametrize("count", [0, EXPERTS])
def test_gptq_tells_vllm_which_modules_are_quantised(tmp_path, count):
    """By the hub's names, as vLLM's is_layer_gptq_quantized asks; experts are asked about otherwise."""
    config, tensors = model(count)
    out, asked = tmp_path / "out", layout("vllm", {"engine": ENGINE})
    fastckpt.reshard(tensors, config=config, quant="gptq-group32", out=tmp_path / "hub")
    dense = [n.removesuffix(".weight") for n in tensors if "_proj" in n and "experts" not in n]
    for given in (dict(quant="gptq-group32"), {}):
        source = tensors if given else tmp_path / "hub"
        told = dict(config=config) if given else {}
        fastckpt.reshard(source, 2, layout=asked, out=out, overwrite=True, **given, **told)
        said = json.loads((out / "config.json").read_text())["quantization_config"]
        assert said.pop("modules_in_block_to_quantize") == dense
        hub = json.loads((tmp_path / "hub" / "config.json").read_text())
        assert said == hub["quantization_config"]
    fastckpt.reshard(out, out=tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == hub


def test_rtp_llm_takes_int4_of_experts(tmp_path):
    config, tensors = model(EXPERTS)
    quant = Quant(SCHEMES["int4-group32"], exclude=("*self_attn*",))
    given = dict(placement=Placement(tp=2, ep=2), layout="rtp_llm", config=config, quant=quant)
    for r, shard in enumerate(fastckpt.reshard(tensors, **given)):
        at = f"rank_{r:02d}_00_{r:02d}.layers.0."
        moe, want = f"{at}partial_moe_weights.intermediate_weight", {}
        for end, names in (("", ("up", "gate")), ("2", ("down",))):
            each = [
                [
                    quant_oracle.quantised(tensors[f"{AT}mlp.experts.{e}.{n}_proj.weight"], "int4-group32")
                    for n in names
                ]
                for e in (2 * r, 2 * r + 1)
            ]
            want[f"{moe}{end}.kernel"] = torch.stack([torch.cat([v for v, _ in x]) for x in each])
            scales = torch.stack([torch.cat([s for _, s in x]) for x in each])
            want[f"{moe}{end}.weight_only_quant_scale"] = scales.bfloat16()
        equal({n: x for n, x in shard.items() if "moe_weights.intermediate" in n}, want)
        o = tensors[f"{AT}self_attn.o_proj.weight"].chunk(2, 1)[r].T
        assert torch.equal(shard[f"{at}self_attention_weights.attention_output_weight.kernel"], o)


def test_what_an_engine_has_of_others_is_refused():
    asked = layout("vllm", {"engine": ENGINE})
    refused(f"how engine {ENGINE} holds it is not known", to=asked, quant="int8-dynamic")
    refused("llama quantised by gptq with sym false is not known", to=asked, quant="gptq-group32-zero")
    config, tensors = model()
    source = hub("int8") | {}
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    carried = fastckpt.reshard(source, layout=asked, config=config | {"quantization_config": said}, rank=0)
    equal(carried, fastckpt.reshard(tensors, layout=asked, config=config, quant="int8", rank=0))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-channel", "awq-group32"])
def test_rtp_llm_is_read_back(tmp_path, scheme):
    config, tensors = model()
    fastckpt.reshard(tensors, 4, layout="rtp_llm", config=config, quant=scheme, out=tmp_path / "out")
    equal(fastckpt.reshard(tmp_path / "out", rank=0), hub(scheme))
