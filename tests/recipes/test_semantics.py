"""What a fused matrix holds, told by transformers' own forward code, which is asked where each row goes."""

from __future__ import annotations

import pytest
import torch
from fastckpt import recipes
from fastckpt.errors import FastckptError
from layouts import families
from reading import memory, read


def parts(name):
    """(transformers' attention module of layer 0, the fused weight, our q, k, v, (heads, kv heads, size))."""
    config, hub, _ = families.made(name)
    family = families.FAMILIES[name]
    kind = families.transformers.AutoConfig.for_model(**config)
    model = families.transformers.AutoModelForCausalLM.from_config(kind)
    attention = recipes.find(config)(memory(hub), config).layers[0].attention
    module = model.get_submodule(attention.fused.rpartition(".")[0])
    weight = hub[f"{attention.fused}.weight"]
    ours = [torch.from_numpy(read(x.weight).view("f4")) for x in (attention.q, attention.k, attention.v)]
    return module, weight, ours, family.heads


def rows_of(weight):
    """What the fused matrix makes of an input: here, of each of its rows, the row's number."""
    return torch.arange(weight.shape[0]).view(1, 1, -1)


@pytest.mark.parametrize("name", [n for n in families.FAMILIES if n.startswith("falcon-")])
def test_falcon(name):
    module, weight, ours, (heads, kv_heads, _) = parts(name)
    q, k, v = module._split_heads(rows_of(weight))  # [1, 1, heads, size]; k and v repeated for each query
    assert q.shape[2] == heads
    step = heads // kv_heads if k.shape[2] == heads else 1
    for rows, mine in ((q[0, 0], ours[0]), (k[0, 0, ::step], ours[1]), (v[0, 0, ::step], ours[2])):
        assert torch.equal(weight[rows.flatten()], mine)


def test_bloom():
    module, weight, ours, _ = parts("bloom")
    for rows, mine in zip(module._reshape(rows_of(weight)), ours, strict=True):  # [1, heads, 1, size]
        rows = rows if rows.shape[-1] == 8 else rows.transpose(-1, -2)
        assert torch.equal(weight[rows[0].reshape(-1)], mine)


def test_gpt_neox(monkeypatch):
    """Its forward pass splits inside: q and k are caught on their way into the rotation, v never leaves."""
    module, weight, ours, (heads, _, size) = parts("gpt_neox")
    from transformers.models.gpt_neox import modeling_gpt_neox as source

    caught = []

    class Seen(Exception):
        pass

    def rotate(q, k, cos, sin):
        caught.extend((q, k))
        raise Seen

    monkeypatch.setattr(source, "apply_rotary_pos_emb", rotate)
    module.query_key_value.register_forward_hook(lambda *_: rows_of(weight))
    with pytest.raises(Seen):
        module(torch.zeros(1, 1, 64), None, position_embeddings=(None, None))
    for rows, mine in zip(caught, ours, strict=False):  # [1, heads, 1, size]
        assert rows.shape == (1, heads, 1, size)
        assert torch.equal(weight[rows.flatten()], mine)
    taken = torch.cat([x.flatten() for x in caught])
    left = [r for r in range(weight.shape[0]) if r not in set(taken.tolist())]
    assert torch.equal(weight[left], ours[2])


@pytest.mark.parametrize("name", ["gpt_bigcode", "gpt_bigcode-heads", "mpt"])
def test_what_goes_into_the_cache(name):
    """k and v are caught there; what is left is q."""
    module, weight, ours, (_, kv_heads, size) = parts(name)
    caught = []

    class Seen(Exception):
        pass

    class Cache:
        is_updated = {}  # noqa: RUF012

        def update(self, k, v, *_):
            caught.extend((k, v))
            raise Seen

    fused = module.Wqkv if name == "mpt" else module.c_attn
    fused.register_forward_hook(lambda *_: rows_of(weight))
    with pytest.raises(Seen):
        if name == "mpt":
            module(torch.zeros(1, 1, 64), None, Cache())
        else:
            module(torch.zeros(1, 1, 64), Cache())
    for rows, mine in zip(caught, ours[1:], strict=True):  # [1, kv heads, 1, size]
        assert rows.shape == (1, kv_heads, 1, size)
        assert torch.equal(weight[rows.flatten()], mine)
    taken = set(torch.cat([x.flatten() for x in caught]).tolist())
    assert torch.equal(weight[[r for r in range(weight.shape[0]) if r not in taken]], ours[0])


