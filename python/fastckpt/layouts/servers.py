"""How servers distribute what tensor parallelism does not cut: experts and layers."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LayoutError
from ..model import Sizes
from ..placement import Placement


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's share of a layer's experts: it holds those of part `ep_rank` of `ep`, and of each one's
    width part `index` of `count`."""

    index: int
    count: int
    ep_rank: int
    ep: int

    def of(self, experts: int, order: str) -> range:
        """The experts it holds. "linear": a run, one longer in the first experts % ep parts; "round_robin":
        every ep-th. Source: vLLM's determine_expert_map."""
        if order == "round_robin":
            return range(self.ep_rank, experts, self.ep)
        each, more = divmod(experts, self.ep)
        first = self.ep_rank * each + min(self.ep_rank, more)
        return range(first, first + each + (self.ep_rank < more))


def expert_share(layout: str, placement: Placement, sizes: Sizes, instead: str = "") -> Share:
    """The rank's share: all tp * dp ranks cut every expert's width, or, with ep = tp * dp, hold some whole.

    Raises LayoutError for another ep, fewer experts than parts, or a width that does not divide; `instead`:
    the way out of the last, for the message."""
    ranks = placement.tp * placement.dp
    if placement.ep not in (1, ranks):
        raise LayoutError(
            f"layout {layout}: experts are shared by all tp * dp ranks or by none: wanted ep 1 or {ranks}, "
            f"got {placement.ep}"
        )
    if placement.ep > max(sizes.experts, 1):
        raise LayoutError(f"layout {layout}: {sizes.experts} experts are fewer than ep {placement.ep}")
    if placement.ep > 1:
        return Share(0, 1, placement.stage_rank, ranks)
    width = sizes.widths.get(sizes.expert_width, 0)
    if width % ranks:
        raise LayoutError(
            f"layout {layout}: {sizes.expert_width} {width} does not divide by tp * dp {ranks}{instead}"
        )
    return Share(placement.stage_rank, ranks, 0, 1)


def layer_range(layout: str, placement: Placement, layers: int) -> range:
    """The layers of the rank's stage, as even as can be; each layer left over goes to another stage,
    beginning with the last but one and going back. Source: vLLM's get_pp_indices.

    Raises LayoutError for more stages than layers."""
    pp = placement.pp
    if pp > layers:
        raise LayoutError(f"layout {layout}: pp {pp} is more than the {layers} layers")
    counts = [layers // pp] * pp
    for back in range(layers % pp):
        counts[-2 - back] += 1
    first = sum(counts[: placement.pp_rank])
    return range(first, first + counts[placement.pp_rank])
