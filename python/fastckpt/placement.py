"""Where one serving rank stands in the grid of serving ranks.

Law: rank == (pp_rank * dp + dp_rank) * tp + tp_rank, with every coordinate below its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .errors import LayoutError, expect

RANKS = 1 << 20
"""The most ranks of a grid."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The sizes of the serving grid and one rank in it.

    `tp` ranks cut each layer, `pp` stages hold layer ranges, `dp` groups repeat the model; `ep` ranks
    share the experts of a layer. Raises LayoutError for sizes below 1, for more than RANKS ranks, and for a
    rank outside the grid."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "ep"):
            if type(getattr(self, name)) is not int:
                raise LayoutError(f"placement: {name} must be a whole number, got {getattr(self, name)!r}")
            if getattr(self, name) < 1:
                raise LayoutError(f"placement: {name} must be at least 1, got {getattr(self, name)}")
        if max(self.world, self.ep) > RANKS:
            raise LayoutError(f"placement: {self} has more than {RANKS} ranks")
        if type(self.rank) is not int or not 0 <= self.rank < self.world:
            raise LayoutError(f"placement: rank {self.rank!r} is outside the {self.world} ranks of {self}")

    def __str__(self) -> str:
        """The sizes, as messages name them."""
        return f"tp {self.tp}, pp {self.pp}, dp {self.dp}, ep {self.ep}"

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.tp * self.pp * self.dp

    @property
    def tp_rank(self) -> int:
        """This rank's place among those that cut each layer."""
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        """This rank's place among the repeats."""
        return self.rank // self.tp % self.dp

    @property
    def pp_rank(self) -> int:
        """This rank's pipeline stage."""
        return self.rank // (self.tp * self.dp)

    @property
    def stage_rank(self) -> int:
        """This rank's place among the tp * dp ranks of its stage."""
        return self.rank % (self.tp * self.dp)

    def at(self, rank: int) -> Placement:
        """The same grid seen from `rank`."""
        return replace(self, rank=rank)

    def ranks(self) -> Iterator[Placement]:
        """Every rank's placement, in order."""
        return (self.at(r) for r in range(self.world))


def grid_of(tp: int, placement: Placement | None) -> Placement:
    """The grid that `tp` and `placement` ask for together. Raises LayoutError where they differ."""
    expect("placement", placement, Placement, type(None))
    if placement is not None and tp not in (1, placement.tp):
        raise LayoutError(f"tp={tp} and placement.tp={placement.tp} differ; give one of them")
    return Placement(tp=tp) if placement is None else placement
