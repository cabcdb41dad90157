"""The command line: exit codes, what a failure leaves behind, and what progress says."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from doors.llama import left, llama
from fastckpt import cli
from fastckpt.doors import terminal
from safetensors.torch import save_file
from zero_writer import write_zero

# ---- failures ----


def test_an_error_is_one_line(run, tmp_path):
    code, out, err = run("inspect", tmp_path / "nothing")
    assert (code, out) == (3, "")
    assert err.startswith("fastckpt: error: ")
    assert err.count("\n") == 1


def test_the_traceback_is_shown_when_asked_for(run, tmp_path, monkeypatch):
    assert "Traceback" in run("inspect", tmp_path / "nothing", "--debug")[2]
    monkeypatch.setenv("FASTCKPT_DEBUG", "1")
    assert "Traceback" in run("inspect", tmp_path / "nothing")[2]


def test_exit_codes(run, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    assert run("consolidate", source, out)[0] == 4  # not empty
    assert (out / "mine").read_text() == "kept"
    assert run("plan", source, "--tp", "3")[0] == 2  # heads do not divide
    assert run("plan", source, "--rank", "1")[0] == 2
    assert run("plan", source, "--recipe", "unknown")[0] == 2
    assert run("plan", source, "-L", "pad=true", "-L", "pad=false")[0] == 2  # which of the two?
    assert run("inspect", source, "--tag", "absent")[0] == 3
    assert run("reshard", source, tmp_path / "small", "--memory", "1MB")[0] == 4
    assert left(tmp_path) == ["out"]


def test_a_truncated_file_exits_3_and_leaves_nothing(run, tmp_path):
    source = tmp_path / "source"
    write_zero(source, llama(), stage=3, world=2)
    victim = next((source / "global_step2").glob("*rank_1*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-100])
    code, _, err = run("consolidate", source, tmp_path / "out")
    assert code == 3
    assert victim.name in err
    assert left(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("argv", "code", "kind"),
    [
        (["inspect", "/nowhere"], 3, "SourceError"),
        (["reshard", "SOURCE", "OUT", "--tp", "5"], 2, "LayoutError"),
        (["plan", "SOURCE", "--tp", "two"], 2, "UsageError"),
        (["nothing"], 2, "UsageError"),
        (["manager", "publish", "OUT"], 2, "UsageError"),
        (["reshard", "SOURCE", "SOURCE"], 4, "WriteError"),
    ],
)
def test_errors_as_json(run, source, tmp_path, argv, code, kind):
    words = [{"SOURCE": source, "OUT": str(tmp_path / "out")}.get(word, word) for word in argv]
    got, out, err = run(*words, "--json")
    assert (got, out, err.count("\n")) == (code, "", 1)
    told = json.loads(err)
    assert (told["kind"], told["exit"], sorted(told)) == (kind, code, ["error", "exit", "kind"])
    assert told["error"] in run(*words)[2]


def test_no_room_to_map_is_the_machine_s_fault(source, tmp_path):
    code = (
        "import resource, sys; from fastckpt import _C, cli, road, reader\n"
        "def none(*a):\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))\n"
        "    try: return real(*a)\n"
        "    finally: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)\n"
        "real, _C.Mapping = _C.Mapping, none\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    pytest.importorskip("fastckpt._C", reason="the compiled module is not built")
    argv = [sys.executable, "-c", code, "consolidate", source, str(tmp_path / "out"), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    told = json.loads(done.stderr.splitlines()[-1])
    assert (done.returncode, told["kind"], told["exit"]) == (4, "WriteError", 4)
    assert "cannot map" in told["error"] and left(tmp_path) == []


def test_an_os_error_exits_4(run, monkeypatch):
    def fails(args):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(cli.COMMANDS, "doctor", fails)
    code, _, err = run("doctor")
    assert code == 4
    assert err == "fastckpt: error: [Errno 28] No space left on device\n"


SIGNALLED = """
import os, sys
from contextlib import contextmanager
from fastckpt import cli

@contextmanager
def progress(**options):
    def show(done, total, phase):
        if phase == "copy":
            os.kill(os.getpid(), int(sys.argv[1]))
    yield show