def test_gpt_oss_gate_and_up():
    """down(up + 1) * glu(gate): with up = 0 a unit shows its gate, and which columns those are."""
    config, hub, _ = families.made("gpt_oss")
    kind = families.transformers.AutoConfig.for_model(**config)
    module = families.transformers.AutoModelForCausalLM.from_config(kind).model.layers[0].mlp.experts
    width = config["intermediate_size"]
    expert = recipes.find(config)(memory(hub), config).layers[0].mlp.experts[1]
    fused = hub["model.layers.0.mlp.experts.gate_up_proj"][1]
    for unit in (0, 1, width - 1):
        for column in range(2 * width):
            pair = torch.zeros(1, 2 * width)
            pair[0, column] = 1.0
            shown = module._apply_gate(pair)[0, unit] != 0
            want = torch.equal(bits_of(expert.gate.weight)[unit], fused[:, column])
            assert shown == want
    assert torch.equal(bits_of(expert.up.weight)[5], fused[:, 11])


def bits_of(view):
    return torch.from_numpy(read(view).view("f4"))


KEYS = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size",
    "n_head", "n_layer", "moe_intermediate_size", "num_experts", "n_routed_experts",
    "num_local_experts", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim",
    "q_lora_rank", "num_kv_heads", "num_key_value_heads", "head_dim", "ffn_hidden_size", "d_model",
    "d_ff", "d_kv", "num_heads", "num_layers", "num_decoder_layers", "num_mel_bins", "encoder_layers",
    "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "max_source_positions", "type_vocab_size",
    "index_n_heads", "index_head_dim",
    "shared_expert_intermediate_size", "n_shared_experts", "first_k_dense_replace", "n_embd", "n_inner",
    "n_positions", "n_layers", "n_heads", "ffn_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
    "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv", "mamba_num_heads",
    "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "shared_intermediate_size",
    "moe_shared_expert_intermediate_size", "moe_latent_size",
)  # fmt: skip
DERIVED = {("deepseek", "head_dim"), ("deepseek", "num_key_value_heads"), ("falcon-mqa", "num_kv_heads")}
DERIVED |= {("falcon-rw", "num_kv_heads"), ("qwen3_moe", "intermediate_size"), ("bloom", "n_head")}
DERIVED |= {("gpt_neox", "num_attention_heads"), ("falcon-rw", "num_attention_heads")}
DERIVED |= {(n, "num_attention_heads") for n in ("bert", "roberta", "xlm_roberta", "modernbert", "opt")}
DERIVED |= {("gptj", "n_head"), ("gpt_bigcode-heads", "n_head"), ("mpt", "n_heads"), ("gptj", "n_positions")}
DERIVED |= {("gpt_bigcode", "num_key_value_heads")}
DERIVED |= {("granitemoehybrid-dense", k) for k in ("intermediate_size", "num_local_experts")}
DERIVED |= {("nemotron_h", "n_shared_experts"), ("laguna", "num_attention_heads")}
DERIVED |= {(n, k) for n in ("mistral4", "minicpm3") for k in ("num_key_value_heads", "head_dim")}
DERIVED |= {("deepseek_v4", "qk_rope_head_dim")}
DERIVED |= {("kimi_linear", key) for key in ("head_dim", "num_key_value_heads")}
DERIVED |= {("kimi_k2", "head_dim"), ("glm_moe_dsa", "head_dim"), ("exaone_moe", "first_k_dense_replace")}
DERIVED |= {(n, "first_k_dense_replace") for n in ("deepseek_v32", "glm_moe_dsa")}
DERIVED |= {(n, "num_key_value_heads") for n in ("kimi_k2", "glm4_moe_lite", "glm_moe_dsa")}
"""Keys that no shape depends on, or that another derives: (how the model's name begins, key)."""


@pytest.mark.parametrize("name", [*families.FAMILIES, *families.ENCODERS])
def test_a_config_of_another_size_is_refused(name):
    config, hub, _ = families.made(name)
    checked = 0
    for key in KEYS:
        if config.get(key) is None or any(name.startswith(n) and key == k for n, k in DERIVED):
            continue
        for other in (config[key] * 2, config[key] + 1):
            with pytest.raises(FastckptError):
                recipes.find(config)(memory(hub), config | {key: other})
        checked += 1
    assert checked >= 3
