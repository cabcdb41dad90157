"""A family by its names alone: patterns for each role of a decoder, for a user's own recipe file.

    # mine.py, given as --recipe mine.py
    from fastckpt.recipes.names import Names

    RECIPE = Names(
        family="mine",
        embedding="model.embed_tokens.weight",
        attention_norm="model.layers.{i}.input_layernorm.weight",
        q="model.layers.{i}.self_attn.q_proj.weight",
        ...
    )

`{i}` is the layer, counted from 0 (`{i+1}`: from 1), `{e}` the expert. In a tuple of patterns the first that
the checkpoint has is taken. A role that is None must not be there; one that is named must be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..mixers import Attention
from ..model import Experts, Layer, Layers, Lazy, Mlp, Model, Sizes
from ..roles import Linear, Norm
from .claims import Claims, Dim, Heads, absent, dim, integer, vocabulary
from .fused import attention_of, fused_attention, fused_mlp
from .quantised import quantised

Pattern = str | tuple[str, ...]

_COUNTER = re.compile(r"\{([ie])(?:\+(\d+))?\}")


@dataclass(frozen=True, slots=True)
class Keys:
    """The config keys that say a model's sizes, by default as transformers calls them."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    width: str = "intermediate_size"
    experts: str = "num_local_experts"
    vocab: str = "vocab_size"
    positions: str = "max_position_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The names of a decoder's tensors; all end in `.weight`.

    Attention has `q`, `k` and `v`, or `qkv` as one matrix (`grouped` as in Attention). With `gated_q`, `q`
    holds each head's query rows and then its output gate's. The feed-forward block has `up`, with or without
    `gate`, or `gate_up` as one matrix; where there is a `router`, these are one expert's and hold `{e}`.
    `biases` and `transposed`: the roles, by their names here, that have a bias (norms too) or are stored
    [in, out]. `lm_head` None: the embedding stands for it. `tied`: embedding and head are one, unless config
    says otherwise; `plus_one`: norms multiply by 1 + weight. `ignored`: patterns of names that are left
    out."""

    family: str
    embedding: Pattern
    attention_norm: Pattern
    o: Pattern
    mlp_norm: Pattern | None
    down: Pattern
    norm: Pattern
    lm_head: Pattern | None
    q: Pattern | None = None
    k: Pattern | None = None
    v: Pattern | None = None
    qkv: Pattern | None = None
    grouped: bool = False
    gated_q: bool = False
    q_norm: Pattern | None = None
    k_norm: Pattern | None = None
    gate: Pattern | None = None
    up: Pattern | None = None
    gate_up: Pattern | None = None
    router: Pattern | None = None
    attention_after: Pattern | None = None
    mlp_after: Pattern | None = None
    positions: Pattern | None = None
    biases: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    tied: bool = False
    plus_one: bool = False
    ignored: tuple[str, ...] = ()
    keys: Keys = field(default_factory=Keys)

    def __post_init__(self) -> None:
        apart = (self.q is None) + (self.k is None) + (self.v is None)
        if apart != (0 if self.qkv is None else 3):
            raise RecipeError(f"recipe {self.family}: wanted q, k and v, or qkv")
        if self.gated_q and self.q is None:
            raise RecipeError(f"recipe {self.family}: gated_q wants q, k and v apart")
        if (self.up is None) == (self.gate_up is None) or (self.gate and self.gate_up):
            raise RecipeError(f"recipe {self.family}: wanted up, with or without gate, or gate_up")
        if self.router is not None and self.gate is None:
            raise RecipeError(f"recipe {self.family}: experts need router, gate, up and down")

    def __call__(
        self, ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None
    ) -> Model:
        """The model of a checkpoint with these names; `vocab_size` overrides config's. Raises RecipeError."""
        return _Reading(self, ckpt, config).model(vocab_size)


