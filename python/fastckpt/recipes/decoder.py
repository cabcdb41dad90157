"""The decoder that most families share: `model.layers.{i}`, attention, a feed-forward block, their norms.

A family is a Kind: which biases, norms and fusions it has. Names as transformers' modeling files have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..mixers import Attention
from ..model import Experts, HubCuts, Layer, Layers, Lazy, Mlp, Model, Prediction, Sizes
from ..roles import Embedding, Linear, Norm, Parameter
from .claims import Claims, Dim, Heads, absent, dim, flag, integer, vocabulary
from .delta import Claim, Stored, hybrid, linear_layers
from .delta import heads_of as delta_heads
from .fused import attention_of, fused_attention, fused_mlp
from .known import Known
from .mamba import TWO, Blocks, mixers
from .mamba import Stored as StoredMamba
from .mamba import heads_of as mamba_heads
from .meta import IGNORED as METAS_IGNORED
from .meta import Meta, is_metas, respelled
from .quantised import quantised

IGNORED = ("*rotary_emb.inv_freq", *METAS_IGNORED)
"""Buffers that old checkpoints carry and every server computes itself."""

ANCHOR = "model.embed_tokens.weight"
"""A name that checkpoints of most decoders have."""


@dataclass(frozen=True, slots=True)
class Said:
    """Whether a family has something, where its configs say so: under `key`, or under its `older` name;
    `default` where they are silent."""

    key: str
    default: bool = False
    older: str = ""


def has(config: Mapping[str, JSON], it: bool | Said) -> bool:
    """Whether a model of this config has `it`. Raises RecipeError where the config's word is no boolean."""
    if isinstance(it, bool):
        return it
    return flag(config, it.key, flag(config, it.older, it.default))


@dataclass(frozen=True, slots=True)
class Norms:
    """The names of a layer's norms: before attention and the feed-forward block, and after each, if any
    (None: none, or none that the hub stores); of those of q and k, below attention; of the model's last one.
    `bias`: all but those of q and k have biases."""

    attention: str | None = "input_layernorm"
    mlp: str | None = "post_attention_layernorm"
    attention_after: str | None = None
    mlp_after: str | None = None
    q: str = "q_norm"
    k: str = "k_norm"
    last: str | None = "model.norm"
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Own:
    """The attention of one layer of a family whose layers differ: its heads, the size of a value head (0: as
    the others), and whether it has sinks."""

    heads: Heads
    values: int = 0
    sinks: bool = False


GATED = ("gate_proj", "up_proj", "down_proj")
ATTENTION_BIAS, MLP_BIAS = Said("attention_bias"), Said("mlp_bias")


@dataclass(frozen=True, slots=True)
class Further:
    """What the parts of a Prediction are called: its `layer`, and below the module `at` the rest."""

    layer: str
    at: str
    join: str
    embedding_norm: str
    hidden_norm: str
    norm: str


