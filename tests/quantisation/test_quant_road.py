"""Quantised on the way, cut by every layout: equal to the uncut matrix quantised in plain torch, then cut."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import fastckpt
import numpy as np
import pytest
import quant_oracle
import torch
from fastckpt import dtypes
from fastckpt.cli import main
from fastckpt.errors import LayoutError, RecipeError, SourceError, WriteError
from fastckpt.executors import pick
from fastckpt.executors.cpu import built
from fastckpt.layouts import layout as layout_of
from fastckpt.planning import plans
from fastckpt.quantisation import quantised_targets, rounding
from fastckpt.quantisation.schemes import SCHEMES, Quant
from fastckpt.reader import Mapped, Positioned
from fastckpt.running import quantising, runs
from fastckpt.target import Target
from fastckpt.views import zeros
from layouts import oracle
from reading import refuses_what_is_written_to
from safetensors.torch import load_file
from zero_writer import write_zero

LAYOUTS = {"hf": oracle.hf, "vllm": oracle.vllm}
HIDDEN, WIDTH, HEADS, KV, HEAD, EXPERTS = 256, 512, 4, 2, 128, 2
SUFFIX = {"fp8-block": "_scale_inv"}
PACKED = ("int4-group", "int4-group64", "int4-group32", "mxfp4")


@functools.cache
def model(family, dtype=torch.float32):
    """(config, tensors by their hub names) of one layer, in sizes that blocks of 128 fit at tp 4."""
    config = {
        "model_type": family, "vocab_size": 192, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "head_dim": HEAD,
        "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    at = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (192, HIDDEN),
        at + "input_layernorm.weight": (HIDDEN,),
        at + "self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        at + "self_attn.k_proj.weight": (KV * HEAD, HIDDEN),
        at + "self_attn.v_proj.weight": (KV * HEAD, HIDDEN),
        at + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        at + "post_attention_layernorm.weight": (HIDDEN,),
    }
    if family == "llama":
        names = {"mlp.gate_proj": "up", "mlp.up_proj": "up", "mlp.down_proj": "down"}
    else:
        config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 1}
        shapes[at + "block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        kinds = {"w1": "up", "w3": "up", "w2": "down"}
        names = {f"block_sparse_moe.experts.{e}.{w}": k for e in range(EXPERTS) for w, k in kinds.items()}
    for name, kind in names.items():
        shapes[f"{at}{name}.weight"] = (WIDTH, HIDDEN) if kind == "up" else (HIDDEN, WIDTH)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (192, HIDDEN)}
    torch.manual_seed(7)
    tensors = {
        n: (torch.randn(s) * torch.randn(s[0], *[1] * (len(s) - 1)).exp()).to(dtype)
        for n, s in shapes.items()
    }
    return config, tensors


def linear(name):
    return name.endswith(".weight") and name.split(".")[-2] in {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"
    }  # fmt: skip


def codes(values, name):
    """What is stored, one exact float an element."""
    if name == "mxfp4":
        return quant_oracle.pairs(values)
    if not name.startswith("int4"):
        return values.float()
    words = values.to(torch.int64)
    return torch.stack([(words >> (4 * k)) % 16 - 8 for k in range(8)], 2).reshape(len(values), -1).float()


@functools.cache
def uncut(family, scheme, dtype):
    """Every matrix quantised whole: (exact values, the scale of every element), by name."""
    down, across = quant_oracle.BLOCKS[scheme]
    values, each = dict(model(family, dtype)[1]), dict(model(family, dtype)[1])
    for name, x in model(family, dtype)[1].items():
        if linear(name):
            stored, scales = quant_oracle.quantised(x, scheme)
            rows, columns = x.shape
            tall = scales.repeat_interleave(down or rows, 0)
            each[name] = tall.repeat_interleave(across or columns, 1)[:rows, :columns]
            values[name] = codes(stored, scheme)
    return values, each


def expected(family, scheme, layout, tp, rank, dtype=torch.float32):
    """(plain tensors, exact values, scale of every element) of a rank, all cut by the layouts' oracle."""
    config, tensors = model(family, dtype)
    values, each = uncut(family, scheme, dtype)
    cut = LAYOUTS[layout]
    return (cut(t, config, tp, rank) for t in (tensors, values, each))


