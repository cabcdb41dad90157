"""Reads single elements by position: an optimizer's step, and samples of what is stored more than once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Entry, Replica
from ..dtypes import DTYPES, DType, bfloat16, float16, float32
from ..errors import SourceError
from ..extents import Extent, File
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


def difference(copies: Mapping[str, View], masters: Mapping[str, View], count: int = POSITIONS) -> str | None:
    """The first of the sampled elements, `count` of each, in which a copy is not its master, in words."""
    got = sampled_bytes([*copies.values()], count)
    wanted = sampled_bytes([masters[n] for n in copies], count)
    for n, have, master in zip(copies, got, wanted, strict=True):
        kinds = copies[n].dtype, masters[n].dtype
        for i, a, b in zip(positions(copies[n], count), have, master, strict=True):
            x, y = number(a, kinds[0]), number(b, kinds[1])
            if not same(x, y, kinds[0]):
                return f"{n}: element {i} of `module` is {x} ({kinds[0]}), its master is {y} ({kinds[1]})"
    return None


def one_axis(entries: Mapping[str, Entry]) -> dict[str, View]:
    """The views of entries, each of one axis."""
    return {n: e.build().reshape((math.prod(e.shape),)) for n, e in entries.items()}


def positions(view: View, count: int = POSITIONS) -> list[int]:
    """The elements that are compared of a view, counted as they would lie dense."""
    return sorted({k * (view.numel - 1) // (count - 1) for k in range(count)}) if view.numel else []


def sampled_bytes(views: Sequence[View], count: int = POSITIONS) -> list[tuple[bytes, ...]]:
    """`count` elements of each view, those at its `positions`."""
    return stored_at([(view, positions(view, count)) for view in views])


class Built(Protocol):
    """What has a view."""

    def build(self) -> View: ...


class Agreement:
    """Pairs of what must hold the same elements. Some of them are compared at once; a run compares the rest
    (`replicas`)."""

    def __init__(self, where: str, replicas: str = "equal") -> None:
        """`replicas`: as in Options."""
        self._where, self._taken = where, replicas
        self._pairs: list[Replica] = []

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """The pairs."""
        return tuple(self._pairs)

    def add(self, what: str, a: Built, b: Built, *, always: bool = False) -> None:
        """`what` holds in `a` what it holds in `b`; `always` as in Replica."""
        self._pairs.append(Replica(what, a.build, b.build, always))

    def check(self) -> None:
        """Raises SourceError for the first pair that differs, unless the first of each is taken anyway."""
        if self._taken == "first":
            return
        seen = samples(make for pair in self._pairs for make in (pair.kept, pair.other))
        for pair in self._pairs:
            if next(seen) != next(seen):
                raise SourceError(f"{self._where}: {pair.what}: two values: which one is meant is in doubt")


def samples(made: Iterable[Callable[[], View]]) -> Iterator[tuple[bytes, ...]]:
    """OF_ONE elements of each."""
    return iter(sampled_bytes([make() for make in made], OF_ONE))


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


def stored_at(wanted: Sequence[tuple[View, Sequence[int]]]) -> list[tuple[bytes, ...]]:
    """The bytes of elements of each view, counted as they would lie dense; each file is opened once."""
    runs: list[tuple[int, int]] = []
    by_path: dict[str, list[int]] = {}
    for view, at in wanted:
        for extent, offset, nbytes in located(view, at):
            if not isinstance(extent.where, File):
                raise SourceError("an element in memory is not sampled")
            by_path.setdefault(extent.where.path, []).append(len(runs))
            runs.append((offset, nbytes))
    out = [b""] * len(runs)
    for path, own in by_path.items():
        for k, data in zip(own, read_all(path, [runs[k] for k in own]), strict=True):
            out[k] = data
    rest = iter(out)
    return [tuple(next(rest) for _ in at) for _, at in wanted]


def located(view: View, at: Sequence[int]) -> list[tuple[Extent, int, int]]:
    """Where elements of a view lie, counted as they would lie dense: the extent, and the offset and number of
    bytes in its file."""
    if not len(at):
        return []
    view = view if view.shape else view.reshape((1,))
    index = np.stack(np.unravel_index(np.array(at, np.int64), view.shape), axis=1)
    inside = (view.origin <= index[:, None]) & (index[:, None] < view.origin + view.size)
    row = inside.all(axis=2).argmax(axis=1)
    element = view.offset[row] + ((index - view.origin[row]) * view.stride[row]).sum(axis=1)
    found = zip(view.extent[row].tolist(), view.stored[row].tolist(), element.tolist(), strict=True)
    sizes = ((view.extents[i], DTYPES[code].itemsize, k) for i, code, k in found)
    return [(extent, extent.offset + k * size, size) for extent, size, k in sizes]


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
