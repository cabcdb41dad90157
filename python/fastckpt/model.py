"""The typed tree of roles between recipes and layouts: what each tensor is for, whatever it was called.

A recipe makes a Model from a checkpoint, a layout makes targets from a Model; neither knows the other. "The
hub" is the form in which transformers saves a model.

Law: the view of a role has the form of the mathematics: a Linear's weight is [out, in], and q, k and v, gate
and up, and experts are apart. How the hub stores them is kept beside (`name`, `transposed`, `fused`, ...), so
that layout `hf` can write it back. Layers are built when they are asked for, and can be dropped. `roles` has
the leaves of the tree, `mixers` what attention may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from .mixers import Attends, Attention, DeltaHeads, Mamba, MambaHeads
from .roles import Embedding, Linear, Norm, Parameter

Role = TypeVar("Role")


class Lazy(Generic[Role]):
    """Roles in order, each built when it is asked for and kept; `last_only`: until the next one is."""

    __slots__ = ("_builds", "_built", "_last_only")

    def __init__(self, builds: Sequence[Callable[[], Role]], *, last_only: bool = False) -> None:
        self._builds, self._last_only = tuple(builds), last_only
        self._built: dict[int, Role] = {}

    def __len__(self) -> int:
        return len(self._builds)

    def __getitem__(self, index: int) -> Role:
        if index not in self._built:
            built = self._builds[index]()
            if self._last_only:
                self._built.clear()
            self._built[index] = built
        return self._built[index]

    def __iter__(self) -> Iterator[Role]:
        return (self[i] for i in range(len(self)))

    def map(self, change: Callable[[Role], Role]) -> Lazy[Role]:
        """What `change` makes of each, when it is asked for."""

        def build(index: int) -> Role:
            return change(self[index])

        return Lazy([partial(build, i) for i in range(len(self))], last_only=self._last_only)


@dataclass(frozen=True, slots=True)
class Mlp:
    """A feed-forward block: `gate` (or None) and `up` [width, hidden], `down` [hidden, width].

    `fused`: the hub's module that stores [gate; up] as one matrix (both then carry its name); `up_first`: it
    stores [up; gate]. `scalars`: the learned numbers of its activation (xIELU), whole on every rank."""

    gate: Linear | None
    up: Linear
    down: Linear
    fused: str | None = None
    up_first: bool = False
    scalars: tuple[Parameter, ...] = ()


@dataclass(frozen=True, slots=True)
class Stacked:
    """Where the hub stores all experts of a layer in two tensors, their names: `gate_up` [experts, gate; up,
    hidden] and `down` [experts, hidden, width]; `transposed`: [experts, in, out] (Llama 4). `singly`: loaders
    also take each expert on its own, as quantised releases have them."""

    gate_up: str
    down: str
    transposed: bool = False
    singly: bool = False


@dataclass(frozen=True, slots=True)
class Stacks:
    """All experts of a layer in one tensor each, where the hub stores no expert on its own (gpt-oss):
    `gate_up` [experts, hidden, 2 * width] with gate and up in turn, `down` [experts, width, hidden], and
    their biases [experts, 2 * width] and [experts, hidden]."""

    gate_up: Parameter
    gate_up_bias: Parameter
    down: Parameter
    down_bias: Parameter


@dataclass(frozen=True, slots=True)
class BlockStacks:
    """Stacks in mxfp4: 32 values of neighbouring inputs are 16 bytes, and share a byte of exponent.

    `gate_up` [experts, 2 * width, hidden / 32, 16] with gate and up in turn, `down` [experts, hidden,
    width / 32, 16]; `gate_up_scales` and `down_scales` without the last axis; biases as in Stacks."""

    gate_up: Parameter
    gate_up_scales: Parameter
    gate_up_bias: Parameter
    down: Parameter
    down_scales: Parameter
    down_bias: Parameter


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: `router` [experts, hidden] and one Mlp for each expert, all of one shape.

    `name`: the hub's module that holds the experts. `correction`: what is added to the experts' scores when
    the router selects [experts]; never rounded. `shared`: a block that every token passes, weighed by
    `shared_gate` [1, hidden] where there is one. `stacked`: how the hub stores them in two tensors, None
    where it stores each on its own. `stacks`: the same experts as stacks that a server wants as they are.
    `latent`: a matrix [rank, hidden] that makes what the experts read, and one [hidden, rank] that reads the
    sum of what they make (Nemotron 3), None where they read and make the hidden state."""

    name: str
    router: Linear
    experts: Lazy[Mlp]
    correction: Parameter | None = None
    shared: Mlp | None = None
    shared_gate: Linear | None = None
    stacks: Stacks | BlockStacks | None = None
    stacked: Stacked | None = None
    latent: tuple[Linear, Linear] | None = None


