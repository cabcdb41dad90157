"""AutoEP: what DeepSpeed wrote against the model it had in memory, the hub's names, wrong metadata."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt import sources
from fastckpt.errors import SourceError
from fastckpt.sources import zero
from reading import refuses
from safetensors.torch import load_file

MAKER = Path(__file__).parents[1] / "real/make_autoep.py"
STACK = "model.layers.1.mlp.experts.w1"

HUBS = {
    ".mlp.router.": ".mlp.gate.",
    ".mlp.shared_experts.": ".mlp.shared_expert.",
    ".mlp.shared_experts_gate.": ".mlp.shared_expert_gate.",
}
"""Qwen2-MoE's names for what AutoEP calls otherwise."""


def equal(path: Path, weights: str = "master") -> None:
    """Every tensor of the checkpoint, cast to what the model trained in, is the model's."""
    truth = load_file(path / "truth.safetensors")
    dtype = str(truth["lm_head.weight"].dtype).removeprefix("torch.")
    ckpt = sources.open(path, weights=weights)
    found = fastckpt.reshard(ckpt, layout="same", dtype=dtype)[0]
    assert {*ckpt} == {*truth}
    for name, want in truth.items():
        assert torch.equal(found[name], want), name


@pytest.fixture
def copied(packed, tmp_path):
    """kept name -> a copy of it."""
    return lambda name: Path(shutil.copytree(packed("autoep", name), tmp_path / name))


def change(path: Path, edit) -> None:
    tree = torch.load(path, weights_only=False)
    edit(tree)
    torch.save(tree, path)


def test_what_deepspeed_wrote_is_what_it_trained(packed):
    for name in ("z2-w4", "z3-w4"):
        equal(packed("autoep", name))
    equal(packed("autoep", "z2-w4"), weights="module")
    ckpt = sources.open(packed("autoep", "z2-w4"))
    names = [[f"model.layers.{i}.mlp.{at}.gate.weight" for i in (0, 1)] for at in ("gate", "router")]
    assert [*ckpt.aliases] == names[0] and [*ckpt.aliases.values()] == names[1]
    assert ckpt.entries[STACK].shape == (4, 6, 8) and ckpt.entries[STACK].kind == "parameter"


def test_the_hub_has_its_own_names(packed):
    path = packed("autoep", "z2-w4")
    truth = load_file(path / "truth.safetensors")
    (found,) = fastckpt.reshard(path, dtype="bfloat16")
    wanted = {}
    for name, t in truth.items():
        at, _, leaf = name.partition(".experts.")
        if leaf:
            matrix = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[leaf]
            wanted |= {f"{at}.experts.{e}.{matrix}.weight": t[e] for e in range(4)}
            continue
        for old, new in HUBS.items():
            name = name.replace(f"{old}gate.", new) if old == ".mlp.router." else name.replace(old, new)
        wanted[name] = t
    assert {*found} == {*wanted}
    assert [n for n, t in wanted.items() if not torch.equal(found[n], t)] == []
    (third,) = fastckpt.reshard(packed("autoep", "z3-w4"), dtype="float32")
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in third
    assert third["model.layers.1.mlp.experts.3.up_proj.weight"].shape == (6, 8)


MATRIX = {
    "z0": ("--world", "2", "--stage", "0", "--model", "qwen2_moe"),
    "z1-ep1": ("--world", "2", "--ep", "1", "--stage", "1", "--model", "mixtral", "--dtype", "bfloat16"),
    "z1-robin": ("--stage", "1", "--round-robin"),
    "z2-ep4": ("--ep", "4", "--model", "qwen2_moe"),
    "z2-data-first": ("--data-first", "--model", "deepseek_v3", "--dtype", "bfloat16"),
    "z2-frozen": ("--world", "2", "--freeze", "layers.0.mlp.experts", "--dtype", "bfloat16"),
    "z3": ("--stage", "3", "--model", "qwen2_moe", "--dtype", "bfloat16"),
    "z3-ep1": ("--world", "2", "--ep", "1", "--stage", "3", "--sub-group-size", "300"),
    "z3-ep4": ("--ep", "4", "--stage", "3", "--model", "mixtral"),
    "z3-frozen": ("--world", "2", "--stage", "3", "--model", "qwen2_moe", "--freeze", "shared_expert"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("run", MATRIX)
def test_what_the_installed_deepspeed_writes(tmp_path, run):
    pytest.importorskip("deepspeed.module_inject.auto_ep")
    subprocess.run([sys.executable, MAKER, *MATRIX[run], tmp_path], check=True, timeout=900)
    equal(tmp_path)
    if "z3" not in run:
        equal(tmp_path, weights="module")


@pytest.mark.nightly
def test_beside_autotp(tmp_path):
    pytest.importorskip("deepspeed.module_inject.auto_ep")
    run = ("--world", "2", "--tp", "2", "--model", "mixtral")
    subprocess.run([sys.executable, MAKER, *run, tmp_path], check=True, timeout=900)
    refuses(tmp_path, "AutoEP beside AutoTP (folding)")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["z2-w4", "z3-w4"])
def test_deepspeeds_own_converter_agrees(packed, tmp_path, name):
    pytest.importorskip("deepspeed.checkpoint.autoep_universal")
    path = packed("autoep", name)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    folders = ["--input_folder", path / "global_step2", "--output_folder", tmp_path / "universal"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, *workers, *folders], check=True, timeout=900, env=environment)
    ckpt = sources.open(path)
    found = fastckpt.consolidate(ckpt)
    for name, entry in ckpt.entries.items():
        if entry.kind == "parameter":
            theirs = torch.load(tmp_path / f"universal/zero/{name}/fp32.pt", weights_only=False)
            theirs = theirs["param"] if isinstance(theirs, dict) else theirs  # flat at stage 3, but experts
            assert torch.equal(found[name].reshape(-1), theirs.reshape(-1)), name


