"""Writes checkpoints of megatron-core's GPTModel, as Megatron-LM leaves them, and what they hold.

Run by hand where megatron-core is installed, in `tests/` with PYTHONPATH=.:
`python sources/make_megatron_fixtures.py OUT CASE..` (default all).
Each case is a model of transformers with random weights. Its tensors are put into a GPTModel of one
process, name by name as written below, and its logits compared; from there megatron-core itself carries them
to the processes of the grid (dist_checkpointing), which write what the trainer writes: `dist`, by
dist_checkpointing.save, and `legacy`, by torch.save of state_dict_for_save_checkpoint(), each in the
directories of Megatron-LM's training/checkpointing.py. `truth.safetensors` and config.json are the model's
own. No GPU; 0.19 imports triton. Layers are of megatron's own spec: Transformer Engine's cannot be built
without it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

import megatron_on_cpu
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import torch.nn.functional as F
import transformers
from megatron.core import dist_checkpointing, package_info, tensor_parallel
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from safetensors.torch import save_file

megatron_on_cpu.enable()
torch.cuda.synchronize = lambda *a: None
torch.Tensor.cuda = lambda self, *a, **k: self

VERSION = package_info.__version__
H, HEADS, KV, WIDTH, EXPERT, VOCAB, PAD = 16, 4, 2, 24, 8, 19, 4
BASE = dict(
    vocab_size=VOCAB, hidden_size=H, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
    num_key_value_heads=KV, max_position_embeddings=16, tie_word_embeddings=False, pad_token_id=0,
    rope_theta=10000.0, rms_norm_eps=1e-6,
)  # fmt: skip
MLA = dict(
    kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, n_routed_experts=4,
    moe_intermediate_size=EXPERT, first_k_dense_replace=1, num_key_value_heads=HEADS, num_experts_per_tok=2,
    n_group=1, topk_group=1, n_shared_experts=1, q_lora_rank=6, rope_scaling=None,
)  # fmt: skip
MOE = dict(
    num_experts=4, moe_intermediate_size=EXPERT, head_dim=6, num_experts_per_tok=2, norm_topk_prob=True
)  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", BASE),
    "llama4": ("LlamaForCausalLM", BASE | {"num_hidden_layers": 4}),
    "qwen2": ("Qwen2ForCausalLM", BASE | {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", BASE | MOE),
    "deepseek_v3": ("DeepseekV3ForCausalLM", BASE | MLA),
    "gpt2": (
        "GPT2LMHeadModel",
        dict(vocab_size=VOCAB, n_embd=H, n_layer=2, n_head=HEADS, n_positions=16, tie_word_embeddings=True),
    ),
}
CASES = {
    # model, dtype, tp, pp, virtual stages, dp, ep, expert_tp, masters
    "llama": ("llama", torch.bfloat16, 2, 2, None, 1, 1, 2, True),
    "virtual": ("llama4", torch.bfloat16, 1, 2, 2, 1, 1, 1, False),
    "qwen2": ("qwen2", torch.float32, 2, 2, None, 1, 1, 2, False),
    "qwen3_moe": ("qwen3_moe", torch.float32, 2, 1, None, 2, 2, 2, False),
    "expert_tp": ("qwen3_moe", torch.float32, 2, 1, None, 1, 2, 1, False),
    "deepseek_v3": ("deepseek_v3", torch.float32, 2, 1, None, 2, 2, 2, False),
    "gpt2": ("gpt2", torch.float32, 2, 1, None, 1, 1, 2, False),
}
NO_LOGITS = ("deepseek_v3",)
"""megatron's own attention cannot run latent attention."""


# ---- the models ----


def hub(name):
    """transformers' model, its config, and its tensors as its files have them."""
    kind, sizes = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(len(name))
    model = cls(cls.config_class(**sizes)).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.randn_like(p) * 0.3 + (p if p.ndim == 1 else 0)).bfloat16().float())
    return model


