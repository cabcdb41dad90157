"""GPT-J: attention and the feed-forward block read one norm, side by side; the blocks and the head have
biases, attention has none.

Names and config keys as transformers' modeling_gptj.py has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..mixers import Attention
from ..model import Layer, Layers, Mlp, Model, Sizes
from .claims import Claims, Dim, Heads, dim, integer, vocabulary
from .gpt2 import IGNORED
from .known import Known

PREFIX = "transformer."


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a GPT-J checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, f"{PREFIX}wte.weight", PREFIX)
    hidden = dim(config, "n_embd")
    width = Dim(integer(config, "n_inner", 4 * hidden.size), "n_inner or 4 * n_embd")
    heads = Heads.of(hidden, dim(config, "n_head"))

    def layer(name: str) -> Callable[[], Layer]:
        before = claims.norm(f"{name}.ln_1", hidden, bias=True)
        q, k, v, o = (
            claims.linear(f"{name}.attn.{n}", hidden, hidden)
            for n in ("q_proj", "k_proj", "v_proj", "out_proj")
        )
        up = claims.linear(f"{name}.mlp.fc_in", width, hidden, bias=True)
        down = claims.linear(f"{name}.mlp.fc_out", hidden, width, bias=True)
        return lambda: Layer(name, before(), Attention(q(), k(), v(), o()), None, Mlp(None, up(), down()))

    vocab, embedding, lm_head, tied = vocabulary(
        claims,
        config,
        vocab_size,
        embedding=f"{PREFIX}wte",
        hidden=hidden,
        tied_default=False,
        head_bias="lm_head.bias",
    )
    return Model(
        family="gptj",
        sizes=Sizes(hidden.size, vocab, heads.q, heads.kv, heads.dim, {width.key: width.size}),
        embedding=embedding,
        layers=Layers([layer(f"{PREFIX}h.{i}") for i in range(integer(config, "n_layer"))]),
        norm=claims.norm(f"{PREFIX}ln_f", hidden, bias=True)(),
        lm_head=lm_head,
        tied=tied,
        ignored=claims.close(IGNORED),
        parallel=True,
    )


FAMILIES = {
    "gptj": Known(recipe, IGNORED),
}
