"""`rtp_llm`'s options, and the proof's four models over grids of tp, dp and ep, against torch."""

from __future__ import annotations

import itertools
import math

import fastckpt
import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import LayoutError, RecipeError
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import families, tiny
from layouts.test_rtp_llm import NOPE, RANK, ROPE, cut, model_of, wanted
from reading import memory, same, shard
from safetensors.torch import load_file


def shards(model, options=None, **grid):
    placed = layout("rtp_llm", options or {})
    return [(p, shard(placed.targets(model, p))) for p in Placement(**grid).ranks()]


def key(p, ep=1, layer=1):
    return f"rank_{p.tp_rank:02d}_{p.dp_rank:02d}_{p.rank % ep:02d}.layers.{layer}."


# ---- the proof: llama, mixtral, qwen2 and deepseek v2 for tp 1, 2, 4, 8, ep 1, 2, 4 and dp 1, 2 ----


def mixtral():
    """Mixtral of four experts, as the oracle for families knows names."""
    config, hub, _ = tiny.made("mixtral-odd")
    hub = {n: x[:4] if n.endswith(".gate.weight") else x for n, x in hub.items() if ".experts.4." not in n}
    renamed = {}
    for n, x in hub.items():
        for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            n = n.replace(f".{old}.", f".{new}.")
        renamed[n.replace("block_sparse_moe", "mlp")] = x
    config = config | {"num_local_experts": 4}
    return recipes.find(config)(memory(hub), config), config, renamed


def deepseek():
    """DeepSeek V2 of four experts."""
    config, hub, _ = families.made("deepseek_v2")
    experts = (".experts.4.", ".experts.5.")
    hub = {
        n: x[:4] if n.endswith("mlp.gate.weight") else x
        for n, x in hub.items()
        if not any(e in n for e in experts)
    }
    config = config | {"n_routed_experts": 4}
    return recipes.find(config)(memory(hub), config), config, hub


def dense(name):
    config, hub, _ = tiny.made(name)
    config = {k: v for k, v in config.items() if v is not None}
    return recipes.find(config)(memory(hub), config), config, hub


PROOF = {
    "llama": lambda: dense("tied"),
    "qwen2": lambda: dense("qwen2"),
    "mixtral": mixtral,
    "deepseek_v2": deepseek,
}
GRIDS = list(itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 4)))


@pytest.mark.parametrize(("tp", "dp", "ep"), GRIDS)
@pytest.mark.parametrize("name", list(PROOF))
def test_the_catalogue_over_grids(name, tp, dp, ep):
    model, config, hub = PROOF[name]()
    moe = bool(model.sizes.experts)
    if "lm_head.weight" not in hub:
        hub = hub | {"lm_head.weight": hub["model.embed_tokens.weight"]}
    if tp * dp % ep or (moe and dp > 1 and ep == 1) or (not moe and ep > 1):
        with pytest.raises(LayoutError, match=r"does not divide by ep|got ep 1|0 experts do not divide"):
            shards(model, tp=tp, dp=dp, ep=ep)
        return
    for p, got in shards(model, tp=tp, dp=dp, ep=ep):
        same(got, wanted(hub, config, (tp, dp, ep), p.rank))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 4), (1, 2, 2)])
@pytest.mark.parametrize("name", list(PROOF))
def test_the_files_of_every_rank(tmp_path, name, sizes):
    """What lies in the files, by the names of the engine's dump, is what the oracle makes."""
    tp, dp, ep = sizes
    model, config, hub = PROOF[name]()
    if not model.sizes.experts:
        ep = 1
    grid = Placement(tp=tp, dp=dp, ep=ep)
    saved = {n: x for n, x in hub.items() if n != "lm_head.weight" or not config["tie_word_embeddings"]}
    if name == "mixtral":
        for old, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            saved = {n.replace(old, new): x for n, x in saved.items()}
        saved = {n.replace(".mlp.", ".block_sparse_moe."): x for n, x in saved.items()}
    fastckpt.reshard(
        saved, placement=grid, layout="rtp_llm", config=config, out=tmp_path / "out", durable=False
    )
    if "lm_head.weight" not in hub:
        hub = hub | {"lm_head.weight": hub["model.embed_tokens.weight"]}
    for p in grid.ranks():
        held = load_file(tmp_path / "out" / f"model-{p.tp_rank:02d}-{p.dp_rank:02d}-part-00000.safetensors")
        want = wanted(hub, config, (tp, dp, ep), p.rank)
        assert sorted(held) == sorted(want)
        assert all(x.dtype == want[n].dtype and torch.equal(x, want[n]) for n, x in held.items())


