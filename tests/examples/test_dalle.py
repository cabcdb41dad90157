"""The DALLE example runs, and what it claims is so: alone in this process, and under DeepSpeed nightly."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import fastckpt
import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples/dalle"


class Example:
    """The example's modules by name, as its programs see each other."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Example]:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    known, threads = set(sys.modules), torch.get_num_threads()
    yield Example()
    torch.set_num_threads(threads)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXAMPLE)):
            del sys.modules[name]


@pytest.fixture
def data(example: Example, tmp_path: Path) -> Path:
    example.birds.write(tmp_path / "data", 40, 16)
    return tmp_path / "data"


def test_what_cannot_be_read_is_skipped_with_a_word(
    example: Example, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = example.data.Tokenizer(example.birds.WORDS)
    found = example.data.BirdDataset(data, tokenizer, 12, 16)
    stems = [image.stem for image, text in found.pairs if image.stem == text.stem]
    assert len(stems) == len(found.pairs) == 42  # 40 good ones, one cut off, one with no caption in its file
    assert not {"no-captions", "no-picture"} & set(stems)
    items = [found[k] for k in range(len(found))]
    said = capsys.readouterr().out
    assert "empty.txt: holds no caption" in said and "cut-off.png: a IDAT chunk is damaged or cut off" in said
    assert said.count("skipped") == 2
    assert all(tokens.shape == (12,) and picture.shape == (3, 16, 16) for tokens, picture in items)
    assert 0 not in items[0][0]  # a caption far too long fills all places
    chosen = {tokenizer.decode(found[5][0].tolist()) for found.epoch in range(20)}
    assert len(chosen) == 5 and chosen <= set((data / "text/bird-00005.txt").read_text().splitlines())
    found.epoch = 0
    again = [found[k] for k in range(len(found))]
    assert all(
        torch.equal(a, b) for x, y in zip(items, again, strict=True) for a, b in zip(x, y, strict=True)
    )
    with pytest.raises(ValueError, match="no picture of images/ has captions"):
        example.data.BirdDataset(data / "images", tokenizer, 12, 16)


def test_pictures(example: Example, tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "a.png"
    example.pictures.write(path, picture, Description="a red bird")
    data = path.read_bytes()
    assert (example.pictures.read(path) == picture).all()
    at, chunks = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]
    assert chunks[0][1] == bytes([0, 0, 0, 7, 0, 0, 0, 5, 8, 2, 0, 0, 0])
    assert chunks[1][1] == b"Description\0a red bird"
    rows = [bytes([0]) + row.tobytes() for row in picture]
    assert zlib.decompress(chunks[2][1]) == b"".join(rows)
    for k in range(len(data)):
        path.write_bytes(data[:k] + bytes([data[k] ^ 4]) + data[k + 1 :])
        with pytest.raises(example.pictures.BrokenPicture, match=r"a\.png"):
            example.pictures.read(path)


def test_what_follows_changes_nothing_before(example: Example) -> None:
    torch.manual_seed(0)
    vae = example.model.DiscreteVAE(image_size=16, num_tokens=9, codebook_dim=8, num_layers=2, hidden_dim=8)
    dalle = example.model.DALLE(
        vae=vae, dim=16, depth=2, heads=2, dim_head=18, num_text_tokens=20, text_seq_len=6, reversible=True
    )
    text, image = torch.randint(1, 20, (2, 6)), torch.randint(9, (2, 16))
    whole = dalle._logits(text, image[:, :-1])
    for length in range(15):
        assert torch.allclose(dalle._logits(text, image[:, :length]), whole[:, : 7 + length], atol=1e-5)
    allowed = whole > -1e30
    assert allowed[:, :6, :26].all() and not allowed[:, :6, 26:].any()
    assert allowed[:, 6:, 26:].all() and not allowed[:, 6:, :26].any()


def test_alone_after_an_error_it_goes_on_as_if_nothing_was(
    example: Example, data: Path, tmp_path: Path
) -> None:
    def train(model: str, out: Path, *more: str) -> None:
        example.train.main([model, "--smoke", "--data", str(data), "--out", str(out), *more])

    one, other = tmp_path / "one", tmp_path / "other"
    train("vae", one)
    with pytest.raises(OSError, match="rehearsed"):
        train("dalle", one, "--fail-at", "13")
    steps = sorted(p.name for p in (one / "dalle/checkpoints").glob("step-*"))
    assert steps == ["step-00000010", "step-00000012", "step-00000013"]
    train("dalle", one)
    other.mkdir()
    (other / "vae").symlink_to(one / "vae")
    train("dalle", other)

    states = []
    for out in (one, other):
        with fastckpt.CheckpointManager(out / "dalle/checkpoints") as manager:
            states.append(manager.restore())
            assert manager.steps()[-1] == manager.restored == 30
    mine, theirs = states
    assert mine["epoch"] == 3 and mine["hparams"]["dim"] == 24 and mine["vae_params"]["image_size"] == 16
    assert set(mine) >= {"model", "optimizer", "scheduler"} and mine["scheduler"] == theirs["scheduler"]
    assert all(torch.equal(mine["model"][n], t) for n, t in theirs["model"].items())
    moments = [s["optimizer"]["state"] for s in states]
    assert all(torch.equal(moments[0][k][n], t) for k, held in moments[1].items() for n, t in held.items())
    assert (one / "dalle/final.png").read_bytes() == (other / "dalle/final.png").read_bytes()

    logged = [json.loads(line) for line in (one / "dalle/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [5, 10, 15, 20, 25, 30]
    assert all((one / "dalle" / line["image"]).exists() and line["caption"] for line in logged)
    assert all("loss" in line and line["samples_per_second"] > 0 for line in logged[1::2])
    artifacts = sorted((one / "artifacts").iterdir())
    assert [a.name for a in artifacts] == ["epoch-0000", "epoch-0001", "epoch-0002"]
    assert all(fastckpt.verify(a).ok for a in artifacts)


def test_failures_of_reporting_are_reported(
    example: Example,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tracker's service that is gone and an uploader without room cost no step."""

    def gone(*args: object) -> None:
        raise ConnectionResetError("the tracker is gone")

    monkeypatch.setattr(example.tracker.Tracker, "log", gone)
    monkeypatch.setattr(fastckpt.manager.uploaders.LocalDirectory, "put", gone)
    monkeypatch.setattr("fastckpt.manager.uploaders.time.sleep", lambda seconds: None)
    for model in ("vae", "dalle"):
        example.train.main([model, "--smoke", "--data", str(data), "--out", str(tmp_path / "run")])
        said = capsys.readouterr().out
        assert "telling of step 10 failed, training goes on: ConnectionResetError" in said
    assert "an artifact failed, training goes on: WriteError" in said
    with fastckpt.CheckpointManager(tmp_path / "run/dalle/checkpoints") as manager:
        assert manager.latest() == 30 and fastckpt.verify(manager.path(30)).ok


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_under_deepspeed(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(EXAMPLE / "tour.py"), "--smoke", "--twice", "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("holds:") == 2 and "resumed at step 12" in done.stdout
    held = torch.load(tmp_path / "run/single/pytorch_model.bin", weights_only=True)
    assert list(held) == ["weights", "hparams", "vae_params", "epoch"] and held["epoch"] == 3
    commit = max(tmp_path.glob("run/vae/checkpoints/step-*"))
    vae = fastckpt.open(commit / "engine-model")
    names = {n for n in held["weights"] if n.startswith("vae.")}
    assert names == {f"vae.{n}" for n in vae}
    whole = fastckpt.consolidate(commit)
    assert isinstance(whole, dict) and all(
        torch.equal(held["weights"][f"vae.{n}"], t) for n, t in whole.items()
    )

    aux = tmp_path / "run/dalle/aux.pt"
    asked = [sys.executable, str(EXAMPLE / "generate.py"), str(aux), "--out", str(tmp_path / "no.png")]
    refused = subprocess.run(asked, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode == 1 and "fastckpt consolidate" in refused.stderr
    assert set(torch.load(aux, weights_only=True)) == {"weights", "hparams", "vae_params", "epoch"}

    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "vae").symlink_to(tmp_path / "run/vae")
    ranks = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(EXAMPLE / "train.py"),
    ]
    asked = [*ranks, "dalle", "--deepspeed", "--smoke", "--fail-at", "13"]
    asked += ["--data", str(tmp_path / "data"), "--out", str(failed)]
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, *asked], env=env, capture_output=True, text=True, check=False)
    assert done.returncode and "rank 0: saving step 13 after an error: another rank" in done.stdout
    assert fastckpt.verify(failed / "dalle/checkpoints/step-00000013").ok
