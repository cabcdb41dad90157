"""ZeRO directories that are broken, mixed up or not supported: a SourceError that says what and where."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil

import fastckpt
import pytest
import reading
import torch
import zero_writer
from fastckpt import sources
from reading import refuses
from zero_writer import write_zero

PARAMS = {"a.weight": torch.arange(35.0).reshape(7, 5), "b": torch.ones(13), "still": torch.ones(4)}


def written(path, **options):
    write_zero(path, PARAMS, **{"stage": 3, "world": 3, "frozen": ["still"]} | options)
    return path / options.get("tag", "global_step2")


def edit(path, change):
    """Rewrite a torch file of the writer's with `change` done to what it holds."""
    with zero_writer.deepspeed_names():
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)


def optim(folder, rank):
    return folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model(folder, rank=None):
    return folder / (
        "mp_rank_00_model_states.pt" if rank is None else f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
    )


def test_no_latest_names_the_tags(tmp_path):
    written(tmp_path, latest=False)
    write_zero(tmp_path, PARAMS, stage=3, world=3, latest=False, tag="global_step10")
    refuses(tmp_path, "no file `latest`", "tags here: global_step2, global_step10")


def test_a_tag_that_is_not_there(tmp_path):
    folder = written(tmp_path)
    refuses(
        tmp_path, "no ZeRO checkpoint with tag 'global_step9'", "tags here: global_step2", tag="global_step9"
    )
    refuses(folder, "this is the folder of tag 'global_step2', wanted 'other'", tag="other")
    (tmp_path / "latest").write_text("global_step7")
    refuses(tmp_path, "global_step7", "tags here: global_step2")
    (tmp_path / "latest").write_text("../elsewhere")
    refuses(tmp_path, "names no tag")
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    refuses(tmp_path, "latest: ", "can't decode byte 0xff")


def test_a_file_without_a_byte(tmp_path):
    model(written(tmp_path), 0).write_bytes(b"")
    refuses(tmp_path, "_model_states.pt: no torch file: it has 0 bytes")


def test_several_models_of_one_save(tmp_path):
    """As accelerate saves them: DeepSpeed's `latest` then names the last of them, not a later step."""
    for tag in ("pytorch_model", "pytorch_model_1"):
        write_zero(tmp_path, PARAMS, stage=2, world=2, tag=tag)
    refuses(tmp_path, "holds 2 models, pytorch_model, pytorch_model_1", "(--tag) says which")
    assert fastckpt.open(tmp_path, tag="pytorch_model").saved.tag == "pytorch_model"


