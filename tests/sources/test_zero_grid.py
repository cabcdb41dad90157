"""Tensor and pipeline parallel grids: what DeepSpeed wrote against the model its ranks held; bad grids."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fastckpt
import pytest
import torch
import zero_writer
from fastckpt import cli, sources
from fastckpt.errors import SourceError
from fastckpt.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from reading import refuses, refuses_a_copy_that_differs
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEPT = ("grid-z2-autotp2-w4", "grid-z3-autotp2-w2", "grid-z1-tp2-pp2")
AUTOTP, STAGE_3, PIPELINE = KEPT
TAG, MASTERS = "global_step2", "single_partition_of_fp32_groups"


def equal(path: Path, weights: str = "master") -> None:
    """Every tensor of the checkpoint is the gathered one, bit for bit."""
    truth = load_file(path / f"{weights}.safetensors")
    ckpt = sources.open(path, weights=weights)
    found = fastckpt.reshard(ckpt, layout="same", rank=0)
    aliases = {name: found.pop(name) for name in ckpt.aliases}
    assert all(torch.equal(t, found[ckpt.aliases[name]]) for name, t in aliases.items())
    assert {*found} == {*truth}
    for name, want in truth.items():
        got = found[name]
        if weights == "master" and want.is_floating_point():
            assert got.dtype == torch.float32 or ckpt.entries[name].kind != "parameter" or "z0" in path.name
            got = got.float()
        assert got.dtype == want.dtype and torch.equal(got, want), name


@pytest.mark.parametrize("name", KEPT)
def test_what_deepspeed_wrote_is_what_it_trained(name):
    equal(FIXTURES / name)
    if "z3" not in name:
        equal(FIXTURES / name, weights="module")


RUNS = (
    "--model qwen2 --stage 2 --tp 4 --world 4",  # two heads of keys: two ranks hold none
    "--model phi3 --stage 1 --tp 2 --world 4",
    "--model llama --stage 3 --tp 2 --world 4 --freeze --layers 2",
    "--model llama --stage 0 --tp 2 --world 4",
    "--model qwen2 --stage 1 --tp 2 --world 4 --wide-gradients",
    "--model pipe --stage 1 --pp 2 --tp 1 --world 4",
    "--model pipe --stage 1 --pp 1 --tp 1 --world 2",
    "--model pipe --stage 1 --pp 2 --tp 1 --world 4 --wide-gradients --layers 3",
    "--model pipe --stage 1 --pp 2 --tp 2 --world 4 --dtype float32",
)


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", RUNS)
def test_what_the_installed_deepspeed_writes(tmp_path, sizes):
    pytest.importorskip("deepspeed")
    made = Path(__file__).parents[1] / "real/make_grid.py"
    path = tmp_path / ("z0" if "--stage 0" in sizes else "run")
    subprocess.run([sys.executable, made, *sizes.split(), path], check=True, timeout=900)
    equal(path)
    if "--stage 3" not in sizes:
        equal(path, weights="module")


@pytest.fixture
def tp(tmp_path):
    return Path(shutil.copytree(FIXTURES / AUTOTP, tmp_path / "tp"))


@pytest.fixture
def pipeline(tmp_path):
    return Path(shutil.copytree(FIXTURES / PIPELINE, tmp_path / "pipeline"))


def change(path: Path, edit) -> None:
    """Rewrite a torch file under its own name with `edit` done to what it holds."""
    with zero_writer.deepspeed_names():
        tree = torch.load(path, weights_only=False)
        edit(tree)
        torch.save(tree, path)


def model_states(path: Path) -> list[Path]:
    return sorted((path / TAG).glob("mp_rank_*"))


def said(path: Path, edit) -> None:
    """Change what every rank says of its cuts."""
    for file in model_states(path):
        change(file, lambda tree: edit(tree["universal_checkpoint_info"]))


# ---- the promises of a ZeRO source ----


def test_names_aliases_and_facts():
    ckpt = sources.open(FIXTURES / AUTOTP, rename=[(r"^model\.", "")])
    assert ckpt.aliases == {"lm_head.weight": "embed_tokens.weight"}
    assert ckpt.facts["grid"] == {"data parallel": 2, "tensor parallel": 2, "pipeline stages": 1}
    assert ckpt.facts["stage"] == 2 and ckpt.saved.step == 2
    assert ckpt.config["model_type"] == "qwen2"
    pipe = sources.open(FIXTURES / PIPELINE, rename=[(r"^tied_modules\.", ""), (r"^(\d+)\.", r"layers.\1.")])
    assert "rows of tied_modules.embed.weight from 21 on: padding of the vocabulary" in pipe.unread
    assert {"embed.weight", "layers.1.scale", "layers.3.bias"} < {*pipe}
    assert pipe.entries["layers.1.scale"].kind == "buffer"
    assert pipe.facts["grid"] == {"data parallel": 1, "tensor parallel": 2, "pipeline stages": 2}
    with pytest.raises(SourceError, match="rename makes"):
        sources.open(FIXTURES / PIPELINE, rename=[(r"weight|bias", "x")])


def test_a_served_model_is_cut_from_it():
    """Through the recipe and a layout: the whole way of a user."""
    truth = load_file(FIXTURES / AUTOTP / "master.safetensors")
    ranks = fastckpt.reshard(FIXTURES / AUTOTP, layout="hf", dtype="float32")
    got = ranks[0] if isinstance(ranks, list) else ranks
    assert all(torch.equal(got[name], truth[name]) for name in truth)
    old = get_fp32_state_dict_from_zero_checkpoint(FIXTURES / AUTOTP)
    assert torch.equal(old["lm_head.weight"], truth["model.embed_tokens.weight"])


def test_plans_are_of_these_cuts(tp):
    before = sources.open(tp)
    assert sources.open(tp).structure == before.structure
    name = r"^model\.layers\.0\.self_attn\.q_proj\.weight$"
    pieces = [{"shape": [4, 8], "source": [32 * (1 - rank), [8, 1]], "dest": [0, [8, 1]]} for rank in (0, 1)]

    def other_order(info):
        for rank, piece in enumerate(pieces):
            info["affine_map"]["params"][name]["ranks"][rank]["pieces"] = [piece]

    said(tp, other_order)
    assert sources.open(tp).structure != before.structure  # all that differs is which rank is first


def test_inspect_tells_the_grid(capsys):
    assert cli.main(["inspect", str(FIXTURES / PIPELINE)]) == 0
    assert "pipeline stages" in capsys.readouterr().out


# ---- files ----


def test_missing_and_doubled_files(tp, tmp_path):
    folder, disk = tp / TAG, tmp_path / "disk"
    disk.mkdir()
    (folder / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt").rename(disk / "o.pt")
    refuses(tp, "optimizer files of model-parallel rank 1, of 1 of 2 ranks missing: rank 1")
    (disk / "o.pt").rename(disk / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt")
    assert sources.open(tp, also=[disk]).facts["grid"]
    (folder / "mp_rank_01_model_states.pt").rename(disk / "mp_rank_01_model_states.pt")
    refuses(tp, "but no mp_rank_01_model_states.pt")
    assert sources.open(tp, also=[disk]).facts["grid"]
    for file in folder.glob("*mp_rank_01*"):
        file.rename(disk / file.name)
    refuses(tp, "model-parallel files of 1 of 2 ranks missing: rank 1", "also=")
    equal_but_truth = sources.open(tp, also=[disk])
    assert len(equal_but_truth) == len(sources.open(FIXTURES / AUTOTP))
    shutil.copytree(disk, folder, dirs_exist_ok=True)
    refuses(tp, "is there twice", also=[disk])
    for file in folder.glob("*mp_rank_00*"):
        file.unlink()
    refuses(tp, "no files of model-parallel rank 0, and some of rank 1")


def test_left_over_and_swapped_files(tp):
    folder = tp / TAG
    for file in folder.glob("*mp_rank_01*"):
        shutil.copy(file, folder / file.name.replace("mp_rank_01", "mp_rank_02"))
    refuses(tp, "model-parallel files of rank 2, but the run had 2 ranks")
    for file in folder.glob("*mp_rank_02*"):
        file.unlink()
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    refuses(tp, "was saved as mp_rank_00_model_states.pt")
    change(folder / "mp_rank_01_model_states.pt", lambda tree: None)  # saved again, by its own name
    refuses(tp, "group 0")  # of 10 and 11 rows: other sizes


@pytest.mark.parametrize(
    ("key", "value"),
    [("global_steps", 3), ("ds_version", "0.19.7"), ("mp_world_size", 4), ("dp_world_size", 4),
     ("checkpoint_parallel_dimensions", None), ("universal_checkpoint_info", {})],
)  # fmt: skip
def test_ranks_of_two_saves(tp, key, value):
    change(model_states(tp)[1], lambda tree: tree.update({key: value}))
    refuses(tp, "model-parallel rank 1" if key != "ds_version" else "mp_rank_01", "of two saves")


def one_step_more(tree):
    for state in tree["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"].add_(1)


def test_optimizers_of_two_steps(tp):
    for file in (tp / TAG).glob("*mp_rank_01_optim_states.pt"):
        change(file, one_step_more)
    refuses(tp, "model-parallel rank 1: optimizer step is 3, wanted 2")


def test_a_universal_checkpoint_of_a_grid(tp):
    for file in (tp / TAG).glob("*optim*"):
        file.unlink()
    (tp / TAG / "zero").mkdir()
    refuses(tp, "a universal checkpoint of a grid is not read")


# ---- what ranks hold twice ----


def test_replicated_tensors_that_differ(tp):
    for file in (tp / TAG).glob("*mp_rank_01_optim_states.pt"):
        change(file, lambda tree: tree["optimizer_state_dict"][MASTERS][1].data.mul_(1.5))
    refuses(tp, "which tensor-parallel ranks 0 and 1 both hold: two values")


def test_one_element_that_differs(tmp_path):
    refuses_a_copy_that_differs(Path(shutil.copytree(FIXTURES / STAGE_3, tmp_path / "a")))


def test_buffers_that_differ(pipeline):
    change(pipeline / TAG / "layer_01-model_01-model_states.pt", lambda tree: tree["scale"].add_(1))
    refuses(pipeline, "buffer 1.scale on two tensor-parallel ranks: two values")


def test_tied_modules_that_differ(pipeline):
    """Of what is said to stand in several stages the first one's counts: perhaps one weight of the module is
    tied, and the last stage does not train the others."""
    for rank in (2, 3):
        file = pipeline / TAG / f"bf16_zero_pp_rank_0_mp_rank_{rank:02}_optim_states.pt"
        change(file, lambda tree: tree["optimizer_state_dict"][MASTERS][0].data.mul_(2))
    equal(pipeline)
    said(pipeline, lambda info: info["pipeline_replicated_parameter_patterns"].clear())
    refuses(pipeline, "tied_modules.embed.weight in two stages of the pipeline: two values")


def beside(tree, tensor, buffer=False):
    tree["module"]["more"] = tensor
    tree["buffer_names"] += ["more"] if buffer else []


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([lambda t: None, lambda t: beside(t, torch.ones(2))], "tensor-parallel ranks 0 and 1 holds more"),
        ([lambda t: beside(t, torch.ones(2)), lambda t: beside(t, torch.ones(2), True)],
         "more: tensor-parallel ranks hold it as kinds ['buffer', 'frozen']"),
        ([lambda t: beside(t, torch.ones(2)), lambda t: beside(t, torch.ones(2).half())],
         "more: tensor-parallel ranks hold it as dtypes ['float16', 'float32']"),
        ([lambda t, n=n: beside(t, torch.ones(n), True) for n in (2, 3)],
         "buffer more has [(2,), (3,)]: nothing says how it is cut"),
        ([lambda t, n=n: t["shared_params"].update({"x": f"model.layers.0.{n}_layernorm.weight"})
          for n in ("input", "post_attention")],
         "x is tied to model.layers.0.input_layernorm.weight and to model.layers.0.post_attention_layernorm"),
    ],
)  # fmt: skip
def test_tensors_that_ranks_hold_otherwise(tp, edits, words):
    for file, edit in zip(model_states(tp), edits, strict=True):
        change(file, edit)
    refuses(tp, words)


def test_a_tensor_that_is_empty_on_every_rank(tp):
    for file in model_states(tp):
        change(file, lambda tree: beside(tree, torch.ones(0, 8)))
    said(tp, lambda info: info["tp_replicated_parameter_patterns"].append("^more$"))
    assert fastckpt.reshard(tp, layout="same", rank=0)["more"].shape == (0, 8)


def test_experts_in_a_grid(tp):
    name = "moe.deepspeed_moe.experts.deepspeed_experts.0.weight"
    for rank, file in enumerate(model_states(tp)):
        change(file, lambda tree: tree.update(num_experts=[1]))
        torch.save({name: torch.ones(2)}, tp / TAG / f"layer_0_expert_0_mp_rank_{rank:02}_model_states.pt")
    refuses(tp, "MoE layers in a grid are not supported yet")


# ---- what is said of cuts ----


def test_nothing_is_said(tp):
    for file in model_states(tp):
        change(file, lambda tree: tree.pop("universal_checkpoint_info"))
    refuses(tp, "universal_checkpoint_info is not there: nothing says along which axis")


def test_cuts_that_cannot_be_undone(tp):
    said(
        tp,
        lambda info: info["autotp_unsupported_parameter_patterns"].update({r".*q_proj.weight": "odd heads"}),
    )
    refuses(tp, "q_proj.weight", "cannot be undone: odd heads")


def test_a_replicated_tensor_of_which_nothing_is_said(pipeline):
    said(pipeline, lambda info: info["tp_replicated_parameter_patterns"].remove(r"\d+.norm.weight"))
    refuses(pipeline, "1.norm.weight is the same on all 2 tensor-parallel ranks", "in doubt")


def test_lists_that_were_made_for_another_model(pipeline):
    """Megatron-DeepSpeed writes its pipeline's names for a model without one, too."""
    said(pipeline, lambda info: info.update(tp_replicated_parameter_patterns=[r"layers.\d+.norm.weight"]))
    refuses(pipeline, "tp_replicated_parameter_patterns matches no parameter: it is of another model")


