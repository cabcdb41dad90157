"""Every op of the view algebra against numpy, over storage cut at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from fastckpt import dtypes, views
from fastckpt.errors import SourceError, ViewError
from fastckpt.extents import Buffer, Extent, Extents, File
from fastckpt.stored import constant, runs, strided
from fastckpt.target import Target
from fastckpt.views import View, cat, stack, zeros
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Ints = NDArray[np.int64]
JUNK = -99
UNSEEN = -7


def read(view: View) -> Ints:
    """The elements of a view of int64; checks that its fragments tile it."""
    out = np.full(view.shape, UNSEEN, np.int64)
    for extent, offset, origin, size, stride in zip(
        view.extent, view.offset, view.origin, view.size, view.stride, strict=True
    ):
        index = np.full(tuple(size), offset, np.int64)
        for axis, step in enumerate(stride):
            along = [1] * view.ndim
            along[axis] = -1
            index = index + np.arange(size[axis]).reshape(along) * step
        box = tuple(slice(o, o + n) for o, n in zip(origin, size, strict=True))
        assert (out[box] == UNSEEN).all(), "fragments overlap"
        out[box] = 0 if extent == views.ZERO else storage(view.extents[extent])[index]
    assert (out != UNSEEN).all(), "fragments leave a hole"
    return out


def storage(extent: Extent) -> Ints:
    assert isinstance(extent.where, Buffer) and isinstance(extent.where.owner, np.ndarray)
    start = extent.offset // 8
    return extent.where.owner.ravel().view(np.int64)[start : start + extent.nbytes // 8]


def extent_of(values: Ints, key: str = "") -> Extent:
    values = np.ascontiguousarray(values)
    return Extent(Buffer(values, values.ctypes.data, values.nbytes), 0, values.nbytes, key)


def cut(array: Ints, at: Sequence[int], junk: int = 1) -> View:
    """A view equal to `array`, stored in pieces cut at these elements, each between junk."""
    flat = array.ravel()
    bounds = [0, *sorted(at), flat.size]
    pieces = [flat[a:b] for a, b in pairwise(bounds)]
    edge = np.full(junk, JUNK, np.int64)
    table = Extents(extent_of(np.concatenate([edge, p, edge]), str(k)) for k, p in enumerate(pieces))
    lengths = np.array([p.size for p in pieces])
    first = np.full(len(pieces), junk)
    return runs(table, dtypes.int64, np.arange(len(pieces)), first, lengths).reshape(array.shape)


def numbers(*shape: int) -> Ints:
    return np.arange(1, math.prod(shape) + 1, dtype=np.int64).reshape(shape)


def equal(view: View, array: Ints) -> bool:
    return view.shape == array.shape and bool((read(view) == array).all())


# ---- random chains ----


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0] or [1]


def grow(array: Ints, times: int) -> bool:
    return array.size * times <= 2000 and array.ndim < 8


def step(random: Random, view: View, array: Ints) -> tuple[View, Ints]:
    """One random op on a view and on the array it stands for."""
    below, pick = random.randrange, random.choice
    d, shape = array.ndim, array.shape
    op = below(11) if d else 5
    axis = below(d) if d else 0
    if op == 0:
        start = below(shape[axis] + 1)
        length = below(shape[axis] - start + 1)
        taken = np.take(array, range(start, start + length), axis)
        return view.narrow(axis, start, length), taken
    if op == 1:
        count = pick(divisors(shape[axis]))
        index = below(count)
        return view.part(axis, index, count), np.split(array, count, axis)[index]
    if op == 2:
        order = random.sample(range(d), d)
        return view.permute(order), array.transpose(order)
    if op == 3 and d < 8:
        inner = pick(divisors(shape[axis]))
        new = (*shape[:axis], shape[axis] // inner, inner, *shape[axis + 1 :])
        return view.split(axis, inner), array.reshape(new)
    if op == 4 and axis + 1 < d:
        new = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
        return view.merge(axis), array.reshape(new)
    if op == 5:
        left, sizes = array.size, []
        for _ in range(below(4)):
            sizes.append(pick(divisors(left)))
            left //= sizes[-1]
        return view.reshape((*sizes, left)), array.reshape(*sizes, left)
    if op == 6 and d < 8:
        axis = below(d + 1)
        return view.unsqueeze(axis), np.expand_dims(array, axis)
    if op == 7 and grow(array, 3):
        before, after = below(3), below(3)
        padded = np.pad(array, [(before, after) if k == axis else (0, 0) for k in range(d)])
        return view.pad(axis, before, after), padded
    if op == 8 and grow(array, 3):
        half = shape[axis] // 2
        joined = np.concatenate([array, np.take(array, range(half), axis), array], axis)
        return cat([view, view.narrow(axis, 0, half), view], axis), joined
    if op == 9 and grow(array, 2):
        axis = below(d + 1)
        return stack([view, view], axis), np.stack([array, array], axis)
    if op == 10 and grow(array, 2):
        other = numbers(*shape) + 5000
        cuts = [other.size // 3, other.size // 2]
        return cat([view, cut(other, cuts)], axis), np.concatenate([array, other], axis)
    return view, array


def chain(random: Random) -> None:
    array = numbers(random.choice([0, 1, 6, 12, 24, 36, 60, 64, 120]))
    view = cut(array, [random.randrange(array.size + 1) for _ in range(random.randrange(4))])
    for _ in range(random.randrange(2, 10)):
        view, array = step(random, view, array)
        assert equal(view, array)


# Uniform choices: hypothesis' own lean to small numbers, which leave most of the algebra untouched.
RANDOM = st.randoms(use_true_random=True)
CHAIN = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@CHAIN
@given(RANDOM)
def test_chains_of_ops_equal_numpy(random: Random) -> None:
    chain(random)


@pytest.mark.nightly
@settings(CHAIN, max_examples=20_000, derandomize=False)
@given(RANDOM)
def test_many_chains_of_ops_equal_numpy(random: Random) -> None:
    chain(random)


# ---- one law an op, and what each refuses ----

ARRAY = numbers(4, 6)
CUTS = [(), (6, 12, 18), (1,), (5, 7), (3, 9, 14, 23), (0, 24, 24)]


@pytest.mark.parametrize("at", CUTS)
def test_narrow(at: Sequence[int]) -> None:
    view = cut(ARRAY, at)
    for start in range(7):
        for length in range(7 - start):
            assert equal(view.narrow(1, start, length), ARRAY[:, start : start + length])
    assert equal(view.narrow(-2, 1, 2), ARRAY[1:3])


@pytest.mark.parametrize("bad", [(0, -1, 2), (0, 0, -1), (0, 3, 2), (0, 5, 0), (2, 0, 1), (-3, 0, 1)])
def test_narrow_refuses_what_is_outside(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ViewError, match="outside"):
        cut(ARRAY, ()).narrow(*bad)


@pytest.mark.parametrize("at", CUTS)
def test_part(at: Sequence[int]) -> None:
    assert equal(cut(ARRAY, at).part(1, 2, 3), ARRAY[:, 4:6])


def test_part_refuses_unequal_parts() -> None:
    with pytest.raises(ViewError, match="6 does not divide by 4"):
        cut(ARRAY, ()).part(1, 0, 4)
    with pytest.raises(ViewError, match="outside"):
        cut(ARRAY, ()).part(1, 3, 3)


@pytest.mark.parametrize("at", CUTS)
def test_permute(at: Sequence[int]) -> None:
    array = ARRAY.reshape(4, 3, 2)
    assert equal(cut(array, at).permute((2, 0, 1)), array.transpose(2, 0, 1))
    assert equal(cut(ARRAY, at).T, ARRAY.T)


def test_permute_refuses_no_permutation() -> None:
    for axes in ((0, 0), (0,), (0, 2), (-1, 0)):
        with pytest.raises(ViewError, match="no permutation"):
            cut(ARRAY, ()).permute(axes)
    with pytest.raises(ViewError, match="two axes"):
        _ = cut(ARRAY.ravel(), ()).T


@pytest.mark.parametrize("at", CUTS)
def test_split(at: Sequence[int]) -> None:
    flat = ARRAY.ravel()
    for inner in divisors(24):
        assert equal(cut(flat, at).split(0, inner), flat.reshape(24 // inner, inner))
    assert equal(cut(ARRAY, at).split(1, 2), ARRAY.reshape(4, 3, 2))


def test_split_makes_at_most_three_fragments_of_one() -> None:
    flat = cut(numbers(100), ())
    middle = flat.narrow(0, 0, 37)
    view = cat([zeros((13,), dtypes.int64), middle, zeros((50,), dtypes.int64)]).split(0, 10)
    assert (view.extent != views.ZERO).sum() == 2
    longer = cat([zeros((13,), dtypes.int64), flat.narrow(0, 0, 62), zeros((25,), dtypes.int64)]).split(0, 10)
    assert (longer.extent != views.ZERO).sum() == 3


def test_split_refuses_uneven_rows() -> None:
    for inner in (0, -2, 4, 7):
        with pytest.raises(ViewError, match="does not divide"):
            cut(ARRAY, ()).split(1, inner)


@pytest.mark.parametrize("at", CUTS)
def test_merge(at: Sequence[int]) -> None:
    assert equal(cut(ARRAY, at).merge(0), ARRAY.ravel())
    assert equal(cut(ARRAY, at).T.merge(0), ARRAY.T.ravel())
    assert equal(cut(ARRAY, at).narrow(1, 1, 4).merge(0), ARRAY[:, 1:5].ravel())


def test_merge_keeps_one_stride_whole() -> None:
    assert len(cut(ARRAY, ()).merge(0).rows) == 1
    assert len(cut(ARRAY, ()).narrow(1, 0, 5).merge(0).rows) == 4


def test_merge_refuses_the_last_axis() -> None:
    with pytest.raises(ViewError, match="no axis after"):
        cut(ARRAY, ()).merge(1)


def test_merge_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "MAX_FRAGMENTS", 5)
    assert equal(cut(ARRAY, ()).narrow(1, 0, 5).merge(0), ARRAY[:, :5].ravel())
    with pytest.raises(ViewError, match="needs 6 fragments, more than 5"):
        cut(ARRAY, ()).T.merge(0)


@pytest.mark.parametrize("at", CUTS)
def test_reshape(at: Sequence[int]) -> None:
    for shape in ((24,), (2, 12), (3, 8), (6, 4), (2, 2, 3, 2), (1, 4, 1, 6), (8, 3)):
        assert equal(cut(ARRAY, at).reshape(shape), ARRAY.reshape(shape))
        assert equal(cut(ARRAY, at).T.reshape(shape), ARRAY.T.reshape(shape))
    assert equal(cut(ARRAY, at).narrow(0, 0, 2).narrow(1, 3, 1).reshape((2,)), ARRAY[:2, 3])
    assert equal(cut(numbers(1), ()).reshape(()), numbers(1).reshape(()))
    assert equal(cut(numbers(0), ()).reshape((3, 0)), numbers(0).reshape(3, 0))


def test_reshape_refuses_another_numel() -> None:
    for shape in ((23,), (5, 5), (-4, -6), ()):
        with pytest.raises(ViewError, match="24 elements"):
            cut(ARRAY, ()).reshape(shape)


@pytest.mark.parametrize("at", CUTS)
def test_unsqueeze(at: Sequence[int]) -> None:
    for axis in range(3):
        assert equal(cut(ARRAY, at).unsqueeze(axis), np.expand_dims(ARRAY, axis))
    with pytest.raises(ViewError, match="outside"):
        cut(ARRAY, at).unsqueeze(3)


@pytest.mark.parametrize("at", CUTS)
def test_pad(at: Sequence[int]) -> None:
    assert equal(cut(ARRAY, at).pad(0, 1, 2), np.pad(ARRAY, [(1, 2), (0, 0)]))
    assert equal(cut(ARRAY, at).pad(1, 0, 3).T, np.pad(ARRAY, [(0, 0), (0, 3)]).T)
    view = cut(ARRAY, at)
    assert view.pad(0, 0, 0) is view
    with pytest.raises(ViewError, match="negative"):
        view.pad(0, -1, 0)


@pytest.mark.parametrize("at", CUTS)
def test_cat(at: Sequence[int]) -> None:
    a, b = cut(ARRAY, at), cut(ARRAY + 100, (11,))
    assert equal(cat([a, b, a]), np.concatenate([ARRAY, ARRAY + 100, ARRAY]))
    assert equal(cat([a, b], -1), np.concatenate([ARRAY, ARRAY + 100], 1))
    assert equal(cat([a.narrow(0, 0, 0), b]), ARRAY + 100)


def test_cat_refuses_what_does_not_fit() -> None:
    a = cut(ARRAY, ())
    with pytest.raises(ViewError, match=r"cat on axis 0: \(6, 4\) does not fit \(4, 6\)"):
        cat([a, a.T])
    with pytest.raises(ViewError, match="does not fit"):
        cat([a, a.merge(0)])
    with pytest.raises(ViewError, match="does not fit"):
        cat([a, zeros((4,), dtypes.int64)], 1)
    with pytest.raises(ViewError, match="float32 does not fit int64"):
        cat([a, zeros((4, 6), dtypes.float32)])
    with pytest.raises(ViewError, match="no views"):
        cat([])
    with pytest.raises(ViewError, match="outside"):
        cat([a], 2)


@pytest.mark.parametrize("at", CUTS)
def test_stack(at: Sequence[int]) -> None:
    a, b = cut(ARRAY, at), cut(ARRAY + 100, (11,))
    for axis in range(3):
        assert equal(stack([a, b], axis), np.stack([ARRAY, ARRAY + 100], axis))
    with pytest.raises(ViewError, match="does not fit"):
        stack([a, a.T])


# ---- casts ----


def floats(dtype: dtypes.DType) -> View:
    data = np.zeros(64, np.uint8)
    return strided(Extents([Extent(Buffer(data, data.ctypes.data, 64), 0, 64)]), 0, dtype, (2, 3))


def test_cast_keeps_what_is_stored() -> None:
    view = floats(dtypes.float32).cast(dtypes.bfloat16)
    assert view.dtype is dtypes.bfloat16
    assert view.stored.tolist() == [dtypes.float32.code]
    assert view.nbytes == 12


def test_cast_refuses_a_second_rounding() -> None:
    with pytest.raises(ViewError, match="float32 was already rounded to bfloat16"):
        floats(dtypes.float32).cast(dtypes.bfloat16).cast(dtypes.float16)
    with pytest.raises(ViewError, match="already rounded"):
        floats(dtypes.float32).cast(dtypes.bfloat16).cast(dtypes.float32)
    twice = floats(dtypes.bfloat16).cast(dtypes.float32).cast(dtypes.float16)
    assert twice.dtype is dtypes.float16 and twice.stored.tolist() == [dtypes.bfloat16.code]
    once = floats(dtypes.float32).cast(dtypes.bfloat16)
    assert once.cast(dtypes.bfloat16) is once


def test_what_must_not_be_rounded_is_stored_in_one_dtype() -> None:
    wide, narrow = floats(dtypes.float32), floats(dtypes.bfloat16)
    before = wide.cast(dtypes.bfloat16).pad(0, 0, 1).reshape((9,)).as_stored()
    assert before.dtype is dtypes.float32 and before.size.tolist() == [[6], [3]]
    with pytest.raises(ViewError, match="what must not be rounded lies in 2 dtypes"):
        cat([wide.cast(dtypes.bfloat16), narrow]).as_stored()


@pytest.mark.parametrize("dtype", [dtypes.int64, dtypes.bool_, dtypes.uint8, dtypes.complex64])
def test_cast_refuses_what_no_kernel_converts(dtype: dtypes.DType) -> None:
    data = np.zeros(64, np.uint8)
    table = Extents([Extent(Buffer(data, data.ctypes.data, 64), 0, 64)])
    with pytest.raises(ViewError, match=f"no conversion from {dtype} to float32"):
        strided(table, 0, dtype, (2,)).cast(dtypes.float32)
    with pytest.raises(ViewError, match=f"no conversion from float32 to {dtype}"):
        floats(dtypes.float32).cast(dtype)


def test_cast_of_zeros_is_free() -> None:
    view = zeros((2,), dtypes.float32).cast(dtypes.int64)
    assert view.stored.tolist() == [dtypes.int64.code]
    padded = floats(dtypes.float32).pad(0, 0, 1).cast(dtypes.bfloat16)
    assert sorted(padded.stored.tolist()) == [dtypes.float32.code, dtypes.bfloat16.code]


# ---- making views ----


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (0, -1), (61, 4), (0, 65)])
def test_an_extent_lies_inside_its_file(offset: int, nbytes: int) -> None:
    data = np.zeros(64, np.uint8)
    with pytest.raises(SourceError, match=rf"buffer: w needs bytes \[{offset}, {offset + nbytes}\) of 64"):
        Extent(Buffer(data, data.ctypes.data, 64), offset, nbytes, "w")
    with pytest.raises(
        SourceError, match=rf"f.bin: extent needs bytes \[{offset}, {offset + nbytes}\) of 64"
    ):
        Extent(File("f.bin", 64, 0, 0), offset, nbytes)


def test_a_target_s_final_shape_holds_what_its_view_has() -> None:
    view = floats(dtypes.float32)
    assert Target("w", view, (view.numel, 1)).shape == (view.numel, 1)
    with pytest.raises(ViewError, match=rf"target w: shape \(7, 7\) does not hold the {view.numel} elements"):
        Target("w", view, (7, 7))


def test_strided_equals_numpy_strides() -> None:
    flat = numbers(40)
    table = Extents([extent_of(flat)])
    wanted = np.lib.stride_tricks.as_strided(flat[3:], (3, 4), (8 * 10, 8 * 2))
    assert equal(strided(table, 0, dtypes.int64, (3, 4), offset=3, stride=(10, 2)), wanted)
    assert equal(strided(table, 0, dtypes.int64, (3, 2), stride=(0, 1)), np.array([[1, 2]] * 3))
    assert equal(strided(table, 0, dtypes.int64, (0, 7), offset=999), np.empty((0, 7), np.int64))
    assert equal(strided(table, 0, dtypes.int64, ()), flat[0].reshape(()))


def test_strided_refuses_what_is_outside_its_extent() -> None:
    table = Extents([extent_of(numbers(10), "weight")])
    assert strided(table, 0, dtypes.int64, (2, 5)).numel == 10
    with pytest.raises(SourceError, match="needs 88 bytes of weight, which has 80"):
        strided(table, 0, dtypes.int64, (2, 5), offset=1)
    for shape, offset, stride in (((-1,), 0, (1,)), ((2,), -1, (1,)), ((2,), 0, (-1,)), ((2,), 0, (1, 1))):
        with pytest.raises(SourceError, match="is no tensor"):
            strided(table, 0, dtypes.int64, shape, offset=offset, stride=stride)


def test_runs_equals_cat_of_strided() -> None:
    table = Extents([extent_of(numbers(10), "a"), extent_of(numbers(20) + 50, "b")])
    pieces = [(1, 3, 7), (0, 0, 10), (0, 9, 0), (1, 19, 1), (0, 4, 2)]
    extent, offset, length = (np.array(column) for column in zip(*pieces, strict=True))
    joined = cat([strided(table, e, dtypes.int64, (n,), offset=o) for e, o, n in pieces])
    view = runs(table, dtypes.int64, extent, offset, length)
    assert equal(view, read(joined))
    assert len(view.rows) == 4
    none = np.empty(0, np.int64)
    assert equal(runs(table, dtypes.int64, none, none, none), none)


def test_runs_refuses_what_is_outside_its_extent() -> None:
    table = Extents([extent_of(numbers(10), "a"), extent_of(numbers(20), "b")])
    for first, count in ((15, 6), (-1, 3), (20, 1)):
        with pytest.raises(SourceError, match="b has 160 bytes"):
            runs(table, dtypes.int64, np.array([0, 1]), np.array([0, first]), np.array([10, count]))


def test_constant_carries_its_bytes() -> None:
    assert equal(constant(ARRAY.T, dtypes.int64), ARRAY.T)
    with pytest.raises(ViewError, match="8 bytes an element, bfloat16 2"):
        constant(ARRAY, dtypes.bfloat16)


def test_zeros() -> None:
    assert equal(zeros((2, 3), dtypes.int64), np.zeros((2, 3), np.int64))
    assert equal(zeros((2, 0), dtypes.int64), np.zeros((2, 0), np.int64))
    with pytest.raises(ViewError, match="zeros: an axis of 100000000000000000000 elements"):
        zeros((2, 10**20), dtypes.int64)


def test_union_of_extents_keeps_one_of_each() -> None:
    a, b, c = (extent_of(numbers(4) * k, str(k)) for k in (1, 2, 3))
    left, right = Extents([a, b]), Extents([c, b, c, a])
    table, moved = left.union(right)
    assert list(table) == [a, b, c]
    assert moved == [2, 1, 2, 0]
    assert left.union(Extents([b]))[0] is left
    assert left.union(left) == (left, [0, 1])


def test_cat_joins_tables_and_keeps_zeros() -> None:
    a, b = cut(numbers(3), (1,)), cut(numbers(4) + 10, (2,))
    joined = cat([a.pad(0, 1, 0), zeros((2,), dtypes.int64), b.pad(0, 0, 2), a])
    assert equal(joined, np.array([0, 1, 2, 3, 0, 0, 11, 12, 13, 14, 0, 0, 1, 2, 3]))
    assert len(joined.extents) == 4


# ---- what models need ----


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_query_key_value_interleaved_by_head(tp: int) -> None:
    """BLOOM, NeoX: rows are (head, q|k|v, head_dim)."""
    heads, dim, hidden = 4, 3, 5
    fused = numbers(heads * 3 * dim, hidden)
    view = cut(fused, (7, 50, 51, 120)).split(0, dim).split(0, 3)
    by_head = fused.reshape(heads, 3, dim, hidden)
    for rank in range(tp):
        mine = slice(rank * heads // tp, (rank + 1) * heads // tp)
        got = [view.narrow(1, k, 1).part(0, rank, tp).reshape((heads // tp * dim, hidden)) for k in range(3)]
        wanted = [by_head[mine, k].reshape(-1, hidden) for k in range(3)]
        assert equal(cat(got), np.concatenate(wanted))


@pytest.mark.parametrize("tp", [1, 2])
def test_query_key_value_interleaved_by_group(tp: int) -> None:
    """Falcon, ChatGLM, Megatron: rows are (group, its queries then a key and a value, head_dim)."""
    groups, queries, dim, hidden = 2, 3, 4, 5
    fused = numbers(groups * (queries + 2) * dim, hidden)
    view = cut(fused, (13, 77, 160)).reshape((groups, queries + 2, dim, hidden))
    by_group = fused.reshape(groups, queries + 2, dim, hidden)
    for rank in range(tp):
        mine = slice(rank * groups // tp, (rank + 1) * groups // tp)
        for first, count in ((0, queries), (queries, 1), (queries + 1, 1)):
            rows = groups // tp * count * dim
            got = view.part(0, rank, tp).narrow(1, first, count).reshape((rows, hidden))
            assert equal(got, by_group[mine, first : first + count].reshape(rows, hidden))


@pytest.mark.parametrize("at", [(), (33,), (10, 60, 95)])
def test_rotary_permute_of_part_of_the_rows(at: Sequence[int]) -> None:
    """Interleaved pairs to halves in the first `rotary` rows of each head; the rest stays."""
    heads, dim, rotary, hidden = 2, 10, 6, 5
    weight = numbers(heads * dim, hidden)
    view = cut(weight, at).split(0, dim)
    turned = view.narrow(1, 0, rotary).split(1, 2).permute((0, 2, 1, 3)).merge(1)
    got = cat([turned, view.narrow(1, rotary, dim - rotary)], 1).merge(0)
    order = [0, 2, 4, 1, 3, 5, 6, 7, 8, 9]
    wanted = np.concatenate([weight[h * dim : (h + 1) * dim][order] for h in range(heads)])
    assert equal(got, wanted)


@pytest.mark.parametrize(
    ("world", "shape"), [(1, (3, 5)), (3, (7, 13, 3)), (5, (12,)), (4, (1,)), (64, (211, 48))]
)
def test_a_stage_three_parameter_is_cat_narrow_reshape(world: int, shape: tuple[int, ...]) -> None:
    weight = numbers(*shape)
    piece = -(-weight.size // world)
    padded = np.full(piece * world, JUNK, np.int64)
    padded[: weight.size] = weight.ravel()
    table = Extents(extent_of(p, str(r)) for r, p in enumerate(padded.reshape(world, piece)))
    parts = [strided(table, r, dtypes.int64, (piece,)) for r in range(world)]
    assert equal(cat(parts).narrow(0, 0, weight.size).reshape(shape), weight)


def test_a_view_prints_itself() -> None:
    assert repr(cut(numbers(24), (5,))) == "View(int64[24], 2 fragments)"
