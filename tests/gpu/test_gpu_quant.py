"""Quantised tensors on a GPU: those that a GPU makes are the CPU's, byte for byte, whatever lies where."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastckpt
import pytest
import torch
from fastckpt.errors import DeviceError
from fastckpt.quantisation.schemes import SCHEMES, Quant
from fastckpt.running import gpu_quantising
from fastckpt.running.quantising import Quantising
from safetensors.torch import save_file

PLAN = {"*q_proj.weight": "colwise", "*down_proj.weight": "rowwise", "*": "replicate"}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Matrices with zeros and small values in them, a norm, and one that is no matrix for quantising."""
    torch.manual_seed(3)
    held = {
        "a.q_proj.weight": torch.randn(768, 1280),
        "b.down_proj.weight": torch.randn(256, 1024) * torch.exp2(torch.randint(-30, 8, (256, 1)).float()),
        "norm": torch.randn(5),
        "wide": torch.randn(90, 80),
    }
    held["a.q_proj.weight"][128:256, :256] = 0
    return {n: t.to(dtype) for n, t in held.items()}


def compare(got: list[dict[str, torch.Tensor]], wanted: list[dict[str, torch.Tensor]]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert list(a) == list(b)
        for name in b:
            assert a[name].device.type == "cuda" and a[name].dtype == b[name].dtype
            assert a[name].shape == b[name].shape, name
            left, right = (t.cpu().reshape(-1).view(torch.uint8) for t in (a[name], b[name]))
            assert torch.equal(left, right), name


def there(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.to("cuda") for n, t in held.items()}


def same(held: dict[str, torch.Tensor], world: int, **options: object) -> None:
    """What the GPU makes of weights that lie there, the CPU not asked, is what the CPU makes."""
    wanted = fastckpt.reshard(held, world, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_quantising, "BAND", 1 << 20)
        patch.setattr(Quantising, "worker", None)
        compare(fastckpt.reshard(there(held), world, device="cuda", **options), wanted)


@pytest.mark.parametrize("quant", [name for name, scheme in SCHEMES.items() if not scheme.stacks])
def test_every_scheme(quant: str) -> None:
    """Cut by rows and by columns, from where the weights lie, and cast into bands on the way."""
    for dtype in (None, "bfloat16"):
        same(weights(), 2, layout="hf", tp_plan=PLAN, quant=quant, dtype=dtype)


@pytest.mark.parametrize("quant", ["int8", "fp8", "fp8-block", "int8-dynamic"])
def test_stacks(quant: str) -> None:
    held = {"m.w13_weight": torch.randn(5, 256, 384), "m.w2_weight": torch.randn(5, 384, 128).half()}
    held["m.w13_weight"][3] = 0
    same(held, 1, layout="same", quant=quant)
    turned = {n: t.mT.contiguous().mT for n, t in held.items()}
    same(turned, 1, layout="same", quant=quant)


def test_the_stacks_of_gpt_oss() -> None:
    at = "m.mlp.experts."
    held = {
        f"{at}gate_up_proj": torch.randn(5, 256, 384),
        f"{at}down_proj": torch.randn(5, 192, 256).bfloat16(),
    }
    held |= {f"{n}_bias": torch.randn(5, t.shape[2]) for n, t in held.items()}
    same(held, 1, layout="same", quant="mxfp4-experts")


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "head_dim": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
LAYER = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (512, 256),
    "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
    "input_layernorm": (256,),
    "post_attention_layernorm": (256,),
}


def llama() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens": (96, 256), "model.norm": (256,), "lm_head": (96, 256)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in LAYER.items()}
    return {f"{n}.weight": torch.randn(s).to(torch.bfloat16) for n, s in shapes.items()}


@pytest.mark.parametrize(
    "quant, world", [("fp8-block", 1), ("int8", 2), ("fp8-channel", 2), ("awq-group", 2)]
)
def test_fused_matrices(quant: str, world: int) -> None:
    """q, k, v and gate, up lie apart and become one."""
    same(llama(), world, layout="vllm", config=LLAMA, quant=quant)


@pytest.mark.parametrize("layout, quant", [("vllm", "fp8"), ("rtp_llm", "int8"), ("rtp_llm", "fp8-channel")])
def test_what_is_quantised_before_the_layout_is_refused(layout: str, quant: str) -> None:
    held = there(llama())
    with pytest.raises(DeviceError, match=r"quantising before the layout .* bring them to the CPU first"):
        fastckpt.reshard(held, 2, layout=layout, config=LLAMA, quant=quant, device="cuda")
    with pytest.raises(DeviceError, match="quantising before the layout"):
        fastckpt.prepare(held, 2, layout=layout, config=LLAMA, quant=quant)


@pytest.mark.parametrize("quant", ["int8", "fp8", "fp8-block", "int4-group", "gptq-group"])
def test_what_is_not_finite_is_named(quant: str) -> None:
    held = there(weights())
    held["b.down_proj.weight"][77, 500] = float("nan")
    with pytest.raises(fastckpt.SourceError, match=r"b\.down_proj\.weight: NaN or infinite"):
        fastckpt.reshard(held, 2, layout="hf", tp_plan=PLAN, quant=quant, device="cuda")