def test_a_gate_of_which_nothing_is_said(pipeline):
    """Older Megatron-DeepSpeed does not say that its swiglu is two matrices in one."""
    names = {"gate_up.weight": "mlp.dense_h_to_4h.weight", "down.weight": "mlp.dense_4h_to_h.weight"}
    new = {f"1.{old}": f"1.{name}" for old, name in names.items()}

    def renamed(tree, of=new):
        for name in list(tree):
            tree[of.get(name, name)] = tree.pop(name)

    for rank in (0, 1):
        change(pipeline / TAG / f"layer_01-model_{rank:02}-model_states.pt", lambda t: renamed(t, names))
        change(model_states(pipeline)[rank], lambda t: [renamed(group) for group in t["param_shapes"]])
    gated, rows = "parameter_with_2_sub_params_cat_dim_0", "parameter_with_row_parallelism_patterns"
    said(
        pipeline,
        lambda info: info.update(
            {gated: [r"\d+.mlp.dense_h_to_4h.weight"], rows: [r"\d+.mlp.*4h_to_h.weight"]}
        ),
    )
    assert sources.open(pipeline).entries["1.mlp.dense_h_to_4h.weight"].shape == (24, 8)
    said(pipeline, lambda info: info.pop(gated))
    refuses(pipeline, "1.mlp.dense_h_to_4h.weight is gate and up in one")


