"""Masters offloaded to NVMe: what DeepSpeed left of them, and raw files that are not what they should be."""

from __future__ import annotations

import shutil
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt import sources
from reading import refuses
from real.truth import read_truth
from sources.test_zero_bad import edit, optim
from zero_writer import write_zero

PARAMS = {
    "a.weight": torch.arange(35.0).reshape(7, 5),
    "b": torch.ones(13),
    "c.weight": torch.full((4, 4), 0.3),
}
CONFIG = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def raw(folder, rank, name):
    return folder / f"offloaded_tensors/rank{rank:02}/{name}.tensor.swp"


@pytest.fixture
def offloaded(tmp_path):
    """(config, kept) -> a tag folder of two ranks whose sub-groups from number `kept` on lie in raw files."""

    def make(config=CONFIG, kept=1):
        write_zero(tmp_path, PARAMS, stage=3, world=2, sub_group_size=8)
        folder = tmp_path / "global_step2"
        for rank in range(2):

            def swap(content, rank=rank):
                flats = content["optimizer_state_dict"]["fp32_flat_groups"]
                for k in range(kept, len(flats)):
                    file = raw(folder, rank, f"{k}_{k}")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(flats[k].numpy().tobytes().ljust(1024, b"\xff"))
                    flats[k] = torch.Tensor()
                    flats[k].ds_id = f"{k}_{k}"

            edit(optim(folder, rank), swap)
            states = folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            edit(states, lambda content: content.update(ds_config=config))
        return folder

    return make


def test_what_deepspeed_left(packed):
    """Its I/O was a stand-in, which wrote the same bytes to the same places."""
    path = packed("nvme", "z3-w2")
    ckpt = sources.open(path)
    found = {n: t for n, t in fastckpt.consolidate(ckpt).items() if n in ckpt.entries}
    assert read_truth(path).mismatches(found) == []
    swapped = [f for f in ckpt.files if f.path.endswith(".tensor.swp")]
    assert len(swapped) == 6


@pytest.mark.parametrize("kept", [0, 1])
def test_sub_groups_in_raw_files(offloaded, kept):
    found = fastckpt.consolidate(offloaded(kept=kept).parent)
    assert {*found} == {*PARAMS}
    assert [n for n, t in PARAMS.items() if not torch.equal(found[n], t)] == []


def test_another_save_is_another_source(offloaded):
    folder = offloaded()
    before = sources.open(folder)
    file = raw(folder, 1, "1_1")
    file.write_bytes(b"\x01" + file.read_bytes()[1:])
    assert sources.open(folder).headers != before.headers
    assert sources.open(folder).structure == before.structure


def test_raw_files_that_are_longer(offloaded):
    """DeepSpeed writes over what an earlier run of other sizes left."""
    folder = offloaded()
    with raw(folder, 0, "1_1").open("ab") as f:
        f.write(b"\xff" * 4096)
    assert torch.equal(fastckpt.consolidate(folder)["b"], PARAMS["b"])


def test_raw_files_that_are_not_right(offloaded, tmp_path):
    folder = offloaded()
    file = raw(folder, 1, "1_1")
    whole = file.read_bytes()
    file.write_bytes(whole[:28])
    refuses(
        folder, "flat group 1", "offloaded to NVMe", "rank01/1_1.tensor.swp, which has 28 bytes, wanted 60"
    )
    file.unlink()
    refuses(folder, "rank01/1_1.tensor.swp, which is not there; copy it with the rest")
    file.write_bytes(whole)
    shutil.move(folder / "offloaded_tensors", tmp_path / "elsewhere")
    refuses(folder, "rank00/1_1.tensor.swp, which is not there")


@pytest.mark.parametrize("said", [None, "../../0_1", "1_2", 7, "x"])
def test_names_of_raw_files(offloaded, said):
    folder = offloaded()

    def name(content):
        flats = content["optimizer_state_dict"]["fp32_flat_groups"]
        flats[1] = torch.Tensor()
        if said is not None:
            flats[1].ds_id = said

    edit(optim(folder, 1), name)
    refuses(folder, "rank_1_mp_rank_00_optim_states.pt says their file is", "wanted 1_1")


HALF = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
FP16 = {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}


@pytest.mark.parametrize(
    "config", [HALF, FP16, "ds_config.json", {}], ids=["bf16", "fp16", "a path", "empty"]
)
def test_a_dtype_that_nothing_says(offloaded, config):
    """DeepSpeed leaves an empty fp32 tensor whatever the masters are; a sub-group in memory would tell."""
    refuses(offloaded(config, kept=0), "nothing says whether they are fp32")


def test_a_sub_group_in_memory_says_the_dtype(offloaded):
    assert torch.equal(fastckpt.consolidate(offloaded("ds_config.json"))["b"], PARAMS["b"])


def test_several_model_parallel_ranks(offloaded):
    """Whose directory is whose is by the rank among all."""
    folder = offloaded()
    for rank in range(2):
        one = folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        edit(one, lambda content: content.update(mp_world_size=2))
        for path in (one, optim(folder, rank)):
            shutil.copy(path, str(path).replace("mp_rank_00", "mp_rank_01"))
    refuses(folder, "not read of several model-parallel ranks")


def test_the_real_files_moved(packed, tmp_path):
    path = Path(shutil.copytree(packed("nvme", "z3-w2"), tmp_path / "run"))
    shutil.rmtree(path / "global_step2/offloaded_tensors")
    refuses(path, "masters were offloaded to NVMe", "rank00/0_1.tensor.swp, which is not there")
