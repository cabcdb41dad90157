"""The decoder that most families share: `model.layers.{i}`, attention, a feed-forward block, their norms.

A family is a Kind (`kind.py`). Its attention and its feed-forward blocks are claimed apart (`attention.py`,
`dense.py`, `mixture.py`), so that a family may bring others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..checkpoint import JSON, Checkpoint
from ..errors import RecipeError
from ..model import Layer, Layers, Lazy, Model, Prediction, Sizes
from ..roles import Embedding, Linear, Norm, Parameter
from .attention import Attending, attention, heads_of
from .claims import Claims, absent, dim, vocabulary
from .dense import Feeding, dense
from .kind import Further, Kind, has
from .known import Known
from .mamba import TWO, Blocks, mixers
from .mamba import heads_of as mamba_heads
from .meta import is_metas, respelled
from .quantised import quantised

ANCHOR = "model.embed_tokens.weight"
"""A name that checkpoints of most decoders have."""


def recipe(
    ckpt: Checkpoint, config: Mapping[str, JSON], *, vocab_size: int | None = None, kind: Kind
) -> Model:
    """The model of a checkpoint of that kind; `vocab_size` overrides config's. Raises RecipeError."""
    claims, width = claimed(kind, ckpt, config), dim(config, *kind.mlp.width)
    feeding = Feeding(dense(kind.mlp, claims, config, width), {width.key: width.size})
    return decoder(kind, claims, config, vocab_size, attention(kind, claims, config), feeding)


def decoders(*kinds: Kind) -> dict[str, Known]:
    """What reads each of these kinds, by its family."""
    return {kind.family: Known(partial(recipe, kind=kind), kind.ignored) for kind in kinds}


def claimed(kind: Kind, ckpt: Checkpoint, config: Mapping[str, JSON]) -> Claims:
    """The names of a checkpoint of that kind, under its root or the one it is trained with, or Meta's. Raises
    RecipeError for Meta's names where the kind has none."""
    if is_metas(ckpt):
        if kind.meta is None:
            raise RecipeError(f"{ckpt.path}: its names are Meta's, under which no {kind.family} is known")
        ckpt = respelled(ckpt, kind.meta, config, heads_of(config).dim)
    anchor = f"{kind.root}{kind.vocabulary.embedding}.weight"
    if kind.trained == kind.root:
        return Claims(ckpt, anchor, form=quantised(config))
    return Claims(ckpt, anchor, kind.root, instead=kind.trained, form=quantised(config))


def blocks_of(kind: Kind, config: Mapping[str, JSON], count: int) -> Sequence[Blocks]:
    """Which blocks each of `count` layers has. Raises RecipeError."""
    return kind.mamba.blocks(config, count) if kind.mamba is not None else [TWO] * count


Whole = Callable[[str], Callable[[], tuple[Parameter, ...]]]
"""Claims what else a layer has, which is never cut, by the layer's name."""


def nothing(layer: str) -> Callable[[], tuple[Parameter, ...]]:
    """Layers have nothing else."""
    return tuple


def decoder(
    kind: Kind,
    claims: Claims,
    config: Mapping[str, JSON],
    vocab_size: int | None,
    attending: Attending,
    feeding: Feeding,
    *,
    whole: Whole = nothing,
    predictions: int = 0,
) -> Model:
    """A model of these blocks. `predictions`: how many layers after the last predict one more token each,
    where the checkpoint holds them.

    Raises RecipeError where the checkpoint does not fit the config, and for a name that has no role."""
    return _Reading(kind, claims, config, attending, feeding, whole).model(vocab_size, predictions)


