"""What benchmarks/kernels.md promises of the paths: whole sectors, free banks, few instructions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fastckpt.dtypes import BY_NAME
from ptx.counts import CASES, QUANTISED, SECTOR, Case, count, count_quantised, main

pytest.importorskip("fastckpt._C", reason="the compiled module is not built")
pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: the kernels are not compiled here"
)

KEPT = Path(__file__).parents[2] / "benchmarks" / "kernels.md"


@pytest.mark.parametrize("name", CASES)
def test_whole_sectors_free_banks_few_instructions(name: str) -> None:
    case = CASES[name]
    got = count(case)
    assert got.path == name.split()[0]
    elements = case.shape[0] * case.shape[1]
    s, d = (BY_NAME[x].itemsize for x in case.types.split())
    assert got.waves == got.least
    read, written = got.read.sectors * SECTOR / (elements * s), got.written.sectors * SECTOR / (elements * d)
    if case.at == 0:
        assert read == written == 1
    else:  # each vector is asked for by two threads; a line's borders go element by element
        assert read < 2.1 and written < 1.01
    # An H200's 132 multiprocessors issue 4 instructions a cycle of 1.98 GHz: 4.6 bytes each are its 4.8 TB/s.
    assert got.per_instruction > 7


def test_a_transposed_tile_that_is_cut_keeps_its_vectors() -> None:
    """As every second one of 64, 192 or 1,344 lines of two bytes; the last vector is asked for again."""
    got = count(Case("bfloat16 bfloat16", (192, 2048), turned=True))
    assert got.per_instruction > 7 and got.read.sectors * SECTOR < 1.1 * 192 * 2048 * 2


@pytest.mark.parametrize("name", QUANTISED)
def test_quantising_takes_few_instructions(name: str) -> None:
    """Fewer than an H200 issues while its memory moves the bytes."""
    case = QUANTISED[name]
    got = count_quantised(case)
    assert got.written.sectors * SECTOR == case.shape[0] * case.shape[1]
    assert got.per_instruction > 4.6


@pytest.mark.nightly
def test_the_table_is_the_one_that_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert capsys.readouterr().out in KEPT.read_text()
