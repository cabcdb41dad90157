"""`vllm` beyond tensor parallelism: experts and layers shared out, fp8 factors, what is never rounded."""

from __future__ import annotations

import dataclasses

import fastckpt
import pytest
import torch
from fastckpt import dtypes, recipes
from fastckpt.checkpoint import Cast
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.layouts.cuts import in_part
from fastckpt.layouts.servers import Share, expert_share, layer_range
from fastckpt.output.manifest import Manifest
from fastckpt.placement import Placement
from fastckpt.roles import Beside, Linear
from layouts import families, family_oracle
from reading import bits, memory, read, same, shard

HEADS = {"qwen2_moe": (8, 4, 8), "deepseek_v3": (8, 8, 6), "gpt_oss": (8, 4, 8), "gemma2": (8, 4, 8)}


def model_of(name):
    config, hub, _ = families.made(name)
    return recipes.find(config)(memory(hub), config), hub


def cast(ckpt, dtype):
    """The checkpoint with every float cast, as a run with a dtype casts it."""
    return dataclasses.replace(ckpt, entries=Cast(ckpt.entries, dtype))


# ---- experts ----


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("order", ["linear", "round_robin"])
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_expert_parallel(name, order, tp, dp):
    model, hub = model_of(name)
    count, ep = {"qwen2_moe": 5, "deepseek_v3": 6}[name], tp * dp
    held = [[] for _ in range(ep)]
    if order == "round_robin":
        for e in range(count):
            held[e % ep].append(e)
    else:
        left = list(range(count))
        for r in range(ep):
            held[r], left = left[: count // ep + (r < count % ep)], left[count // ep + (r < count % ep) :]
    placed = layout("vllm", {"experts": order})
    for p in Placement(tp=tp, dp=dp, ep=ep).ranks():
        want = family_oracle.vllm(hub, HEADS[name], tp, p.tp_rank, experts=held[p.dp_rank * tp + p.tp_rank])
        same(shard(placed.targets(model, p)), want)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_data_parallel_ranks_cut_experts_together(name):
    model, hub = model_of(name)
    for p in Placement(tp=2, dp=4).ranks():
        want = family_oracle.vllm(hub, HEADS[name], 2, p.tp_rank, flat=(p.dp_rank * 2 + p.tp_rank, 8))
        same(shard(layout("vllm").targets(model, p)), want)


def test_up_before_gate():
    model, hub = model_of("qwen2_moe")
    for p in Placement(tp=2).ranks():
        want = family_oracle.vllm(hub, HEADS["qwen2_moe"], 2, p.tp_rank, up_first=True)
        same(shard(layout("vllm", {"gate_up": "up_gate"}).targets(model, p)), want)


def test_shares_by_hand():
    def of(experts, ep, order):
        return [list(Share(0, 1, r, ep).of(experts, order)) for r in range(ep)]

    assert of(8, 3, "linear") == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert of(8, 3, "round_robin") == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert of(4, 4, "linear") == of(4, 4, "round_robin") == [[0], [1], [2], [3]]
    sizes = model_of("deepseek_v3")[0].sizes
    assert expert_share("vllm", Placement(tp=2, dp=2, rank=3), sizes) == Share(3, 4, 0, 1)
    assert expert_share("vllm", Placement(tp=2, dp=2, ep=4, rank=3), sizes) == Share(0, 1, 3, 4)


REFUSED = [
    ("deepseek_v3", dict(tp=4, ep=2), "wanted ep 1 or 4, got 2"),
    ("deepseek_v3", dict(tp=4, dp=2, ep=8), "6 experts are fewer than ep 8"),
    ("gemma2", dict(tp=2, ep=2), "0 experts are fewer than ep 2"),
    ("qwen2_moe", dict(tp=4, dp=4), r"moe_intermediate_size 24 does not divide by tp \* dp 16"),
    ("gemma2", dict(pp=3), "pp 3 is more than the 2 layers"),
]


@pytest.mark.parametrize(("name", "sizes", "message"), REFUSED)
def test_grids_that_do_not_fit(name, sizes, message):
    with pytest.raises(LayoutError, match=message):
        layout("vllm").targets(model_of(name)[0], Placement(**sizes))


# ---- layers ----


def test_layer_ranges_by_hand():
    def counts(layers, pp):
        return [len(layer_range("vllm", Placement(pp=pp, rank=r), layers)) for r in range(pp)]

    assert counts(32, 4) == [8, 8, 8, 8]
    assert counts(61, 4) == [15, 15, 16, 15]
    assert counts(61, 2) == [31, 30]
    assert counts(22, 4) == [5, 6, 6, 5]
    assert counts(7, 4) == [2, 2, 2, 1]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_pipeline_stages(name):
    """The first stage embeds, the last has the norm and the head, or the embedding again it is tied to."""
    model, hub = model_of(name)
    tied = families.made(name)[0]["tie_word_embeddings"]
    for p in Placement(pp=2, tp=2).ranks():
        want = family_oracle.vllm(hub, HEADS[name], 2, p.tp_rank, layers=[p.pp_rank])
        last = p.pp_rank == 1
        for module, here in (("embed", not last or tied), ("lm_head", last), ("model.norm.", last)):
            if not here:
                want = {n: x for n, x in want.items() if module not in n}
        same(shard(layout("vllm").targets(model, p)), want)


def test_a_stage_has_its_tied_names_whoever_else_is_made(tmp_path):
    """The middle stage of three holds neither name of the pair; the last one needs both."""
    config, hub, _ = families.made("granitemoehybrid-dense")
    grid, head, holder = Placement(pp=3), "lm_head.weight", "model.embed_tokens.weight"
    whole = fastckpt.reshard(hub, placement=grid, config=config, layout="vllm")
    for rank, got in enumerate(whole):
        alone = fastckpt.reshard(hub, placement=grid, config=config, layout="vllm", rank=rank)
        assert alone.keys() == got.keys()
        assert got.get(head) is got.get(holder) and (head in got) == (rank != 1)
    fastckpt.reshard(hub, placement=grid, config=config, layout="vllm", out=whole)
    del whole[2][head], whole[2][holder]
    with pytest.raises(LayoutError, match=f"rank 2 has no tensor {holder}"):
        fastckpt.reshard(hub, placement=grid, config=config, layout="vllm", out=whole)
    fastckpt.reshard(hub, placement=grid, config=config, layout="vllm", out=tmp_path / "out", durable=False)
    record = Manifest.read(tmp_path / "out" / "fastckpt.json")
    assert [s.aliases for s in record.shards] == [{head: holder}, {}, {head: holder}]


def test_files_tell_ranks_apart():
    names = set()
    grid = Placement(tp=2, pp=2, dp=2)
    for p in grid.ranks():
        names.add(layout("vllm").naming(p).file(0, 1))
    assert len(names) == grid.world
    last = grid.at(7)
    assert layout("vllm").naming(last).file(1, 2) == "model-pp-1-dp-1-tp-1-part-1.safetensors"
    stages = Placement(tp=2, pp=2, rank=3)
    assert layout("vllm").naming(stages).file(0, 1) == "model-pp-1-tp-1-part-0.safetensors"


# ---- what is stored beside the weights ----


SCORES = "model.layers.1.mlp.gate.e_score_correction_bias"
ROUTER = "model.layers.0.mlp.gate.weight"
"""transformers keeps ERNIE's in float32, whatever it loads the rest as; vLLM has them so."""


@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", SCORES), ("ernie4_5_moe", ROUTER)])
def test_what_chooses_experts_is_never_rounded(family, name):
    config, hub, _ = families.made(family)
    hub = hub | {name: torch.randn(hub[name].shape)}
    model = recipes.find(config)(cast(memory(hub), dtypes.bfloat16), config)
    for served in ("hf", "vllm"):
        targets = {t.name: t.view for t in layout(served).targets(model, Placement(tp=2))}
        assert targets[name].dtype is dtypes.float32
        assert (read(targets[name]).view("f4") == hub[name].numpy()).all()
        assert targets["model.norm.weight"].dtype is dtypes.bfloat16


def test_scores_are_float32_to_vllm():
    config, hub, _ = families.made("deepseek_v3")
    half = recipes.find(config)(memory(hub | {SCORES: hub[SCORES].bfloat16()}), config)
    hf, vllm = ({t.name: t.view for t in layout(s).targets(half, Placement())} for s in ("hf", "vllm"))
    assert hf[SCORES].dtype is dtypes.bfloat16 and vllm[SCORES].dtype is dtypes.float32


def predicting(name):
    """A model with one more layer, as the hub's DeepSeek-V3 and GLM-4.5: (config, tensors, its own)."""
    config, hub, _ = families.made(name)
    vocab, hidden = hub["model.embed_tokens.weight"].shape
    at, last = "model.layers.2.", "model.layers.1."
    extra = {n.replace(last, at): x + 0.5 for n, x in hub.items() if n.startswith(last)}
    shapes = {
        "embed_tokens": (vocab, hidden),
        "shared_head.head": (vocab, hidden),
        "eh_proj": (hidden, 2 * hidden),
    }
    shapes |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
    for i, (n, shape) in enumerate(shapes.items()):
        extra[f"{at}{n}.weight"] = torch.randn(shape) + i
    return config | {"num_nextn_predict_layers": 1}, hub, extra


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "kimi_k2", "deepseek_v32"])
def test_layers_that_predict_more_tokens(name):
    """The hub's layout keeps them, cut like the others; servers' do not, and say so."""
    config, hub, extra = predicting(name)
    model = recipes.find(config)(memory(hub | extra), config)
    assert len(model.layers) == 2 and len(model.predictions) == 1 and not model.ignored
    same(shard(layout("hf").targets(model, Placement())), hub | extra)
    plain = recipes.find(config)(memory(hub), config)
    for p in Placement(tp=2).ranks():
        got = shard(layout("hf").targets(model, p))
        without = shard(layout("hf").targets(plain, p))
        assert {n for n in got if n not in without} == set(extra)
        for n, x in extra.items():
            of_last = without.get(n.replace("layers.2.", "layers.1."))
            _, value = got[n]
            if of_last is not None:
                assert value.shape == of_last[1].shape, n
            elif n.endswith(("embed_tokens.weight", "shared_head.head.weight")):
                assert (value == bits(x.chunk(2)[p.rank])).all()
            else:
                assert (value == bits(x)).all()
        assert sorted(shard(layout("vllm").targets(model, p))) == sorted(
            shard(layout("vllm").targets(plain, p))
        )
    lone = {n: x for n, x in extra.items() if "enorm" not in n}
    with pytest.raises(RecipeError, match=r"needs model\.layers\.2\.enorm\.weight"):
        recipes.find(config)(memory(hub | lone), config)
    planned = fastckpt.plan(hub | extra, tp=2, config=config, layout="vllm")
    assert any("leaves out the layers of multi-token prediction" in note for note in planned.notes)