@dataclass(frozen=True, slots=True)
class VisionExpert:
    """The matrices that image tokens pass in place of a layer's own, of the same shapes; all tokens attend to
    one another (CogVLM)."""

    attention: Attention
    mlp: Mlp


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. `name`: the hub's module.

    `attention_norm` and `mlp_norm` come before attention and the feed-forward block (`mlp_norm` is None where
    both read one norm, as in Falcon; both are where norms have no weights, as in OLMo); `attention_after` and
    `mlp_after` after them, before the sum (Gemma 2, GLM-4), or after it in a model that has no last norm
    (BERT). `mamba` reads what attention reads, beside it (Falcon-H1) or in its place. A layer may be one of
    these blocks alone, with the norm before it (Nemotron-H). `cross`, `cross_norm`: attention to an encoder's
    output, between the two. `vision`: what image tokens pass. `whole`: what else the layer has, which no
    server cuts."""

    name: str
    attention_norm: Norm | None
    attention: Attends | None
    mlp_norm: Norm | None
    mlp: Mlp | Experts | None
    attention_after: Norm | None = None
    mlp_after: Norm | None = None
    cross: Attention | None = None
    cross_norm: Norm | None = None
    vision: VisionExpert | None = None
    mamba: Mamba | None = None
    whole: tuple[Parameter, ...] = ()


class Layers(Lazy[Layer]):
    """Layers, first to last. One at a time is kept: all ranks of a run ask for it before the next."""

    __slots__ = ()

    def __init__(self, builds: Sequence[Callable[[], Layer]]) -> None:
        super().__init__(builds, last_only=True)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that layouts cut, known before any view is built.

    `widths`: config key -> feed-forward width, for each kind of block in the model. `experts`: how many a
    layer has at most; `expert_width`, `shared_width`: the keys in `widths` of their width and of shared
    experts'. `fused_qkv`: the hub stores q, k and v as one matrix. With latent attention, `kv_heads` is
    `heads` and `head_dim` is a value head's. `block`: how many neighbouring outputs or inputs of a quantised
    matrix share a scale. `head_keys`: config's keys for `heads`, `kv_heads` and `head_dim` ("": it has none),
    None where the config cannot give the three separately. `vocab_key`: its key for `vocab`. `delta`: the
    heads of linear attention. `mamba`: of Mamba's mixers. `others`: the numbers of query and of kv heads that
    some layers have in place of `heads` and `kv_heads`. `channels`: of short convolutions, or of Mamba's
    first mixers. `groups`: of heads that share rows of compressed attention's output."""

    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    widths: Mapping[str, int]
    experts: int = 0
    expert_width: str = ""
    fused_qkv: bool = False
    shared_width: str = ""
    block: int = 1
    head_keys: tuple[str, str, str] | None = None
    vocab_key: str = "vocab_size"
    delta: DeltaHeads | None = None
    mamba: MambaHeads | None = None
    others: tuple[tuple[int, int], ...] = ()
    channels: int = 0
    groups: int = 0


@dataclass(frozen=True, slots=True)
class HubCuts:
    """Where transformers' own tensor-parallel plan for a family cuts less than heads, widths and vocabulary.

    `whole`: what every rank holds whole: "embedding", "head", "attention", "mlp", "experts", "shared"
    (experts), and the keys of Sizes.widths that go with them. `rows`: a fused matrix is cut as one run of
    rows, regardless of what they are, and its output is gathered; so are a DeltaNet's, which without it is
    whole."""

    whole: frozenset[str] = frozenset()
    rows: bool = False