class _Reading:
    """One checkpoint, read as a kind."""

    def __init__(
        self,
        kind: Kind,
        claims: Claims,
        config: Mapping[str, JSON],
        attending: Attending,
        feeding: Feeding,
        whole: Whole,
    ) -> None:
        self.kind, self.claims, self.config = kind, claims, config
        self.attending, self.feeding, self.whole = attending, feeding, whole
        self.hidden, self.count = dim(config, "hidden_size"), claims.layers(config)
        self.mixes = kind.mixer.claim(claims, config) if kind.mixer is not None else attending.claim
        self.mamba = mixers(kind.mamba, claims, config) if kind.mamba is not None else None
        self.parallel, self.normed_after = has(config, kind.parallel), has(config, kind.norms.after)

    def norm(self, name: str) -> Callable[[], Norm]:
        said = self.kind.norms
        return self.claims.norm(name, self.hidden, bias=said.bias, plus_one=said.plus_one)

    def layer(self, name: str, blocks: Blocks = TWO, *, mixed: bool = False) -> Callable[[], Layer]:
        """A layer of these blocks; `mixed`: with the kind's mixer in place of attention."""
        mixer = self.kind.mixer if mixed else None
        norms = self.kind.norms if mixer is None or mixer.norms is None else mixer.norms

        def named(leaf: str | None) -> Callable[[], Norm | None]:
            return self.norm(f"{name}.{leaf}") if leaf else absent

        fed = "mlp" in blocks
        attends = self.mixes if mixed else self.attending.claim
        before = named(norms.attention if blocks != {"mlp"} else None)
        attending = attends(name) if "attention" in blocks else absent
        mamba = self.mamba(name) if self.mamba is not None and "mamba" in blocks else absent
        between = named(norms.mlp if fed and not self.parallel else None)
        feeding = self.feeding.claim(name) if fed else absent
        after = named(norms.attention_after if self.normed_after else None)
        last = named(norms.mlp_after if self.normed_after else None)
        whole = self.whole(name)
        return lambda: Layer(
            name,
            before(),
            attending(),
            between(),
            feeding(),
            after(),
            last(),
            mamba=mamba(),
            whole=whole(),
        )

    def layers(self) -> Layers:
        kind, count = self.kind, self.count
        mixed = kind.mixer.which(self.config, count) if kind.mixer is not None else [False] * count
        held = zip(blocks_of(kind, self.config, count), mixed, strict=True)
        return Layers(
            [self.layer(f"{kind.root}layers.{i}", has, mixed=mix) for i, (has, mix) in enumerate(held)]
        )

    def predictions(self, most: int, vocab: int) -> Lazy[Prediction]:
        """The layers that predict further tokens, `most` of them at most."""
        last = self.count + min(most, self.claims.most)  # a config may say anything
        further = [_after_the_last(i) for i in range(self.count, last)]
        if self.kind.further is not None:
            further = [self.kind.further]
        there = [names for names in further if f"{names.at}.{names.join}.weight" in self.claims]
        return Lazy([self.prediction(names, vocab) for names in there])

    def prediction(self, names: Further, vocab: int) -> Callable[[], Prediction]:
        """A layer that predicts one more token, and the embedding and head that it may have."""
        at, claims, hidden = names.at, self.claims, self.hidden

        def own(leaf: str) -> Callable[[], Embedding | None]:
            there = f"{at}.{leaf}.weight" in claims
            return claims.rows(f"{at}.{leaf}", vocab, hidden) if there else absent

        build = self.layer(names.layer)
        embedding_norm = self.norm(f"{at}.{names.embedding_norm}")
        hidden_norm = self.norm(f"{at}.{names.hidden_norm}")
        last = self.norm(f"{at}.{names.norm}")
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

    def sizes(self, vocab: int) -> Sizes:
        kind, feeding, attending = self.kind, self.feeding, self.attending
        sizes = Sizes(
            hidden=self.hidden.size,
            vocab=vocab,
            heads=attending.heads.q,
            kv_heads=attending.heads.kv,
            head_dim=attending.heads.dim,
            widths=feeding.widths,
            experts=feeding.experts,
            expert_width=feeding.expert_width,
            shared_width=feeding.shared_width,
            block=self.claims.block,
            head_keys=attending.keys,
            fused_qkv=kind.attention.fused,
            mamba=mamba_heads(kind.mamba, self.config) if kind.mamba is not None else None,
            others=attending.others,
        )
        return sizes if kind.mixer is None else kind.mixer.sized(sizes, self.config)

    def model(self, vocab_size: int | None, predictions: int) -> Model:
        kind, named = self.kind, self.kind.vocabulary
        vocab, embedding, lm_head, tied = vocabulary(
            self.claims,
            self.config,
            vocab_size,
            embedding=f"{kind.root}{named.embedding}",
            hidden=self.hidden,
            tied_default=named.tied,
            head=named.head,
            head_bias=f"{named.head}.bias" if has(self.config, named.head_bias) else "",
        )
        return Model(
            family=kind.family,
            sizes=self.sizes(vocab),
            embedding=embedding,
            layers=self.layers(),
            norm=self.norm(kind.norms.last)() if kind.norms.last else None,
            lm_head=lm_head,
            tied=tied,
            predictions=self.predictions(predictions, vocab),
            ignored=self.claims.close(kind.ignored),
            cuts=kind.cuts,
            parallel=self.parallel,
        )


def _after_the_last(i: int) -> Further:
    at = f"model.layers.{i}"
    return Further(at, at, "eh_proj", "enorm", "hnorm", "shared_head.norm")
