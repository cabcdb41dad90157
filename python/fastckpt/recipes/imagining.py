"""A checkpoint that is not there: whatever a recipe asks of it, it has.

So a recipe says which names and shapes the hub gives a model of some config, before there is any file of it.
Optional names are absent: experts stand one by one, a tied head is the embedding, nothing is quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from ..checkpoint import Checkpoint, Entry, Single
from ..dtypes import float32
from ..errors import RecipeError
from ..extents import Extents
from ..views import zeros

MOST = 1 << 18
"""Tensors of one model; a config may say anything."""


class Imagined(Mapping[str, Entry]):
    """Entries that `want` made, each of zeros."""

    __slots__ = ("_wanted",)

    def __init__(self) -> None:
        self._wanted: dict[str, Entry] = {}

    def want(self, name: str, shape: tuple[int, ...]) -> None:
        """There is such a tensor from now on. Raises RecipeError where there are too many."""
        if len(self._wanted) == MOST:
            raise RecipeError(f"config: a model of more than {MOST} tensors")
        self._wanted.setdefault(name, Single(shape, float32, partial(zeros, shape, float32)))

    def __getitem__(self, name: str) -> Entry:
        return self._wanted[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)


def checkpoint() -> Checkpoint:
    """One that holds nothing yet."""
    return Checkpoint("the imagined checkpoint", "imagined", Imagined(), Extents(()))
