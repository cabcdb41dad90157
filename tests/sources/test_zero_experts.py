"""Experts of DeepSpeed's MoE layers: what DeepSpeed wrote against the model it had in memory; bad sets."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest
import torch
import zero_writer
from fastckpt import sources
from fastckpt.errors import SourceError
from fastckpt.sources import zero
from reading import refuses
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEPT = ("moe-z2-w4", "moe-z2-w4-seeds", "moe-z1-w4-data-first", "moe-z0-w2")
EXPERT = "moe.0.deepspeed_moe.experts.deepspeed_experts.{}.0.weight"


def equal(path: Path, weights: str = "master") -> None:
    """Every tensor of the checkpoint, cast to what the model trained in, is the model's."""
    truth = load_file(path / "truth.safetensors")
    dtype = str(truth["out.weight"].dtype).removeprefix("torch.")
    found = fastckpt.reshard(sources.open(path, weights=weights), layout="same", dtype=dtype)[0]
    assert {*found} == {*truth}
    for name, want in truth.items():
        assert torch.equal(found[name], want), name


@pytest.mark.parametrize("name", KEPT)
def test_what_deepspeed_wrote_is_what_it_trained(name):
    equal(FIXTURES / name)
    if "z0" not in name:
        equal(FIXTURES / name, weights="module")
    assert sources.open(FIXTURES / name).facts["experts"] == [4, 2]


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("more", [(), ("--data-first",)], ids=["", "data-first"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_installed_deepspeed_writes(tmp_path, stage, world, ep, more, dtype):
    pytest.importorskip("deepspeed")
    made = Path(__file__).parents[1] / "real/make_moe.py"
    sizes = ["--world", str(world), "--ep", str(ep), "--stage", str(stage), "--dtype", dtype]
    subprocess.run([sys.executable, made, *sizes, *more, tmp_path], check=True, timeout=900)
    equal(tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("more", [(), ("--data-first",)], ids=["", "data-first"])
def test_what_it_writes_under_several_hash_seeds(tmp_path, stage, more):
    pytest.importorskip("deepspeed")
    made = Path(__file__).parents[1] / "real/make_moe.py"
    sizes = ["--world", "4", "--ep", "4", "--stage", str(stage), "--seeds", "0,1,1,0"]
    subprocess.run([sys.executable, made, *sizes, *more, tmp_path], check=True, timeout=900)
    equal(tmp_path)


def test_masters_have_more_bits_than_the_experts_files(tmp_path):
    path = FIXTURES / "moe-z1-w4-data-first"
    masters, copies = fastckpt.consolidate(path), fastckpt.consolidate(path, weights="module")
    name = EXPERT.format(3)
    assert masters[name].dtype == torch.float32
    assert torch.equal(masters[name].bfloat16(), copies[name].bfloat16())
    assert not torch.equal(masters[name], copies[name])


def test_experts_taken_for_others_are_found(monkeypatch):
    """Had the order of ranks been taken wrongly, the masters would not be those of the experts' own files."""
    right = zero.experts._sets
    monkeypatch.setattr(zero.experts, "_sets", lambda *sizes: reversed(list(right(*sizes))))
    with pytest.raises(SourceError, match=r"deepspeed_experts.*is .* \(float32\), its master is"):
        sources.open(FIXTURES / "moe-z2-w4")
    monkeypatch.undo()
    monkeypatch.setattr(zero.state, "_data_before_experts", lambda config: False)
    with pytest.raises(SourceError, match="group 2 holds 290 elements over 2 ranks"):
        sources.open(FIXTURES / "moe-z1-w4-data-first")


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(FIXTURES / "moe-z2-w4", tmp_path / "run"))


def change(path: Path, edit) -> None:
    tree = torch.load(path, weights_only=False)
    edit(tree)
    torch.save(tree, path)


def test_files_of_experts_that_are_missing_or_too_many(copied, tmp_path):
    folder = copied / "global_step2"
    moved = tmp_path / "disk/layer_0_expert_3_mp_rank_00_model_states.pt"
    moved.parent.mkdir()
    (folder / moved.name).rename(moved)
    refuses(copied, "1 of 6 expert files missing: expert 3 of MoE layer 0")
    assert EXPERT.format(3) in sources.open(copied, also=[moved.parent])
    moved.rename(folder / moved.name)
    shutil.copy(folder / moved.name, folder / "layer_1_expert_2_mp_rank_00_model_states.pt")
    refuses(copied, "layer_1_expert_2", "expert 2 of MoE layer 1", "left from another run")
    (folder / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    shutil.copy(folder / "layer_0_expert_2_mp_rank_00_model_states.pt", folder / moved.name)
    refuses(copied, "layer_0_expert_3", "was saved as layer_0_expert_2_mp_rank_00_model_states.pt")
    change(folder / moved.name, lambda tree: None)  # saved again, by its own name
    refuses(copied, "layer_0_expert_3", "deepspeed_experts.2.0.weight' is no tensor of expert 3")


def test_expert_files_of_another_step(copied):
    path = copied / "global_step2/layer_0_expert_2_mp_rank_00_model_states.pt"
    change(path, lambda tree: tree[EXPERT.format(2)].add_(1))
    refuses(copied, EXPERT.format(2), "its master is")
    change(path, lambda tree: tree.pop(EXPERT.format(2)))
    refuses(copied, EXPERT.format(2), "the experts' files have nothing")


def test_groups_that_fit_no_ranks(copied):
    path = copied / "global_step2/mp_rank_00_model_states.pt"

    def mixed(tree):
        dense, experts = tree["param_shapes"]
        experts["out.bias"] = dense.pop("out.bias")

    change(path, mixed)
    refuses(copied, "group 1 is cut over 2 of 4 ranks and is not of experts alone")


def renumbered(tree):
    for group in tree["param_shapes"]:
        for name in list(group):
            group[name.replace("deepspeed_experts.1.", "deepspeed_experts.5.")] = group.pop(name)


ODD = {  # of rank 0's model states, or of every rank's optimizer state
    "a group more": (
        lambda t: t["param_shapes"].append({}),
        lambda s: None,
        "rank_0_mp_rank_00_optim_states.pt: 2 groups in partition_count, 3 in param_shapes",
    ),
    "ranks": (
        lambda t: None,
        lambda s: s.update(partition_count=[4, 3]),
        "group 1 is cut over 3 ranks, which does not divide 4",
    ),
    "paddings": (
        lambda t: None,
        lambda s: s["param_alignment_paddings"].append([]),
        "3 groups in param_alignment_paddings, 2 in param_shapes",
    ),
    "pieces": (
        lambda t: None,
        lambda s: s["param_slice_mappings"].append({}),
        "3 groups in param_slice_mappings, 2 in param_shapes",
    ),
    "numbers": (
        renumbered,
        lambda s: s.pop("param_slice_mappings"),
        "param_shapes has experts [0, 5] of moe.0.deepspeed_moe.experts.deepspeed_experts.; wanted 0, 1, ..",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_groups_that_are_not_counted_alike(copied, case):
    of_model, of_optim, words = ODD[case]
    change(copied / "global_step2/mp_rank_00_model_states.pt", of_model)
    for number in range(4):
        change(rank(copied, number), lambda tree: of_optim(tree["optimizer_state_dict"]))
    refuses(copied, words)


def test_a_tensor_in_two_experts_files(copied):
    first, second = (copied / f"global_step2/layer_{k}_expert_1_mp_rank_00_model_states.pt" for k in (0, 1))
    change(second, lambda tree: tree.update(torch.load(first)))
    refuses(copied, "layer_1_expert_1", f"{EXPERT.format(1)} is in another expert's file too")


def test_experts_at_stage_3(tmp_path):
    """DeepSpeed refuses to train them so."""
    name = EXPERT.format(0)
    zero_writer.write_zero(tmp_path, {"w": torch.ones(6)}, stage=3, world=2, client={"num_experts": [1]})
    torch.save({name: torch.ones(2)}, tmp_path / "global_step2/layer_0_expert_0_mp_rank_00_model_states.pt")
    refuses(tmp_path, "MoE layers at stage 3")


MASTERS = "single_partition_of_fp32_groups"
OF_RANK = ("partition_count", "param_slice_mappings", MASTERS, "param_alignment_paddings")
"""What lies in a rank's order of groups."""


def rank(path: Path, number: int) -> Path:
    return path / f"global_step2/zero_pp_rank_{number}_mp_rank_00_optim_states.pt"


@pytest.fixture
def seeds(tmp_path):
    """DeepSpeed orders groups of experts by a set of names: ranks 1 and 3 had another PYTHONHASHSEED."""
    pytest.importorskip("deepspeed", reason="torch.load, which `change` calls, makes its classes")
    return Path(shutil.copytree(FIXTURES / "moe-z2-w4-seeds", tmp_path / "seeds"))


def test_groups_in_another_order_on_another_rank(seeds):
    def count(number: int) -> list[int]:
        return torch.load(rank(seeds, number), weights_only=False)["optimizer_state_dict"]["partition_count"]

    assert [count(k) for k in range(4)] == [[4, 2, 1], [4, 1, 2]] * 2
    equal(seeds)
    equal(seeds, weights="module")

    def swap(tree) -> None:
        for groups in map(tree["optimizer_state_dict"].get, OF_RANK):
            groups[1], groups[2] = groups[2], groups[1]

    change(rank(seeds, 0), swap)
    refuses(seeds, "zero_pp_rank_0", "fit no order")  # param_shapes are of that process


def test_a_group_that_is_not_what_it_is_counted_as(copied, seeds):
    """The number of ranks it is cut over fits, the names of what it holds do not."""
    change(rank(copied, 3), lambda tree: tree["optimizer_state_dict"]["partition_count"].reverse())
    refuses(copied, "zero_pp_rank_3", "partition_count is (2, 4), wanted (4, 2)", "fit no order")
    change(rank(seeds, 3), lambda tree: tree["optimizer_state_dict"].update(partition_count=[4, 2, 1]))
    refuses(seeds, "zero_pp_rank_3", "fit no order of rank 0's")


def test_groups_that_fit_two_orders():
    """Two groups are cut over as many ranks: the names of what they hold, or paddings, tell them apart."""
    names = ["dense", *(EXPERT.format(e) for e in range(3))]
    shapes = [{name: (1,)} for name in names]

    def state(counts, held, flats, paddings=None):
        pieces = held and tuple({n: 0} for n in held)
        return zero.state.OptimState(2, counts, flats, (), paddings, pieces, None, None, "")

    first = state((4, 1, 2, 2), None, (0, 1, 2, 3))
    told = state((4, 2, 2, 1), [names[0], names[3], names[2], names[1]], (0, 3, 2, 1))
    (_, found) = zero.experts.in_order([first, told], shapes, None, "ab")
    assert found.flats == first.flats and found.counts == first.counts
    assert zero.experts.in_order([first, first], shapes, None, "ab") == [first, first]
    with pytest.raises(SourceError, match="b: its groups of experts fit more than one order"):
        zero.experts.in_order([first, state(told.counts, None, told.flats)], shapes, None, "ab")
    padded = state(first.counts, None, first.flats, ((0,), (0,), (1,), (2,)))
    turned = state(first.counts, None, (0, 1, 3, 2), ((0,), (0,), (2,), (1,)))
    (_, found) = zero.experts.in_order([padded, turned], shapes, None, "ab")
    assert found.flats == first.flats and found.alignment == padded.alignment
    no_piece = state(told.counts, ["dense", names[3], names[2], names[1]], told.flats)
    no_piece.held[1].clear()  # of a small group some ranks hold nothing: the others leave it one place
    assert zero.experts.in_order([first, no_piece], shapes, None, "ab")[1].flats == first.flats


def test_frozen_experts_lie_in_their_files_alone(copied):
    """What param_shapes does not name is frozen, as for every other parameter of stages 1 and 2."""
    truth = load_file(copied / "truth.safetensors")
    more = "moe.1.deepspeed_moe.experts.deepspeed_experts.{}.2.more"
    for e in (0, 1):
        path = copied / f"global_step2/layer_1_expert_{e}_mp_rank_00_model_states.pt"
        change(path, lambda tree, e=e: tree.update({more.format(e): torch.full((3,), e + 1.0)}))
    found = sources.open(copied)
    assert found.entries[more.format(1)].kind == "frozen" and len(found) == len(truth) + 2
    assert fastckpt.consolidate(copied)[more.format(1)].tolist() == [2, 2, 2]
    assert more.format(1) not in sources.open(copied, exclude_frozen=True)


def test_old_names_are_refused(copied):
    folder = copied / "global_step2"
    new = folder / "layer_0_expert_0_mp_rank_00_model_states.pt"
    shutil.copy(new, folder / "expert_0_mp_rank_00_model_states.pt")
    refuses(copied, "expert files of old DeepSpeed versions are not supported yet")
