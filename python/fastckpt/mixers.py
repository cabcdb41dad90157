"""What mixes the tokens of a layer: attention in its kinds, and what stands in its place.

Law: that of `model`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .roles import Linear, Norm, Parameter


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
    that are read, None where all are, or those that the layer before chose. `halves`: rotary positions turn
    row i and that rope_dim / 2 further, where DeepSeek's turn neighbours."""

    q: Linear
    kv_a: Linear
    kv_norm: Norm
    kv_b: Linear
    o: Linear
    q_a: Linear | None = None
    q_norm: Norm | None = None
    indexer: Indexer | None = None
    halves: bool = False


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