def test_experts_taken_for_others_are_found(packed, monkeypatch):
    """Had the order of ranks been taken wrongly, the masters would not be those of the experts' own files."""
    right = zero.experts._sets
    monkeypatch.setattr(zero.experts, "_sets", lambda *sizes: reversed(list(right(*sizes))))
    with pytest.raises(SourceError, match=r"experts\.w1\.0: element 0 of .* its master is"):
        sources.open(packed("autoep", "z2-w4"))


def test_experts_files(copied):
    path = copied("z2-w4")
    one = path / "global_step2/layer_1_expert_2_mp_rank_00_model_states.pt"
    change(one, lambda tree: tree[f"{STACK}.2"].add_(1))
    refuses(path, f"{STACK}.2", "its master is")
    change(one, lambda tree: tree.update({f"{STACK}.3": tree.pop(f"{STACK}.2")}))
    refuses(path, "layer_1_expert_2", f"{STACK}.3' is no tensor of expert 2")
    one.unlink()
    refuses(path, "1 of 8 expert files missing: expert 2 of MoE layer 1")


def layers(tree):
    return tree["ds_autoep_layers"]


BAD = {
    "places": (
        lambda t: layers(t)[1]["expert_placement"]["ranks"].reverse(),
        "wanted 2 equal parts in order",
    ),
    "experts": (
        lambda t: layers(t)[0]["expert_placement"]["ranks"][1].update(experts=[3, 2]),
        "model.layers.0.mlp: expert_placement: wanted 2 equal parts in order",
    ),
    "placement": (lambda t: layers(t)[0]["expert_placement"].update(version=2), "version 1"),
    "count": (
        lambda t: layers(t)[0].update(num_experts=6),
        "has [6, 4] experts a layer, num_experts is [4, 4]",
    ),
    "part": (lambda t: layers(t)[0].update(num_local_experts=3), "2 sets of 3 experts, wanted 4"),
    "local": (lambda t: layers(t)[0].pop("num_local_experts"), "num_local_experts is None"),
    "sets": (lambda t: [e.update(ep_size=1, num_local_experts=4) for e in layers(t)], "expert_placement"),
    "mixed": (lambda t: t["num_experts"].append(2), "AutoEP beside other MoE layers is not read"),
    "format": (
        lambda t: layers(t)[0].update(checkpoint_format="x"),
        "format 'x' of version None is not known",
    ),
    "stage": (
        lambda t: [
            e.update(checkpoint_format="zero3_partitioned", checkpoint_format_version=1) for e in layers(t)
        ],
        "AutoEP's model states are not of stage 2",
    ),
    "twice": (
        lambda t: layers(t)[1].update({k: layers(t)[0][k] for k in ("module_path", "expert_key_prefix")}),
        "has a layer twice",
    ),
    "prefix": (lambda t: layers(t)[0].update(expert_key_prefix="x"), "'x' are no experts of"),
    "shape": (lambda t: t["param_shapes"][1].update({STACK: torch.Size([3, 6, 8])}), "wanted 2 experts of 2"),
    "no stack": (lambda t: t["param_shapes"][1].pop(STACK), "groups of experts fit no order"),
    "many": (
        lambda t: (
            t.update(num_experts=[(1 << 20) - 1] * 5),
            t.update(ds_autoep_layers=[dict(layers(t)[0], num_experts=(1 << 20) - 1)] * 5),
        ),
        "5242875 experts; the limit is 4194304",
    ),
    "folded": (lambda t: t.update(mp_world_size=2), "AutoEP beside AutoTP (folding) is not supported yet"),
    "set": (lambda t: layers(t)[1].update(ep_rank=1), "ep_rank is not the same for all layers"),
    "no list": (lambda t: t.update(ds_autoep_layers=3), "wanted a list, got int"),
}