cli.progress = progress
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("rank", [(), ("--rank", "0")])
def test_a_signal_leaves_nothing_behind(source, tmp_path, number, code, rank):
    out = tmp_path / "out"
    command = ["reshard", source, str(out), "--tp", "2", *rank]
    python = [sys.executable, "-c", SIGNALLED, str(int(number))]
    done = subprocess.run(
        [*python, *command], capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1
    assert not out.exists() or left(out) == []
    assert [n for n in left(tmp_path) if n != "out"] == []


@pytest.mark.parametrize(
    ("ending", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (None, None)]
)
def test_a_lock_that_a_second_signal_took_is_no_failure(run, monkeypatch, ending, code):
    """threading.Condition raises RuntimeError where a signal interrupts it as it waits for its lock again."""

    def interrupted(args):
        try:
            if ending is not None:
                raise ending
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setitem(cli.COMMANDS, "recipes", interrupted)
    if code is None:
        with pytest.raises(RuntimeError):
            run("recipes")
    else:
        assert run("recipes") == (code, "", "")


def test_a_reader_that_goes_away_is_no_error(source):
    command = [sys.executable, "-m", "fastckpt", "inspect", source, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == cli.UNHEARD


def test_names_do_not_command_the_terminal(run, tmp_path):
    save_file({"a\x1b[31mred\r": torch.ones(2)}, tmp_path / "model.safetensors")
    code, said, _ = run("inspect", tmp_path)
    assert code == 0 and "a\\x1b[31mred\\r" in said and "\x1b" not in said and "\r" not in said


def test_a_closed_stdout_is_no_mismatch(source, tmp_path):
    command = f'"{sys.executable}" -m fastckpt consolidate "{source}" "{tmp_path / "out"}" --no-fsync >&-'
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("words", ["recipes", "doctor --json"])
def test_a_full_stdout_is_named(words):
    command = f'"{sys.executable}" -m fastckpt {words} >/dev/full'
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    said = "standard output: No space left on device"
    assert done.returncode == 4 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_full_stderr_keeps_the_exit_code(tmp_path):
    command = f'"{sys.executable}" -m fastckpt inspect "{tmp_path / "none"}" 2>/dev/full'
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 3


@pytest.mark.parametrize("name", [b"\xff\xfe", "\u00fc \n".encode()])
@pytest.mark.parametrize("language", ["C", "C.UTF-8"])
def test_names_of_any_bytes(source, tmp_path, name, language):
    """Names of files are bytes: not UTF-8, or not in the terminal's encoding."""
    here = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(here)
    shutil.copytree(os.fsencode(source), here + b"/source")
    env = {**os.environ, "LC_ALL": language, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for argv in (["reshard", here + b"/source", here + b"/out", "--tp", "2"], ["verify", here + b"/out"]):
        command = [sys.executable, "-m", "fastckpt", *argv]
        done = subprocess.run(command, env=env, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_directory_that_may_not_be_listed_exits_3(run, tmp_path, monkeypatch):
    def refused(path="."):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refused)
    code, _, err = run("inspect", tmp_path)
    assert code == 3 and "Permission denied" in err and "Errno" not in err


def test_an_ascii_terminal_gets_every_name(tmp_path):
    save_file({"gewicht_\u00e4": torch.ones(2)}, tmp_path / "model.safetensors")
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "fastckpt", "inspect", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 0 and b"gewicht_\\xe4" in done.stdout


# ---- progress ----


def test_a_terminal_gets_a_bar(source, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastckpt", "consolidate", source, str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    seen: list[bytes] = []

    def drain() -> None:
        try:
            while data := os.read(ours, 4096):
                seen.append(data)
        except OSError:  # Linux: the other end was closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    printed = process.communicate()[0]
    reader.join()
    os.close(ours)
    assert process.returncode == 0
    assert b"copy" in b"".join(seen)
    assert b"B/s" in b"".join(seen)
    assert b"\x1b" not in printed


def test_lines_are_thinned_but_never_the_last(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progress(as_json=True, quiet=False) as show:
        for done in range(1, 11):
            show(done, 10, "copy")
            now[0] += 0.3 * terminal.INTERVAL
        show(1, 1, "sync")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(x["phase"], x["done"]) for x in lines] == [*(("copy", n) for n in (1, 5, 9, 10)), ("sync", 1)]


def test_a_stream_that_was_closed_is_nobody_s_file(tmp_path):
    """A daemon's 0, 1 and 2 may be closed: an output that got such a number would be printed into."""
    code = (
        "import os, sys\n"
        "os.closerange(0, 3)\n"
        "sys.stdin = sys.stdout = sys.stderr = None\n"
        "from fastckpt import cli\n"
        "code = cli.main(['recipes'])\n"
        "fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "os.write(fd, b'%d %d' % (code, fd > 2))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "told"], check=True, timeout=300)
    assert (tmp_path / "told").read_text() == "0 1"