def saved(model, folder):
    """What transformers writes: the hub's names."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(os.path.join(folder, "model.safetensors"))


def settings(name, tp, pp, vp, ep, etp):
    s = MODELS[name][1]
    kind = name.rstrip("4")
    common = dict(
        use_cpu_initialization=True, perform_initialization=False, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp, expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp, hidden_dropout=0.0, attention_dropout=0.0, add_bias_linear=False,
        masked_softmax_fusion=False, bias_dropout_fusion=False, bias_activation_fusion=False,
        apply_rope_fusion=False, transformer_impl="local", hidden_size=H, num_attention_heads=HEADS,
        num_layers=s.get("num_hidden_layers", 2), pipeline_dtype=torch.float32,
    )  # fmt: skip
    if kind == "gpt2":
        common |= dict(add_bias_linear=True, layernorm_epsilon=1e-5)
        return TransformerConfig(activation_func=lambda x: F.gelu(x, approximate="tanh"), **common)
    common |= dict(
        ffn_hidden_size=WIDTH, gated_linear_unit=True, activation_func=F.silu, normalization="RMSNorm",
        layernorm_epsilon=1e-6,
    )  # fmt: skip
    if kind == "deepseek_v3":
        common |= dict(
            num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=EXPERT, moe_layer_freq=[0, 1],
            moe_shared_expert_intermediate_size=EXPERT, q_lora_rank=6, kv_lora_rank=8, qk_head_dim=4,
            qk_pos_emb_head_dim=2, v_head_dim=4, qk_layernorm=True, multi_latent_attention=True,
            rope_type="rope", rotary_percent=1.0, moe_token_dispatcher_type="allgather",
            moe_router_pre_softmax=True, moe_router_enable_expert_bias=True,
            moe_router_score_function="sigmoid", moe_aux_loss_coeff=0.0,
            moe_router_load_balancing_type="none",
        )  # fmt: skip
        return MLATransformerConfig(**common)
    common |= dict(num_query_groups=KV, kv_channels=s.get("head_dim"))
    if kind == "qwen2":
        common |= dict(add_qkv_bias=True)
    if kind == "qwen3_moe":
        common |= dict(
            num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=EXPERT, moe_router_pre_softmax=False,
            moe_token_dispatcher_type="allgather", qk_layernorm=True,
        )  # fmt: skip
    return TransformerConfig(**common)


def padded(tp):
    return -(-VOCAB // (PAD * tp)) * PAD * tp


def built(name, vocab, tp=1, pp=1, vp=None, ep=1, etp=1):
    """megatron-core's model of this process: one a virtual stage."""
    config = settings(name, tp, pp, vp, ep, etp)
    stage = ps.get_pipeline_model_parallel_rank()
    models = []
    for chunk in range(vp or 1):
        first = stage == 0 and chunk == 0
        last = stage == pp - 1 and chunk == (vp or 1) - 1
        at = {} if vp is None else {"vp_stage": chunk}
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, **at
        )
        model = GPTModel(
            config, spec, vocab_size=vocab, max_sequence_length=16, pre_process=first, post_process=last,
            position_embedding_type="learned_absolute" if name == "gpt2" else "rope",
            share_embeddings_and_output_weights=MODELS[name][1]["tie_word_embeddings"], rotary_base=10000,
            **at,
        )  # fmt: skip
        models.append(model.float())
    return models


# ---- from the hub's names to a GPTModel's, tensor by tensor ----


def by_heads(q, k, v, kv):
    """For each kv head: its query heads, itself, its value head."""
    rows = []
    each, size = q.shape[0] // kv, k.shape[0] // kv
    for g in range(kv):
        rows += [q[g * each : (g + 1) * each], k[g * size : (g + 1) * size], v[g * size : (g + 1) * size]]
    return torch.cat(rows)