@pytest.mark.parametrize("case", BAD)
def test_metadata_that_is_not_so(copied, case):
    edit, words = BAD[case]
    path = copied("z2-w4")
    change(path / "global_step2/mp_rank_00_model_states.pt", edit)
    refuses(path, words)


def test_groups_of_other_sets(copied):
    """What param_shapes says of a stack fits the layers, the ranks it is cut over do not."""
    path = copied("z2-w4")

    def four_sets(tree):
        for layer in layers(tree):
            layer.update(ep_size=4, num_local_experts=1)
            del layer["expert_placement"]
        for group in tree["param_shapes"]:
            group.update(
                {n: torch.Size([1, *s[1:]]) for n, s in group.items() if ".experts." in n and len(s) == 3}
            )

    change(path / "global_step2/mp_rank_00_model_states.pt", four_sets)
    refuses(path, "group 1 is cut for 2 sets of ranks, AutoEP had 4")


def test_a_stack_that_lacks_an_expert(copied):
    path = copied("z2-w4")
    change(path / "global_step2/mp_rank_00_model_states.pt", lambda tree: tree.update(param_shapes=None))
    assert sources.open(path)[STACK].shape == (4, 6, 8)
    one = path / "global_step2/layer_1_expert_2_mp_rank_00_model_states.pt"
    change(one, lambda tree: tree.update({f"{STACK}.2": tree[f"{STACK}.2"][:5]}))
    refuses(path, f"{STACK}: 4 parts of 4 experts, wanted 4 alike")
    change(one, lambda tree: tree.pop(f"{STACK}.2"))
    refuses(path, f"{STACK}: 3 parts of 3 experts, wanted 4 alike")


def test_without_a_placement_parts_are_in_order(copied):
    """DeepSpeed 0.19.2 knew no other, and no other file than an expert's."""
    path = copied("z2-w4")
    said = {"moe_layer_id", "module_path", "num_experts", "num_local_experts", "ep_size", "expert_key_prefix"}

    def older(tree):
        for layer in layers(tree):
            for key in layer.keys() - said:
                del layer[key]

    change(path / "global_step2/mp_rank_00_model_states.pt", older)
    equal(path)


def model_of(path: Path, rank: int) -> Path:
    return path / f"global_step2/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def optim_of(path: Path, rank: int) -> Path:
    return path / f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def test_places_at_stage_3(copied):
    """Each rank's model states say which experts it has, and its optimizer file with which ranks."""
    path = copied("z3-w4")
    change(model_of(path, 2), lambda tree: [layer.update(ep_rank=0) for layer in layers(tree)])
    refuses(path, "experts of 2 sets of 4 ranks, whose places are", "wanted each once")
    change(model_of(path, 2), lambda tree: [layer.update(ep_rank=1) for layer in layers(tree)])
    equal(path)
    for rank, ep in ((1, 1), (2, 0)):  # as if data had not come first
        change(model_of(path, rank), lambda tree, ep=ep: [e.update(ep_rank=ep) for e in layers(tree)])
        at = {"expert_data_parallel_rank": rank // 2}
        change(model_of(path, rank), lambda tree, at=at: [e.update(at) for e in layers(tree)])
    refuses(path, "rank 0: sub-group", "is cut over", "(0, 1)", "wanted (0, 2)")


def test_sub_groups_at_stage_3(copied):
    pytest.importorskip("deepspeed", reason="torch.load, which `change` calls, makes its classes")
    path = copied("z3-w4")
    group = "ds_zero_partition_groups"
    change(optim_of(path, 3), lambda tree: tree["optimizer_state_dict"].pop(group))
    refuses(path, "rank 3: sub-group 0 is cut over (), wanted (0, 1, 2, 3)")


def test_a_stack_that_no_sub_group_has(copied):
    path = copied("z3-w4")
    for rank in range(4):
        change(model_of(path, rank), lambda tree: tree["param_shapes"][-1].popitem())
    refuses(path, "experts of set 0: group 0: parameters need 96 elements a rank, the flat groups have 144")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda groups: groups[-1].update(more=torch.Size([1])), "sub-group 1 is of experts, and of more"),
        (lambda groups: groups.append({}), "3 sub-groups in param_shapes, 2 of masters"),
    ],
)
def test_sub_groups_that_param_shapes_has_otherwise(copied, edit, words):
    path = copied("z3-w4")
    for rank in range(4):
        change(model_of(path, rank), lambda tree: edit(tree["param_shapes"]))
    refuses(path, words)
