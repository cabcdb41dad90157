"""PEFT adapters: merged on the way in every layout, cut as the layout cuts the base, refused where unread."""

from __future__ import annotations

import json
from pathlib import Path

import fastckpt
import peft_writer
import pytest
import torch
import torch.distributed.checkpoint
from fastckpt.cli import main
from fastckpt.computed.adapters import Adapter
from fastckpt.errors import FastckptError, LayoutError, SourceError
from fastckpt.layouts import layout as layout_of
from layouts import families, tiny
from outputs import hub_directory
from peft_writer import PREFIX, settings, thin, write
from reading import equal
from safetensors.torch import load_file
from zero_writer import write_zero

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def llama_like(tmp_path, name="qwen3", **options):
    """(base directory, its config, its tensors, {module: (A, B)}) of a tiny model."""
    config, tensors, _ = tiny.made(name)
    modules = [f"model.layers.{i}.{m}" for i in range(2) for m in MODULES]
    return (
        hub_directory(tmp_path / "base", config, tensors),
        config,
        tensors,
        thin(tensors, modules, **options),
    )


def whole(tensors, pairs, alpha=6, **options):
    """The merged model in torch, in the base's dtypes."""
    out = dict(tensors)
    for module, (a, b) in pairs.items():
        name = f"{module}.weight"
        out[name] = peft_writer.merged(tensors[name], a, b, alpha, **options).to(tensors[name].dtype)
    return out


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])  # float32 and bfloat16
@pytest.mark.parametrize("layout", ["hf", "vllm", "rtp_llm", "megatron"])
def test_merged_is_the_merged_model_in_every_layout(tmp_path, name, layout):
    """What a layout makes of base and adapter is what it makes of the merged model."""
    base, config, tensors, pairs = llama_like(tmp_path, name)
    adapter = write(tmp_path / "adapter", settings(), pairs)
    want = fastckpt.reshard(whole(tensors, pairs), tp=2, config=config, layout=layout)
    for got, one in zip(fastckpt.reshard(base, tp=2, layout=layout, adapter=adapter), want, strict=True):
        equal(got, one)


def test_the_modules_are_listed_a_few_times_however_many_there_are(tmp_path, monkeypatch):
    """Not once for each of them: experts by the thousand may have an adapter."""
    base, _, _, pairs = llama_like(tmp_path)
    adapter, listed, adapted = write(tmp_path / "adapter", settings(), pairs), [], Adapter.adapted.fget
    monkeypatch.setattr(Adapter, "adapted", property(lambda self: listed.append(1) or adapted(self)))
    fastckpt.plan(base, adapter=adapter)
    assert len(listed) < 8 < len(pairs)


