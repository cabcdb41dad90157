"""Jina's BERT with norms on queries and keys (jina-bert-v2-qk-post-norm): ALiBi in place of positions, a
gated block stored [up; gate], a norm after attention, before the block and after it.

Its config.json calls itself "bert": ask for the recipe by name. Source: jinaai's modeling_bert.py
(JinaBertModel with feed_forward_type "geglu"); rtp-llm's models/jina_bert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Attention, Layer, Layers, Mlp, Model, Sizes
from .claims import Claims, Dim, integer, vocabulary
from .fused import gate_up_parts

IGNORED = ("*embeddings.position_ids",)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Jina BERT checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    table = "embeddings.word_embeddings.weight"
    prefix = "" if table in ckpt else "bert."
    claims = Claims(ckpt, f"{prefix}{table}")
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    width = Dim(integer(config, "intermediate_size"), "intermediate_size")
    pair = Dim(2 * width.size, "2 * intermediate_size")
    heads = integer(config, "num_attention_heads")
    if hidden.size % heads:
        raise RecipeError(f"config: hidden_size {hidden.size} is no multiple of num_attention_heads {heads}")

    def layer(name: str) -> Callable[[], Layer]:
        at = f"{name}.attention"
        q, k, v = (
            claims.linear(f"{at}.self.{n}", hidden, hidden, bias=True) for n in ("query", "key", "value")
        )
        q_norm, k_norm = (claims.norm(f"{at}.self.layer_norm_{n}", hidden, bias=True) for n in "qk")
        o = claims.linear(f"{at}.output.dense", hidden, hidden, bias=True)
        after = claims.norm(f"{at}.output.LayerNorm", hidden, bias=True)
        between = claims.norm(f"{name}.layer_norm_1", hidden, bias=True)
        both = claims.linear(f"{name}.mlp.up_gated_layer", pair, hidden)
        down = claims.linear(f"{name}.mlp.down_layer", hidden, width, bias=True)
        last = claims.norm(f"{name}.layer_norm_2", hidden, bias=True)

        def build() -> Layer:
            fused = both()
            up, gate = gate_up_parts(fused)
            attention = Attention(q(), k(), v(), o(), q_norm(), k_norm())
            mlp = Mlp(gate, up, down(), fused=fused.name, up_first=True)
            return Layer(name, None, attention, between(), mlp, after(), last())

        return build

    at = f"{prefix}embeddings"
    vocab, embedding, lm_head, tied = vocabulary(
        claims,
        config,
        vocab_size,
        embedding=f"{at}.word_embeddings",
        hidden=hidden,
        tied_default=True,
        head=None,
    )
    types = Dim(integer(config, "type_vocab_size"), "type_vocab_size")
    carried = claims.parameter(f"{at}.token_type_embeddings.weight", types, hidden)
    layers = [layer(f"{prefix}encoder.layer.{i}") for i in range(integer(config, "num_hidden_layers"))]
    model = Model(
        family="jina_bert",
        sizes=Sizes(hidden.size, vocab, heads, heads, hidden.size // heads, {width.key: width.size}),
        embedding=embedding,
        layers=Layers(layers),
        norm=None,
        lm_head=lm_head,
        tied=tied,
        embedding_norm=claims.norm(f"{at}.LayerNorm", hidden, bias=True)(),
        carried=(carried(),),
        alibi=True,
    )
    return replace(model, ignored=claims.close(IGNORED))