# ---- layers of a pipeline ----


def test_missing_and_wrong_layers(pipeline):
    layer = pipeline / TAG / "layer_01-model_00-model_states.pt"
    content = layer.read_bytes()
    layer.unlink()
    refuses(pipeline, "is in no file of a layer", "also=")
    layer.write_bytes(content)
    change(layer, lambda tree: tree["down.weight"].mul_(2))
    refuses(pipeline, "1.down.weight", "its master is")
    change(layer, lambda tree: tree.update({"down.weight": torch.zeros(3)}))
    refuses(pipeline, "1.down.weight has shape (3,), its shape is (8, 6)")
    shutil.copy(pipeline / TAG / "layer_03-model_00-model_states.pt", layer)
    refuses(pipeline, "was saved as layer_03-model_00-model_states.pt")
    for file in (pipeline / TAG).glob("layer_*-model_01-*"):
        file.unlink()
    refuses(pipeline, "files of layers of tensor-parallel ranks [0], wanted 2")


def test_a_tied_module_in_no_file(pipeline):
    """Only a function of it may be a layer: then its master is all there is. It hides no other loss."""
    for rank in (0, 1):
        (pipeline / TAG / f"layer_00-model_{rank:02}-model_states.pt").unlink()
    equal(pipeline)
    refuses(pipeline, "tied_modules.embed.weight is in no file", "master", weights="module")
    for rank in (0, 1):
        (pipeline / TAG / f"layer_01-model_{rank:02}-model_states.pt").unlink()
    refuses(pipeline, "1.gate_up.weight is in no file of a layer", "also=")


