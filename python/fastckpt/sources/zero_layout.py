"""Where the elements of a parameter lie in the partitions that ZeRO ranks saved.

Law: the formulas are those of DeepSpeed's partitioning (stage_1_and_2.py, stage3.py, zero_to_fp32.py);
lengths are checked here, once, and what fits no formula is a SourceError. Padding is never read.

Stages 1 and 2: a group's flat is the parameters in `param_shapes` order, each followed by its alignment
padding; N elements, zero-padded to a multiple of 2 * world, cut in `world` equal partitions. Stage 3: rank
r holds elements [r * p, (r + 1) * p) of each parameter, p = ceil(numel / world), the tail is garbage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..dtypes import DType
from ..errors import SourceError
from ..extents import Extents
from ..views import Rows, View, runs

Shape = tuple[int, ...]


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


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one parameter lies: in flat number `flat`, from element `start`. That is an element of the whole
    flat at stages 1 and 2, and of every rank's partition at stage 3 (`sliced`)."""

    flat: int
    start: int
    shape: Shape
    sliced: bool

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def elements(self, flats: Sequence[Flat], extents: Extents) -> View:
        """The parameter as one axis of `numel` elements."""
        gather = _sliced if self.sliced else _chained
        return gather(flats[self.flat], extents, self.start, self.numel)

    def view(self, flats: Sequence[Flat], extents: Extents) -> View:
        """The parameter in its shape."""
        return self.elements(flats, extents).reshape(self.shape)


def _chained(flat: Flat, extents: Extents, start: int, numel: int) -> View:
    """Elements [start, start + numel) of the ranks' partitions one after another."""
    stop = np.cumsum(flat.length)
    begin = stop - flat.length
    first = int(np.searchsorted(stop, start, "right"))
    last = int(np.searchsorted(begin, start + numel, "left")) if numel else first
    ranks = slice(first, last)
    low = np.maximum(begin[ranks], start)
    high = np.minimum(stop[ranks], start + numel)
    return runs(extents, flat.dtype, flat.extent[ranks], flat.offset[ranks] + low - begin[ranks], high - low)


def _sliced(flat: Flat, extents: Extents, start: int, numel: int) -> View:
    """A parameter of `numel` elements cut over all ranks, each piece from `start` of its partition."""
    part = -(-numel // flat.world)
    ranks = slice(0, -(-numel // part) if part else 0)
    count = np.minimum(part, numel - part * np.arange(ranks.stop, dtype=np.int64))
    return runs(extents, flat.dtype, flat.extent[ranks], flat.offset[ranks] + start, count)


def chained(
    shapes: Sequence[Mapping[str, Shape]],
    paddings: Sequence[Sequence[int]] | None,
    flats: Sequence[Flat],
    where: str,
) -> dict[str, Piece]:
    """Stages 1 and 2: name -> piece, and every group's lengths checked.

    `paddings`: elements after each parameter of each group (`param_alignment_paddings`); None is none."""
    if len(shapes) != len(flats) or (paddings is not None and len(paddings) != len(shapes)):
        raise SourceError(
            f"{where}: {len(shapes)} groups in param_shapes, {len(flats)} groups of masters"
            + (f", {len(paddings)} in param_alignment_paddings" if paddings is not None else "")
        )
    out: dict[str, Piece] = {}
    for g, (group, flat) in enumerate(zip(shapes, flats, strict=True)):
        after = paddings[g] if paddings is not None else [0] * len(group)
        if len(after) != len(group):
            raise SourceError(
                f"{where}: group {g} has {len(group)} parameters, {len(after)} alignment paddings"
            )
        at = 0
        for (name, shape), pad in zip(group.items(), after, strict=True):
            out[name] = Piece(g, at, shape, sliced=False)
            at += math.prod(shape) + pad
        _check_chain(flat.length, at, f"{where}: group {g}", len(group))
    return out


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


def sliced(shapes: Sequence[Mapping[str, Shape]], flats: Sequence[Flat], where: str) -> dict[str, Piece]:
    """Stage 3: name -> piece, and every sub-group's length checked on every rank.

    Sub-groups are one stream in order, so that a flat for each dict, for each optimizer group or for all
    (old versions) are read alike; a parameter across two of them is refused, DeepSpeed writes none."""
    world = flats[0].world if flats else 1
    out: dict[str, Piece] = {}
    flat, at = 0, 0
    paired = len(shapes) == len(flats)
    for g, group in enumerate(shapes):
        for name, shape in group.items():
            part = -(-math.prod(shape) // world)
            while flat < len(flats) and part and at == flats[flat].length[0]:
                flat, at = flat + 1, 0
            if part and (flat == len(flats) or at + part > flats[flat].length[0] or (paired and flat != g)):
                have = int(flats[flat].length[0]) if flat < len(flats) else 0
                raise SourceError(
                    f"{where}: group {g}: {name} {list(shape)} needs elements [{at}, {at + part}) of each "
                    f"rank's flat group {flat}, which has {have}; "
                    f"all parameters need {_parts(shapes, world)} a rank, "
                    f"the flat groups have {sum(int(f.length[0]) for f in flats)}"
                )
            out[name] = Piece(min(flat, len(flats) - 1), at, shape, sliced=True)
            at += part
    rest = sum(int(f.length[0]) for f in flats[flat:]) - at
    if rest:
        raise SourceError(
            f"{where}: group {flat}: parameters need {_parts(shapes, world)} elements a rank, "
            f"the flat groups have {_parts(shapes, world) + rest}"
        )
    for g, f in enumerate(flats):
        odd = np.flatnonzero(f.length != f.length[0])
        if len(odd):
            raise SourceError(
                f"{where}: group {g}: rank {odd[0]} holds {f.length[odd[0]]} elements, rank 0 {f.length[0]}"
            )
    return out


def _parts(shapes: Sequence[Mapping[str, Shape]], world: int) -> int:
    return sum(-(-math.prod(s) // world) for group in shapes for s in group.values())
