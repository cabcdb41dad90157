"""The decoder that most families share: `model.layers.{i}`, attention, a feed-forward block, their norms.

A family is a Kind: which biases, norms and fusions it has. Names as transformers' modeling files have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import (
    Attention,
    Experts,
    HubCuts,
    Layer,
    Layers,
    Lazy,
    Linear,
    Mla,
    Mlp,
    Model,
    Norm,
    Prediction,
    Sizes,
)
from .claims import Claims, Dim, flag, integer, vocabulary
from .fused import gate_up_parts, qkv_parts
from .quantised import quantised

IGNORED = ("*rotary_emb.inv_freq",)
"""Buffers that old checkpoints carry and every server computes itself."""

ANCHOR = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Norms:
    """The names of a layer's norms: before attention and the feed-forward block, and after each, if any."""

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    attention_after: str | None = None
    mlp_after: str | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """What a family of this shape has: a bias on q, k, v, on o (None: as config's attention_bias says), norms
    on each head's q and k, a bias in the feed-forward block where config's mlp_bias says so.

    `plus_one`: its norms multiply by 1 + weight. `fused_qkv`, `fused_gate_up`: it stores [q; k; v] or
    [gate; up] as one. `sinks`: attention has one. `tied`: what a config that does not say means. `cuts`: as
    in Model."""

    family: str
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    mlp_bias: bool = False
    norms: Norms = field(default_factory=Norms)
    plus_one: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    sinks: bool = False
    tied: bool = False
    cuts: HubCuts = field(default_factory=HubCuts)


@dataclass(frozen=True, slots=True)
class Heads:
    """The head counts and the size of one head that a config says."""

    heads: int
    kv_heads: int
    head_dim: int


Claim = Callable[[str], Callable[[], Attention | Mla]]
FeedForward = Callable[[str], Callable[[], Mlp | Experts]]
"""Claims the block of the layer of that name; what it returns builds the block."""


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, kind: Kind
) -> Model:
    """The model of a checkpoint of that kind; `vocab_size` overrides config's. Raises RecipeError."""
    claims = Claims(ckpt, ANCHOR, form=quantised(config))
    width = Dim(integer(config, "intermediate_size"), "intermediate_size")
    mlp = dense(kind, claims, config, width)
    return decoder(kind, claims, config, vocab_size, mlp, {width.key: width.size})


def dense(kind: Kind, claims: Claims, config: Mapping[str, JSON], width: Dim) -> FeedForward:
    """The gated block of `mlp`, that wide in every layer."""
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    bias = kind.mlp_bias and flag(config, "mlp_bias", False)
    return lambda layer: gated(claims, f"{layer}.mlp", width, hidden, bias=bias, fused=kind.fused_gate_up)


def gated(
    claims: Claims, at: str, width: Dim, hidden: Dim, *, bias: bool = False, fused: bool = False
) -> Callable[[], Mlp]:
    """Claims `gate_proj`, `up_proj` (or `gate_up_proj`, which is both) and `down_proj` of the module `at`."""
    if fused:
        pair = claims.linear(f"{at}.gate_up_proj", Dim(2 * width.size, f"2 * {width.key}"), hidden, bias=bias)
    else:
        gate = claims.linear(f"{at}.gate_proj", width, hidden, bias=bias)
        up = claims.linear(f"{at}.up_proj", width, hidden, bias=bias)
    down = claims.linear(f"{at}.down_proj", hidden, width, bias=bias)

    def parted() -> Mlp:
        both = pair()
        return Mlp(*gate_up_parts(both), down(), both.name)

    return parted if fused else lambda: Mlp(gate(), up(), down())


