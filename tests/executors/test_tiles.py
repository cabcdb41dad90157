"""The GPU's tile bodies, run on the host, write the bytes of the torch executor and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from executors import test_copy_rows as copy_rows
from executors.test_copy_rows import EVEN, PAIRS, TRANSPOSED, buffer, noise, random_row, row
from fastckpt.dtypes import BY_NAME, DType
from fastckpt.errors import ViewError
from fastckpt.executors import tiles
from fastckpt.executors.torch import Torch
from fastckpt.planning.copies import COPY, GENERAL, ROWS, TRANSPOSE

_C = pytest.importorskip("fastckpt._C", reason="the compiled module is not built")


def cut(rows: np.ndarray, source: np.ndarray, out: np.ndarray) -> tiles.Tiles:
    return tiles.tile(rows, np.array([source.ctypes.data], np.uint64), np.array([out.ctypes.data], np.uint64))


def run(made: tiles.Tiles, shuffle: int) -> None:
    _C.run_tiles_on_host(made.rows.view(np.uint8), made.owner, made.sources, made.destinations, shuffle)


def same(rows: np.ndarray, source: np.ndarray, out: np.ndarray, shuffle: int = 0) -> set[int]:
    """Tiles write what torch writes, and nothing beside it; returns the paths that were taken."""
    wanted, got = out.copy(), out.copy()
    Torch().bind([buffer(source)]).run(rows, [buffer(wanted)])
    made = cut(rows, source, got)
    run(made, shuffle)
    copy_rows.require_equal(got, wanted, made.rows)
    return set(made.rows["path"].tolist())


def test_random_rows() -> None:
    rng = np.random.default_rng(11)
    taken: set[int] = set()
    for k, (src, dst) in enumerate(PAIRS):
        for budget in (1, 40, 700, 6000):
            r, n, m = random_row(rng, src, dst, budget)
            taken |= same(r, noise(rng, n), noise(rng, m + 64), k % 2 * 7)
    assert taken == {ROWS, TRANSPOSE, GENERAL}


@pytest.mark.nightly
def test_random_rows_many() -> None:
    rng = np.random.default_rng(12)
    for k in range(100):
        for src, dst in PAIRS:
            r, n, m = random_row(rng, src, dst, int(rng.integers(1, 30_000)))
            same(r, noise(rng, n), noise(rng, m + 64), k % 2 * (k + 1))


SIDES = [
    (8, 640), (8, 2100), (11, 140), (16, 300), (16, 16), (20, 384), (63, 65), (128, 128), (129, 160),
    (256, 512), (300, 17),
]  # fmt: skip


@pytest.mark.parametrize("names", TRANSPOSED)
def test_transposes(names: str) -> None:
    """Every edge of the tiles: sides around the sizes of a tile, sources and destinations aligned and not."""
    src, dst = (BY_NAME[n] for n in names.split())
    rng = np.random.default_rng(13)
    taken: set[int] = set()
    places = [(0, 0), (3, 1), (5, dst.itemsize * 3), (64, 16), (16, src.itemsize * 5)]
    for r, source, nbytes in copy_rows.transposes(rng, src, dst, SIDES, places):
        taken |= same(r, source, noise(rng, nbytes), 3)
    assert taken == ({TRANSPOSE} if max(src.itemsize, dst.itemsize) <= 4 else {GENERAL})


@pytest.mark.parametrize(
    "names", ["float32 bfloat16", "bfloat16 float32", "int8 int8", "bfloat16 float8_e4m3fn"]
)
def test_lines(names: str) -> None:
    """Lines around a unit and a tile long, one or many, at every alignment of both sides."""
    src, dst = (BY_NAME[n] for n in names.split())
    rng = np.random.default_rng(14)
    taken: set[int] = set()
    sizes = [(1, 1), (1, 31), (1, 40_001), (3, 8192), (2, 8193), (70, 129), (1000, 33)]
    for r, source, nbytes in copy_rows.lines(
        rng, src, dst, sizes, (0, 1, dst.itemsize, src.itemsize, 8, 15, 24)
    ):
        taken |= same(r, source, noise(rng, nbytes), int(r["dst"][0]))
    assert ROWS in taken


@pytest.mark.parametrize("names", EVEN)
def test_even_lines(names: str) -> None:
    src, dst = (BY_NAME[n] for n in names.split())
    rng = np.random.default_rng(17)
    for r, source, nbytes in copy_rows.even_lines(rng, src, dst):
        assert same(r, source, noise(rng, nbytes), 0) == {ROWS}


@pytest.mark.parametrize("pitch", [1 << 16, 1 << 23, 1 << 28, (1 << 28) + 8])
def test_lines_far_apart(pitch: int, tmp_path: Path) -> None:
    """Lines of a tile that lie in a GiB, and beyond what 32 bits count; the file is sparse."""
    rng = np.random.default_rng(18)
    source = np.memmap(tmp_path / "sparse", np.uint8, "w+", shape=(20 * pitch,))
    for k in range(20):
        source[k * pitch : k * pitch + 32] = noise(rng, 32)
    u8 = BY_NAME["uint8"]
    assert same(row(u8, u8, (20, 32), (pitch, 1), (32, 1)), source, noise(rng, 704)) == {ROWS}


def test_a_table_of_many_rows_and_buffers() -> None:
    """Rows of every path, in one table over several misaligned buffers, each byte written by its own row."""
    rng = np.random.default_rng(15)
    f32, bf16 = BY_NAME["float32"], BY_NAME["bfloat16"]
    sources = [noise(rng, 70_000)[k:] for k in (0, 3, 8)]
    wanted = [noise(rng, 70_000)[k:] for k in (0, 2, 5)]
    got = [w.copy() for w in wanted]
    got = [np.concatenate([np.zeros(k, np.uint8), g])[k:] for k, g in zip((1, 0, 6), got, strict=True)]
    rows = []
    for at in range(0, 30_000, 3000):
        for _ in range(9):
            kind = int(rng.integers(4))
            shape = (int(rng.integers(1, 30)), int(rng.integers(1, 40)))
            strides = [((4, 4 * shape[0]), (2 * shape[1], 2)), ((4 * shape[1], 4), (2 * shape[1], 2)),
                       ((8 * shape[1], 8), (4 * shape[1], 4)), ((0, 0), (2 * shape[1], 2))][kind]  # fmt: skip
            r = row(f32, bf16, shape, *strides, (at, at * 2), zero=kind == 3)
            r["src_buffer"] = 0xFFFFFFFF if kind == 3 else int(rng.integers(3))
            r["dst_buffer"] = len(rows) % 3
            rows.append(r)
            at += 4
    table = np.concatenate(rows)
    table["dst"] = 0
    for b in range(3):  # one after the other, with gaps
        mine = table["dst_buffer"] == b
        reach = (table["shape"][mine][:, 2:].astype(np.int64) - 1) * table["dst_stride"][mine][:, 2:]
        size = reach.sum(axis=1) + 2 + int(b)
        table["dst"][mine] = np.cumsum(size) - size
        assert int(size.sum()) < 60_000
    Torch().bind([buffer(s) for s in sources]).run(table, [buffer(w) for w in wanted])
    made = tiles.tile(
        table,
        np.array([s.ctypes.data for s in sources], np.uint64),
        np.array([g.ctypes.data for g in got], np.uint64),
    )
    assert (np.diff(made.borders) > 0).sum() >= 2 and made.borders[-1] == len(made.owner)
    assert (made.sources % 16 == 0).all() and (made.destinations % 16 == 0).all()
    run(made, 5)
    for g, w in zip(got, wanted, strict=True):
        assert np.array_equal(g, w)


@pytest.mark.parametrize("s", [1, 2, 4])
@pytest.mark.parametrize("d", [1, 2, 4])
def test_shared_memory_is_free_of_bank_conflicts(s: int, d: int) -> None:
    assert _C.bank_conflicts(s, d) == (1, 1)


def test_tiles_move_equal_bytes() -> None:
    """Large rows: no tile has more than its share, so the count is the bytes by the size of a tile."""
    f32, bf16 = BY_NAME["float32"], BY_NAME["bfloat16"]

    def count(src: DType, dst: DType, shape: tuple[int, ...], turn: bool) -> int:
        n, m = shape
        strides = (src.itemsize, n * src.itemsize) if turn else (m * src.itemsize, src.itemsize)
        r = row(src, dst, shape, strides, (m * dst.itemsize, dst.itemsize))
        return len(tiles.tile(r, np.array([4096], np.uint64), np.array([4096], np.uint64)).owner)

    for src, dst in [(f32, bf16), (bf16, bf16), (bf16, f32)]:
        wide = 4096 * 4096 * max(src.itemsize, dst.itemsize)
        assert count(src, dst, (4096, 4096), False) == wide // (4 << 10)
        assert count(src, dst, (4096, 4096), True) == 4096 * 4096 * src.itemsize // (
            (16 << 10) if (src, dst) != (bf16, f32) else (8 << 10)
        )


def test_tiles_of_short_lines_are_as_full() -> None:
    """What many partitions hold of a matrix, turned: a tile has more of the short lines."""
    for names, log in [("float32 bfloat16", 12), ("bfloat16 bfloat16", 13), ("int8 int8", 14)]:
        src, dst = (BY_NAME[n] for n in names.split())
        s, d = src.itemsize, dst.itemsize
        for high in (8, 16, 32, 64):
            r = row(src, dst, (4096, high), (s, 4096 * s), (high * d, d))
            made = tiles.tile(r, np.array([4096], np.uint64), np.array([4096], np.uint64))
            assert (made.rows["path"] == TRANSPOSE).all()
            full = 1 << (log - (high * d < 16))
            assert len(made.owner) == 4096 * high // full, (names, high)


def test_refusals() -> None:
    int8 = BY_NAME["int8"]
    r = row(int8, int8, (1 << 16, 1 << 15, 40), (0, 0, 1), (0, 0, 1))
    base = np.array([0], np.uint64)
    with pytest.raises(ViewError, match="2147483648 lines"):
        tiles.tile(r, base, base)
    empty = np.zeros(0, COPY)
    made = tiles.tile(empty, base, base)
    assert made.borders == (0, 0, 0, 0) and len(made.owner) == 0
    zero_size = row(int8, int8, (0, 5), (5, 1), (5, 1))
    assert len(tiles.tile(zero_size, base, base).rows) == 0
