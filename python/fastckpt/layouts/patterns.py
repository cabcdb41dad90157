"""Name patterns -> how each tensor is cut, for models no recipe knows.

The styles have transformers' names (its tensor_parallel.py): column-wise cuts a matrix's outputs, the last
axis but one, row-wise its inputs, the last axis. A bias belongs to the outputs: column-wise cuts it, row-wise
leaves it whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from ..checkpoint import Checkpoint
from ..errors import LayoutError
from ..placement import Placement
from ..target import Target
from ..views import cat
from .naming import Naming, ranked
from .requirements import require_tensor_parallel


@dataclass(frozen=True, slots=True)
class Cut:
    """One style. `axis`: the axis that is cut, counted from the end (None: none); `bias`: whether a bias is
    cut too; `halves`: how many matrices the axis holds one after another, each of which is cut."""

    axis: int | None
    bias: bool = True
    halves: int = 1


_COLUMN, _ROW, _WHOLE = Cut(-2), Cut(-1, bias=False), Cut(None)
STYLES: dict[str, Cut] = {
    "colwise": _COLUMN,
    "colwise_rep": _COLUMN,
    "colwise_gather_output": _COLUMN,
    "rowwise": _ROW,
    "rowwise_rep": _ROW,
    "rowwise_split_input": _ROW,
    "embedding_rowwise": _COLUMN,
    "embedding_colwise": _ROW,
    "packed_colwise": Cut(-2, halves=2),
    "packed_rowwise": Cut(-1, bias=False, halves=2),
    "replicate": _WHOLE,
    "replicated_with_grad_allreduce": _WHOLE,
    "sequence_parallel": _WHOLE,
}


@dataclass(frozen=True, slots=True)
class Patterns:
    """`plan`: glob pattern -> style; a pattern matches a tensor's name or its module's.

    The first pattern that matches decides. `*` also matches dots. Raises LayoutError for an unknown style."""

    plan: Mapping[str, str]
    roles: ClassVar[Literal[False]] = False

    def __post_init__(self) -> None:
        for pattern, style in self.plan.items():
            if style not in STYLES:
                known = ", ".join(STYLES)
                raise LayoutError(f"tp_plan: {pattern!r}: unknown style {style!r}; known: {known}")

    def targets(self, ckpt: Checkpoint, placement: Placement) -> Iterator[Target]:
        """Every tensor's part for this rank, in the checkpoint's order; then the tied names that are cut
        differently from the tensor they are tied to.

        Raises LayoutError, before the first target, for a name no pattern matches, for an axis that does not
        divide by tp, and for a tensor that does not have the axis."""
        require_tensor_parallel("hf", placement)
        cuts = {name: self._axis(name, ckpt.entries[name].shape, placement.tp) for name in ckpt}
        for alias, holder in ckpt.aliases.items():
            if placement.tp > 1 and self._style(alias) is not None:
                cut = self._axis(alias, ckpt.entries[holder].shape, placement.tp)
                if cut != cuts[holder]:
                    cuts[alias] = cut
        return self._targets(ckpt, placement, cuts)

    def unused(self, ckpt: Checkpoint) -> list[str]:
        """The patterns that match no tensor: another version's, or misspelt."""
        names = [*ckpt.entries, *ckpt.aliases]
        either = [*names, *{name.rpartition(".")[0] for name in names}]
        return [p for p in self.plan if not any(fnmatchcase(name, p) for name in either)]

    def naming(self, placement: Placement) -> Naming:
        """The hub's names, a directory a rank."""
        return ranked(placement.tp, placement.tp_rank)

    def _targets(
        self, ckpt: Checkpoint, placement: Placement, cuts: Mapping[str, tuple[int, int] | None]
    ) -> Iterator[Target]:
        for name, cut in cuts.items():
            view = ckpt[name]
            if cut is not None:
                axis, halves = cut
                parts = [view.part(axis, half, halves) for half in range(halves)]
                view = cat([part.part(axis, placement.tp_rank, placement.tp) for part in parts], axis)
            yield Target(name, view)

    def _style(self, name: str) -> str | None:
        """The style of the first pattern that matches."""
        module = name.rpartition(".")[0]
        return next((s for p, s in self.plan.items() if fnmatchcase(name, p) or fnmatchcase(module, p)), None)

    def _axis(self, name: str, shape: tuple[int, ...], tp: int) -> tuple[int, int] | None:
        """The axis to cut and the matrices along it; None: the tensor is whole on every rank."""
        style = self._style(name)
        if style is None:
            raise LayoutError(f'tp_plan: no pattern matches {name}; write "*": "replicate" to mean it')
        cut = STYLES[style]
        if cut.axis is None or (name.rpartition(".")[2] == "bias" and not cut.bias):
            return None
        axis = -1 if len(shape) == 1 else cut.axis  # a vector lies along the outputs, or is cut as asked
        if len(shape) < -axis or (len(shape) == 1 and cut.halves > 1):
            raise LayoutError(f"tp_plan: {name} has shape {shape}, which {style} cannot cut")
        if shape[axis] % (tp * cut.halves):
            each = f"tp {tp}" if cut.halves == 1 else f"{cut.halves} * tp {tp}"
            where = f"{shape[axis]} on axis {axis % len(shape)}"
            raise LayoutError(f"tp_plan: {name} has {where}, which does not divide by {each}")
        return axis % len(shape), cut.halves