def test_what_may_not_be_listed_beside_the_tags_is_passed_over(tmp_path, monkeypatch):
    run = tmp_path / "run"
    folder = written(run)
    (run / "lost+found").mkdir()
    closed = {run / "lost+found"}
    listdir = os.listdir

    def as_another_user(path="."):
        if pathlib.Path(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", as_another_user)
    assert sources.open(run).saved.tag == "global_step2"
    assert sources.open(run, tag="global_step2").facts["world"] == 3
    refuses(tmp_path, "it holds some: run")
    closed.add(folder)
    refuses(run, "global_step2: Permission denied")


def test_a_disk_that_fails_is_said(tmp_path, monkeypatch):
    folder = written(tmp_path)
    listdir = os.listdir

    def failing(path="."):
        if pathlib.Path(path) == folder:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", failing)
    refuses(tmp_path, "global_step2: Input/output error")


@pytest.mark.timeout(60)
def test_latest_that_is_no_file(tmp_path):
    written(tmp_path, latest=False)
    os.mkfifo(tmp_path / "latest")
    refuses(tmp_path, "latest: not a regular file")


def test_a_missing_optimizer_file(tmp_path):
    folder = written(tmp_path)
    optim(folder, 1).unlink()
    refuses(tmp_path, "optimizer files of 1 of 3 ranks missing: rank 1")
    for rank in (0, 2):
        optim(folder, rank).unlink()
    refuses(tmp_path, "no *_optim_states.pt")


def test_the_first_optimizer_file_missing(tmp_path):
    folder = written(tmp_path, stage=2)
    optim(folder, 0).unlink()
    refuses(tmp_path, "optimizer files of 1 of 3 ranks missing: rank 0")


def test_a_missing_model_file(tmp_path):
    folder = written(tmp_path)
    model(folder, 2).unlink()
    refuses(tmp_path, "model states of 1 of 3 ranks missing: rank 2")
    folder = written(tmp_path / "two", stage=2)
    model(folder).unlink()
    refuses(tmp_path / "two", "optimizer files of stage 2, but no mp_rank_00_model_states.pt")


def test_a_rank_twice(tmp_path):
    folder = written(tmp_path)
    shutil.copy(optim(folder, 1), folder / optim(folder, 1).name.removeprefix("bf16_"))
    refuses(tmp_path, "pp_rank_1_mp_rank_00", "is there twice, also as")


def test_a_rank_twice_over_directories(tmp_path):
    folder = written(tmp_path / "a")
    other = tmp_path / "b"
    other.mkdir()
    shutil.copy(optim(folder, 1), other)
    refuses(tmp_path / "a", "pp_rank_1_mp_rank_00", "is there twice, also as", also=[other])
    refuses(tmp_path / "a", "no directory", also=[tmp_path / "c"])


def test_model_states_of_nodes_with_storage_of_their_own(tmp_path):
    """Each node's local rank 0 writes some; the tied names are in rank 0's alone."""
    a = written(tmp_path / "a", stage=2, world=4, tied={"c": "b"})
    b = tmp_path / "b" / a.name
    shutil.copytree(a, b)
    for rank in range(4):
        optim((b, b, a, a)[rank], rank).unlink()
    edit(model(b), lambda c: c.update(shared_params={}, module=dict(c["module"], c=torch.zeros(5))))
    for path, also in ((tmp_path / "a", b), (b, a)):
        assert dict(sources.open(path, also=[also]).aliases) == {"c": "b"}
    edit(model(b), lambda c: c.update(global_steps=1))
    refuses(tmp_path / "a", "global_steps is 1, wanted 2: files of two saves", also=[b])
    optim(a, 0).unlink()
    refuses(tmp_path / "a", "mp_rank_00_model_states.pt: is there twice, also as", also=[b])


def test_files_left_from_a_larger_world(tmp_path):
    old = written(tmp_path / "old", world=5)
    folder = written(tmp_path / "new")
    shutil.copy(optim(old, 4), folder)
    refuses(tmp_path / "new", "optimizer files of rank 4, but the run had 3 ranks")
    optim(folder, 4).unlink()
    shutil.copy(model(old, 3), folder)
    refuses(tmp_path / "new", "model states of rank 3, but the run had 3 ranks")


def test_a_file_of_a_larger_world_in_place(tmp_path):
    old = written(tmp_path / "old", world=5)
    folder = written(tmp_path / "new")
    shutil.copy(optim(old, 2), folder)
    refuses(tmp_path / "new", "rank_2", "partition_count is (5,), wanted (3,)")


def test_a_file_of_another_step(tmp_path):
    old = written(tmp_path / "old", step=1)
    folder = written(tmp_path / "new")
    shutil.copy(optim(old, 2), folder)
    refuses(tmp_path / "new", "rank_2", "optimizer step is 1, wanted 2")
    shutil.copy(model(old, 1), folder)
    shutil.copy(optim(written(tmp_path / "again"), 2), folder)
    refuses(tmp_path / "new", "rank_1", "global_steps is 1, wanted 2")


def without_steps(lengths, step):
    """What SGD keeps: no moments."""
    return {"state": {}, "param_groups": [{"lr": 1e-3, "params": [g]} for g in range(len(lengths))]}


def with_steps_of_groups(lengths, step):
    """What Muon and older FusedAdam keep: the first parameter has no step, its group has."""
    groups = [{"step": step, "params": [0]}]
    return {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": groups}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_only_the_group_tells(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(zero_writer, "_moments", with_steps_of_groups)
    old, folder = written(tmp_path / "old", stage=stage, step=1), written(tmp_path / "new", stage=stage)
    shutil.copy(optim(old, 1), folder)
    refuses(tmp_path / "new", "rank_1", "optimizer step is 1, wanted 2")


@pytest.mark.parametrize("frozen", [[], ["still"]])
def test_files_of_another_step_that_no_optimizer_tells(tmp_path, frozen, monkeypatch):
    """An interrupted save over an older one; the model states are written first."""
    monkeypatch.setattr(zero_writer, "_moments", without_steps)
    old = written(tmp_path / "old", step=1, frozen=frozen)
    folder = written(tmp_path / "new", frozen=frozen)
    whole = sources.open(tmp_path / "new")
    for rank in (1, 2):
        shutil.copy(optim(old, rank), folder)
        shutil.copy(model(old, rank), folder)
    refuses(tmp_path / "new", "rank_1", "global_steps is 1, wanted 2: files of two saves")
    assert sorted(whole.entries) == sorted(PARAMS)


def test_a_file_of_another_version(tmp_path):
    folder = written(tmp_path)
    edit(optim(folder, 1), lambda c: c.update(ds_version="0.9.0"))
    refuses(tmp_path, "rank_1", "ds_version is '0.9.0', wanted '0.19.8'")


def test_files_of_two_stages(tmp_path):
    folder = written(tmp_path)
    shutil.copy(model(written(tmp_path / "two", stage=2)), folder)
    refuses(tmp_path, "files of two runs")


def test_model_states_of_another_world(tmp_path):
    folder = written(tmp_path, stage=2)
    edit(model(folder), lambda c: c.update(dp_world_size=4))
    refuses(tmp_path, "model states of 4 data-parallel ranks, optimizer files of 3")


@pytest.mark.parametrize(("stage", "key"), [(2, "single_partition_of_fp32_groups"), (3, "fp32_flat_groups")])
def test_a_partition_too_short(tmp_path, stage, key):
    folder = written(tmp_path, stage=stage)

    def short(content):
        content["optimizer_state_dict"][key][0] = content["optimizer_state_dict"][key][0][:-1].clone()

    edit(optim(folder, 1), short)
    refuses(tmp_path, "group 0", "rank 1 holds")


@pytest.mark.parametrize(("stage", "key"), [(2, "single_partition_of_fp32_groups"), (3, "fp32_flat_groups")])
def test_a_partition_that_is_not_flat(tmp_path, stage, key):
    folder = written(tmp_path, stage=stage, frozen=())

    def every_second(content):
        groups = content["optimizer_state_dict"][key]
        groups[0] = groups[0].repeat_interleave(2)[::2]

    edit(optim(folder, 1), every_second)
    refuses(tmp_path, "rank_1", f"{key}[0]: wanted one dense axis, got", "stride (2,)")


MASTERS = "single_partition_of_fp32_groups"
ODD = {
    "too many groups": (2, optim, [1],
        lambda s: s[MASTERS].append(torch.ones(2)), "rank 1 saved 2 groups, rank 0 1"),
    "dtype": (2, optim, [1],
        lambda s: s.update({MASTERS: [t.half() for t in s[MASTERS]]}),
        "rank 1 holds float16, rank 0 float32"),
    "no masters": (2, optim, range(3),
        lambda s: s.pop(MASTERS), f"no {MASTERS}, so no ZeRO masters; keys: clip_grad, "),
    "no flats": (3, optim, range(3),
        lambda s: s.update(fp32_flat_groups=[]), "2 parameters in param_shapes, no flat groups"),
    "paddings": (1, optim, range(3),
        lambda s: s.update(param_alignment_paddings=[[0]]), "group 0 has 2 parameters, 1 alignment paddings"),
    "frozen of another dtype": (3, model, [1],
        lambda c: c["frozen_param_fragments"].update(still=torch.ones(2)),
        "frozen: group 0: rank 1 holds float32, rank 0 bfloat16"),
    "frozen not dense": (3, model, [1],
        lambda c: c["frozen_param_fragments"].update(still=torch.ones(4).bfloat16()[::2]),
        "frozen: group 0: rank 1: wanted one dense axis, got (2,), stride (2,)"),
    "frozen of another shape": (2, model, [None],
        lambda c: (c["module"].pop("still"), c["frozen_param_fragments"].update(still=torch.ones(5))),
        "frozen still has shape (5,), wanted (4,)"),
    "a name that is none": (3, model, [0],
        lambda c: c["module"].update({3: torch.ones(2)}), "module: wanted names, got int"),
    "tied, and of its own": (2, model, [None],
        lambda c: c["shared_params"].update(b="a.weight"),
        "b is tied to a.weight in shared_params and has a shape of its own"),
    "a tensor within": (2, model, [None],
        lambda c: c["module"].update(b={"x": torch.ones(2)}),
        "b: holds a tensor, where a state dict has each under a name of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_what_does_not_fit(tmp_path, case):
    stage, file, ranks, change, words = ODD[case]
    folder = written(tmp_path, stage=stage)
    for rank in ranks:
        edit(file(folder, rank), lambda c: change(c.get("optimizer_state_dict", c)))
    refuses(tmp_path, words)


@pytest.mark.parametrize(
    ("step", "words"),
    [(float("nan"), "NaN"), (float("inf"), "infinity"), (True, "elements of bool are not compared")],
)
def test_a_step_that_is_no_number(tmp_path, step, words):
    folder = written(tmp_path, stage=1)

    def change(content):
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = torch.tensor(step)

    edit(optim(folder, 0), change)
    refuses(tmp_path, "rank_0_mp_rank_00_optim_states.pt: the optimizer's step: ", words)


def test_several_flats_of_one_dict_of_shapes(tmp_path):
    """As older versions wrote param_shapes."""
    truth = write_zero(tmp_path, PARAMS, stage=3, world=3, sub_group_size=12)
    one = {n: s.shape for n, s in PARAMS.items()}
    for rank in range(3):
        edit(model(tmp_path / "global_step2", rank), lambda c: c.update(param_shapes=one))
    found = fastckpt.consolidate(tmp_path)
    assert len(sources.open(tmp_path).facts["groups"]) == 2
    assert all(torch.equal(found[name], t) for name, t in truth.items())


def test_empty_parameters_that_are_tied_are_each_their_own(tmp_path):
    """All have address 0: DeepSpeed takes them for one another."""
    empty = {"e": torch.ones(0, 3), "f": torch.ones(0)}
    write_zero(tmp_path, PARAMS | empty, stage=2, world=2, tied={"f": "e"})
    edit(model(tmp_path / "global_step2"), lambda c: c["module"].update(f=torch.zeros(0)))
    ckpt = sources.open(tmp_path)
    assert not ckpt.aliases and (ckpt["e"].shape, ckpt["f"].shape) == ((0, 3), (0,))


@pytest.mark.parametrize(("copy", "got"), [(None, "nothing"), ("text", "nothing"), (torch.zeros(0), "(0,)")])
def test_a_weight_that_the_only_copy_lacks(tmp_path, copy, got):
    """Without optimizer files, `module` is all there is: it is never taken with a weight less."""
    folder = written(tmp_path, stage=2)
    for rank in range(3):
        optim(folder, rank).unlink()
    edit(model(folder), lambda c: c["module"].update(b=copy))
    refuses(tmp_path, f"b: `module` has {got}, wanted (13,)", weights="module")


def test_param_shapes_that_need_more(tmp_path):
    folder = written(tmp_path)
    edit(model(folder, 0), lambda c: c["param_shapes"][0].update(b=torch.Size([20])))
    refuses(tmp_path, "b [20] needs elements", "which has 17")


def test_param_shapes_that_need_less(tmp_path):
    folder = written(tmp_path)
    edit(model(folder, 0), lambda c: c["param_shapes"][0].pop("b"))
    refuses(tmp_path, "b", "group 0")


def test_frozen_shapes_that_disagree(tmp_path):
    folder = written(tmp_path / "two", stage=2)
    edit(model(folder), lambda c: c["frozen_param_shapes"].update(still=torch.Size([2, 3])))
    refuses(tmp_path / "two", "still", "(4,)", "(2, 3)")
    folder = written(tmp_path / "three")
    for rank in range(3):
        edit(model(folder, rank), lambda c: c["frozen_param_shapes"].update(still=torch.Size([9])))
    refuses(tmp_path / "three", "still", "[9]")


@pytest.mark.parametrize(
    ("fragment", "why"),
    [
        (lambda t: t.to(torch.int8), "int8 codes (zero_quantized_nontrainable_weights) without scales"),
        (lambda t: torch.tensor(1.0), "a placeholder, since it was offloaded to NVMe"),
    ],
)
def test_frozen_weights_that_deepspeed_does_not_save(tmp_path, fragment, why):
    folder = written(tmp_path)

    def change(content):
        content["frozen_param_fragments"]["still"] = fragment(content["frozen_param_fragments"]["still"])
        content["ds_config"]["zero_optimization"]["zero_quantized_nontrainable_weights"] = True

    for rank in range(3):
        edit(model(folder, rank), change)
    refuses(tmp_path, f"of frozen still DeepSpeed saved {why}: its weights are in no file")
    assert [*sources.open(tmp_path, exclude_frozen=True)] == ["a.weight", "b"]


def test_zenflow_trains_the_module(tmp_path):
    """Its masters get what the selected columns learnt later, or never."""
    folder = written(tmp_path, stage=2)
    edit(model(folder), lambda c: c["ds_config"]["zero_optimization"].update(zenflow={"topk_ratio": 0.1}))
    assert len(sources.open(tmp_path)) == len(PARAMS)
    edit(model(folder), lambda c: [c["module"][n].add_(1) for n in PARAMS])
    refuses(tmp_path, "the masters are behind the weights that ZenFlow trains", "weights='module'")
    trained = sources.open(tmp_path, weights="module")
    for name, started in PARAMS.items():
        want = reading.bits(started.bfloat16() + 1)
        assert (reading.read(trained[name]) == want).all(), name


def test_a_name_trainable_and_frozen(tmp_path):
    folder = written(tmp_path, stage=2)
    edit(model(folder), lambda c: c["param_shapes"][0].update(still=torch.Size([4])))
    refuses(tmp_path, "still is in param_shapes and in frozen_param_shapes")


def test_module_of_another_shape(tmp_path):
    folder = written(tmp_path, stage=1)
    edit(model(folder), lambda c: c["module"].update(b=torch.zeros(12, dtype=torch.bfloat16)))
    refuses(tmp_path, "b: `module` has shape (12,), its shape is (13,)")


def test_tied_to_another_shape(tmp_path):
    folder = written(tmp_path, stage=2)

    def tie(content):
        content["shared_params"] = {"c": "b"}
        content["module"]["c"] = torch.zeros(3, dtype=torch.bfloat16)

    edit(model(folder), tie)
    refuses(tmp_path, "c (3,) is tied to b (13,)")


def test_module_weights_that_differ_from_the_masters(tmp_path):
    folder = written(tmp_path, stage=2)
    sources.open(tmp_path, weights="module")

    def change(content):
        content["module"]["b"][-1] = 3

    edit(model(folder), change)
    refuses(tmp_path, "b: element 12 of `module` is 3.0 (bfloat16), its master is 1.0", weights="module")
    sources.open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_copy_of_nan_is_nan(tmp_path, dtype):
    master = torch.float64 if dtype is torch.float64 else torch.float32
    params = PARAMS | {"b": torch.full((13,), float("nan"))}
    write_zero(tmp_path, params, stage=2, world=2, model_dtype=dtype, master=master)
    sources.open(tmp_path, weights="module")
    edit(model(tmp_path / "global_step2"), lambda c: c["module"]["b"].fill_(1))
    refuses(tmp_path, "b: element 0 of `module` is 1.0", "its master is nan", weights="module")


def test_stage_3_has_no_module_weights(tmp_path):
    written(tmp_path)
    refuses(tmp_path, "weights='module'", "placeholders", weights="module")


def test_weights_in_no_file(tmp_path):
    folder = written(tmp_path)
    for rank in range(3):
        edit(model(folder, rank), lambda c: c.update(frozen_param_shapes=None, frozen_param_fragments=None))
    refuses(tmp_path, "still", "in no file")
    assert "still" not in sources.open(tmp_path, exclude_frozen=True)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mp_rank_01_model_states.pt", "files of two runs"),
        ("zero_pp_rank_0_mp_rank_01_model_states.pt", "files of rank 1, but the run had 1 ranks"),
        ("zero_pp_rank_0_mp_rank_02_model_states.pt", "no files of model-parallel rank 1, "),
        ("layer_00-model_states.pt", "a pipeline's layer beside whole model states"),
        ("layer_03-model_01-model_states.pt", "a pipeline's layer beside whole model states"),
        ("layer_03-depth_00-model_01-model_states.pt", "layer files of a grid with further axes"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "but the run had []: left from another run"),
        ("expert_3_mp_rank_00_model_states.pt", "expert files of old DeepSpeed versions are not supported"),
        ("mp_rank_00_model_states.pt-0.2", "fast writer, under a name that DeepSpeed does not load either"),
    ],
)
def test_grids_and_experts(tmp_path, name, what):
    (written(tmp_path) / name).write_bytes(b"")
    refuses(tmp_path, what)


def test_files_of_the_fast_writer(tmp_path):
    folder = written(tmp_path, stage=1)
    names = [path.name for path in folder.glob("*.pt")]
    for name in names:
        (folder / name).rename(folder / f"{name}-0.1")
    refuses(tmp_path, "optim_states.pt-0.1: a whole file of", "optim_states.pt (of several")
    refuses(folder, "rename it to")
    for name in names:
        (folder / f"{name}-0.1").rename(folder / name)
    assert len(sources.open(tmp_path))


def test_expert_groups(tmp_path):
    folder = written(tmp_path, stage=1)
    for rank in range(3):
        edit(optim(folder, rank), lambda c: c["optimizer_state_dict"].update(partition_count=[3, 1]))
    refuses(tmp_path, "cut over [1, 3] ranks, wanted one number")


def test_pipelines_and_tensor_parallel_runs(tmp_path):
    folder = written(tmp_path, stage=1)
    edit(model(folder), lambda c: c.update(mp_world_size=2))
    refuses(tmp_path, "model-parallel files of 1 of 2 ranks missing: rank 1")
    edit(model(folder), lambda c: c.update(mp_world_size=1, module=None))
    refuses(tmp_path, "no 1 stages of 0 each")


def test_a_universal_checkpoint_that_is_not_one(tmp_path):
    folder = written(tmp_path)
    (tmp_path / "latest").rename(tmp_path / "latest_universal")
    sources.open(tmp_path)
    (folder / "zero").mkdir()
    refuses(tmp_path, "optim_states.pt and zero/: files of two runs")


def test_a_truncated_rank_file(tmp_path):
    folder = written(tmp_path)
    data = optim(folder, 1).read_bytes()
    optim(folder, 1).write_bytes(data[: len(data) // 2])
    refuses(tmp_path, "rank_1")
    optim(folder, 1).write_bytes(b"")
    refuses(tmp_path, "rank_1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition_count", "three"),
        ("partition_count", None),
        ("partition_count", 10**12),
        ("zero_stage", 7),
        ("zero_stage", "three"),
        ("fp32_flat_groups", None),
        ("fp32_flat_groups", [1, 2]),
        ("fp32_flat_groups", [torch.zeros(3, 3)]),
    ],
)
def test_optimizer_keys_of_another_kind(tmp_path, key, value):
    folder = written(tmp_path)
    edit(optim(folder, 0), lambda c: c["optimizer_state_dict"].update({key: value}))
    refuses(tmp_path, "rank_0", key if key != "zero_stage" else "stage")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("param_shapes", [["a"]]),
        ("param_shapes", [{"a": (1.5,)}]),
        ("param_shapes", [{"a": (-1,)}]),
        ("param_shapes", [{"a": (1,)}, {"a": (1,)}]),
        ("buffer_names", [1]),
        ("shared_params", {"a": 1}),
        ("frozen_param_fragments", {"still": [1.0]}),
        ("frozen_param_fragments", None),
        ("frozen_param_fragments", {}),
        ("module", [1]),
    ],
)
def test_model_keys_of_another_kind(tmp_path, key, value):
    folder = written(tmp_path)
    edit(model(folder, 0), lambda c: c.update({key: value}))
    refuses(tmp_path, "rank_0" if value != {} else "still", key)