def heads_of(config: Mapping[str, JSON]) -> Heads:
    """The heads a config says. Raises RecipeError where query heads do not share kv heads evenly."""
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    head_dim = integer(config, "head_dim", integer(config, "hidden_size") // heads)
    if heads % kv_heads:
        raise RecipeError(f"config: {heads} attention heads do not share {kv_heads} kv heads evenly")
    return Heads(heads, kv_heads, head_dim)


def attention(kind: Kind, claims: Claims, config: Mapping[str, JSON]) -> Claim:
    """The attention of `self_attn`: q, k, v apart or as one, o, and what else the kind has."""
    size = heads_of(config)
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    q_rows = Dim(size.heads * size.head_dim, "num_attention_heads * head_dim")
    kv_rows = Dim(size.kv_heads * size.head_dim, "num_key_value_heads * head_dim")
    all_rows = Dim(q_rows.size + 2 * kv_rows.size, f"{q_rows.key} + 2 * {kv_rows.key}")
    one_head = Dim(size.head_dim, "head_dim")
    said = flag(config, "attention_bias", False)
    qkv_bias = said if kind.qkv_bias is None else kind.qkv_bias
    o_bias = said if kind.o_bias is None else kind.o_bias

    def norms(at: str) -> Callable[[], tuple[Norm | None, Norm | None]]:
        if not kind.qk_norm:
            return lambda: (None, None)
        q = claims.norm(f"{at}.q_norm", one_head, plus_one=kind.plus_one)
        k = claims.norm(f"{at}.k_norm", one_head, plus_one=kind.plus_one)
        return lambda: (q(), k())

    def claim(layer: str) -> Callable[[], Attention]:
        at = f"{layer}.self_attn"
        o = claims.linear(f"{at}.o_proj", hidden, q_rows, bias=o_bias)
        qk_norms = norms(at)
        sinks = (
            claims.parameter(f"{at}.sinks", Dim(size.heads, "num_attention_heads")) if kind.sinks else None
        )
        if kind.fused_qkv:
            whole = claims.linear(f"{at}.qkv_proj", all_rows, hidden, bias=qkv_bias)

            def parted() -> Attention:
                qkv = whole()
                q, k, v = qkv_parts(qkv, size.heads, size.kv_heads, size.head_dim)
                return Attention(q, k, v, o(), *qk_norms(), qkv.name)

            return parted
        q = claims.linear(f"{at}.q_proj", q_rows, hidden, bias=qkv_bias)
        k = claims.linear(f"{at}.k_proj", kv_rows, hidden, bias=qkv_bias)
        v = claims.linear(f"{at}.v_proj", kv_rows, hidden, bias=qkv_bias)
        return lambda: Attention(q(), k(), v(), o(), *qk_norms(), sinks=sinks() if sinks else None)

    return claim


def decoder(
    kind: Kind,
    claims: Claims,
    config: Mapping[str, JSON],
    vocab_size: int | None,
    feed_forward: FeedForward,
    widths: Mapping[str, int],
    *,
    attends: Claim | None = None,
    heads: Heads | None = None,
    experts: int = 0,
    expert_width: str = "",
    shared_width: str = "",
    predictions: int = 0,
) -> Model:
    """Everything but the feed-forward blocks, which `feed_forward` claims; `widths`, `experts`,
    `expert_width` and `shared_width` as in Sizes; `predictions`: that many layers after the last predict one
    more token each, where the checkpoint holds them.

    `attends` and `heads` stand for `attention` and `heads_of` in a family whose attention is another. Raises
    RecipeError where the checkpoint does not fit the config, or holds a name no role takes."""
    hidden = Dim(integer(config, "hidden_size"), "hidden_size")
    size = heads or heads_of(config)
    attend = attends or attention(kind, claims, config)

    def norm(name: str) -> Callable[[], Norm]:
        return claims.norm(name, hidden, plus_one=kind.plus_one)

    def layer(name: str) -> Callable[[], Layer]:
        names = kind.norms
        before, attending = norm(f"{name}.{names.attention}"), attend(name)
        between, feeding = norm(f"{name}.{names.mlp}"), feed_forward(name)
        after = norm(f"{name}.{names.attention_after}") if names.attention_after else None
        last = norm(f"{name}.{names.mlp_after}") if names.mlp_after else None
        return lambda: Layer(
            name,
            before(),
            attending(),
            between(),
            feeding(),
            after() if after else None,
            last() if last else None,
        )

    vocab, embedding, lm_head, tied = vocabulary(
        claims, config, vocab_size, embedding="model.embed_tokens", hidden=hidden, tied_default=kind.tied
    )
    count = integer(config, "num_hidden_layers")
    layers = Layers([layer(f"model.layers.{i}") for i in range(count)])
    predictions = min(predictions, len(claims.ckpt))  # a config may say anything
    further = [f"model.layers.{i}" for i in range(count, count + predictions)]

    def prediction(name: str) -> Callable[[], Prediction]:
        build = layer(name)
        norms = [norm(f"{name}.{n}") for n in ("enorm", "hnorm", "shared_head.norm")]
        join = claims.linear(f"{name}.eh_proj", hidden, Dim(2 * hidden.size, f"2 * {hidden.key}"))
        tables = [
            claims.rows(f"{name}.{n}", vocab, hidden) if f"{name}.{n}.weight" in claims else None
            for n in ("embed_tokens", "shared_head.head")
        ]

        def built() -> Prediction:
            table, head = (t and t() for t in tables)
            return Prediction(
                build(),
                norms[0](),
                norms[1](),
                join(),
                norms[2](),
                table,
                Linear(head.name, head.weight) if head else None,
            )

        return built

    return Model(
        family=kind.family,
        sizes=Sizes(
            hidden=hidden.size,
            vocab=vocab,
            heads=size.heads,
            kv_heads=size.kv_heads,
            head_dim=size.head_dim,
            widths=widths,
            experts=experts,
            expert_width=expert_width,
            shared_width=shared_width,
            block=claims.block,
            head_keys=("num_attention_heads", "num_key_value_heads", "" if heads else "head_dim"),
            fused_qkv=kind.fused_qkv,
        ),
        embedding=embedding,
        layers=layers,
        norm=norm("model.norm")(),
        lm_head=lm_head,
        tied=tied,
        predictions=Lazy([prediction(n) for n in further if f"{n}.eh_proj.weight" in claims]),
        ignored=claims.close(IGNORED),
        cuts=kind.cuts,
    )
