"""ZeRO checkpoints of the project's own writer: every tensor through its view, bit for bit."""

from __future__ import annotations

import math

import pytest
import reading
import torch
from fastckpt import sources
from fastckpt.doors.arguments import strip_prefix
from fastckpt.errors import FastckptError, SourceError
from fastckpt.sources import Options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zero_writer import write_zero


def values(shape, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(math.prod(shape), generator=g).reshape(shape)


SHAPES = {
    "embed.weight": (31, 7), "a.weight": (5, 3, 2), "a.bias": (5,), "one": (1,), "odd": (13,), "none": (0, 4),
    "still.weight": (9, 5), "still.bias": (3,), "last": (2, 2),
}  # fmt: skip
PARAMS = {n: values(s, k) for k, (n, s) in enumerate(SHAPES.items())}
FROZEN = ("still.weight", "still.bias")
BUFFERS = {"mask": torch.tensor([True, False, True]), "count": torch.tensor(7), "mean": values((4,), 99)}
TIED = {"head.weight": "embed.weight"}
GROUPS = (["embed.weight", "a.weight", "one"], ["a.bias", "odd", "last"])


def same(ckpt, expected):
    """The checkpoint holds exactly `expected`: names in order, shapes, dtypes, bits."""
    assert [*ckpt, *ckpt.aliases] == list(expected)
    for name, want in expected.items():
        view = ckpt[name]
        assert view.dtype.name == str(want.dtype).removeprefix("torch."), name
        assert view.shape == tuple(want.shape), name
        if name in ckpt.entries:
            assert (ckpt.entries[name].shape, ckpt.entries[name].dtype) == (view.shape, view.dtype), name
        assert (reading.read(view) == reading.bits(want)).all(), name


@pytest.mark.parametrize("world", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_and_world(tmp_path, stage, world):
    expected = write_zero(
        tmp_path, PARAMS, stage=stage, world=world, groups=GROUPS, frozen=FROZEN, buffers=BUFFERS, tied=TIED
    )
    ckpt = sources.open(tmp_path)
    same(ckpt, expected)
    assert ckpt.format == "zero"
    kinds = {n: e.kind for n, e in ckpt.entries.items()}
    assert {n for n, k in kinds.items() if k == "buffer"} == set(BUFFERS)
    assert {n for n, k in kinds.items() if k == "frozen"} == {*FROZEN, "none"}
    facts, saved = ckpt.facts, ckpt.saved
    assert (facts["stage"], facts["world"], saved.tag, saved.step) == (stage, world, "global_step2", 2)
    numel = [sum(PARAMS[n].numel() for n in g) for g in GROUPS]
    assert [g["numel"] for g in facts["groups"]] == numel


def test_stage_0_uses_module_and_says_so(tmp_path):
    expected = write_zero(tmp_path, PARAMS, stage=0, world=1, buffers=BUFFERS, tied=TIED)
    ckpt = sources.open(tmp_path)
    assert {n: ckpt[n].dtype.name for n in expected} == {n: str(t.dtype)[6:] for n, t in expected.items()}
    for name, want in expected.items():
        assert (reading.read(ckpt[name]) == reading.bits(want)).all(), name
    assert ckpt.facts["stage"] == 0
    assert ckpt.facts["weights"] == "module"
    assert "no param_shapes" in ckpt.facts["why module"] and "no param_shapes" in ckpt.notes[0]
    assert dict(ckpt.aliases) == TIED
    with pytest.raises(SourceError, match="at stage 0 nothing says what was frozen"):
        sources.open(tmp_path, exclude_frozen=True)


VARIANTS = {
    "bf16 masters": {"stage": 2, "world": 3, "master": torch.bfloat16},
    "fp16 masters": {"stage": 3, "world": 3, "master": torch.float16, "model_dtype": torch.float16},
    "fp32 training": {"stage": 2, "world": 2, "model_dtype": torch.float32},
    "BF16_Optimizer": {"stage": 1, "world": 3, "bf16_optimizer": True},
    "padded": {"stage": 2, "world": 4, "stripped": False},
    "aligned": {"stage": 2, "world": 3, "alignment": 8},
    "aligned and padded": {"stage": 1, "world": 5, "alignment": 4, "stripped": False},
    "round robin": {"stage": 2, "world": 3, "round_robin": True},
    "sub-groups": {"stage": 3, "world": 3, "sub_group_size": 40},
    "tiny sub-groups": {"stage": 3, "world": 2, "sub_group_size": 1},
    "sequence parallel": {"stage": 2, "world": 4, "sequence": 2},
    "sequence parallel at stage 3": {"stage": 3, "world": 6, "sequence": 3},
    "legacy container": {"stage": 2, "world": 2, "legacy": True},
    "legacy container at stage 3": {"stage": 3, "world": 2, "legacy": True},
    "frozen left out": {"stage": 1, "world": 2, "exclude_frozen": True},
    "frozen left out at stage 3": {"stage": 3, "world": 2, "exclude_frozen": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_what_runs_differ_in(tmp_path, options):
    params = {n: t for n, t in PARAMS.items() if n != "none"} if options.get("exclude_frozen") else PARAMS
    expected = write_zero(
        tmp_path, params, groups=GROUPS, frozen=FROZEN, buffers=BUFFERS, tied=TIED, **options
    )
    same(sources.open(tmp_path), expected)


def test_one_dict_of_shapes_as_old_versions_wrote(tmp_path):
    expected = write_zero(tmp_path, PARAMS, stage=2, world=2, shapes_as_one_dict=True)
    same(sources.open(tmp_path), expected)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_run(tmp_path_factory, data):
    shapes = data.draw(st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=8))
    params = {f"p{k}": values(s, k) for k, s in enumerate(shapes)}
    frozen = data.draw(st.lists(st.sampled_from(sorted(params)), unique=True, max_size=len(params) - 1))
    free = [n for n in params if n not in frozen]
    first = data.draw(st.integers(1, len(free)))
    stage, world = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.integers(1, 9))
    old = stage == 1 and data.draw(st.booleans())
    path = tmp_path_factory.mktemp("run")
    expected = write_zero(
        path, params, stage=stage, world=world, frozen=frozen,
        groups=[g for g in (free[:first], free[first:]) if g],
        master=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        sub_group_size=data.draw(st.sampled_from([None, 1, 5, 30])),
        stripped=data.draw(st.booleans()), round_robin=data.draw(st.booleans()),
        alignment=0 if old else data.draw(st.sampled_from([0, 4, 8])), bf16_optimizer=old,
    )  # fmt: skip
    same(sources.open(path), expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_thousand_ranks_as_sparse_files(tmp_path, stage):
    """1,000 ranks of holes, of which one parameter's elements are written afterwards, by position."""
    world, rows, columns = 1000, 3001, 1009
    params = {"before": torch.zeros(77), "big": torch.zeros(rows, columns), "after": torch.zeros(5)}
    write_zero(tmp_path, params, stage=stage, world=world, sparse=True)
    numel = rows * columns
    part = -(-numel // world)  # of `big` at stage 3, where the others have one element a rank
    partition = part + 2 if stage == 3 else -(-(numel + 82) // (2 * world)) * 2
    marked = [0, part - 1, part, 1234567, numel - 1]
    for j in marked:
        rank, at = (j // part, 1 + j % part) if stage == 3 else divmod(77 + j, partition)
        path = tmp_path / "global_step2" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        with open(path, "r+b") as f:
            f.seek(_record_of_length(path, partition * 4) + at * 4)
            f.write(torch.tensor(float(j + 1)).numpy().tobytes())
    view = sources.open(tmp_path)["big"]
    assert view.shape == (rows, columns)
    got = torch.from_numpy(reading.read(view.reshape((numel,)))).view(torch.float32)
    assert got.nonzero().flatten().tolist() == marked
    assert got[marked].tolist() == [float(j + 1) for j in marked]


def _record_of_length(path, nbytes):
    """Where the masters lie: the last storage of that size (moments of the same size come before)."""
    import zipfile

    with zipfile.ZipFile(path) as z:
        names = [i.filename.partition("/")[2] for i in z.infolist() if i.file_size == nbytes]
    return torch._C.PyTorchFileReader(str(path)).get_record_offset(names[-1])


# ---- options ----


def test_module_weights_are_the_16_bit_copy(tmp_path):
    expected = write_zero(tmp_path, PARAMS, stage=2, world=3, frozen=FROZEN, buffers=BUFFERS, tied=TIED)
    ckpt = sources.open(tmp_path, weights="module")
    same(ckpt, {n: t if n in BUFFERS else t.to(torch.bfloat16) for n, t in expected.items()})
    assert ckpt.facts["weights"] == "module"
    assert "mp_rank_00_model_states.pt" in ckpt.extents[int(ckpt["odd"].extent[0])].where.path


def test_module_weights_without_optimizer_files(tmp_path):
    expected = write_zero(tmp_path, PARAMS, stage=2, world=3, frozen=FROZEN, buffers=BUFFERS, tied=TIED)
    for path in (tmp_path / "global_step2").glob("*optim*"):
        path.unlink()
    ckpt = sources.open(tmp_path, weights="module")
    same(ckpt, {n: t if n in BUFFERS else t.to(torch.bfloat16) for n, t in expected.items()})
    assert "compare" in ckpt.facts["why module"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_exclude_frozen(tmp_path, stage):
    expected = write_zero(tmp_path, PARAMS, stage=stage, world=2, frozen=FROZEN, buffers=BUFFERS, tied=TIED)
    out = (*FROZEN, "none")
    same(sources.open(tmp_path, exclude_frozen=True), {n: t for n, t in expected.items() if n not in out})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_name_tied_to_a_frozen_parameter(tmp_path, stage):
    tied = {"still.copy": "still.weight"}
    expected = write_zero(tmp_path, PARAMS, stage=stage, world=2, frozen=FROZEN, tied=tied)
    same(sources.open(tmp_path), expected)
    ckpt = sources.open(tmp_path, exclude_frozen=True)
    assert dict(ckpt.aliases) == {}
    assert any("still.copy" in note for note in ckpt.unread)


def test_rename(tmp_path):
    params = {f"base_model.model.{n}": t for n, t in PARAMS.items()}
    tied = {"base_model.model.head.weight": "base_model.model.embed.weight"}
    write_zero(tmp_path, params, stage=3, world=2, tied=tied)
    ckpt = sources.open(tmp_path, rename=[strip_prefix("base_model.model."), (r"^still\.", "moved.")])
    assert "moved.weight" in ckpt and "embed.weight" in ckpt
    assert dict(ckpt.aliases) == TIED
    assert (reading.read(ckpt["moved.weight"]) == reading.bits(PARAMS["still.weight"])).all()


def test_also_joins_directories(tmp_path):
    expected = write_zero(tmp_path / "a", PARAMS, stage=3, world=4, frozen=FROZEN)
    there = tmp_path / "b" / "global_step2"
    there.mkdir(parents=True)
    for path in sorted((tmp_path / "a" / "global_step2").glob("*rank_[13]_*")):
        path.rename(there / path.name)
    same(sources.open(tmp_path / "a", also=[tmp_path / "b"]), expected)
    same(sources.open(tmp_path / "a", also=[there]), expected)


def test_a_tag_and_the_tag_folder_itself(tmp_path):
    write_zero(tmp_path, {"a": torch.zeros(3)}, stage=3, world=2, tag="global_step2")
    expected = write_zero(tmp_path, PARAMS, stage=3, world=2, tag="global_step10", latest=False)
    same(sources.open(tmp_path, tag="global_step10"), expected)
    ckpt = sources.open(tmp_path / "global_step10")
    same(ckpt, expected)
    assert ckpt.saved.tag == "global_step10"


def test_hf_trainer_directory_brings_its_config(tmp_path):
    root = tmp_path / "checkpoint-2"
    write_zero(root, PARAMS, stage=3, world=2)
    (root / "config.json").write_text('{"model_type": "llama"}')
    for name in ("tokenizer.json", "tiktoken.model"):
        (root / name).write_text("{}")
    (root / "training_args.bin").write_bytes(b"not read")
    for path in (root, root / "global_step2"):
        ckpt = sources.open(path)
        assert ckpt.config == {"model_type": "llama"}
        beside = {f.path.rsplit("/", 1)[1] for f in ckpt.beside}
        assert beside == {"config.json", "tokenizer.json", "tiktoken.model"}


def test_plain_client_state_is_a_fact_and_moments_are_unread(tmp_path):
    client = {"epoch": 3, "hparams": {"dim": [1, 2.5, None]}, "args": object}
    write_zero(tmp_path, PARAMS, stage=2, world=2, client=client)
    ckpt = sources.open(tmp_path)
    assert "optimizer moments of 2 ranks" in ckpt.unread
    assert ckpt.saved.client_state == {"epoch": 3, "hparams": {"dim": [1, 2.5, None]}}
    assert "client state that is not plain: args" in ckpt.unread
    assert {"deepspeed.runtime.zero.config.ZeroStageEnum", "builtins.object"} <= set(ckpt.inert)
    assert all(e.nbytes == ckpt.extents[i].nbytes for i, e in enumerate(ckpt.extents))


def test_crc_is_checked_when_asked(tmp_path):
    expected = write_zero(tmp_path, PARAMS, stage=3, world=2)
    same(sources.open(tmp_path, check_crc=True), expected)


# ---- digests ----


def test_structure_says_what_shapes_the_views(tmp_path):
    def digests(name, params=PARAMS, **options):
        write_zero(tmp_path / name, params, world=2, **{"stage": 3} | options)
        ckpt = sources.open(tmp_path / name)
        return ckpt.structure, ckpt.headers

    plain = digests("plain")
    assert digests("again") == plain
    # Another step: the pickles differ, the places do not.
    later = digests("later", step=10**12)
    assert later[0] == plain[0]
    assert later[1] != plain[1]
    others = [
        digests("names", {n + "x": t for n, t in PARAMS.items()})[0],
        digests("shape", PARAMS | {"last": PARAMS["last"].reshape(4)})[0],
        digests("dtype", master=torch.bfloat16)[0],
        digests("order", dict(reversed(PARAMS.items())))[0],
        digests("stage", stage=2)[0],
        digests("frozen", frozen=FROZEN)[0],
        digests("buffers", buffers=BUFFERS)[0],
        digests("off", stage=0)[0],
    ]
    assert len({plain[0], *others}) == 9


def test_options_say_what_is_wrong():
    with pytest.raises(FastckptError, match="weights: 'best' is none of master, module"):
        Options(weights="best")
    with pytest.raises(FastckptError, match="rename"):
        Options(rename=(("(", ""),))
    with pytest.raises(FastckptError, match="rename"):
        Options(rename=(("a", r"\1"),))
