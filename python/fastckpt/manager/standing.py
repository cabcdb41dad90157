"""Which steps count: those that stand whole on every disk under one key, and why others do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .commits import Store
from .coordination import Group, together


@dataclass(frozen=True, slots=True)
class Standing:
    """`steps`: step -> the key that all ranks see there; `by_rank`: what each rank sees on its disk."""

    steps: Mapping[int, str]
    by_rank: tuple[Mapping[int, str], ...]

    @staticmethod
    def of(store: Store, group: Group) -> Standing:
        """What all ranks say of their disks. Collective. Raises WriteError where a root cannot be listed."""
        said = together(group, "list of commits", lambda: [[c.step, c.key] for c in store.commits()])
        by_rank = tuple(
            {int(str(p[0])): str(p[1]) for p in s if isinstance(p, list)} for s in said if isinstance(s, list)
        )
        # on a shared disk the ranks may see it at different moments: what all see counts
        common = {step: key for step, key in by_rank[0].items() if all(r.get(step) == key for r in by_rank)}
        return Standing(common, by_rank)

    def lacking(self, step: int) -> str:
        """Why a step does not stand everywhere, in words."""
        lacking = [r for r, steps in enumerate(self.by_rank) if step not in steps]
        if not lacking:
            return "the ranks have commits of different saves under this step"
        whole = sorted(set.intersection(*(set(s) for s in self.by_rank)))
        return f"ranks {lacking[:8]} have no whole commit of it; what stands: {whole[-8:] or 'nothing'}"