def test_tables_of_prediction_layers():
    config, hub, extra = predicting("deepseek_v3")
    with pytest.raises(LayoutError, match="the tables of deepseek_v3's prediction layers are not padded"):
        model = recipes.find(config)(memory(hub | extra), config)
        layout("hf", {"vocab_padding": "3"}).targets(model, Placement(tp=3))
    name = "model.layers.2.embed_tokens.weight"
    with pytest.raises(RecipeError, match=rf"{name} has 200 rows, the vocabulary 208"):
        recipes.find(config)(memory(hub | extra | {name: extra[name][:200]}), config)


def test_layers_beyond_those_that_the_config_says():
    config, hub, _ = families.made("deepseek_v3")
    assert config["num_nextn_predict_layers"] == 1
    with pytest.raises(RecipeError, match=r"no place for model\.layers\.3\.eh_proj"):
        recipes.find(config)(memory(hub | {"model.layers.3.eh_proj.weight": torch.ones(3)}), config)


def fp8(block, **changes):
    """A DeepSeek-V3 whose matrices are bytes with a factor a block: (config, tensors)."""
    config, hub, _ = families.made("deepseek_v3")
    config = config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    out, at = {}, 1
    for name, x in hub.items():
        plain = x.ndim == 1 or any(part in name for part in ("embed", "lm_head", "mlp.gate."))
        out[name] = x
        if not plain:
            out[name] = torch.randint(0, 256, x.shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
            rows, columns = (-(-n // b) for n, b in zip(x.shape, block, strict=True))
            out[f"{name}_scale_inv"] = torch.arange(at, at + rows * columns).float().view(rows, columns)
            at += rows * columns
    return config | changes, out


def whole_or_cut(got, name, factor, rows, columns, dim, tp, r):
    """Each weight's factor, seen element by element, is that of its block in the whole matrix."""
    full = factor.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    part = got[f"{name}_scale_inv"].repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    weight = got[name]
    index = [slice(0, n) for n in weight.shape]
    start = r * weight.shape[dim]
    where = [slice(start, start + n) if d == dim else slice(0, n) for d, n in enumerate(weight.shape)]
    assert torch.equal(part[tuple(index)], full[tuple(where)])


@pytest.mark.parametrize("tp", [1, 2])
def test_factors_follow_their_blocks(tp):
    block = (4, 4)
    config, hub = fp8(block)
    model = recipes.find(config)(memory(hub), config)
    for p in Placement(tp=tp).ranks():
        raw = shard(layout("vllm").targets(model, p))
        got = {
            n: torch.from_numpy(v.view("f4")) if d == "float32" else torch.from_numpy(v)
            for n, (d, v) in raw.items()
        }
        at = "model.layers.1.self_attn."
        whole_or_cut(
            got, at + "q_b_proj.weight", hub[at + "q_b_proj.weight_scale_inv"], *block, 0, tp, p.rank
        )
        whole_or_cut(got, at + "o_proj.weight", hub[at + "o_proj.weight_scale_inv"], *block, 1, tp, p.rank)
        low = torch.cat([hub[at + f"{n}.weight_scale_inv"] for n in ("q_a_proj", "kv_a_proj_with_mqa")])
        assert torch.equal(got[at + "fused_qkv_a_proj.weight_scale_inv"], low)
        e = "model.layers.1.mlp.experts."
        w13 = [
            torch.cat([hub[f"{e}{i}.{n}_proj.weight_scale_inv"].chunk(tp)[p.rank] for n in ("gate", "up")])
            for i in range(6)
        ]
        w2 = [hub[f"{e}{i}.down_proj.weight_scale_inv"].chunk(tp, 1)[p.rank] for i in range(6)]
        assert torch.equal(got[e + "w13_weight_scale_inv"], torch.stack(w13))
        assert torch.equal(got[e + "w2_weight_scale_inv"], torch.stack(w2))
        assert raw[e + "w13_weight"][0] == "float8_e4m3fn"
    same(shard(layout("hf").targets(model, Placement())), hub)


def test_runs_within_one_block_share_its_factor():
    held = memory({"w": torch.zeros(8, 8), "s": torch.tensor([[2.0, 3.0]])})
    linear = Linear("m", held["w"], beside=(Beside("s", held["s"], (8, 4)),))
    got = [read(in_part(linear, k, 4).beside[0].view).view("f4").item() for k in range(4)]
    assert got == [2, 2, 3, 3]
    with pytest.raises(LayoutError, match=r"m: \[0, 2\) of axis 1 cuts a block of 4"):
        in_part(dataclasses.replace(linear, packed=(1, 2)), 0, 8)


def test_factors_that_do_not_follow():
    config, hub = fp8((8, 8))
    model = recipes.find(config)(memory(hub), config)
    with pytest.raises(LayoutError, match=r"of axis [01] cuts a block of 8"):
        list(layout("vllm").targets(model, Placement(tp=2)))
    with pytest.raises(RecipeError, match=r"must be int8 or .*, got bfloat16; ask for no dtype"):
        recipes.find(config)(cast(memory(hub), dtypes.bfloat16), config)
    for said in ({"quant_method": "mxfp4"}, {"weight_block_size": [128]}, "fp8"):
        with pytest.raises(RecipeError, match=r"quantization_config .* is not read"):
            recipes.find(config)(memory(hub), config | {"quantization_config": said})
