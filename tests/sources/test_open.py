"""What `open` recognises, in which order, and what it says of the rest."""

from __future__ import annotations

import os

import fastckpt
import pytest
import reading
import torch
from fastckpt import sources
from fastckpt.errors import LayoutError, SourceError, WriteError
from fastckpt.manager.uploaders import LocalDirectory
from outputs import changed
from reading import refuses
from safetensors.torch import save_file
from zero_writer import write_zero

TENSORS = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}


def test_the_masters_go_before_an_exported_copy(tmp_path):
    write_zero(tmp_path, TENSORS, stage=3, world=2)
    save_file({n: t.bfloat16() for n, t in TENSORS.items()}, tmp_path / "model.safetensors")
    ckpt = sources.open(tmp_path)
    assert ckpt.format == "zero"
    assert ckpt["a"].dtype.name == "float32"


def test_safetensors_go_before_bin(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert sources.open(tmp_path).format == "safetensors"


def test_other_files_have_any_name(tmp_path):
    """A superscript two is a digit, and no number."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "\N{SUPERSCRIPT TWO}").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    assert sources.format_of(tmp_path) == "safetensors"
    assert sources.open(tmp_path).format == "safetensors"


def test_nothing_known(tmp_path):
    refuses(tmp_path / "missing", "No such file or directory")
    refuses("", "'': No such file or directory")
    refuses("a\0b", "embedded null")  # "byte" until Python 3.12
    (tmp_path / "loop").symlink_to("loop")
    refuses(tmp_path / "loop" / "x", "loop/x: Too many levels of symbolic links")
    (tmp_path / "loop").unlink()
    refuses(
        tmp_path,
        "no known checkpoint; looked for",
        "fastckpt.json",
        "latest",
        "*.safetensors",
        "pytorch_model*.bin",
    )
    (tmp_path / "x.txt").write_text("x")
    refuses(tmp_path / "x.txt", "not a checkpoint file; looked for")
    (tmp_path / "x.pt").write_bytes(b"")
    refuses(tmp_path / "x.pt", "not a checkpoint file (it has 0 bytes); looked for")


def test_a_directory_of_checkpoints_names_them(tmp_path):
    for step in (9, 10):
        write_zero(tmp_path / f"checkpoint-{step}", TENSORS, stage=3, world=1)
    refuses(tmp_path, "it holds some: checkpoint-9, checkpoint-10; open one of them")
    for step in range(11, 18):
        write_zero(tmp_path / f"checkpoint-{step}", TENSORS, stage=3, world=1)
    refuses(tmp_path, "checkpoint-16, ...; open one of them")


def test_a_run_s_directory_names_those_further_down(tmp_path):
    for role in ("_actor", "_critic"):
        write_zero(tmp_path / "run/ckpt" / role, TENSORS, stage=3, world=1)
    (tmp_path / "run/logs").mkdir()
    refuses(tmp_path / "run", "it holds some: ckpt/_actor, ckpt/_critic;")
    refuses(tmp_path, "it holds some: run/ckpt/_actor, run/ckpt/_critic;")


def test_an_archive_that_is_no_checkpoint_s_is_not_named(tmp_path):
    torch.save(TENSORS, tmp_path / "model.dat")  # starts as a jar or a docx does
    refuses(tmp_path, "no known checkpoint; looked for")
    (tmp_path / "model.dat").rename(tmp_path / "model.pt")
    refuses(tmp_path, "it holds some: model.pt;")


def test_what_is_known_of_other_programs_is_told(tmp_path):
    (step := tmp_path / "run" / "7").mkdir(parents=True)
    for name, what in sources.UNREAD.items():
        (step / name).write_text("{}")
        refuses(step, f"{what}, which is not read")
        refuses(tmp_path, f"run/7 is {what}, which is not read")
        (step / name).unlink()
    (tmp_path / "llama.nemo").write_bytes(b"tar")
    refuses(tmp_path / "llama.nemo", "an archive of NeMo's, which is not read: unpack it")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"exclude_frozen": True}, "exclude_frozen was asked for"),
        ({"check_crc": True}, "check_crc was asked for"),
        ({"weights": "module"}, "weights='module' was asked for"),
        ({"tag": "x"}, "tag 'x' was asked for"),
    ],
)
def test_options_that_a_format_cannot_heed_are_refused(tmp_path, option, words):
    save_file(TENSORS, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", TENSORS):
        with pytest.raises(SourceError, match=words):
            sources.open(path, **option)
    torch.save(TENSORS, tmp_path / "x.pt")
    if "check_crc" in option:
        assert len(sources.open(tmp_path / "x.pt", **option)) == 2
    else:
        with pytest.raises(SourceError, match=words):
            sources.open(tmp_path / "x.pt", **option)
    with pytest.raises(LayoutError, match="this checkpoint is open already"):
        fastckpt.consolidate(sources.open(tmp_path), **option)


def served(path):
    fastckpt.reshard(TENSORS | {"c": TENSORS["a"]}, layout="same", out=path, durable=False)
    return path


def test_an_output_of_one_rank(tmp_path):
    path = served(tmp_path / "out")
    ckpt = sources.open(path)
    assert (ckpt.format, list(ckpt), dict(ckpt.aliases)) == ("served", ["a", "b"], {"c": "a"})
    assert (reading.read(ckpt["c"]) == reading.bits(TENSORS["a"])).all()
    assert ckpt.facts["made from"]["format"] == "memory"
    with pytest.raises(SourceError, match="out: no tensor 'nope' among 2"):
        ckpt["nope"]
    renamed = sources.open(path, rename=[("^", "x.")])
    assert (list(renamed), dict(renamed.aliases)) == (["x.a", "x.b"], {"x.c": "x.a"})


def test_an_output_s_tied_pair_is_left_out_by_rename_as_one(tmp_path):
    path = served(tmp_path / "out")
    for left_out, names in (("c", ["a", "b"]), ("[ac]", ["b"])):
        assert list(sources.open(path, rename=[(f"^{left_out}$", "")])) == names
    refuses(path, "c is tied to a, which rename leaves out", rename=[("^a$", "")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(schema=9), "schema 9"),
        (lambda r: r.update(world=2), "lists 1 of 2 ranks"),
        (lambda r: r["ranks"][0]["aliases"].update(c="zz"), "alias c of zz"),
        (lambda r: r["ranks"][0]["tensors"].update(q=r["ranks"][0]["tensors"].pop("b")), "q is in fastckpt"),
        (lambda r: r["ranks"][0]["tensors"]["a"].update(dtype="int32"), "a is float32[6], fastckpt.json"),
        (lambda r: r["ranks"][0]["tensors"]["b"].update(shape=[3, 2]), "fastckpt.json says float32[3, 2]"),
    ],
)
def test_records_that_are_not_of_the_files(tmp_path, change, said):
    path = served(tmp_path / "out")
    changed(path, change)
    refuses(path, said)


def test_outputs_that_cannot_be_read(tmp_path):
    path = served(tmp_path / "out")
    record = path / "fastckpt.json"
    record.write_text(record.read_text().replace('"layout": "same"', '"layout": "none"'))
    refuses(path, "does not have its own digest")
    record.rename(path / "fastckpt-rank-0.json")
    refuses(path, "incomplete output", "fastckpt-rank-0.json")


def test_a_tilde_is_a_shells_to_spell_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses("~/checkpoint", "No such file or directory; only a shell makes a home directory of ~")
    for write in (
        lambda: fastckpt.reshard(TENSORS, layout="same", out="~/out"),
        lambda: fastckpt.reshard(TENSORS, layout="same", out="~/out", rank=0),
        lambda: fastckpt.CheckpointManager("~/runs"),
        lambda: LocalDirectory("~/elsewhere"),
    ):
        with pytest.raises(WriteError, match=r"begins with ~; only a shell .* or \./~"):
            write()
    assert not list(tmp_path.iterdir())
    fastckpt.reshard(TENSORS, layout="same", out="./~", durable=False)
    assert len(sources.open("~")) == 2


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(SourceError, match="not a checkpoint file"):
        sources.open(tmp_path / "pipe.pt")


def test_a_further_directory_is_one_and_can_hold_something(tmp_path):
    """`also` for what is whole without it, or of a directory that is not there, was not heard once."""
    (tmp_path / "more").mkdir()
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save(TENSORS, tmp_path / "x.pt")
    fastckpt.reshard(TENSORS, layout="same", out=tmp_path / "served")
    with fastckpt.CheckpointManager(tmp_path / "root") as manager:
        manager.save(1, TENSORS)
        commit = manager.path(1)
    files = tmp_path / "model.safetensors", tmp_path / "x.pt"
    for path in (tmp_path, *files, tmp_path / "served", commit, TENSORS):
        with pytest.raises(SourceError, match="was asked for, nothing of it lies elsewhere"):
            sources.open(path, also=[tmp_path / "more"])
        if path is not TENSORS:
            with pytest.raises(SourceError, match="absent: no directory"):
                sources.open(path, also=[tmp_path / "absent"])
