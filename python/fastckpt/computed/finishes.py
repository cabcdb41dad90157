"""Small computations on stored values, done when they are read: one more, a reciprocal, a multiple, a rate of
its logarithm, the largest, a matrix requantised, a value that several tensors must agree on.

The result lies nowhere, as in `nowhere`. `box` makes elements of it in float32, from what `read` gives of the
stored views. A finish is never made from another finish: a reader takes one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..dtypes import float32
from ..errors import SourceError, ViewError
from ..extents import Extents
from ..views import View, cat
from .nowhere import Floats, nowhere, pitched

Read = Callable[[View], NDArray[np.generic]]
"""Gives the dense elements of a view, in its shape and dtype."""

Function = Literal["plus_one", "reciprocal", "multiple", "minus_exp"]


@dataclass(frozen=True, slots=True, eq=False)
class Each:
    """`function` of every element of `base` [rows, columns], floats: x + 1, 1 / x or x * `factor`, in
    float32, or -exp(x), in float64 and rounded once to float32; `name` for errors."""

    name: str
    base: View
    function: Function
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns]."""
        return self.base.shape[0], self.base.shape[1]

    def box(self, read: Read, r0: int, r1: int, c0: int, c1: int) -> Floats:
        """Rows [r0, r1) of columns [c0, c1). Raises SourceError for the reciprocal of 0."""
        x = floats(read, self.base, r0, r1, c0, c1)
        match self.function:
            case "plus_one":
                return np.add(x, 1, dtype=np.float32)
            case "multiple":
                return np.multiply(x, self.factor, dtype=np.float32)
            case "reciprocal":
                return _reciprocal(self.name, x)
            case "minus_exp":
                with np.errstate(over="ignore"):  # an infinity is found where all are looked for
                    return np.negative(np.exp(x, dtype=np.float64)).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Largest:
    """The largest of every row of `base` [rows, columns], or 1 / that with `inverse`: [rows, 1]."""

    name: str
    base: View
    inverse: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, 1]."""
        return self.base.shape[0], 1

    def box(self, read: Read, r0: int, r1: int, c0: int, c1: int) -> Floats:
        """Rows [r0, r1). Raises SourceError for the reciprocal of 0."""
        found = floats(read, self.base, r0, r1, 0, self.base.shape[1]).max(axis=1, keepdims=True)
        return _reciprocal(self.name, found) if self.inverse else found


@dataclass(frozen=True, slots=True, eq=False)
class Requantised:
    """A quantised matrix `base` [rows, columns], whose scale is `scale`, as values for the largest of
    `scales` [1, n], of which `scale` is one: float32(base * scale) / largest. Source: rtp-llm's
    merge_qkv_hf_fp8_with_scale."""

    name: str
    base: View
    scale: View
    scales: View

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns]."""
        return self.base.shape[0], self.base.shape[1]

    def box(self, read: Read, r0: int, r1: int, c0: int, c1: int) -> Floats:
        """Rows [r0, r1) of columns [c0, c1). Raises SourceError for scales that are 0 or below."""
        x = floats(read, self.base, r0, r1, c0, c1)
        own = np.asarray(read(self.scale.cast(float32)), np.float32).reshape(())
        scales = np.asarray(read(self.scales.cast(float32)), np.float32)
        if not (scales > 0).all():
            raise SourceError(f"{self.name}: scales {scales.ravel().tolist()}, wanted all above 0")
        largest = scales.max()
        return x if own == largest else np.asarray(x * own / largest, np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Agreed:
    """The elements of the first of `views` [rows, columns], which all others must have too."""

    name: str
    views: tuple[View, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns]."""
        return self.views[0].shape[0], self.views[0].shape[1]

    def box(self, read: Read, r0: int, r1: int, c0: int, c1: int) -> Floats:
        """Rows [r0, r1) of columns [c0, c1). Raises SourceError where the views differ there."""
        first, *others = (floats(read, v, r0, r1, c0, c1) for v in self.views)
        for other in others:
            if not np.array_equal(first, other):
                raise SourceError(f"{self.name}: differs among those that read one input, wanted one for all")
        return first


Finish = Each | Largest | Requantised | Agreed


# ---- as views ----


def plus_one(view: View) -> View:
    """result[..] == self[..] + 1: the sum of the elements as they are stored, in float32, is rounded to the
    view's dtype. Raises ViewError where they are stored in several dtypes, or nowhere."""
    return _of_stored("1 + {}", view, "plus_one").cast(view.dtype)


def minus_exp(view: View) -> View:
    """result[..] == -exp(self[..]) of the elements as they are stored, float32. Raises as `plus_one`."""
    return _of_stored("-exp {}", view, "minus_exp")


def _of_stored(name: str, view: View, function: Function) -> View:
    if not len(view.extents):
        raise ViewError(f"{function}: wanted stored elements, got zeros: {view}")
    key = view.extents[int(view.extent.max())].key
    return _made(Each(name.format(key), _flat(view.as_stored()), function)).reshape(view.shape)


def reciprocal(name: str, view: View) -> View:
    """result[..] == 1 / self[..], float32."""
    return _made(Each(f"1 / {name}", _flat(view), "reciprocal")).reshape(view.shape)


def multiple(name: str, view: View, factor: float) -> View:
    """result[..] == self[..] * factor, float32; the view itself for 1."""
    if factor == 1:
        return view
    return _made(Each(f"{factor} * {name}", _flat(view), "multiple", factor)).reshape(view.shape)


def largest(name: str, view: View, *, inverse: bool = False) -> View:
    """result[i] == the largest of self[i, :], or 1 / that; float32."""
    return _made(Largest(name, view, inverse)).reshape((view.shape[0],))


def requantised(name: str, view: View, scale: View, scales: Sequence[View]) -> View:
    """A matrix of scale `scale` as one whose scale is the largest of `scales`, in the same dtype."""
    from_all = cat([s.reshape((1, 1)) for s in scales], 1)
    return _made(Requantised(name, view, scale.reshape((1, 1)), from_all)).cast(view.dtype)


def agreed(name: str, views: Sequence[View]) -> View:
    """The first of the views, in float32; a read raises SourceError unless all hold the same elements."""
    made = _made(Agreed(name, tuple(_flat(v) for v in views)))
    return made.reshape(views[0].shape)


def _made(finish: Finish) -> View:
    """The view of a finish [rows, columns], float32."""
    extent = nowhere(finish, finish.shape, float32, finish.name)
    base = finish.views[0] if isinstance(finish, Agreed) else finish.base
    extents, places = base.extents.union(Extents([extent]))
    return pitched(extents, places[0], float32, finish.shape)


def _flat(view: View) -> View:
    return view.reshape((1, view.numel))


def floats(read: Read, view: View, r0: int, r1: int, c0: int, c1: int) -> Floats:
    """Rows [r0, r1) of columns [c0, c1) of a view, as float32."""
    part = view.narrow(0, r0, r1 - r0).narrow(1, c0, c1 - c0)
    return np.asarray(read(part.cast(float32)), np.float32)


def _reciprocal(name: str, x: Floats) -> Floats:
    if not x.all():
        raise SourceError(f"{name}: 0 has no reciprocal")
    return np.divide(1, x, dtype=np.float32)
