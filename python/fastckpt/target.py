"""One tensor of a shard, before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .dtypes import DType
from .errors import ViewError
from .quantisation.schemes import Scheme
from .views import View


@dataclass(frozen=True, slots=True)
class Target:
    """One output tensor: its name in the shard, the view it is made from, and its final shape.

    `shape` may group the view's elements differently (the output is dense, so that costs nothing); by default
    it is the view's own. The output has `view.dtype`, unless a `scheme` quantises the dense tensor on the
    way: then `dtype` and `stored_shape` are the scheme's. `also`: where `view` is computed when it is read,
    views of the stored elements it is computed from, by which `joining` finds its way back."""

    name: str
    view: View
    shape: tuple[int, ...]
    scheme: Scheme | None
    also: tuple[View, ...]

    def __init__(
        self,
        name: str,
        view: View,
        shape: tuple[int, ...] | None = None,
        scheme: Scheme | None = None,
        also: tuple[View, ...] = (),
    ) -> None:
        if shape is None:
            shape = view.shape
        elif math.prod(shape) != view.numel:
            raise ViewError(
                f"target {name}: shape {shape} does not hold the {view.numel} elements of {view.shape}"
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "scheme", scheme)
        object.__setattr__(self, "also", also)

    @property
    def dtype(self) -> DType:
        """The dtype of the output."""
        return self.view.dtype if self.scheme is None else self.scheme.dtype

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return self.shape if self.scheme is None else self.scheme.stored_shape(self.shape)
