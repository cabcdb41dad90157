"""The word language models run, and what they claim is so."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import fastckpt
import pytest
import torch
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[2] / "examples/word_lm"


def run(program: str, out: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE / program), "--smoke", "--out", str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_lstm(tmp_path: Path) -> None:
    said = run("train.py", tmp_path)
    assert said.count("holds:") == 3 and "DOES NOT HOLD" not in said
    assert "LSTM(48, 32, num_layers=5" in said and "DynamicQuantizedLSTM(48, 32, num_layers=5" in said
    result = json.loads((tmp_path / "result.json").read_text())
    assert math.exp(result["float"]["loss"]) < result["ntoken"] / 2
    assert abs(result["float"]["loss"] - result["int8"]["loss"]) <= 0.005
    assert len((tmp_path / "out.txt").read_text().split()) == 60
    assert len(ElementTree.parse(tmp_path / "result.svg").findall("{*}polyline")) == 1

    plain = load_file(tmp_path / "float/model.safetensors")
    rnn = torch.nn.LSTM(48, 32, 5)
    rnn.load_state_dict({n.removeprefix("rnn."): t for n, t in plain.items() if n.startswith("rnn.")})
    decoder = torch.nn.Linear(32, result["ntoken"])
    decoder.load_state_dict({n: plain[f"decoder.{n}"] for n in ("weight", "bias")})
    theirs = torch.ao.quantization.quantize_dynamic(
        torch.nn.ModuleDict({"rnn": rnn, "decoder": decoder}), dtype=torch.qint8
    )
    wanted = {f"rnn.{n}": t for n, t in theirs["rnn"].get_weight().items()}
    wanted["decoder.weight"] = theirs["decoder"].weight()
    stored = load_file(tmp_path / "int8/model.safetensors")
    assert sorted(n for n, t in stored.items() if t.dtype == torch.int8) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(stored[name], tensor.int_repr()), name
        assert float(stored[f"{name}_scale"]) == tensor.q_scale(), name
        assert int(stored[f"{name}_zero_point"]) == tensor.q_zero_point(), name
    with fastckpt.CheckpointManager(tmp_path / "checkpoints") as manager:
        saved = manager.restore(manager.best("loss"), names=[f"model.{n}" for n in plain])
    assert isinstance(saved, dict) and all(torch.equal(saved[f"model.{n}"], t) for n, t in plain.items())


@pytest.mark.nightly
def test_lstm_resumes_and_says_the_same(tmp_path: Path) -> None:
    first = run("train.py", tmp_path)
    before = (tmp_path / "int8/model.safetensors").read_bytes()
    again = run("train.py", tmp_path)
    assert "resumed" not in first and "resumed after epoch 2" in again
    assert (tmp_path / "int8/model.safetensors").read_bytes() == before


@pytest.mark.nightly
def test_llama(tmp_path: Path) -> None:
    said = run("llama.py", tmp_path)
    rows = dict(re.findall(r"^\| ([\w-]+) \| [\d.]+ \| [\d.]+ \| ([+-][\d.]+)% \|$", said, re.MULTILINE))
    assert set(rows) == set(fastckpt.SCHEMES) - {"mxfp4-experts"}
    assert all(abs(float(change)) < 1 for change in rows.values()), rows