def test_rounded_once(tmp_path):
    base, _, tensors, pairs = llama_like(tmp_path)
    adapter = write(tmp_path / "adapter", settings(use_rslora=True, lora_alpha=3), pairs)
    got = fastckpt.reshard(base, layout="same", adapter=adapter, dtype="bfloat16")[0]
    equal(got, {n: x.bfloat16() for n, x in whole(tensors, pairs, 3, rslora=True).items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3", "qwen2"])  # float32 and bfloat16
def test_a_module_is_filled_with_the_merged_model(tmp_path, name, dtype):
    """Rounded once, to the module's dtype, whatever the base's is."""
    base, _, tensors, pairs = llama_like(tmp_path, name)
    adapter = write(tmp_path / "adapter", settings(), pairs)
    wide = whole({n: x.float() for n, x in tensors.items()}, pairs)
    module = torch.nn.Module()
    for key, x in tensors.items():
        *path, leaf = key.split(".")
        at = module
        for part in path:
            at = getattr(at, part, None) or at.register_module(part, torch.nn.Module()) or getattr(at, part)
        at.register_parameter(leaf, torch.nn.Parameter(torch.empty(x.shape, dtype=dtype), False))
    fastckpt.load_into(module, base, adapter=adapter)
    equal(module.state_dict(), {n: x.to(dtype) for n, x in wide.items()})


@pytest.mark.parametrize("safe", [False, True])
def test_consolidated_is_the_merged_model(tmp_path, safe):
    base, _, tensors, pairs = llama_like(tmp_path, "qwen2")
    adapter = write(tmp_path / "adapter", settings(), pairs)
    want = whole({n: x.float() for n, x in tensors.items()}, pairs)
    fastckpt.consolidate(base, tmp_path / "out", adapter=adapter, safe_serialization=safe, durable=False)
    load = load_file if safe else torch.load
    equal(load(tmp_path / "out" / f"{'model.safetensors' if safe else 'pytorch_model.bin'}"), want)
    equal(fastckpt.consolidate(base, adapter=adapter), want)
    said = ["consolidate", str(base), str(tmp_path / "cli"), "--adapter", str(adapter), "-q"]
    assert main([*said, "--safe-serialization"]) == 0
    equal(load_file(tmp_path / "cli" / "model.safetensors"), want)


def test_files_on_any_number_of_threads(tmp_path):
    base, config, tensors, pairs = llama_like(tmp_path)
    adapter = write(tmp_path / "adapter", settings(), pairs)
    report = fastckpt.reshard(
        base, layout="hf", adapter=adapter, out=tmp_path / "out", threads=3, durable=False
    )
    assert any("14 modules merged, 0 tensors replaced" in n for n in report.notes)
    assert report.bytes_needed is None
    equal(load_file(tmp_path / "out" / "model.safetensors"), whole(tensors, pairs))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    again = fastckpt.reshard(base, layout="hf", adapter=adapter, out=tmp_path / "b", threads=1, durable=False)
    assert again.digests == report.digests and again.key == report.key
    plain = fastckpt.reshard(base, layout="hf", out=tmp_path / "c", durable=False)
    assert plain.key != report.key


def test_ranks_and_alphas_of_their_own(tmp_path):
    base, _, tensors, _ = llama_like(tmp_path)
    modules = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qo"]
    ranks = {modules[0]: 2, modules[2]: 2, modules[3]: 7}
    config = settings(
        rank_pattern={"layers.0.*": 4, "q_proj": 2, "layers.1.self_attn.o_proj": 7},
        alpha_pattern={"^model.layers.0.*": 5, "0.self_attn.q_proj": 5},
    )
    pairs = thin(tensors, modules, ranks=ranks)
    got = fastckpt.reshard(base, layout="same", adapter=write(tmp_path / "adapter", config, pairs))[0]
    for module, (a, b) in pairs.items():
        alpha = 6  # "^" stands inside (.*\.)?(...)$, where it matches at the start of the name
        alpha = 5 if module.startswith("model.layers.0.") else alpha
        name = f"{module}.weight"
        assert torch.equal(got[name], peft_writer.merged(tensors[name], a, b, alpha)), name


def test_saved_modules_biases_and_embeddings(tmp_path):
    base, _, tensors, _ = llama_like(tmp_path, "biased")
    torch.manual_seed(3)
    table = "model.embed_tokens"
    rows, width = tensors[f"{table}.weight"].shape
    pairs = {table: (torch.randn(4, rows), torch.randn(width, 4))}
    names = ("lm_head.weight", "model.layers.0.self_attn.q_proj.bias", f"{table}.weight")
    saved = {n: torch.randn(tensors[n].shape) for n in names}
    # PEFT saves the table that it adapts beside the pair, under the name of the layer within.
    files = {n.replace("tokens.", "tokens.base_layer."): x for n, x in saved.items()}
    adapter = write(tmp_path / "adapter", settings(bias="all"), pairs, files, tables=(table,))
    want = tensors | saved
    want[f"{table}.weight"] = peft_writer.merged(saved[f"{table}.weight"], *pairs[table], 6, flipped=True)
    equal(fastckpt.reshard(base, layout="same", adapter=adapter)[0], want)
    written = load_file(adapter / "adapter_model.safetensors")
    for rank, got in enumerate(fastckpt.reshard(base, tp=2, adapter=adapter, apart=True)):
        cut = {n: x.chunk(2, 1)[rank] if n.endswith("_A") else x.chunk(2)[rank] for n, x in written.items()}
        cut[f"{PREFIX}{table}.lora_embedding_B"] = written[f"{PREFIX}{table}.lora_embedding_B"]
        equal(got, cut)


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize(("name", "turned"), [("gpt2", True), ("gpt_bigcode", False), ("llama", False)])
def test_square_matrices_are_turned_as_the_base_lies(tmp_path, name, turned, said):
    """PEFT 0.21 goes by the module: fan_in_fan_out is that of the one it wrapped last, or, where the base was
    quantised, what was asked for."""
    hidden, q, o = 16, "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"
    rows = {"gpt2": 3 * hidden, "gpt_bigcode": hidden + 8, "llama": hidden}[name]
    if name == "llama":
        q, o = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    torch.manual_seed(1)
    tensors = {f"{q}.weight": torch.randn(rows, hidden), f"{o}.weight": torch.randn(hidden, hidden)}
    if turned:
        tensors[f"{q}.weight"] = tensors[f"{q}.weight"].T.contiguous()
    tensors["lm_head.weight"] = torch.randn(hidden, hidden)  # plain in every model
    pairs = {
        o: (torch.randn(4, hidden), torch.randn(hidden, 4)),
        q: (torch.randn(4, hidden), torch.randn(rows, 4)),
    }
    pairs["lm_head"] = torch.randn(4, hidden), torch.randn(hidden, 4)
    adapter = write(tmp_path / "adapter", settings(fan_in_fan_out=said), pairs)
    want = {
        f"{m}.weight": peft_writer.merged(tensors[f"{m}.weight"], *pair, 6, flipped=turned and m != "lm_head")
        for m, pair in pairs.items()
    }
    equal(fastckpt.reshard(tensors, layout="same", adapter=adapter)[0], want)


def test_transposed_and_fused_matrices(tmp_path):
    config, tensors, _ = tiny.made("gpt2")
    base = hub_directory(tmp_path / "base", config, tensors)
    modules = [f"transformer.h.{i}.{m}" for i in range(2) for m in ("attn.c_attn", "mlp.c_proj")]
    pairs = thin(tensors, modules, flipped=True)
    adapter = write(tmp_path / "adapter", settings(fan_in_fan_out=True), pairs)
    merged = whole(tensors, pairs, flipped=True)
    for layout in ("hf", "vllm"):
        want = fastckpt.reshard(merged, tp=4, config=config, layout=layout)
        for got, one in zip(fastckpt.reshard(base, tp=4, layout=layout, adapter=adapter), want, strict=True):
            equal(got, one)
    config, tensors, _ = families.made("falcon-new")
    base = hub_directory(tmp_path / "falcon", config, tensors)
    pairs = thin(tensors, [f"transformer.h.{i}.self_attention.query_key_value" for i in range(2)])
    adapter = write(tmp_path / "other", settings(), pairs)
    want = fastckpt.reshard(whole(tensors, pairs), tp=2, config=config, layout="vllm")
    for got, one in zip(fastckpt.reshard(base, tp=2, layout="vllm", adapter=adapter), want, strict=True):
        equal(got, one)


def adapted(tensors, pairs, saved, name="default"):
    """The state dict of a PEFT model in training."""
    out = {}
    for n, x in tensors.items():
        module = n.removesuffix(".weight")
        if module in pairs:
            out[f"{PREFIX}{module}.base_layer.weight"] = x
            for half, y in zip("AB", pairs[module], strict=True):
                out[f"{PREFIX}{module}.lora_{half}.{name}.weight"] = y
        elif n in saved:
            out[f"{PREFIX}{module}.original_module.weight"] = x
            out[f"{PREFIX}{module}.modules_to_save.{name}.weight"] = saved[n]
        else:
            out[f"{PREFIX}{n}"] = x
    return out


def test_a_checkpoint_of_the_adapted_model(tmp_path):
    """As DeepSpeed saves it, base and adapter in one; also the adapter alone again, as PEFT's file."""
    _, config, tensors, pairs = llama_like(tmp_path)
    saved = {"lm_head.weight": torch.randn(tensors["lm_head.weight"].shape)}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings(init_lora_weights="pissa")))
    state = adapted(tensors, pairs, saved)
    got = fastckpt.reshard(state, tp=2, config=config, layout="vllm", adapter=tmp_path / "adapter")
    want = fastckpt.reshard(whole(tensors, pairs) | saved, tp=2, config=config, layout="vllm")
    for a, b in zip(got, want, strict=True):
        equal(a, b)
    alone = fastckpt.reshard(state, config=config, adapter=tmp_path / "adapter", apart=True)[0]
    written = load_file(write(tmp_path / "x", settings(), pairs, saved) / "adapter_model.safetensors")
    equal(alone, written)
    with pytest.raises(FastckptError, match=r"is an adapter's; adapter= \(--adapter DIR\)"):
        fastckpt.reshard(state, config=config)
    base = {n: x for n, x in state.items() if ".modules_to_save." not in n}
    first = f"{PREFIX}{next(iter(pairs))}.weight"
    for odd, adapter, words in (
        (state, "x", r"holds an adapter \(.*\), and .*/x another; open the base alone"),
        (base, "adapter", r"nothing takes the place of .*lm_head\.original_module\.weight"),
        (state | {first: torch.ones(2)}, "adapter", r"q_proj\.weight is a second model\..*q_proj\.weight of"),
    ):
        with pytest.raises(SourceError, match=words):
            fastckpt.reshard(odd, config=config, adapter=tmp_path / adapter)
    trained = {n: x for n, x in state.items() if ".lora_" in n or ".modules_to_save." in n}
    with pytest.raises(FastckptError, match=r"whose base is not here; open the base"):
        fastckpt.reshard(trained)
    with pytest.raises(SourceError, match="several adapters: default, other"):
        more = {n.replace("default", "other"): x for n, x in state.items() if ".default." in n}
        fastckpt.reshard(state | more, config=config, adapter=tmp_path / "adapter")


