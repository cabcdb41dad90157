"""Writes megatron_core.json: names and shapes of megatron-core's GPTModel, and its logits with our values.

Run by hand where megatron-core is installed: `python layouts/make_megatron_golden.py` in `tests/`, once a
version. Nothing needs a GPU; 0.19 imports triton. Its wheel wants Python 3.12, its core's Python files
do not. Layers are those of megatron's own spec; Transformer Engine's cannot be built without it.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import megatron_on_cpu
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from fastckpt import recipes
from fastckpt.layouts import layout
from fastckpt.placement import Placement
from layouts import gated
from megatron.core import package_info, tensor_parallel
from megatron.core import parallel_state as ps
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from reading import memory, read
from torch.testing._internal.distributed.fake_pg import FakeStore

megatron_on_cpu.enable()

HERE = Path(__file__).resolve().parent
SIZES = dict(
    vocab_size=208, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip
MLA = dict(
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=6,
    moe_intermediate_size=24, first_k_dense_replace=1, num_key_value_heads=8, num_experts_per_tok=2,
    n_group=1, topk_group=1, n_shared_experts=1, q_lora_rank=24, rope_scaling=None,
)  # fmt: skip
THETA = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6}
MOE = dict(moe_intermediate_size=24, num_experts_per_tok=2)
CASES = {
    "llama": ("Llama", SIZES),
    "tied": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "mqa": ("Llama", SIZES | {"num_key_value_heads": 1}),
    "biased": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 12}),
    "mixtral": ("Mixtral", SIZES | THETA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", SIZES | MOE | {"num_experts": 4, "head_dim": 8, "norm_topk_prob": True}),
    "gemma": ("Gemma", SIZES | {"head_dim": 8, "tie_word_embeddings": True}),
    "deepseek_v2": ("DeepseekV2", SIZES | MLA | {"q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3", SIZES | MLA),
    "gated": ("Qwen3Next", gated.CONFIG),
    "gpt2": ("GPT2", dict(vocab_size=208, n_embd=64, n_layer=2, n_head=8, n_positions=32)),
}
GRIDS = [(1, 1, 1, 1), (2, 1, 1, 2), (4, 1, 1, 4), (2, 2, 2, 2), (2, 1, 2, 1), (2, 2, 4, 1)]
"""(tp, dp, ep, expert_tp)"""
CENTRED = ("gemma", "gated")
"""Cases whose norms multiply by 1 + weight. Norms of torch are not zero-centred: what they hold differs by
that, no name and no shape."""


def hub(name):
    kind, sizes = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind + suffix)(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def settings(name, grid):
    """(megatron-core's config, vocabulary, positions, kind of positions)."""
    tp, _, ep, etp = grid
    kind, s = CASES[name]
    get = s.get
    common = dict(
        use_cpu_initialization=True, perform_initialization=False, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp,
        hidden_dropout=0.0, attention_dropout=0.0, add_bias_linear=False, masked_softmax_fusion=False,
        bias_dropout_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False,
        transformer_impl="local",
    )  # fmt: skip
    if kind == "GPT2":
        common |= dict(num_layers=2, hidden_size=64, num_attention_heads=8, add_bias_linear=True)
        common |= dict(activation_func=lambda x: F.gelu(x, approximate="tanh"), layernorm_epsilon=1e-5)
        return TransformerConfig(**common), 208, 32, "learned_absolute"
    common |= dict(
        num_layers=2, hidden_size=64, num_attention_heads=8, num_query_groups=get("num_key_value_heads"),
        ffn_hidden_size=96, gated_linear_unit=True, activation_func=F.silu, normalization="RMSNorm",
        layernorm_epsilon=1e-6, kv_channels=get("head_dim"),
    )  # fmt: skip
    if name == "gemma":
        common |= dict(activation_func=lambda x: F.gelu(x, approximate="tanh"))
    if name == "gated":
        common |= dict(attention_output_gate=True)
    if name == "biased":
        common |= dict(add_bias_linear=True)
    if kind == "Qwen2":
        common |= dict(add_qkv_bias=True)
    if kind.startswith("Qwen3"):
        common |= dict(qk_layernorm=True)
    if kind in ("Mixtral", "Qwen3Moe"):
        width = 96 if kind == "Mixtral" else 24
        common |= dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=width,
                       moe_router_pre_softmax=False, moe_token_dispatcher_type="allgather")  # fmt: skip
    if kind.startswith("Deepseek"):
        common.pop("num_query_groups"), common.pop("kv_channels")
        v3 = kind == "DeepseekV3"
        common |= dict(
            num_moe_experts=6, moe_router_topk=2, moe_ffn_hidden_size=24, moe_layer_freq=[0, 1],
            moe_shared_expert_intermediate_size=24, q_lora_rank=get("q_lora_rank"), kv_lora_rank=16,
            qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8, qk_layernorm=True,
            multi_latent_attention=True, rope_type="rope", rotary_percent=1.0,
            moe_token_dispatcher_type="allgather", moe_router_pre_softmax=True,
            moe_router_enable_expert_bias=v3, moe_router_score_function="sigmoid" if v3 else "softmax",
            moe_aux_loss_coeff=0.0, moe_router_load_balancing_type="none",
        )  # fmt: skip
        return MLATransformerConfig(**common), 208, 32, "rope"
    return TransformerConfig(**common), 208, 32, "rope"


