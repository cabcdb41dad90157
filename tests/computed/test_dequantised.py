"""quant="none": quantised checkpoints as dense ones, bit for bit torch's (q - zero) * scale."""

from __future__ import annotations

import json

import fastckpt
import pytest
import quant_oracle
import torch
from fastckpt.cli import main
from fastckpt.errors import LayoutError, SourceError
from fastckpt.executors import pick
from fastckpt.reader import Positioned
from fastckpt.running import runs
from fastckpt.running.computing import Computing
from quant_oracle import E2M1, GROUPS
from quantisation.test_quant_road import linear, model
from reading import equal
from safetensors.torch import load_file, save_file

PLAIN = ("int8", "fp8", "fp8-channel", "fp8-block", "int4-group32", "mxfp4", "mxfp8")
SCHEMES = (*PLAIN, "int8-dynamic", "int4-group-zero", "awq-group32", "gptq-group", "gptq-group64-zero")


def by_group(values, scales, zeros, n):
    each = (t.repeat_interleave(n, 1) for t in (scales, zeros))
    return next(each) * (values - next(each))


def dense(x, scheme):
    """A matrix quantised and dequantised in plain torch, fp32."""
    if scheme in GROUPS:
        return by_group(*quant_oracle.grouped(x, scheme), GROUPS[scheme][1])
    values, scales = quant_oracle.quantised(x, scheme)
    down, across = quant_oracle.BLOCKS[scheme]
    rows, columns = x.shape
    each = scales.repeat_interleave(down or rows, 0).repeat_interleave(across or columns, 1)[:rows, :columns]
    if scheme.startswith("int4"):
        return (quant_oracle.nibbles(values).flatten(1).float() - 8) * each
    if scheme == "mxfp4":
        return quant_oracle.pairs(values) * each
    return values.float() * each


def source(tmp_path, scheme, family="llama"):
    """A quantised hub checkpoint, and the dense tensors it means in fp32."""
    config, tensors = model(family)
    fastckpt.reshard(tensors, config=config, quant=scheme, out=tmp_path / "in")

    want = {n: dense(t, scheme) if linear(n) else t for n, t in tensors.items()}
    return dict(config), want


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dense_again_at_any_cut(tmp_path, scheme):
    config, want = source(tmp_path, scheme)
    for layout, tp in (("hf", 2), ("vllm", 2), ("rtp_llm", 2), ("megatron", 1)):
        got = fastckpt.reshard(tmp_path / "in", tp, layout=layout, quant="none", dtype="float32")
        oracle = fastckpt.reshard(want, tp, layout=layout, config=config)
        for a, b in zip(got, oracle, strict=True):
            equal(a, b)


