"""The tensors of a plan, kept as columns that read as records: a model may have 10^5 of them and more.

Law: the columns of one table have one length; record i is row i of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from ..dtypes import DType
from ..output.files import Specs
from ..target import Target
from .batches import Slots
from .copies import Ints


@dataclass(frozen=True, slots=True)
class Made:
    """What is made, in the plan's order, before it has a place: serving rank, name, dtype, shape."""

    ranks: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    dtypes: list[DType] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    @staticmethod
    def of(targets: Sequence[tuple[int, Target]]) -> Made:
        """These alone, each with its serving rank."""
        made = Made()
        made.extend(targets)
        return made

    def __len__(self) -> int:
        return len(self.names)

    def part(self, first: int, stop: int) -> Made:
        """Those of the numbers [first, stop)."""
        some = slice(first, stop)
        return Made(self.ranks[some], self.names[some], self.dtypes[some], self.shapes[some])

    def extend(self, targets: Sequence[tuple[int, Target]]) -> None:
        """More at the end, each with its serving rank."""
        self.ranks.extend([rank for rank, _ in targets])
        self.names.extend([t.name for _, t in targets])
        self.dtypes.extend([t.dtype for _, t in targets])
        self.shapes.extend([t.stored_shape for _, t in targets])

    def of_ranks(self, ranks: Sequence[int]) -> dict[int, Ints]:
        """The rows of each of these serving ranks, in order: of thousands as fast as of one."""
        every = np.array(self.ranks, np.int64)
        order = np.argsort(every, kind="stable")
        first, stop = (np.searchsorted(every[order], ranks, side).tolist() for side in ("left", "right"))
        return {r: order[a:b] for r, a, b in zip(ranks, first, stop, strict=True)}

    def specs(self, rows: Ints) -> Specs:
        """These rows as files.py wants them."""
        every = Specs(self.names, self.dtypes, self.shapes)
        return every if len(rows) == len(self) else every.at(rows.tolist())

    def nbytes(self) -> Ints:
        """The size of each tensor."""
        return Specs(self.names, self.dtypes, self.shapes).nbytes()


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One output tensor: the serving rank it belongs to, and where its bytes lie in which file.

    `file` indexes the plan's files (in memory: the plan's ranks); `offset` in bytes from the file's start
    (in memory: from the rank's first tensor)."""

    rank: int
    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensors(Sequence[PlannedTensor]):
    """The tensors of a plan: what is made, and as columns where it lies."""

    made: Made
    file: Ints
    offset: Ints
    nbytes: Ints

    def slots(self) -> Slots:
        """Where they lie, with their digest leaves numbered."""
        return Slots.of(self.file, self.offset, self.nbytes)

    def __len__(self) -> int:
        return len(self.made)

    @overload
    def __getitem__(self, i: int) -> PlannedTensor: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[PlannedTensor]: ...

    def __getitem__(self, i: int | slice) -> PlannedTensor | Sequence[PlannedTensor]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        m = self.made
        where = int(self.file[i]), int(self.offset[i]), int(self.nbytes[i])
        return PlannedTensor(m.ranks[i], m.names[i], m.dtypes[i], m.shapes[i], *where)

    def __iter__(self) -> Iterator[PlannedTensor]:
        m = self.made
        where = (self.file.tolist(), self.offset.tolist(), self.nbytes.tolist())
        return map(PlannedTensor, m.ranks, m.names, m.dtypes, m.shapes, *where)