def check(shard, family, scheme, layout, tp, rank, dtype=torch.float32):
    plain, values, each = expected(family, scheme, layout, tp, rank, dtype)
    down, across = quant_oracle.BLOCKS[scheme]
    seen = set()
    for name, x in plain.items():
        chosen = any(k in name for k in ("_proj.", ".w1.", ".w2.", ".w3.", "w13_weight", "w2_weight"))
        if not chosen:
            assert torch.equal(shard[name], x) and shard[name].dtype == x.dtype
            seen.add(name)
            continue
        stored, scales = (
            name + ("_packed" if scheme in PACKED else ""),
            name + SUFFIX.get(scheme, "_scale"),
        )
        seen |= {stored, scales}
        got = shard[stored]
        held = {"int8": torch.int8, "int4": torch.int32, "mxfp4": torch.uint8}
        assert got.dtype == held.get(scheme[:5], held.get(scheme[:4], torch.float8_e4m3fn))
        if scheme.startswith("int4"):
            seen.add(f"{name}_shape")
            assert shard[f"{name}_shape"].tolist() == list(x.shape)
        if scheme.startswith("int8-dynamic"):
            seen.add(f"{name}_zero_point")
            zero = shard[f"{name}_zero_point"]
            assert zero.dtype == torch.int64 and zero.shape == shard[scales].shape and not zero.any()
        assert torch.equal(codes(got, scheme), values[name]), name
        want = each[name][..., :: down or x.shape[-2], :: across or x.shape[-1]]
        if scheme.startswith("mx"):
            want = (torch.log2(want) + 127).to(torch.uint8)
        assert shard[scales].dtype == want.dtype
        assert torch.equal(shard[scales].flatten(), want.flatten()), name
        if scheme.startswith(("int8-dynamic", "fp8")) and across == 0:
            continue
        assert shard[scales].shape == want.shape
    assert seen == set(shard)


CASES = [
    (family, layout, tp, scheme)
    for scheme in quant_oracle.BLOCKS
    for family in (("llama", "mixtral") if scheme in ("int8", "fp8", "fp8-block") else ("llama",))
    for layout, tp in (("hf", 1), ("hf", 2), ("vllm", 2), ("vllm", 4))
    if (layout, scheme) != ("vllm", "fp8")  # a scale for every matrix it fuses: test_prequantised
]


@pytest.mark.parametrize("family, layout, tp, scheme", CASES)
def test_cutting_changes_no_number(family, layout, tp, scheme):
    config, tensors = model(family)
    if layout == "vllm" and ("dynamic" in scheme or (family == "mixtral" and "int4" in scheme)):
        with pytest.raises(LayoutError, match="quant"):
            fastckpt.reshard(tensors, tp, layout=layout, config=config, quant=scheme)
        return
    shards = fastckpt.reshard(tensors, tp, layout=layout, config=config, quant=scheme)
    for rank, shard in enumerate(shards):
        check(shard, family, scheme, layout, tp, rank)
    alone = fastckpt.reshard(tensors, tp, layout=layout, config=config, quant=scheme, rank=tp - 1)
    assert all(
        torch.equal(alone[n].view(torch.uint8), t.view(torch.uint8)) for n, t in shards[-1].items() if t.ndim
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "int4-group32"])
def test_sixteen_bits_are_quantised_as_they_are(dtype, scheme):
    config, tensors = model("llama", dtype)
    shard = fastckpt.reshard(tensors, 2, config=config, quant=scheme, rank=1)
    check(shard, "llama", scheme, "hf", 2, 1, dtype)
    _, masters = model("llama")
    name = str(dtype).removeprefix("torch.")
    shard = fastckpt.reshard(masters, 2, config=config, quant=scheme, rank=1, dtype=name)
    check(shard, "llama", scheme, "hf", 2, 1, dtype)  # the masters cast first, then quantised


