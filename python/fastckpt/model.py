"""The typed tree of roles between recipes and layouts: what each tensor is for, whatever it was called.

A recipe makes a Model from a checkpoint, a layout makes targets from a Model; neither knows the other. "The
hub" is the form in which transformers saves a model.

Law: the view of a role has the form of the mathematics: a Linear's weight is [out, in], and q, k and v, gate
and up, and experts are apart. How the hub stores them is kept beside (`name`, `transposed`, `fused`, ...), so
that layout `hf` can write it back. Layers are built when they are asked for, and can be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from .views import View

Role = TypeVar("Role")


class Lazy(Generic[Role]):
    """Roles in order; each is built when it is first asked for, then kept."""

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
    """A tensor without which a quantised matrix cannot be read: its scales, zero points, the scale of its
    inputs, ...

    `leaf`: the hub's name for it below the matrix's module. `unit`: how many outputs and inputs share one of
    its elements (0: all of them). `view`: [ceil(outputs / unit[0]), ceil(inputs / unit[1])]. `form`: how the
    hub stores it: like the view, [in, out], as a vector or as a scalar."""

    leaf: str
    view: View
    unit: tuple[int, int]
    form: Literal["matrix", "transposed", "vector", "scalar"] = "matrix"


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix and its bias. `name`: the hub's module; `weight` [out, in]; `bias` [out] or None;
    `transposed`: the hub stores [in, out] (GPT-2's Conv1D); `bias_name`: the hub's, where not `name`.bias.

    Of a quantised matrix: `beside`, the tensors it is read with; `leaf`, the hub's name for the matrix below
    its module; `packed`, how many outputs and inputs one element holds, so that `weight` is [out / packed[0],
    in / packed[1]]; `whole`, (outputs, inputs) of the uncut matrix, where the hub keeps a tensor of them
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
        """(outputs, inputs) in values, however many an element holds."""
        rows, columns = self.weight.shape
        return rows * self.packed[0], columns * self.packed[1]

    def part(self, leaf: str) -> Beside | None:
        """The tensor of that name beside the matrix, None where there is none."""
        return next((b for b in self.beside if b.leaf == leaf), None)


@dataclass(frozen=True, slots=True)
class Thin:
    """What an adapter that is kept apart adds to a matrix: `b` @ `a`, of `a` [rank, in] and `b` [out, rank],
    which is multiplied by the adapter's scale already. `module`: the hub's module that was adapted."""

    module: str
    a: View
    b: View


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last axis. `name`: the hub's module; `weight` and `bias` [features], or
    [heads, features] where each head has weights of its own; `plus_one`: the factor is 1 + weight (Gemma)."""

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
    """A tensor that is no matrix, norm or table, under its full name in the hub. `shape`: the hub's shape,
    where it is another."""

    name: str
    view: View
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """Multi-head attention: `q` [heads * head_dim, hidden], `k` and `v` [kv_heads * head_dim, hidden],
    `o` [hidden, heads * head_dim]; query head h reads kv head h // (heads // kv_heads). `heads`: how many
    query and kv heads this layer has, where Sizes says others. A value head, and so a head of `o`, may be of
    another size (MiMo).

    `gate` [heads * head_dim, hidden]: a head's output is multiplied by the sigmoid of this before `o`
    (Qwen3-Next); the hub stores it under q's name, head by head [q; gate]. `output_gate` [heads, hidden] or
    [heads * head_dim, hidden]: by the softplus (Laguna) or the sigmoid (AFMoE) of this, a module of its own.
    `q_norm`, `k_norm`: per-head norms [head_dim], with `own_norms` of each head by weights of its own [heads,
    head_dim] (Command R+), with `whole_norms` over all of q [heads * head_dim] and all of k (OLMoE);
    `rotated`: they come after the rotary positions. `sinks`: one logit for each query head [heads].
    `relative`: the logits of relative positions [buckets, heads] (T5). `fused`: the hub's module that stores
    q, k and v as one matrix (they then carry its name), None where the hub stores them apart. `grouped`: that
    matrix holds, for each kv head, its query heads, itself and its value head (with as many kv heads as query
    heads that is q, k, v head by head); else all of q, then all of k, then all of v. `values_are_keys`: the
    hub stores `k` alone, and `v` is the same matrix (Gemma 4)."""

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
    whole_norms: bool = False
    own_norms: bool = False
    rotated: bool = False
    heads: tuple[int, int] | None = None
    output_gate: Linear | None = None
    values_are_keys: bool = False


