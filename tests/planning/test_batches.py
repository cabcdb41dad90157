"""Rows of random targets, cut and spread and run by a dull interpreter, give what numpy gives."""

import random

import numpy as np
import pytest
from dull_rows import UNWRITTEN, interpret, random_targets
from fastckpt import dtypes
from fastckpt.extents import Extent, Extents, File
from fastckpt.planning import batches
from fastckpt.planning.batches import Slots, cut, spread
from fastckpt.planning.binding import Binding
from fastckpt.planning.compiling import compile
from fastckpt.planning.copies import TRANSPOSE
from fastckpt.stored import strided
from fastckpt.target import Target
from reading import read


def check(seed):
    rng = random.Random(seed)
    targets, extents = random_targets(rng)
    chunk, extents = compile(targets, extents)
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
    for batch in cut(chunk, 0, slots, binding, stage=stage, band=band, thin=rng.choice([None, 64])):
        staging = np.full(batch.stop - batch.start, UNWRITTEN, np.uint8)
        assert len(staging) <= max(stage, band)
        interpret(batch.rows, binding.places, [staging])
        files[batch.file][batch.start : batch.stop] = staging
        for at, size, leaf in zip(batch.leaf_offset, batch.leaf_size, batch.leaf, strict=True):
            assert leaf not in leaves
            leaves[int(leaf)] = staging[at : at + size].tobytes()
    assert sorted(leaves) == list(range(slots.leaves))
    buffers = [np.full(n, UNWRITTEN, np.uint8) for n in sizes]
    for batch in spread(chunk, 0, slots, binding, stage=stage, band=band, by_file=by_file):
        assert not by_file or {file[t] for t in batch.rows["dst_buffer"].tolist()} == {batch.file}
        interpret(batch.rows, binding.places, buffers)
    for t, target in enumerate(targets):
        want = read(target.view).tobytes()
        assert files[file[t]][offset[t] : offset[t] + sizes[t]].tobytes() == want
        assert buffers[t].tobytes() == want
        count = -(-sizes[t] // batches.LEAF)
        assert b"".join(leaves[int(slots.leaf[t]) + k] for k in range(count)) == want


@pytest.fixture
def small_leaves(monkeypatch):
    monkeypatch.setattr(batches, "LEAF", 64)


def test_cut_targets_equal_numpy(small_leaves):
    for seed in range(150):
        check(seed)


@pytest.mark.nightly
def test_cut_targets_equal_numpy_many(small_leaves):
    for seed in range(150, 6000):
        check(seed)


def test_a_plain_transpose_is_named_so():
    extents = Extents([Extent(File("/r", 4096), 0, 4096, "0")])
    view = strided(extents, 0, dtypes.float32, (16, 64)).T
    chunk, _ = compile([Target("w", view)], extents)
    (batch,) = cut(chunk, 0, Slots.of([0], [0], [4096]), Binding.of(extents))
    (row,) = batch.rows
    assert row["path"] == TRANSPOSE
    assert row["shape"].tolist() == [1, 1, 64, 16]
    assert row["src_stride"].tolist() == [0, 0, 4, 256] and row["dst_stride"].tolist() == [0, 0, 64, 4]


def test_batches_come_in_the_order_of_their_sources(small_leaves):
    """Two ranks that share rows of a matrix follow each other: its pages are read once, while warm."""
    extents = Extents([Extent(File("/r", 1 << 20), 0, 1 << 20, "0")])
    whole = strided(extents, 0, dtypes.float32, (64, 32))
    halves = [Target(f"rank {r}", whole.narrow(1, 16 * r, 16)) for r in (0, 1)]
    chunk, _ = compile(halves, extents)
    slots = Slots.of([0, 1], [0, 0], [4096, 4096])
    made = list(cut(chunk, 0, slots, Binding.of(extents), stage=1024))
    assert [(b.file, b.start) for b in made] == [(f, at) for at in (0, 1024, 2048, 3072) for f in (0, 1)]
    starts = [int(b.rows["src"].min()) for b in made]
    assert starts == sorted(starts)
    thin = cut(chunk, 0, slots, Binding.of(extents), stage=4096, thin=1024)
    assert [(b.file, b.start, b.stop) for b in thin] == [(b.file, b.start, b.stop) for b in made]


def test_memory_is_filled_in_the_order_of_the_source(monkeypatch):
    """Ranks that pick columns of the same rows share a batch, and its pages are read once."""
    monkeypatch.setattr(batches, "THINNEST", 64)
    extents = Extents([Extent(File("/r", 1 << 20), 0, 1 << 20, "0")])
    whole = strided(extents, 0, dtypes.float32, (64, 64))
    chunk, _ = compile([Target(f"rank {r}", whole.narrow(1, 16 * r, 16)) for r in range(4)], extents)
    slots = Slots.of(range(4), [0] * 4, [4096] * 4)
    made = list(spread(chunk, 0, slots, Binding.of(extents), stage=4096, band=4096))
    assert [(b.stop, sorted(b.rows["dst_buffer"].tolist())) for b in made] == [(4096, [0, 1, 2, 3])] * 4
    starts = np.concatenate([b.rows["src"] for b in made]).tolist()
    assert starts == sorted(starts)
    apart = spread(chunk, 0, slots, Binding.of(extents), stage=4096, band=4096, by_file=True)
    assert [(b.file, b.stop) for b in apart] == [(r, 4096) for r in range(4)]