@pytest.mark.parametrize("stage", [1, 3])
def test_numbers_beyond_any_run(tmp_path, stage):
    """Nothing is made as large as a file says before it is known that it can be."""
    folder = written(tmp_path, stage=stage)
    file = model(folder, 0 if stage == 3 else None)
    edit(file, lambda c: (c["module"].pop("b"), c["param_shapes"][0].update(b=(1 << 61, 4))))
    refuses(tmp_path, "the limit is 2^61")
    edit(file, lambda c: c.update(num_experts=[10**12]))
    refuses(tmp_path, "num_experts: wanted whole numbers below 2^20")


def test_rename_into_one(tmp_path):
    written(tmp_path)
    refuses(tmp_path, "rename makes 'x' of both", rename=[("^.*$", "x")])


def test_config_that_is_no_json(tmp_path):
    written(tmp_path)
    (tmp_path / "config.json").write_text("{nothing")
    refuses(tmp_path, "config.json: no JSON")
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    refuses(tmp_path, "'a' stands twice")


SHAPES = {"w": (40, 8), "ones": (24,), "b": (13,), "v": (31, 5), "one": (1,)}
KINDS = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "aligned": {"stage": 1, "alignment": 4},
    "round robin": {"stage": 2, "round_robin": True},
    "BF16_Optimizer": {"stage": 1, "bf16_optimizer": True},
    "two groups": {"stage": 2, "groups": [["w", "ones"], ["b", "v", "one"]]},
    "fp16 masters": {"stage": 2, "master": torch.float16, "model_dtype": torch.float16},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_files_under_another_rank_s_name(tmp_path, options):
    """Swapped, or copied: each holds what the 16-bit copy in `module` has elsewhere."""
    torch.manual_seed(3)
    params = {n: torch.ones(s) if n == "ones" else torch.randn(s) for n, s in SHAPES.items()}
    params["w"][:, ::2] = 0  # ranks agree in some of what is compared
    write_zero(tmp_path / "good", params, world=4, stripped=False, legacy=True, **options)
    assert not sources.open(tmp_path / "good").notes
    for a, b, copied in ((0, 1, False), (1, 2, False), (0, 2, True), (3, 0, True)):
        at = tmp_path / f"bad-{a}-{b}-{copied}"
        shutil.copytree(tmp_path / "good", at)
        (first,), (second,) = (at.rglob(f"*zero_pp_rank_{rank}_*optim_states.pt") for rank in (a, b))
        held = second.read_bytes()
        second.write_bytes(first.read_bytes())
        if not copied:
            first.write_bytes(held)
        refuses(at, "holds the partition of rank", "swapped with, or copied from")


