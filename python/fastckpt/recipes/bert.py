"""BERT and RoBERTa: encoders with a norm after each sum, alone or with the heads transformers puts on them.

Names are those of the file: with the family's prefix where a head stands beside the encoder, without it where
the encoder was saved alone. Poolers, classifiers and the like are small and carried whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..mixers import Attention
from ..model import Layer, Layers, Mlp, Model, Sizes
from .claims import Claims, Dim, Heads, dim, flag, integer, vocabulary
from .known import Known

IGNORED = ("*embeddings.position_ids",)
"""A buffer of counted positions."""

CARRIED = (
    "*pooler.dense",
    "cls.predictions.transform.*",
    "cls.seq_relationship",
    "lm_head.dense",
    "lm_head.layer_norm",
    "classifier",
    "classifier.*",
    "qa_outputs",
)


@dataclass(frozen=True, slots=True)
class Names:
    """A family's prefix, the module of its masked-language head's matrix, and that head's bias: of a head
    that is not tied, transformers 5 adds the matrix's own, and keeps this one beside it."""

    prefix: str
    head: str
    head_bias: str


BERT = Names("bert.", "cls.predictions.decoder", "cls.predictions.bias")
ROBERTA = Names("roberta.", "lm_head.decoder", "lm_head.bias")


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, names: Names = BERT
) -> Model:
    """The model of an encoder's checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    table = "embeddings.word_embeddings.weight"
    prefix = "" if table in ckpt else names.prefix
    claims = Claims(ckpt, f"{prefix}{table}")
    hidden = dim(config, "hidden_size")
    width = dim(config, "intermediate_size")
    heads = Heads.of(hidden, dim(config, "num_attention_heads"))

    def layer(name: str) -> Callable[[], Layer]:
        at = f"{name}.attention"
        q, k, v = (
            claims.linear(f"{at}.self.{n}", hidden, hidden, bias=True) for n in ("query", "key", "value")
        )
        o = claims.linear(f"{at}.output.dense", hidden, hidden, bias=True)
        after = claims.norm(f"{at}.output.LayerNorm", hidden, bias=True)
        up = claims.linear(f"{name}.intermediate.dense", width, hidden, bias=True)
        down = claims.linear(f"{name}.output.dense", hidden, width, bias=True)
        last = claims.norm(f"{name}.output.LayerNorm", hidden, bias=True)
        return lambda: Layer(
            name, None, Attention(q(), k(), v(), o()), None, Mlp(None, up(), down()), after(), last()
        )

    at = f"{prefix}embeddings"
    headed, own = names.head_bias in claims, f"{names.head}.bias"
    apart = own in claims and not flag(config, "tie_word_embeddings", True)
    if own in claims and not apart and len({ckpt.aliases.get(n, n) for n in (own, names.head_bias)}) > 1:
        raise RecipeError(
            f"config says tie_word_embeddings, yet {names.head_bias} and {own} are two tensors; set it to "
            f"false in the config to serve both as they are, or leave {own} out: rename= (--rename "
            f"'^{re.escape(own)}$=')"
        )
    vocab, embedding, lm_head, tied = vocabulary(
        claims,
        config,
        vocab_size,
        embedding=f"{at}.word_embeddings",
        hidden=hidden,
        tied_default=True,
        head=names.head if headed else None,
        head_bias="" if not headed else own if apart else names.head_bias,
    )
    positions = dim(config, "max_position_embeddings")
    types = dim(config, "type_vocab_size")
    count = integer(config, "num_hidden_layers")
    carried = [claims.parameter(f"{at}.token_type_embeddings.weight", types, hidden)]
    carried += claims.carried(CARRIED, bias=True)
    if headed and apart:
        carried.append(claims.parameter(names.head_bias, Dim(vocab, "vocab_size")))
    return Model(
        family=names.prefix[:-1],
        sizes=Sizes(hidden.size, vocab, heads.q, heads.kv, heads.dim, {width.key: width.size}),
        embedding=embedding,
        layers=Layers([layer(f"{prefix}encoder.layer.{i}") for i in range(count)]),
        norm=None,
        lm_head=lm_head,
        tied=tied,
        positions=claims.table(f"{at}.position_embeddings", positions, hidden)(),
        embedding_norm=claims.norm(f"{at}.LayerNorm", hidden, bias=True)(),
        carried=tuple(build() for build in carried),
        ignored=claims.close(IGNORED),
        causal=False,
    )


FAMILIES = {
    "bert": Known(recipe, IGNORED),
    "roberta": Known(partial(recipe, names=ROBERTA), IGNORED),
    "xlm-roberta": Known(partial(recipe, names=ROBERTA), IGNORED),
}