def test_a_tied_module_of_other_values(pipeline):
    for rank in (0, 1):
        change(pipeline / TAG / f"layer_00-model_{rank:02}-model_states.pt", lambda t: t["weight"].add_(1))
    refuses(pipeline, "tied_modules.embed.weight", "its master is")


def test_a_tied_module_that_is_a_layer_twice(pipeline):
    for rank in (0, 1):
        first = pipeline / TAG / f"layer_00-model_{rank:02}-model_states.pt"
        again = pipeline / TAG / f"layer_04-model_{rank:02}-model_states.pt"
        torch.save(torch.load(first), again)
    equal(pipeline)
    equal(pipeline, weights="module")
    change(again, lambda tree: tree["weight"].add_(1))
    refuses(pipeline, "layer_04-model_01", "tied_modules.embed.weight")


def test_a_tensor_within_a_layer_s_entry(pipeline):
    layer = pipeline / TAG / "layer_01-model_00-model_states.pt"
    change(layer, lambda tree: tree.update(more={"x": torch.ones(2)}))
    refuses(pipeline, "layer_01-model_00-model_states.pt: more: holds a tensor")


def test_what_is_no_tensor_of_a_layer_is_named(pipeline):
    for layer in (pipeline / TAG).glob("layer_01-*"):
        change(layer, lambda tree: tree.update(version=3, _extra_state=b""))
    ckpt = sources.open(pipeline)
    assert [note for note in ckpt.unread if note.endswith("no tensor")] == [
        "1.version: no tensor", "1._extra_state: no tensor",
    ]  # fmt: skip


