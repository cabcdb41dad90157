"""Whether each rank's file holds that rank's partition, as far as stages 1 and 2 can tell.

A file says whose it is only in the name under which torch saved it (`files.check_name`), which not every
file has. At stages 1 and 2 `module` holds a 16-bit copy of all weights: a partition that does not match the
copy in its own place, but matches it in another rank's, is in the wrong file. Stage 3 has no such copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import SourceError
from ...extents import Extents, File
from ...views import View, dense_strides
from ..samples import COMPARED, number, read_all, same, stored_at
from ..torchfile import Tensor
from .partitions import Flat, Placed, Shape, elements

SAMPLES = 8
"""Elements of a partition that are compared."""

PAIRS = 1 << 12
"""The most pairs of a file and another rank's place that are compared."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Some elements of one rank's partition: the parameter, their places `at` in the partition, and the copy
    of the parameter in `module`."""

    name: str
    at: tuple[int, ...]
    copy: View
    first: int  # of the parameter, the element that lies at 0 of the partition; below 0 where it begins later

    def values(self) -> list[float]:
        """The copy's elements."""
        (data,) = stored_at([(self.copy, [self.first + i for i in self.at])])
        return [number(x, self.copy.dtype) for x in data]


def sampled(
    shapes: Sequence[Mapping[str, Shape]], alignment: Sequence[Sequence[int]] | None, world: int
) -> list[str]:
    """The parameters in the middle of each rank's partitions, whose copies `check_order` looks at."""
    names: list[str] = []
    for g, group in enumerate(shapes):
        after = alignment[g] if alignment is not None and g < len(alignment) else [0] * len(group)
        if len(after) != len(group) or not group:
            continue  # is refused where the lengths are checked
        where = f"param_shapes[{g}]"
        stop = np.cumsum(elements(map(math.prod, group.values()), where) + elements(after, where))
        part = -(-int(stop[-1]) // (2 * world)) * 2
        low = np.arange(world, dtype=np.int64) * part
        middle = (low + np.minimum(low + part, stop[-1])) // 2
        found = np.unique(np.searchsorted(stop, middle[low < stop[-1]], "right"))
        keys = list(group)
        names += [keys[int(k)] for k in found]
    return names


def comparable(copy: object) -> bool:
    """Whether single elements of what `module` holds can be read: dense, of a dtype that is compared."""
    if not isinstance(copy, Tensor) or copy.storage.extent < 0 or copy.dtype.name not in COMPARED:
        return False
    return list(copy.stride) == dense_strides(copy.shape)


def check_order(
    layout: Iterable[Placed], extents: Extents, copies: Mapping[str, View], paths: Sequence[str]
) -> list[str]:
    """Compare elements of each partition with the copies, views of one axis; `paths`: each rank's file.

    Raises SourceError for a file that holds another rank's partition. Returns a note where copies differ in
    another way."""
    differ: list[str] = []
    for placed in layout:
        flat = placed.flat
        samples = {r: s for r in range(flat.world) if (s := _sample(placed, r, copies)) is not None}
        held = {r: s.values() for r, s in samples.items()}
        odd = [r for r, s in samples.items() if not _agrees(flat, r, s, held[r], extents)]
        for r in odd:
            for q in [q for q in samples if q != r][: PAIRS // len(odd)]:
                if len({*held[q]}) > 1 and _agrees(flat, r, samples[q], held[q], extents):
                    raise SourceError(
                        f"{paths[r]}: holds the partition of rank {q}, as the copy of {samples[q].name} in "
                        "`module` tells: it was swapped with, or copied from, another rank's file"
                    )
        differ += [samples[r].name for r in odd]
    if not differ:
        return []
    return [
        f"`module` is no copy of the masters: {differ[0]} differs, {len(differ)} of those compared; "
        "files of two runs, or weights that were changed behind the optimizer"
    ]


def _sample(placed: Placed, rank: int, copies: Mapping[str, View]) -> _Sample | None:
    """Elements of a rank's partition, of the parameter that has most of it among those with a copy."""
    low = int(placed.flat.length[:rank].sum())
    high = low + int(placed.flat.length[rank])
    best: _Sample | None = None
    most = 0
    first = int(np.searchsorted(placed.start + placed.numel, low, "right"))
    last = int(np.searchsorted(placed.start, high, "left"))
    for k in range(first, last):
        copy = copies.get(placed.names[k])
        if copy is None or copy.numel != placed.numel[k]:
            continue
        start = int(placed.start[k])
        begin, end = max(low, start), min(high, start + int(placed.numel[k]))
        if end - begin > most:
            most = end - begin
            at = sorted({begin - low + j * (most - 1) // (SAMPLES - 1) for j in range(SAMPLES)})
            best = _Sample(placed.names[k], tuple(at), copy, low - start)
    return best


def _agrees(flat: Flat, rank: int, sample: _Sample, wanted: Sequence[float], extents: Extents) -> bool:
    """Whether the sampled elements of a rank's file, cast, are those of the copy."""
    if sample.at[-1] >= flat.length[rank]:
        return False
    extent = extents[int(flat.extent[rank])]
    assert isinstance(extent.where, File)  # a partition lies in no other place
    size = flat.dtype.itemsize
    start = extent.offset + int(flat.offset[rank]) * size
    data = read_all(extent.where.path, [(start + i * size, size) for i in sample.at])
    masters = (number(x, flat.dtype) for x in data)
    return all(same(c, m, sample.copy.dtype) for c, m in zip(wanted, masters, strict=True))