def placed(name, hubs, vocab):
    """name -> tensor of a GPTModel of one process; what pads the vocabulary is 7."""
    out = {}

    def words(x):
        return torch.cat([x, torch.full((vocab - VOCAB, H), 7.0)])

    if name == "gpt2":
        out["embedding.word_embeddings.weight"] = words(hubs["transformer.wte.weight"])
        out["embedding.position_embeddings.weight"] = hubs["transformer.wpe.weight"]
        for i in range(2):
            a, b = f"transformer.h.{i}.", f"decoder.layers.{i}."
            for leaf in ("weight", "bias"):
                out[f"{b}input_layernorm.{leaf}"] = hubs[f"{a}ln_1.{leaf}"]
                out[f"{b}pre_mlp_layernorm.{leaf}"] = hubs[f"{a}ln_2.{leaf}"]
                qkv = hubs[f"{a}attn.c_attn.{leaf}"]
                q, k, v = (qkv.T if leaf == "weight" else qkv).split(H)
                out[f"{b}self_attention.linear_qkv.{leaf}"] = by_heads(q, k, v, HEADS)
            for ours, theirs in (
                ("self_attention.linear_proj", "attn.c_proj"),
                ("mlp.linear_fc1", "mlp.c_fc"),
                ("mlp.linear_fc2", "mlp.c_proj"),
            ):
                out[f"{b}{ours}.weight"] = hubs[f"{a}{theirs}.weight"].T
                out[f"{b}{ours}.bias"] = hubs[f"{a}{theirs}.bias"]
        for leaf in ("weight", "bias"):
            out[f"decoder.final_layernorm.{leaf}"] = hubs[f"transformer.ln_f.{leaf}"]
        return out

    def mlp(at, theirs):
        out[f"{at}.linear_fc1.weight"] = torch.cat(
            [hubs[f"{theirs}.gate_proj.weight"], hubs[f"{theirs}.up_proj.weight"]]
        )
        out[f"{at}.linear_fc2.weight"] = hubs[f"{theirs}.down_proj.weight"]

    out["embedding.word_embeddings.weight"] = words(hubs["model.embed_tokens.weight"])
    out["decoder.final_layernorm.weight"] = hubs["model.norm.weight"]
    if "lm_head.weight" in hubs:
        out["output_layer.weight"] = words(hubs["lm_head.weight"])
    for i in range(MODELS[name][1]["num_hidden_layers"]):
        a, b = f"model.layers.{i}", f"decoder.layers.{i}"
        out[f"{b}.input_layernorm.weight"] = hubs[f"{a}.input_layernorm.weight"]
        out[f"{b}.pre_mlp_layernorm.weight"] = hubs[f"{a}.post_attention_layernorm.weight"]
        at, theirs = f"{b}.self_attention", f"{a}.self_attn"
        out[f"{at}.linear_proj.weight"] = hubs[f"{theirs}.o_proj.weight"]
        if name == "deepseek_v3":
            for ours, other in (
                ("linear_q_down_proj", "q_a_proj"), ("q_layernorm", "q_a_layernorm"),
                ("linear_q_up_proj", "q_b_proj"), ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
                ("kv_layernorm", "kv_a_layernorm"), ("linear_kv_up_proj", "kv_b_proj"),
            ):  # fmt: skip
                out[f"{at}.{ours}.weight"] = hubs[f"{theirs}.{other}.weight"]
        else:
            for leaf in ("weight", "bias"):
                if f"{theirs}.q_proj.{leaf}" in hubs:
                    q, k, v = (hubs[f"{theirs}.{n}_proj.{leaf}"] for n in "qkv")
                    out[f"{at}.linear_qkv.{leaf}"] = by_heads(q, k, v, KV)
            for n in "qk":
                if f"{theirs}.{n}_norm.weight" in hubs:
                    out[f"{at}.{n}_layernorm.weight"] = hubs[f"{theirs}.{n}_norm.weight"]
        if f"{a}.mlp.gate.weight" not in hubs:
            mlp(f"{b}.mlp", f"{a}.mlp")
            continue
        out[f"{b}.mlp.router.weight"] = hubs[f"{a}.mlp.gate.weight"]
        for e in range(4):
            mlp(f"{b}.mlp.experts.local_experts.{e}", f"{a}.mlp.experts.{e}")
        if name == "deepseek_v3":
            out[f"{b}.mlp.router.expert_bias"] = hubs[f"{a}.mlp.gate.e_score_correction_bias"]
            mlp(f"{b}.mlp.shared_experts", f"{a}.mlp.shared_experts")
    return out


# ---- what the trainer writes ----


