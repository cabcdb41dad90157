"""GPT-2: learned positions, layer norms with biases, Conv1D matrices stored [in, out], q, k and v in one; and
GPT-BigCode, whose matrices are stored [out, in], with one kv head or q, k, v head by head.

Reads names with `transformer.` (GPT2LMHeadModel) and without (GPT2Model, the first files of the hub); roles
carry them with it, which both classes load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..model import Layer, Layers, Mlp, Model, Sizes
from ..roles import Linear
from .claims import Claims, Dim, Heads, dim, flag, integer, vocabulary
from .fused import fused_attention
from .known import Known

IGNORED = ("*h.*.attn.bias", "*h.*.attn.masked_bias")
"""The causal mask that old checkpoints carry as buffers."""

PREFIX = "transformer."


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, bigcode: bool = False
) -> Model:
    """The model of a GPT-2 or GPT-BigCode checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, f"{PREFIX}wte.weight", PREFIX)
    hidden = dim(config, "n_embd")
    width = Dim(integer(config, "n_inner", 4 * hidden.size), "n_inner or 4 * n_embd")
    one_kv = bigcode and flag(config, "multi_query", True)
    heads = Heads.of(hidden, dim(config, "n_head"), 1 if one_kv else None)
    rows = Dim((heads.q + 2 * heads.kv) * heads.dim, "(n_head + 2 * kv heads) * head size")

    def matrix(name: str, out: Dim, into: Dim) -> Callable[[], Linear]:
        return claims.linear(name, out, into, bias=True, transposed=not bigcode)

    def layer(name: str) -> Callable[[], Layer]:
        before = claims.norm(f"{name}.ln_1", hidden, bias=True)
        qkv = matrix(f"{name}.attn.c_attn", rows, hidden)
        o = matrix(f"{name}.attn.c_proj", hidden, hidden)
        after = claims.norm(f"{name}.ln_2", hidden, bias=True)
        up = matrix(f"{name}.mlp.c_fc", width, hidden)
        down = matrix(f"{name}.mlp.c_proj", hidden, width)
        attends = fused_attention(qkv, o, heads, grouped=bigcode)
        return lambda: Layer(name, before(), attends(), after(), Mlp(None, up(), down()))

    vocab, embedding, lm_head, tied = vocabulary(
        claims, config, vocab_size, embedding=f"{PREFIX}wte", hidden=hidden, tied_default=True
    )
    layers = Layers([layer(f"{PREFIX}h.{i}") for i in range(integer(config, "n_layer"))])
    return Model(
        family="gpt_bigcode" if bigcode else "gpt2",
        sizes=Sizes(hidden.size, vocab, heads.q, heads.kv, heads.dim, {width.key: width.size}),
        embedding=embedding,
        layers=layers,
        norm=claims.norm(f"{PREFIX}ln_f", hidden, bias=True)(),
        lm_head=lm_head,
        tied=tied,
        positions=claims.table(f"{PREFIX}wpe", dim(config, "n_positions"), hidden)(),
        ignored=claims.close(IGNORED),
    )


FAMILIES = {
    "gpt2": Known(recipe, IGNORED),
    "gpt_bigcode": Known(partial(recipe, bigcode=True), IGNORED),
}
