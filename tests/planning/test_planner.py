"""Rows of random targets, run by a dull interpreter, give what numpy gives: whole, cut and clipped."""

import itertools
import random

import numpy as np
import pytest
from fastckpt import dtypes
from fastckpt.errors import ViewError
from fastckpt.extents import Buffer, Extent, Extents, File
from fastckpt.planning import planner
from fastckpt.planning.planner import COPY, NOTHING, Binding, Slots
from fastckpt.stored import constant, strided
from fastckpt.target import Target
from fastckpt.views import cat
from reading import read

UNWRITTEN = 0xEE


def interpret(rows, places, destinations):
    """Run rows element by element; a byte written twice is a failure."""
    size = np.array([d.itemsize for d in dtypes.DTYPES])
    raw = [p.owner.tobytes() for p in places]
    for row in rows:
        out = destinations[row["dst_buffer"]]
        wide, narrow = int(size[row["dst_dtype"]]), int(size[row["src_dtype"]])
        for index in np.ndindex(*row["shape"]):
            d = int(row["dst"]) + int((np.array(index) * row["dst_stride"]).sum())
            assert (out[d : d + wide] == UNWRITTEN).all(), "written twice"
            if row["src_buffer"] == NOTHING:
                out[d : d + wide] = 0
                continue
            s = int(row["src"]) + int((np.array(index) * row["src_stride"]).sum())
            assert s >= 0 and s + narrow <= len(raw[row["src_buffer"]])
            out[d : d + wide] = np.frombuffer(raw[row["src_buffer"]][s : s + narrow], np.uint8)


def random_targets(rng):
    data = np.arange(1, 400, dtype=np.int64) * 0x0101010101
    extents = Extents([Extent(Buffer(data, data.ctypes.data, data.nbytes), 0, data.nbytes, "a")])
    targets = []
    for k in range(rng.randrange(1, 6)):
        shape = [rng.randrange(1, 6) for _ in range(rng.randrange(0, 6))]
        shape = shape[:3] if np.prod(shape) > 300 else shape
        view = strided(extents, 0, dtypes.int64, shape, offset=rng.randrange(0, 50))
        if shape:
            axes = list(range(len(shape)))
            rng.shuffle(axes)
            view = view.permute(axes)
            if rng.random() < 0.5:
                view = view.pad(rng.randrange(view.ndim), rng.randrange(2), rng.randrange(3))
            if rng.random() < 0.5:
                view = cat([view, view], rng.randrange(view.ndim))
            if rng.random() < 0.2:
                view = cat([view, view.narrow(0, 0, 0)], 0)
            if rng.random() < 0.3:
                view = view.reshape([view.numel])
        targets.append(Target(f"t{k}", view))
    if rng.random() < 0.3:
        targets.append(Target("constant", constant(np.arange(7, dtype=np.int64), dtypes.int64)))
    return targets, extents