@pytest.mark.parametrize("scheme", ["fp8-block", "awq-group32", "gptq-group64-zero"])
def test_files_in_sixteen_bits(tmp_path, scheme):
    config, want = source(tmp_path, scheme, "mixtral")
    report = fastckpt.reshard(
        tmp_path / "in", quant="none", dtype="bfloat16", out=tmp_path / "out", threads=2
    )
    assert fastckpt.verify(tmp_path / "out").ok
    equal(load_file(tmp_path / "out" / "model.safetensors"), {n: t.bfloat16() for n, t in want.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert report.bytes_read < sum(4 * t.numel() for t in want.values())
    assert report.bytes_needed is None  # a scale serves many values
    again = fastckpt.open(tmp_path / "out")
    assert set(again) == set(want)


def test_the_dtype_is_the_configs_or_bfloat16(tmp_path):
    _, want = source(tmp_path, "int8")
    made = fastckpt.reshard(tmp_path / "in", quant="none", rank=0)
    equal(made, {n: t.bfloat16() if linear(n) else t for n, t in want.items()})
    told = json.loads((tmp_path / "in" / "config.json").read_text()) | {"dtype": "float16"}
    made = fastckpt.reshard(tmp_path / "in", quant="none", rank=0, config=told)
    equal(made, {n: t.half() if linear(n) else t for n, t in want.items()})


def test_small_bands_and_reading_by_position(tmp_path, monkeypatch):
    config, want = source(tmp_path, "int4-group32")
    monkeypatch.setattr(
        runs, "reader_of", lambda e, b, **_: Computing(e, b, lambda places: Positioned(places))
    )
    monkeypatch.setattr(runs, "pick", lambda *_: pick("torch"))
    got = fastckpt.reshard(tmp_path / "in", 2, layout="rtp_llm", quant="none", dtype="float32", rank=1)
    equal(got, fastckpt.reshard(want, 2, layout="rtp_llm", config=config, rank=1))


def test_blocks_that_the_edge_cuts_and_reordered_inputs():
    torch.manual_seed(2)
    weight = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    state = {"a.weight": weight, "a.weight_scale_inv": scale, "b.bias": torch.randn(3)}
    (got,) = fastckpt.reshard(state, layout="same", quant="none", dtype="float32")
    equal(got, {"a.weight": weight.float() * each, "b.bias": state["b.bias"]})
    q = torch.randint(0, 16, (96, 64))
    zeros, scales = torch.randint(0, 16, (3, 64)), torch.rand(3, 64).half()
    group = torch.randperm(96) % 3
    eight = lambda t: sum(t[:, k::8].int() << (4 * k) for k in range(8)).int()  # noqa: E731
    state = {
        "c.qweight": sum(q[k::8].int() << (4 * k) for k in range(8)).int(),
        "c.qzeros": eight((zeros - 1) & 15),
        "c.scales": scales,
        "c.g_idx": group.int(),
    }
    want = ((q - zeros[group]).float() * scales.float()[group]).T
    (got,) = fastckpt.reshard(state, layout="same", quant="none", dtype="float32")
    equal(got, {"c.weight": want})


@pytest.mark.parametrize("inputs", [96, 80, 72])
def test_a_last_group_may_be_short(tmp_path, inputs):
    """GPTQ without g_idx: the group size is the config's, also where equal groups would come to as many."""
    torch.manual_seed(8)
    q, zeros = torch.randint(0, 16, (inputs, 24)), torch.randint(1, 16, (2, 24))
    scales = torch.rand(2, 24).half()
    state = {
        "c.qweight": sum(q[k::8].int() << (4 * k) for k in range(8)).int(),
        "c.qzeros": sum((zeros - 1)[:, k::8].int() << (4 * k) for k in range(8)).int(),
        "c.scales": scales,
    }
    group = torch.arange(inputs) // 64
    want = ((q - zeros[group]).float() * scales.float()[group]).T
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}
    (got,) = fastckpt.reshard(state, layout="same", quant="none", dtype="float32", config=config)
    equal(got, {"c.weight": want})
    (got,) = fastckpt.reshard(
        state | {"c.g_idx": group.int()}, layout="same", quant="none", dtype="float32", config=config
    )
    equal(got, {"c.weight": want})
    config["quantization_config"]["format"] = "gptq_v2"  # zero points are stored as they are
    state["c.qzeros"] = sum(zeros[:, k::8].int() << (4 * k) for k in range(8)).int()
    (got,) = fastckpt.reshard(state, layout="same", quant="none", dtype="float32", config=config)
    equal(got, {"c.weight": want})
    within = {"text_config": config, "model_type": "x"}  # as Kimi K2.5's hub says it
    (got,) = fastckpt.reshard(state, layout="same", quant="none", dtype="float32", config=within)
    equal(got, {"c.weight": want})
    fastckpt.reshard(state, layout="same", quant="none", config=within, out=tmp_path / "out", durable=False)
    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"] == {}


def test_blocks_that_are_not_square():
    torch.manual_seed(9)
    values, scales = torch.randn(96, 100).to(torch.float8_e4m3fn), torch.rand(3, 2)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 64]}}
    state = {"a.weight": values, "a.weight_scale_inv": scales}
    (got,) = fastckpt.reshard(state, layout="same", quant="none", dtype="float32", config=config)
    wide = scales.repeat_interleave(32, 0).repeat_interleave(64, 1)[:, :100]
    equal(got, {"a.weight": values.float() * wide})


