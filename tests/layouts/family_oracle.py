"""What each rank must hold of any family, in torch, from names alone. Nothing here comes from the package."""

from __future__ import annotations

import re

import torch

TABLES = (
    "embed_tokens", "word_embeddings", "embed_in", "tok_embeddings", "wte", "lm_head", "embed_out",
    "output_layer", "embeddings",
)  # fmt: skip
OUT = (
    "per_layer_model_projection", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "dense_h_to_4h", "c_fc",
    "fc1", "fc_in",
)  # fmt: skip
ENCODER_OUT = (
    "shared", "query", "key", "value", "q", "k", "v", "wi", "wi_0", "wi_1", "q_proj", "k_proj", "v_proj",
    "fc1",
)  # fmt: skip
ENCODER_IN = ("dense", "o", "wo", "out_proj", "fc2")
HEAD_BIASES = ("cls.predictions.bias", "decoder.bias")
FUSED = ("query_key_value", "c_attn", "Wqkv")
IN = (
    "output_linear", "o_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "out_proj",
    "Wo", "w2",
)  # fmt: skip


def cut(x, dim, tp, r):
    assert x.shape[dim] % tp == 0
    return x.chunk(tp, dim)[r]


def pick(x, heads, d):
    return torch.cat([x[h * d : (h + 1) * d] for h in heads])


