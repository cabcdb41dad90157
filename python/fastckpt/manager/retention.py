"""Which commits of a root go: what no policy keeps, what dead saves left, what a rewind sets aside.

Law: nothing goes before a newer commit stands; one rank decides for all disks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..checkpoint import JSON
from ..errors import ManagerError
from .commits import Store
from .coordination import Group, by_some, together
from .policies import Keep
from .reporting import only_said
from .saving import Disk
from .standing import Standing


@dataclass(slots=True, eq=False)
class Retention:
    """`policy`: what is kept, None for all. `newest`: the step that was saved last, or rewound to; `broken`:
    steps that were found broken."""

    store: Store
    disk: Disk
    policy: Keep | None
    newest: int | None = None
    broken: set[int] = field(default_factory=set)

    def surplus(self, standing: Standing | None = None) -> list[int]:
        """The steps that no policy keeps. `standing`: what all disks hold, where there are several.

        A step that only some disks hold is no commit: the policy does not see it, and it goes once it is
        older than the newest commit. Without `standing`, no step goes of which other nodes hold a part."""
        if self.policy is None:
            return []
        commits = [
            c for c in self.store.commits()
            if c.step not in self.broken and (c.step in standing.steps if standing else c.everywhere)
        ]  # fmt: skip
        if not commits:
            return []
        kept = self.policy(commits) | {commits[-1].step}
        if self.newest is not None:  # saved last, though older than others that stand
            kept.add(self.newest)
        seen = {s for rank in standing.by_rank for s in rank} if standing else {c.step for c in commits}
        return sorted(s for s in seen - kept - self.broken if s < commits[-1].step)

    def clean(self, group: Group) -> list[int]:
        """Remove what no policy keeps; the steps that went. Collective."""
        disks = len(self.disk.ranks) < group.world
        standing = Standing.of(self.store, group) if disks else None
        agreed = together(group, "cleaning", lambda: [*self.surplus(standing)] if group.rank == 0 else [])[0]
        steps = [s for s in agreed if isinstance(s, int)] if isinstance(agreed, list) else []
        if steps and self.disk.coordinator:
            with only_said(f"old commits in {self.store.root} could not be removed"):
                self.store.take()
                self.store.remove(steps)
        return steps

    def gc(self, group: Group, *, aside: bool) -> list[int]:
        """`clean`, and what dead saves left, with `aside` what was set aside. Collective."""

        def sweep() -> None:
            self.store.take()
            self.store.sweep(aside=aside)

        by_some(group, "gc", self.disk.coordinator, sweep)
        return self.clean(group)

    def rewind(self, group: Group, step: int) -> list[int]:
        """Set commits newer than `step` aside; the steps that went. Collective. Raises ManagerError."""
        standing = Standing.of(self.store, group)
        if step not in standing.steps:
            raise ManagerError(f"{self.store.root}: cannot go back to step {step}: {standing.lacking(step)}")

        def move() -> JSON:
            newer = [s for s in self.store.steps() if s > step]
            if newer and self.disk.coordinator:
                self.store.take()
                self.store.set_aside(newer)
            return [*newer]

        said = together(group, f"rewind to step {step}", move)  # a rank may see it when they are gone
        self.newest = step
        return sorted({s for newer in said if isinstance(newer, list) for s in newer if isinstance(s, int)})