@dataclass(frozen=True, slots=True)
class Queries:
    """Attention to the keys and values of an earlier layer (Gemma 4): `q` [heads * head_dim, hidden], their
    norm head by head, and `o` [hidden, heads * head_dim]."""

    q: Linear
    o: Linear
    q_norm: Norm


@dataclass(frozen=True, slots=True)
class Indexer:
    """What chooses the tokens that sparse attention reads (DeepSeek-V3.2): queries `q` [index heads * index
    dim, q_rank] of what Mla's `q_norm` gives, one key for all its heads, `k` [index dim, hidden] -> `k_norm`,
    and how much each of its heads counts, `weights` [index heads, hidden]."""

    q: Linear
    k: Linear
    k_norm: Norm
    weights: Linear


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention (DeepSeek): `kv_a` [kv_rank + rope_dim, hidden] -> `kv_norm` ->
    `kv_b` [heads * (nope_dim + v_dim), kv_rank]; `o` [hidden, heads * v_dim].

    `q` [heads * (nope_dim + rope_dim), q_rank or hidden] reads what `q_a` [q_rank, hidden] and `q_norm` make
    of the hidden state, or the hidden state itself where both are None. `indexer`: what chooses the tokens
    that are read, None where all are, or those that the layer before chose."""

    q: Linear
    kv_a: Linear
    kv_norm: Norm
    kv_b: Linear
    o: Linear
    q_a: Linear | None = None
    q_norm: Norm | None = None
    indexer: Indexer | None = None


@dataclass(frozen=True, slots=True)
class Compressor:
    """What makes one entry of every run of tokens (DeepSeek-V4): `kv` [rows, hidden], weighed within a run by
    the softmax of `gate` [rows, hidden] and `positions` [tokens of a run, rows]; then `norm` [dim]. rows are
    dim, or 2 * dim where an entry also reads the run before."""

    kv: Linear
    gate: Linear
    positions: Parameter
    norm: Norm


@dataclass(frozen=True, slots=True)
class CompressedIndexer:
    """What chooses the entries that compressed attention reads: queries `q` [index heads * index dim,
    q_rank], keys that `keys` makes, and how much each head counts, `weights` [index heads, hidden]."""

    q: Linear
    weights: Linear
    keys: Compressor


@dataclass(frozen=True, slots=True)
class Compressed:
    """Attention of all heads to one, whose keys are values too (DeepSeek-V4): `q` [heads * head_dim, q_rank]
    reads what `q_a` [q_rank, hidden] and `q_norm` make of the hidden state; `kv` [head_dim, hidden], then
    `kv_norm`. A group of neighbouring heads passes its own rows of `o_a` [groups * o_rank, heads * head_dim /
    groups], then all of them `o` [hidden, groups * o_rank]. `sinks`: one logit for each head [heads].

    `compressor`: what makes entries of the tokens further back, None where they are not read; `indexer`: what
    chooses among those, None where all are read."""

    q_a: Linear
    q_norm: Norm
    q: Linear
    kv: Linear
    kv_norm: Norm
    o_a: Linear
    o: Linear
    sinks: Parameter
    compressor: Compressor | None = None
    indexer: CompressedIndexer | None = None


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Linear attention by the gated delta rule (Qwen3-Next), of sizes that DeltaHeads has: `q` and `k`
    [keys * key_dim, hidden], `v` and the output's gate `z` [values * value_dim, hidden], and what decides how
    much a value head writes, `b`, and forgets, `a` [values, hidden].

    `conv`: the kernels of the causal convolution of q, k and v, channel by channel [rows, 1, kernel]. `a_log`
    and `dt_bias` [values] make a rate of what `a` gives. `norm` [value_dim] comes after the heads, `o`
    [hidden, values * value_dim] last. Matrices of one name, and kernels of one name, are one tensor of the
    hub, which in each of `groups` equal runs of rows has each matrix's share in turn.

    `low`: what `a` and `z` read in place of the hidden state, matrices [rank, hidden] of low rank; `a` and
    `dt_bias` then have a row for each channel of a key head (Kimi), else None."""

    q: Linear
    k: Linear
    v: Linear
    z: Linear
    b: Linear
    a: Linear
    conv: tuple[Parameter, Parameter, Parameter]
    a_log: Parameter
    dt_bias: Parameter
    norm: Norm
    o: Linear
    groups: int = 1
    low: tuple[Linear, Linear] | None = None


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A short convolution with two gates (LFM2): `b`, `c` and `x` [hidden, hidden]; what the kernels `conv`
    [hidden, 1, kernel] make of b * x, channel by channel, is multiplied by c before `o` [hidden, hidden]. The
    hub stores b, c and x in this order as one matrix, whose name they carry."""

    b: Linear
    c: Linear
    x: Linear
    conv: Parameter
    conv_bias: Parameter | None
    o: Linear


@dataclass(frozen=True, slots=True)
class Selective:
    """A mixer of Mamba's first version (Jamba): the input `x` and the output's gate `z` [width, hidden],
    which the hub stores in this order as one matrix, whose name they carry; `conv`, the kernels of the causal
    convolution of x, channel by channel [width, 1, kernel]. Of what that gives `select` [rank + 2 * state,
    width] makes what `steps` [width, rank] reads, what the state is written by, and what it is read by, each
    normed on its own: `dt_norm` [rank], `b_norm` and `c_norm` [state]. `a_log` [width, state] and `d` [width]
    make a rate of a step; `o` [hidden, width] comes last."""

    x: Linear
    z: Linear
    conv: Parameter
    conv_bias: Parameter | None
    select: Linear
    dt_norm: Norm
    b_norm: Norm
    c_norm: Norm
    steps: Linear
    a_log: Parameter
    d: Parameter
    o: Linear


Attends = Attention | Queries | Mla | Compressed | DeltaNet | ShortConv | Selective
"""What a layer may have where most have attention."""


@dataclass(frozen=True, slots=True)
class Mamba:
    """A Mamba-2 mixer, of sizes that MambaHeads has: the output's gate `z` and the input `x` [heads *
    head_dim, hidden], what a group of heads writes its state by, `b`, and reads it by, `c` [groups * state,
    hidden], and the steps of the heads, `dt` [heads, hidden]. The hub stores them in this order as one
    matrix, whose name they carry.

    `conv`: the kernels of the causal convolution of x, b and c, channel by channel [rows, 1, kernel], one
    tensor of the hub, and so are their biases, `conv_bias`, where there are any. `a_log`, `d` and `dt_bias`
    [heads] make a rate of a step. `norm` [heads * head_dim] comes after the gate, head by head of a group,
    `o` [hidden, heads * head_dim] last."""

    z: Linear
    x: Linear
    b: Linear
    c: Linear
    dt: Linear
    conv: tuple[Parameter, Parameter, Parameter]
    conv_bias: tuple[Parameter, Parameter, Parameter] | None
    a_log: Parameter
    d: Parameter
    dt_bias: Parameter
    norm: Norm | None
    o: Linear


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


class Layers:
    """Layers, first to last, each built when it is asked for.

    Only the last one built is kept: all ranks of a run ask for the same layer before the next."""

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
class DeltaHeads:
    """The heads of every DeltaNet: `keys` of `key_dim` features, `values` of `value_dim`; value head h reads
    key head h // (values // keys)."""

    keys: int
    values: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class MambaHeads:
    """The heads of every Mamba, of `dim` features; head h is of group h // (heads // groups), which has a
    state of `state` features."""

    heads: int
    groups: int
    dim: int
    state: int


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

    layers: Layers
    norm: Norm | None = None
    positions: Embedding | None = None


@dataclass(frozen=True, slots=True)
class Tower:
    """What makes hidden vectors of images for a decoder beside it: `layers` of its own, of these `sizes`
    (their vocabulary is 0), and `mergers`, blocks that bring their output to the decoder's hidden size.

    The output of layer `read`, counted from 1, is the last that a merger reads; `beyond`: tensors that stand
    after it and are in no layer."""

    layers: Layers
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
    layers: Layers
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
