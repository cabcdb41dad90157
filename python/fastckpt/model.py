"""The typed tree of roles between recipes and layouts: what a tensor is for, whatever it was called.

A recipe makes a Model out of a checkpoint, a layout makes targets out of a Model; neither knows the other.

Law: a view of a role is in the mathematics' own form (a Linear's weight is [out, in], q, k and v are apart,
experts are apart). How the hub stores it is kept beside it (`name`, `transposed`, `fused`), so that the `hf`
layout can write it back. Layers are built when asked for and can be dropped again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .views import View


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix and its bias. `name`: the hub's module; `weight` [out, in]; `bias` [out] or None;
    `transposed`: the hub stores [in, out] (GPT-2's Conv1D)."""

    name: str
    weight: View
    bias: View | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last axis. `name`: the hub's module; `weight` and `bias` [features]."""

    name: str
    weight: View
    bias: View | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """A table of vectors. `name`: the hub's module; `weight` [rows, hidden]."""

    name: str
    weight: View


@dataclass(frozen=True, slots=True)
class Attention:
    """Multi-head attention: `q` [heads * head_dim, hidden], `k` and `v` [kv_heads * head_dim, hidden],
    `o` [hidden, heads * head_dim]; query head h reads kv head h // (heads // kv_heads).

    `q_norm`, `k_norm`: per-head norms [head_dim]. `fused`: the hub's module that stores [q; k; v] as one
    (q, k and v then carry its name), None where the hub stores them apart."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    fused: str | None = None


@dataclass(frozen=True, slots=True)
class Mlp:
    """A feed-forward block: `gate` (or None) and `up` [width, hidden], `down` [hidden, width]."""

    gate: Linear | None
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: `router` [experts, hidden] and one gated Mlp an expert, all of one shape.

    `name`: the hub's module that holds the experts."""

    name: str
    router: Linear
    experts: tuple[Mlp, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. `name`: the hub's module."""

    name: str
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp | Experts


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

    `widths`: config key -> feed-forward width, one for each kind of block the model has."""

    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    widths: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder model by roles.

    `lm_head` is there also when it is `tied` to the embedding, with the embedding's view. `positions`: a
    learned position table. `ignored`: the names of the checkpoint that the recipe knows and leaves out."""

    family: str
    sizes: Sizes
    embedding: Embedding
    layers: Layers
    norm: Norm
    lm_head: Linear
    tied: bool = False
    positions: Embedding | None = None
    ignored: tuple[str, ...] = ()
