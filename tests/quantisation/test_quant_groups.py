"""Four bits with zero points, AWQ's and GPTQ's files: values, scales, zeros as their loaders read them."""

from __future__ import annotations

import json
import re

import fastckpt
import numpy as np
import pytest
import quant_oracle
import torch
from fastckpt import dtypes
from fastckpt.errors import LayoutError, SourceError
from fastckpt.executors.cpu import built
from fastckpt.quantisation import rounding
from fastckpt.quantisation.schemes import SCHEMES, Quant
from fastckpt.running import quantising
from quant_oracle import GROUPS
from quantisation.test_quant_road import HIDDEN, WIDTH, linear, model
from quantisation.test_rounding import WAYS, raw
from safetensors.torch import load_file, save_file

ROWS = [8, 40, 520]


def stored(scheme, x, native, isa):
    """What `rounding.quantise` gives of one matrix, in the parts of a file."""
    shape = x.shape[::-1] if scheme.turned else x.shape
    out = np.full(x.numel() // 2, 0xAA, np.uint8)
    dtype = dtypes.dtype(str(x.dtype))
    pitch = x.shape[1] * x.itemsize if scheme.turned else 0
    found = rounding.quantise(raw(x), dtype, *shape, scheme, None, out, pitch=pitch, isa=isa, native=native)
    words = torch.from_numpy(out.view(np.int32)).reshape(scheme.stored_shape(shape))
    scales = torch.from_numpy(found.scales.astype(np.float16 if scheme.turned else np.float32))
    zeros = torch.from_numpy(rounding.stored_zeros(found.zeros, scheme))
    assert zeros.shape == scheme.zero_shape(shape)
    form = torch.tensor(scheme.form_values(shape), dtype=torch.int32 if scheme.turned else torch.int64)
    names = (scheme.values, scheme.scale, scheme.zero, scheme.form or "g_idx")
    parts = zip(names, (words, scales, zeros, form), strict=True)
    return {scheme.named("weight", part): t for part, t in parts}, found.error


def matrices(rows, n):
    torch.manual_seed(rows + n)
    plain = torch.randn(rows, 3 * n)
    yield plain
    yield plain * torch.exp2(torch.randint(-40, 4, plain.shape).float())
    yield plain.abs()
    yield -plain.abs() - 5
    yield torch.randint(-15, 16, plain.shape) / 2.0
    holes = plain.clone()
    holes[: rows // 2] = 0
    holes[:, n : 2 * n] = -0.0
    yield holes
    yield plain * 2.0**-23
    yield plain.bfloat16()
    yield plain.half()


@pytest.mark.parametrize("native, isa", WAYS)
@pytest.mark.parametrize("name", list(GROUPS))
def test_loaders_read_the_values_of_plain_torch(name, native, isa):
    kind, n, _ = GROUPS[name]
    for rows in ROWS:
        for x in matrices(rows, n):
            parts, error = stored(SCHEMES[name], x, native, isa)
            got = quant_oracle.read_back(parts, "", kind)
            values, scales, zeros = want = quant_oracle.grouped(x, name)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)
            each = (t.repeat_interleave(n, 1) for t in (scales, zeros))
            y = next(each) * (values - next(each))
            biggest = float((x.double() - y.double()).abs().max())
            assert error.biggest == pytest.approx(biggest, rel=1e-4, abs=1e-6 * float(x.abs().max()))


@pytest.mark.parametrize("native, isa", WAYS)
@pytest.mark.parametrize("name", ["awq-group32", "gptq-group32", "gptq-group32-zero"])
def test_a_group_below_the_scales_of_fp16_is_not_lost(name, native, isa):
    """Its amax over reach is less than half of the smallest scale; of that it is to the nearest."""
    x = torch.linspace(-(2.0**-23), 2.0**-23, 8 * 32).reshape(8, 32)[torch.randperm(8)]
    parts, error = stored(SCHEMES[name], x, native, isa)
    values, scales, zeros = quant_oracle.read_back(parts, "", name.partition("-")[0])
    assert scales.unique().tolist() == [2.0**-24]
    assert (x - scales * (values - zeros)).abs().max() <= 2.0**-25
    assert error.biggest <= 2.0**-25


@pytest.mark.parametrize("native, isa", WAYS)
@pytest.mark.parametrize("name", ["int4-group32-zero", "awq-group32", "gptq-group32"])
def test_what_is_not_finite_is_told(name, native, isa):
    scheme = SCHEMES[name]
    for bad in (float("nan"), float("inf"), -float("inf")):
        for at in (0, 31, 67):
            x = torch.randn(24, 96)
            x[13, at] = bad
            dense = x.T.contiguous() if scheme.turned else x
            out = np.empty(x.numel() // 2, np.uint8)
            found = rounding.quantise(
                raw(dense), dtypes.float32, *dense.shape, scheme, None, out, isa=isa, native=native
            )
            assert found is None


CASES = [
    (name, layout, tp)
    for name in ("int4-group32-zero", "int4-group-zero", "awq-group32", "gptq-group64", "gptq-group-zero")
    for layout, tp in (("hf", 1), ("hf", 2), ("vllm", 2))
]  # fmt: skip


@pytest.mark.parametrize("name, layout, tp", CASES)
def test_cutting_changes_no_number(name, layout, tp):
    kind = GROUPS[name][0]
    config, tensors = model("llama")
    plain = fastckpt.reshard(tensors, tp, layout=layout, config=config)
    made = fastckpt.reshard(tensors, tp, layout=layout, config=config, quant=name)
    for dense, shard in zip(plain, made, strict=True):
        seen = set()
        for key, x in dense.items():
            if not any(k in key for k in ("_proj.",)):
                assert torch.equal(shard[key], x)
                seen.add(key)
                continue
            stem = key.removesuffix("weight")
            got = quant_oracle.read_back(shard, stem, kind)
            for a, b in zip(got, quant_oracle.grouped(x, name), strict=True):
                assert torch.equal(a, b), key
            seen |= {k for k in shard if k.startswith(stem)}
        assert seen == set(shard)


@pytest.mark.parametrize("name", ["int4-group-zero", "awq-group", "gptq-group"])
def test_files_and_their_config(tmp_path, name):
    kind, n, _ = GROUPS[name]
    config, tensors = model("mixtral")
    report = fastckpt.reshard(tensors, config=config, quant=name, out=tmp_path / "out", threads=2)
    assert fastckpt.verify(tmp_path / "out").ok and report.bytes_scanned == 0
    shard = load_file(tmp_path / "out" / "model.safetensors")
    for key, x in tensors.items():
        if linear(key):
            got = quant_oracle.read_back(shard, key.removesuffix("weight"), kind)
            for a, b in zip(got, quant_oracle.grouped(x, name), strict=True):
                assert torch.equal(a, b), key
    told = json.loads((tmp_path / "out" / "quantisation-rank-0.json").read_text())
    assert all(t["cosine"] > 0.98 and t["scheme"] == name for t in told.values())
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    embedding, gate = "model.embed_tokens", "model.layers.0.block_sparse_moe.gate"
    if kind == "int4":
        weights = said["config_groups"]["group_0"]["weights"]
        assert (weights["symmetric"], weights["group_size"], weights["num_bits"]) == (False, n, 4)
    elif kind == "awq":
        assert said == {
            "quant_method": "awq", "bits": 4, "group_size": n, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": [embedding, gate, "lm_head"],
        }  # fmt: skip
    else:
        patterns = {f"-:^{re.escape(name)}$": {} for name in (embedding, gate)}
        assert said == {
            "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": n,
            "desc_act": False, "sym": True, "lm_head": False, "dynamic": patterns,
        }  # fmt: skip


def test_transformers_reads_the_configs(tmp_path):
    found = pytest.importorskip("transformers.utils.quantization_config")
    config, tensors = model("llama")
    for name, kind in (("awq-group", found.AwqConfig), ("gptq-group", found.GPTQConfig)):
        fastckpt.reshard(tensors, config=config, quant=name, out=tmp_path / name)
        said = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        try:
            read = kind.from_dict(said)
        except ImportError as e:
            pytest.skip(f"{kind.__name__}: {e}")
        assert (read.bits, read.group_size) == (4, 128)


def test_what_does_not_fit_is_refused(tmp_path):
    config, tensors = model("llama")
    narrow = {
        n: t[:384] if "gate" in n or "up_" in n else t[:, :384] if "down" in n else t
        for n, t in tensors.items()
    }
    for name in ("awq-group", "gptq-group", "int4-group-zero"):
        with pytest.raises(LayoutError, match=r"cut a block|divide by the group"):
            fastckpt.reshard(narrow, 2, config=dict(config, intermediate_size=384), quant=name)
        with pytest.raises(LayoutError, match="has no place"):
            fastckpt.reshard(tensors, 2, layout="megatron", config=config, quant=name)
    odd = {"a.q_proj.weight": torch.randn(12, 128)}
    with pytest.raises(LayoutError, match="divide by 8"):
        fastckpt.reshard(odd, layout="same", quant="awq-group")
    (made,) = fastckpt.reshard(odd, layout="same", quant="int4-group-zero")
    assert made["a.q_proj.weight_zero_point"].shape == (2, 1)
    broken = {"a.q_proj.weight": torch.full((16, 128), 1e30)}
    with pytest.raises(SourceError, match="beyond its type"):
        fastckpt.reshard(broken, layout="same", quant="gptq-group")


@pytest.mark.parametrize("name", ["awq-group32", "gptq-group32-zero"])
@pytest.mark.parametrize("way", ["plain", "pitched", "turned", "cast"])
def test_wherever_the_dense_values_lie(tmp_path, monkeypatch, name, way):
    """In memory with or without gaps, turned, cast, or in a file: in several bands and stretches."""
    monkeypatch.setattr(quantising, "DENSE_BYTES", 1 << 19)
    monkeypatch.setattr(quantising, "WIDER", 2)
    monkeypatch.setattr(quantising, "STRETCH_BYTES", 1)
    torch.manual_seed(3)
    x = torch.randn(512, 10240)
    weight = {
        "plain": lambda: x,
        "pitched": lambda: torch.cat([x, torch.ones(512, 3)], 1)[:, :10240],
        "turned": lambda: x.T.contiguous().T,
        "cast": lambda: x.double(),
    }[way]()
    want, _ = stored(SCHEMES[name], x, built(), -1)
    state, options = {"a.q_proj.weight": weight}, {"layout": "same", "quant": name, "dtype": "float32"}
    (got,) = fastckpt.reshard(state, threads=2, **options)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors")
    fastckpt.reshard(tmp_path / "model.safetensors", out=tmp_path / "out", threads=2, **options)
    for made in (got, load_file(tmp_path / "out/model.safetensors")):
        for part in ("qweight", "scales", "qzeros"):
            assert torch.equal(made[f"a.q_proj.{part}"], want[part]), part


@pytest.mark.skipif(not built(), reason="not built")
def test_sizes_that_do_not_fit_are_refused_by_the_kernel():
    from fastckpt import _C

    x, out = raw(torch.randn(16, 16)), np.empty(128, np.uint8)
    scales, zeros, sums = np.empty(16, np.float32), np.empty(16, np.int8), np.zeros(5)
    good = [x, 0, 16, 16, 64, 16, 1, 7.5, 0.0, -8.0, False, True, False, 4, None, out, scales, zeros, sums]
    assert _C.quantise(*good)
    with_gaps = np.zeros(15 * 80 + 64, np.uint8)
    assert _C.quantise(*(with_gaps, *good[1:4], 80, *good[5:]))
    for pitch in (0, 56, 60, 65, 96):
        for dense in (x, with_gaps, x[:0], x[:60]):
            with pytest.raises(ValueError, match="quantise"):
                _C.quantise(*(dense, *good[1:4], pitch, *good[5:]))
    for at, bad in (
        (5, 12),
        (6, 2),
        (15, out[:100]),
        (16, scales[:3]),
        (17, zeros[:3]),
        (13, 6),
        (13, 0),
        (12, True),
    ):
        told = list(good)
        told[at] = bad
        with pytest.raises(ValueError, match="quantise"):
            _C.quantise(*told)


assert HIDDEN % 128 == 0 and WIDTH % 128 == 0


@pytest.mark.parametrize("scheme", ["int4-group32", "mxfp4", "mxfp8"])
def test_transformers_loads_weights_as_they_are(tmp_path, scheme):
    """Opt-in: logits of what transformers makes of our files are those of the dequantised weights."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(8)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    dense.save_pretrained(tmp_path / "hub")
    fastckpt.reshard(tmp_path / "hub", quant=scheme, out=tmp_path / "q")
    # compressed-tensors makes bfloat16 of microscaled values, whatever was asked for
    dtype = "bfloat16" if scheme.startswith("mx") else "float32"
    fastckpt.reshard(tmp_path / "q", quant="none", dtype=dtype, out=tmp_path / "dense")
    models = transformers.AutoModelForCausalLM
    loaded, dense = (models.from_pretrained(tmp_path / x, dtype=dtype) for x in ("q", "dense"))
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, dense(tokens).logits)


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if not scheme.stacks])
def test_a_tied_head_stays_the_embedding(name):
    config, tensors = model("llama")
    tied = {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    (made,) = fastckpt.reshard(tied, config=config | {"tie_word_embeddings": True}, quant=name)
    embedding = tensors["model.embed_tokens.weight"]
    assert torch.equal(made["model.embed_tokens.weight"], embedding)
    assert torch.equal(made["lm_head.weight"], embedding)
    refused = {
        "model.embed_tokens.weight": "is an embedding|tied to another",
        "lm_head.weight": "names no tensor",
    }
    for asked, why in refused.items():
        quant = Quant(SCHEMES[name], include=(asked,))
        with pytest.raises(LayoutError, match=why):
            fastckpt.reshard(tied, config=config | {"tie_word_embeddings": True}, quant=quant)
