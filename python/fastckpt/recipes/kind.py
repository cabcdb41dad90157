"""What the families of one decoder differ in: its biases and norms, how matrices are stored, what modules are
called. Names as transformers' modeling files have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..checkpoint import JSON
from ..mixers import Attends
from ..model import HubCuts, Sizes
from .claims import Claims, Heads, flag
from .mamba import StoredMamba
from .meta import IGNORED as METAS_IGNORED
from .meta import Meta

IGNORED = ("*rotary_emb.inv_freq", *METAS_IGNORED)
"""Buffers that old checkpoints carry and every server computes itself."""

Claim = Callable[[str], Callable[[], Attends]]
"""Claims the attention of a layer, or what stands in its place, by the layer's name, and returns what builds
it."""


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
    (None: none, or none that the hub stores); of the model's last one. `after`: whether there are those after
    blocks that are named. `bias`: they have biases. `plus_one`: all norms, those of q and k too, multiply by
    1 + weight."""

    attention: str | None = "input_layernorm"
    mlp: str | None = "post_attention_layernorm"
    attention_after: str | None = None
    mlp_after: str | None = None
    last: str | None = "model.norm"
    after: bool | Said = True
    bias: bool = False
    plus_one: bool = False


@dataclass(frozen=True, slots=True)
class QkNorm:
    """Whether there are norms of q and k, and what they are called. They norm each head by the same weights,
    with `own` by weights of its own, or, with `whole`, all of q and all of k; `rotated`: after the rotary
    positions."""

    there: bool | Said = True
    q: str = "q_norm"
    k: str = "k_norm"
    own: bool = False
    whole: bool = False
    rotated: bool = False


UNNORMED = QkNorm(there=False)
"""q and k are not normed."""


@dataclass(frozen=True, slots=True)
class Own:
    """The attention of one layer of a family whose layers differ: its heads, the size of a value head (0: as
    the others), and whether it has sinks."""

    heads: Heads
    values: int = 0
    sinks: bool = False


ATTENTION_BIAS, MLP_BIAS = Said("attention_bias"), Said("mlp_bias")


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """How attention is stored, in the module `at` of a layer.

    `qkv_bias`, `o_bias`: whether q, k and v, or o, have biases. `fused`: [q; k; v] are stored as one matrix.
    `o`: the name of o. `gated`: q_proj holds each head's q and then its output gate; `output_gate`: the name
    of one that is a module of its own ("": there is none); `head_gates`: it has a row for each head, unless
    config's `gating` says otherwise. `sinks`: the name of attention's sinks ("": there are none),
    `trained_sinks`, in training, where that is another. `own`: of a config, the attention of each of so many
    layers, None where they do not differ."""

    at: str = "self_attn"
    qkv_bias: bool | Said = ATTENTION_BIAS
    o_bias: bool | Said = ATTENTION_BIAS
    qk_norm: QkNorm = UNNORMED
    fused: bool = False
    o: str = "o_proj"
    gated: bool = False
    output_gate: str = ""
    head_gates: bool = False
    sinks: str = ""
    trained_sinks: str = ""
    own: Callable[[Mapping[str, JSON], int], Sequence[Own]] | None = None


UNBIASED = SelfAttention(qkv_bias=False, o_bias=False)
"""Attention without biases."""

NORMED = SelfAttention(qk_norm=QkNorm())
"""Attention that norms each head's q and k."""

GATED = ("gate_proj", "up_proj", "down_proj")
UNGATED = ("up_proj", "down_proj")
"""What most families call the matrices of a block with a gate, and of one without."""


@dataclass(frozen=True, slots=True)
class FeedForward:
    """How a feed-forward block is stored, in the module `at` of a layer.

    `matrices`: the names of gate, up and down; of two, up and down, or, where gate and up are `paired`, of
    [gate; up] and down. `bias`: whether they have biases. `width`: config's keys of how wide it is, of which
    the first that has a value counts. `scalars`: the learned numbers of its activation, with their shapes."""

    at: str = "mlp"
    matrices: tuple[str, str, str] | tuple[str, str] = GATED
    paired: bool = False
    bias: bool | Said = False
    width: tuple[str, ...] = ("intermediate_size",)
    scalars: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What `embedding`, below the root, and `head` are called, and whether the head has a bias. `tied`:
    whether they are one where the config does not say."""

    embedding: str = "embed_tokens"
    head: str = "lm_head"
    head_bias: bool | Said = False
    tied: bool = False


TIED = Vocabulary(tied=True)
"""Embedding and head are one, unless config says otherwise."""


@dataclass(frozen=True, slots=True)
class Mixer:
    """What some layers have in place of attention. `which`: of a config and its number of layers, which have
    it; `claim`: what claims it; `sized`: adds its sizes to a model's; `norms`: of those layers, where they
    are others."""

    which: Callable[[Mapping[str, JSON], int], Sequence[bool]]
    claim: Callable[[Claims, Mapping[str, JSON]], Claim]
    sized: Callable[[Sizes, Mapping[str, JSON]], Sizes]
    norms: Norms | None = None


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
    """One family.

    `mixer`: what some layers have in place of attention; `mamba`: how Mamba's mixers are stored, and which
    layers have what. `parallel`: attention and the feed-forward block read one norm, side by side. `further`:
    the one layer that may predict a further token, where it is not counted after the last (None: it is, as in
    DeepSeek). `root`: what the names of embedding and layers begin with, `trained`: with what in training.
    `cuts`: as in Model. `ignored`: patterns of names that are left out. `meta`: how it lies under Meta's
    names, None where nobody writes it so."""

    family: str
    attention: SelfAttention = field(default_factory=SelfAttention)
    mlp: FeedForward = field(default_factory=FeedForward)
    norms: Norms = field(default_factory=Norms)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    mixer: Mixer | None = None
    mamba: StoredMamba | None = None
    parallel: bool | Said = False
    further: Further | None = None
    root: str = "model."
    trained: str = "model."
    cuts: HubCuts = field(default_factory=HubCuts)
    ignored: tuple[str, ...] = IGNORED
    meta: Meta | None = None
