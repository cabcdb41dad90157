"""The tensors of a plan as columns."""

from __future__ import annotations

import numpy as np
from fastckpt import dtypes
from fastckpt.planning.planned import Made


def test_the_rows_of_ranks_stand_in_the_order_of_the_plan() -> None:
    """However the ranks are mixed, one that has none among them."""
    of = np.random.default_rng(7).integers(0, 9, 200).tolist()
    made = Made([r for r in of if r != 4], [], [dtypes.float32] * len(of), [])
    rows = made.of_ranks(range(3, 12))
    assert [*rows] == [*range(3, 12)] and not len(rows[4]) and not len(rows[11])
    assert all(rows[r].tolist() == [i for i, rank in enumerate(made.ranks) if rank == r] for r in rows)
    assert {r: own.tolist() for r, own in Made().of_ranks([0, 1]).items()} == {0: [], 1: []}
