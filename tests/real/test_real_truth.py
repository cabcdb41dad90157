"""The real checkpoints are what their names say: DeepSpeed's own converter agrees with the gathered truth."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from real.checkpoints import MADE
from real.truth import read_truth


@pytest.mark.parametrize("name", MADE)
def test_deepspeed_agrees_with_the_gathered_truth(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    truth = read_truth(checkpoint(name))
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    def convert() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            convert_zero_checkpoint_to_fp32_state_dict(str(truth.path), str(tmp_path))

    if truth.stage == 0:
        with pytest.raises(TypeError):
            convert()
        return
    convert()
    got = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    tied = {alias: got.pop(alias) for alias in truth.shared}
    assert all(tied[a].data_ptr() == got[h].data_ptr() for a, h in truth.shared.items())
    dropped = truth.frozen if truth.stage == 1 and not truth.exclude_frozen else frozenset()
    assert truth.mismatches(got) == sorted(f"missing {k}" for k in dropped)