def heads_of(heads, tp, r):
    """The query heads of a rank and every kv head that one of them reads."""
    n, kv, _ = heads
    q = range(r * n // tp, (r + 1) * n // tp)
    return list(q), sorted({h // (n // kv) for h in q})


def parts(x, heads, grouped):
    """q, k and v of a fused matrix or vector, head by head."""
    n, kv, d = heads
    g = n // kv
    blocks = list(x.split(d))
    if not grouped:
        return torch.cat(blocks[:n]), torch.cat(blocks[n : n + kv]), torch.cat(blocks[n + kv :])
    q, k, v = [], [], []
    for i in range(kv):
        group = blocks[i * (g + 2) : (i + 1) * (g + 2)]
        q += group[:g]
        k.append(group[g])
        v.append(group[g + 1])
    return torch.cat(q), torch.cat(k), torch.cat(v)


def hf(t, heads, tp, r):
    """Families without a plan of transformers: heads, widths, vocabulary rows; fused ones group by group."""
    (n, kv, d), (mine, its), out = heads, heads_of(heads, tp, r), {}
    for name, x in t.items():
        module, kind = name.split(".")[-2:]
        if module in TABLES:
            out[name] = cut(x, 0, tp, r)
        elif module in FUSED:
            concat = "encoder.layers" in name or module == "Wqkv"  # all of q, all of k, all of v
            q, k, v = parts(x, heads, not concat)
            if concat:
                out[name] = torch.cat([pick(q, mine, d), pick(k, its, d), pick(v, its, d)])
            else:
                rows = []
                for g in its:
                    rows += [
                        pick(q, [h for h in mine if h // (n // kv) == g], d),
                        pick(k, [g], d),
                        pick(v, [g], d),
                    ]
                out[name] = torch.cat(rows)
        elif module in ("wpe", "position_embeddings", "embed_positions", "token_type_embeddings"):
            out[name] = x
        elif module in ("w1", "w3"):
            out[name] = cut(x, 0, tp, r)
        elif ".conv." in name:  # short convolutions are whole
            out[name] = x
        elif (
            name.startswith(("cls.predictions.tr", "lm_head.", "classifier", "head."))
            or "pooler" in name
            or "conv" in name
        ):
            out[name] = cut(x, 0, tp, r) if name == "lm_head.bias" else x
        elif module in ("dense_h_to_4h", "Wi"):
            halves = x.chunk(2) if "encoder.layers" in name or module == "Wi" else [x]
            out[name] = torch.cat([cut(y, 0, tp, r) for y in halves])
        elif name in HEAD_BIASES or module in (*OUT, *ENCODER_OUT) or "intermediate" in name:
            out[name] = cut(x, 0, tp, r)
        elif module == "relative_attention_bias":
            out[name] = cut(x, 1, tp, r)
        elif (module in ENCODER_IN and "LayerNorm" not in name) or module in IN:
            out[name] = cut(x, 1, tp, r) if kind == "weight" else x
        else:
            assert "norm" in name.lower() or ".ln_" in name, name
            out[name] = x
    return out


def qkv_rows(t, at, x):
    """Rows of q, k and v of linear attention; it has as many values as its output projection has inputs."""
    values = t[f"{at}.out_proj.weight"].shape[1]
    keys = (x.shape[0] - values) // 2
    return x.split([keys, keys, values])


STATE = 6
"""Features of a group's state, of every model with Mamba's mixers here."""


def mixer(t, at, tp, r):
    """A rank's part of Mamba's mixer `at`: its heads, and their groups, unless all heads are of one."""
    count, width = t[f"{at}A_log"].numel(), t[f"{at}out_proj.weight"].shape[1]
    state = (t[f"{at}in_proj.weight"].shape[0] - 2 * width - count) // 2
    sizes = {"in_proj": [width, width, state, state, count], "conv1d": [width, state, state]}
    out = {}
    for name in [n for n in t if n.startswith(at)]:
        leaf, x = name.removeprefix(at), t[name]
        module = leaf.partition(".")[0]
        if module == "out_proj":
            out[leaf] = cut(x, 1, tp, r) if x.ndim == 2 else x
            continue
        parts = x.split(sizes.get(module, [len(x)]))
        whole = [len(part) == STATE for part in parts]
        out[leaf] = torch.cat([p if w else cut(p, 0, tp, r) for p, w in zip(parts, whole, strict=True)])
    return out


def selective(t, at, tp, r):
    """A rank's part of a mixer of Mamba's first version."""
    out = {}
    for name in [n for n in t if n.startswith(at)]:
        module, _, kind = name.removeprefix(at).partition(".")
        x = t[name]
        if module == "in_proj":
            out[name] = torch.cat([cut(half, 0, tp, r) for half in x.chunk(2)])
        elif module in ("x_proj", "out_proj"):
            out[name] = cut(x, 1, tp, r) if kind == "weight" else x
        else:
            assert module in ("conv1d", "dt_proj", "A_log", "D") or "norm" in module, name
            out[name] = x if "norm" in module else cut(x, 0, tp, r)
    return out


def delta_apart(t, at, tp, r):
    """A rank's part of linear attention whose q, k and v are matrices of their own (OLMo Hybrid, Kimi)."""
    own = {n.removeprefix(at).removesuffix(".weight"): x for n, x in t.items() if n.startswith(at)}
    parts = {
        n: x if n in ("f_a_proj", "g_a_proj") else cut(x, 0, tp, r) for n, x in own.items() if "proj" in n
    }
    together = ("q_proj", "k_proj", "v_proj", *(("b_proj", "f_a_proj") if "f_a_proj" in own else ("g_proj",)))
    held = torch.cat([parts.pop(n) for n in together])
    parts["in_proj_qkvgfab" if "f_a_proj" in own else "in_proj_qkvg"] = held
    parts |= {"o_proj": cut(own["o_proj"], 1, tp, r), "o_norm": own["o_norm"]}
    parts["conv1d"] = torch.cat([cut(own[f"{part}_conv1d"], 0, tp, r) for part in "qkv"])
    rates = {n: cut(own[n].flatten(), 0, tp, r) for n in ("A_log", "dt_bias")}
    return {f"{at}{n}.weight": x for n, x in parts.items()} | {at + n: x for n, x in rates.items()}


def padded(x, tp, r):
    rows = -(-x.shape[0] // 64) * 64
    return cut(torch.cat([x, torch.zeros(rows - x.shape[0], *x.shape[1:])]), 0, tp, r)


def deepseek_v4(t, tp, r):
    """DeepSeek-V4, whose hub has names of its own."""
    out = {}
    for name, x in t.items():
        stem, _, leaf = name.rpartition(".")
        at, _, module = stem.rpartition(".")
        if name in ("embed.weight", "head.weight"):
            out[{"embed": "model.embed_tokens", "head": "lm_head"}[stem] + ".weight"] = padded(x, tp, r)
            continue
        if ".experts." in name:
            at = stem[: stem.index(".experts.") + 8]
            if not name.startswith(f"{at}.0.w1"):
                continue
            each = range(sum(n.startswith(at) and n.endswith("w1.weight") for n in t))
            w1, w3, w2 = ([t[f"{at}.{e}.{w}.weight"] for e in each] for w in ("w1", "w3", "w2"))
            pairs = [torch.cat([cut(y, 0, tp, r) for y in pair]) for pair in zip(w1, w3, strict=True)]
            got = {f"{at}.w13_weight": torch.stack(pairs)}
            got[f"{at}.w2_weight"] = torch.stack([cut(y, 1, tp, r) for y in w2])
        elif module in ("w1", "w2") and at.endswith("shared_experts"):
            both = torch.cat([cut(t[f"{at}.{w}.weight"], 0, tp, r) for w in ("w1", "w3")])
            got = {f"{at}.gate_up_proj.weight": both} if module == "w1" else {}
            got |= {f"{at}.down_proj.weight": cut(x, 1, tp, r)} if module == "w2" else {}
        elif module == "wq_a":
            got = {f"{at}.fused_wqa_wkv.weight": torch.cat([x, t[f"{at}.wkv.weight"]])}
        elif module == "wkv" and at.endswith("compressor"):
            got = {f"{at}.fused_wkv_wgate.weight": torch.cat([x, t[f"{at}.wgate.weight"]])}
        elif module in ("wkv", "wgate", "w3"):
            continue
        elif (module in ("wq_b", "wo_a") and "indexer" not in name) or leaf == "attn_sink":
            got = {name: cut(x, 0, tp, r)}
        elif module == "wo_b":
            got = {name: cut(x, 1, tp, r)}
        else:
            whole = ("norm", "hc_", ".ape", "indexer", "gate.weight", "gate.bias", "tid2eid")
            assert any(part in name for part in whole), name
            got = {name.replace("gate.bias", "gate.e_score_correction_bias"): x}
        out |= {f"model.{n}": y.contiguous() for n, y in got.items()}
    return out


def vllm(t, heads, tp, r, order="grouped", *, flat=None, experts=None, up_first=False, layers=None):
    """`flat`: (rank, count) that cut an expert's width, where that is not tp; `experts`: those that are held
    whole; `layers`: the layers of the stage."""
    if "embed.weight" in t:
        return deepseek_v4(t, tp, r)
    d, (mine, its), out = heads[2], heads_of(heads, tp, r), {}
    flat = flat or (r, tp)
    gpt_oss = any(n.endswith(".sinks") for n in t)
    llama4 = any(".feed_forward.shared_expert." in n for n in t)
    laguna = any(".self_attn.g_proj." in n for n in t)
    gemma4 = any(n.endswith(".layer_scalar") for n in t)
    minicpm = not any(".gate." in n for n in t)  # of those with latent attention
    minimax = any(n.endswith("block_sparse_moe.e_score_correction_bias") for n in t)

    jamba = [n.removesuffix("A_log") for n in t if n.endswith(".mamba.A_log") and t[n].ndim == 2]
    mixers = [n.removesuffix("A_log") for n in t if n.endswith((".mamba.A_log", ".mixer.A_log"))]
    beside = "model.layers.0.mamba.A_log" in t and "model.layers.0.self_attn.q_proj.weight" in t

    deltas = [n.removesuffix("A_log") for n in t if n.endswith("A_log")]
    deltas = [at for at in deltas if f"{at}q_proj.weight" in t]

    def put(name, x):
        assert name not in out
        name = name.replace("backbone.embeddings.", "model.embed_tokens.").replace("backbone.", "model.")
        name = name.replace(".self_attn.", ".") if jamba else name
        out[name.replace(".mamba.", ".mamba.mamba.") if beside else name] = x.contiguous()

    def qkv(name, q, k, v):
        each = q.shape[0] // heads[0]  # with output gates, twice as many
        if laguna:
            each = d
        size = each if gemma4 else d
        kv = k.shape[0] // size
        asked, read = heads_of((q.shape[0] // each, kv, d), tp, r)
        put(name, torch.cat([pick(q, asked, each), pick(k, read, size), pick(v, read, v.shape[0] // kv)]))

    for name, x in t.items():
        at = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        if layers is not None and at and int(at[1]) not in layers:
            continue
        stem, module, kind = f".{name}".rsplit(".", 2)
        stem = stem.removeprefix(".")
        if module == "experts" and not kind.startswith("e_score_"):
            stem, module, kind = f"{stem}.experts", kind, "stack"
        held = next((at for at in jamba if name.startswith(at)), None)
        if held is not None:
            for own, part in selective(t, held, tp, r).items() if name == f"{held}A_log" else ():
                put(own, part)
            continue
        held = next((m for m in mixers if name.startswith(m)), None)
        if held is not None:
            if name == f"{held}A_log":
                for leaf, part in mixer(t, held, tp, r).items():
                    put(held + leaf, part)
            continue
        held = next((at for at in deltas if name.startswith(at)), None)
        if held is not None:
            for own, part in delta_apart(t, held, tp, r).items() if name == f"{held}A_log" else ():
                put(own, part)
            continue
        if ".conv." in name:  # LFM2's short convolutions: b, c and x, each with its kernel
            name = name.replace(".conv.", ".short_conv.")
            if module == "out_proj":
                put(name, cut(x, 1, tp, r) if kind == "weight" else x)
            else:
                parts_of = x.chunk(3 if module == "in_proj" else 1)
                put(name, torch.cat([cut(y, 0, tp, r) for y in parts_of]))
            continue
        where = stem.replace(".self_attn", ".attn") if gpt_oss else stem
        if x.ndim == 3 and module != "conv1d" and not gpt_oss:
            stem = stem.removesuffix(".experts")
            y = x.transpose(1, 2) if llama4 else x
            y = y if experts is None else y[list(experts)]
            index, of = flat if experts is None else (0, 1)
            if module in ("gate_up_proj", "input_linear"):
                y = torch.cat([cut(z, 1, of, index) for z in (y.chunk(2, 1)[:: -1 if up_first else 1])], 1)
                put(f"{stem}.experts.w13_weight", y)
            else:
                put(f"{stem}.experts.w2_weight", cut(y, 2, of, index))
        elif re.search(r"experts\.\d+", name):
            at = stem.rpartition(".")[0]
            ungated = module == "up_proj" and f"{stem}.gate_proj.weight" not in t
            if (not ungated and module not in ("gate_proj", "w1")) or not re.search(r"experts\.0\.", name):
                continue
            three = ("w1", "w3", "w2") if module == "w1" else ("gate_proj", "up_proj", "down_proj")
            count = len([n for n in t if n.startswith(f"{at}.") and n.endswith(f".{module}.weight")])
            pairs, downs = [], []
            for e in range(count) if experts is None else experts:
                gate, up, down = (t.get(f"{at}.{e}.{p}.weight", x[:0]) for p in three)
                if experts is None:
                    index, of = flat
                    gate, up, down = cut(gate, 0, of, index), cut(up, 0, of, index), cut(down, 1, of, index)
                pairs.append(torch.cat([up, gate] if up_first else [gate, up]))
                downs.append(down)
            put(f"{at}.w13_weight", torch.stack(pairs))
            put(f"{at}.w2_weight", torch.stack(downs))
        elif name == "lm_head.bias":
            put(name, padded(x[:, None], tp, r)[:, 0])
        elif module in ("q_norm", "k_norm") and x.dim() == 2:  # weights for each head
            put(name, x[mine if module == "q_norm" else its])
        elif module in (*TABLES, "embed_tokens_per_layer"):
            name = name.replace("embedding.word_embeddings.", "embedding.")
            put(name.replace("embed_tokens", "embedding") if gpt_oss else name, padded(x, tp, r))
        elif kind == "stack":  # gpt-oss
            assert experts is None
            if module == "gate_up_proj":
                put(f"{stem}.w13_weight", cut(x, 2, tp, r).transpose(1, 2))
            elif module == "gate_up_proj_bias":
                put(f"{stem}.w13_bias", cut(x, 1, tp, r))
            elif module == "down_proj":
                put(f"{stem}.w2_weight", cut(x, 1, tp, r).transpose(1, 2))
            else:
                assert module == "down_proj_bias"
                put(f"{stem}.w2_bias", x if r == 0 else torch.zeros_like(x))
        elif minimax and module in ("q_norm", "k_norm"):
            put(name, pick(x, mine if module == "q_norm" else its, d))
        elif stem.endswith(".indexer") and module != "wk":
            if module != "weights_proj":
                put(name, x)
        elif module == "wk":
            put(f"{stem}.wk_weights_proj.weight", torch.cat([x, t[f"{stem}.weights_proj.weight"]]))
        elif module == "q_proj":
            if f"{stem}.k_proj.{kind}" in t:
                q, k = (t[f"{stem}.{p}_proj.{kind}"] for p in "qk")
                v = t.get(f"{stem}.v_proj.{kind}", k)  # Gemma 4's may be one matrix
                if llama4:
                    q, k = (torch.cat([torch.cat([h[::2], h[1::2]]) for h in y.split(d)]) for y in (q, k))
                qkv(f"{where}.qkv_proj.{kind}", q, k, v)
            else:
                put(name, cut(x, 0, tp, r))
        elif module in ("k_proj", "v_proj"):
            pass
        elif module == "qkv_proj":
            qkv(name, *parts(x, heads, False))
        elif module in FUSED:
            qkv(name, *parts(x, heads, order == "grouped" and module != "Wqkv"))
        elif module in ("q_a_proj", "kv_a_proj_with_mqa") and minicpm:
            put(name, x)
        elif module == "q_a_proj":
            both = [x, t[f"{stem}.kv_a_proj_with_mqa.{kind}"]]
            put(f"{stem}.fused_qkv_a_proj.{kind}", torch.cat(both))
        elif module == "kv_a_proj_with_mqa" and f"{stem}.q_a_proj.{kind}" in t:
            pass
        elif module in ("gate_up_proj", "input_linear"):
            put(name, torch.cat([cut(y, 0, tp, r) for y in x.chunk(2)]))
        elif (laguna and module in ("up_proj", "g_proj")) or (
            module == "gate_proj" and (laguna or stem.endswith("self_attn"))
        ):
            put(name, cut(x, 0, tp, r))
        elif module == "gate_proj":
            put(
                f"{stem}.gate_up_proj.{kind}",
                torch.cat([cut(y, 0, tp, r) for y in (x, t[f"{stem}.up_proj.{kind}"])]),
            )
        elif module == "up_proj" and f"{stem}.gate_proj.{kind}" in t:
            pass
        elif module == "dense_h_to_4h" and order == "concat":
            put(name, torch.cat([cut(y, 0, tp, r) for y in x.chunk(2)]))
        elif module in ("in_proj_qkvz", "in_proj_ba", "linear_attn"):  # key head by key head; A_log, dt_bias
            put(name, cut(x, 0, tp, r))
        elif module == "w1":
            put(
                f"{stem}.w13.{kind}",
                torch.cat([cut(t[f"{stem}.{p}.{kind}"], 0, tp, r) for p in ("w1", "w3")]),
            )
        elif module == "w3":
            pass
        elif module == "conv1d":
            put(name, torch.cat([cut(y, 0, tp, r) for y in qkv_rows(t, stem, x)]))
        elif module == "in_proj_qkv":
            both = [*qkv_rows(t, stem, x), t[f"{stem}.in_proj_z.weight"]]
            put(f"{stem}.in_proj_qkvz.weight", torch.cat([cut(y, 0, tp, r) for y in both]))
        elif module == "in_proj_b":
            both = [x, t[f"{stem}.in_proj_a.weight"]]
            put(f"{stem}.in_proj_ba.weight", torch.cat([cut(y, 0, tp, r) for y in both]))
        elif module in ("in_proj_z", "in_proj_a"):
            pass
        elif module in OUT:
            put(name, cut(x, 0, tp, r))
        elif module in IN:
            put(f"{where}.{module}.{kind}", cut(x, 1, tp, r) if kind == "weight" else x)
        elif kind == "attention_sink_bias":
            put(name, cut(x, 0, tp, r))
        elif kind == "sinks":
            put(name.replace(".self_attn.", ".attn."), cut(x, 0, tp, r))
        else:
            whole = ("norm", ".ln_", "mlp.gate.", "mlp.router.", "shared_expert_gate", "kv_a_proj_with_mqa")
            whole += ("layer_scalar", ".per_layer_", "feed_forward.gate.", ".expert_bias")
            whole += ("block_sparse_moe.gate.", "e_score_correction_bias", ".router.")
            whole += (".act_fn.", ".wpe.", ".embed_positions.", "mixer.gate.", "_latent_proj.")
            assert any(part in name for part in whole), name
            put(name, x.flatten() if "moe_statics" in name else x)
    return out
