"""Universal checkpoints: what DeepSpeed's ds_to_universal makes of the kept checkpoints, and bad ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt import sources
from fastckpt.errors import SourceError
from reading import refuses

FIXTURES = Path(__file__).parents[1] / "fixtures"


def converted(name: str, to: Path) -> Path:
    """DeepSpeed's own conversion of a kept checkpoint."""
    pytest.importorskip("deepspeed", reason="DeepSpeed makes these checkpoints, and is not installed")
    argv = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    argv += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    argv += ["--input_folder", str(FIXTURES / name / "global_step2")]
    argv += ["--output_folder", str(to / "global_step2_universal")]
    subprocess.run(argv, check=True, capture_output=True, timeout=900)
    return to


@pytest.fixture(scope="module")
def stage_2(tmp_path_factory):
    return converted("z2-mixed-w3", tmp_path_factory.mktemp("stage2"))


@pytest.fixture(scope="module")
def stage_3(tmp_path_factory):
    return converted("z3-mixed-w4", tmp_path_factory.mktemp("stage3"))


def same(got: Path, name: str) -> None:
    """The masters, buffers and frozen parameters that the checkpoint gave before it was converted."""
    a, b = fastckpt.consolidate(got), fastckpt.consolidate(FIXTURES / name)
    assert list(a) == list(b)
    assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in b if b[n].ndim)
    assert dict(sources.open(got).aliases) == dict(sources.open(FIXTURES / name).aliases)


def test_what_is_no_universal_checkpoint(tmp_path):
    shutil.copytree(FIXTURES / "z2-mixed-w3/global_step2", tmp_path / "t")
    for file in (tmp_path / "t").glob("*optim*"):
        file.unlink()
    (tmp_path / "t/zero").mkdir()
    states, saved = tmp_path / "t/mp_rank_00_model_states.pt", None
    for changes, words in (
        ({"param_shapes": [{"../b": (13,)}]}, "'../b' is no directory of masters"),
        ({"param_shapes": None}, "not read: ZeRO was off: param_shapes is None"),
        ({"num_experts": [2]}, "not read: experts of MoE layers"),
    ):
        saved = saved or torch.load(states, weights_only=False)
        torch.save({**saved, **changes}, states)
        refuses(tmp_path / "t", words)


def test_stages_1_and_2(stage_2):
    same(stage_2, "z2-mixed-w3")
    same(stage_2 / "global_step2_universal", "z2-mixed-w3")
    assert sources.open(stage_2).facts["universal"] is True
    module = fastckpt.consolidate(stage_2, weights="module")
    assert torch.equal(module["up.weight"], fastckpt.consolidate(stage_2)["up.weight"].bfloat16().float())


def test_stage_3(stage_3):
    same(stage_3, "z3-mixed-w4")
    assert "table.weight" not in sources.open(stage_3, exclude_frozen=True)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["z1-mixed-w2", "z3-llama-w2-even", "z3-llama-w2-subgroups"])
def test_every_other_stage(tmp_path, name):
    same(converted(name, tmp_path), name)


def test_round_robin_which_the_converter_gets_wrong(tmp_path):
    """It takes the order of the parameters from param_slice_mappings; the 16-bit copy tells."""
    path = converted("z2-llama-w2-robin", tmp_path)
    with pytest.raises(SourceError, match="not of the same step"):
        sources.open(path)


def test_masters_that_are_missing_or_others(stage_2, tmp_path):
    path = Path(shutil.copytree(stage_2, tmp_path / "run"))
    at = path / "global_step2_universal/zero/up.weight/fp32.pt"
    right = torch.load(at)
    torch.save({"param": right["param"][:-1]}, at)
    refuses(path, "up.weight/fp32.pt: has", "wanted")
    torch.save({"param": right["param"].T}, at)
    refuses(path, "up.weight/fp32.pt: has", "wanted")
    torch.save({"cat_dim": 0}, at)
    refuses(path, "up.weight/fp32.pt: has no tensor")
    torch.save({"param": right["param"] + 1}, at)
    refuses(path, "up.weight", "not of the same step")
    at.unlink()
    refuses(path, "up.weight/fp32.pt: missing")


def test_beside_the_run_it_was_made_of(stage_2, tmp_path):
    """`latest` goes first; the universal one is a tag."""
    run = Path(shutil.copytree(FIXTURES / "z2-mixed-w3", tmp_path / "run"))
    shutil.copytree(stage_2, run, dirs_exist_ok=True)
    assert "universal" not in sources.open(run).facts
    assert sources.open(run, tag="global_step2_universal").facts["universal"] is True
    shutil.copy(next((run / "global_step2").glob("*optim_states.pt")), run / "global_step2_universal")
    with pytest.raises(SourceError, match="files of two runs"):
        sources.open(run, tag="global_step2_universal")