# ---- options ----


def test_gate_and_up_apart():
    model, _, hub = model_of("qwen2_moe")
    for p, got in shards(model, {"w13": "false"}, tp=2):
        at, to = "model.layers.0.mlp.", key(p, layer=0) + "ffn_weights."
        want = {
            to + "intermediate_weight.kernel": cut(hub[at + "gate_proj.weight"].t(), 1, 2, p.rank),
            to + "intermediate_weight3.kernel": cut(hub[at + "up_proj.weight"].t(), 1, 2, p.rank),
            to + "intermediate_weight2.kernel": cut(hub[at + "down_proj.weight"].t(), 0, 2, p.rank),
        }
        same({n: got[n] for n in got if n.startswith(to)}, want)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_rope_rows_apart(name, tp):
    """Within the rope rows even ones first: new row j is old row 2 (j % (r/2)) + j // (r/2)."""
    model, config, hub = model_of(name)
    order = [2 * (j % (ROPE // 2)) + j // (ROPE // 2) for j in range(ROPE)]
    moved = dict(hub)
    for n, x in hub.items():
        if n.endswith(("q_proj.weight", "q_b_proj.weight")) and "self_attn" in n:
            rows = [
                h * (NOPE + ROPE) + r for h in range(8) for r in [*range(NOPE), *(NOPE + j for j in order)]
            ]
            moved[n] = x[rows]
        if n.endswith("kv_a_proj_with_mqa.weight"):
            moved[n] = x[[*range(RANK), *(RANK + j for j in order)]]
    for p, got in shards(model, {"split_rope": "true"}, tp=tp):
        same(got, wanted(moved, config, (tp, 1, 1), p.rank))


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (1, 2, 2)])
def test_experts_held_whole(grid):
    """use_stack_weight off: a rank has its experts of ep whole, all of them without ep."""
    tp, dp, ep = grid
    model, _, hub = model_of("deepseek_v3")
    for p, got in shards(model, {"use_stack_weight": "false"}, tp=tp, dp=dp, ep=ep):
        each = 6 // ep
        at, mine = "model.layers.1.mlp.experts.", range(p.rank % ep * each, p.rank % ep * each + each)
        up, gate, down = ([hub[f"{at}{e}.{n}_proj.weight"] for e in mine] for n in ("up", "gate", "down"))
        pair = torch.stack([torch.cat(both) for both in zip(up, gate, strict=True)])
        to = key(p, ep) + "partial_moe_weights.intermediate_weight"
        same({n: got[n] for n in got if n.startswith(to)},
             {f"{to}.kernel": pair, f"{to}2.kernel": torch.stack(down)})  # fmt: skip


def test_fewer_ranks_cut_the_feed_forward_block():
    model, config, hub = model_of("qwen2_moe")
    for p, got in shards(model, {"ffn_tp": "2"}, tp=4):
        want = wanted(hub, config, (4, 1, 1), p.rank)
        halves = wanted(hub, config, (2, 1, 1), p.rank % 2)
        for n in want:
            if ".ffn_weights." in n and "gate" not in n:
                want[n] = halves[n.replace(f"rank_{p.rank:02d}", f"rank_{p.rank % 2:02d}")]
        same(got, want)
    with pytest.raises(LayoutError, match="tp 4 does not divide by ffn_tp 3"):
        shards(model, {"ffn_tp": "3"}, tp=4)


@pytest.mark.parametrize(
    ("grid", "places", "nodes", "held"),
    [
        ((2, 1, 2), 8, 1, [[0, 1, 2, 3], [3, 4, 5, 0]]),
        ((2, 1, 2), 12, 2, [[0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5]]),
        ((3, 1, 3), 9, 1, None),
        ((2, 2, 2), 8, 1, [[0, 1, 2, 3], [3, 4, 5, 0]]),
        ((1, 1, 1), 7, 1, [[0, 1, 2, 3, 4, 5, 0]]),
    ],
)
def test_redundant_experts(grid, places, nodes, held):
    """Each part's own experts, then the next part's first; and the tables that say where an expert lies."""
    tp, dp, ep = grid
    model, _, hub = model_of("deepseek_v3")
    options = {"physical_experts": str(places), "nodes": str(nodes)}
    if held is None:
        with pytest.raises(LayoutError, match="attention heads 8 does not divide by tp 3"):
            shards(model, options, tp=tp, dp=dp, ep=ep)
        return
    order = [e for part in held for e in part]
    where = [[k for k, e in enumerate(order) if e == expert] for expert in range(6)]
    log2phy = torch.full((6, places - 6 + 1), -1, dtype=torch.int32)
    for expert, found in enumerate(where):
        log2phy[expert, : len(found)] = torch.tensor(found)
    count = tp * dp // ep if ep > 1 else tp
    for p, got in shards(model, options, tp=tp, dp=dp, ep=ep):
        at, part = "model.layers.1.mlp.experts.", p.rank // ep if ep > 1 else p.rank
        pair, downs = [], []
        for e in held[p.rank % ep]:
            up, gate, down = (hub[f"{at}{e}.{n}_proj.weight"] for n in ("up", "gate", "down"))
            pair.append(torch.cat([cut(up, 0, count, part), cut(gate, 0, count, part)]))
            downs.append(cut(down, 1, count, part))
        to = key(p, ep)
        want = {
            to + "partial_moe_weights.intermediate_weight.kernel": torch.stack(pair),
            to + "partial_moe_weights.intermediate_weight2.kernel": torch.stack(downs),
            to + "moe_eplb.log2phy": log2phy,
            to + "moe_eplb.logic_expert_cnt": torch.tensor([len(w) for w in where], dtype=torch.int32),
        }
        same({n: got[n] for n in want}, want)


@pytest.mark.parametrize(
    ("name", "places", "message"),
    [
        ("deepseek_v3", 13, "6 experts do not fill 13 places of 1 parts on 1 nodes"),
        ("deepseek_v3", 5, "6 experts do not fill 5 places"),
        ("granite", 8, "physical_experts=8 wants experts, which granite has not"),
    ],
)
def test_places_that_do_not_fit(name, places, message):
    with pytest.raises(LayoutError, match=message):
        shards(model_of(name)[0], {"physical_experts": str(places)})


# ---- what absorbs a key or a value, of fp8 blocks ----


def latent_fp8(nope, value):
    """A DeepSeek V3 layer whose kv_b is fp8 with factors of 128 x 128 blocks."""
    heads, hidden, rank, rope = 4, 128, 256, 64
    g = torch.Generator().manual_seed(nope + value)
    at, a = "model.layers.0.", "model.layers.0.self_attn."
    shapes = {
        a + "q_a_proj.weight": (128, hidden), a + "q_b_proj.weight": (heads * (nope + rope), 128),
        a + "kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        a + "kv_b_proj.weight": (heads * (nope + value), rank), a + "o_proj.weight": (hidden, heads * value),
        at + "mlp.gate_proj.weight": (1024, hidden), at + "mlp.up_proj.weight": (1024, hidden),
        at + "mlp.down_proj.weight": (hidden, 1024),
    }  # fmt: skip
    t = {n: torch.rand(16, hidden, generator=g) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    norms = [at + "input_layernorm", at + "post_attention_layernorm", "model.norm"]
    t |= {f"{n}.weight": torch.rand(hidden, generator=g) for n in norms}
    t |= {a + "q_a_layernorm.weight": torch.rand(128), a + "kv_a_layernorm.weight": torch.rand(rank)}
    for n, shape in shapes.items():
        t[n] = torch.randint(0, 120, shape, dtype=torch.uint8, generator=g).view(torch.float8_e4m3fn)
        t[n + "_scale_inv"] = torch.rand(*(-(-s // 128) for s in shape), generator=g)
    config = dict(
        model_type="deepseek_v3", hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=1,
        vocab_size=16, intermediate_size=1024, first_k_dense_replace=1, n_routed_experts=2, q_lora_rank=128,
        moe_intermediate_size=128, kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope,
        v_head_dim=value, tie_word_embeddings=False,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )  # fmt: skip
    return (
        recipes.find(config)(memory(t), config),
        t[a + "kv_b_proj.weight"],
        t[a + "kv_b_proj.weight_scale_inv"],
    )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("nope", "value"), [(128, 128), (256, 128)])
def test_kc_and_vc_with_the_factors_of_their_blocks(nope, value, tp):
    model, weight, scale = latent_fp8(nope, value)
    per, kb, vb = (nope + value) // 128, nope // 128, value // 128
    for p, got in shards(model, tp=tp):
        mine = range(p.rank * 4 // tp, (p.rank + 1) * 4 // tp)
        heads = [weight[h * (nope + value) : (h + 1) * (nope + value)].view(torch.uint8) for h in mine]
        blocks = [scale[h * per : (h + 1) * per] for h in mine]
        to, as_fp8 = key(p, layer=0) + "self_attention_weights.mla.", torch.float8_e4m3fn
        want = {
            to + "kc.kernel": torch.stack([x[:nope] for x in heads]).view(as_fp8),
            to + "vc.kernel": torch.stack([x[nope:].t() for x in heads]).contiguous().view(as_fp8),
            to + "kc.weight_only_quant_scale": torch.stack([x[:kb] for x in blocks]),
            to + "vc.weight_only_quant_scale": torch.stack([x[kb:].t() for x in blocks]),
        }
        assert vb == blocks[0].shape[0] - kb
        same({n: got[n] for n in want}, want)


def test_kc_and_vc_that_share_blocks_are_refused():
    model, *_ = latent_fp8(192, 64)
    with pytest.raises(
        LayoutError, match=r"heads of 192 and 64, do not end with blocks of 128; absorb=False"
    ):
        shards(model)
    assert not any(".kc." in n for n in shards(model, {"absorb": "false"})[0][1])


# ---- rotary tables ----


def table(dim, base, positions, yarn=None):
    """DeepSeek's definition, number by number."""
    rows = []
    factor = 1.0
    speeds = [base ** -(2 * i / dim) for i in range(dim // 2)]
    if yarn is not None:
        s, original, fast, slow, mscale, all_dim = yarn

        def scaled(m):
            return 0.1 * m * math.log(s) + 1.0 if s > 1 else 1.0

        def index(turns):
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        factor = scaled(mscale) / scaled(all_dim)
        low, high = max(math.floor(index(fast)), 0), min(math.ceil(index(slow)), dim - 1)
        ramp = [min(max((i - low) / ((high - low) or 0.001), 0.0), 1.0) for i in range(dim // 2)]
        speeds = [v / s * r + v * (1 - r) for v, r in zip(speeds, ramp, strict=True)]
    for p in range(positions):
        angles = [p * v for v in speeds]
        rows.append([math.cos(a) * factor for a in angles] + [math.sin(a) * factor for a in angles])
    return torch.tensor(rows, dtype=torch.float64).float()


YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 1.0}  # fmt: skip
ROPES = [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 10000.0, None),
    ({"rope_parameters": YARN | {"rope_theta": 500.0}}, 500.0, (40, 64, 32, 1, 0.7, 1.0)),
    ({"rope_parameters": None, "rope_theta": 100, "rope_scaling": YARN | {"type": "yarn"}}, 100.0,
     (40, 64, 32, 1, 0.7, 1.0)),
    # Where the ramp would end past the last frequency, and where it has no width.
    ({"rope_parameters": YARN | {"rope_theta": 2.0}}, 2.0, (40, 64, 32, 1, 0.7, 1.0)),
    ({"rope_parameters": YARN | {"rope_theta": 500.0, "original_max_position_embeddings": 6}}, 500.0,
     (40, 6, 32, 1, 0.7, 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "base", "yarn"), ROPES)
def test_rotary_table(said, base, yarn):
    config, hub, _ = families.made("deepseek_v3")
    config = config | said
    model = recipes.find(config)(memory(hub), config)
    for p, got in shards(model, {"rope_positions": "50"}, tp=2):
        name = f"rank_{p.rank:02d}_00_00.global.rotary_embedding.cos_sin_cache"
        same({name: got[name]}, {name: table(ROPE, base, 50, yarn)})


def test_rotary_tables_of_other_kinds_are_refused():
    config, hub, _ = families.made("deepseek_v3")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    changes = ({"rope_type": "linear"}, {"attention_factor": 1.5}, {"truncate": False})
    configs = [config | {"rope_parameters": yarn | change} for change in changes]
    plain = {"rope_type": "default", "rope_theta": 500.0}
    configs.append(config | {"rope_parameters": plain, "rope_scaling": yarn})  # transformers takes the second
    configs.append({k: v for k, v in config.items() if not k.startswith("rope_")})
    for model in (*(recipes.find(c)(memory(hub), c) for c in configs), model_of("granite")[0]):
        with pytest.raises(LayoutError, match="rope_positions=50 wants latent attention with plain or YaRN"):
            shards(model, {"rope_positions": "50"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 0), ("rope_theta", 1), ("rope_theta", math.nan), ("rope_theta", 10**400),
        ("rope_theta", "10000"), ("factor", 0), ("factor", math.inf), ("beta_fast", "32"), ("beta_slow", 0),
        ("mscale", -1), ("mscale_all_dim", True), ("original_max_position_embeddings", 0),
        ("original_max_position_embeddings", 10**400),
    ],
)  # fmt: skip
def test_numbers_of_rotary_tables_that_a_config_cannot_mean(key, value):
    config, hub, _ = families.made("deepseek_v3")
    said = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, key: value}
    config = config | {"rope_parameters": said}
    with pytest.raises(RecipeError, match=f"config: {key} must be"):
        recipes.find(config)(memory(hub), config)
