"""Random cuts of a tensor, each stored dense elsewhere, read the other way round: the tensor itself."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from fastckpt import dtypes
from fastckpt.errors import SourceError
from fastckpt.extents import Buffer, Extent, Extents
from fastckpt.joining import inverse
from fastckpt.joining.inverse import joined, kept, other, pieces_of
from fastckpt.stored import strided
from reading import read


def stored(arrays):
    """Views of numpy arrays that lie dense in a buffer each."""
    buffers = [Buffer(a, a.ctypes.data, a.nbytes) for a in arrays]
    extents = Extents(Extent(b, 0, b.nbytes, str(k)) for k, b in enumerate(buffers))
    return [strided(extents, k, dtypes.int32, a.shape) for k, a in enumerate(arrays)], extents


def phantom(shape):
    nbytes = 4 * math.prod(shape)
    extents = Extents([Extent(Buffer(None, 0, nbytes), 0, nbytes, "x")])
    return strided(extents, 0, dtypes.int32, shape), {extents[0]: "x"}


def back(shape, views, arrays):
    _, known = phantom(shape)
    known = {views[0].extents[0]: "x"}
    held, extents = stored(arrays)
    pieces = [p for view, dense in zip(views, held, strict=True) for _, p in pieces_of(view, dense, known)]
    found, again = joined("x", shape, pieces, extents)
    assert found.numel + sum(kept(found, box).numel for box in again) == sum(map(np.count_nonzero, arrays))
    for box in again:
        assert (read(kept(found, box)) == read(other(found, box))).all()
    return found


def factors(n, rng):
    out = []
    while n > 1:
        f = rng.choice([d for d in range(2, n + 1) if n % d == 0])
        out.append(f)
        n //= f
    return tuple(out) or (1,)


def some_ops(view, array, rng):
    """The same random ops on the view and on numpy."""
    for _ in range(rng.randrange(5)):
        op = rng.choice(["permute", "reshape", "pad"])
        if op == "permute":
            axes = rng.sample(range(array.ndim), array.ndim)
            view, array = view.permute(axes), array.transpose(axes)
        elif op == "reshape":
            shape = factors(array.size, rng)
            view, array = view.reshape(shape), array.reshape(shape)
        else:
            axis, n = rng.randrange(array.ndim), rng.randrange(3)
            view = view.pad(axis, 0, n)
            array = np.pad(array, [(0, n if a == axis else 0) for a in range(array.ndim)])
    return view, array


@pytest.mark.parametrize("seed", range(60))
def test_random_cuts_read_back(seed):
    rng = random.Random(seed)
    shape = tuple(rng.choice([1, 2, 3, 4, 6, 8]) for _ in range(rng.randrange(1, 4)))
    array = np.arange(1, math.prod(shape) + 1, dtype=np.int32).reshape(shape)
    view, _ = phantom(shape)
    view, array_now = some_ops(view, array, rng)
    axis = rng.randrange(array_now.ndim)
    cuts = sorted({0, array_now.shape[axis], *(rng.randrange(array_now.shape[axis] + 1) for _ in range(3))})
    views, arrays = [], []
    for start, stop in itertools.pairwise(cuts):
        for _ in range(rng.choice([1, 1, 2])):  # some twice, as replicas are
            index = tuple(slice(start, stop) if a == axis else slice(None) for a in range(array_now.ndim))
            one, dense = some_ops(view.narrow(axis, start, stop - start), array_now[index], rng)
            views.append(one)
            arrays.append(np.ascontiguousarray(dense))
    order = rng.sample(range(len(views)), len(views))
    got = back(shape, [views[k] for k in order], [arrays[k] for k in order])
    assert got.shape == shape
    assert (read(got) == array).all()


def test_what_overlaps_is_taken_once():
    """Rows of one cut and columns of another, neither of which holds all."""
    array = np.arange(1, 49, dtype=np.int32).reshape(6, 8)
    view, _ = phantom((6, 8))
    views = [view.narrow(0, 0, 4), view.narrow(1, 3, 5), view.narrow(0, 2, 4).narrow(1, 0, 6).T]
    arrays = [array[:4], array[:, 3:], array[2:, :6].T]
    assert (read(back((6, 8), views, [np.ascontiguousarray(a) for a in arrays])) == array).all()


def test_cuts_that_no_axes_of_the_tensor_have_in_common(monkeypatch):
    """Of steps 6 and 4 in a row of 24 neither divides the other: one of them goes element by element."""
    array = np.arange(1, 25, dtype=np.int32)
    view, _ = phantom((24,))
    views = [view.reshape((4, 6)).permute((1, 0)), view.reshape((6, 4)).permute((1, 0))]
    arrays = [np.ascontiguousarray(array.reshape(4, 6).T), np.ascontiguousarray(array.reshape(6, 4).T)]
    assert (read(back((24,), views, arrays)) == array).all()
    monkeypatch.setattr(inverse, "MAX_FRAGMENTS", 5)
    with pytest.raises(SourceError, match="x: 6 elements 4 apart would each be a fragment"):
        back((24,), views, arrays)


def test_missing_elements_are_an_error():
    array = np.arange(1, 49, dtype=np.int32).reshape(6, 8)
    view, _ = phantom((6, 8))
    with pytest.raises(SourceError, match="the shards hold 30 of its 48 elements"):
        back((6, 8), [view.narrow(1, 0, 5)], [np.ascontiguousarray(array[:, :5])])
    first = back((6, 8), [view.narrow(0, 0, 5)], [array[:5]])
    assert first.shape == (5, 8) and (read(first) == array[:5]).all()
    with pytest.raises(SourceError, match="the shards hold 40 of its 48 elements"):
        back((6, 8), [view.narrow(0, 1, 5)], [np.ascontiguousarray(array[1:])])