@dataclass(frozen=True, slots=True)
class Kind:
    """How a family differs from the others of this shape.

    `qkv_bias`, `o_bias`, `mlp_bias`: whether q, k and v, o, or the feed-forward block have biases.
    `head_bias`: the head has one. `qk_norm`: q and k are normed: each head by the same weights, with
    `own_norms` by weights of its own, or, with `whole_norms`, all of q and all of k; `rotated`: after the
    rotary positions. `norms_after`: there are norms after blocks, where `norms` names them. `plus_one`: norms
    multiply by 1 + weight. `fused_qkv`: [q; k; v] are stored as one matrix. `matrices`: the names of a
    feed-forward block's gate, up and down; `paired`: of the two of one whose [gate; up] are stored as one;
    `ungated`: of one without a gate; None of both: it has three. `scalars`: the learned numbers of its
    activation, below the block, with their shapes. `mlp`: the block's name, `width`: config's keys of its
    width, of which the first that has a value counts. `self_attn`, `o`: the names of attention and of its o.
    `gated`: q_proj holds each head's q and then its output gate; `output_gate`: the name of one that is a
    module of its own; `head_gates`: it has a row for each head, unless config's `gating` says otherwise.
    `sinks`: what the sinks of attention are called ("": it has none), `trained_sinks`, in training, where
    that is another name; `own`: of a config, the attention of each of so many layers, None where they do not
    differ. `delta`: how linear attention is stored, which some layers have in its place, `delta_norms`, the
    norms of those layers, where they are others, `mamba`, how Mamba's mixers are, and which layers have what;
    `mixed`: what claims the short convolutions of some layers, and attention, by what is given, of the
    others. `root`: what the names of embedding and layers begin with ("backbone."), `trained`: with what in
    training, `embedding`: the first's name, `head`: the head's. `parallel`: attention and the feed-forward
    block read one norm, side by side. `further`: the one layer that may predict a further token, where it is
    not counted after the last (None: it is, as in DeepSeek). `tied`: whether embedding and head are one where
    the config does not say. `cuts`: as in Model. `ignored`: patterns of names that are left out. `meta`: how
    it lies under Meta's names, None where nobody writes it so."""

    family: str
    qkv_bias: bool | Said = ATTENTION_BIAS
    o_bias: bool | Said = ATTENTION_BIAS
    qk_norm: bool | Said = False
    whole_norms: bool = False
    own_norms: bool = False
    rotated: bool = False
    mlp_bias: bool | Said = False
    norms: Norms = field(default_factory=Norms)
    norms_after: bool | Said = True
    plus_one: bool = False
    fused_qkv: bool = False
    matrices: tuple[str, str, str] = GATED
    paired: tuple[str, str] | None = None
    gated: bool = False
    output_gate: str = ""
    head_gates: bool = False
    sinks: str = ""
    trained_sinks: str = ""
    own: Callable[[Mapping[str, JSON], int], Sequence[Own]] | None = None
    delta: Stored | None = None
    delta_norms: Norms | None = None
    mamba: StoredMamba | None = None
    mixed: Callable[[Claims, Mapping[str, JSON], Claim], Claim] | None = None
    further: Further | None = None
    tied: bool = False
    cuts: HubCuts = field(default_factory=HubCuts)
    head_bias: bool | Said = False
    ungated: tuple[str, str] | None = None
    scalars: tuple[tuple[str, tuple[int, ...]], ...] = ()
    mlp: str = "mlp"
    width: tuple[str, ...] = ("intermediate_size",)
    self_attn: str = "self_attn"
    o: str = "o_proj"
    root: str = "model."
    trained: str = "model."
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    parallel: bool | Said = False
    ignored: tuple[str, ...] = IGNORED
    meta: Meta | None = None


FeedForward = Callable[[str], Callable[[], Mlp | Experts]]
"""Claims the block of a layer by the layer's name, and returns what builds it."""


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, kind: Kind
) -> Model:
    """The model of a checkpoint of that kind; `vocab_size` overrides config's. Raises RecipeError."""
    claims, width = claimed(kind, ckpt, config), dim(config, *kind.width)
    mlp = dense(kind, claims, config, width, kind.mlp)
    return decoder(kind, claims, config, vocab_size, mlp, {width.key: width.size})


def claimed(kind: Kind, ckpt: Checkpoint, config: Mapping[str, JSON]) -> Claims:
    """The names of a checkpoint of that kind, under its root or the one it is trained with, or Meta's. Raises
    RecipeError for Meta's names where the kind has none."""
    if is_metas(ckpt):
        if kind.meta is None:
            raise RecipeError(f"{ckpt.path}: its names are Meta's, under which no {kind.family} is known")
        ckpt = respelled(ckpt, kind.meta, config, heads_of(config).dim)
    anchor = f"{kind.root}{kind.embedding}.weight"
    if kind.trained == kind.root:
        return Claims(ckpt, anchor, form=quantised(config))
    return Claims(ckpt, anchor, kind.root, instead=kind.trained, form=quantised(config))


def blocks_of(kind: Kind, config: Mapping[str, JSON], count: int) -> Sequence[Blocks]:
    """Which blocks each of `count` layers has. Raises RecipeError."""
    return kind.mamba.blocks(config, count) if kind.mamba is not None else [TWO] * count