def check(seed):
    rng = random.Random(seed)
    targets, extents = random_targets(rng)
    chunk, extents = planner.compile(targets, extents)
    sizes = [t.view.nbytes for t in targets]
    file, offset, end = [0] * len(targets), [0] * len(targets), [rng.randrange(9), rng.randrange(9)]
    for t in rng.sample(range(len(targets)), len(targets)):  # two files, any order, gaps here and there
        file[t] = rng.randrange(2)
        offset[t] = end[file[t]]
        end[file[t]] += sizes[t] + rng.choice([0, 0, 5])
    slots, binding = Slots.of(file, offset, sizes), Binding.of(extents)
    stage, band, by_file = rng.choice([64, 128]), rng.choice([64, 128, 512]), rng.random() < 0.5
    files = [np.full(n + 9, UNWRITTEN, np.uint8) for n in end]
    leaves = {}
    for batch in planner.cut(chunk, 0, slots, binding, stage=stage, band=band, thin=rng.choice([None, 64])):
        staging = np.full(batch.stop - batch.start, UNWRITTEN, np.uint8)
        assert len(staging) <= max(stage, band)
        interpret(batch.rows, binding.places, [staging])
        files[batch.file][batch.start : batch.stop] = staging
        for at, size, leaf in zip(batch.leaf_offset, batch.leaf_size, batch.leaf, strict=True):
            assert leaf not in leaves
            leaves[int(leaf)] = staging[at : at + size].tobytes()
    assert sorted(leaves) == list(range(slots.leaves))
    buffers = [np.full(n, UNWRITTEN, np.uint8) for n in sizes]
    for batch in planner.spread(chunk, 0, slots, binding, stage=stage, band=band, by_file=by_file):
        assert not by_file or {file[t] for t in batch.rows["dst_buffer"].tolist()} == {batch.file}
        interpret(batch.rows, binding.places, buffers)
    for t, target in enumerate(targets):
        want = read(target.view).tobytes()
        assert files[file[t]][offset[t] : offset[t] + sizes[t]].tobytes() == want
        assert buffers[t].tobytes() == want
        count = -(-sizes[t] // planner.LEAF)
        assert b"".join(leaves[int(slots.leaf[t]) + k] for k in range(count)) == want


@pytest.fixture
def small_leaves(monkeypatch):
    monkeypatch.setattr(planner, "LEAF", 64)


def test_cut_targets_equal_numpy(small_leaves):
    for seed in range(150):
        check(seed)


def test_the_row_of_one_fragment_is_compiles():
    found = 0
    for seed in range(300):
        targets, extents = random_targets(random.Random(seed))
        for target in targets:
            row = planner.single(target.view)
            chunk, _ = planner.compile([target], extents)
            if row is not None and target.view.extents is extents:
                found += 1
                assert row.tobytes() == chunk.rows.tobytes()
            elif len(chunk.rows) == 1 and target.view.numel and target.name != "constant":
                assert chunk.rows["src_buffer"][0] == NOTHING or len(target.view.held) > 1
    assert found > 200


@pytest.mark.nightly
def test_cut_targets_equal_numpy_many(small_leaves):
    for seed in range(150, 6000):
        check(seed)


def test_coalesce_joins_what_is_one_stride_on_both_sides():
    size = np.array([[2, 3, 4], [2, 3, 4], [1, 1, 1]])
    src = np.array([[12, 4, 1], [12, 4, 1], [9, 9, 9]])
    dst = np.array([[12, 4, 1], [24, 4, 1], [9, 9, 9]])
    shape, s, d = planner.coalesce(size, src, dst)
    assert shape.tolist() == [[1, 1, 1, 24], [1, 1, 2, 12], [1, 1, 1, 1]]
    assert s[0].tolist() == [0, 0, 0, 1] and s[1].tolist() == [0, 0, 12, 1] and s[2].tolist() == [0, 0, 0, 0]
    assert d[1].tolist() == [0, 0, 24, 1]


def test_a_zero_3_parameter_is_one_row_a_rank():
    extents = Extents([Extent(File(f"/r{r}", 4096), 0, 4096, "0") for r in range(4)])
    parts = [strided(extents, r, dtypes.float32, (256,)) for r in range(4)]
    view = cat(parts).narrow(0, 0, 1000).reshape((10, 100)).cast(dtypes.bfloat16)
    chunk, _ = planner.compile([Target("w", view)], extents)
    assert planner.nbytes(chunk.rows, "src").sum() == 4000 and planner.nbytes(chunk.rows, "dst").sum() == 2000
    assert set(chunk.rows["src_buffer"].tolist()) == {0, 1, 2, 3}
    bound = Binding.of(extents).bind(chunk.rows)
    assert (bound["dst"] == chunk.rows["dst"]).all()


def test_a_plain_transpose_is_named_so():
    extents = Extents([Extent(File("/r", 4096), 0, 4096, "0")])
    view = strided(extents, 0, dtypes.float32, (16, 64)).T
    chunk, _ = planner.compile([Target("w", view)], extents)
    (batch,) = planner.cut(chunk, 0, Slots.of([0], [0], [4096]), Binding.of(extents))
    (row,) = batch.rows
    assert row["path"] == planner.TRANSPOSE
    assert row["shape"].tolist() == [1, 1, 64, 16]
    assert row["src_stride"].tolist() == [0, 0, 4, 256] and row["dst_stride"].tolist() == [0, 0, 64, 4]


def test_rows_of_another_checkpoint_are_refused():
    extents = Extents([Extent(File("/r", 4096), 1024, 400, "0")])
    chunk, _ = planner.compile([Target("w", strided(extents, 0, dtypes.float32, (100,)))], extents)
    bound = Binding.of(extents).bind(chunk.rows)
    assert bound["src"].tolist() == [1024] and bound["src_buffer"].tolist() == [0]
    shorter = Binding.of(Extents([Extent(File("/r", 4096), 1024, 399, "0")]))
    with pytest.raises(ViewError, match=r"bytes \[0, 400\) of extent 0, which has 399"):
        shorter.bind(chunk.rows)
    with pytest.raises(ViewError, match="extent 0 of 0"):
        Binding.of(Extents()).bind(chunk.rows)
    with pytest.raises(ViewError, match="outside its tensor"):
        list(planner.cut(chunk, 0, Slots.of([0], [0], [396]), Binding.of(extents)))


def test_copy_is_the_documented_struct():
    assert COPY.itemsize == 128
    assert [COPY.fields[n][1] for n in COPY.names] == [0, 8, 16, 48, 80, 96, 100, 104, 112, 113, 114, 115]


def test_no_axis_outgrows_a_row():
    """Stacked experts pass 2^32 elements: what a row cannot count is not joined, or refused."""
    int8 = dtypes.BY_NAME["int8"]
    for shape in ((3, 1 << 31), (5, 1 << 20, 1 << 20), (1 << 31, 2, 2), (70_000, 70_000)):
        size, src, dst = (np.array([x], np.int64) for x in (shape, *[planner.dense_strides(shape)] * 2))
        joined, *_ = planner.coalesce(size, src, dst)
        assert int(joined.max()) <= planner.LONGEST and int(joined.prod()) == int(size.prod())
    owner = np.zeros(1, np.int8)
    extents = Extents([Extent(Buffer(owner, owner.ctypes.data, 1 << 40), 0, 1 << 40, "a")])
    wide = Target("w", strided(extents, 0, int8, (3, 1 << 31)))
    chunk, _ = planner.compile([wide], extents)
    assert planner.nbytes(chunk.rows, "dst").sum() == 3 << 31
    long = Target("w", strided(extents, 0, int8, (1 << 32,)))
    with pytest.raises(ViewError, match="axis of 4294967296 elements"):
        planner.compile([long], extents)


def test_batches_come_in_the_order_of_their_sources(small_leaves):
    """Two ranks that share rows of a matrix follow each other: its pages are read once, while warm."""
    extents = Extents([Extent(File("/r", 1 << 20), 0, 1 << 20, "0")])
    whole = strided(extents, 0, dtypes.float32, (64, 32))
    halves = [Target(f"rank {r}", whole.narrow(1, 16 * r, 16)) for r in (0, 1)]
    chunk, _ = planner.compile(halves, extents)
    slots = Slots.of([0, 1], [0, 0], [4096, 4096])
    batches = list(planner.cut(chunk, 0, slots, Binding.of(extents), stage=1024))
    assert [(b.file, b.start) for b in batches] == [(f, at) for at in (0, 1024, 2048, 3072) for f in (0, 1)]
    starts = [int(b.rows["src"].min()) for b in batches]
    assert starts == sorted(starts)
    thin = planner.cut(chunk, 0, slots, Binding.of(extents), stage=4096, thin=1024)
    assert [(b.file, b.start, b.stop) for b in thin] == [(b.file, b.start, b.stop) for b in batches]


def test_memory_is_filled_in_the_order_of_the_source(monkeypatch):
    """Ranks that pick columns of the same rows share a batch, and its pages are read once."""
    monkeypatch.setattr(planner, "THINNEST", 64)
    extents = Extents([Extent(File("/r", 1 << 20), 0, 1 << 20, "0")])
    whole = strided(extents, 0, dtypes.float32, (64, 64))
    chunk, _ = planner.compile([Target(f"rank {r}", whole.narrow(1, 16 * r, 16)) for r in range(4)], extents)
    slots = Slots.of(range(4), [0] * 4, [4096] * 4)
    batches = list(planner.spread(chunk, 0, slots, Binding.of(extents), stage=4096, band=4096))
    assert [(b.stop, sorted(b.rows["dst_buffer"].tolist())) for b in batches] == [(4096, [0, 1, 2, 3])] * 4
    starts = np.concatenate([b.rows["src"] for b in batches]).tolist()
    assert starts == sorted(starts)
    apart = planner.spread(chunk, 0, slots, Binding.of(extents), stage=4096, band=4096, by_file=True)
    assert [(b.file, b.stop) for b in apart] == [(r, 4096) for r in range(4)]


def matrices(rng):
    """Random matrices over one buffer: turned, padded, fused, cast, cut across their lines."""
    data = np.arange(1, 4000, dtype=np.int64) * 0x0101010101
    extents = Extents([Extent(Buffer(data, data.ctypes.data, data.nbytes), 0, data.nbytes, "a")])
    while True:
        shape = [rng.randrange(1, 6) for _ in range(rng.randrange(1, 6))]
        view = strided(extents, 0, dtypes.int64, shape, offset=rng.randrange(0, 50))
        axes = list(range(len(shape)))
        rng.shuffle(axes)
        view = view.permute(axes)
        if rng.random() < 0.4:
            view = view.pad(rng.randrange(view.ndim), rng.randrange(2), rng.randrange(3))
        split = rng.randrange(0, view.ndim + 1)
        view = view.reshape([int(np.prod(view.shape[:split])), int(np.prod(view.shape[split:]))])
        if rng.random() < 0.4:
            view = cat([view, view], rng.randrange(2))
        if rng.random() < 0.5:
            view = view.T
        yield view


def test_upright_rows_fill_the_transpose():
    rng = random.Random(5)
    for view in itertools.islice(matrices(rng), 400):
        chunk, extents = planner.compile([Target("t", view)], view.extents)
        (rows, columns), binding = view.shape, Binding.of(extents)
        want, step, width = read(view), rng.randrange(1, 5), columns * 8
        slots = Slots.of([0], [0], [rows * width])
        for batch in planner.cut(
            chunk, 0, slots, binding, stage=step * width, band=step * width, in_order=True
        ):
            top, count = batch.start // width, (batch.stop - batch.start) // width
            out = np.full(count * width, UNWRITTEN, np.uint8)
            interpret(planner.upright(batch.rows, width, count), binding.places, [out])
            assert np.array_equal(out.view(np.int64).reshape(columns, count).T, want[top : top + count])
