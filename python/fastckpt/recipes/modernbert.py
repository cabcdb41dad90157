"""ModernBERT: an encoder with a norm before each block (but the first, which reads the embedding's), q, k
and v as one matrix, gate and up as another; alone or with the heads transformers puts on it.

Names are those of the file: with `model.` where a head stands beside the encoder, without it where the
encoder was saved alone. Names and config keys as transformers' modeling_modernbert.py has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..model import Layer, Layers, Model, Sizes
from .claims import Claims, Heads, absent, dim, flag, integer, vocabulary
from .fused import fused_attention, fused_mlp
from .known import Known

CARRIED = ("head.dense", "head.norm", "classifier")


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a ModernBERT checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    table = "embeddings.tok_embeddings.weight"
    prefix = "" if table in ckpt else "model."
    claims = Claims(ckpt, f"{prefix}{table}")
    hidden, width = dim(config, "hidden_size"), dim(config, "intermediate_size")
    heads = Heads.of(hidden, dim(config, "num_attention_heads"))
    norms, attends, feeds = (flag(config, f"{key}_bias", False) for key in ("norm", "attention", "mlp"))

    def layer(index: int) -> Callable[[], Layer]:
        name = f"{prefix}layers.{index}"
        before = claims.norm(f"{name}.attn_norm", hidden, bias=norms) if index else absent
        qkv = claims.linear(f"{name}.attn.Wqkv", hidden.times(3), hidden, bias=attends)
        o = claims.linear(f"{name}.attn.Wo", hidden, hidden, bias=attends)
        between = claims.norm(f"{name}.mlp_norm", hidden, bias=norms)
        gate_up = claims.linear(f"{name}.mlp.Wi", width.times(2), hidden, bias=feeds)
        down = claims.linear(f"{name}.mlp.Wo", hidden, width, bias=feeds)
        attention, mlp = fused_attention(qkv, o, heads), fused_mlp(gate_up, down)
        return lambda: Layer(name, before(), attention(), between(), mlp())

    bias = "decoder.bias" if "decoder.bias" in claims else ""
    vocab, embedding, lm_head, tied = vocabulary(
        claims,
        config,
        vocab_size,
        embedding=f"{prefix}embeddings.tok_embeddings",
        hidden=hidden,
        tied_default=True,
        head="decoder" if bias or "decoder.weight" in claims else None,
        head_bias=bias,
    )
    carried = claims.carried(CARRIED, bias=False)
    return Model(
        family="modernbert",
        sizes=Sizes(hidden.size, vocab, heads.q, heads.kv, heads.dim, {width.key: width.size}),
        embedding=embedding,
        layers=Layers([layer(i) for i in range(integer(config, "num_hidden_layers"))]),
        norm=claims.norm(f"{prefix}final_norm", hidden, bias=norms)(),
        lm_head=lm_head,
        tied=tied,
        embedding_norm=claims.norm(f"{prefix}embeddings.norm", hidden, bias=norms)(),
        carried=tuple(build() for build in carried),
        ignored=claims.close(),
        causal=False,
    )


FAMILIES = {
    "modernbert": Known(recipe),
}