def families(*kinds: Kind) -> dict[str, Known]:
    """What reads each of these kinds, by its family."""
    return {kind.family: Known(partial(recipe, kind=kind), kind.ignored) for kind in kinds}


def dense(
    kind: Kind, claims: Claims, config: Mapping[str, JSON], width: Dim, at: str = "mlp", trained: str = ""
) -> Callable[[str], Callable[[], Mlp]]:
    """The block of the module `at`, that wide in every layer; `trained`: its name in training, where that is
    another."""
    hidden = dim(config, "hidden_size")
    bias = has(config, kind.mlp_bias)
    if kind.paired is not None:
        both, last = kind.paired
        return lambda layer: fused_mlp(
            claims.linear(f"{layer}.{at}.{both}", width.times(2), hidden, bias=bias),
            claims.linear(f"{layer}.{at}.{last}", hidden, width, bias=bias),
        )
    if kind.ungated is None:
        return lambda layer: gated(
            claims,
            f"{layer}.{at}",
            width,
            hidden,
            kind.matrices,
            bias=bias,
            trained=trained and f"{layer}.{trained}",
        )
    first, second = kind.ungated

    def claim(layer: str) -> Callable[[], Mlp]:
        up = claims.linear(f"{layer}.{at}.{first}", width, hidden, bias=bias)
        down = claims.linear(f"{layer}.{at}.{second}", hidden, width, bias=bias)
        scalars = [
            claims.parameter(f"{layer}.{at}.{name}", *(Dim(n, "1") for n in shape))
            for name, shape in kind.scalars
        ]
        return lambda: Mlp(None, up(), down(), scalars=tuple(build() for build in scalars))

    return claim


def gated(
    claims: Claims,
    at: str,
    width: Dim,
    hidden: Dim,
    matrices: tuple[str, str, str] = GATED,
    *,
    bias: bool = False,
    trained: str = "",
) -> Callable[[], Mlp]:
    """Claims the `matrices` gate, up and down of the module `at`, which may be stored as `trained`."""
    first, second, last = matrices
    stored = trained if trained and claims.has_matrix(f"{trained}.{second}") else at

    def linear(leaf: str, out: Dim, into: Dim) -> Callable[[], Linear]:
        return claims.linear(f"{at}.{leaf}", out, into, bias=bias, stored=f"{stored}.{leaf}")

    gate, up, down = linear(first, width, hidden), linear(second, width, hidden), linear(last, hidden, width)
    return lambda: Mlp(gate(), up(), down())


