"""What a plan will do, as text and as JSON: which bytes of which file go where.

Law: nothing here reads a tensor byte; figures come from compiled rows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import JSON
from ..extents import COMPUTED, Buffer, File
from ..placement import Placement
from ..planning import copies
from ..planning.binding import Binding
from ..planning.compiling import WINDOW
from ..planning.copies import NOTHING, Ints, Table
from ..planning.plans import Plan
from ..running.limits import Limits
from .text import columns, counted, size, some


@dataclass(frozen=True, slots=True)
class Taken:
    """What one tensor takes from one source file: `ranges` contiguous byte ranges of `nbytes` in all, which
    lie within [first, last) of the file; those of a strided copy may touch. A tensor in memory has the path
    "memory", what is computed of others as it is read "computed"."""

    path: str
    ranges: int
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Placed:
    """One output tensor: its serving rank, the `file` (relative to the output) and `offset` where its
    `nbytes` go, and what they are made of."""

    rank: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    taken: tuple[Taken, ...]


@dataclass(frozen=True, slots=True)
class PlanDescription:
    """A plan for people: where each output tensor goes and what it is made of.

    `tensors` in the plan's order; `files`: (rank, path, tensors, bytes) of every output file. `peak_memory`:
    the most bytes of staging and plan a run over files holds at once, beside the program itself."""

    key: str
    source: str
    layout: str
    placement: Placement
    ranks: tuple[int, ...]
    tensors: tuple[Placed, ...]
    files: tuple[tuple[int, str, int, int], ...]
    aliases: Mapping[str, str]
    peak_memory: int
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of the output tensors."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def needed_bytes(self) -> int | None:
        """Source bytes they are made of; bytes that two tensors need count for each. None where some are
        computed of others."""
        every = [r for t in self.tensors for r in t.taken]
        return None if any(r.path == COMPUTED for r in every) else sum(r.nbytes for r in every)

    def sources(self) -> dict[str, tuple[int, int]]:
        """Source path -> (ranges, bytes) over all tensors."""
        ranges: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        for t in self.tensors:
            for r in t.taken:
                ranges[r.path] += r.ranges
                nbytes[r.path] += r.nbytes
        return {p: (ranges[p], nbytes[p]) for p in sorted(ranges)}

    def text(self) -> str:
        """The plan for people: totals, files, and for each tensor where it comes from."""
        p, needed = self.placement, self.needed_bytes
        told = "" if needed is None else f"{size(needed)} of "
        made = ", ".join(str(r) for r in self.ranks)
        lines = [f"{self.source} -> {self.layout}, plan {self.key}"]
        lines += columns(
            [
                ("placement", f"tp {p.tp}, pp {p.pp}, dp {p.dp}, ep {p.ep}"),
                ("ranks", made),
                ("tensors", f"{len(self.tensors)} ({size(self.output_bytes)})"),
                ("needed", told + counted(len(self.sources()), "source file")),
                ("peak memory", f"at most {size(self.peak_memory)} beside the program itself"),
            ]
        )
        lines += some("notes", self.notes)
        lines += [
            "sources",
            *columns([(s, counted(n, "range"), size(b)) for s, (n, b) in self.sources().items()]),
        ]
        placed: dict[tuple[int, str], list[Placed]] = {}
        for t in self.tensors:
            placed.setdefault((t.rank, t.file), []).append(t)
        for rank, path, _, nbytes in self.files:
            inside = placed[rank, path]
            lines.append(f"rank {rank}: {path} ({counted(len(inside), 'tensor')}, {size(nbytes)})")
            lines += columns(
                [
                    (t.name, t.dtype, str(list(t.shape)), f"at {t.offset}", size(t.nbytes), _listed(t.taken))
                    for t in inside
                ]
            )
        lines += some("tied", [f"{a} = {b}" for a, b in self.aliases.items()])
        return "\n".join(lines)

    def json(self) -> dict[str, JSON]:
        """All of it as JSON values; offsets and sizes in bytes."""
        p = self.placement
        return {
            "key": self.key,
            "source": self.source,
            "layout": self.layout,
            "placement": {"tp": p.tp, "pp": p.pp, "dp": p.dp, "ep": p.ep},
            "ranks": [*self.ranks],
            "output_bytes": self.output_bytes,
            "needed_bytes": self.needed_bytes,
            "peak_memory": self.peak_memory,
            "notes": [*self.notes],
            "aliases": dict(self.aliases),
            "sources": {s: {"ranges": n, "bytes": b} for s, (n, b) in self.sources().items()},
            "files": [
                {"rank": rank, "path": path, "tensors": count, "bytes": nbytes}
                for rank, path, count, nbytes in self.files
            ],
            "tensors": [
                {
                    "rank": t.rank,
                    "name": t.name,
                    "dtype": t.dtype,
                    "shape": [*t.shape],
                    "file": t.file,
                    "offset": t.offset,
                    "bytes": t.nbytes,
                    "from": [
                        {
                            "path": r.path,
                            "ranges": r.ranges,
                            "bytes": r.nbytes,
                            "first": r.first,
                            "last": r.last,
                        }
                        for r in t.taken
                    ],
                }
                for t in self.tensors
            ],
        }


def describe_plan(
    plan: Plan, *, threads: int | None = None, memory: str | int | None = None
) -> PlanDescription:
    """Which bytes of which file go where; `threads` and `memory` are what `peak_memory` is told for.

    Raises WriteError where `reshard` does: fewer than one thread, too little memory."""
    taken = _taken_by(plan)
    held = Counter((t.rank, t.file) for t in plan.tensors)
    paths = [f.path for f in plan.files]
    limits = Limits.of(threads, memory)
    rows = sum(k.nbytes for k in plan.kept or ()) + 4 * WINDOW * copies.COPY.itemsize
    return PlanDescription(
        key=plan.key,
        source=plan.checkpoint.path,
        layout=plan.layout,
        placement=plan.placement,
        ranks=plan.ranks,
        tensors=tuple(
            Placed(t.rank, t.name, t.dtype.name, t.shape, paths[t.file], t.offset, t.nbytes, taken.get(i, ()))
            for i, t in enumerate(plan.tensors)
        ),
        files=tuple((r, paths[i], n, plan.files[i].nbytes) for (r, i), n in held.items()),
        aliases=plan.aliases,
        peak_memory=limits.threads * limits.band + rows,
        notes=plan.notes,
    )


def _taken_by(plan: Plan) -> dict[int, tuple[Taken, ...]]:
    """What every tensor of the plan takes, by its index."""
    out: dict[int, tuple[Taken, ...]] = {}
    binding = Binding.of(plan.extents)
    for tensors, rows in _rows(plan):
        real = rows["src_buffer"] != NOTHING
        tensors, rows = tensors[real], binding.bind(rows[real])
        pairs = np.stack([tensors, rows["src_buffer"].astype(np.int64)], axis=1)
        keys, group = np.unique(pairs, axis=0, return_inverse=True)
        group = group.reshape(-1)
        low, high = copies.span(rows, "src")
        first = np.full(len(keys), np.iinfo(np.int64).max)
        last, count, moved = (np.zeros(len(keys), np.int64) for _ in range(3))
        np.minimum.at(first, group, low)
        np.maximum.at(last, group, high)
        np.add.at(count, group, ranges(rows))
        np.subtract.at(count, group, meets(rows, group))
        np.add.at(moved, group, copies.nbytes(rows, "src"))
        columns = (keys[:, 0], keys[:, 1], count, moved, first, last)
        for tensor, place, n, nbytes, a, b in zip(*(c.tolist() for c in columns), strict=True):
            out[tensor] = (*out.get(tensor, ()), Taken(_path(binding.places[place]), n, nbytes, a, b))
    return out


def _path(place: File | Buffer) -> str:
    if isinstance(place, File):
        return place.path
    return COMPUTED if place.device == COMPUTED else "memory"


def _rows(plan: Plan) -> Iterator[tuple[Ints, Table]]:
    """Each window's rows, and the plan's tensor each row belongs to."""
    for first, chunk in plan.chunks():
        yield first + chunk.tensor, chunk.rows


def meets(rows: Table, group: Ints) -> Ints:
    """1 for each row that is one byte range and begins where another such row of its group ends, else 0."""
    low, high = copies.span(rows, "src")
    dense = ranges(rows) == 1
    order = np.lexsort((low, ~dense, group))
    before, after = order[:-1], order[1:]
    out = np.zeros(len(rows), np.int64)
    touch = dense[before] & dense[after] & (group[before] == group[after]) & (high[before] == low[after])
    out[after[touch]] = 1
    return out


def ranges(rows: Table) -> Ints:
    """How many contiguous byte ranges of its source each row reads."""
    shape, stride = rows["shape"].astype(np.int64), rows["src_stride"]
    order = np.argsort(stride, axis=1, kind="stable")
    shape, stride = np.take_along_axis(shape, order, 1), np.take_along_axis(stride, order, 1)
    run = copies.item_sizes(rows["src_dtype"].tolist())
    count = np.ones(len(rows), np.int64)
    joined: NDArray[np.bool_] = np.ones(len(rows), bool)
    for axis in range(copies.AXES):
        n = shape[:, axis]
        real = (n > 1) & (stride[:, axis] != 0)
        joined &= ~real | (stride[:, axis] == run)
        run = np.where(real & joined, run * n, run)
        count = np.where(real & ~joined, count * n, count)
    return count


def _listed(taken: Sequence[Taken]) -> str:
    if not taken:
        return "<- zeros"
    count, files = counted(sum(r.ranges for r in taken), "range"), counted(len(taken), "file")
    names = [os.path.basename(r.path) for r in taken[:2]] + (["..."] if len(taken) > 2 else [])
    return f"<- {size(sum(r.nbytes for r in taken))}, {count} of {files}: {', '.join(names)}"
