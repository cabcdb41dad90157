"""GPT-2: learned positions, layer norms with biases, Conv1D matrices stored [in, out], q, k and v in one.

Reads names with `transformer.` (GPT2LMHeadModel) and without (GPT2Model, the first files of the hub); roles
carry them with it, which both classes load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Attention, Embedding, Layer, Layers, Linear, Mlp, Model, Sizes
from .claims import Claims, Dim, integer, vocabulary
from .fused import qkv_parts

IGNORED = ("*h.*.attn.bias", "*h.*.attn.masked_bias")
"""The causal mask that old checkpoints carry as buffers."""

PREFIX = "transformer."


def recipe(ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None) -> Model:
    """The model of a GPT-2 checkpoint; `vocab_size` overrides config's. Raises RecipeError."""
    anchor = f"{PREFIX}wte.weight"
    spelled = any(name.endswith(anchor) for name in (*ckpt.entries, *ckpt.aliases))
    claims = Claims(ckpt, anchor, omitted="" if spelled else PREFIX)
    hidden = Dim(integer(config, "n_embd"), "n_embd")
    width = Dim(integer(config, "n_inner", 4 * hidden.size), "n_inner or 4 * n_embd")
    triple = Dim(3 * hidden.size, "3 * n_embd")
    positions = Dim(integer(config, "n_positions"), "n_positions")
    heads = integer(config, "n_head")
    if hidden.size % heads:
        raise RecipeError(f"config: n_embd {hidden.size} is no multiple of n_head {heads}")
    head_dim = hidden.size // heads

    def conv1d(name: str, out: Dim, into: Dim) -> Callable[[], Linear]:
        return claims.linear(name, out, into, bias=True, transposed=True)

    def layer(name: str) -> Callable[[], Layer]:
        before = claims.norm(f"{name}.ln_1", hidden, bias=True)
        qkv = conv1d(f"{name}.attn.c_attn", triple, hidden)
        o = conv1d(f"{name}.attn.c_proj", hidden, hidden)
        after = claims.norm(f"{name}.ln_2", hidden, bias=True)
        up = conv1d(f"{name}.mlp.c_fc", width, hidden)
        down = conv1d(f"{name}.mlp.c_proj", hidden, width)

        def build() -> Layer:
            fused = qkv()
            attends = Attention(*qkv_parts(fused, heads, heads, head_dim), o(), fused=fused.name)
            return Layer(name, before(), attends, after(), Mlp(None, up(), down()))

        return build

    vocab, embedding, lm_head, tied = vocabulary(
        claims, config, vocab_size, embedding=f"{PREFIX}wte", hidden=hidden, tied_default=True
    )
    layers = Layers([layer(f"{PREFIX}h.{i}") for i in range(integer(config, "n_layer"))])
    return Model(
        family="gpt2",
        sizes=Sizes(hidden.size, vocab, heads, heads, head_dim, {width.key: width.size}),
        embedding=embedding,
        layers=layers,
        norm=claims.norm(f"{PREFIX}ln_f", hidden, bias=True)(),
        lm_head=lm_head,
        tied=tied,
        positions=Embedding(f"{PREFIX}wpe", claims.tensor(f"{PREFIX}wpe.weight", positions, hidden)()),
        ignored=claims.close(IGNORED),
    )