@pytest.mark.parametrize(
    "reader", [pytest.param(Mapped, marks=pytest.mark.skipif(not built(), reason="not built")), Positioned]
)
@pytest.mark.parametrize("executor", ["cpu", "torch"])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-block", "int4-group"])
def test_from_zero_files_to_files(tmp_path, monkeypatch, scheme, reader, executor):
    config, tensors = model("mixtral")
    write_zero(tmp_path / "in", dict(tensors), stage=3, world=3)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    try:
        pick(executor)
    except fastckpt.DeviceError:
        pytest.skip(f"executor {executor} is not built")
    monkeypatch.setattr(runs, "pick", lambda *_: pick(executor))
    monkeypatch.setattr(runs, "reader_of", lambda extents, binding, **_: reader(binding.places))
    report = fastckpt.reshard(tmp_path / "in", 2, quant=scheme, out=tmp_path / "out", threads=2)
    for rank in range(2):
        check(
            load_file(tmp_path / "out" / f"rank-{rank:02d}" / "model.safetensors"),
            "mixtral",
            scheme,
            "hf",
            2,
            rank,
        )
        told = json.loads((tmp_path / "out" / f"quantisation-rank-{rank}.json").read_text())
        assert all(t["scheme"] == scheme and t["cosine"] > 0.98 for t in told.values())
        assert {f"{rank}/{n}": t for n, t in told.items()}.items() <= report.errors.items()
    assert fastckpt.verify(tmp_path / "out").ok
    whole = sum(4 * t.numel() for n, t in tensors.items() if linear(n))
    crossed = sum(4 * t.numel() for n, t in tensors.items() if n.split(".")[-2] in ("o_proj", "w2"))
    assert report.bytes_scanned == {"int8": crossed, "fp8": whole}.get(scheme, 0)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-block", "int4-group"])
def test_numpy_alone_gives_the_same(monkeypatch, scheme):
    config, tensors = model("llama")
    monkeypatch.setattr(rounding, "_C", None)
    check(fastckpt.reshard(tensors, 2, config=config, quant=scheme, rank=1), "llama", scheme, "hf", 2, 1)


