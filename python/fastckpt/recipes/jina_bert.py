"""Jina's BERT with norms on queries and keys (jina-bert-v2-qk-post-norm): ALiBi in place of positions, a
gated block stored [up; gate], a norm after attention, before the block and after it.

Its config.json calls itself "bert": ask for the recipe by name. Source: jinaai's modeling_bert.py
(JinaBertModel with feed_forward_type "geglu"); rtp-llm's models/jina_bert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..mixers import Attention
from ..model import Layer, Layers, Model, Sizes
from .claims import Claims, Heads, dim, integer, vocabulary
from .fused import fused_mlp
from .known import Known

IGNORED = ("*embeddings.position_ids",)


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Jina BERT checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    table = "embeddings.word_embeddings.weight"
    prefix = "" if table in ckpt else "bert."
    claims = Claims(ckpt, f"{prefix}{table}")
    hidden = dim(config, "hidden_size")
    width = dim(config, "intermediate_size")
    heads = Heads.of(hidden, dim(config, "num_attention_heads"))

    def layer(name: str) -> Callable[[], Layer]:
        at = f"{name}.attention"
        q, k, v = (
            claims.linear(f"{at}.self.{n}", hidden, hidden, bias=True) for n in ("query", "key", "value")
        )
        q_norm, k_norm = (claims.norm(f"{at}.self.layer_norm_{n}", hidden, bias=True) for n in "qk")
        o = claims.linear(f"{at}.output.dense", hidden, hidden, bias=True)
        after = claims.norm(f"{at}.output.LayerNorm", hidden, bias=True)
        between = claims.norm(f"{name}.layer_norm_1", hidden, bias=True)
        up_gate = claims.linear(f"{name}.mlp.up_gated_layer", width.times(2), hidden)
        down = claims.linear(f"{name}.mlp.down_layer", hidden, width, bias=True)
        last = claims.norm(f"{name}.layer_norm_2", hidden, bias=True)
        feeds = fused_mlp(up_gate, down, up_first=True)

        def build() -> Layer:
            attention = Attention(q(), k(), v(), o(), q_norm(), k_norm(), whole_norms=True)
            return Layer(name, None, attention, between(), feeds(), after(), last())

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
    types = dim(config, "type_vocab_size")
    carried = claims.parameter(f"{at}.token_type_embeddings.weight", types, hidden)
    layers = [layer(f"{prefix}encoder.layer.{i}") for i in range(integer(config, "num_hidden_layers"))]
    return Model(
        family="jina_bert",
        sizes=Sizes(hidden.size, vocab, heads.q, heads.kv, heads.dim, {width.key: width.size}),
        embedding=embedding,
        layers=Layers(layers),
        norm=None,
        lm_head=lm_head,
        tied=tied,
        embedding_norm=claims.norm(f"{at}.LayerNorm", hidden, bias=True)(),
        carried=(carried(),),
        alibi=True,
        ignored=claims.close(IGNORED),
        causal=False,
    )


FAMILIES = {
    "jina_bert": Known(recipe, IGNORED),
}