def test_recurrent_weights_and_scales_of_inputs():
    torch.manual_seed(6)
    model = torch.nn.LSTM(24, 16)
    (made,) = fastckpt.reshard(model.state_dict(), layout="same", quant="int8-dynamic-channel")
    (got,) = fastckpt.reshard(
        made | {"input_scale": torch.ones(1)}, layout="same", quant="none", dtype="float32"
    )
    assert torch.equal(got.pop("input_scale"), torch.ones(1))  # of no quantised matrix
    want = {n: dense(t, "int8-dynamic-channel") if t.ndim == 2 else t for n, t in model.state_dict().items()}
    equal(got, want)
    state = {"a.weight": torch.ones(2, 2, dtype=torch.int8), "a.weight_scale": torch.ones(1)}
    for leaf in ("input_scale", "activation_scale"):
        (got,) = fastckpt.reshard(state | {f"a.{leaf}": torch.ones(1)}, layout="same", quant="none")
        assert set(got) == {"a.weight"}
    (got,) = fastckpt.reshard(  # Ministral 3's own: one scale a matrix, under the name of blocks'
        {"a.weight": state["a.weight"], "a.weight_scale_inv": torch.tensor(3.0)}, layout="same", quant="none"
    )
    assert torch.equal(got["a.weight"], torch.full((2, 2), 3.0).bfloat16())


def test_compressed_tensors_of_other_kinds():
    """int8 with zero points, groups of int8, eight bits packed, bfloat16 scales."""
    torch.manual_seed(4)
    values = torch.randint(-128, 128, (24, 64)).to(torch.int8)
    scale, zero = torch.rand(24, 1).bfloat16(), torch.randint(-9, 9, (24, 1)).to(torch.int8)
    state = {"a.weight": values, "a.weight_scale": scale, "a.weight_zero_point": zero}
    (got,) = fastckpt.reshard(state, layout="same", quant="none")
    equal(got, {"a.weight": ((values.float() - zero.float()) * scale.float()).bfloat16()})
    groups = torch.rand(24, 2)
    (got,) = fastckpt.reshard(
        {"a.weight": values, "a.weight_scale": groups}, layout="same", quant="none", dtype="float16"
    )
    equal(got, {"a.weight": (values.float() * groups.repeat_interleave(32, 1)).half()})
    said = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": 32}}},
    }
    words = sum((values[:, k::4].int() + 128) << (8 * k) for k in range(4)).int()
    packed = {"a.weight_packed": words, "a.weight_scale": groups, "a.weight_shape": torch.tensor([24, 64])}
    config = {"quantization_config": said}
    (got,) = fastckpt.reshard(packed, layout="same", quant="none", dtype="float32", config=config)
    equal(got, {"a.weight": values.float() * groups.repeat_interleave(32, 1)})
    with pytest.raises(SourceError, match="stored shape"):
        fastckpt.reshard(
            packed | {"a.weight_shape": torch.tensor([24, 60])}, layout="same", quant="none", config=config
        )


def test_compressed_tensors_of_microscaled_floats():
    """mxfp4 and nvfp4, two e2m1 a byte, and mxfp8: scales are exponents, or e4m3 below one number."""
    torch.manual_seed(5)
    codes = torch.randint(0, 16, (24, 96)).to(torch.uint8)
    pairs, means = codes[:, ::2] | codes[:, 1::2] << 4, E2M1[codes.long()]
    exponents = torch.randint(0, 200, (24, 3)).to(torch.uint8)
    factors = (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    state = {"a.weight_packed": pairs, "a.weight_scale": exponents}
    (got,) = fastckpt.reshard(state, layout="same", quant="none", dtype="float32")
    equal(got, {"a.weight": means * factors})
    eight = torch.randn(24, 96).to(torch.float8_e4m3fn)
    state = {"a.weight": eight, "a.weight_scale": exponents}
    (got,) = fastckpt.reshard(state, layout="same", quant="none", dtype="bfloat16")
    equal(got, {"a.weight": (eight.float() * factors).bfloat16()})
    scales, whole = torch.rand(24, 6).mul(400).to(torch.float8_e4m3fn), torch.tensor([917.3])
    state = {
        "a.weight_packed": pairs, "a.weight_scale": scales, "a.weight_global_scale": whole,
        "a.input_global_scale": torch.ones(1),
    }  # fmt: skip
    (got,) = fastckpt.reshard(state, layout="same", quant="none")
    equal(got, {"a.weight": (means * (scales.float() / whole).repeat_interleave(16, 1)).bfloat16()})


MODELOPT = {
    "quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.47.0"},
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
}  # fmt: skip


