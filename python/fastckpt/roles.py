"""The leaves of a model's tree: matrices, norms, tables and single tensors, each for what it is.

Law: that of `model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .views import View


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