def built(name, grid, rank):
    """megatron-core's model of one rank, in groups that never talk."""
    tp, dp, ep, etp = grid
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * dp)
    ps.initialize_model_parallel(
        tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, create_gloo_process_groups=False
    )
    config, vocab, positions, kind = settings(name, grid)
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization
    )
    padded = -(-vocab // (128 * tp)) * 128 * tp
    share = name in ("tied", "gemma", "gpt2")
    return GPTModel(
        config, spec, vocab_size=padded, max_sequence_length=positions, position_embedding_type=kind,
        share_embeddings_and_output_weights=share, rotary_base=10000,
        rotary_percent=0.25 if name == "gated" else 1.0,
    ).float()  # fmt: skip


ABSENT = {"0.19.2": ("deepseek_v2",)}
"""Models that a version does not have: 0.19 wants a norm of queries in latent attention, low rank or not."""


def table(cases):
    out = {}
    for name in cases:
        experts = {"mixtral": 4, "qwen3_moe": 4, "deepseek_v2": 6, "deepseek_v3": 6}.get(name, 1)
        for grid in GRIDS:
            tp, dp, ep, etp = grid
            if experts % ep or (experts == 1 and (ep, etp) != (1, tp)):
                continue
            for rank in sorted({0, tp * dp - 1}):
                model = built(name, grid, rank)
                held = {n: list(p.shape) for n, p in model.named_parameters()}
                held |= {n: list(b.shape) for n, b in model.named_buffers() if n.endswith("expert_bias")}
                out[f"{name} {tp} {dp} {ep} {etp} {rank}"] = held
                ps.destroy_model_parallel()
                dist.destroy_process_group()
    return out


NOT_RUN = ("deepseek_v2", "deepseek_v3")
"""Cases whose values are not held to logits: megatron's own attention cannot run latent attention."""


def logits(name):
    """The largest difference of transformers' logits and those of megatron-core with our tensors."""
    source = hub(name)
    config = json.loads(source.config.to_json_string())
    kept = {n: x for n, x in source.state_dict().items() if not n.endswith((".attn.bias", "masked_bias"))}
    if config.get("tie_word_embeddings"):
        kept.pop("lm_head.weight")
    recipe = gated.RECIPE if name == "gated" else recipes.find(config)
    model = recipe(memory(kept), config)
    options = {"spec": "local"} | ({"experts": "sequential"} if model.sizes.experts else {})
    if name in CENTRED:
        options["zero_centered_gamma"] = "true"
    ours = {
        t.name: torch.from_numpy(read(t.view).view("f4")).reshape(t.shape)
        for t in layout("megatron", options).targets(model, Placement())
    }
    theirs = built(name, (1, 1, 1, 1), 0).eval()
    held = dict(theirs.named_parameters())
    assert sorted(held) == sorted(ours), set(held) ^ set(ours)
    tensor_parallel.get_cuda_rng_tracker().fork = contextlib.nullcontext  # no dropout, so no state of it
    ids = torch.arange(1, 13)[None] * 7 % 200
    mask = torch.ones(1, 1, 12, 12).triu(1).bool()
    with torch.no_grad():
        for n, p in held.items():
            p.copy_(ours[n] + (1 if name in CENTRED and "layernorm" in n else 0))
        if name == "gemma":  # what the model does beside its weights: embedded tokens are scaled
            theirs.embedding.register_forward_hook(lambda *a: a[-1] * 64**0.5)
        want = source(ids).logits
        got = theirs(ids, torch.arange(12)[None], mask)[..., :208]
    ps.destroy_model_parallel()
    dist.destroy_process_group()
    return float((got - want).abs().max())


def main():
    """Adds what the installed version says to what others said; names and shapes are to be the same."""
    path, version = HERE / "megatron_core.json", package_info.__version__
    golden = json.loads(path.read_text())
    cases = [name for name in CASES if name not in ABSENT.get(version, ())]
    golden["cases"] = CASES
    golden["logits"][version] = {name: logits(name) for name in cases if name not in NOT_RUN}
    ranks = table(cases)
    others = {case: held for case, held in golden["ranks"].items() if case.split()[0] in cases}
    if any(held != ranks[case] for case, held in others.items()):
        raise SystemExit(f"megatron-core {version} names or shapes tensors otherwise than those before it")
    golden["ranks"] |= ranks
    golden["held"][version] = len(ranks)
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(f"megatron-core {version}: {len(ranks)} ranks, logits apart by {golden['logits'][version]}")


if __name__ == "__main__":
    main()