@pytest.mark.parametrize("copied", [False, True], ids=["swapped", "copied"])
@pytest.mark.parametrize(("stage", "kind"), [(2, "optim_states"), (3, "optim_states"), (3, "model_states")])
def test_files_that_were_saved_under_another_rank_s_name(tmp_path, stage, kind, copied):
    folder = written(tmp_path, stage=stage)
    first, second = (next(folder.glob(f"*zero_pp_rank_{rank}_*{kind}.pt")) for rank in (1, 2))
    held = second.read_bytes()
    second.write_bytes(first.read_bytes())
    if not copied:
        first.write_bytes(held)
    refuses(tmp_path, "was saved as ", f"_mp_rank_00_{kind}.pt: swapped with, or copied from")


def test_a_file_that_was_saved_to_a_stream_or_renamed_whole_is_read(tmp_path):
    folder = written(tmp_path)
    want = sources.open(tmp_path)["a.weight"].shape
    for rank in range(3):
        path = optim(folder, rank)
        with zero_writer.deepspeed_names(), (folder / "elsewhere").open("wb") as f:
            torch.save(torch.load(path, weights_only=False), f)
        (folder / "elsewhere").rename(path if rank else path.with_name(path.name.removeprefix("bf16_")))
    optim(folder, 0).unlink()
    assert sources.open(tmp_path)["a.weight"].shape == want


def test_masters_that_moved_away_from_their_copy_are_a_note(tmp_path):
    torch.manual_seed(3)
    params = {n: torch.randn(s) for n, s in SHAPES.items()}
    write_zero(tmp_path, params, stage=2, world=3)

    def change(content):
        content["module"]["w"].add_(1.0)

    edit(model(tmp_path / "global_step2"), change)
    report = fastckpt.consolidate(tmp_path, tmp_path / "out")
    assert "`module` is no copy of the masters: w differs, 2 of those compared" in report.notes[0]


def test_a_partition_of_another_run_is_a_note(tmp_path):
    torch.manual_seed(3)
    for name in ("one", "two"):
        write_zero(tmp_path / name, {n: torch.randn(s) for n, s in SHAPES.items()}, stage=2, world=3)
    other, mine = (optim(tmp_path / name / "global_step2", 1) for name in ("two", "one"))
    mine.write_bytes(other.read_bytes())
    report = fastckpt.consolidate(tmp_path / "one", tmp_path / "out")
    assert "no copy of the masters" in report.notes[0] and "files of two runs" in report.notes[0]
