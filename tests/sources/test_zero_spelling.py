"""Models whose `state_dict` leaves a prefix of their names away, as trl's with a value head."""

from __future__ import annotations

import pytest
import reading
import torch
from fastckpt import sources
from zero_writer import write_zero

NAMES = ("inner.embed.weight", "inner.a.weight", "inner.a.bias", "inner.still.weight", "head.weight")
PARAMS = {n: torch.randn(6, 4, generator=torch.Generator().manual_seed(k)) for k, n in enumerate(NAMES)}
BUFFERS = {"inner.mean": torch.arange(4.0), "count": torch.tensor(7)}
TIED = {"inner.out.weight": "inner.embed.weight"}


@pytest.mark.parametrize("stage", [2, 3])
def test_parameters_keep_their_names_and_copies_are_no_frozen_ones(tmp_path, stage):
    expected = write_zero(
        tmp_path, PARAMS, stage=stage, world=2, frozen=["inner.still.weight"], buffers=BUFFERS, tied=TIED,
        left_away="inner.",
    )  # fmt: skip
    ckpt = sources.open(tmp_path)
    assert [*ckpt, *ckpt.aliases] == list(expected)
    for name, want in expected.items():
        assert (reading.read(ckpt[name]) == reading.bits(want)).all(), name
    kinds = {n: e.kind for n, e in ckpt.entries.items()}
    assert {n for n, k in kinds.items() if k == "frozen"} == {"inner.still.weight"}
    assert {n for n, k in kinds.items() if k == "buffer"} == set(BUFFERS)


def test_the_copies_are_compared_under_the_parameters_names(tmp_path):
    """Partitions of two ranks that were swapped are seen, although `module` spells every name otherwise."""
    write_zero(tmp_path, PARAMS, stage=2, world=2, left_away="inner.", legacy=True)
    first, second = sorted(tmp_path.glob("*/*optim_states.pt"))
    parked = first.rename(tmp_path / "parked")
    second.rename(first)
    parked.rename(second)
    with pytest.raises(sources.SourceError, match="another rank"):
        sources.open(tmp_path)


def test_a_name_that_does_not_fit_leaves_all_as_they_are(tmp_path):
    """`still.weight` has another shape than `inner.still.weight`, so it may be anything."""
    expected = write_zero(
        tmp_path, PARAMS, stage=2, world=2, buffers={"still.weight": torch.ones(3)}, left_away="inner."
    )
    ckpt = sources.open(tmp_path)
    assert {*expected} < {*ckpt.entries}
    assert ckpt.entries["a.weight"].kind == "frozen"