class _Reading:
    """One checkpoint, read by one set of names."""

    def __init__(self, names: Names, ckpt: Checkpoint, config: Mapping[str, JSON]) -> None:
        self.names, self.ckpt, self.config, keys = names, ckpt, config, names.keys
        self.claims = Claims(ckpt, f"{self.module(names.embedding)}.weight", form=quantised(config))
        self.hidden = dim(config, keys.hidden)
        self.width = dim(config, keys.width)
        heads = integer(config, keys.heads)
        kv_heads = integer(config, keys.kv_heads, heads)
        self.heads = Heads(heads, kv_heads, integer(config, keys.head_dim, self.hidden.size // heads))

    def module(self, pattern: Pattern, i: int = 0, e: int = 0) -> str:
        """The module a pattern names, of several the first whose weight is there (the last, if none is)."""
        counters = {"i": i, "e": e}
        names = [
            _COUNTER.sub(lambda m: str(counters[m[1]] + int(m[2] or 0)), p)
            for p in ((pattern,) if isinstance(pattern, str) else pattern)
        ]
        name = next((n for n in names if n in self.ckpt), names[-1])
        if not name.endswith(".weight"):
            raise RecipeError(f"recipe {self.names.family}: {name} does not end in .weight")
        return name.removesuffix(".weight")

    def linear(
        self, role: str, pattern: Pattern, out: Dim, into: Dim, i: int, e: int = 0
    ) -> Callable[[], Linear]:
        return self.claims.linear(
            self.module(pattern, i, e),
            out,
            into,
            bias=role in self.names.biases,
            transposed=role in self.names.transposed,
        )

    def normed(
        self, role: str, pattern: Pattern | None, i: int = 0, size: Dim | None = None
    ) -> Callable[[], Norm | None]:
        if pattern is None:
            return absent
        return self.claims.norm(
            self.module(pattern, i),
            size or self.hidden,
            bias=role in self.names.biases,
            plus_one=self.names.plus_one,
        )

    def attention(self, i: int) -> Callable[[], Attention]:
        one_head = Dim(self.heads.dim, self.names.keys.head_dim)
        q_norm = self.normed("q_norm", self.names.q_norm, i, one_head)
        k_norm = self.normed("k_norm", self.names.k_norm, i, one_head)
        build = self.matrices(i)
        return lambda: replace(build(), q_norm=q_norm(), k_norm=k_norm())

    def matrices(self, i: int) -> Callable[[], Attention]:
        """Attention's matrices, without its norms."""
        names, keys, heads = self.names, self.names.keys, self.heads
        q_rows = Dim(heads.q * heads.dim, f"{keys.heads} * {keys.head_dim}")
        kv_rows = Dim(heads.kv * heads.dim, f"{keys.kv_heads} * {keys.head_dim}")
        if names.q is None or names.k is None or names.v is None:
            rows = Dim(q_rows.size + 2 * kv_rows.size, f"{q_rows.key} + 2 * {kv_rows.key}")
            whole = self.linear("qkv", names.qkv or "", rows, self.hidden, i)
            o = self.linear("o", names.o, self.hidden, q_rows, i)
            return fused_attention(whole, o, heads, grouped=names.grouped)
        q = self.linear("q", names.q, q_rows.times(2) if names.gated_q else q_rows, self.hidden, i)
        k = self.linear("k", names.k, kv_rows, self.hidden, i)
        v = self.linear("v", names.v, kv_rows, self.hidden, i)
        o = self.linear("o", names.o, self.hidden, q_rows, i)
        return attention_of(q, k, v, o, gated=heads.q if names.gated_q else 0)

    def mlp(self, i: int, e: int = 0) -> Callable[[], Mlp]:
        names = self.names
        if names.gate_up is not None:
            whole = self.linear("gate_up", names.gate_up, self.width.times(2), self.hidden, i, e)
            return fused_mlp(whole, self.linear("down", names.down, self.hidden, self.width, i, e))
        gate = self.linear("gate", names.gate, self.width, self.hidden, i, e) if names.gate else absent
        up = self.linear("up", names.up or "", self.width, self.hidden, i, e)
        down = self.linear("down", names.down, self.hidden, self.width, i, e)
        return lambda: Mlp(gate(), up(), down())

    def experts(self, i: int, router: Pattern) -> Callable[[], Experts]:
        count = dim(self.config, self.names.keys.experts)
        routes = self.linear("router", router, count, self.hidden, i)
        each = [self.mlp(i, e) for e in range(count.size)]
        head = self.names.down if isinstance(self.names.down, str) else self.names.down[0]
        if "{e" not in head:
            raise RecipeError(f"recipe {self.names.family}: {head} is every expert's; it needs {{e}}")
        name = self.module(head.partition("{e")[0] + ".weight", i).rstrip(".")
        return lambda: Experts(name, routes(), Lazy(each))

    def layer(self, i: int) -> Callable[[], Layer]:
        names = self.names
        before = self.normed("attention_norm", names.attention_norm, i)
        attends = self.attention(i)
        after = self.normed("attention_after", names.attention_after, i)
        between = self.normed("mlp_norm", names.mlp_norm, i)
        feeds: Callable[[], Mlp | Experts] = (
            self.mlp(i) if names.router is None else self.experts(i, names.router)
        )
        last = self.normed("mlp_after", names.mlp_after, i)
        return lambda: Layer(str(i), before(), attends(), between(), feeds(), after(), last())

    def model(self, vocab_size: int | None) -> Model:
        names, keys = self.names, self.names.keys
        vocab, embedding, lm_head, tied = vocabulary(
            self.claims,
            self.config,
            vocab_size,
            embedding=self.module(names.embedding),
            hidden=self.hidden,
            tied_default=names.tied,
            head=None if names.lm_head is None else self.module(names.lm_head),
            key=keys.vocab,
        )
        layers = Layers([self.layer(i) for i in range(integer(self.config, keys.layers))])
        table = None
        if names.positions is not None:
            rows = dim(self.config, keys.positions)
            table = self.claims.table(self.module(names.positions), rows, self.hidden)()
        return Model(
            family=names.family,
            sizes=Sizes(
                hidden=self.hidden.size,
                vocab=vocab,
                heads=self.heads.q,
                kv_heads=self.heads.kv,
                head_dim=self.heads.dim,
                widths={self.width.key: self.width.size},
                experts=0 if names.router is None else integer(self.config, keys.experts),
                expert_width="" if names.router is None else self.width.key,
                fused_qkv=names.qkv is not None,
                block=self.claims.block,
                head_keys=(keys.heads, keys.kv_heads, keys.head_dim),
                vocab_key=keys.vocab,
            ),
            embedding=embedding,
            layers=layers,
            norm=self.normed("norm", names.norm)(),
            lm_head=lm_head,
            tied=tied,
            positions=table,
            ignored=self.claims.close(names.ignored),
        )