def heads_of(config: Mapping[str, JSON]) -> Heads:
    """The heads a config says. Raises RecipeError."""
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    return Heads(heads, kv_heads, integer(config, "head_dim", integer(config, "hidden_size") // heads))


def unlike(own: Heads, usual: Heads) -> tuple[int, int] | None:
    """How many query and kv heads a layer has, None where its heads are as usual."""
    return (own.q, own.kv) if own != usual else None


def attention(kind: Kind, claims: Claims, config: Mapping[str, JSON]) -> Claim:
    """The attention of `self_attn`: q, k, v apart or as one, o, and what else the kind has."""
    alike = Own(heads_of(config), sinks=bool(kind.sinks))
    own = kind.own(config, claims.layers(config)) if kind.own is not None else ()
    hidden, one_head = dim(config, "hidden_size"), Dim(alike.heads.dim, "head_dim")
    qkv_bias, qk_norm = has(config, kind.qkv_bias), has(config, kind.qk_norm)

    def norm(name: str, count: int, rows: Dim) -> Callable[[], Norm | None]:
        """The norm of `count` heads, which have that many rows."""
        each = (Dim(count, "heads"),) if kind.own_norms else ()
        over = (rows,) if kind.whole_norms else (*each, one_head)
        return claims.norm(name, *over, plus_one=kind.plus_one) if qk_norm else absent

    def claim(layer: str) -> Callable[[], Attention]:
        number = int(layer.rpartition(".")[2]) if own else 0
        mine = own[number] if number < len(own) else alike
        heads, values, at = mine.heads, mine.values or mine.heads.dim, f"{layer}.{kind.self_attn}"
        q_rows = Dim(heads.q * heads.dim, "num_attention_heads * head_dim")
        k_rows = Dim(heads.kv * heads.dim, "num_key_value_heads * head_dim")
        v_rows = Dim(heads.kv * values, "num_key_value_heads * v_head_dim") if mine.values else k_rows
        read = Dim(heads.q * values, "num_attention_heads * v_head_dim") if mine.values else q_rows

        def matrices() -> Callable[[], Attention]:
            o = claims.linear(f"{at}.{kind.o}", hidden, read, bias=has(config, kind.o_bias))
            if kind.fused_qkv:
                all_rows = Dim(q_rows.size + 2 * k_rows.size, f"{q_rows.key} + 2 * {k_rows.key}")
                whole = claims.linear(f"{at}.qkv_proj", all_rows, hidden, bias=qkv_bias)
                return fused_attention(whole, o, heads)
            q = claims.linear(
                f"{at}.q_proj", q_rows.times(2) if kind.gated else q_rows, hidden, bias=qkv_bias
            )
            k = claims.linear(f"{at}.k_proj", k_rows, hidden, bias=qkv_bias)
            v = claims.linear(f"{at}.v_proj", v_rows, hidden, bias=qkv_bias)
            return attention_of(q, k, v, o, gated=heads.q if kind.gated else 0)

        build = matrices()
        q_norm = norm(f"{at}.{kind.norms.q}", heads.q, q_rows)
        k_norm = norm(f"{at}.{kind.norms.k}", heads.kv, k_rows)
        gate: Callable[[], Linear | None] = absent
        if kind.output_gate:
            each_head = kind.head_gates and config.get("gating", True) in (True, "per-head")
            rows = Dim(heads.q, "num_attention_heads") if each_head else q_rows
            gate = claims.linear(f"{at}.{kind.output_gate}", rows, hidden)
        sinks: Callable[[], Parameter | None] = absent
        if mine.sinks:
            trained, each = f"{at}.{kind.trained_sinks}", Dim(heads.q, "num_attention_heads")
            stored = trained if kind.trained_sinks and trained in claims else None
            sinks = claims.parameter(f"{at}.{kind.sinks}", each, stored=stored)
        return lambda: replace(
            build(),
            q_norm=q_norm(),
            k_norm=k_norm(),
            sinks=sinks(),
            output_gate=gate(),
            whole_norms=kind.whole_norms,
            own_norms=kind.own_norms,
            rotated=kind.rotated,
            heads=unlike(heads, alike.heads),
        )

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
    whole: Callable[[str], Callable[[], tuple[Parameter, ...]]] | None = None,
    experts: int = 0,
    expert_width: str = "",
    shared_width: str = "",
    predictions: int = 0,
) -> Model:
    """A model of which `feed_forward` claims the feed-forward blocks.

    `attends` and `heads` stand for `attention` and `heads_of` in a family with other attention; `whole`
    claims what else a layer has, which is never cut, by the layer's name. `widths`, `experts`, `expert_width`
    and `shared_width`: as in Sizes. `predictions`: how many layers after the last predict one more token
    each, where the checkpoint holds them. Raises RecipeError where the checkpoint does not fit the config,
    and for a name that has no role."""
    hidden = dim(config, "hidden_size")
    size = heads or heads_of(config)
    attend = attends or attention(kind, claims, config)
    if kind.delta is not None:
        attend = hybrid(kind.delta, claims, config, attend)
    if kind.mixed is not None:
        attend = kind.mixed(claims, config, attend)
    names, parallel = kind.norms, has(config, kind.parallel)
    norms_after = has(config, kind.norms_after)
    count = claims.layers(config)
    linear = linear_layers(config, count) if kind.delta is not None else frozenset[str]()
    mix = mixers(kind.mamba, claims, config) if kind.mamba is not None else None

    def norm(name: str) -> Callable[[], Norm]:
        return claims.norm(name, hidden, bias=names.bias, plus_one=kind.plus_one)

    def layer(name: str, blocks: Blocks = TWO) -> Callable[[], Layer]:
        names = kind.delta_norms if kind.delta_norms is not None and name in linear else kind.norms

        def named(leaf: str | None) -> Callable[[], Norm | None]:
            return norm(f"{name}.{leaf}") if leaf else absent

        fed = "mlp" in blocks
        before = named(names.attention if blocks != {"mlp"} else None)
        attending = attend(name) if "attention" in blocks else absent
        mixing = mix(name) if mix is not None and "mamba" in blocks else absent
        between = named(names.mlp if fed and not parallel else None)
        feeding = feed_forward(name) if fed else absent
        after = named(names.attention_after if norms_after else None)
        last = named(names.mlp_after if norms_after else None)
        more = whole(name) if whole is not None else tuple
        return lambda: Layer(
            name,
            before(),
            attending(),
            between(),
            feeding(),
            after(),
            last(),
            mamba=mixing(),
            whole=more(),
        )

    vocab, embedding, lm_head, tied = vocabulary(
        claims,
        config,
        vocab_size,
        embedding=f"{kind.root}{kind.embedding}",
        hidden=hidden,
        tied_default=kind.tied,
        head=kind.head,
        head_bias="lm_head.bias" if has(config, kind.head_bias) else "",
    )
    held = blocks_of(kind, config, count)
    mine = [each.heads for each in kind.own(config, count)] if kind.own is not None else []
    layers = Layers([layer(f"{kind.root}layers.{i}", blocks) for i, blocks in enumerate(held)])
    predictions = min(predictions, claims.most)  # a config may say anything
    further = [_after_the_last(i) for i in range(count, count + predictions)]
    further = [kind.further] if kind.further is not None else further
    further = [names for names in further if f"{names.at}.{names.join}.weight" in claims]
    return Model(
        family=kind.family,
        sizes=Sizes(
            hidden=hidden.size,
            vocab=vocab,
            heads=size.q,
            kv_heads=size.kv,
            head_dim=size.dim,
            widths=widths,
            experts=experts,
            expert_width=expert_width,
            shared_width=shared_width,
            block=claims.block,
            head_keys=("num_attention_heads", "num_key_value_heads", "" if heads else "head_dim"),
            fused_qkv=kind.fused_qkv,
            delta=delta_heads(config) if kind.delta is not None else None,
            mamba=mamba_heads(kind.mamba, config) if kind.mamba is not None else None,
            channels=hidden.size if kind.mixed is not None else 0,
            others=tuple(dict.fromkeys(filter(None, (unlike(x, size) for x in mine)))),
        ),
        embedding=embedding,
        layers=layers,
        norm=norm(names.last)() if names.last else None,
        lm_head=lm_head,
        tied=tied,
        predictions=Lazy([_prediction(claims, n, layer, norm, vocab, hidden) for n in further]),
        ignored=claims.close(kind.ignored),
        cuts=kind.cuts,
        parallel=parallel,
    )


def _after_the_last(i: int) -> Further:
    at = f"model.layers.{i}"
    return Further(at, at, "eh_proj", "enorm", "hnorm", "shared_head.norm")


def _prediction(
    claims: Claims,
    names: Further,
    layer: Callable[[str], Callable[[], Layer]],
    norm: Callable[[str], Callable[[], Norm]],
    vocab: int,
    hidden: Dim,
) -> Callable[[], Prediction]:
    """Claims a layer that predicts one more token, and the embedding and head that it may have."""

    at = names.at

    def own(leaf: str) -> Callable[[], Embedding | None]:
        there = f"{at}.{leaf}.weight" in claims
        return claims.rows(f"{at}.{leaf}", vocab, hidden) if there else absent

    build = layer(names.layer)
    embedding_norm, hidden_norm = norm(f"{at}.{names.embedding_norm}"), norm(f"{at}.{names.hidden_norm}")
    last = norm(f"{at}.{names.norm}")
    join = claims.linear(f"{at}.{names.join}", hidden, hidden.times(2))
    embedding, head = own("embed_tokens"), own("shared_head.head")

    def prediction() -> Prediction:
        rows = head()
        return Prediction(
            build(),
            embedding_norm(),
            hidden_norm(),
            join(),
            last(),
            embedding(),
            None if rows is None else Linear(rows.name, rows.weight),
        )

    return prediction
