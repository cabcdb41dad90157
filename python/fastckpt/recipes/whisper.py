"""Whisper: an audio encoder behind two convolutions and a decoder that attends to it; keys have no bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..mixers import Attention
from ..model import Encoder, Layer, Layers, Mlp, Model, Sizes
from ..roles import Embedding, Norm
from .claims import Claims, Dim, Heads, dim, integer, vocabulary
from .known import Known


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a Whisper checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, "model.decoder.embed_tokens.weight")
    hidden = dim(config, "d_model")
    heads = Heads.of(hidden, dim(config, "decoder_attention_heads"))
    others = integer(config, "encoder_attention_heads")
    if heads.q != others:
        raise RecipeError(f"config: {heads.q} decoder and {others} encoder heads: wanted one count")
    widths = {side: dim(config, f"{side}_ffn_dim") for side in ("encoder", "decoder")}

    def attention(at: str) -> Callable[[], Attention]:
        q = claims.linear(f"{at}.q_proj", hidden, hidden, bias=True)
        k = claims.linear(f"{at}.k_proj", hidden, hidden)
        v = claims.linear(f"{at}.v_proj", hidden, hidden, bias=True)
        o = claims.linear(f"{at}.out_proj", hidden, hidden, bias=True)
        return lambda: Attention(q(), k(), v(), o())

    def norm(name: str) -> Callable[[], Norm]:
        return claims.norm(name, hidden, bias=True)

    def layer(side: str, i: int) -> Callable[[], Layer]:
        name = f"model.{side}.layers.{i}"
        before, attends = norm(f"{name}.self_attn_layer_norm"), attention(f"{name}.self_attn")
        up = claims.linear(f"{name}.fc1", widths[side], hidden, bias=True)
        down = claims.linear(f"{name}.fc2", hidden, widths[side], bias=True)
        between = norm(f"{name}.final_layer_norm")

        def build() -> Layer:
            return Layer(name, before(), attends(), between(), Mlp(None, up(), down()))

        if side == "encoder":
            return build
        crossing, crosses = norm(f"{name}.encoder_attn_layer_norm"), attention(f"{name}.encoder_attn")
        return lambda: replace(build(), cross=crosses(), cross_norm=crossing())

    def layers(side: str) -> Layers:
        return Layers([layer(side, i) for i in range(integer(config, f"{side}_layers"))])

    def positions(side: str, key: str) -> Callable[[], Embedding]:
        return claims.table(f"model.{side}.embed_positions", dim(config, key), hidden)

    taps, mels = Dim(3, "3"), dim(config, "num_mel_bins")
    front = [
        claims.parameter("model.encoder.conv1.weight", hidden, mels, taps),
        claims.parameter("model.encoder.conv1.bias", hidden),
        claims.parameter("model.encoder.conv2.weight", hidden, hidden, taps),
        claims.parameter("model.encoder.conv2.bias", hidden),
    ]
    vocab, embedding, lm_head, tied = vocabulary(
        claims,
        config,
        vocab_size,
        embedding="model.decoder.embed_tokens",
        hidden=hidden,
        tied_default=True,
        head="proj_out",
    )
    encoder = Encoder(
        layers("encoder"), norm("model.encoder.layer_norm")(), positions("encoder", "max_source_positions")()
    )
    return Model(
        family="whisper",
        sizes=Sizes(
            hidden.size, vocab, heads.q, heads.kv, heads.dim, {d.key: d.size for d in widths.values()}
        ),
        embedding=embedding,
        layers=layers("decoder"),
        norm=norm("model.decoder.layer_norm")(),
        lm_head=lm_head,
        tied=tied,
        positions=positions("decoder", "max_target_positions")(),
        encoder=encoder,
        carried=tuple(build() for build in front),
        ignored=claims.close(),
    )


FAMILIES = {
    "whisper": Known(recipe),
}
