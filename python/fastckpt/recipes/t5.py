"""T5: an encoder and a decoder that attends to it, relative positions in their first layers, no biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..mixers import Attention
from ..model import Encoder, Layer, Layers, Mlp, Model, Sizes
from ..roles import Norm
from .claims import Claims, Dim, absent, dim, flag, integer, vocabulary
from .known import Known


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a T5 checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, "shared.weight")
    hidden, width = (dim(config, key) for key in ("d_model", "d_ff"))
    heads, head_dim = integer(config, "num_heads"), integer(config, "d_kv")
    rows = Dim(heads * head_dim, "num_heads * d_kv")
    buckets = dim(config, "relative_attention_num_buckets")
    gated = flag(config, "is_gated_act", str(config.get("feed_forward_proj", "relu")).startswith("gated-"))

    def attention(at: str, *, relative: bool = False) -> Callable[[], Attention]:
        q, k, v = (claims.linear(f"{at}.{n}", rows, hidden) for n in "qkv")
        o = claims.linear(f"{at}.o", hidden, rows)
        name = f"{at}.relative_attention_bias.weight"
        logits = claims.parameter(name, buckets, Dim(heads, "num_heads")) if relative else absent
        return lambda: Attention(q(), k(), v(), o(), relative=logits())

    def mlp(at: str) -> Callable[[], Mlp]:
        gate = claims.linear(f"{at}.wi_0", width, hidden) if gated else absent
        up = claims.linear(f"{at}.wi_1" if gated else f"{at}.wi", width, hidden)
        down = claims.linear(f"{at}.wo", hidden, width)
        return lambda: Mlp(gate(), up(), down())

    def norm(at: str) -> Callable[[], Norm]:
        return claims.norm(f"{at}.layer_norm", hidden)

    def encoder_layer(i: int) -> Callable[[], Layer]:
        at = f"encoder.block.{i}.layer"
        before, attends = norm(f"{at}.0"), attention(f"{at}.0.SelfAttention", relative=i == 0)
        between, feeds = norm(f"{at}.1"), mlp(f"{at}.1.DenseReluDense")
        return lambda: Layer(f"encoder.block.{i}", before(), attends(), between(), feeds())

    def decoder_layer(i: int) -> Callable[[], Layer]:
        at = f"decoder.block.{i}.layer"
        before, attends = norm(f"{at}.0"), attention(f"{at}.0.SelfAttention", relative=i == 0)
        crossing, crosses = norm(f"{at}.1"), attention(f"{at}.1.EncDecAttention")
        between, feeds = norm(f"{at}.2"), mlp(f"{at}.2.DenseReluDense")

        def build() -> Layer:
            layer = Layer(f"decoder.block.{i}", before(), attends(), between(), feeds())
            return replace(layer, cross=crosses(), cross_norm=crossing())

        return build

    vocab, embedding, lm_head, tied = vocabulary(
        claims, config, vocab_size, embedding="shared", hidden=hidden, tied_default=True
    )
    count = integer(config, "num_layers")
    encoder = Layers([encoder_layer(i) for i in range(count)])
    decoder = Layers([decoder_layer(i) for i in range(integer(config, "num_decoder_layers", count))])
    return Model(
        family="t5",
        sizes=Sizes(hidden.size, vocab, heads, heads, head_dim, {width.key: width.size}),
        embedding=embedding,
        layers=decoder,
        norm=claims.norm("decoder.final_layer_norm", hidden)(),
        lm_head=lm_head,
        tied=tied,
        encoder=Encoder(encoder, claims.norm("encoder.final_layer_norm", hidden)()),
        ignored=claims.close(),
    )


FAMILIES = {
    "t5": Known(recipe),
}
