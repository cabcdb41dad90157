"""GPT-NeoX, BLOOM and Falcon: `query_key_value` and `dense`, `dense_h_to_4h` and `dense_4h_to_h`.

The fused matrix holds, for each kv head, its query heads, itself and its value head: that is q, k, v head by
head where every query head has its own kv head (NeoX, BLOOM, Falcon-RW), and all queries before one k and one
v in old Falcons. The hub does not store ALiBi's slopes: servers compute them from the number of heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..checkpoint import JSON, Checkpoint
from ..model import HubCuts, Layer, Layers, Mlp, Model, Sizes
from .claims import Claims, Dim, Heads, absent, dim, flag, integer, vocabulary
from .fused import fused_attention
from .known import Known

IGNORED = ("*attention.bias", "*attention.masked_bias", "*rotary_emb.inv_freq", "*rotary.inv_freq")
"""Causal masks and frequencies that old checkpoints carry as buffers."""


@dataclass(frozen=True, slots=True)
class Names:
    """Where a family keeps its modules. transformers trains every family's head as `lm_head`."""

    prefix: str
    embedding: str
    layers: str
    attention: str
    norm: str
    head: str = "lm_head"
    embedding_norm: str | None = None
    cuts: HubCuts = field(default_factory=HubCuts)


NEOX = Names(
    "gpt_neox.",
    "embed_in",
    "layers",
    "attention",
    "final_layer_norm",
    "embed_out",
    cuts=HubCuts(whole=frozenset({"embedding"})),
)
BLOOM = Names(
    "transformer.",
    "word_embeddings",
    "h",
    "self_attention",
    "ln_f",
    embedding_norm="word_embeddings_layernorm",
)
FALCON = Names("transformer.", "word_embeddings", "h", "self_attention", "ln_f")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a config says: sizes, whether attention and the feed-forward block have biases, and the names of
    the norms before them (where `mlp_norm` is None, both read one); `parallel` and `alibi` as in Model."""

    family: str
    hidden: Dim
    layers: int
    heads: Heads
    width: Dim
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_norm: str = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    tied: bool = True
    parallel: bool = False
    alibi: bool = False


def neox(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a GPT-NeoX checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    hidden = dim(config, "hidden_size")
    shape = Shape(
        family="gpt_neox",
        hidden=hidden,
        layers=integer(config, "num_hidden_layers"),
        heads=Heads.of(hidden, dim(config, "num_attention_heads")),
        width=dim(config, "intermediate_size"),
        attention_bias=flag(config, "attention_bias", True),
        tied=False,
        parallel=flag(config, "use_parallel_residual", True),
    )
    return _model(ckpt, config, vocab_size, NEOX, shape)


def bloom(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a BLOOM checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    hidden = dim(config, "hidden_size", "n_embed")
    shape = Shape(
        family="bloom",
        hidden=hidden,
        layers=dim(config, "n_layer", "num_hidden_layers").size,
        heads=Heads.of(hidden, dim(config, "n_head", "num_attention_heads")),
        width=hidden.times(4),
        alibi=True,
    )
    return _model(ckpt, config, vocab_size, BLOOM, shape)


def falcon(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Falcon checkpoint, old or new; `vocab_size` overrides config's. Raises RecipeError."""
    hidden = dim(config, "hidden_size")
    heads = dim(config, "num_attention_heads", "n_head")
    grouped = flag(config, "new_decoder_architecture", False)
    if grouped:
        kv_heads = dim(config, "num_kv_heads", "n_head_kv", default=heads.size).size
    else:
        kv_heads = 1 if flag(config, "multi_query", True) else heads.size
    if not flag(config, "parallel_attn", True):
        norms: tuple[str, str | None] = "input_layernorm", "post_attention_layernorm"
    elif integer(config, "num_ln_in_parallel_attn", 2 if grouped else 1) == 2:
        norms = "ln_attn", "ln_mlp"
    else:
        norms = "input_layernorm", None
    bias = flag(config, "bias", False)
    shape = Shape(
        family="falcon",
        hidden=hidden,
        layers=dim(config, "num_hidden_layers", "n_layer").size,
        heads=Heads.of(hidden, heads, kv_heads),
        width=Dim(integer(config, "ffn_hidden_size", 4 * hidden.size), "ffn_hidden_size or 4 * hidden_size"),
        attention_bias=bias,
        mlp_bias=bias,
        attention_norm=norms[0],
        mlp_norm=norms[1],
        parallel=flag(config, "parallel_attn", True),
        alibi=flag(config, "alibi", False),
    )
    return _model(ckpt, config, vocab_size, FALCON, shape)


def _model(
    ckpt: Checkpoint, config: Mapping[str, JSON], vocab_size: int | None, names: Names, shape: Shape
) -> Model:
    hidden, width, heads, prefix = shape.hidden, shape.width, shape.heads, names.prefix
    claims = Claims(ckpt, f"{prefix}{names.embedding}.weight", prefix)
    rows = Dim((heads.q + 2 * heads.kv) * heads.dim, "(heads + 2 * kv heads) * head size")

    def layer(name: str) -> Callable[[], Layer]:
        before = claims.norm(f"{name}.{shape.attention_norm}", hidden, bias=True)
        between = claims.norm(f"{name}.{shape.mlp_norm}", hidden, bias=True) if shape.mlp_norm else absent
        at = f"{name}.{names.attention}"
        qkv = claims.linear(f"{at}.query_key_value", rows, hidden, bias=shape.attention_bias)
        o = claims.linear(f"{at}.dense", hidden, hidden, bias=shape.attention_bias)
        up = claims.linear(f"{name}.mlp.dense_h_to_4h", width, hidden, bias=shape.mlp_bias)
        down = claims.linear(f"{name}.mlp.dense_4h_to_h", hidden, width, bias=shape.mlp_bias)
        attends = fused_attention(qkv, o, heads, grouped=True)
        return lambda: Layer(name, before(), attends(), between(), Mlp(None, up(), down()))

    vocab, embedding, lm_head, tied = vocabulary(
        claims,
        config,
        vocab_size,
        embedding=f"{prefix}{names.embedding}",
        hidden=hidden,
        tied_default=shape.tied,
        head=names.head,
        trained_head="lm_head",
    )
    leaf = names.embedding_norm
    embedding_norm = claims.norm(f"{prefix}{leaf}", hidden, bias=True) if leaf else absent
    return Model(
        family=shape.family,
        sizes=Sizes(hidden.size, vocab, heads.q, heads.kv, heads.dim, {width.key: width.size}),
        embedding=embedding,
        layers=Layers([layer(f"{prefix}{names.layers}.{i}") for i in range(shape.layers)]),
        norm=claims.norm(f"{prefix}{names.norm}", hidden, bias=True)(),
        lm_head=lm_head,
        tied=tied,
        embedding_norm=embedding_norm(),
        ignored=claims.close(IGNORED),
        cuts=names.cuts,
        parallel=shape.parallel,
        alibi=shape.alibi,
    )


FAMILIES = {
    "gpt_neox": Known(neox, IGNORED),
    "bloom": Known(bloom, IGNORED),
    "falcon": Known(falcon, IGNORED),
}
