"""Reads single elements by position: an optimizer's step, and samples of what is stored twice."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Entry
from ..dtypes import DTYPES, DType, bfloat16, float16, float32
from ..errors import SourceError
from ..extents import Extents, File
from ..views import View

POSITIONS = 4
"""Elements compared in each tensor: the first, the last, and evenly between."""

OF_ONE = 16
"""Elements compared of what must be the same element by element."""

COMPARED = {
    "float32": "<f4",
    "float64": "<f8",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
}
"""The dtypes whose elements are compared, as numpy reads them; bfloat16 by its bits."""


def check_copy(copies: Mapping[str, View], masters: Mapping[str, View], where: str) -> None:
    """Compare sampled elements of each copy with its master, cast; both views have one axis.

    Raises SourceError naming the first tensor that differs."""
    if found := difference(copies, masters):
        raise SourceError(f"{where}: {found}: not of the same step")


def difference(copies: Mapping[str, View], masters: Mapping[str, View]) -> str | None:
    """The first of the sampled elements in which a copy is not its master, in words."""
    got = sampled_bytes([*copies.values()])
    wanted = sampled_bytes([masters[n] for n in copies])
    for n, have, master in zip(copies, got, wanted, strict=True):
        kinds = copies[n].dtype, masters[n].dtype
        for i, a, b in zip(_positions(copies[n]), have, master, strict=True):
            x, y = number(a, kinds[0]), number(b, kinds[1])
            if not same(x, y, kinds[0]):
                return f"{n}: element {i} of `module` is {x} ({kinds[0]}), its master is {y} ({kinds[1]})"
    return None


def one_axis(entries: Mapping[str, Entry]) -> dict[str, View]:
    """The views of entries, each of one axis."""
    return {n: e.build().reshape((math.prod(e.shape),)) for n, e in entries.items()}


def _positions(view: View, count: int = POSITIONS) -> list[int]:
    """The elements that are compared of a view of one axis."""
    return sorted({k * (view.numel - 1) // (count - 1) for k in range(count)}) if view.numel else []


def sampled_bytes(views: Sequence[View], count: int = POSITIONS) -> list[tuple[bytes, ...]]:
    """`count` elements of each view of one axis, evenly from the first to the last."""
    at = [_positions(view, count) for view in views]
    found = iter(stored_at([(view, i) for view, own in zip(views, at, strict=True) for i in own]))
    return [tuple(next(found) for _ in own) for own in at]


class Built(Protocol):
    """What has a view."""

    def build(self) -> View: ...


class Agreement:
    """Pairs of what must hold the same elements, of which some are compared at once."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._pairs: list[tuple[str, Built, Built]] = []

    def add(self, what: str, a: Built, b: Built) -> None:
        """`what` holds in `a` what it holds in `b`."""
        self._pairs.append((what, a, b))

    def check(self) -> None:
        """Raises SourceError for the first pair that differs."""
        seen = samples(x for _, *pair in self._pairs for x in pair)
        for what, *_ in self._pairs:
            if next(seen) != next(seen):
                raise SourceError(f"{self._where}: {what} has two values: which one is meant is in doubt")


def samples(built: Iterable[Built]) -> Iterator[tuple[bytes, ...]]:
    """OF_ONE elements of each."""
    views = (b.build() for b in built)
    return iter(sampled_bytes([view.reshape((view.numel,)) for view in views], OF_ONE))


def same(copy: float, master: float, dtype: DType) -> bool:
    """Whether `copy` is `master` rounded to `dtype`; NaN is NaN."""
    if np.isnan(master) or np.isnan(copy):
        return bool(np.isnan(master) and np.isnan(copy))
    if dtype is bfloat16:
        bits = int(np.float32(master).view(np.uint32))
        return copy == number(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to_bytes(2, "little"), bfloat16)
    if dtype is float16:
        with np.errstate(over="ignore"):
            return copy == float(np.float32(master).astype(np.float16))
    if dtype is float32:
        return copy == float(np.float32(master))
    return copy == master


def number(data: bytes, dtype: DType) -> float:
    """The one element of `dtype` in `data`. Raises SourceError for a dtype that is not sampled."""
    kind = COMPARED.get(dtype.name)
    if kind is None:
        raise SourceError(f"elements of {dtype} are not compared; wanted one of {', '.join(COMPARED)}")
    value: NDArray[np.generic] = np.frombuffer(data, kind)
    if dtype is bfloat16:
        value = (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return float(value[0])


def stored_at(wanted: Sequence[tuple[View, int]]) -> list[bytes]:
    """The bytes of one element of each one-axis view, each file opened once."""
    by_path: dict[str, list[tuple[int, tuple[int, int]]]] = {}
    for k, (view, i) in enumerate(wanted):
        path, run = _locate(view, i, view.extents)
        by_path.setdefault(path, []).append((k, run))
    out = [b""] * len(wanted)
    for path, items in by_path.items():
        for (k, _), data in zip(items, read_all(path, [run for _, run in items]), strict=True):
            out[k] = data
    return out


def _locate(view: View, i: int, extents: Extents) -> tuple[str, tuple[int, int]]:
    first = view.origin[:, 0]
    row = int(np.flatnonzero((first <= i) & (i < first + view.size[:, 0]))[0])
    element = int(view.offset[row] + (i - view.origin[row, 0]) * view.stride[row, 0])
    extent = extents[int(view.extent[row])]
    if not isinstance(extent.where, File):
        raise SourceError("an element in memory is not sampled")
    size = DTYPES[int(view.stored[row])].itemsize
    return extent.where.path, (extent.offset + element * size, size)


def read_all(path: str, runs: Sequence[tuple[int, int]]) -> list[bytes]:
    """The runs (offset, nbytes) of a file. Raises SourceError when it ends before one does."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            out = [os.pread(fd, nbytes, offset) for offset, nbytes in runs]
        finally:
            os.close(fd)
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}") from None
    for data, (offset, nbytes) in zip(out, runs, strict=True):
        if len(data) != nbytes:
            raise SourceError(f"{path}: ends before byte {offset + nbytes}")
    return out
