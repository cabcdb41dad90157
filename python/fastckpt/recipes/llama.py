"""Llama, Mistral, Qwen2 and Qwen3: one decoder, which differs in biases and per-head norms.

Names and biases as transformers' modeling files have them (`model.layers.{i}.self_attn.q_proj` ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Attention, Experts, Layer, Layers, Mlp, Model, Sizes
from .claims import Claims, Dim, flag, integer, vocabulary

IGNORED = ("*rotary_emb.inv_freq",)
"""Buffers that old checkpoints carry and every server computes itself."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a family of this shape has: a bias on q, k, v, on o (None: as config's attention_bias says), norms
    on each head's q and k, a bias in the feed-forward block where config's mlp_bias says so."""

    family: str
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    mlp_bias: bool = False


LLAMA = Kind("llama", mlp_bias=True)
MISTRAL = Kind("mistral", qkv_bias=False, o_bias=False)
QWEN2 = Kind("qwen2", qkv_bias=True, o_bias=False)
QWEN3 = Kind("qwen3", qk_norm=True)

FeedForward = Callable[[str], Callable[[], Mlp | Experts]]
"""Claims the feed-forward block of the layer of that name; what it returns builds the block."""


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, kind: Kind = LLAMA
) -> Model:
    """The model of a checkpoint of that kind; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, "model.embed_tokens.weight")
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    width = Dim(integer(config, "intermediate_size"), "intermediate_size")
    bias = kind.mlp_bias and flag(config, "mlp_bias", False)

    def mlp(layer: str) -> Callable[[], Mlp]:
        gate = claims.linear(f"{layer}.mlp.gate_proj", width, hidden, bias=bias)
        up = claims.linear(f"{layer}.mlp.up_proj", width, hidden, bias=bias)
        down = claims.linear(f"{layer}.mlp.down_proj", hidden, width, bias=bias)
        return lambda: Mlp(gate(), up(), down())

    return decoder(kind, claims, config, vocab_size, mlp, {width.key: width.size})


def decoder(
    kind: Kind,
    claims: Claims,
    config: Mapping[str, JSON],
    vocab_size: int | None,
    feed_forward: FeedForward,
    widths: Mapping[str, int],
) -> Model:
    """Everything but the feed-forward blocks, which `feed_forward` claims; `widths` as in Sizes.

    Raises RecipeError where the checkpoint does not fit the config, or holds a name no role takes."""
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    head_dim = integer(config, "head_dim", hidden.size // heads)
    if heads % kv_heads:
        raise RecipeError(f"config: {heads} attention heads do not share {kv_heads} kv heads evenly")
    q_rows = Dim(heads * head_dim, "num_attention_heads * head_dim")
    kv_rows = Dim(kv_heads * head_dim, "num_key_value_heads * head_dim")
    said = flag(config, "attention_bias", False)
    qkv_bias = said if kind.qkv_bias is None else kind.qkv_bias
    o_bias = said if kind.o_bias is None else kind.o_bias

    def attention(at: str) -> Callable[[], Attention]:
        q = claims.linear(f"{at}.q_proj", q_rows, hidden, bias=qkv_bias)
        k = claims.linear(f"{at}.k_proj", kv_rows, hidden, bias=qkv_bias)
        v = claims.linear(f"{at}.v_proj", kv_rows, hidden, bias=qkv_bias)
        o = claims.linear(f"{at}.o_proj", hidden, q_rows, bias=o_bias)
        if not kind.qk_norm:
            return lambda: Attention(q(), k(), v(), o())
        q_norm = claims.norm(f"{at}.q_norm", Dim(head_dim, "head_dim"))
        k_norm = claims.norm(f"{at}.k_norm", Dim(head_dim, "head_dim"))
        return lambda: Attention(q(), k(), v(), o(), q_norm(), k_norm())

    def layer(name: str) -> Callable[[], Layer]:
        before = claims.norm(f"{name}.input_layernorm", hidden)
        attends = attention(f"{name}.self_attn")
        after = claims.norm(f"{name}.post_attention_layernorm", hidden)
        feeds = feed_forward(name)
        return lambda: Layer(name, before(), attends(), after(), feeds())

    vocab, embedding, lm_head, tied = vocabulary(
        claims, config, vocab_size, embedding="model.embed_tokens", hidden=hidden, tied_default=False
    )
    layers = Layers([layer(f"model.layers.{i}") for i in range(integer(config, "num_hidden_layers"))])
    return Model(
        family=kind.family,
        sizes=Sizes(hidden.size, vocab, heads, kv_heads, head_dim, widths),
        embedding=embedding,
        layers=layers,
        norm=claims.norm("model.norm", hidden)(),
        lm_head=lm_head,
        tied=tied,
        ignored=claims.close(IGNORED),
    )
