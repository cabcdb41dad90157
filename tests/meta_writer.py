"""A model of the hub as Meta, Mistral and torchtitan write it, which shares nothing with the package."""

from __future__ import annotations

import json
import re

import torch

PAIRS = {"llama", "mistral", "mixtral"}
"""The families whose rotary positions turn neighbouring rows there, in the hub's model halves of a head."""

OUTSIDE = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_layernorm": "attention.q_norm", "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a", "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.q_a_proj": "attention.wq_a", "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm",
    **{f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"},
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "mlp.gate": "moe.router.gate", "mlp.gate.e_score_correction_bias": "moe.expert_bias",
    "mlp.shared_experts.gate_proj": "moe.shared_experts.w1",
    "mlp.shared_experts.down_proj": "moe.shared_experts.w2",
    "mlp.shared_experts.up_proj": "moe.shared_experts.w3",
    "block_sparse_moe.gate": "feed_forward.gate",
}  # fmt: skip
SINCE_3 = (
    (r"attention\.w([qkv])\.", r"attention.qkv_linear.w\1."), (r"^output", "lm_head"),
    (r"moe\.experts\.(w[13])$", r"moe.routed_experts.inner_experts.\1_EFD"),
    (r"moe\.experts\.w2$", "moe.routed_experts.inner_experts.w2_EDF"), (r"expert_bias$", "expert_bias_E"),
)  # fmt: skip
COLUMNS = re.compile(r"attention\.wo\.|feed_forward\.w2\.")


def metas(hub, config, since_3=False):
    """Meta's names and rows; with `since_3`, those of torchtitan since 0.3."""
    out, stacks = {}, {}
    for name, x in hub.items():
        layer, within = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+)", name).groups()
        if found := re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|down|up)_proj\.weight", within):
            which = {"gate": "w1", "down": "w2", "up": "w3"}[found[2]]
            stacks.setdefault(f"{layer}moe.experts.{which}", []).append(x)
            continue
        if config["model_type"] in PAIRS and within in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
            heads = x.unflatten(0, (-1, 2, size_of(config) // 2))  # [heads, halves, size / 2, in]
            x = torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(x.shape)
        module, leaf = (within, "") if within in OUTSIDE else within.rsplit(".", 1)
        if expert := re.fullmatch(r"block_sparse_moe(\.experts\.\d+\.w[123])", module):
            module = f"feed_forward{expert[1]}"
        out[".".join(filter(None, ((layer or "") + OUTSIDE.get(module, module), leaf)))] = x.contiguous()
    out |= {name: torch.stack(experts) for name, experts in stacks.items()}
    for pattern, new in SINCE_3 if since_3 else ():
        out = {re.sub(pattern, new, name): x for name, x in out.items()}
    return out


def size_of(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def release(path, tensors, config, parts=1, embedding_axis=0):
    """Writes consolidated.NN.pth and params.json."""
    path.mkdir(parents=True, exist_ok=True)
    for n in range(parts):
        part = {}
        for name, x in tensors.items():
            axis = embedding_axis if name.startswith("tok") else int(bool(COLUMNS.search(name)))
            part[name] = x if x.ndim == 1 else x.chunk(parts, axis)[n].clone()
        torch.save(part, path / f"consolidated.{n:02d}.pth")
    params = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "vocab_size": -1,
        "n_heads": config["num_attention_heads"], "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": 1e-5,
    }  # fmt: skip
    (path / "params.json").write_text(json.dumps(params))
    return path
