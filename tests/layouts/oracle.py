"""What each rank must hold, in torch, from the layouts' definitions; and the way back to the whole model.

Everything starts from the hub's tensors by the hub's names. Nothing here comes from the package.
"""

from __future__ import annotations

import torch


def _cut(x, dim, tp, r):
    assert x.shape[dim] % tp == 0
    return x.chunk(tp, dim)[r]


def _pad(x, multiple):
    rows = -(-x.shape[0] // multiple) * multiple
    return torch.cat([x, torch.zeros(rows - x.shape[0], *x.shape[1:], dtype=x.dtype)])


class Heads:
    """Which heads a rank holds: its query heads, and each kv head that one of those reads."""

    def __init__(self, config):
        self.n = config.get("num_attention_heads") or config["n_head"]
        self.kv = config.get("num_key_value_heads") or self.n
        hidden = config.get("hidden_size") or config["n_embd"]
        self.d = config.get("head_dim") or hidden // self.n

    def q_of(self, tp, r):
        return list(range(r * self.n // tp, (r + 1) * self.n // tp))

    def kv_of(self, tp, r):
        return sorted({h // (self.n // self.kv) for h in self.q_of(tp, r)})

    def pick(self, x, heads):
        return torch.cat([x[h * self.d : (h + 1) * self.d] for h in heads])

    def q(self, x, tp, r):
        return self.pick(x, self.q_of(tp, r))

    def k(self, x, tp, r):
        return self.pick(x, self.kv_of(tp, r))

    def together(self, parts, owners, count):
        """The whole tensor from ranks' heads; replicas must be equal."""
        found = {}
        for part, heads in zip(parts, owners, strict=True):
            for i, h in enumerate(heads):
                one = part[i * self.d : (i + 1) * self.d]
                assert h not in found or torch.equal(found[h], one)
                found[h] = one
        return torch.cat([found[h] for h in range(count)])


def _layers(t, config):
    return range(config.get("num_hidden_layers") or config["n_layer"])


def _is_norm(name):
    return any(part in name for part in ("norm", ".ln_", ".wpe.", "block_sparse_moe.gate."))


# ---- hf ----


def hf(t, config, tp, r):
    heads, out = Heads(config), {}
    for name, x in t.items():
        part = name.split(".")[-2]
        if _is_norm(name):
            out[name] = x
        elif part in ("embed_tokens", "lm_head", "wte", "gate_proj", "up_proj", "w1", "w3"):
            out[name] = _cut(x, 0, tp, r)
        elif part == "q_proj":
            out[name] = heads.q(x, tp, r)
        elif part in ("k_proj", "v_proj"):
            out[name] = heads.k(x, tp, r)
        elif part in ("o_proj", "down_proj", "w2"):
            out[name] = x if name.endswith("bias") else _cut(x, 1, tp, r)
        elif part == "c_attn":
            out[name] = torch.cat([_cut(y, -1, tp, r) for y in x.chunk(3, -1)], -1)
        elif part == "c_fc":
            out[name] = _cut(x, -1, tp, r)
        elif part == "c_proj":
            out[name] = x if name.endswith("bias") else _cut(x, 0, tp, r)
        else:
            raise KeyError(name)
    return out


def hf_whole(shards, config):
    heads, tp, out = Heads(config), len(shards), {}
    for name, first in shards[0].items():
        part, xs = name.split(".")[-2], [s[name] for s in shards]
        if _is_norm(name) or (name.endswith("bias") and part in ("o_proj", "down_proj", "c_proj")):
            assert all(torch.equal(x, first) for x in xs)
            out[name] = first
        elif part in ("k_proj", "v_proj"):
            out[name] = heads.together(xs, [heads.kv_of(tp, r) for r in range(tp)], heads.kv)
        elif part == "c_attn":
            out[name] = torch.cat([torch.cat([x.chunk(3, -1)[j] for x in xs], -1) for j in range(3)], -1)
        else:
            dim = {"o_proj": 1, "down_proj": 1, "w2": 1, "c_fc": -1, "c_proj": 0}.get(part, 0)
            out[name] = torch.cat(xs, dim)
    return out


# ---- vllm ----


def vllm(t, config, tp, r):
    heads, out = Heads(config), {}
    for name, x in t.items():
        if name.split(".")[-2] in ("embed_tokens", "lm_head", "wte"):
            out[name] = _cut(_pad(x, 64), 0, tp, r)
        elif _is_norm(name):
            out[name] = x
    for i in _layers(t, config):
        if "n_head" in config:
            a, m = f"transformer.h.{i}.attn.", f"transformer.h.{i}.mlp."
            for kind in ("weight", "bias"):
                qkv = t[a + "c_attn." + kind]
                qkv = qkv.t() if kind == "weight" else qkv
                out[a + "c_attn." + kind] = torch.cat([_cut(y, 0, tp, r) for y in qkv.chunk(3, 0)])
                fc = t[m + "c_fc." + kind]
                out[m + "c_fc." + kind] = _cut(fc.t() if kind == "weight" else fc, 0, tp, r)
            for at in (a, m):
                out[at + "c_proj.weight"] = _cut(t[at + "c_proj.weight"].t(), 1, tp, r)
                out[at + "c_proj.bias"] = t[at + "c_proj.bias"]
            continue
        a, m = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for kind in ("weight", "bias"):
            if a + "q_proj." + kind in t:
                q, k, v = (t[a + p + "_proj." + kind] for p in "qkv")
                parts = [heads.q(q, tp, r), heads.k(k, tp, r), heads.k(v, tp, r)]
                out[a + "qkv_proj." + kind] = torch.cat(parts)
            if m + "gate_proj." + kind in t:
                parts = [_cut(t[m + p + "_proj." + kind], 0, tp, r) for p in ("gate", "up")]
                out[m + "gate_up_proj." + kind] = torch.cat(parts)
        for at in (a + "o_proj", m + "down_proj"):
            if at + ".weight" in t:
                out[at + ".weight"] = _cut(t[at + ".weight"], 1, tp, r)
            if at + ".bias" in t:
                out[at + ".bias"] = t[at + ".bias"]
        if "num_local_experts" in config:
            e = f"model.layers.{i}.block_sparse_moe.experts."
            each = [f"{e}{j}." for j in range(config["num_local_experts"])]
            w13 = [torch.cat([_cut(t[at + w + ".weight"], 0, tp, r) for w in ("w1", "w3")]) for at in each]
            out[e + "w13_weight"] = torch.stack(w13)
            out[e + "w2_weight"] = torch.stack([_cut(t[at + "w2.weight"], 1, tp, r) for at in each])
    return out


def vllm_whole(shards, config):
    heads, tp, out, vocab = Heads(config), len(shards), {}, config["vocab_size"]
    q_of, kv_of = [heads.q_of(tp, r) for r in range(tp)], [heads.kv_of(tp, r) for r in range(tp)]
    for name, first in shards[0].items():
        xs = [s[name] for s in shards]
        stem, _, part = name.rpartition(".")[0].rpartition(".")
        kind = name.rpartition(".")[2]
        if part in ("embed_tokens", "lm_head", "wte"):
            rows = torch.cat(xs)
            assert not rows[vocab:].any()
            out[name] = rows[:vocab]
        elif _is_norm(name) or (kind == "bias" and part in ("o_proj", "down_proj", "c_proj")):
            assert all(torch.equal(x, first) for x in xs)
            out[name] = first
        elif part in ("qkv_proj", "c_attn"):
            nq, nk = len(q_of[0]) * heads.d, len(kv_of[0]) * heads.d
            q, k, v = zip(*(x.split([nq, nk, nk]) for x in xs), strict=True)
            q = heads.together(q, q_of, heads.n)
            k, v = (heads.together(y, kv_of, heads.kv) for y in (k, v))
            if part == "c_attn":
                x = torch.cat([q, k, v])
                out[name] = x.t() if kind == "weight" else x
            else:
                for p, x in zip("qkv", (q, k, v), strict=True):
                    out[f"{stem}.{p}_proj.{kind}"] = x
        elif part == "gate_up_proj":
            for j, p in enumerate(("gate", "up")):
                out[f"{stem}.{p}_proj.{kind}"] = torch.cat([x.chunk(2)[j] for x in xs])
        elif kind == "w13_weight":
            for e in range(first.shape[0]):
                for j, w in enumerate(("w1", "w3")):
                    out[f"{stem}.{part}.{e}.{w}.weight"] = torch.cat([x[e].chunk(2)[j] for x in xs])
        elif kind == "w2_weight":
            for e in range(first.shape[0]):
                out[f"{stem}.{part}.{e}.w2.weight"] = torch.cat([x[e] for x in xs], 1)
        elif part in ("o_proj", "down_proj"):
            out[name] = torch.cat(xs, 1)
        elif part == "c_fc":
            x = torch.cat(xs)
            out[name] = x.t() if kind == "weight" else x
        elif part == "c_proj":
            out[name] = torch.cat(xs, 1).t()
        else:
            raise KeyError(name)
    return out


# ---- rtp_llm ----


def rtp_llm(t, config, tp, r):
    heads, key = Heads(config), f"rank_{r:02d}_00_00."
    head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    out = {
        key + "global.embedding": _cut(t["model.embed_tokens.weight"], 1, tp, r),
        key + "global.lm_head": head if tp == 1 else _cut(_pad(head, 8 * tp), 0, tp, r),
    }
    norms = {"model.norm": key + "global.final_layernorm"}
    for i in _layers(t, config):
        at, to = f"model.layers.{i}.", f"{key}layers.{i}."
        a, sa = at + "self_attn.", to + "self_attention_weights."
        norms[at + "input_layernorm"] = to + "pre_layernorm_weights"
        norms[at + "post_attention_layernorm"] = to + "post_layernorm_weights"
        qkv = [heads.q(t[a + "q_proj.weight"], tp, r)]
        qkv += [heads.k(t[a + p + "_proj.weight"], tp, r) for p in "kv"]
        out[sa + "query_weight.kernel"] = torch.cat([x.t() for x in qkv], 1)
        if a + "q_proj.bias" in t:
            b = [heads.q(t[a + "q_proj.bias"], tp, r)]
            b += [heads.k(t[a + p + "_proj.bias"], tp, r) for p in "kv"]
            out[sa + "query_weight.bias"] = torch.cat(b)[None] if tp > 1 else torch.cat(b)
        out[sa + "attention_output_weight.kernel"] = _cut(t[a + "o_proj.weight"].t(), 0, tp, r)
        if a + "o_proj.bias" in t:
            out[sa + "attention_output_weight.bias"] = t[a + "o_proj.bias"]
        for p in "qk":
            if a + f"{p}_norm.weight" in t:
                out[sa + f"{p}_layernorm.gamma"] = t[a + f"{p}_norm.weight"]
        if "num_local_experts" in config:
            moe, e = to + "partial_moe_weights.", at + "block_sparse_moe."
            each = [f"{e}experts.{j}." for j in range(config["num_local_experts"])]
            up = torch.stack([t[x + "w3.weight"] for x in each])
            gate = torch.stack([t[x + "w1.weight"] for x in each])
            down = torch.stack([t[x + "w2.weight"] for x in each])
            out[moe + "gate.kernel"] = t[e + "gate.weight"].t()
            out[moe + "intermediate_weight.kernel"] = torch.cat([_cut(up, 1, tp, r), _cut(gate, 1, tp, r)], 1)
            out[moe + "intermediate_weight2.kernel"] = _cut(down, 2, tp, r)
            continue
        m, ffn = at + "mlp.", to + "ffn_weights."
        if m + "gate_proj.weight" not in t:
            up, down = ("up_proj", "down_proj") if m + "up_proj.weight" in t else ("c_fc", "c_proj")
            out[ffn + "intermediate_weight3.kernel"] = _cut(t[f"{m}{up}.weight"].t(), 1, tp, r)
            out[ffn + "intermediate_weight2.kernel"] = _cut(t[f"{m}{down}.weight"].t(), 0, tp, r)
            if f"{m}{up}.bias" in t:
                out[ffn + "intermediate_weight3.bias"] = _cut(t[f"{m}{up}.bias"], 0, tp, r)
                out[ffn + "intermediate_weight2.bias"] = t[f"{m}{down}.bias"]
            continue
        pair = [_cut(t[m + p + "_proj.weight"].t(), 1, tp, r) for p in ("gate", "up")]
        out[ffn + "intermediate_weight13.kernel"] = torch.cat(pair, 1)
        out[ffn + "intermediate_weight2.kernel"] = _cut(t[m + "down_proj.weight"].t(), 0, tp, r)
        if m + "gate_proj.bias" in t:
            pair = [_cut(t[m + p + "_proj.bias"], 0, tp, r) for p in ("gate", "up")]
            out[ffn + "intermediate_weight13.bias"] = torch.cat(pair)
            out[ffn + "intermediate_weight2.bias"] = t[m + "down_proj.bias"]
    for name, to in norms.items():
        for leaf, own in (("weight", "gamma"), ("bias", "beta")):
            if f"{name}.{leaf}" in t:
                out[f"{to}.{own}"] = t[f"{name}.{leaf}"]
    return out


def rtp_llm_whole(shards, config):
    heads, tp, vocab = Heads(config), len(shards), config["vocab_size"]
    q_of, kv_of = [heads.q_of(tp, r) for r in range(tp)], [heads.kv_of(tp, r) for r in range(tp)]
    bare = [{k.split(".", 1)[1]: v for k, v in s.items()} for s in shards]
    out = {}
    for name, first in bare[0].items():
        xs = [s[name] for s in bare]
        where, _, role = name.partition(".")
        at = "" if where == "global" else f"model.layers.{role.split('.')[0]}."
        role = role if where == "global" else role.split(".", 1)[1]
        whole = {
            "final_layernorm.gamma": "model.norm.weight",
            "pre_layernorm_weights.gamma": at + "input_layernorm.weight",
            "post_layernorm_weights.gamma": at + "post_attention_layernorm.weight",
            "self_attention_weights.q_layernorm.gamma": at + "self_attn.q_norm.weight",
            "self_attention_weights.k_layernorm.gamma": at + "self_attn.k_norm.weight",
            "self_attention_weights.attention_output_weight.bias": at + "self_attn.o_proj.bias",
            "ffn_weights.intermediate_weight2.bias": at + "mlp.down_proj.bias",
            "partial_moe_weights.gate.kernel": at + "block_sparse_moe.gate.weight",
        }
        if role in whole:
            assert all(torch.equal(x, first) for x in xs)
            out[whole[role]] = first.t() if first.ndim == 2 else first
        elif role == "embedding":
            out["model.embed_tokens.weight"] = torch.cat(xs, 1)
        elif role == "lm_head":
            rows = torch.cat(xs)
            assert not rows[vocab:].any()
            out["lm_head.weight"] = rows[:vocab]
        elif role.startswith("self_attention_weights.query_weight"):
            nq, nk = len(q_of[0]) * heads.d, len(kv_of[0]) * heads.d
            kind = "weight" if role.endswith("kernel") else "bias"
            flat = [x.t() if kind == "weight" else x.flatten() for x in xs]
            q, k, v = zip(*(x.split([nq, nk, nk]) for x in flat), strict=True)
            out[f"{at}self_attn.q_proj.{kind}"] = heads.together(q, q_of, heads.n)
            out[f"{at}self_attn.k_proj.{kind}"] = heads.together(k, kv_of, heads.kv)
            out[f"{at}self_attn.v_proj.{kind}"] = heads.together(v, kv_of, heads.kv)
        elif role.startswith("self_attention_weights.attention_output_weight"):
            out[at + "self_attn.o_proj.weight"] = torch.cat(xs, 0).t()
        elif role.startswith("ffn_weights.intermediate_weight13"):
            kind = "weight" if role.endswith("kernel") else "bias"
            for j, p in enumerate(("gate", "up")):
                x = torch.cat([x.chunk(2, -1)[j] for x in xs], -1)
                out[f"{at}mlp.{p}_proj.{kind}"] = x.t() if kind == "weight" else x
        elif role == "ffn_weights.intermediate_weight2.kernel":
            out[at + "mlp.down_proj.weight"] = torch.cat(xs, 0).t()
        elif role == "partial_moe_weights.intermediate_weight.kernel":
            for e in range(first.shape[0]):
                for j, w in enumerate(("w3", "w1")):
                    x = torch.cat([x[e].chunk(2)[j] for x in xs])
                    out[f"{at}block_sparse_moe.experts.{e}.{w}.weight"] = x
        elif role == "partial_moe_weights.intermediate_weight2.kernel":
            for e in range(first.shape[0]):
                out[f"{at}block_sparse_moe.experts.{e}.w2.weight"] = torch.cat([x[e] for x in xs], 1)
        else:
            raise KeyError(name)
    return out
