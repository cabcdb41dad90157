"""Views: tensors described by where their elements lie, and the ops that rearrange the description.

A View is shape + dtype + fragments. A fragment is a box of the view (origin, size) and where its
elements lie in one extent (stored dtype, element offset, element strides). Fragments tile the view:
they are disjoint and cover it. A fragment without an extent (index ZERO) is zeros: `pad` makes those.

Fragments are the rows of one int64 array, so that an op on 10,000 of them is a few vector operations:

    [extent, stored dtype code, element offset, origin * ndim, size * ndim, stride * ndim]

Law: no op reads, moves or copies an element; each says in its docstring which element the result
holds, and the tests check that sentence against numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES, DType, castable, exact
from .errors import ViewError
from .extents import Extents

Rows = NDArray[np.int64]

ZERO = -1
"""The extent index of a fragment that is zeros."""

MAX_FRAGMENTS = 1 << 22
"""The most fragments one `merge` may cut a view into."""

_EXTENT, _STORED, _OFFSET, _BOX = 0, 1, 2, 3
_NEW = -1  # among the axes to pick: one that the result adds


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor of `shape` and `dtype` whose elements lie in `extents` as `rows` say (module docstring).

    `held`: the fragments as they were last cut. A reshape cuts none of them: their boxes stay those of the
    shape before it, `grouping` (None: of `shape`), until an op needs the new axes. Dense copies never do."""

    shape: tuple[int, ...]
    dtype: DType
    extents: Extents
    held: Rows
    grouping: tuple[int, ...] | None = None
    _boxed: View | None = field(default=None, init=False, repr=False)  # what `boxed` found, kept

    # ---- what a view is ----

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The shape that the boxes of `held` are boxes of."""
        return self.shape if self.grouping is None else self.grouping

    @property
    def rows(self) -> Rows:
        """The fragments, in boxes of `shape`."""
        return self.boxed().held

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the dense result."""
        return self.numel * self.dtype.itemsize

    @property
    def origin(self) -> Rows:
        """Where each fragment's box starts: [fragments, ndim]."""
        return self.rows[:, _BOX : _BOX + self.ndim]

    @property
    def size(self) -> Rows:
        """The shape of each fragment's box: [fragments, ndim]."""
        return self.rows[:, _BOX + self.ndim : _BOX + 2 * self.ndim]

    @property
    def stride(self) -> Rows:
        """The strides of each fragment in its extent, in stored elements: [fragments, ndim]."""
        return self.rows[:, _BOX + 2 * self.ndim :]

    @property
    def extent(self) -> Rows:
        """The index of each fragment's extent in `extents`; ZERO for zeros: [fragments]."""
        return self.rows[:, _EXTENT]

    @property
    def stored(self) -> Rows:
        """The dtype code each fragment is stored in: [fragments]."""
        return self.rows[:, _STORED]

    @property
    def offset(self) -> Rows:
        """The first element of each fragment in its extent, in stored elements: [fragments]."""
        return self.rows[:, _OFFSET]

    def __repr__(self) -> str:
        return f"View({self.dtype}{list(self.shape)}, {len(self.held)} fragments)"

    # ---- the ops ----

    def narrow(self, axis: int, start: int, length: int) -> View:
        """result[.., i, ..] == self[.., start + i, ..] for i in [0, length)."""
        axis = self._axis(axis)
        n = self.shape[axis]
        if start < 0 or length < 0 or start + length > n:
            raise ViewError(f"narrow on axis {axis}: [{start}, {start + length}) is outside {self.shape}")
        if length == n:
            return self
        shape = (*self.shape[:axis], length, *self.shape[axis + 1 :])
        if self.grouping is not None and len(self.grouping) == 1 and math.prod(self.shape[:axis]) == 1:
            # A range of the outermost axis is a range of the flat elements: no need to cut boxes.
            step = math.prod(self.shape[axis + 1 :])
            flat = View(self.grouping, self.dtype, self.extents, self.held)
            return flat.narrow(0, start * step, length * step).reshape(shape)
        o, s, t = _box(self.ndim, axis)
        r = self.rows
        if len(r) == 1 and length:  # the one fragment is the whole view
            r = r.copy()
            r[0, _OFFSET] += start * r[0, t]
            r[0, s] = length
            return View(shape, self.dtype, self.extents, r)
        low = np.maximum(r[:, o], start)
        high = np.minimum(r[:, o] + r[:, s], start + length)
        keep = high > low
        if not keep.all():
            r, low, high = r[keep], low[keep], high[keep]
        else:
            r = r.copy()
        r[:, _OFFSET] += (low - r[:, o]) * r[:, t]
        r[:, o] = low - start
        r[:, s] = high - low
        return View(shape, self.dtype, self.extents, r)

    def part(self, axis: int, index: int, count: int) -> View:
        """The `index`-th of `count` equal parts along `axis`; a ViewError when they are not equal."""
        n = self.shape[self._axis(axis)]
        if n % count:
            raise ViewError(f"part on axis {axis}: {n} does not divide by {count}, shape {self.shape}")
        return self.narrow(axis, index * (n // count), n // count)

    def permute(self, axes: Sequence[int]) -> View:
        """result.shape[k] == self.shape[axes[k]]; result[i..] == self[j..] where j[axes[k]] == i[k]."""
        if sorted(axes) != list(range(self.ndim)):
            raise ViewError(f"permute: {tuple(axes)} is no permutation of the axes of {self.shape}")
        return self._pick(axes)

    @property
    def T(self) -> View:
        """The transpose of a two-axis view."""
        if self.ndim != 2:
            raise ViewError(f"T: wanted two axes, got {self.shape}")
        return self.permute((1, 0))

    def split(self, axis: int, inner: int) -> View:
        """Axis n becomes (n // inner, inner): result[.., i, j, ..] == self[.., i * inner + j, ..].

        A fragment becomes at most three: the tail of its first row, whole rows, the head of its last."""
        axis = self._axis(axis)
        n, d = self.shape[axis], self.ndim
        if inner < 1 or n % inner:
            raise ViewError(f"split on axis {axis}: {n} does not divide by {inner}, shape {self.shape}")
        shape = (*self.shape[:axis], n // inner, inner, *self.shape[axis + 1 :])
        o, s, t = _box(d, axis)
        outer, within = _box(d + 1, axis), _box(d + 1, axis + 1)
        old = self.rows
        rows = old.take(_columns(d, (*range(axis + 1), *range(axis, d))), axis=1)

        def cut(keep: NDArray[np.bool_], row: Rows, count: Rows, col: Rows, width: Rows) -> Rows:
            """The boxes [row, row + count) x [col, col + width) of the fragments to keep."""
            out = rows[keep]
            row, count, col, width = row[keep], count[keep], col[keep], width[keep]
            start, stride = old[keep, o], old[keep, t]
            out[:, _OFFSET] += (row * inner + col - start) * stride
            out[:, outer[0]], out[:, outer[1]], out[:, outer[2]] = row, count, stride * inner
            out[:, within[0]], out[:, within[1]], out[:, within[2]] = col, width, stride
            return out

        start = old[:, o]
        stop = start + old[:, s]
        row, col = np.divmod(start, inner)
        last, over = np.divmod(stop, inner)
        first = row + (col > 0)
        none = np.zeros_like(start)
        one, full = none + 1, none + inner
        pieces = (
            (col > 0, row, one, col, np.minimum(stop, first * inner) - start),
            (last > first, first, last - first, none, full),
            ((last >= first) & (over > 0), last, one, none, over),
        )
        parts = [cut(*piece) for piece in pieces if piece[0].any()]
        return View(shape, self.dtype, self.extents, _stacked(parts, d + 1))

    def merge(self, axis: int) -> View:
        """Axes (m, n) at `axis` become m * n: result[.., i * n + j, ..] == self[.., i, j, ..].

        Where the two axes of a fragment are not one stride, it is cut along the outer one, a fragment
        an index; a ViewError past MAX_FRAGMENTS."""
        axis = self._axis(axis)
        if axis + 1 >= self.ndim:
            raise ViewError(f"merge on axis {axis}: no axis after it in {self.shape}")
        d, inner = self.ndim, self.shape[axis + 1]
        shape = (*self.shape[:axis], self.shape[axis] * inner, *self.shape[axis + 2 :])
        r = self.rows
        (o, s, t), (o2, s2, t2) = _box(d, axis), _box(d, axis + 1)
        joined = (r[:, s] == 1) | ((r[:, s2] == inner) & ((inner == 1) | (r[:, t] == inner * r[:, t2])))
        if not joined.all():
            times = np.where(joined, 1, r[:, s])
            total = int(times.sum())
            if total > MAX_FRAGMENTS:
                raise ViewError(
                    f"merge on axis {axis} of {self.shape} needs {total} fragments, more than {MAX_FRAGMENTS}"
                )
            step = np.arange(total) - np.repeat(np.cumsum(times) - times, times)
            cut = np.repeat(~joined, times)
            r = np.repeat(r, times, axis=0)
            r[:, _OFFSET] += step * r[:, t]
            r[:, o] += step
            r[cut, s] = 1
        out = r.take(_columns(d, (*range(axis + 1), *range(axis + 2, d))), axis=1)
        origin, size, stride = _box(d - 1, axis)
        out[:, origin] = r[:, o] * inner + r[:, o2]
        out[:, size] = r[:, s] * r[:, s2]
        # The joined stride is the inner one, or the outer one where the inner axis is a unit.
        out[:, stride] = np.where(r[:, s2] == 1, r[:, t], r[:, t2])
        return View(shape, self.dtype, self.extents, out)

    def reshape(self, shape: Sequence[int]) -> View:
        """result.ravel()[i] == self.ravel()[i]; fragments are cut when an op needs the new axes."""
        shape = tuple(shape)
        if math.prod(shape) != self.numel or any(n < 0 for n in shape):
            raise ViewError(f"reshape: {self.shape} has {self.numel} elements, {shape} {math.prod(shape)}")
        if shape == self.shape:
            return self
        if self.numel == 0:
            return View(shape, self.dtype, self.extents, no_rows(len(shape)))
        return View(
            shape, self.dtype, self.extents, self.held, None if self.held_shape == shape else self.held_shape
        )

    def boxed(self) -> View:
        """The same view with its fragments cut to boxes of `shape`: splits and merges of neighbouring axes.

        Raises ViewError past MAX_FRAGMENTS."""
        if self.grouping is None:
            return self
        if self._boxed is not None:
            return self._boxed
        found = self._cut_to_shape()
        object.__setattr__(self, "_boxed", found)
        return found

    def _cut_to_shape(self) -> View:
        """`boxed`, worked out."""
        shape = self.shape
        whole = View(self.held_shape, self.dtype, self.extents, self.held)
        if len(self.held) == 1:
            dense = whole._dense(shape)
            if dense is not None:
                return dense
        out = whole._pick([a for a, n in enumerate(whole.shape) if n != 1])
        axis = 0
        for old, new in _groups(out.shape, [n for n in shape if n != 1]):
            for _ in range(old - 1):
                out = out.merge(axis)
            for k in range(len(new) - 1):
                out = out.split(axis + k, math.prod(new[k + 1 :]))
            axis += len(new)
        return out._with_units(shape, [a for a, n in enumerate(shape) if n == 1])

    def unsqueeze(self, axis: int) -> View:
        """A unit axis before `axis`: result[.., 0, ..] == self[.., ..]."""
        if not 0 <= axis <= self.ndim:
            raise ViewError(f"unsqueeze: axis {axis} is outside {self.shape}")
        return self._with_units((*self.shape[:axis], 1, *self.shape[axis:]), [axis])

    def pad(self, axis: int, before: int, after: int) -> View:
        """Zeros of the view's dtype around `axis`: result[.., before + i, ..] == self[.., i, ..]."""
        axis = self._axis(axis)
        if before < 0 or after < 0:
            raise ViewError(f"pad on axis {axis}: negative padding ({before}, {after})")
        shape = self.shape
        parts = [zeros((*shape[:axis], n, *shape[axis + 1 :]), self.dtype) for n in (before, after)]
        return cat([parts[0], self, parts[1]], axis) if before or after else self

    def cast(self, dtype: DType) -> View:
        """The same values as `dtype`, rounded to nearest even.

        A ViewError for pairs that no kernel converts (integers, bools), and for a second rounding, which
        could give another value than the direct cast."""
        if dtype is self.dtype:
            return self
        held = self.held
        codes = held[:, _STORED]
        if ZERO in held[:, _EXTENT].tolist():
            zero = held[:, _EXTENT] == ZERO
            codes, held = codes[~zero], held.copy()
            held[zero, _STORED] = dtype.code
        for code in set(codes.tolist()):
            _check_cast(code, self.dtype.code, dtype.code)
        return View(self.shape, dtype, self.extents, held, self.grouping)

    def over(self, extents: Extents, first: int = 0) -> View:
        """The same view over a table that holds its own extents from number `first` on."""
        held = self.held
        if first:
            held = held.copy()
            held[held[:, _EXTENT] != ZERO, _EXTENT] += first
        return View(self.shape, self.dtype, extents, held, self.grouping)

    def as_stored(self) -> View:
        """The same elements before they were cast. A ViewError where they are stored in several dtypes."""
        codes = set(self.held[self.held[:, _EXTENT] != ZERO, _STORED].tolist())
        if len(codes) > 1:
            raise ViewError(f"{self}: what must not be rounded lies in {len(codes)} dtypes")
        dtype = DTYPES[codes.pop()] if codes else self.dtype
        return View(self.shape, dtype, self.extents, self.held, self.grouping)

    # ---- internals ----

    def _axis(self, axis: int) -> int:
        if not -self.ndim <= axis < self.ndim:
            raise ViewError(f"axis {axis} is outside {self.shape}")
        return axis % self.ndim

    def _dense(self, shape: tuple[int, ...]) -> View | None:
        """The reshape of a single fragment that lies dense, without cutting; None where it does not."""
        row = self.rows[0].tolist()
        d = self.ndim
        want = 1
        for n, stride in zip(reversed(self.shape), reversed(row[_BOX + 2 * d :]), strict=True):
            if n != 1 and stride != want:
                return None
            want *= n
        head = [row[_EXTENT], row[_STORED], row[_OFFSET]]
        new = head + [0] * len(shape) + list(shape) + dense_strides(shape)
        return View(shape, self.dtype, self.extents, np.array([new], np.int64))

    def _pick(self, axes: Sequence[int]) -> View:
        """The view with these axes in this order; axes left out must be units."""
        axes = tuple(axes)
        rows = self.rows.take(_columns(self.ndim, axes), axis=1)
        return View(tuple(self.shape[a] for a in axes), self.dtype, self.extents, rows)

    def _with_units(self, shape: tuple[int, ...], units: Sequence[int]) -> View:
        """The view with unit axes put in at `units` so that its shape is `shape`."""
        if not units:
            return self
        d = len(shape)
        old = iter(range(self.ndim))
        axes = tuple(_NEW if a in units else next(old) for a in range(d))
        rows = self.rows.take(_columns(self.ndim, axes), axis=1)
        for a in units:
            origin, size, stride = _box(d, a)
            rows[:, origin], rows[:, size], rows[:, stride] = 0, 1, 0
        return View(shape, self.dtype, self.extents, rows)


# ---- views of nothing, and of several ----


def zeros(shape: Sequence[int], dtype: DType) -> View:
    """A view of zeros."""
    shape = tuple(shape)
    if 0 in shape:
        return View(shape, dtype, _NOWHERE, no_rows(len(shape)))
    if max(shape, default=0) >= 1 << 62:  # a config or an option may say anything
        raise ViewError(f"zeros: an axis of {max(shape)} elements is longer than any tensor's")
    row = [ZERO, dtype.code, 0] + [0] * len(shape) + list(shape) + [0] * len(shape)
    return View(shape, dtype, _NOWHERE, np.array([row], np.int64))


def cat(views: Sequence[View], axis: int = 0) -> View:
    """Views one after another along `axis`; they agree in dtype and in every other axis."""
    if not views:
        raise ViewError("cat: no views")
    first = views[0]
    axis = first._axis(axis)
    for v in views[1:]:
        fits = v.shape[:axis] == first.shape[:axis] and v.shape[axis + 1 :] == first.shape[axis + 1 :]
        if v.ndim != first.ndim or not fits:
            raise ViewError(f"cat on axis {axis}: {v.shape} does not fit {first.shape}")
        if v.dtype is not first.dtype:
            raise ViewError(f"cat on axis {axis}: {v.dtype} does not fit {first.dtype}")
    extents, tables, at = first.extents, [], 0
    for v in views:
        own = rows = v.rows
        if len(v.extents) and v.extents is not extents:
            if len(extents):
                extents, moved = extents.union(v.extents)
                new = np.array([*moved, ZERO], np.int64)[rows[:, _EXTENT]]  # index -1 is ZERO itself
                rows = rows.copy()
                rows[:, _EXTENT] = new
            else:
                extents = v.extents
        if at:
            rows = rows.copy() if rows is own else rows
            rows[:, _BOX + axis] += at
        tables.append(rows)
        at += v.shape[axis]
    shape = (*first.shape[:axis], at, *first.shape[axis + 1 :])
    return View(shape, first.dtype, extents, np.concatenate(tables) if len(tables) > 1 else tables[0])


def stack(views: Sequence[View], axis: int = 0) -> View:
    """Views of one shape along a new axis: result[.., k, ..] == views[k][.., ..]."""
    return cat([v.unsqueeze(axis) for v in views], axis)


def dense_strides(shape: Sequence[int]) -> list[int]:
    """Row-major strides in elements."""
    out, step = [0] * len(shape), 1
    for a in range(len(shape) - 1, -1, -1):
        out[a] = step
        step *= shape[a]
    return out


_NOWHERE = Extents()


@lru_cache(maxsize=4096)
def _check_cast(*codes: int) -> None:
    """Raises ViewError where what is stored as the first dtype and is the second cannot become the third."""
    stored, now, wanted = (DTYPES[code] for code in codes)
    if not castable(stored, wanted):
        raise ViewError(f"cast: no conversion from {stored} to {wanted}")
    if not exact(stored, now):
        raise ViewError(f"cast: {stored} was already rounded to {now}; cast it once, to {wanted}")


def _box(ndim: int, axis: int) -> tuple[int, int, int]:
    """The columns of origin, size and stride of one axis in the rows of a view of `ndim` axes."""
    return _BOX + axis, _BOX + ndim + axis, _BOX + 2 * ndim + axis


@lru_cache(maxsize=4096)
def _columns(ndim: int, axes: tuple[int, ...]) -> NDArray[np.intp]:
    """The columns that pick `axes` out of the rows of a view of `ndim` axes; _NEW picks any column."""
    picked = [0 if a == _NEW else _BOX + k * ndim + a for k in range(3) for a in axes]
    return np.array([_EXTENT, _STORED, _OFFSET, *picked], np.intp)


def no_rows(ndim: int) -> Rows:
    """The fragments of a view of `ndim` axes that has no elements."""
    return np.empty((0, _BOX + 3 * ndim), np.int64)


def _stacked(parts: list[Rows], ndim: int) -> Rows:
    return np.concatenate(parts) if parts else no_rows(ndim)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Neighbouring axes of equal product: (how many old axes, the new ones), left to right."""
    out, i, j = [], 0, 0
    while i < len(old):  # no axis is a unit, so that both end at once
        a, b = old[i], new[j]
        i0, j0 = i, j
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= old[i]
                i += 1
            else:
                b *= new[j]
                j += 1
        out.append((i - i0, list(new[j0:j])))
    return out
