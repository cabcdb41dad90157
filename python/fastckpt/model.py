"""The typed tree of roles between recipes and layouts: what a tensor is for, whatever it was called.

A recipe makes a Model out of a checkpoint, a layout makes targets out of a Model; neither knows the other.

Law: a view of a role is in the mathematics' own form (a Linear's weight is [out, in], q, k and v are apart,
gate and up are apart, experts are apart). How the hub stores it is kept beside it (`name`, `transposed`,
`fused`, ...), so that the `hf` layout can write it back. Layers are built when asked for and can be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from .views import View

Role = TypeVar("Role")


class Lazy(Generic[Role]):
    """Roles in order, each built when it is first asked for, then kept."""

    __slots__ = ("_builds", "_built")

    def __init__(self, builds: Sequence[Callable[[], Role]]) -> None:
        self._builds = builds
        self._built: dict[int, Role] = {}

    def __len__(self) -> int:
        return len(self._builds)

    def __getitem__(self, index: int) -> Role:
        if index not in self._built:
            self._built[index] = self._builds[index]()
        return self._built[index]

    def __iter__(self) -> Iterator[Role]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, slots=True)
class Beside:
    """A tensor that a quantised matrix cannot be read without: scales, zeros, the scale of its input, ...

    `leaf`: the hub's name for it below the matrix's module; `view` [ceil(outputs / unit[0]), ceil(inputs /
    unit[1])]: one element for so many outputs and inputs, 0 standing for all of them; `form`: how the hub has
    it, as here, [in, out], a vector or a scalar."""

    leaf: str
    view: View
    unit: tuple[int, int]
    form: Literal["matrix", "transposed", "vector", "scalar"] = "matrix"


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix and its bias. `name`: the hub's module; `weight` [out, in]; `bias` [out] or None;
    `transposed`: the hub stores [in, out] (GPT-2's Conv1D); `bias_name`: the hub's, where not `name`.bias.

    Of a quantised matrix: `beside` what it is read with; `leaf` the hub's name for the matrix below its
    module; `packed` how many outputs and inputs one element holds, as `weight` [out / packed[0], in /
    packed[1]] does; `whole`: the outputs and inputs of what the hub stores, where it keeps them beside it
    (compressed-tensors' weight_shape)."""

    name: str
    weight: View
    bias: View | None = None
    transposed: bool = False
    bias_name: str = ""
    beside: tuple[Beside, ...] = ()
    leaf: str = "weight"
    packed: tuple[int, int] = (1, 1)
    whole: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs), whatever one element holds."""
        rows, columns = self.weight.shape
        return rows * self.packed[0], columns * self.packed[1]

    def part(self, leaf: str) -> Beside | None:
        """What stands beside the matrix under that name."""
        return next((b for b in self.beside if b.leaf == leaf), None)


@dataclass(frozen=True, slots=True)
class Thin:
    """What an adapter adds to a matrix, kept apart: `b` @ `a`, of `a` [rank, in] and `b` [out, rank], the
    latter times the adapter's scale already. `module`: the hub's that was adapted."""

    module: str
    a: View
    b: View


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last axis. `name`: the hub's module; `weight` and `bias` [features];
    `plus_one`: the factor is 1 + weight (Gemma)."""

    name: str
    weight: View
    bias: View | None = None
    plus_one: bool = False


@dataclass(frozen=True, slots=True)
class Embedding:
    """A table of vectors. `name`: the hub's module; `weight` [rows, hidden]."""

    name: str
    weight: View


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor that is no matrix, norm or table, by its full name in the hub."""

    name: str
    view: View


@dataclass(frozen=True, slots=True)
class Attention:
    """Multi-head attention: `q` [heads * head_dim, hidden], `k` and `v` [kv_heads * head_dim, hidden],
    `o` [hidden, heads * head_dim]; query head h reads kv head h // (heads // kv_heads).

    `gate` [heads * head_dim, hidden]: what a head gives to `o` is multiplied by the sigmoid of this
    (Qwen3-Next); the hub stores it with `q`, under whose name it is, head by head [q; gate].
    `q_norm`, `k_norm`: per-head norms [head_dim]. `sinks`: one logit a query head [heads]; `relative`: the
    logits of relative positions [buckets, heads] (T5). `fused`: the hub's
    module that stores q, k and v as one (they then carry its name), None where the hub stores them apart;
    `grouped`: it holds for each kv head its query heads, itself and its value head (with as many kv heads as
    query heads that is q, k, v head by head), else all of q, then all of k, then all of v."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    fused: str | None = None
    grouped: bool = False
    sinks: Parameter | None = None
    relative: Parameter | None = None
    gate: Linear | None = None


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek): `kv_a` [kv_rank + rope_dim, hidden] -> `kv_norm` ->
    `kv_b` [heads * (nope_dim + v_dim), kv_rank]; `o` [hidden, heads * v_dim].

    `q` [heads * (nope_dim + rope_dim), q_rank or hidden] reads what `q_a` [q_rank, hidden] and `q_norm` make
    of the hidden state, or the hidden state itself where both are None."""

    q: Linear
    kv_a: Linear
    kv_norm: Norm
    kv_b: Linear
    o: Linear
    q_a: Linear | None = None
    q_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class Mlp:
    """A feed-forward block: `gate` (or None) and `up` [width, hidden], `down` [hidden, width].

    `fused`: the hub's module that stores [gate; up] as one (both then carry its name); `up_first`: it stores
    [up; gate]."""

    gate: Linear | None
    up: Linear
    down: Linear
    fused: str | None = None
    up_first: bool = False


@dataclass(frozen=True, slots=True)
class Stacks:
    """All experts of a layer as the hub stores them where it stores none on its own (gpt-oss): `gate_up`
    [experts, hidden, 2 * width] with gate and up in turn, `down` [experts, width, hidden], and their biases
    [experts, 2 * width] and [experts, hidden]."""

    gate_up: Parameter
    gate_up_bias: Parameter
    down: Parameter
    down_bias: Parameter


@dataclass(frozen=True, slots=True)
class BlockStacks:
    """Stacks in mxfp4: 16 bytes for 32 values of neighbouring inputs, and a byte of exponent for them.

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
    """A mixture of experts: `router` [experts, hidden] and one gated Mlp an expert, all of one shape.

    `name`: the hub's module that holds the experts. `correction`: what the router adds to an expert's score
    when it selects [experts], never rounded. `shared`: a block every token passes, weighed by `shared_gate`
    [1, hidden] where there is one. `stacks`: the same experts as one, where the hub has them so."""

    name: str
    router: Linear
    experts: Lazy[Mlp]
    correction: Parameter | None = None
    shared: Mlp | None = None
    shared_gate: Linear | None = None
    stacks: Stacks | BlockStacks | None = None


