"""`rtp_llm` of quantised checkpoints: kernels, zeros, scales and smoothers, each cut in its units."""

from __future__ import annotations

import fastckpt
import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError, SourceError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families, quantised
from layouts.family_oracle import cut
from layouts.quantised import HEADS, KV, D
from reading import memory, same, shard

INT4 = ("awq", "gptq", "gptq-8")


def heads(t, at, leaf, tp, r, dim, size):
    """q, k and v of rank r as one, `size` elements a head along `dim`."""
    q = range(r * HEADS // tp, (r + 1) * HEADS // tp)
    kv = sorted({h * KV // HEADS for h in q})
    parts = [
        t[f"{at}{p}_proj.{leaf}"].narrow(dim, h * size, size)
        for p, hs in (("q", q), ("k", kv), ("v", kv))
        for h in hs
    ]
    return torch.cat(parts, dim)


def halves(t, at, names, leaf, dim, tp, r):
    return torch.cat([cut(t[f"{at}{n}_proj.{leaf}"], dim, tp, r) for n in names], dim)


def packed(t, at, tp, r, awq, each):
    """[in, out], as the hub has them."""
    a, m, out = at + "self_attn.", at + "mlp.", {}
    sizes = {"qweight": D // each if awq else D, "qzeros": D // each, "scales": D}
    for leaf, name in (("qweight", "kernel"), ("qzeros", "zero"), ("scales", "weight_only_quant_scale")):
        out[f"self_attention_weights.query_weight.{name}"] = heads(t, a, leaf, tp, r, 1, sizes[leaf])
        o = cut(t[f"{a}o_proj.{leaf}"], 0, tp, r)
        out[f"self_attention_weights.attention_output_weight.{name}"] = o
        if f"{m}up_proj.{leaf}" in t:
            out[f"ffn_weights.intermediate_weight13.{name}"] = halves(t, m, ("gate", "up"), leaf, 1, tp, r)
            out[f"ffn_weights.intermediate_weight2.{name}"] = cut(t[f"{m}down_proj.{leaf}"], 0, tp, r)
    return out


def rowwise(t, at, tp, r, scheme):
    """[out, in]: int8 and fp8."""
    a, m, out = at + "self_attn.", at + "mlp.", {}
    to = "self_attention_weights.query_weight."
    out[to + "kernel"] = heads(t, a, "weight", tp, r, 0, D)
    to_o = "self_attention_weights.attention_output_weight."
    out[to_o + "kernel"] = cut(t[a + "o_proj.weight"], 1, tp, r)
    scale = "weight_only_quant_scale"
    flat = scheme.startswith(("int8", "smooth"))

    def vector(x):
        return x.flatten() if flat else x

    dense = m + "up_proj.weight" in t
    if dense:
        out["ffn_weights.intermediate_weight13.kernel"] = halves(t, m, ("gate", "up"), "weight", 0, tp, r)
        out["ffn_weights.intermediate_weight2.kernel"] = cut(t[m + "down_proj.weight"], 1, tp, r)
    out |= statics(t, at, scheme)
    if scheme.startswith(("fp8-tensor", "fp8-static")):
        out[to + scale] = torch.stack([t[f"{a}{p}_proj.weight_scale"].reshape(()) for p in "qkv"])
        out[to_o + scale] = t[a + "o_proj.weight_scale"]
        if dense:
            both = [t[f"{m}{p}_proj.weight_scale"].reshape(()) for p in ("gate", "up")]
            out["ffn_weights.intermediate_weight13." + scale] = torch.stack(both)
            out["ffn_weights.intermediate_weight2." + scale] = t[m + "down_proj.weight_scale"]
        return out
    qkv = vector(heads(t, a, "weight_scale", tp, r, 0, D))
    out[to + scale] = qkv[None] if flat and tp > 1 else qkv
    out[to_o + scale] = vector(t[a + "o_proj.weight_scale"])
    if dense:
        pair = halves(t, m, ("gate", "up"), "weight_scale", 0, tp, r)
        out["ffn_weights.intermediate_weight13." + scale] = vector(pair)
        out["ffn_weights.intermediate_weight2." + scale] = vector(t[m + "down_proj.weight_scale"])
    if scheme == "smooth":
        out[to + "smoother"] = cut(t[a + "q_proj.smoother"], 0, tp, r)
        for leaf in ("smoother", "shift"):
            out[to_o + leaf] = cut(t[f"{a}o_proj.{leaf}"], 0, tp, r)
        if dense:
            out["ffn_weights.intermediate_weight2.smoother"] = cut(t[m + "down_proj.smoother"], 0, tp, r)
    return out


def statics(t, at, scheme):
    """Scales of inputs: the engine's names say which is the reciprocal, and not all of them alike."""
    a, m, x = at + "self_attn.", at + "mlp.", "static_quant"
    if "static" not in scheme:
        return {}
    qkv = torch.cat([t[f"{a}{p}_proj.input_scale"].reshape(1) for p in "qkv"])
    o = t[a + "o_proj.input_scale"].reshape(1)
    to = "self_attention_weights.attention_output_weight." + x
    out = {f"pre_layernorm_weights.{x}": 1 / qkv, f"pre_layernorm_weights.{x}_reciprocal": qkv}
    out |= (
        {to: 1 / o, to + "_reciprocal": o} if scheme == "int8-static" else {to: o, to + "_reciprocal": 1 / o}
    )
    if m + "up_proj.weight" in t:
        pair, down = (t[f"{m}{p}_proj.input_scale"].reshape(1) for p in ("gate", "down"))
        out |= {f"post_layernorm_weights.{x}": 1 / pair, f"post_layernorm_weights.{x}_reciprocal": pair}
        first = 1 / down if scheme == "int8-static" else down  # of fp8 both are the scale itself
        out |= {f"ffn_weights.intermediate_weight2.{x}": first}
        out |= {f"ffn_weights.intermediate_weight2.{x}_reciprocal": down}
    return out


def scalars(t, at, count, ep, r):
    """fp8 experts with a scale a matrix: (up, gate) of each of the rank's, and of their inputs."""
    mine = range(r % ep * (count // ep), (r % ep + 1) * (count // ep))

    def of(leaf, *names):
        return torch.stack(
            [torch.cat([t[f"{at}mlp.experts.{e}.{p}_proj.{leaf}"].reshape(1) for p in names]) for e in mine]
        )

    moe, scale, x = (
        "partial_moe_weights.intermediate_weight",
        ".weight_only_quant_scale",
        "_activation.static_quant",
    )
    out = {moe + scale: of("weight_scale", "up", "gate"), f"{moe}2{scale}": of("weight_scale", "down")[:, 0]}
    if f"{at}mlp.experts.0.up_proj.input_scale" in t:
        for k, x_in in (("1", of("input_scale", "up", "gate")), ("2", of("input_scale", "down")[:, 0])):
            out |= {f"moe_w{k}{x}": 1 / x_in, f"moe_w{k}{x}_reciprocal": x_in}
    return out


def experts(t, at, scheme, count, tp, ep, r):
    """[experts, (up; gate), in] and [experts, out, in], whatever the scheme."""
    moe_tp, place = (tp // ep, r // ep) if ep > 1 else (tp, r)
    mine = range(r % ep * (count // ep), (r % ep + 1) * (count // ep))
    kinds = {"weight": "kernel", "weight_scale": "weight_only_quant_scale"}
    a_matrix = scheme.startswith(("fp8-tensor", "fp8-static"))
    if a_matrix:
        kinds = {"weight": "kernel"}
    if scheme in INT4:
        kinds = {"qweight": "kernel", "qzeros": "zero", "scales": "weight_only_quant_scale"}
    out = {}
    for leaf, name in kinds.items():
        pairs, downs = [], []
        for e in mine:
            gate, up, down = (t[f"{at}mlp.experts.{e}.{p}_proj.{leaf}"] for p in ("gate", "up", "down"))
            if scheme in INT4:
                gate, up, down = gate.t(), up.t(), down.t()
            pair = torch.cat([cut(x, 0, moe_tp, place) for x in (up, gate)])
            down = down if leaf == "weight_scale" else cut(down, 1, moe_tp, place)
            flat = scheme == "int8" and leaf == "weight_scale"
            pairs.append(pair.flatten() if flat else pair)
            downs.append(down.flatten() if flat else down)
        out[f"partial_moe_weights.intermediate_weight.{name}"] = torch.stack(pairs)
        out[f"partial_moe_weights.intermediate_weight2.{name}"] = torch.stack(downs)
    return out | scalars(t, at, count, ep, r) if a_matrix else out


def wanted(t, scheme, tp, r):
    at = "model.layers.0."
    return (
        packed(t, at, tp, r, scheme == "awq", 4 if scheme == "gptq-8" else 8)
        if scheme in INT4
        else rowwise(t, at, tp, r, scheme)
    )


def model_of(scheme, count=0, **changes):
    config, t = quantised.made(scheme, count)
    config = config | changes
    return recipes.find(config)(memory(t, 2), config), t


def check(model, placement, want, ep=1):
    got = shard(layout("rtp_llm").targets(model, placement))
    at = f"rank_{placement.tp_rank:02d}_00_{placement.rank % ep:02d}.layers.0."
    same({n: got[n] for n in got if any(x in n for x in ("query", "output", "intermediate", "static"))},
         {at + n: x for n, x in want.items()})  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("scheme", list(quantised.CONFIGS))
def test_dense(scheme, tp):
    model, t = model_of(scheme)
    for p in Placement(tp=tp).ranks():
        check(model, p, wanted(t, scheme, tp, p.rank))


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize(
    "scheme", ["awq", "gptq", "int8", "fp8-channel", "fp8-tensor", "fp8-static", "fp8-static-1"]
)
def test_experts(scheme, tp, ep):
    model, t = model_of(scheme, 4)
    for p in Placement(tp=tp, ep=ep).ranks():
        moe = experts(t, "model.layers.0.", scheme, 4, tp, ep, p.rank)
        check(model, p, wanted(t, scheme, tp, p.rank) | moe, ep)


def once(t, names, rows):
    """fp8 matrices cut to rows, as if all had had the largest of their scales: (values, that scale)."""
    scales = [t[n + "weight_scale"].float().reshape(()) for n in names]
    most = torch.stack(scales).max()
    dense = torch.cat([t[n + "weight"].float()[k] * s for n, s, k in zip(names, scales, rows, strict=True)])
    return (dense / most).to(torch.float8_e4m3fn), most


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("scheme", ["fp8-tensor", "fp8-static-1"])
def test_one_scale_of_what_is_joined(scheme, tp, ep):
    """As the engine has them once loaded: q, k and v with one scale, an expert's up and gate with one."""
    model, t = model_of(scheme, 4)
    at, a = "model.layers.0.", "model.layers.0.self_attn."
    for p in Placement(tp=tp, ep=ep).ranks():
        got = shard(layout("rtp_llm", {"one_scale": "true"}).targets(model, p))
        to, r = f"rank_{p.rank:02d}_00_{p.rank % ep:02d}.layers.0.", p.rank
        q = slice(r * HEADS * D // tp, (r + 1) * HEADS * D // tp)
        kv = slice(r * KV * D // tp, (r + 1) * KV * D // tp)
        query, moe = (
            to + "self_attention_weights.query_weight.",
            to + "partial_moe_weights.intermediate_weight",
        )
        want = {}
        want[query + "kernel"], want[query + "weight_only_quant_scale"] = once(
            t, [f"{a}{x}_proj." for x in "qkv"], [q, kv, kv]
        )
        width, (moe_tp, place) = quantised.WIDTH, (tp // ep, r // ep) if ep > 1 else (tp, r)
        part = slice(place * width // moe_tp, (place + 1) * width // moe_tp)
        mine = range(r % ep * (4 // ep), (r % ep + 1) * (4 // ep))
        names = [[f"{at}mlp.experts.{e}.{x}_proj." for x in ("up", "gate")] for e in mine]
        pairs = [once(t, both, [part, part]) for both in names]
        want[moe + ".kernel"] = torch.stack([x for x, _ in pairs])
        want[moe + ".weight_only_quant_scale"] = torch.stack([s for _, s in pairs])
        if "static" in scheme:
            inputs = torch.stack([t[f"{a}{x}_proj.input_scale"] for x in "qkv"]).max()
            own = torch.stack([t[n + "input_scale"] for both in names for n in both]).max()
            for name, x in (("pre_layernorm_weights", inputs), ("moe_w1_activation", own)):
                want |= {f"{to}{name}.static_quant_reciprocal": x, f"{to}{name}.static_quant": 1 / x}
        same({n: got[n] for n in want}, want)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("scheme", [*quantised.CONFIGS, *quantised.PACKED])
def test_the_hub_gets_back_what_it_has(scheme, count):
    model, t = model_of(scheme, count)
    same(shard(layout("hf").targets(model, Placement())), t)


@pytest.mark.parametrize("scheme", ["awq", "gptq", "fp8-channel", "fp8-tensor-1"])
def test_vllm_has_one_scale_for_each_of_what_it_joins(scheme):
    model, t = model_of(scheme)
    at, a = "model.layers.0.", "model.layers.0.self_attn."
    got = shard(layout("vllm").targets(model, Placement(tp=2, rank=1)))
    want = {}
    if scheme == "awq":
        for leaf, size in (("qweight", 2), ("qzeros", 2), ("scales", 16)):
            want[f"{a}qkv_proj.{leaf}"] = heads(t, a, leaf, 2, 1, 1, size)
            want[f"{at}mlp.down_proj.{leaf}"] = cut(t[f"{at}mlp.down_proj.{leaf}"], 0, 2, 1)
    elif scheme == "gptq":
        want[f"{a}qkv_proj.qweight"] = heads(t, a, "qweight", 2, 1, 1, D)
        want[f"{a}qkv_proj.g_idx"] = t[f"{a}q_proj.g_idx"]
        want[f"{a}o_proj.g_idx"] = cut(t[f"{a}o_proj.g_idx"], 0, 2, 1)
    elif scheme == "fp8-channel":
        want[f"{a}qkv_proj.weight_scale"] = heads(t, a, "weight_scale", 2, 1, 0, D)
        want[f"{a}o_proj.weight_scale"] = t[f"{a}o_proj.weight_scale"]
    else:
        want[f"{a}qkv_proj.weight_scale"] = torch.cat([t[f"{a}{p}_proj.weight_scale"] for p in "qkv"])
    same({n: got[n] for n in want}, want)


# ---- what is refused ----


def test_scales_of_inputs_with_no_name_are_refused():
    config, t = quantised.made("fp8-channel")
    more = {n.replace("weight_scale", "input_scale"): torch.ones(()) for n in t if "weight_scale" in n}
    model = recipes.find(config)(memory(t | more), config)
    same(shard(layout("hf").targets(model, Placement())), t | more)
    with pytest.raises(
        LayoutError, match=r"no name for model.*q_proj\.input_scale, beside attn_qkv_w stored as"
    ):
        list(layout("rtp_llm").targets(model, Placement()))
    with pytest.raises(LayoutError, match=r"no name for .*gate_proj\.input_scale, beside ffn_1w"):
        list(layout("rtp_llm", {"w13": "false"}).targets(model_of("fp8-static")[0], Placement()))
    with pytest.raises(LayoutError, match=r"no place for .*up_proj\.input_scale"):
        list(layout("rtp_llm").targets(model_of("int8-static", 2)[0], Placement()))


OTHERWISE = [
    ("deepseek_v3", "row", (), {}, r"latent attention's .*q_b_proj is neither plain nor fp8 by blocks"),
    ("deepseek_v2", 128, (), {}, r"no place for the scales of .*0\.self_attn\.q_proj"),
    ("deepseek_v3", 128, (), {"split_rope": "true"}, r"split_rope would tear the blocks of .*q_b_proj"),
    ("qwen3_next", "row", (), {}, r"no place for .*in_proj_ba\.weight_scale"),
    ("qwen3_next", "int8", (), {}, r"no place for linear attention like .*in_proj_qkvz: wanted plain"),
    ("qwen3_next", "int8", ("linear_attn",), {}, r"no place for an output gate like .*q_proj: wanted plain"),
    ("ministral", 32, (), {}, r"q_proj is float8_e4m3fn with a scale for \(32, 32\) outputs"),
    ("qwen3_moe", "row", (".experts.1.",), {}, r"experts\.0\.up_proj: experts are stored unlike"),
]


@pytest.mark.parametrize(("name", "block", "keep", "options", "message"), OTHERWISE)
def test_forms_the_engine_does_not_have(name, block, keep, options, message):
    model = families.blank(name, lambda hub: quantised.bytes_of(hub, block, keep))
    with pytest.raises(LayoutError, match=message):
        list(layout("rtp_llm", options).targets(model, Placement()))


def test_heads_that_share_packed_values():
    model = model_of("awq", head_dim=4, num_attention_heads=32, num_key_value_heads=16)[0]
    with pytest.raises(LayoutError, match=r"heads of 4 of .*q_proj do not begin with one of its 8 packed"):
        list(layout("rtp_llm").targets(model, Placement(tp=2)))


@pytest.mark.parametrize("served", ["vllm", "rtp_llm", "megatron"])
@pytest.mark.parametrize("scheme", ["awq", "fp8-channel", "fp8-tensor", "int4"])
def test_what_is_joined_is_quantised_alike(scheme, served):
    """A k that a release left dense."""
    config, t = quantised.made(scheme)
    k = "model.layers.0.self_attn.k_proj."
    t = {n: x for n, x in t.items() if not n.startswith(k)} | {
        k + "weight": torch.zeros(KV * D, quantised.HIDDEN)
    }
    model = recipes.find(config)(memory(t), config)
    with pytest.raises(LayoutError, match=r"k_proj is not quantised as .*q_proj is"):
        list(layout(served).targets(model, Placement()))


def test_what_reads_one_input_must_agree():
    for scheme, leaf in (("fp8-static", "mlp.up_proj.input_scale"), ("smooth", "self_attn.v_proj.smoother")):
        config, t = quantised.made(scheme)
        name = "model.layers.0." + leaf
        model = recipes.find(config)(memory(t | {name: t[name] + 1}), config)
        with pytest.raises(SourceError, match="differs among those that read one input"):
            shard(layout("rtp_llm").targets(model, Placement()))


def test_no_reciprocal_of_nothing():
    config, t = quantised.made("fp8-static")
    name = "model.layers.0.self_attn.o_proj.input_scale"
    model = recipes.find(config)(memory(t | {name: torch.zeros(())}), config)
    with pytest.raises(SourceError, match=r"o_proj\.input_scale: 0 has no reciprocal"):
        shard(layout("rtp_llm").targets(model, Placement()))


def test_groups_that_ranks_would_share_are_refused():
    said = quantised.CONFIGS["awq"] | {"group_size": 32}
    config, t = quantised.made("awq")
    t = {n: x[::2] if n.endswith(("qzeros", "scales")) else x for n, x in t.items()}
    config = config | {"quantization_config": said}
    model = recipes.find(config)(memory(t), config)
    for served in ("rtp_llm", "vllm", "hf"):
        with pytest.raises(
            LayoutError, match=r"o_proj.*(axis 1, which tp 8 does not cut|cuts a block of 32)"
        ):
            list(
                layout(served, {"replicate_kv": "true"} if served == "hf" else {}).targets(
                    model, Placement(tp=8)
                )
            )


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_zero_points_of_another_form_are_refused(key):
    """The engine adds 1 to each, as GPTQ's first form wants it."""
    config, t = quantised.made("gptq")
    said = config["quantization_config"]
    for form in ("gptq", "gptq_v2"):
        told = config | {"quantization_config": said | {key: form}}
        model = recipes.model(recipes.find(told), memory(t), told, None)
        assert list(layout("hf").targets(model, Placement()))
        if form == "gptq":
            assert list(layout("rtp_llm").targets(model, Placement()))
            continue
        with pytest.raises(LayoutError, match=r"layout rtp_llm has no place for .* \(gptq_v2\)"):
            layout("rtp_llm").targets(model, Placement())


@pytest.mark.parametrize("leaf", ["weight_scale", "weight"])
def test_elements_that_engines_would_take_for_others_are_refused(leaf):
    """vLLM's loader copies an exponent's byte as a number, and casts e5m2 to e4m3fn."""
    config, t = quantised.made("fp8-channel")
    name = f"model.layers.0.self_attn.o_proj.{leaf}"
    other = t[name].float().to(torch.uint8 if leaf == "weight_scale" else torch.float8_e5m2)
    with pytest.raises(RecipeError, match=rf"{leaf}\b.*got (uint8, wanted floats|float8_e5m2)"):
        recipes.find(config)(memory(t | {name: other}), config)


NOT_READ = [
    {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
    {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"},
    {"quant_method": "awq", "bits": 4, "group_size": 16, "format": "gemv"},
    {"quant_method": "awq", "bits": 3, "group_size": 16},
    {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq", "format": "gptq_v2"},
    {"quant_method": "bitsandbytes"},
    {"quant_method": "compressed-tensors", "config_groups": {}},
    quantised.integers() | {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {}}},
    {"quant_method": "fp8", "weight_block_size": [128]},
    quantised.compressed("float", "channel", num_bits=4),
    quantised.compressed("int", "channel", symmetric=False),
    quantised.compressed("float", "group", group_size=32),
    quantised.compressed("float", "group", num_bits=4, group_size=16) | {"format": "mxfp4-pack-quantized"},
]


@pytest.mark.parametrize("said", NOT_READ)
def test_other_forms_are_refused(said):
    config, t = quantised.made("awq")
    with pytest.raises(RecipeError, match=r"is not read; read are fp8"):
        recipes.find(config)(memory(t), config | {"quantization_config": said})


def test_values_that_do_not_fill_their_integers():
    config, t = quantised.made("awq")
    with pytest.raises(RecipeError, match=r"intermediate_size 100 is no multiple of the 8 values .* packed"):
        recipes.find(config)(memory(t), config | {"intermediate_size": 100})


@pytest.mark.parametrize(
    ("block", "message"),
    [("all", "a fused matrix with one scale for all of it is not read"),
     (48, "a part of 64 rows from 0 on does not end with blocks of 48")],
)  # fmt: skip
def test_fused_matrices_whose_scales_cannot_be_taken_apart(block, message):
    with pytest.raises(RecipeError, match=rf"layers\.0\.self_attn\.qkv_proj: {message}"):
        list(
            layout("hf").targets(
                families.blank("phi3", lambda hub: quantised.bytes_of(hub, block)), Placement()
            )
        )


def test_a_missing_scale_is_refused():
    config, t = quantised.made("fp8-channel")
    t = {n: x for n, x in t.items() if not n.endswith("q_proj.weight_scale")}
    with pytest.raises(
        RecipeError, match=r"q_proj\.weight is float8_e4m3fn, and has no weight_scale beside it"
    ):
        recipes.find(config)(memory(t), config)
    config, t = quantised.made("awq")
    t = {n: x for n, x in t.items() if not n.endswith("q_proj.qzeros")}
    with pytest.raises(RecipeError, match=r"needs model\.layers\.0\.self_attn\.q_proj\.weight"):
        recipes.find(config)(memory(t), config)


def test_scales_of_another_size_are_refused():
    config, t = quantised.made("int8")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    with pytest.raises(RecipeError, match=r"up_proj.weight_scale: got shape \(64, 1\), wanted \(128, 1\)"):
        recipes.find(config)(memory(t | {name: t[name][:64]}), config)


@pytest.mark.parametrize("scheme", ["smooth", "fp8-channel", "fp8-tensor", "fp8-tensor-1"])
@pytest.mark.parametrize("experts", [0, 4])
def test_factors_of_bytes_are_float32(scheme, experts):
    """Whatever the hub stores (llm-compressor writes bfloat16): the engine's loader makes them so."""
    if experts and scheme == "smooth":
        pytest.skip("experts have no smoothers")
    config, hub = quantised.made(scheme, experts)
    narrow = {n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in hub.items()}
    wide = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in narrow.items()}
    ranks = (fastckpt.reshard(t, 2, layout="rtp_llm", config=config) for t in (narrow, wide))
    for got, want in zip(*ranks, strict=True):
        assert got.keys() == want.keys()
        assert all(got[n].dtype == t.dtype and torch.equal(got[n], t) for n, t in want.items())