@dataclass(frozen=True, slots=True)
class Encoder:
    """The encoder beside a decoder. `positions`: a learned position table; `norm`: after the last layer."""

    layers: Lazy[Layer]
    norm: Norm | None = None
    positions: Embedding | None = None


@dataclass(frozen=True, slots=True)
class Tower:
    """What makes hidden vectors of images for a decoder beside it: `layers` of its own, of these `sizes`
    (their vocabulary is 0), and `mergers`, blocks that bring their output to the decoder's hidden size.

    The output of layer `read`, counted from 1, is the last that a merger reads; `beyond`: tensors that stand
    after it and are in no layer."""

    layers: Lazy[Layer]
    sizes: Sizes
    read: int
    mergers: tuple[Mlp, ...] = ()
    beyond: tuple[Parameter, ...] = ()


@dataclass(frozen=True, slots=True)
class Yarn:
    """How YaRN stretches rotary positions: the context is `factor` times the `original` one. Frequencies that
    turn more than `beta_fast` times within the original context are not stretched, those that turn less than
    `beta_slow` times are stretched fully. `mscale`, `mscale_all_dim`: how attention is scaled."""

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of `dim` features: frequency i is base ** (-2 i / dim)."""

    dim: int
    base: float
    yarn: Yarn | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """A further layer that predicts one more token (DeepSeek-V3's multi-token prediction): `join` [hidden,
    2 * hidden] reads the normed `embedding` of the next token and the normed hidden state; then come `layer`,
    `norm` and `head`. Without an embedding or a head of its own it uses the model's."""

    layer: Layer
    embedding_norm: Norm
    hidden_norm: Norm
    join: Linear
    norm: Norm
    embedding: Embedding | None = None
    head: Linear | None = None


@dataclass(frozen=True, slots=True)
class PerLayer:
    """What gives every layer an input of its own (Gemma 4): `embedding` [rows, layers * width] of the tokens,
    beside what `projection` [layers * width, hidden] makes of their usual vectors, and `norm` [width]."""

    embedding: Embedding
    projection: Linear
    norm: Norm


@dataclass(frozen=True, slots=True)
class Model:
    """A model by roles; a decoder unless its family says otherwise.

    `lm_head`: where it is `tied` to the embedding it has the embedding's view; of a model without one it
    is the embedding itself, name and all. `positions`: a learned position table, in which the first
    token's is row `first_position`. `embedding_norm`: a norm of the embedded tokens. `carried`: other
    tensors, which servers hold whole. `ignored`: names in the checkpoint that the recipe knows and leaves
    out. `parallel`: attention and the feed-forward block of a layer read the same input. `alibi`:
    attention is biased by ALiBi's slopes, which the hub does not store. `rope`: the rotary positions of
    latent attention. `quant_method`: the hub's word for how matrices are quantised ("pack-quantized" for
    compressed-tensors' packed integers), "" where none is. `architecture`: the class that config.json
    names. `causal`: tokens see only those before them (an encoder's do not). `per_layer`: what gives layers
    inputs of their own."""

    family: str
    sizes: Sizes
    embedding: Embedding
    layers: Lazy[Layer]
    norm: Norm | None
    lm_head: Linear
    tied: bool = False
    positions: Embedding | None = None
    ignored: tuple[str, ...] = ()
    embedding_norm: Norm | None = None
    encoder: Encoder | None = None
    tower: Tower | None = None
    carried: tuple[Parameter, ...] = ()
    cuts: HubCuts = field(default_factory=HubCuts)
    predictions: Lazy[Prediction] = field(default_factory=lambda: Lazy(()))
    parallel: bool = False
    alibi: bool = False
    rope: Rope | None = None
    quant_method: str = ""
    architecture: str = ""
    first_position: int = 0
    causal: bool = True
    per_layer: PerLayer | None = None