def test_large_tensors_are_shared_out_and_leaves_fit(tmp_path, monkeypatch):
    """Stretches that begin on leaves, and widths that no leaf divides, give the bytes of one stretch."""
    torch.manual_seed(1)
    tensors = {
        "a.q_proj.weight": torch.randn(3000, 1024),
        "b.q_proj.weight": torch.randn(777, 2056),
        "c.q_proj.weight": torch.randn(130, 8200),
    }
    monkeypatch.setattr(quantising, "STRETCH_BYTES", 1)
    for scheme in ("int8", "fp8-block"):
        out = tmp_path / scheme
        fastckpt.reshard(tensors, layout="same", quant=scheme, out=out, threads=3)
        assert fastckpt.verify(out).ok
        got = load_file(out / "model.safetensors")
        for name, x in tensors.items():
            values, scales = quant_oracle.quantised(x, scheme)
            assert torch.equal(got[name].view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(got[name + SUFFIX.get(scheme, "_scale")], scales)


@pytest.mark.parametrize("scheme", ["int8", "fp8-block"])
def test_a_source_written_to_while_it_is_quantised_is_refused(tmp_path, scheme):
    """Mapped matrices are quantised where they lie, so that some bytes may be old and some new."""
    tensors = {f"{i}.q_proj.weight": torch.randn(512, 512) for i in range(32)}
    fastckpt.reshard(tensors, layout="same", out=tmp_path / "in")
    refuses_what_is_written_to(tmp_path / "in/model.safetensors", tmp_path / "in", quant=scheme)


@pytest.mark.parametrize("scheme", ["fp8", "int8-dynamic"])
def test_what_fits_the_cache_is_read_once(tmp_path, monkeypatch, scheme):
    """One scale for a matrix: found as it is quantised, or in a first read where it is larger."""
    monkeypatch.setenv("FASTCKPT_CACHE", "off")
    torch.manual_seed(2)
    stack = torch.randn(3, 40, 56)
    tensors = {"a.q_proj.weight": torch.randn(100, 72).bfloat16(), "experts.w2_weight": stack}
    fastckpt.reshard(tensors, layout="same", out=tmp_path / "in")
    digests = []
    for size, scanned in ((2**21, 0), (1, 2 * 7200 + 4 * stack.numel())):
        monkeypatch.setattr(quantised_targets, "DENSE_BYTES", size)
        out = tmp_path / f"{size}"
        report = fastckpt.reshard(tmp_path / "in", layout="same", quant=scheme, out=out, threads=2)
        assert report.bytes_scanned == scanned
        digests.append(report.digests)
    assert digests[0] == digests[1]
    memory = fastckpt.reshard(tensors, layout="same", quant=scheme, rank=0)
    for got in (load_file(out / "model.safetensors"), memory):
        for name, x in tensors.items():
            for i, matrix in enumerate(x.reshape(-1, *x.shape[-2:])):
                values, scale = quant_oracle.quantised(matrix, scheme)
                made = got[name].reshape(-1, *x.shape[-2:])[i]
                assert torch.equal(made.view(torch.uint8), values.view(torch.uint8))
                assert got[name + "_scale"].reshape(-1)[i] == scale.item()


KEPT = [
    ("int8", "hf"),
    ("fp8", "hf"),
    ("fp8-block", "vllm"),
    ("int4-group64", "hf"),
    ("int8-dynamic", "same"),
]


@pytest.mark.parametrize("scheme, layout", KEPT)
def test_a_kept_plan_quantises_the_next_checkpoint(tmp_path, monkeypatch, scheme, layout):
    """Of two checkpoints of a run the second is not planned again; files and config are as if it were."""
    config, tensors = model("mixtral")
    for name, by in (("one", 2), ("two", 1)):
        write_zero(tmp_path / name, {n: t * by for n, t in tensors.items()}, stage=3, world=3)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    tp = 1 if layout == "same" else 2
    road = functools.partial(fastckpt.reshard, tmp_path / "two", tp, layout=layout, quant=scheme)
    monkeypatch.setenv("FASTCKPT_CACHE", "off")
    fresh = road(out=tmp_path / "fresh")
    monkeypatch.setenv("FASTCKPT_CACHE", str(tmp_path / "plans"))
    fastckpt.reshard(tmp_path / "one", tp, layout=layout, quant=scheme)
    monkeypatch.setattr("fastckpt.planning.plans._compiled", lambda *_: pytest.fail("planned again"))
    kept = road(out=tmp_path / "kept")
    assert (kept.key, kept.digests, kept.errors) == (fresh.key, fresh.digests, fresh.errors)
    assert (kept.bytes_scanned, kept.bytes_needed) == (fresh.bytes_scanned, fresh.bytes_needed)
    for path in (tmp_path / "fresh").rglob("*"):
        if path.is_file() and path.name != "fastckpt.json":
            assert (
                tmp_path / "kept" / path.relative_to(tmp_path / "fresh")
            ).read_bytes() == path.read_bytes()


def test_a_kept_plan_is_of_one_wish(tmp_path, monkeypatch):
    """Whatever changes what is made is planned anew, the scheme's own figures too; the same is not."""
    monkeypatch.setenv("FASTCKPT_CACHE", str(tmp_path / "plans"))
    config, tensors = model("llama")
    made = []
    compiled = plans._compiled
    monkeypatch.setattr("fastckpt.planning.plans._compiled", lambda *a: made.append(1) or compiled(*a))
    int8 = SCHEMES["int8"]
    narrower = {
        n: t[: len(t) // 2] if "mlp.up_proj" in n or "mlp.gate_proj" in n else t for n, t in tensors.items()
    }
    narrower |= {n: t[:, : WIDTH // 2] for n, t in tensors.items() if "down_proj" in n}
    wishes = [
        dict(quant=None),
        dict(quant="int8"),
        dict(quant="fp8-channel"),
        dict(quant=Quant(int8, include=("lm_head.weight",))),
        dict(quant=Quant(int8, exclude=("lm_head.weight",))),
        dict(quant=Quant(replace(int8, reach=127.0))),
        dict(quant=Quant(replace(int8, block=(0, 0)))),
        dict(quant="int8", dtype="bfloat16"),
        dict(quant="int8", tp=2),
        dict(quant="int8", tp=2, rank=1),
        dict(quant="int8", layout="vllm"),
    ]
    keys = set()
    for n, wish in enumerate(wishes):
        for _ in range(2):
            keys.add(fastckpt.plan(tensors, config=config, **wish).key)
        assert len(made) == n + 1, wish
    assert len(keys) == len(wishes) - 1, "all ranks have one key, all else another"
    smaller = config | {"intermediate_size": WIDTH // 2}
    shard = fastckpt.reshard(narrower, config=smaller, quant="int8", rank=0)
    assert len(made) == len(wishes) + 1
    assert shard["model.layers.0.mlp.down_proj.weight"].shape == (HIDDEN, WIDTH // 2)


def test_the_callers_tensors_are_filled():
    config, tensors = model("llama")
    made = fastckpt.reshard(tensors, config=config, quant="int4-group", rank=0)
    given = {n: torch.full_like(t, 1) for n, t in made.items()}
    fastckpt.reshard(tensors, config=config, quant="int4-group", rank=0, out=given)
    check(given, "llama", "int4-group", "hf", 1, 0)


def test_staging_stays_within_the_memory_that_is_given(tmp_path):
    tensors = {"a.q_proj.weight": torch.randn(256, 8192)}
    kept = fastckpt.reshard(
        tensors, layout="same", quant="fp8-block", out=tmp_path / "a", memory="73MiB", threads=8
    )
    free = fastckpt.reshard(tensors, layout="same", quant="fp8-block", out=tmp_path / "b")
    assert kept.digests == free.digests
    with pytest.raises(WriteError, match="a band of blocks"):
        fastckpt.reshard(tensors, layout="same", quant="fp8-block", out=tmp_path / "c", memory="66MiB")
    assert not (tmp_path / "c").exists()


def test_the_command_line(tmp_path, capsys):
    config, tensors = model("llama")
    fastckpt.reshard(tensors, config=config, out=tmp_path / "in")
    line = ["reshard", str(tmp_path / "in"), str(tmp_path / "out"), "--tp", "2", "--quant", "int8"]
    assert main([*line, "--dry-run"]) == 0
    assert "mlp.down_proj.weight_scale" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main([*line, "--quant-exclude", "*.v_proj.*", "--no-fsync"]) == 0
    assert "first, for scales" in capsys.readouterr().out
    got = load_file(tmp_path / "out" / "rank-00" / "model.safetensors")
    int8 = {n for n, t in got.items() if t.dtype == torch.int8}
    assert int8 == {n for n in tensors if linear(n) and "v_proj" not in n}
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main([*line[:-1], "int9"]) == 2 and "known: int8" in capsys.readouterr().err
    assert main([*line[:-2], "--quant-include", "*"]) == 2


def test_patterns_add_and_take_away():
    config, tensors = model("llama")
    quant = Quant(SCHEMES["int8"], include=("lm_head.weight",), exclude=("*.v_proj.weight",))
    shard = fastckpt.reshard(tensors, config=config, quant=quant, rank=0)
    int8 = {n for n, t in shard.items() if t.dtype == torch.int8}
    assert int8 == {n for n in tensors if linear(n) and "v_proj" not in n} | {"lm_head.weight"}
    with pytest.raises(LayoutError, match="no matrix"):
        fastckpt.reshard(tensors, config=config, quant=Quant(SCHEMES["int8"], include=("model.norm.weight",)))
    with pytest.raises(LayoutError, match="is an embedding"):
        fastckpt.reshard(tensors, config=config, quant=Quant(SCHEMES["int8"], include=("*.embed_tokens.*",)))
    told = json.loads(fastckpt.plan(tensors, config=config, quant=quant).config)["quantization_config"]
    assert told["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert told["ignore"] == ["model.embed_tokens", "model.layers.0.self_attn.v_proj"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-block", "int4-group"])
def test_values_that_are_not_finite_are_refused(tmp_path, scheme, bad):
    config, tensors = model("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    broken = dict(tensors) | {name: tensors[name].clone()}
    broken[name][131, 77] = bad
    for allow in (False, True):
        with pytest.raises(SourceError, match=r"down_proj\.weight: NaN or infinite"):
            fastckpt.reshard(
                broken, 2, config=config, quant=scheme, out=tmp_path / "out", allow_nonfinite=allow
            )
    assert not (tmp_path / "out").exists()


def test_zeros_have_scale_one():
    config, tensors = model("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    zeroed = dict(tensors) | {name: torch.zeros(HIDDEN, WIDTH)}
    for scheme in ("int8", "fp8", "fp8-block"):
        shard = fastckpt.reshard(zeroed, config=config, quant=scheme, rank=0)
        assert not shard[name].float().any()
        assert (shard[name + SUFFIX.get(scheme, "_scale")] == 1).all()


REFUSED = {
    "unknown": (dict(quant="int5"), "known: int8"),
    "layout": (dict(quant="int4-group", layout="megatron"), "has no place"),
    "group": (dict(quant="int4-group", tp=2), "192.*cut a block|divide by the group"),
    "block": (dict(quant="fp8-block", tp=2), "no multiple of the block|cut a block"),
    "nothing": (dict(quant=Quant(SCHEMES["int8"], exclude=("*",))), "no tensor"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_refused_before_a_byte(tmp_path, case):
    config, tensors = model("llama")
    config = dict(config, intermediate_size=192)
    cut = {
        n: t[:192] if "gate" in n or "up_" in n else t[:, :192] if "down" in n else t
        for n, t in tensors.items()
    }
    told, match = REFUSED[case]
    with pytest.raises(LayoutError, match=match):
        fastckpt.reshard(cut, config=config, out=tmp_path / "out", **told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "shape", "plan", "quant", "message"),
    [
        ("a.o_proj.weight", (128, 384), "rowwise", "fp8-block", "96 of 384 columns a rank cut a block"),
        ("a.qkv_proj.weight", (512, 128), "colwise", "fp8-block", "the rows of its parts are not known"),
        (
            "a.proj", (128, 128), "replicate", Quant(SCHEMES["awq-group"], include=("a.proj",)),
            "wanted a name that ends with weight",
        ),
    ],
)  # fmt: skip
def test_what_a_cut_or_a_name_does_not_allow(name, shape, plan, quant, message):
    with pytest.raises(LayoutError, match=f"^quant .*: {name}: {message}"):
        fastckpt.reshard({name: torch.randn(shape)}, 4, tp_plan={"*": plan}, quant=quant)


@pytest.mark.parametrize(("scheme", "mine"), [("int8", (32, 32)), ("fp8", (2, 64, 64))])
def test_a_cut_on_two_axes_of_scales(scheme, mine):
    """No layout makes one; scales of what other ranks hold would be needed."""
    name, whole = "a.q_proj.weight", (64, 64) if len(mine) == 2 else (4, 64, 64)
    uncut = Target(name, zeros(whole, dtypes.float32))
    expansion = quantised_targets.Expansion(
        Quant(SCHEMES[scheme]), "hf", fastckpt.Placement(tp=2), lambda: iter([uncut]), None
    )
    with pytest.raises(LayoutError, match=r"a rank holds .*, cut on more than one axis of its scales"):
        list(expansion.targets([Target(name, zeros(mine, dtypes.float32))]))


def test_what_is_no_matrix_stays_dense():
    (got,) = fastckpt.reshard(
        {"a.q_proj.weight": torch.randn(64, 64), "b.q_proj.weight": torch.randn(3)},
        layout="same",
        quant="int8",
    )
    assert (got["a.q_proj.weight"].dtype, got["b.q_proj.weight"].dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8"])
def test_an_exponent_goes_with_32_whole_inputs_of_one_matrix(scheme):
    for shape, layout, name in (
        ((64, 48), "same", "a.q_proj.weight"),
        ((2, 64, 64), "vllm", "model.layers.0.block_sparse_moe.experts.w13_weight"),
    ):
        state, config = {"a.q_proj.weight": torch.randn(shape)}, None
        if layout == "vllm":
            config, state = model("mixtral")
        with pytest.raises(LayoutError, match=f"{name} .*columns divide by the group 32"):
            fastckpt.reshard(state, layout=layout, quant=scheme, config=config)
    plan = {"*q_proj.weight": "rowwise"}
    with pytest.raises(LayoutError, match=r"48 of 96 columns a rank|divide by the group 32"):
        fastckpt.reshard({"a.q_proj.weight": torch.randn(64, 96)}, 2, tp_plan=plan, quant=scheme)


@pytest.mark.parametrize("scheme, kind", [("mxfp4", "_packed"), ("mxfp8", "")])
@pytest.mark.parametrize("layout", ["hf", "vllm"])
def test_microscaled_files_are_carried_as_they_are(tmp_path, scheme, kind, layout):
    config, tensors = model("llama")
    fastckpt.reshard(tensors, config=config, quant=scheme, out=tmp_path / "q")
    got = fastckpt.reshard(tmp_path / "q", 2, layout=layout)
    want = fastckpt.reshard(tensors, 2, config=config, quant=scheme, layout=layout)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys() and any(n.endswith(f"weight{kind}") for n in a)
        assert all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
    engine = layout_of("vllm", {"engine": "vllm==0.32"})
    with pytest.raises(LayoutError, match=scheme):
        fastckpt.reshard(tmp_path / "q", 2, layout=engine)
    with pytest.raises(LayoutError, match=f"rtp_llm.*{scheme}|{scheme}.*rtp_llm"):
        fastckpt.reshard(tensors, config=config, quant=scheme, layout="rtp_llm")


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_what_is_quantised_already_is_refused():
    config, tensors = model("llama")
    with pytest.raises(LayoutError, match="quantised already"):
        fastckpt.reshard(tensors, layout="same", config=config | {"quantization_config": FP8}, quant="int8")
    shard = fastckpt.reshard(tensors, config=config, quant="int8", rank=0)
    with pytest.raises(LayoutError, match="quantised already"):
        fastckpt.reshard(shard, layout="same", quant="int8")


@pytest.mark.parametrize("layout", ["hf", "vllm", "rtp_llm"])
def test_a_config_that_calls_dense_weights_quantised_is_refused(layout):
    """Engines would look for scales, and some of them take what lies in memory where there are none."""
    config, tensors = model("llama")
    with pytest.raises(RecipeError, match="says quantization_config, and no matrix is quantised"):
        fastckpt.reshard(tensors, layout=layout, config=config | {"quantization_config": FP8})


def test_what_a_tied_name_would_lose_is_refused(tmp_path):
    tensors = {"a.q_proj.weight": torch.randn(8, 8)}
    tensors["b.q_proj.weight"] = tensors["a.q_proj.weight"]
    with pytest.raises(LayoutError, match="tied"):
        fastckpt.reshard(tensors, layout="same", quant="int8")


@pytest.mark.parametrize("scheme", list(quant_oracle.BLOCKS))
def test_the_config_tells(tmp_path, scheme):
    config, tensors = model("mixtral")
    fastckpt.reshard(tensors, config=config, quant=scheme, out=tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: told[k] for k in config} == config
    said = told["quantization_config"]
    left = ["model.embed_tokens", "model.layers.0.block_sparse_moe.gate", "lm_head"]
    if scheme == "fp8-block":
        assert said["quant_method"] == "fp8" and said["weight_block_size"] == [128, 128]
        assert said["modules_to_not_convert"] == left
    elif "dynamic" in scheme:
        assert said == {"quant_method": "fastckpt", "scheme": scheme}
    else:
        assert said["quant_method"] == "compressed-tensors" and said["ignore"] == left
        weights = said["config_groups"]["group_0"]["weights"]
        assert weights["num_bits"] == (4 if scheme in PACKED else 8)
        assert weights["type"] == ("int" if scheme.startswith("int") else "float")
        assert weights.get("scale_dtype") == ("torch.uint8" if scheme.startswith("mx") else None)


def test_ranks_made_one_by_one_are_one_set(tmp_path):
    config, tensors = model("llama")
    fastckpt.reshard(tensors, 2, config=config, quant="int8", out=tmp_path / "all")
    for rank in (1, 0):
        fastckpt.reshard(tensors, 2, config=config, quant="int8", rank=rank, out=tmp_path / "each")
    assert fastckpt.verify(tmp_path / "each").ok
    for path in sorted((tmp_path / "all").rglob("*")):
        if path.is_file() and path.name != "fastckpt.json":
            assert path.read_bytes() == (tmp_path / "each" / path.relative_to(tmp_path / "all")).read_bytes()


def test_the_oracle_is_torch_aos():
    """quantize_dynamic's own values, scales and zero points."""
    quantization = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(3)
    linear = torch.nn.Linear(300, 77)
    for scheme, config in (
        ("int8-dynamic", quantization.default_dynamic_qconfig),
        ("int8-dynamic-channel", quantization.per_channel_dynamic_qconfig),
    ):
        made = quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear: config})[
            0
        ].weight()
        got = fastckpt.reshard(
            {"a.weight": linear.weight.detach()}, layout="same", quant=Quant(SCHEMES[scheme], ("*",))
        )
        assert torch.equal(got[0]["a.weight"], made.int_repr())
        if scheme == "int8-dynamic":
            assert float(got[0]["a.weight_scale"]) == made.q_scale()
            assert int(got[0]["a.weight_zero_point"]) == made.q_zero_point()
        else:
            assert torch.equal(got[0]["a.weight_scale"].double(), made.q_per_channel_scales())
            assert torch.equal(got[0]["a.weight_zero_point"], made.q_per_channel_zero_points())
    assert np.finfo(np.float32).eps == SCHEMES["int8-dynamic"].floor
