"""Where the elements of a parameter lie in the partitions that ZeRO ranks saved.

Law: the formulas are those of DeepSpeed's partitioning (stage_1_and_2.py, stage3.py, zero_to_fp32.py);
lengths are checked here, once, and what fits no formula is a SourceError. Padding is never read.

Stages 1 and 2: a group's flat is the parameters in `param_shapes` order, each followed by its alignment
padding; N elements, zero-padded to a multiple of 2 * world, cut in `world` equal partitions. Stage 3: rank
r holds elements [r * p, (r + 1) * p) of each parameter, p = ceil(numel / world), the tail is garbage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...checkpoint import Entry
from ...dtypes import DType
from ...errors import SourceError
from ...extents import Extents
from ...stored import runs_of_many
from ...views import Rows, View, zeros

Shape = tuple[int, ...]

BLOCK, FRAGMENTS = 256, 4096
"""The most parameters whose fragments are found at once, and about how many fragments those may have."""


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """One flat group, or one frozen parameter, as its ranks saved it.

    `extent`, `offset`, `length`: of each rank's tensor, [world]; offset and length in elements of `dtype`."""

    dtype: DType
    extent: Rows
    offset: Rows
    length: Rows

    @property
    def world(self) -> int:
        """The number of ranks it is cut over."""
        return len(self.length)


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """The parameters of one flat, as columns in its order: `numel` elements from element `start`. That is an
    element of the whole flat at stages 1 and 2, and of every rank's partition at stage 3 (`sliced`)."""

    flat: Flat
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    numel: Rows
    start: Rows
    sliced: bool

    def entries(self, extents: Extents, kind: str = "parameter") -> dict[str, Entry]:
        """Name -> entry; `extents`: the table that the flat's extents are numbers of."""
        gather = Gather(self, extents, kind)
        return {name: Gathered(gather, k) for k, name in enumerate(self.names)}


