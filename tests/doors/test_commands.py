"""The command line: every command, and its options."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from doors.llama import CONFIG, left, llama
from fastckpt import cli
from fastckpt.doors import arguments, demo, doctor
from fastckpt.errors import FastckptError
from fastckpt.placement import Placement
from fastckpt.recipes import TYPES
from safetensors.torch import load_file, save_file
from zero_writer import write_zero

# ---- usage ----


def test_no_arguments_print_the_help(run):
    code, out, _ = run()
    assert code == 2
    assert all(f"    {c} " in out or f"    {c}\n" in out for c in cli.COMMANDS)


def test_version(run):
    assert run("--version")[:2] == (0, "fastckpt 0.1.0\n")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"fastckpt {command}" in out


@pytest.mark.parametrize(
    "argv",
    [
        ["unknown"],
        ["inspect"],
        ["plan", "x", "--tp", "two"],
        ["plan", "x", "--rank", "first"],
        ["plan", "x", "--rank", "-1"],
        ["plan", "x", "-L", "nothing"],
        ["plan", "x", "--rename", "nothing"],
        ["plan", "x", "--rename", "(=b"],
        ["plan", "x", "--threads", "0"],
        ["plan", "x", "--max-shard", "1GB"],  # no abbreviations
        ["reshard", "x", "y", "--weights", "none"],
    ],
)
def test_usage_errors_exit_2(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert "usage: fastckpt" in err


def test_an_error_is_one_line_whatever_the_path_is(run):
    code, out, err = run("inspect", "no\nsuch\x1b[31m")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert r"no\nsuch\x1b[31m: No such file" in err


def test_ctrl_c_while_modules_are_imported_has_no_traceback():
    script = (
        "import runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'fastckpt.cli':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "runpy.run_module('fastckpt', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_deepspeed_s_spelling_is_understood():
    line = "consolidate a b --safe_serialization --max_shard_size 1GB --exclude_frozen_parameters -t here -d"
    args = arguments.parser().parse_args(line.split())
    assert (args.safe_serialization, args.max_shard_size) == (True, "1GB")
    assert (args.exclude_frozen_parameters, args.tag, args.debug) == (True, "here", True)


def test_renames_keep_their_order():
    args = arguments.parser().parse_args(
        ["inspect", "a", "--rename", "a(?=b)=c", "--strip-prefix", "module.", "--rename", r"x\.=y"]
    )
    assert args.rename == [("a(?=b)", "c"), (r"^module\.", ""), (r"x\.", "y")]


def test_none_is_what_python_spells_none():
    assert arguments.parser().parse_args(["plan", "a", "--max-shard-size", "none"]).max_shard_size is None
    assert arguments.parser().parse_args(["consolidate", "a", "b", "--dtype", "none"]).dtype is None


# ---- commands ----


def test_inspect(run, source):
    code, text, _ = run("inspect", source)
    assert code == 0
    assert "global_step2" in text and "model.embed_tokens.weight" in text
    code, out, _ = run("inspect", source, "--json")
    found = json.loads(out)
    assert (code, found["family"], found["tensors"], found["facts"]["world"]) == (0, "llama", 21, 3)
    assert found["bytes"] == sum(4 * t.numel() for t in llama().values())


def test_inspect_with_a_config_from_elsewhere(run, source, tmp_path):
    for name in os.listdir(source):
        if name != "config.json":
            (tmp_path / name).symlink_to(Path(source) / name)
    assert json.loads(run("inspect", tmp_path, "--json")[1])["family_note"] == "no config.json"
    assert json.loads(run("inspect", tmp_path, "--config", source, "--json")[1])["family"] == "llama"


def test_plan_writes_nothing(run, source, tmp_path):
    before = left(Path(source))
    argv = ("--tp", "2", "--rank", "1", "--layout", "vllm", "--dtype", "bf16", "--json")
    code, out, _ = run("plan", source, *argv)
    plan = json.loads(out)
    assert code == 0
    assert plan["ranks"] == [1]
    assert {t["rank"] for t in plan["tensors"]} == {1}
    assert plan["output_bytes"] == sum(t["bytes"] for t in plan["tensors"])
    assert left(Path(source)) == before


def test_reshard_verify_diff(run, source, tmp_path):
    served, whole = tmp_path / "served", tmp_path / "whole"
    code, out, err = run("reshard", source, served, "--tp", "2", "--layout", "hf", "--no-fsync")
    assert (code, err) == (0, "")
    assert str(served) in out
    halves = [load_file(served / f"rank-0{r}" / "model.safetensors") for r in range(2)]
    for name, want in llama().items():
        rows = not name.endswith(("o_proj.weight", "down_proj.weight"))
        got = halves[0][name] if "norm" in name else torch.cat([h[name] for h in halves], 0 if rows else 1)
        assert torch.equal(got, want), name
    assert run("verify", served)[0] == 0
    assert run("consolidate", source, whole, "--safe-serialization", "--no-fsync")[0] == 0
    code, out, _ = run("diff", source, whole)
    assert code == 0
    assert out.splitlines()[-1].startswith("bit-equal: 21 tensors")


def test_ranks_one_by_one_complete_the_set(run, source, tmp_path):
    out = tmp_path / "served"
    for rank in ("1", "0"):
        assert not (out / "fastckpt.json").exists()
        assert run("reshard", source, out, "--tp", "2", "--rank", rank, "--no-fsync")[0] == 0
    assert run("verify", out)[0] == 0


def test_reports_as_json(run, source, tmp_path):
    code, out, err = run("consolidate", source, tmp_path / "out", "--json", "--no-fsync")
    report = json.loads(out)
    assert code == 0
    assert report["tensors"] == 21
    assert report["bytes_written"] == sum(4 * t.numel() for t in llama().values())
    assert set(report["digests"]) == set(llama())
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines and all(set(line) == {"phase", "done", "total"} for line in lines)
    assert {"phase": "copy", "done": report["bytes_written"], "total": report["bytes_written"]} in lines


def test_quiet_prints_nothing(run, source, tmp_path):
    assert run("consolidate", source, tmp_path / "out", "--quiet", "--no-fsync") == (0, "", "")


@pytest.mark.parametrize(
    "argv", [["reshard", "--tp", "2"], ["consolidate"], ["consolidate", "--safe-serialization"]]
)
def test_a_dry_run_writes_nothing(run, source, tmp_path, argv):
    command, *options = argv
    code, out, _ = run(command, source, tmp_path / "out", "--dry-run", *options)
    assert code == 0
    assert "peak memory" in out
    assert ("pytorch_model.bin" in out) == (argv == ["consolidate"])
    assert left(tmp_path) == []


@pytest.mark.parametrize("command", ["reshard", "consolidate"])
def test_a_dry_run_refuses_what_the_run_would(run, source, tmp_path, command, monkeypatch):
    """The same words and the same exit code, and nothing made."""

    def refused(out, *options):
        real = run(command, source, out, "--no-fsync", *options)
        dry = run(command, source, out, "--dry-run", *options)
        assert dry == real and dry[0] == 4
        return dry[2]

    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    for path in (file, full / "kept"):
        path.write_text("mine")
    assert "not empty (1 entries, kept first)" in refused(full)
    assert "no output of fastckpt" in refused(full, "--overwrite")
    assert "exists and is no directory" in refused(file)
    assert "overwriting it would remove" in refused(source, "--overwrite")
    assert "is no name of a directory" in refused("")
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    for beneath in (file / "below", file / "far" / "below"):
        assert run(command, source, beneath, "--no-fsync")[0] == 4
        code, _, said = run(command, source, beneath, "--dry-run")
        assert code == 4 and f"{beneath}: {file} is no directory" in said
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=512, f_blocks=9))
    assert "the file system has 512 free" in refused(tmp_path / "new" / "below")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, said = run(command, source, tmp_path / "new", "--dry-run")
    assert code == 4 and f"{tmp_path} cannot be written to" in said
    assert sorted(left(tmp_path)) == ["file", "full"]


def test_a_dry_run_of_a_rank_that_is_done(run, source, tmp_path):
    argv = ("reshard", source, tmp_path / "out", "--tp", "2", "--rank", "0")
    assert run(*argv, "--no-fsync")[0] == 0
    before = sorted(os.listdir(tmp_path / "out"))
    assert run(*argv, "--dry-run")[0] == 0
    code, _, said = run(*argv, "--dtype", "bfloat16", "--dry-run")
    assert code == 4 and "of another plan" in said
    assert sorted(os.listdir(tmp_path / "out")) == before


def test_a_dry_run_goes_by_the_memory_given(run, source, tmp_path):
    """It told what a run with other limits would hold, and nothing of a memory that no run can do with."""

    def held(*options):
        code, out, said = run("reshard", source, tmp_path / "out", "--dry-run", "--json", *options)
        return json.loads(out)["peak_memory"] if code == 0 else (code, said)

    assert held("--threads", "1", "--memory", "70MiB") < held("--threads", "1")
    code, said = held("--memory", "1MB")
    assert code == 4 and "too few" in said
    assert run("plan", source, "--memory", "1MB")[0] == 4


def test_names_are_renamed_and_stripped(run, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_zero(source, {"module.a.x": torch.ones(3), "module.b": torch.ones(2)}, stage=2, world=2)
    argv = ("--strip-prefix", "module.", "--rename", r"^a\.=c.", "--safe-serialization", "--no-fsync")
    assert run("consolidate", source, out, *argv)[0] == 0
    assert set(load_file(out / "model.safetensors")) == {"c.x", "b"}


def test_frozen_parameters_are_left_out(run, tmp_path):
    source = tmp_path / "source"
    write_zero(source, {"a": torch.ones(3), "b": torch.ones(2)}, stage=3, world=2, frozen=["b"])
    for n, argv in enumerate(((), ("--exclude-frozen-parameters",))):
        argv = ("--safe-serialization", "--no-fsync", *argv)
        assert run("consolidate", source, tmp_path / f"{n}", *argv)[0] == 0
    assert [len(load_file(tmp_path / f"{n}" / "model.safetensors")) for n in range(2)] == [2, 1]


def test_check_crc_finds_what_no_header_tells(run, tmp_path):
    torch.save({"w": torch.arange(64.0)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(torch.arange(64.0).numpy().tobytes()) + 9] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    assert run("inspect", tmp_path / "x.pt")[0] == 0
    code, _, err = run("inspect", tmp_path / "x.pt", "--check-crc")
    assert code == 3 and "CRC" in err


def test_nan_is_written_where_it_is_allowed(run, tmp_path):
    save_file({"w": torch.tensor([torch.nan])}, tmp_path / "x.safetensors")
    argv = ("reshard", tmp_path / "x.safetensors", tmp_path / "out", "--layout", "same", "--no-fsync")
    assert run(*argv)[0] == 3 and not (tmp_path / "out").exists()
    assert run(*argv, "--allow-nonfinite")[0] == 0
    assert run("verify", tmp_path / "out")[0] == 0


def test_the_grid_and_the_vocabulary(run, source):
    argv = ("plan", source, "--layout", "vllm", "--json")
    code, out, _ = run(*argv, "--dp", "2", "--pp", "2", "--tp", "2")
    assert code == 0
    assert json.loads(out)["placement"] == {"tp": 2, "pp": 2, "dp": 2, "ep": 1}
    code, _, err = run(*argv, "--ep", "2")
    assert code == 2 and "ep" in err
    code, out, _ = run("plan", source, "--vocab-size", "30", "--json")
    shapes = {t["name"]: t["shape"] for t in json.loads(out)["tensors"]}
    assert code == 0 and shapes["model.embed_tokens.weight"] == [30, 16]


def test_layout_options_and_pattern_plans(run, source, tmp_path):
    assert run("plan", source, "--tp", "4", "--layout", "hf")[0] == 2
    assert run("plan", source, "--tp", "4", "--layout", "hf", "-L", "replicate_kv=true")[0] == 0
    patterns = tmp_path / "plan.json"
    patterns.write_text(json.dumps({"*.q_proj.weight": "colwise", "*": "replicate"}))
    code, out, _ = run("plan", source, "--tp", "2", "--tp-plan", patterns, "--json")
    shapes = {t["name"]: t["shape"] for t in json.loads(out)["tensors"]}
    assert code == 0
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == [8, 16]
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == [8, 16]
    for text in ("[1]", '{"a": 1}', "{", '{"*": "colwise", "*": "replicate"}'):
        patterns.write_text(text)
        code, _, err = run("plan", source, "--tp", "2", "--tp-plan", patterns)
        assert code == 2
        assert "--tp-plan" in err


def test_diff_exits_1(run, source, tmp_path):
    other = tmp_path / "other"
    changed = llama()
    changed["model.norm.weight"][3] += 0.5
    write_zero(other, changed, stage=2, world=2)
    code, out, _ = run("diff", source, other, "--json")
    found = json.loads(out)
    assert (code, found["equal"]) == (1, False)
    assert [(u["name"], u["differing"]) for u in found["unequal"]] == [("model.norm.weight", 1)]


def test_a_tag_is_the_zero_side_s(run, tmp_path):
    """It was put to both sides, so that no tag could be compared with what was exported of it."""
    source, whole = tmp_path / "in", tmp_path / "whole"
    write_zero(source, llama(), stage=2, world=2)
    assert run("consolidate", source, whole, "--no-fsync")[0] == 0
    (source / "latest").unlink()
    for sides in ((source, whole), (whole, source), (source, source)):
        assert run("diff", *sides, "--tag", "global_step2")[0] == 0
        assert run("diff", *sides)[0] == 3
    assert run("diff", source, whole, "--tag", "global_step2", "--weights", "module")[0] == 1  # 16 bits
    assert run("diff", whole, whole, "--tag", "global_step2")[0] == 3
    assert run("plan", source, "--tag", "global_step2", "--quant", "none", "--quant-include", "x")[0] == 2


def test_verify_finds_a_flipped_bit(run, source, tmp_path):
    out = tmp_path / "out"
    assert run("consolidate", source, out, "--no-fsync", "--safe-serialization")[0] == 0
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)
    code, said, _ = run("verify", out)
    assert code == 1
    assert "1 problem" in said
    code, said, _ = run("verify", out, "--json")
    assert (code, json.loads(said)["ok"]) == (1, False)


def test_verify_says_what_it_could_not_check(run, tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    code, said, _ = run("verify", tmp_path)
    assert code == 1 and "nothing says what these files should hold" in said
    code, said, _ = run("verify", tmp_path, "--plain")
    assert code == 0
    assert "no digests" in said
    assert said.splitlines()[-1].startswith("ok: 1 file, 1 tensor, 12 B in ")


def test_weights_under_a_key(run, source, tmp_path):
    out = tmp_path / "out"
    assert run("consolidate", source, out, "--weights-key", "model", "--no-fsync")[0] == 0
    held = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert list(held) == ["model"]
    assert all(torch.equal(held["model"][n], t) for n, t in llama().items())


def test_client_state_goes_with_the_weights(run, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    write_zero(
        source, {"w": torch.ones(3)}, stage=3, world=2, client={"epoch": 4, "args": object, "h": {"a": [1]}}
    )
    asked = ["--weights-key", "weights", "--client-state", "epoch", "--client-state", "h", "--no-fsync"]
    code, plan, _ = run("consolidate", source, out, *asked, "--dry-run", "--json")
    assert code == 0 and not out.exists()
    code, done, _ = run("consolidate", source, out, *asked, "--json")
    assert code == 0 and json.loads(done)["key"] == json.loads(plan)["key"]
    held = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert {n: held[n] for n in ("epoch", "h")} == {"epoch": 4, "h": {"a": [1]}} and len(held) == 3
    for name, code, message in (("args", 3, "no plain value 'args'"), ("nothing", 3, "it has epoch, h")):
        wrong = run("consolidate", source, tmp_path / "no", "--weights-key", "w", "--client-state", name)
        assert wrong[0] == code and message in wrong[2]
    assert run("consolidate", source, tmp_path / "no", "--client-state", "epoch")[0] == 2


def test_recipes(run):
    code, out, _ = run("recipes")
    assert code == 0 and "mixtral" in out and "rotary_emb.inv_freq" in out
    assert max(map(len, out.splitlines())) < 120
    families = json.loads(run("recipes", "--json")[1])["families"]
    assert [f["model_type"] for f in families] == list(TYPES)


def test_a_recipe_of_ones_own(run, tmp_path):
    source, recipe = tmp_path / "in", tmp_path / "mine.py"
    write_zero(source, llama(), stage=3, world=2)
    (source / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mine"}))
    assert run("reshard", source, tmp_path / "out")[0] == 2
    recipe.write_text("from fastckpt.recipes import named\nRECIPE = named('llama')\n")
    assert run("reshard", source, tmp_path / "out", "--recipe", recipe, "--no-fsync")[0] == 0
    assert run("verify", tmp_path / "out")[0] == 0
    code, _, said = run("reshard", source, tmp_path / "no", "--recipe", tmp_path / "none.py")
    assert code == 2 and "none.py" in said


def test_doctor_says_that_the_working_directory_is_gone(run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = run("doctor")
    assert code == 4 and "fastckpt: error: .: No such file or directory" in err


def test_doctor(run, tmp_path):
    code, out, _ = run("doctor", "--json", "--path", tmp_path / "not" / "there")
    found = json.loads(out)
    assert code == 0
    assert found["python"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["python"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # not "+cu130"
    assert found["output"]["path"] == str(tmp_path)
    assert found["output"]["free"] > 0
    code, out, _ = run("doctor")
    assert code == 0
    assert "page size" in out


def test_doctor_of_odd_machines(run, tmp_path, monkeypatch):
    """Tools that print what is no text, or do not run; no compiled module, or one that does not load."""
    tools = {"nvcc": b"#!/bin/sh\nprintf 'release \\377'", "nvidia-smi": b"no program"}
    for name, script in tools.items():
        (tmp_path / name).write_bytes(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    for error, note in (
        (ModuleNotFoundError("x"), "pure Python"),
        (ImportError("libx"), "does not load: libx"),
    ):

        def fails(name, error=error):
            raise error

        monkeypatch.setattr(doctor, "import_module", fails)
        code, out, _ = run("doctor", "--json")
        found = json.loads(out)
        assert code == 0 and not found["fastckpt"]["compiled"] and note in found["fastckpt"]["note"]
        assert found["python"]["numpy"] and found["python"]["no-such-package"] is None
        assert found["cuda"]["toolkit"].startswith("release") and "did not run" in found["cuda"]["gpus"][0]


def in_this_process(command: list[str]) -> tuple[int, str]:
    with redirect_stdout(io.StringIO()) as out:
        code = cli.main(command)
    return code, out.getvalue()


def test_demo(run, tmp_path, monkeypatch):
    assert demo.run(["--version"]) == (0, "fastckpt 0.1.0\n")  # as the demo runs every command
    monkeypatch.setattr(demo, "run", in_this_process)
    code, out, _ = run("demo", "--size", "1MB", "--keep", tmp_path / "kept")
    assert code == 0
    assert out.splitlines()[-1].startswith("all equal: ")
    assert out.count("[exit 0, ") == 9
    assert left(tmp_path / "kept") == ["checkpoint", "hf", "vllm", "whole"]
    (tmp_path / "file").write_text("")
    for keep, said in (
        ("kept", "not empty"),
        ("file", "file: File exists"),
        ("file/x", "file/x: Not a directory"),
    ):
        code, _, err = run("demo", "--keep", tmp_path / keep)
        assert code == 4 and said in err


def test_demo_on_a_full_disk(run, tmp_path, monkeypatch):
    """The folder to keep is empty again, as the next attempt wants it."""

    def write(path: str, tree: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(demo, "_save", write)
    code, out, err = run("demo", "--size", "1MB", "--keep", tmp_path / "kept")
    assert (code, out) == (4, "")
    assert err == f"fastckpt: error: {tmp_path}/kept/checkpoint: No space left on device\n"
    assert os.listdir(tmp_path / "kept") == []


@pytest.mark.parametrize("victim", ["whole/model.safetensors", "vllm/model-rank-2-part-0.safetensors"])
def test_demo_tells_when_something_differs(run, monkeypatch, tmp_path, victim):
    def flipped(command: list[str]) -> tuple[int, str]:
        code, out = in_this_process(command)
        if command[0] == "diff":  # the last command: only the demo's own comparison is left
            file = tmp_path / "kept" / victim
            data = bytearray(file.read_bytes())
            header = 8 + int.from_bytes(data[:8], "little")
            entry = next(e for n, e in json.loads(data[8:header]).items() if ".self_attn.q" in n)
            data[header + entry["data_offsets"][0]] ^= 1
            file.write_bytes(data)
        return code, out

    monkeypatch.setattr(demo, "run", flipped)
    code, out, _ = run("demo", "--size", "1MB", "--keep", tmp_path / "kept", "--json")
    found = json.loads(out)
    assert (code, found["equal"], len(found["wrong"])) == (1, False, 1)
    assert all(step["code"] == 0 for step in found["steps"])


def test_demo_tells_when_a_command_fails(run, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda command: (int(command[0] == "diff"), ""))
    code, out, _ = run("demo", "--size", "1MB")
    assert code == 1
    assert "differs: exit 1: fastckpt diff" in out


# ---- ranks from the launcher ----


@pytest.mark.parametrize("names", cli.LAUNCHERS)
def test_rank_auto_is_the_launcher_s(monkeypatch, names):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    grid = Placement(tp=4)
    with pytest.raises(FastckptError, match="neither RANK nor SLURM_PROCID"):
        cli._rank("auto", grid)
    rank, world = names
    monkeypatch.setenv(rank, "3")
    monkeypatch.setenv(world, "4")
    assert cli._rank("auto", grid) == 3
    assert cli._rank(None, grid) is None  # never unasked
    monkeypatch.setenv(world, "8")
    with pytest.raises(FastckptError, match="=8, but 4 ranks are served"):
        cli._rank("auto", grid)
    monkeypatch.delenv(world)
    with pytest.raises(FastckptError, match="wanted numbers"):
        cli._rank("auto", grid)