def test_the_callers_tensors_and_weights_on_their_way() -> None:
    held = weights()
    options = {"layout": "hf", "tp_plan": PLAN, "quant": "fp8-block", "dtype": "bfloat16"}
    wanted = fastckpt.reshard(held, 2, rank=1, **options)
    out = {n: torch.full(t.shape, 1, dtype=torch.uint8, device="cuda").view(t.dtype) if t.element_size() == 1
           else torch.full(t.shape, 3, dtype=t.dtype, device="cuda") for n, t in wanted.items()}  # fmt: skip
    source = {n: torch.zeros_like(t) for n, t in there(held).items()}
    torch.cuda._sleep(50_000_000)
    for name, t in there(held).items():
        source[name].copy_(t)
    report = fastckpt.reshard(source, 2, rank=1, device="cuda", out=out, **options)
    assert isinstance(report, fastckpt.Report) and report.errors == {}
    compare([out], [wanted])


@pytest.mark.parametrize("quant, dtype", [("fp8-block", None), ("fp8", "bfloat16"), ("awq-group", None)])
def test_a_hot_reload_quantises_again(quant: str, dtype: str | None) -> None:
    source = there(weights())
    options = {"layout": "hf", "tp_plan": PLAN, "quant": quant, "dtype": dtype}
    ready = fastckpt.prepare(source, 2, rank=0, **options)
    at = {n: t.data_ptr() for n, t in ready.out[0].items()}
    for scale in (1.0, 0.01, 30.0):
        for t in source.values():
            t.copy_(t * scale)
        ready.run()
        now = {n: t.cpu() for n, t in source.items()}
        compare(list(ready.out), [fastckpt.reshard(now, 2, rank=0, **options)])
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(DeviceError, match="quantising waits"):
        ready.run()
    source["a.q_proj.weight"][5, 7] = float("inf")
    with pytest.raises(fastckpt.SourceError, match=r"a\.q_proj\.weight"):
        ready.run()
    source["a.q_proj.weight"][5, 7] = 1.0
    ready.run()
    assert at == {n: t.data_ptr() for n, t in ready.out[0].items()}


@pytest.mark.parametrize("within", [torch.inference_mode, lambda: torch.device("cuda")])
def test_within_what_servers_set(tmp_path: Path, within: Callable[[], Any]) -> None:
    """What was made ready in inference mode runs outside it too, and the CPU's values are put there."""
    held = weights()
    save_file(held, tmp_path / "model.safetensors")
    source, options = there(held), {"layout": "hf", "tp_plan": PLAN, "quant": "fp8"}
    with within():
        ready = fastckpt.prepare(source, 2, rank=0, **options)
        sent = fastckpt.reshard(tmp_path, 2, device="cuda", **options)
        ready.run()
    with ThreadPoolExecutor(1) as pool:  # a thread whose current GPU is the first
        pool.submit(ready.run).result()
    wanted = fastckpt.reshard(held, 2, **options)
    compare(list(ready.out), wanted[:1])
    compare(sent, wanted)


@pytest.mark.parametrize("quant", ["fp8-block", "int4-group-zero"])
def test_the_record_of_the_files_holds(tmp_path: Path, quant: str) -> None:
    """What a GPU made has the digests of the files that the CPU made."""
    options = {"layout": "hf", "tp_plan": PLAN, "quant": quant}
    fastckpt.reshard(weights(), 2, out=tmp_path / "out", **options)
    made = fastckpt.reshard(there(weights()), 2, rank=1, device="cuda", **options)
    assert fastckpt.verify_tensors(made, tmp_path / "out", rank=1).ok
    made["a.q_proj.weight" if quant == "fp8-block" else "a.q_proj.weight_packed"].view(torch.uint8)[3, 4] ^= 1
    assert not fastckpt.verify_tensors(made, tmp_path / "out", rank=1).ok


def test_a_scheme_without_a_kernel() -> None:
    """It is quantised by the CPU; what was to be made ready for the GPU is refused."""
    odd = Quant(replace(SCHEMES["fp8-block"], name="mine", block=(64, 64)))
    held = {"a.q_proj.weight": torch.randn(128, 192)}
    wanted = fastckpt.reshard(held, layout="hf", tp_plan=PLAN, quant=odd)
    compare(fastckpt.reshard(there(held), layout="hf", tp_plan=PLAN, quant=odd, device="cuda"), wanted)
    with pytest.raises(DeviceError, match="no kernel there for quantisation scheme mine"):
        fastckpt.prepare(there(held), layout="hf", tp_plan=PLAN, quant=odd)


@pytest.mark.parametrize("quant", ["int8", "fp8-block", "int4-group"])
def test_by_the_cpu_from_files(tmp_path: Path, quant: str) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    options = {"layout": "hf", "tp_plan": PLAN, "quant": quant}
    wanted = fastckpt.reshard(tmp_path, 2, **options)
    compare(fastckpt.reshard(tmp_path, 2, device="cuda", threads=3, **options), wanted)
