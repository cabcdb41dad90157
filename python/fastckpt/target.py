"""One tensor of a shard, before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ViewError
from .views import View


@dataclass(frozen=True, slots=True)
class Target:
    """One output tensor: its name in the shard, the view it is made from, and its final shape.

    `shape` may group the view's elements otherwise (same numel: the output is dense, so regrouping is
    free); the default is the view's own. `view.dtype` is the output dtype."""

    name: str
    view: View
    shape: tuple[int, ...]

    def __init__(self, name: str, view: View, shape: tuple[int, ...] | None = None) -> None:
        shape = view.shape if shape is None else shape
        if math.prod(shape) != view.numel:
            raise ViewError(f"target {name}: shape {shape} does not hold the {view.numel} elements of {view.shape}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "shape", shape)
