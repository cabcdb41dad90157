"""What is made when it is read: any rearrangement of such a matrix is that of the merged one, bit for bit."""

from __future__ import annotations

import numpy as np
import peft_writer
import pytest
import torch
from fastckpt import dtypes
from fastckpt.computed.lowrank import LowRank, add
from fastckpt.computed.nowhere import elements, nowhere, pitch, pitched, runs
from fastckpt.digest import LEAF
from fastckpt.errors import DeviceError
from fastckpt.executors import pick
from fastckpt.executors.cpu import built
from fastckpt.extents import Buffer, Extent, Extents
from fastckpt.native import _C
from fastckpt.planning.batches import Slots, cut
from fastckpt.planning.binding import Binding
from fastckpt.planning.compiling import compile
from fastckpt.reader import Mapped, Positioned
from fastckpt.running.computing import Computing
from fastckpt.stored import strided
from fastckpt.target import Target
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, COLUMNS, RANK = 12, 10, 3
BASE = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
LEFT = torch.randn(ROWS, RANK, generator=torch.Generator().manual_seed(2))
RIGHT = torch.randn(RANK, COLUMNS, generator=torch.Generator().manual_seed(3))
SCALE = 1.5
ROADS = {"torch": Positioned, **({"cpu": Mapped} if built() else {})}
MERGED = peft_writer.merged(BASE, RIGHT, LEFT, SCALE * RANK).numpy()


def table():
    """The three matrices as buffers, and the merged one that lies nowhere: (extents, its view)."""
    held = [x.numpy() for x in (BASE, LEFT, RIGHT)]
    extents = Extents(
        Extent(Buffer(x, x.ctypes.data, x.nbytes), 0, x.nbytes, str(i)) for i, x in enumerate(held)
    )
    views = [strided(extents, i, dtypes.float32, x.shape) for i, x in enumerate(held)]
    matrix = LowRank(*views, SCALE)
    whole = Extents((*extents, nowhere(matrix, (ROWS, COLUMNS), dtypes.float32, "merged")))
    return whole, pitched(whole, 3, dtypes.float32, (ROWS, COLUMNS))


def added(base, *thin, **options):
    """The sum as an array of its own."""
    out = base.copy()
    add(out, *thin, **options)
    return out


def made(view, extents, road):
    """The dense elements of a view, in batches, by an executor with its reader."""
    out = np.full(view.shape, 7, np.float32)
    chunk, extents = compile([Target("x", view)], extents)
    binding = Binding.of(extents)
    with Computing(extents, binding, ROADS[road]) as reader:
        lane = reader.lane(pick(road))
        for batch in cut(chunk, 0, Slots.of([0], [0], [view.nbytes]), binding, stage=LEAF):
            lane.run(batch.rows, [Buffer(out, out.ctypes.data, out.nbytes)])
    return out


@st.composite
def rearranged(draw):
    """A view of the merged matrix and the same of the numpy array, after a few operations."""
    extents, view = table()
    array = MERGED
    for _ in range(draw(st.integers(1, 5))):
        axis = draw(st.integers(0, view.ndim - 1))
        n = view.shape[axis]
        kind = draw(st.sampled_from(["narrow", "split", "permute", "merge", "pad", "reshape"]))
        if kind == "narrow":
            start = draw(st.integers(0, n - 1))
            length = draw(st.integers(1, n - start))
            view = view.narrow(axis, start, length)
            array = array.take(range(start, start + length), axis)
        elif kind == "split" and view.ndim < 5:
            inner = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
            view = view.split(axis, inner)
            array = array.reshape(*array.shape[:axis], n // inner, inner, *array.shape[axis + 1 :])
        elif kind == "permute":
            order = draw(st.permutations(range(view.ndim)))
            view, array = view.permute(order), array.transpose(order)
        elif kind == "merge" and axis + 1 < view.ndim:
            view = view.merge(axis)
            array = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
        elif kind == "pad":
            view = view.pad(axis, 1, 2)
            array = np.pad(array, [(1, 2) if a == axis else (0, 0) for a in range(array.ndim)])
        elif kind == "reshape":
            view, array = view.reshape((view.numel,)), array.reshape(-1)
    return extents, view, array


@pytest.mark.parametrize("road", ROADS)
@settings(max_examples=120, deadline=None)
@given(rearranged())
def test_any_rearrangement(road, case):
    extents, view, array = case
    assert (made(view, extents, road).view(np.uint32) == array.view(np.uint32)).all()


@pytest.mark.parametrize("road", ROADS)
def test_a_cast_rounds_once(road):
    extents, view = table()
    chunk, _ = compile([Target("x", view.cast(dtypes.bfloat16))], extents)
    out = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    binding = Binding.of(extents)
    with Computing(extents, binding, ROADS[road]) as reader:
        lane = reader.lane(pick(road))
        for batch in cut(chunk, 0, Slots.of([0], [0], [out.nbytes]), binding):
            lane.run(batch.rows, [Buffer(out, out.data_ptr(), out.nbytes)])
    assert torch.equal(out, torch.from_numpy(MERGED).bfloat16())


def test_blocks_change_nothing():
    """Rows at once, or one by one; the sum is in order, so another order gives another number."""
    base, left, right = BASE.numpy(), LEFT.numpy(), RIGHT.numpy()
    whole = added(base, left, right, SCALE)
    assert (whole == MERGED).all()
    for i in range(ROWS):
        for j in range(COLUMNS):
            one = added(base[i : i + 1, j : j + 1], left[i : i + 1], right[:, j : j + 1], SCALE)
            assert one[0, 0] == whole[i, j]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 11), st.integers(0, 9), st.integers(1, 150), st.integers(0, 2**32 - 1))
