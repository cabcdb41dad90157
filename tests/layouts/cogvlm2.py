"""CogVLM2 in plain torch, which transformers does not have: modules and names as THUDM's modeling_cogvlm.py
and visual.py define them. Run on ranks side by side it adds up what each makes of its heads and widths."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from layouts import families
from torch import nn

CONFIG = dict(
    architectures=["CogVLMForCausalLM"], vocab_size=208, hidden_size=64, intermediate_size=96,
    num_hidden_layers=2, num_attention_heads=8, num_multi_query_heads=2, rms_norm_eps=1e-5,
    tie_word_embeddings=False, template_version="chat",
    vision_config=dict(
        in_channels=3, hidden_size=24, intermediate_size=40, num_heads=4, num_hidden_layers=2,
        num_positions=17, patch_size=2, image_size=8, hidden_act="gelu", layer_norm_eps=1e-6,
    ),
)  # fmt: skip


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self, hidden, heads, kv_heads, size):
        super().__init__()
        self.sizes = heads, kv_heads, size
        for kind in ("vision", "language"):
            rows = (heads + 2 * kv_heads) * size
            self.add_module(f"{kind}_expert_query_key_value", nn.Linear(hidden, rows, bias=kind == "vision"))
            self.add_module(f"{kind}_expert_dense", nn.Linear(heads * size, hidden, bias=False))

    def forward(self, x, image):
        heads, kv_heads, d = self.sizes
        one = self.vision_expert_query_key_value(x), self.language_expert_query_key_value(x)
        mixed = torch.where(image[:, None], *one)
        q, k, v = mixed.split([heads * d, kv_heads * d, kv_heads * d], -1)
        q, k, v = (y.view(len(x), -1, d).transpose(0, 1) for y in (q, k, v))
        k, v = (y.repeat_interleave(heads // kv_heads, 0) for y in (rotated(k), v))
        out = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        out = out.transpose(0, 1).flatten(1)
        return torch.where(image[:, None], self.vision_expert_dense(out), self.language_expert_dense(out))


def rotated(x):
    half = x.shape[-1] // 2
    turns = torch.arange(x.shape[1])[:, None] * 500000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * turns.cos() - b * turns.sin(), b * turns.cos() + a * turns.sin()], -1)


class Mlp(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Mlps(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.language_mlp, self.vision_mlp = Mlp(hidden, width), Mlp(hidden, width)

    def forward(self, x, image):
        return torch.where(image[:, None], self.vision_mlp(x), self.language_mlp(x))


class Layer(nn.Module):
    def __init__(self, hidden, heads, kv_heads, size, width):
        super().__init__()
        self.self_attn = Attention(hidden, heads, kv_heads, size)
        self.mlp = Mlps(hidden, width)
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden), Norm(hidden)


class Patches(nn.Module):
    def __init__(self, channels, size, patch, positions):
        super().__init__()
        self.proj = nn.Conv2d(channels, size, patch, patch)
        self.cls_embedding = nn.Parameter(torch.empty(1, size))
        self.position_embedding = nn.Embedding(positions, size)


class Block(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention, self.mlp = nn.Module(), nn.Module()
        self.attention.query_key_value = nn.Linear(size, 3 * size)
        self.attention.dense = nn.Linear(size, size)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(size, width), nn.Linear(width, size)


class Tower(nn.Module):
    def __init__(self, c, v):
        super().__init__()
        size, hidden, width = v["hidden_size"], c["hidden_size"], c["intermediate_size"]
        self.patch_embedding = Patches(v["in_channels"], size, v["patch_size"], v["num_positions"])
        self.transformer = nn.Module()
        blocks = [Block(size, v["intermediate_size"]) for _ in range(v["num_hidden_layers"])]
        self.transformer.layers = nn.ModuleList(blocks)
        glu = self.linear_proj = nn.Module()
        glu.linear_proj, glu.norm1 = nn.Linear(size, hidden, bias=False), nn.LayerNorm(hidden)
        glu.dense_h_to_4h = nn.Linear(hidden, width, bias=False)
        glu.gate_proj = nn.Linear(hidden, width, bias=False)
        glu.dense_4h_to_h = nn.Linear(width, hidden, bias=False)
        self.conv = nn.Conv2d(size, size, 2, 2)
        self.boi = nn.Parameter(torch.empty(1, 1, hidden))
        self.eoi = nn.Parameter(torch.empty(1, 1, hidden))


class Model(nn.Module):
    """The model, or one rank's part of it at tp ranks."""

    def __init__(self, tp=1):
        super().__init__()
        c, inner = CONFIG, nn.Module()
        hidden, heads = c["hidden_size"], c["num_attention_heads"]
        local = hidden, heads // tp, max(1, c["num_multi_query_heads"] // tp), hidden // heads
        self.model = inner
        inner.embed_tokens = nn.Embedding(c["vocab_size"] // tp, hidden)
        layers = [Layer(*local, c["intermediate_size"] // tp) for _ in range(c["num_hidden_layers"])]
        inner.layers, inner.norm = nn.ModuleList(layers), Norm(hidden)
        inner.vision = Tower(c, c["vision_config"])
        self.lm_head = nn.Linear(hidden, c["vocab_size"] // tp, bias=False)


@torch.no_grad()
def logits(ranks, ids, image, features):
    """Logits of tokens, of which those where `image` is true are the vectors `features`."""
    bodies = [r.model for r in ranks]
    x = torch.cat([b.embed_tokens.weight for b in bodies])[ids]
    x[image] = features
    for each in zip(*(b.layers for b in bodies), strict=True):
        x = x + sum(m.self_attn(m.input_layernorm(x), image) for m in each)
        x = x + sum(m.mlp(m.post_attention_layernorm(x), image) for m in each)
    return torch.cat([r.lm_head(bodies[0].norm(x)) for r in ranks], -1)


@functools.cache
def made():
    """(config, tensors, tensors): every element another number, as families.made."""
    tensors = {n: x.detach().clone() for n, x in Model().state_dict().items()}
    families.number(tensors)
    return CONFIG, tensors, tensors