@pytest.mark.parametrize("each", [16, 32])
def test_modelopt(tmp_path, each):
    """As NVIDIA ModelOpt 0.47 exports nvfp4, fp8 and mxfp8, with its scales of inputs and of a cache."""
    torch.manual_seed(6)
    codes = torch.randint(0, 16, (256, 192)).to(torch.uint8)
    pairs, means = codes[:, ::2] | codes[:, 1::2] << 4, E2M1[codes.long()]
    scales, second = torch.rand(256, 192 // each).mul(400).to(torch.float8_e4m3fn), torch.tensor(0.00137)
    eight = torch.randn(256, 192).to(torch.float8_e4m3fn)
    blocks, exponents = torch.rand(2, 1, 2, 1), torch.randint(120, 134, (256, 6)).to(torch.uint8)
    state = {
        "four.weight": pairs, "four.weight_scale": scales, "four.weight_scale_2": second,
        "four.input_scale": torch.tensor(3.0), "k_proj.weight": eight, "k_proj.weight_scale": second,
        "k_proj.k_scale": torch.tensor(1.0), "row.weight": eight, "row.weight_scale": torch.rand(256),
        "blocks.weight": eight, "blocks.weight_scale": blocks, "exponents.weight": eight,
        "exponents.weight_scale": exponents, "micro.weight": pairs, "micro.weight_scale": exponents,
        "norm.weight": torch.rand(5),
    }  # fmt: skip
    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": MODELOPT, "dtype": "float16"}))
    (tmp_path / "hf_quant_config.json").write_text("{}")
    fastckpt.reshard(tmp_path, layout="same", quant="none", out=tmp_path / "out")
    wide = blocks[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :192]
    powers = (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    want = {
        "four.weight": means * (scales.float() * second).repeat_interleave(each, 1),
        "k_proj.weight": eight.float() * second,
        "row.weight": eight.float() * state["row.weight_scale"][:, None],
        "blocks.weight": eight.float() * wide, "exponents.weight": eight.float() * powers,
        "micro.weight": means * powers,
    }  # fmt: skip
    got = load_file(tmp_path / "out/model.safetensors")
    equal(got, {n: w.half() for n, w in want.items()} | {"norm.weight": state["norm.weight"]})
    assert not (tmp_path / "out/hf_quant_config.json").exists()
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"dtype": "float16"}


def test_modelopts_own_tensors(tmp_path):
    """What it exports of a Llama, against what it says itself that its bytes mean."""
    pytest.importorskip("modelopt.torch.quantization", reason="needs nvidia-modelopt")
    transformers = pytest.importorskip("transformers")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    shape, kind, exact = (256, 256), torch.bfloat16, torch.float32
    blocks = {-1: 128, -2: 128}
    for name, read in {
        "FP8_DEFAULT_CFG": lambda w, s, _: FP8QTensor(shape, kind, w).dequantize(exact, scale=s),
        "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": lambda w, s, _: FP8QTensor(shape, kind, w).dequantize(
            exact, scale=s[:, 0, :, 0], block_sizes=blocks
        ),
        "MXFP8_DEFAULT_CFG": lambda w, s, _: MXFP8QTensor(shape, kind, w).dequantize(exact, scale=s),
        "NVFP4_DEFAULT_CFG": lambda w, s, second: NVFP4QTensor(shape, kind, w).dequantize(
            exact, scale=s, double_scale=second, block_sizes={-1: 16}
        ),
    }.items():
        model = transformers.LlamaForCausalLM(config).to(kind)
        made = mtq.quantize(model, getattr(mtq, name), lambda m: m(torch.zeros(1, 4, dtype=torch.long)))
        export_hf_checkpoint(made, dtype=kind, export_dir=tmp_path / name)
        held = load_file(tmp_path / name / "model.safetensors")
        (got,) = fastckpt.reshard(tmp_path / name, quant="none")
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            matrix = f"model.layers.0.self_attn.{part}.weight"
            want = read(held[matrix], held[f"{matrix}_scale"], held.get(f"{matrix}_scale_2"))
            assert torch.equal(got[matrix], want.to(kind)), (name, part)


_UNEVEN = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": False}}}}
_GPTQ = {
    "a.qweight": torch.zeros(1, 8, dtype=torch.int32), "a.qzeros": torch.zeros(1, 1, dtype=torch.int32),
    "a.scales": torch.ones(1, 8),
}  # fmt: skip
_FP8 = {"a.weight": torch.zeros(200, 200).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 2)}
_PACKED = {"a.weight_packed": torch.zeros(8, 1, dtype=torch.int32), "a.weight_scale": torch.ones(8, 1)}
_PAIRS = {"a.weight_packed": torch.zeros(8, 16, dtype=torch.uint8)}