def arguments(case):
    """Megatron-LM's args, those that say something of a model and some that do not."""
    name, dtype, tp, pp, vp, dp, ep, etp, _ = CASES[case]
    s = MODELS[name][1]
    moe = name in ("qwen3_moe", "deepseek_v3")
    gpt2 = name == "gpt2"
    grouped = not gpt2 and name != "deepseek_v3"
    return argparse.Namespace(
        num_layers=s.get("num_hidden_layers", 2), hidden_size=H, num_attention_heads=HEADS,
        ffn_hidden_size=4 * H if gpt2 else WIDTH, kv_channels=s.get("head_dim", H // HEADS),
        group_query_attention=grouped, num_query_groups=KV if grouped else 1,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp, expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp, context_parallel_size=1, data_parallel_size=dp,
        padded_vocab_size=padded(tp), vocab_size=None, make_vocab_size_divisible_by=PAD,
        untie_embeddings_and_output_weights=not s["tie_word_embeddings"], swiglu=not gpt2,
        normalization="LayerNorm" if gpt2 else "RMSNorm", apply_layernorm_1p=False, rotary_interleaved=False,
        position_embedding_type="learned_absolute" if gpt2 else "rope", max_position_embeddings=16,
        rotary_base=10000, rotary_percent=1.0, add_bias_linear=gpt2, add_qkv_bias=name == "qwen2",
        num_experts=4 if moe else None, moe_ffn_hidden_size=EXPERT if moe else None, moe_grouped_gemm=False,
        multi_latent_attention=name == "deepseek_v3", qk_layernorm=name in ("qwen3_moe", "deepseek_v3"),
        decoder_first_pipeline_num_layers=None, decoder_last_pipeline_num_layers=None, mtp_num_layers=None,
        transformer_impl="local", attention_backend=AttnBackend.auto, params_dtype=dtype, iteration=100,
        bf16=dtype is torch.bfloat16, use_distributed_optimizer=False, ckpt_format="torch_dist",
        rank=dist.get_rank(), world_size=dist.get_world_size(),
    )  # fmt: skip


def state(case, models, kind):
    """Megatron-LM's generate_state_dict."""
    out = {"args": arguments(case), "checkpoint_version": 3.0, "iteration": 100}
    for i, model in enumerate(models):
        key = "model" if len(models) == 1 else f"model{i}"
        if kind == "dist":
            out[key] = model.sharded_state_dict(metadata=metadata())
        else:
            out[key] = model.state_dict_for_save_checkpoint()
    out["opt_param_scheduler"] = {"max_lr": 1e-4, "num_steps": 100}
    out["num_floating_point_operations_so_far"] = 0
    return out


def metadata():
    return {
        "singleton_local_shards": SINGLETON,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
    }


SINGLETON = False
"""Every layer and expert, gate and up apart, under names of their own."""


def masters(sharded, exact):
    """The fp32 copies of the weights, as Float16OptimizerWithFloat16Params names them."""
    flat, out = [], {}

    def walk(x):
        for value in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                flat.append(value)
            walk(value)

    walk(sharded)
    for k, value in enumerate(flat):
        full = exact[value.data.data_ptr()]
        out[k] = make_sharded_optimizer_tensor(value, full, "optimizer.state.fp32_param")
        out[f"{k} exp_avg"] = make_sharded_optimizer_tensor(value, full * 3, "optimizer.state.exp_avg")
    return out


def grid_process(rank, case, one, out, singleton):
    global SINGLETON
    SINGLETON = singleton
    name, dtype, tp, pp, vp, dp, ep, etp, mastered = CASES[case]
    world = tp * pp * dp
    joined(rank, world, out)
    ps.initialize_model_parallel(
        tp, pp, virtual_pipeline_model_parallel_size=vp, expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )  # fmt: skip
    models = built(name, padded(tp), tp, pp, vp, ep, etp)
    wanted = {f"model{i}": m.sharded_state_dict() for i, m in enumerate(models)}
    loaded = dist_checkpointing.load(wanted, one)
    exact = {}
    for i, model in enumerate(models):
        model.load_state_dict(loaded[f"model{i}"])
        full = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.to(dtype)
        exact |= {p.data_ptr(): full[n] for n, p in model.named_parameters()}
        for n, b in model.named_buffers():
            if n.endswith("expert_bias"):
                b.data = b.data.float()
    root = f"{out}/dist/iter_0000100"
    if rank == 0:
        os.makedirs(root)
    dist.barrier()
    sharded = state(case, models, "dist")
    if mastered:
        sharded["optimizer"] = masters([sharded[k] for k in sharded if k.startswith("model")], exact)
    dist_checkpointing.save(sharded, root, content_metadata={"singleton_local_shards": SINGLETON})
    if not singleton and (ps.get_data_parallel_rank() == 0 or ps.get_expert_data_parallel_rank() == 0):
        at = f"{out}/legacy/iter_0000100/mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
        at += f"_{ps.get_pipeline_model_parallel_rank():03d}" if pp > 1 else ""
        at += f"_{ps.get_expert_model_parallel_rank():03d}" if ep > 1 else ""
        os.makedirs(at)
        torch.save(state(case, models, "legacy"), f"{at}/model_optim_rng.pt")
    dist.barrier()
    if rank == 0:
        for kind in ("dist",) if singleton else ("dist", "legacy"):
            Path(f"{out}/{kind}/latest_checkpointed_iteration.txt").write_text("100")
    dist.destroy_process_group()


def joined(rank, world, out):
    dist.init_process_group("gloo", init_method=f"file://{out}/met-{world}", rank=rank, world_size=world)


def one_process(rank, case, one, out):
    """The model in one process: filled, compared, and saved for megatron-core to cut."""
    name, dtype, tp, *_ = CASES[case]
    joined(0, 1, out)
    ps.initialize_model_parallel(1, 1)
    source = hub(name)
    if CASES[case][-1]:  # values that 16 bits do not hold
        with torch.no_grad():
            for p in source.parameters():
                p.add_(p.abs() * 2.0**-12)
    exact = saved(source, out)
    os.rename(f"{out}/model.safetensors", f"{out}/masters.safetensors")
    if not CASES[case][-1]:
        os.remove(f"{out}/masters.safetensors")
    save_file({n: x.to(dtype) for n, x in exact.items()}, f"{out}/truth.safetensors")
    vocab = padded(tp)
    (model,) = built(name, vocab)
    tensors = placed(name, exact, vocab)
    held = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if "expert_bias" in n}
    assert sorted(held) == sorted(tensors), set(held) ^ set(tensors)
    with torch.no_grad():
        for n, p in held.items():
            assert p.shape == tensors[n].shape, (n, p.shape, tensors[n].shape)
            p.copy_(tensors[n])
        if name not in NO_LOGITS:
            tensor_parallel.get_cuda_rng_tracker().fork = contextlib.nullcontext  # no dropout: no state of it
            ids = torch.arange(1, 13)[None] * 7 % VOCAB
            mask = torch.ones(1, 1, 12, 12).triu(1).bool()
            apart = model.eval()(ids, torch.arange(12)[None], mask)[..., :VOCAB] - source(ids).logits
            assert apart.abs().max() < 1e-5, apart.abs().max()
            print(f"{case}: logits apart by {float(apart.abs().max()):.1e}")
    os.makedirs(one)
    dist_checkpointing.save({"model0": model.sharded_state_dict()}, one)
    dist.destroy_process_group()


def main():
    out, cases = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    for case in cases:
        here = out / f"{case}-{VERSION}"
        here.mkdir(parents=True)
        here = here.resolve()
        one = str(here / "one")
        processes.spawn(one_process, (case, one, str(here)), nprocs=1)
        _, _, tp, pp, _, dp, *_ = CASES[case]
        processes.spawn(grid_process, (case, one, str(here), False), nprocs=tp * pp * dp)
        if case in ("llama", "qwen3_moe"):
            other = here.with_name(f"{case}-singleton-{VERSION}")
            other.mkdir()
            processes.spawn(grid_process, (case, one, str(other), True), nprocs=tp * pp * dp)


if __name__ == "__main__":
    main()
