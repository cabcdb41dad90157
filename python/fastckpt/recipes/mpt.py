"""MPT: ALiBi, norms without biases, [q; k; v] as one matrix, no gate, no biases.

Names and config keys as transformers' modeling_mpt.py has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Layer, Layers, Mlp, Model, Sizes
from .claims import Claims, Heads, dim, flag, integer, section, vocabulary
from .fused import fused_attention
from .known import Known

PREFIX = "transformer."

SLOPES = 8
"""alibi_bias_max of ALiBi's own slopes."""


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of an MPT checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    attends = section(config, "attn_config", optional=True)
    if not flag(attends, "alibi", True) or attends.get("attn_type") not in (None, "multihead_attention"):
        raise RecipeError(f"config: attn_config: wanted alibi and multihead_attention, got {attends}")
    claims = Claims(ckpt, f"{PREFIX}wte.weight", PREFIX)
    hidden = dim(config, "d_model")
    width = hidden.times(integer(config, "expansion_ratio", 4))
    heads = Heads.of(hidden, dim(config, "n_heads"))
    if heads.q & (heads.q - 1) or integer(attends, "alibi_bias_max", SLOPES) != SLOPES:
        raise RecipeError(
            f"config: the slopes of n_heads {heads.q} and alibi_bias_max {attends.get('alibi_bias_max')} are "
            f"not BLOOM's: wanted a power of two and {SLOPES}"
        )

    def layer(name: str) -> Callable[[], Layer]:
        before, between = (claims.norm(f"{name}.norm_{n}", hidden) for n in (1, 2))
        qkv = claims.linear(f"{name}.attn.Wqkv", hidden.times(3), hidden)
        o = claims.linear(f"{name}.attn.out_proj", hidden, hidden)
        up = claims.linear(f"{name}.ffn.up_proj", width, hidden)
        down = claims.linear(f"{name}.ffn.down_proj", hidden, width)
        build = fused_attention(qkv, o, heads)
        return lambda: Layer(name, before(), build(), between(), Mlp(None, up(), down()))

    vocab, embedding, lm_head, tied = vocabulary(
        claims, config, vocab_size, embedding=f"{PREFIX}wte", hidden=hidden, tied_default=True
    )
    return Model(
        family="mpt",
        sizes=Sizes(hidden.size, vocab, heads.q, heads.kv, heads.dim, {width.key: width.size}),
        embedding=embedding,
        layers=Layers([layer(f"{PREFIX}blocks.{i}") for i in range(integer(config, "n_layers"))]),
        norm=claims.norm(f"{PREFIX}norm_f", hidden)(),
        lm_head=lm_head,
        tied=tied,
        ignored=claims.close(),
        alibi=True,
    )


FAMILIES = {
    "mpt": Known(recipe),
}