@dataclass(frozen=True, slots=True)
class VisionExpert:
    """The matrices that image tokens pass in place of a layer's own, shaped alike; all tokens attend to one
    another (CogVLM)."""

    attention: Attention
    mlp: Mlp


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. `name`: the hub's module.

    The norms stand before attention and the feed-forward block; `attention_after` and `mlp_after` after them,
    before the sum (Gemma 2, GLM-4) or after it (BERT). Where both read one norm (Falcon), `mlp_norm` is None.
    `cross`, `cross_norm`: attention to an encoder's output, between the two. `vision`: what image tokens
    pass."""

    name: str
    attention_norm: Norm | None
    attention: Attention | Mla
    mlp_norm: Norm | None
    mlp: Mlp | Experts
    attention_after: Norm | None = None
    mlp_after: Norm | None = None
    cross: Attention | None = None
    cross_norm: Norm | None = None
    vision: VisionExpert | None = None


class Layers:
    """The decoder layers, first to last, each built when it is asked for.

    The last one built is kept, since all ranks of a run ask for the same layer in turn."""

    __slots__ = ("_builds", "_last")

    def __init__(self, builds: Sequence[Callable[[], Layer]]) -> None:
        self._builds = tuple(builds)
        self._last: tuple[int, Layer] | None = None

    def __len__(self) -> int:
        return len(self._builds)

    def __getitem__(self, index: int) -> Layer:
        if self._last is None or self._last[0] != index:
            self._last = index, self._builds[index]()
        return self._last[1]

    def __iter__(self) -> Iterator[Layer]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a layout cuts, known before any view is built.

    `widths`: config key -> feed-forward width, one for each kind of block the model has; `experts`: how many
    a layer has at most, and `expert_width` the key of their width, `shared_width` that of shared ones;
    `fused_qkv`: the hub stores q, k and v as one. With latent attention `kv_heads` is `heads` and `head_dim`
    a value head's. `block`: so many neighbouring outputs or inputs of a quantised matrix share a scale.
    `head_keys`: config's keys for `heads`, `kv_heads` and `head_dim` ("": said otherwise), None where those
    three cannot be said apart; `vocab_key`: that for `vocab`."""

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


@dataclass(frozen=True, slots=True)
class HubCuts:
    """Where transformers' own tensor-parallel plan of a family cuts less than heads, widths and vocabulary.

    `whole`: what every rank holds whole: "embedding", "attention", "experts", "shared" (experts), and the
    keys of Sizes.widths that go with them; `rows`: what the hub fuses is cut as one run of rows, whatever
    they are, and gathered in use."""

    whole: frozenset[str] = frozenset()
    rows: bool = False


@dataclass(frozen=True, slots=True)
class Encoder:
    """The encoder beside a decoder. `positions`: a learned position table; `norm`: after the last layer."""

    layers: Layers
    norm: Norm | None = None
    positions: Embedding | None = None


@dataclass(frozen=True, slots=True)
class Yarn:
    """How YaRN stretches rotary positions: the context is `factor` times the `original` one. `beta_fast`,
    `beta_slow`: turns within it beyond and below which nothing and everything is stretched; `mscale`,
    `mscale_all_dim`: how attention is scaled."""

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
class Model:
    """A model by roles; a decoder unless its family says otherwise.

    `lm_head` is there also when it is `tied` to the embedding, with the embedding's view; a model without one
    names the embedding itself. `positions`: a learned position table. `embedding_norm`: a norm of the
    embedded tokens. `carried`: tensors that no server cuts. `ignored`: the names of the checkpoint that the
    recipe knows and leaves out. `parallel`: attention and the feed-forward block of a layer read the same
    input, side by side. `alibi`: attention is biased by ALiBi's slopes, which are no tensors of the hub.
    `rope`: the rotary positions of latent attention. `quant_method`: the hub's word for how matrices are
    quantised (compressed-tensors' packed integers are "pack-quantized"), "" where none is."""

    family: str
    sizes: Sizes
    embedding: Embedding
    layers: Layers
    norm: Norm | None
    lm_head: Linear
    tied: bool = False
    positions: Embedding | None = None
    ignored: tuple[str, ...] = ()
    embedding_norm: Norm | None = None
    encoder: Encoder | None = None
    carried: tuple[Parameter, ...] = ()
    cuts: HubCuts = field(default_factory=HubCuts)
    predictions: Lazy[Prediction] = field(default_factory=lambda: Lazy(()))
    parallel: bool = False
    alibi: bool = False
    rope: Rope | None = None
    quant_method: str = ""