def test_every_instruction_set_gives_numpys_bits(rows, rank, columns, seed):
    """Values of all sizes, so that every product, sum and rounding differs if its order does."""
    random = np.random.default_rng(seed)

    def some(*shape):
        sizes = np.ldexp(random.standard_normal(shape), random.integers(-70, 60, shape))
        return np.where(random.random(shape) < 0.1, -0.0, sizes).astype(np.float32)

    base, left, right = some(rows, columns), some(rows, rank), some(rank, columns)
    base[0, 0] = np.float32(1e-45)
    wanted = added(base, left, right, 0.7, native=False)
    for isa in range(len(_C.isas()) if _C else 0):
        assert (added(base, left, right, 0.7, isa=isa).view(np.uint32) == wanted.view(np.uint32)).all(), isa
    turned = added(base, np.asfortranarray(left), np.asfortranarray(right), 0.7)
    assert (turned.view(np.uint32) == wanted.view(np.uint32)).all()


@pytest.mark.parametrize("isa", [None, *range(len(_C.isas()) if _C else 0)])
def test_the_scaled_product_is_rounded_before_it_is_added(isa):
    """Where scale * product lies so near a tie of the sum that fusing both gives the next float32."""
    base, left, right = (np.full(s, x, np.float32) for s, x in (
        ((5, 70), 1), ((5, 1), 5 * 2.0**-13), ((1, 70), 2.0**-13)
    ))  # fmt: skip
    scale = float.fromhex("0x1.999999a666667p-1")
    assert (added(base, left, right, scale, isa=isa or 0, native=isa is not None) == 1).all()


@pytest.mark.skipif(not built(), reason="needs the compiled module")
@pytest.mark.parametrize("wrong", ["base", "left", "right"])
def test_sizes_that_do_not_fit_are_refused(wrong):
    sizes = {"base": 6, "left": 4, "right": 6}  # 2 x 3, rank 2
    sizes[wrong] += 1
    single, double = (np.zeros(16, t) for t in (np.float32, np.float64))
    held = {n: (double if n in ("left", "right") else single)[:k] for n, k in sizes.items()}
    with pytest.raises(ValueError, match="add_low_rank"):
        _C.add_low_rank(held["base"], held["left"], held["right"], 2, 2, 3, 1.0)


@pytest.mark.parametrize("road", ROADS)
def test_what_does_not_know_it_refuses(road):
    extents, view = table()
    chunk, _ = compile([Target("x", view)], extents)
    out = np.empty(view.shape, np.float32)
    rows = Binding.of(extents).bind(chunk.rows)
    with pytest.raises(DeviceError, match="computed"):
        pick(road).bind([x.where for x in extents]).run(rows, [Buffer(out, out.ctypes.data, out.nbytes)])


def test_elements_and_runs():
    down, across, steps = elements(2 * pitch(4) + 1, (1, 3, 1, 2), (0, pitch(4), 0, 2), 4)
    assert (down.tolist(), across.tolist()) == ([2, 3, 4], [1, 3])
    assert steps[1] == (1, 0) and steps[3] == (1, 1)
    assert elements(0, (2, 2, 3), (2 * pitch(4), pitch(4), 1), 4)[2] == [(2, 0), (1, 0), (1, 1)]
    assert runs(np.array([3, 4, 7, 9, 10])) == [(3, 5), (7, 8), (9, 11)]
