"""OPT: learned positions from row 2 on, layer norms with biases before each block, no gate.

OPT-350M differs (norms after the blocks, an embedding narrower than the hidden state) and is refused. Names
and config keys as transformers' modeling_opt.py has them; the hub's larger files lack `model.`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..mixers import Attention
from ..model import Layer, Layers, Mlp, Model, Sizes
from .claims import Claims, Dim, Heads, dim, flag, integer, vocabulary
from .known import Known

PREFIX = "model."

OFFSET = 2
"""The row of the first token's position; transformers has two rows more than positions."""


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of an OPT checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    for key, wanted in (
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("layer_norm_elementwise_affine", True),
    ):
        if flag(config, key, wanted) is not wanted:
            raise RecipeError(f"config: {key} {str(not wanted).lower()} is not read")
    hidden = dim(config, "hidden_size")
    if integer(config, "word_embed_proj_dim", hidden.size) != hidden.size:
        raise RecipeError("config: word_embed_proj_dim other than hidden_size is not read")
    at = f"{PREFIX}decoder"
    claims = Claims(ckpt, f"{at}.embed_tokens.weight", PREFIX)
    width = dim(config, "ffn_dim")
    heads = Heads.of(hidden, dim(config, "num_attention_heads"))
    bias = flag(config, "enable_bias", True)

    def layer(name: str) -> Callable[[], Layer]:
        before = claims.norm(f"{name}.self_attn_layer_norm", hidden, bias=True)
        q, k, v, o = (
            claims.linear(f"{name}.self_attn.{n}", hidden, hidden, bias=bias)
            for n in ("q_proj", "k_proj", "v_proj", "out_proj")
        )
        between = claims.norm(f"{name}.final_layer_norm", hidden, bias=True)
        up = claims.linear(f"{name}.fc1", width, hidden, bias=bias)
        down = claims.linear(f"{name}.fc2", hidden, width, bias=bias)
        return lambda: Layer(
            name, before(), Attention(q(), k(), v(), o()), between(), Mlp(None, up(), down())
        )

    vocab, embedding, lm_head, tied = vocabulary(
        claims, config, vocab_size, embedding=f"{at}.embed_tokens", hidden=hidden, tied_default=True
    )
    longest = dim(config, "max_position_embeddings")
    positions = Dim(longest.size + OFFSET, f"{longest.key} + {OFFSET}")
    return Model(
        family="opt",
        sizes=Sizes(hidden.size, vocab, heads.q, heads.kv, heads.dim, {width.key: width.size}),
        embedding=embedding,
        layers=Layers([layer(f"{at}.layers.{i}") for i in range(integer(config, "num_hidden_layers"))]),
        norm=claims.norm(f"{at}.final_layer_norm", hidden, bias=True)(),
        lm_head=lm_head,
        tied=tied,
        positions=claims.table(f"{at}.embed_positions", positions, hidden)(),
        first_position=OFFSET,
        ignored=claims.close(),
    )


FAMILIES = {
    "opt": Known(recipe),
}