def test_apart_each_rank_has_what_it_has_of_the_base(tmp_path):
    base, _, tensors, pairs = llama_like(tmp_path, "qwen2")
    saved = {"lm_head.weight": torch.randn(tensors["lm_head.weight"].shape).bfloat16()}
    adapter = write(tmp_path / "adapter", settings(), pairs, saved)
    out = tmp_path / "out"
    fastckpt.reshard(base, tp=2, adapter=adapter, apart=True, out=out, durable=False)
    assert json.loads((out / "adapter_config.json").read_text()) == settings()
    assert not (out / "config.json").exists()
    for rank in range(2):
        want = {f"{PREFIX}lm_head.weight": saved["lm_head.weight"].chunk(2)[rank]}
        for module, (a, b) in pairs.items():
            rows = module.endswith(("o_proj", "down_proj"))
            want[f"{PREFIX}{module}.lora_A.weight"] = a.chunk(2, 1)[rank] if rows else a
            want[f"{PREFIX}{module}.lora_B.weight"] = b if rows else b.chunk(2)[rank]
        equal(load_file(out / f"rank-{rank:02d}" / "adapter_model.safetensors"), want)
    rows, width = tensors["lm_head.weight"].shape
    head = write(tmp_path / "head", settings(), {"lm_head": (torch.ones(4, width), torch.ones(rows, 4))})
    padded = layout_of("hf", {"pad": "true", "vocab_padding": "7"})
    with pytest.raises(LayoutError, match=r"lm_head\.weight \(70, 64\) holds more than a part of lm_head"):
        fastckpt.reshard(base, tp=3, adapter=head, apart=True, layout=padded)
    fastckpt.reshard(base, adapter=adapter, apart=True, out=tmp_path / "one", durable=False)
    equal(
        load_file(tmp_path / "one" / "adapter_model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )


def test_apart_follows_fused_matrices(tmp_path):
    """B's rows are those that the rank holds of the fused matrix."""
    config, tensors, _ = families.made("bloom")
    base = hub_directory(tmp_path / "base", config, tensors)
    name = "transformer.h.1.self_attention.query_key_value"
    pairs = thin(tensors, [name])
    a, b = pairs[name]
    adapter = write(tmp_path / "adapter", settings(), pairs)
    for rank, got in enumerate(fastckpt.reshard(base, tp=4, adapter=adapter, apart=True)):
        heads = b.view(8, 3 * 8, 4)[2 * rank : 2 * rank + 2].reshape(-1, 4)
        equal(got, {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": heads})


def test_an_adapter_by_itself(tmp_path):
    _, _, _, pairs = llama_like(tmp_path)
    adapter = write(tmp_path / "adapter", settings(), pairs)
    found = fastckpt.open(adapter)
    assert found.format == "peft" and found.facts["lora_alpha"] == 6 and len(found) == 28
    fastckpt.reshard(adapter, layout="same", dtype="float16", out=tmp_path / "half", durable=False)
    got = load_file(tmp_path / "half" / "model.safetensors")
    assert {x.dtype for x in got.values()} == {torch.float16} and len(got) == 28


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_adapter_saved_by_accelerate_under_fsdp(tmp_path):
    """adapter_only: torch.distributed.checkpoint in place of PEFT's file."""
    base, _, _, pairs = llama_like(tmp_path)
    adapter = write(tmp_path / "adapter", settings(), pairs)
    want = fastckpt.reshard(base, adapter=adapter, layout="hf", rank=0)
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.distributed.checkpoint.save({"model": weights}, checkpoint_id=adapter / "pytorch_model_fsdp_0")
    equal(fastckpt.reshard(base, adapter=adapter, layout="hf", rank=0), want)


STACKS = ["gate_up_proj", "experts.up_proj", "experts.down_proj", "gate.weight"]


def trained(name, turned=False, rank=4):
    """(config, hub's tensors, those in training, pairs, those in training merged) of a model with experts,
    whose stacks and routers are adapted."""
    config, files, state = (tiny if name in tiny.MODELS else families).made(name)
    pairs, wrappers = peft_writer.stacked(state, turned, rank)
    routers = [n.removesuffix(".weight") for n in state if n.endswith(".gate.weight")]
    pairs |= thin(state, routers, rank)
    want = dict(state)
    for stack, wrapper in wrappers.items():
        made = peft_writer.merged_stack(state[stack], *pairs[wrapper], 6, turned)
        want[stack] = made.to(state[stack].dtype)
    for module in routers:
        weight = state[f"{module}.weight"]
        want[f"{module}.weight"] = peft_writer.merged(weight, *pairs[module], 6).to(weight.dtype)
    assert wrappers and all(not torch.equal(want[n], state[n]) for n in wrappers)
    return config, files, state, pairs, want


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
def test_a_router_that_is_never_rounded(tmp_path, held):
    """ERNIE's: the base's own bytes, whatever is asked for, and merged what the sum is in float32."""
    config, files, _ = families.made("ernie4_5_moe")
    router = "model.layers.0.mlp.gate"
    base = files | {f"{router}.weight": files[f"{router}.weight"].to(held)}
    pairs = thin(base, [router])
    asked = {"config": config, "layout": "hf", "dtype": "bfloat16", "rank": 0}
    assert torch.equal(fastckpt.reshard(base, **asked)[f"{router}.weight"], base[f"{router}.weight"])
    got = fastckpt.reshard(base, adapter=write(tmp_path / "adapter", settings(), pairs), **asked)
    wide = peft_writer.merged(base[f"{router}.weight"], *pairs[router], 6)
    assert got[f"{router}.weight"].dtype == torch.float32
    assert torch.equal(got[f"{router}.weight"], wide.float())


@pytest.mark.parametrize(
    ("name", "turned"),
    [
        *[
            (name, False)
            for name in ("qwen3_moe", "mixtral", "deepseek_v3", "hy_v3", "lfm2_moe", "nemotron_h")
        ],
        ("gpt_oss", True),
        ("gpt_oss", False),  # as PEFT 0.19
        ("mixtral", True),  # as PEFT 0.17 and 0.18
    ],
)
def test_stacks_of_experts(tmp_path, name, turned):
    """target_parameters, over the hub's spelling and the one in training, in every layout."""
    config, files, state, pairs, want = trained(name, turned)
    adapter = write(tmp_path / "adapter", settings(target_parameters=STACKS), pairs)
    base = hub_directory(tmp_path / "base", config, files)
    equal(fastckpt.reshard(state, config=config, layout="same", adapter=adapter)[0], want)
    saved = fastckpt.reshard(want, config=config, layout="hf")[0]
    bases = [state]
    if name != "nemotron_h":  # whose hub has another root
        bases.append(base)
        for layout in ("same", "hf"):
            equal(fastckpt.reshard(base, layout=layout, adapter=adapter)[0], saved)
    for layout in ("hf", "vllm"):
        merged = fastckpt.reshard(want, tp=2, config=config, layout=layout)
        for one in bases:
            made = fastckpt.reshard(one, tp=2, config=config, layout=layout, adapter=adapter)
            for got, rank in zip(made, merged, strict=True):
                equal(got, rank)


def test_stacks_with_ranks_of_their_own(tmp_path):
    """As PEFT writes it where gate and up were asked for apart."""
    config, files, state, pairs, _ = trained("qwen3_moe")
    patterns = dict(rank_pattern={r".*\.gate_up_proj": 8}, alpha_pattern={r".*\.gate_up_proj": 12})
    wide, wrappers = peft_writer.stacked(state, False, 8)
    want = dict(state)
    for stack, wrapper in wrappers.items():
        rank, alpha = (8, 12) if stack.endswith("gate_up_proj") else (4, 6)
        pairs[wrapper] = (wide if rank == 8 else pairs)[wrapper]
        want[stack] = peft_writer.merged_stack(state[stack], *pairs[wrapper], alpha, False)
    pairs = {m: pair for m, pair in pairs.items() if m in wrappers.values()}
    targets = ["gate_up_proj", "down_proj"]
    adapter = write(tmp_path / "adapter", settings(target_parameters=targets, **patterns), pairs)
    got = fastckpt.reshard(hub_directory(tmp_path / "base", config, files), layout="hf", adapter=adapter)[0]
    equal(got, fastckpt.reshard(want, config=config, layout="hf")[0])


def test_stacks_that_were_trained_with_their_base(tmp_path):
    config, _, state, pairs, want = trained("qwen3_moe")
    both = {}
    for name, x in state.items():
        module, _, leaf = name.rpartition(".")
        depth = sum(m in pairs for m in (module, f"{module}.base_layer"))
        both[f"{PREFIX}{module}{'.base_layer' * depth}.{leaf}"] = x
    for module, pair in pairs.items():
        both |= {
            f"{PREFIX}{module}.lora_{half}.default.weight": x for half, x in zip("AB", pair, strict=True)
        }
    (tmp_path / "adapter").mkdir()
    said = json.dumps(settings(target_parameters=STACKS))
    (tmp_path / "adapter" / "adapter_config.json").write_text(said)
    got = fastckpt.reshard(both, config=config, layout="same", adapter=tmp_path / "adapter")[0]
    equal(got, want)
    with pytest.raises(LayoutError, match="is merged, not kept apart"):
        fastckpt.reshard(both, config=config, adapter=tmp_path / "adapter", apart=True)


def test_stacks_that_do_not_fit(tmp_path):
    config, files, state, pairs, _ = trained("qwen3_moe")
    base = hub_directory(tmp_path / "base", config, files)
    outer, inner = (f"model.layers.1.mlp.experts{at}" for at in ("", ".base_layer"))
    pairs = {m: pairs[m] for m in (outer, inner)}
    (a, b), count = pairs[outer], len(state[f"{outer}.down_proj"])
    square = {inner: torch.ones(count, 64, 64), outer: torch.ones(count, 64, 64)}
    number = 0

    def refused(message, changed, bases=(base, state), saved=None, **said):
        nonlocal number
        number += 1
        said = settings(**{"target_parameters": STACKS, **said})
        adapter = write(tmp_path / f"adapter-{number}", said, pairs | changed, saved)
        for one in bases:
            with pytest.raises(FastckptError, match=message):
                fastckpt.reshard(one, config=config, layout="same", adapter=adapter)

    refused(f"wanted rows for {count} experts", {outer: (a[:-1], b[:, :-1])})
    refused("has rank 3, the config says 4", {outer: (a[:-count], b[:, :-count])})
    refused("are no pair", {outer: (a, b[:, :-count])})
    refused("does not fit", {outer: (a, b[:-1])})
    refused("does not fit", {outer: pairs[inner], inner: (a, b)})
    refused("has B alone", {}, saved={f"{outer.replace('1', '0')}.lora_B.weight": b.clone()})
    refused("is float8_e4m3fn", {outer: (a.to(torch.float8_e4m3fn), b)})
    refused("are none of the base", {}, target_parameters=None)
    refused("are .*down_proj of the base", {}, target_parameters=["experts.down_proj"])
    refused("wanted names", {}, target_parameters="experts.down_proj")
    single = f"{outer}.2.down_proj"
    one = {single: thin(files, [single])[single]}
    refused(f"second A of {single}", one, bases=(base,))
    refused(f"has no {single}", one, bases=(state,))
    both = {f"{outer}.gate_up_proj": square[inner], f"{outer}.down_proj": square[outer]}
    thins = {m: (torch.ones(4 * count, 64), torch.ones(64, 4 * count)) for m in pairs}
    refused("the shapes do not tell", thins, bases=(both,))
    lacking = {n: x for n, x in files.items() if ".mlp.experts.1." not in n}
    refused("wanted rows for|has rank", {}, bases=(lacking,))


REFUSED = [
    (dict(peft_type="IA3"), "peft_type 'IA3' is not read"),
    (dict(use_dora=True), "use_dora True is not read"),
    (dict(layer_replication=[[0, 1]]), "layer_replication"),
    (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    (dict(something_new=3), "something_new 3 is not read"),
    (dict(init_lora_weights="pissa_niter_4"), "trains against a changed base"),
    (dict(r=5), "has rank 4, the config says 5"),
    (dict(r=0), "r 0: wanted a positive number"),
    (dict(lora_alpha="6"), "lora_alpha '6': wanted a positive number"),
    (dict(rank_pattern={"(": 4}), "no regular expression"),
    (dict(rank_pattern={"(([a-z._0-9]*)*)*X": 4}), "at most 2 groups and 2 repeats, none of a group, are"),
    (dict(rank_pattern={"([a-z]|.)([a-z]|.)([a-z]|.)X": 4}), "is not read: characters"),
    (dict(alpha_pattern={"a?" * 30: 4}), "is not read: characters"),
    (dict(r=4.5), "has rank 4, the config says 4.5"),
    (dict(use_rslora="false"), "use_rslora 'false': wanted true or false"),
    (dict(rank_pattern=[4]), "wanted patterns and numbers"),
    (dict(alpha_pattern={"layers.0.*": 7, "up_proj": 1}), "gives model.layers.0.mlp.up_proj 7 and 1: PEFT"),
    (dict(rank_pattern={"layers.0.*": 7, "up_proj": 1}), "has rank 4, the config says 7 or 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_configs_that_are_not_read(tmp_path, changes, message):
    base, _, tensors, _ = llama_like(tmp_path)
    pairs = thin(tensors, ["model.layers.0.mlp.up_proj"])
    adapter = write(tmp_path / "adapter", settings(**changes), pairs)
    with pytest.raises(SourceError, match=message):
        fastckpt.reshard(base, adapter=adapter, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit(tmp_path):
    base, _, _, pairs = llama_like(tmp_path)
    q = "model.layers.0.self_attn.q_proj"
    a, b = pairs[q]
    number = 0

    def refused(message, pairs, saved=None, tables=(), base=base, **options):
        nonlocal number
        number += 1
        adapter = write(tmp_path / f"adapter-{number}", settings(), pairs, saved, tables)
        with pytest.raises(FastckptError, match=message):
            fastckpt.reshard(base, adapter=adapter, **options)

    refused("has no model.layers.9.x.weight", {"model.layers.9.x": (a, b)})
    refused(r"does not fit .*q_proj\.weight", {q: (a, b[:-1])})
    refused("are no pair", {q: (a[:3], b)})
    refused("hold no element, as a save at ZeRO-3", {q: (a[:0], b[:, :0])})
    refused("hold no element, as a save at ZeRO-3", {q: (torch.zeros(0), torch.zeros(0))})
    refused("A is float8_e4m3fn", {q: (a.to(torch.float8_e4m3fn), b)})
    refused("is not read: DoRA", {q: (a, b)}, {f"{q}.lora_magnitude_vector.weight": torch.ones(3)})
    refused("has B alone", {q: (a, b)}, {f"{q.replace('q_', 'k_')}.lora_B.weight": b.clone()})
    for spelled in (f"{q}.lora_A.default.weight", f"{q}.lora_embedding_A"):
        refused("is a second A of model.layers.0.self_attn.q_proj", {q: (a, b)}, {spelled: a * 2})
    norm = {f"model.{n}": torch.ones(64) for n in ("norm.weight", "norm.modules_to_save.default.weight")}
    refused("is a second model.norm.weight, beside ", {q: (a, b)}, norm)
    refused(r"got shape \(8, 8\)", {}, {"model.norm.weight": torch.ones(8, 8)}, layout="hf")
    refused("has no model.extra", {}, {"model.extra.weight": torch.ones(3)})
    refused("layouts hf and rtp_llm alone", {q: (a, b)}, layout="vllm", apart=True)
    refused("layouts hf and rtp_llm alone", {q: (a, b)}, quant="int8", apart=True)
    refused("quant none: an adapter is merged into what is dense already", {q: (a, b)}, quant="none")
    tied_config, tied, _ = tiny.made("tied")
    other = hub_directory(tmp_path / "tied", tied_config, tied)
    table = "model.embed_tokens"
    rows, width = tied[f"{table}.weight"].shape
    halves = {table: (torch.ones(4, rows), torch.ones(width, 4))}
    refused("is tied", halves, tables=(table,), base=other)
    for layout in ("same", "hf"):  # the config is given, not beside
        refused("is tied", halves, tables=(table,), base=tied, config=tied_config, layout=layout)
    fewer = {"config": tied_config | {"vocab_size": width}, "vocab_size": width, "layout": "hf"}
    refused(
        "lm_head.weight and model.embed_tokens.weight are one tensor",
        halves,
        tables=(table,),
        base=tied,
        **fewer,
    )
    for size in (rows - 2, rows + 2):  # a padded table, a config of before a resize
        resized = tied_config | {"vocab_size": size}
        for held in (tied, tied | {"lm_head.weight": tied[f"{table}.weight"].clone()}):
            refused("is tied", halves, tables=(table,), base=held, config=resized, layout="same")
        refused(
            "is tied",
            {},
            {f"{table}.weight": torch.ones(rows, width)},
            base=tied,
            config=resized,
            layout="same",
        )
    unsaid = hub_directory(
        tmp_path / "unsaid", {k: v for k, v in tied_config.items() if "tie_" not in k}, tied
    )
    for one in (other, unsaid):
        for name in (table, "lm_head"):  # modules_to_save, in any layout
            for layout in ("same", "hf"):
                saved = {f"{name}.weight": torch.ones(rows, width)}
                refused("is tied to another", {}, saved, base=one, layout=layout)
    refused("holds no tensor of an adapter", {})
    beside = write(tmp_path / "beside", settings(), pairs)
    for path in base.iterdir():
        (beside / path.name).symlink_to(path)
    assert fastckpt.open(beside).format == "safetensors"
    for path in (beside, beside / "model.safetensors"):
        with pytest.raises(SourceError, match="holds its adapter already is written nowhere"):
            fastckpt.reshard(path, adapter=beside, layout="same")
    with pytest.raises(LayoutError, match="goes with adapter="):
        fastckpt.reshard(base, apart=True)
    with pytest.raises(SourceError, match=r"adapter_config\.json"):
        fastckpt.reshard(base, adapter=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"adapter_config\.json: is missing; PEFT writes it"):
        fastckpt.reshard(base, adapter=tmp_path / "empty")
    with pytest.raises(SourceError, match="is missing; adapters lie in adapter-1, adapter-10"):
        fastckpt.reshard(base, adapter=tmp_path)
    (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps({"x": "y" * (1 << 20)}))
    with pytest.raises(SourceError, match=r"adapter_config\.json: more than 1048576 bytes of JSON"):
        fastckpt.reshard(base, adapter=tmp_path / "empty")
    with pytest.raises(SourceError, match="holds none either"):
        (tmp_path / "empty" / "adapter_config.json").write_text(json.dumps(settings()))
        fastckpt.reshard(base, adapter=tmp_path / "empty")


def test_what_overflows_is_refused(tmp_path):
    base, _, tensors, _ = llama_like(tmp_path)
    q = "model.layers.0.self_attn.q_proj"
    ones = {q: (torch.full((4, 64), 1e30), torch.full((tensors[f"{q}.weight"].shape[0], 4), 1e30))}
    adapter = write(tmp_path / "adapter", settings(), ones)
    with pytest.raises(SourceError, match="NaN or infinite"):
        fastckpt.reshard(base, adapter=adapter, out=tmp_path / "out", durable=False)
    assert not (tmp_path / "out").exists()


def test_biases_that_were_trained_in_place(tmp_path):
    """bias="all" trains the base's own: a checkpoint of the adapted model does not tell them apart."""
    _, config, tensors, _ = llama_like(tmp_path, "biased")
    pairs = thin(tensors, ["model.layers.0.self_attn.q_proj"])
    state = adapted(tensors, pairs, {})
    bias = "model.layers.0.self_attn.q_proj.bias"
    state[f"{PREFIX}{bias.replace('.bias', '.base_layer.bias')}"] = state.pop(f"{PREFIX}{bias}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings(bias="all")))
    equal(fastckpt.reshard(state, layout="same", adapter=tmp_path / "adapter")[0], whole(tensors, pairs))
    with pytest.raises(SourceError, match="biases were trained with the adapter"):
        fastckpt.reshard(state, config=config, adapter=tmp_path / "adapter", apart=True)


def test_what_peft_wrote_merges_to_what_peft_makes_of_it():
    """tests/fixtures/peft was written by PEFT itself; its numbers are exact in float32."""
    made = Path(__file__).parents[1] / "fixtures" / "peft"
    want = load_file(made / "merged.safetensors")
    got = fastckpt.reshard(made / "base", layout="same", adapter=made / "adapter")[0]
    equal(got, want)
    assert any(not torch.equal(got[n], x) for n, x in load_file(made / "base" / "model.safetensors").items())
    alone = fastckpt.reshard(made / "base", adapter=made / "adapter", apart=True)[0]
    equal(alone, load_file(made / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize(("stage", "world"), [(2, 2), (3, 3)])
def test_what_peft_trains_under_zero(tmp_path, stage, world):
    """The adapted model's names over ZeRO ranks: the base frozen in bfloat16, the adapter as masters."""
    made = Path(__file__).parents[1] / "fixtures" / "peft"
    state = load_file(made / "trained.safetensors")
    frozen = [n for n in state if ".lora_" not in n and "modules_to_save" not in n]
    frozen = [n for n in frozen if not n.endswith("q_proj.base_layer.bias")]  # bias="lora_only"
    write_zero(tmp_path / "zero", state, stage=stage, world=world, frozen=frozen)
    (tmp_path / "zero" / "config.json").write_bytes((made / "base" / "config.json").read_bytes())
    (tmp_path / "adapter").mkdir()
    config = (made / "adapter" / "adapter_config.json").read_bytes()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(config)
    want = fastckpt.reshard(
        made / "merged.safetensors", tp=2, config=made / "base", layout="vllm", dtype="float32"
    )
    got = fastckpt.reshard(
        tmp_path / "zero", tp=2, layout="vllm", dtype="float32", adapter=tmp_path / "adapter"
    )
    for a, b in zip(got, want, strict=True):
        equal(a, b)


def test_on_the_command_line(tmp_path, capsys):
    made, out = Path(__file__).parents[1] / "fixtures" / "peft", tmp_path / "out"
    words = ["reshard", str(made / "base"), str(out), "--adapter", str(made / "adapter"), "-q", "--no-fsync"]
    assert main(words) == 0
    equal(load_file(out / "model.safetensors"), load_file(made / "merged.safetensors"))
    assert main([*words[:2], str(tmp_path / "two"), *words[3:], "--apart", "--tp", "2"]) == 0
    assert (tmp_path / "two" / "rank-01" / "adapter_model.safetensors").exists()
    assert main(["inspect", str(made / "adapter")]) == 0
    assert "lora_alpha" in capsys.readouterr().out
    assert main([*words[:2], str(tmp_path / "x"), "--apart"]) == 2
    assert (
        "apart (--apart) goes with adapter= (--adapter)" in capsys.readouterr().err
        and not (tmp_path / "x").exists()
    )
    assert main([*words[:2], str(tmp_path / "x"), *words[3:], "--adapter", "other"]) == 2
    assert "--adapter: wanted one, got a second" in capsys.readouterr().err