def test_a_name_in_two_stages(pipeline):
    for file in model_states(pipeline)[2:]:
        change(
            file, lambda t: t["param_shapes"][1].update({"1.norm.bias": t["param_shapes"][1].pop("3.bias")})
        )
    refuses(pipeline, "1.norm.bias is in two stages, and is no tied module")


def test_tied_modules_of_one_shape(pipeline):
    """The values of the masters tell which is which; where they do not, or are not read, it is in doubt."""
    new, folder = "tied_modules.other.weight", pipeline / TAG
    for rank, file in enumerate(model_states(pipeline)[:2]):
        (layer,) = folder.glob(f"layer_01-model_{rank:02}*")
        other = torch.load(layer)["gate_up.weight"]
        change(layer, lambda tree: tree.pop("gate_up.weight"))
        torch.save({"weight": other}, folder / layer.name.replace("01", "02", 1))

        def renamed(tree):
            tree["param_shapes"][0] = {
                n.replace("1.gate_up.weight", new): s for n, s in tree["param_shapes"][0].items()
            }

        change(file, renamed)
    said(pipeline, lambda info: info.update(parameter_with_2_sub_params_cat_dim_0=[new]))
    before = fastckpt.consolidate(FIXTURES / PIPELINE)["1.gate_up.weight"]
    assert torch.equal(fastckpt.consolidate(pipeline)[new], before)
    again = folder / "layer_02-model_00-model_states.pt"
    held = torch.load(again)
    torch.save({"weight": held["weight"] + 1}, again)
    refuses(pipeline, "shapes of 2 tied modules, tied_modules.embed., tied_modules.other.", "the values of 0")
    torch.save(held, again)
    for file in folder.glob("*optim*"):
        file.unlink()
    refuses(pipeline, "the values of 2: which it is is in doubt", weights="module")


def test_frozen_layers(pipeline):
    """What the optimizer does not own is in the files of layers alone."""
    for rank in (0, 1):
        again = pipeline / TAG / f"layer_02-model_{rank:02}-model_states.pt"
        torch.save({"norm.bias": torch.arange(4.0)}, again)
    ckpt = sources.open(pipeline)
    assert ckpt.entries["2.norm.bias"].kind == "frozen"
    (note,) = ckpt.notes
    assert "layer 2 is taken for frozen" in note and "left of an earlier save" in note
    assert "2.norm.bias" not in sources.open(pipeline, exclude_frozen=True)
    found = fastckpt.reshard(ckpt, layout="same", rank=0)["2.norm.bias"]
    assert torch.equal(found, torch.arange(4.0))


def test_a_pipeline_without_its_optimizer(pipeline):
    for file in (pipeline / TAG).glob("*optim*"):
        file.unlink()
    refuses(pipeline, "weights='module'")
    equal(pipeline, weights="module")