class Gather:
    """Builds the views of one flat's parameters.

    The fragments of a block of neighbours are found at once, and kept until a parameter of another block is
    asked for: many small parameters then cost a few vector operations a block, not each."""

    __slots__ = ("_held", "_size", "extents", "kind", "placed")

    def __init__(self, placed: Placed, extents: Extents, kind: str) -> None:
        self.placed, self.extents, self.kind = placed, extents, kind
        self._size = max(1, min(BLOCK, FRAGMENTS // max(1, placed.flat.world)))
        self._held: tuple[int, Rows, list[int]] = (-1, np.empty((0, 0), np.int64), [])

    def view(self, number: int) -> View:
        """The parameter of that number, in its shape. Raises SourceError when it leaves its extents."""
        at, k = divmod(number, self._size)
        block, rows, borders = self._held
        if block != at:
            rows, borders = self._fragments(slice(at * self._size, (at + 1) * self._size))
            self._held = at, rows, borders
        p = self.placed
        shape, flat = p.shapes[number], (int(p.numel[number]),)
        if 0 in shape:
            return zeros(shape, p.flat.dtype)
        held = rows[borders[k] : borders[k + 1]]
        return View(shape, p.flat.dtype, self.extents, held, None if shape == flat else flat)

    def _fragments(self, block: slice) -> tuple[Rows, list[int]]:
        p = self.placed
        flat = p.flat
        places = _sliced if p.sliced else _chained
        rank, offset, length, counts = places(flat, p.start[block], p.numel[block])
        return runs_of_many(
            self.extents, flat.dtype, flat.extent[rank], flat.offset[rank] + offset, length, counts
        )


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """The entry of one of these parameters."""

    gather: Gather
    number: int

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return self.gather.placed.shapes[self.number]

    @property
    def dtype(self) -> DType:
        """Its dtype as stored."""
        return self.gather.placed.flat.dtype

    @property
    def kind(self) -> str:
        """What it is."""
        return self.gather.kind

    def build(self) -> View:
        """Its view."""
        return self.gather.view(self.number)


Places = tuple[Rows, Rows, Rows, Rows]
"""Runs of many parameters: the rank of each, its first element in the rank's tensor and its length; and how
many runs each parameter has."""


def _chained(flat: Flat, start: Rows, numel: Rows) -> Places:
    """Elements [start, start + numel) of the ranks' partitions one after another."""
    stop = np.cumsum(flat.length)
    begin = stop - flat.length
    first = np.searchsorted(stop, start, "right")
    counts = np.where(numel > 0, np.searchsorted(begin, start + numel, "left") - first, 0)
    parameter, k = _each(counts)
    rank = first[parameter] + k
    low = np.maximum(begin[rank], start[parameter])
    high = np.minimum(stop[rank], (start + numel)[parameter])
    return rank, low - begin[rank], high - low, counts


def _sliced(flat: Flat, start: Rows, numel: Rows) -> Places:
    """Parameters cut over all ranks, each piece from `start` of its partition."""
    part = -(-numel // flat.world)
    counts = -(-numel // np.maximum(part, 1))
    parameter, rank = _each(counts)
    length = np.minimum(part[parameter], numel[parameter] - part[parameter] * rank)
    return rank, start[parameter], length, counts


def _each(counts: Rows) -> tuple[Rows, Rows]:
    """For items of which each stands `counts` times: the item, and which time it is."""
    item = np.repeat(np.arange(len(counts)), counts)
    return item, np.arange(len(item)) - np.repeat(np.cumsum(counts) - counts, counts)


# ---- lengths are checked, and every parameter gets its place ----


def chained(
    shapes: Sequence[Mapping[str, Shape]],
    paddings: Sequence[Sequence[int]] | None,
    flats: Sequence[Flat],
    where: str,
) -> list[Placed]:
    """Stages 1 and 2: where the parameters of each group lie, every group's lengths checked.

    `paddings`: elements after each parameter of each group (`param_alignment_paddings`); None is none."""
    if len(shapes) != len(flats) or (paddings is not None and len(paddings) != len(shapes)):
        raise SourceError(
            f"{where}: {len(shapes)} groups in param_shapes, {len(flats)} groups of masters"
            + (f", {len(paddings)} in param_alignment_paddings" if paddings is not None else "")
        )
    out = []
    for g, (group, flat) in enumerate(zip(shapes, flats, strict=True)):
        after = paddings[g] if paddings is not None else [0] * len(group)
        if len(after) != len(group):
            raise SourceError(
                f"{where}: group {g} has {len(group)} parameters, {len(after)} alignment paddings"
            )
        numel = elements(map(math.prod, group.values()), f"{where}: group {g}")
        stop = np.cumsum(numel + elements(after, f"{where}: group {g}"))
        start = np.concatenate([np.zeros(1, np.int64), stop])
        _check_chain(flat.length, int(start[-1]), f"{where}: group {g}", len(group))
        out.append(Placed(flat, tuple(group), tuple(group.values()), numel, start[:-1], sliced=False))
    return out


def elements(counts: Iterable[int], where: str) -> Rows:
    """Counts of elements as a column. Raises SourceError where all together are more than any file holds."""
    listed = [*counts]
    if sum(listed) >= 1 << 61:
        raise SourceError(f"{where}: {sum(listed)} elements; the limit is 2^61")
    return np.array(listed, np.int64)


def _check_chain(length: Rows, wanted: int, where: str, parameters: int) -> None:
    """Partitions hold `wanted` elements and no more (stripped), or are all padded to one length."""
    world, got = len(length), int(length.sum())
    ranks = np.arange(world, dtype=np.int64)
    stripped = got == wanted and (length == np.clip(wanted - ranks * length[0], 0, length[0])).all()
    limit = -(-wanted // (2 * world)) * 2 * world
    if stripped or ((length == length[0]).all() and wanted <= got <= limit):
        return
    part = limit // world
    odd = np.flatnonzero((length != np.clip(wanted - ranks * part, 0, part)) & (length != part))
    hint = f"; rank {odd[0]} holds {length[odd[0]]} of {part}" if len(odd) else ""
    raise SourceError(
        f"{where} holds {got} elements over {world} ranks, its {parameters} parameters need {wanted} "
        f"({limit} with padding){hint}"
    )


def sliced(shapes: Sequence[Mapping[str, Shape]], flats: Sequence[Flat], where: str) -> list[Placed]:
    """Stage 3: where the parameters of each sub-group lie, its length checked on every rank.

    Sub-groups are one stream in order, so that a flat for each dict, for each optimizer group or for all
    (old versions) are read alike; a parameter across two of them is refused, DeepSpeed writes none."""
    world = flats[0].world if flats else 1
    names = tuple(name for group in shapes for name in group)
    every = tuple(shape for group in shapes for shape in group.values())
    numel = elements(map(math.prod, every), where)
    part = -(-numel // world)
    begin = np.cumsum(part) - part
    ends = np.cumsum([int(f.length[0]) for f in flats], dtype=np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), ends])
    flat = np.searchsorted(ends, begin, "right")
    misfit = begin + part > np.append(ends, 0)[flat]
    if len(shapes) == len(flats):
        misfit |= flat != np.repeat(np.arange(len(shapes)), [len(group) for group in shapes])
    misfit &= part > 0
    total, have = int(part.sum()), int(begins[-1])
    if names and not flats:
        raise SourceError(f"{where}: {len(names)} parameters in param_shapes, no flat groups")
    if misfit.any():
        k = int(np.argmax(misfit))
        g = next(g for g, group in enumerate(shapes) if names[k] in group)
        number, at = int(flat[k]), int(begin[k] - begins[flat[k]])
        length = int(flats[number].length[0]) if number < len(flats) else 0
        raise SourceError(
            f"{where}: group {g}: {names[k]} {list(every[k])} needs elements [{at}, {at + int(part[k])}) of "
            f"each rank's flat group {number}, which has {length}; "
            f"all parameters need {total} a rank, the flat groups have {have}"
        )
    if total != have:
        raise SourceError(
            f"{where}: group {int(np.searchsorted(ends, total, 'right'))}: parameters need {total} elements "
            f"a rank, the flat groups have {have}"
        )
    _check_equal_lengths(flats, where)
    edges = np.searchsorted(flat, np.arange(len(flats)))  # what has no elements may stand past the last flat
    out = []
    for g, f in enumerate(flats):
        own = slice(int(edges[g]), int(edges[g + 1]) if g + 1 < len(flats) else len(names))
        out.append(Placed(f, names[own], every[own], numel[own], (begin - begins[flat])[own], sliced=True))
    return out


def _check_equal_lengths(flats: Sequence[Flat], where: str) -> None:
    """At stage 3 every rank holds as much of a flat group as rank 0."""
    for g, flat in enumerate(flats):
        odd = np.flatnonzero(flat.length != flat.length[0])
        if len(odd):
            r = int(odd[0])
            raise SourceError(
                f"{where}: group {g}: rank {r} holds {flat.length[r]} elements, rank 0 {flat.length[0]}"
            )