REFUSED = {
    "nothing": ({"a.weight": torch.zeros(2, 2)}, {}, "no tensor of it is quantised"),
    "method": ({"a.weight": torch.zeros(2, 2)}, {"quant_method": "bitsandbytes"}, "bitsandbytes"),
    "alone": ({"a.weight": torch.zeros(2, 2, dtype=torch.int8)}, {}, "a.weight_scale is not there"),
    "scales": (
        {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(3, 3)}, {},
        "do not fit",
    ),
    "scales of a byte": (
        {"a.weight": torch.zeros(4, 8, dtype=torch.int8),
         "a.weight_scale": torch.ones(4, 1).to(torch.float8_e5m2)}, {}, "scales of float8_e5m2",
    ),
    "exponents of int8": (
        {"a.weight": torch.zeros(4, 64, dtype=torch.int8),
         "a.weight_scale": torch.ones(4, 2, dtype=torch.uint8)}, {}, "scales of uint8",
    ),
    "exponents of pairs": (
        _PAIRS | {"a.weight_scale": torch.ones(8, 2, dtype=torch.uint8)}, {}, "32 values each",
    ),
    "one number": (
        _PAIRS | {"a.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn)}, {},
        "weight_global_scale is not there",
    ),
    "scales of inputs": (
        {"a.weight": torch.zeros(8, 16, dtype=torch.uint8), "a.weight_scale": torch.ones(8, 2),
         "a.pre_quant_scale": torch.ones(32)}, {"quant_method": "modelopt"}, "scales of inputs",
    ),
    "second scales": (
        {"a.weight": torch.zeros(8, 16, dtype=torch.uint8),
         "a.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn)}, {}, "weight_scale_2 is not there",
    ),
    "scales of ModelOpt's pairs": (
        {"a.weight": torch.zeros(8, 16, dtype=torch.uint8), "a.weight_scale": torch.ones(8, 2)}, {},
        "a.weight_scale: got float32",
    ),
    "scales of pairs": (_PAIRS | {"a.weight_scale": torch.ones(8, 2)}, {}, "got float32, wanted uint8"),
    "which": (
        {"a.qweight": torch.zeros(8, 1, dtype=torch.int32), "a.qzeros": torch.zeros(1, 1, dtype=torch.int32),
         "a.scales": torch.ones(1, 8)}, {}, "no config says which",
    ),
    "bits": (
        {"a.qweight": torch.zeros(8, 1, dtype=torch.int32), "a.qzeros": torch.zeros(1, 1, dtype=torch.int32),
         "a.scales": torch.ones(1, 8)}, {"quant_method": "gptq", "bits": 3}, "3 bits are not read",
    ),
    "points": (
        {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(1),
         "a.weight_zero_point": torch.ones(1, dtype=torch.bfloat16)}, {}, "zero_point: got bfloat16",
    ),
    "points of another shape": (
        {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1),
         "a.weight_zero_point": torch.ones(2, 1, dtype=torch.int8)}, {},
        r"a.weight_zero_point: got shape \(2, 1\), its scales have \(4, 1\)",
    ),
    "points missing": (_PACKED, _UNEVEN, "weight_zero_point is not there"),
    "points of bytes missing": (
        {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(1)}, _UNEVEN,
        "weight_zero_point is not there",
    ),
    "order missing": (_GPTQ, {"quant_method": "gptq", "desc_act": True}, "g_idx is not there"),
    "form": (_GPTQ, {"quant_method": "gptq", "format": "marlin"}, "checkpoint_format 'marlin'"),
    "forms": (
        _GPTQ, {"quant_method": "gptq", "checkpoint_format": "gptq", "format": "gptq_v2"},
        "checkpoint_format 'gptq and gptq_v2'",
    ),
    "AWQ's form": (
        {"a.qweight": torch.zeros(8, 1, dtype=torch.int32), "a.qzeros": torch.zeros(1, 1, dtype=torch.int32),
         "a.scales": torch.ones(1, 8)}, {"quant_method": "awq", "format": "gemv"}, "version 'gemv'",
    ),
    "no matrix": (
        {"a.weight": torch.zeros(8, dtype=torch.int8), "a.weight_scale": torch.ones(1)}, {},
        r"a.weight: int8 of shape \(8,\) is not dequantised",
    ),
    "bytes": (
        {"a.weight": torch.zeros(4, 8, dtype=torch.uint8), "b.weight": torch.zeros(2)}, {},
        r"a.weight: uint8 of shape \(4, 8\) is not dequantised",
    ),
    "no scales": (
        {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(4, 0)}, {},
        r"scales of shape \(4, 0\) do not fit the matrix \(4, 8\)",
    ),
    "groups of two sizes": (
        {"a.weight": torch.zeros(4, 96, dtype=torch.int8), "a.weight_scale": torch.ones(4, 3)},
        {"config_groups": {str(n): {"weights": {"group_size": n}} for n in (32, 40)}},
        "groups of 32, 40 all make 3 of 96 inputs",
    ),
    "widths": (
        _PACKED, {"config_groups": {str(n): {"weights": {"num_bits": n}} for n in (4, 8)}},
        "config_groups of different widths",
    ),
    "packed otherwise": (
        _PACKED | {"a.weight_packed": torch.zeros(8, 1, dtype=torch.int64)}, {},
        r"a.weight_packed: int64 of shape \(8, 1\) is not read, only int32",
    ),
    "packed points": (
        _PACKED | {"a.weight_zero_point": torch.zeros(2, 1, dtype=torch.int32)}, _UNEVEN,
        r"weight_zero_point: got shape \(2, 1\), wanted \(1, 1\)",
    ),
    "pairs of three axes": (
        {"a.weight_packed": torch.zeros(2, 8, 16, dtype=torch.uint8), "a.weight_scale": torch.ones(8, 1)}, {},
        r"a.weight_packed: bytes of shape \(2, 8, 16\), scales of \(8, 1\) are not read",
    ),
    "pairs with one scale": (
        {"a.weight": torch.zeros(8, 16, dtype=torch.uint8),
         "a.weight_scale": torch.ones(()).to(torch.float8_e4m3fn), "a.weight_scale_2": torch.ones(())}, {},
        r"scales of \(\) are not read",
    ),
    "pairs with points": (
        _PAIRS | {"a.weight_scale": torch.ones(8, 1, dtype=torch.uint8)}, _UNEVEN,
        "four-bit floats with zero points",
    ),
    "second scales of another dtype": (
        _PAIRS | {"a.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn),
                  "a.weight_global_scale": torch.ones(1).half()}, {},
        "a.weight_global_scale: got float16, wanted float32",
    ),
    "GPTQ's axes": (_GPTQ | {"a.scales": torch.ones(8)}, {"quant_method": "gptq"}, "are no matrices"),
    "GPTQ's dtype": (
        _GPTQ | {"a.qzeros": torch.zeros(1, 1, dtype=torch.int16)}, {"quant_method": "gptq"},
        "wanted int32 values and zero points, got int32, int16",
    ),
    "GPTQ's values": (
        _GPTQ | {"a.qweight": _GPTQ["a.qweight"].long()}, {"quant_method": "gptq"},
        "wanted int32 values and zero points, got int64, int32",
    ),
    "GPTQ's sizes": (_GPTQ | {"a.scales": torch.ones(1, 7)}, {"quant_method": "gptq"}, "do not fit each"),
    "GPTQ's groups": (
        _GPTQ | {"a.scales": torch.ones(0, 8), "a.qzeros": torch.zeros(0, 1, dtype=torch.int32)},
        {"quant_method": "gptq"}, "do not fit each other",
    ),
    "GPTQ's order": (
        _GPTQ | {"a.g_idx": torch.tensor([0] * 7 + [1], dtype=torch.int32)}, {"quant_method": "gptq"},
        "a.weight: groups of inputs 0 to 1, there are 1",
    ),
    "AWQ's sizes": (
        {"a.qweight": torch.zeros(8, 1, dtype=torch.int32), "a.qzeros": torch.zeros(1, 2, dtype=torch.int32),
         "a.scales": torch.ones(1, 12)}, {"quant_method": "awq"}, "do not fit each other",
    ),
    "tied": ("tied", {}, "b.weight is tied to a.weight, which is quantised: not read"),
    "blocks": (_FP8, {"quant_method": "fp8", "weight_block_size": [100.0, 100.0]}, r"blocks of \[100.0, 100"),
    "turned": (_FP8, {"transform_config": {"config_groups": {"R1": {}}}}, "turned weights"),
    "bits of values": (_PACKED, {}, "says of how many bits"),
    "shape": (
        _PACKED | {"a.weight_shape": torch.tensor([8, 8], dtype=torch.int16)}, {}, "weight_shape: got int16",
    ),
    "order": (
        {"a.weight_packed": torch.zeros(8, 1, dtype=torch.int32), "a.weight_scale": torch.ones(8, 1),
         "a.weight_g_idx": torch.zeros(8), "a.weight_shape": torch.tensor([8, 8])}, {}, "reordered",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_read_is_refused(case):
    state, said, match = REFUSED[case]
    if state == "tied":
        weight = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
        state = {"a.weight": weight, "b.weight": weight, "a.weight_scale": torch.ones(1)}
    with pytest.raises(SourceError, match=match):
        fastckpt.reshard(
            state, layout="same", quant="none", config={"quantization_config": said} if said else None
        )


def test_the_command_line(tmp_path, capsys):
    _, want = source(tmp_path, "fp8")
    line = ["reshard", str(tmp_path / "in"), str(tmp_path / "out"), "--quant", "none", "--dtype", "float16"]
    assert main([*line, "--quant-include", "*"]) == 2
    assert main(line) == 0
    equal(load_file(tmp_path / "out" / "model.safetensors"), {n: t.half() for n, t in want.items()})


@pytest.mark.parametrize("scheme", ["fp8", "fp8-channel", "fp8-block"])
def test_bytes_are_never_cast_without_their_scales(tmp_path, scheme):
    source(tmp_path, scheme)
    name, refused = (
        "model.layers.0.self_attn.o_proj.weight",
        "o_proj.weight is quantised|q_proj.weight is quantised",
    )
    stored = load_file(tmp_path / "in/model.safetensors")
    for options in ({"layout": "same", "dtype": "float32"}, {"dtype": "float8_e5m2"}, {"dtype": "bfloat16"}):
        with pytest.raises(LayoutError, match=refused):
            fastckpt.reshard(tmp_path / "in", **options)
    with pytest.raises(LayoutError, match=refused):
        fastckpt.reshard(tmp_path / "in", tp_plan={"*": "replicate"}, dtype="bfloat16")
    with pytest.raises(LayoutError, match=refused):
        fastckpt.consolidate(tmp_path / "in")
    equal({name: fastckpt.consolidate(tmp_path / "in", dtype=None)[name]}, {name: stored[name]})

    class Module(torch.nn.Module):
        def state_dict(self, **_):
            return {name: self.held}

    module = Module()
    module.held = torch.nn.Parameter(torch.full(stored[name].shape, 7.0))
    with pytest.raises(LayoutError, match=refused):
        fastckpt.load_into(module, tmp_path / "in", strict=False)
    assert (module.held == 7).all()


@pytest.mark.parametrize("scheme", ["int8", "int4-group32", "awq-group32", "gptq-group32"])
def test_scales_are_never_rounded(tmp_path, scheme):
    source(tmp_path, scheme)
    with pytest.raises(LayoutError, match=r"scales? is quantised, so its bytes cannot become bfloat16"):
        fastckpt.reshard(tmp_path / "in", layout="same", dtype="bfloat16")
    stored = load_file(tmp_path / "in/model.safetensors")
    got = fastckpt.reshard(tmp_path / "in", layout="same", dtype="float32")[0]
    equal(got, {n: t.float() if t.dtype == torch.float16 else t for n, t in stored.items()})
