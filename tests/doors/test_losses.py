"""What an output says of its quantised tensors: in inspect, as JSON, and as a picture that decodes."""

from __future__ import annotations

import json
import math
import struct
import zlib

import fastckpt
import numpy as np
import pytest
import torch
from fastckpt.cli import main
from fastckpt.doors import losses
from fastckpt.doors.drawing import GLYPHS, Canvas
from fastckpt.errors import SourceError
from quantisation.test_quant_road import linear, model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config, tensors = model("llama")
    out = tmp_path_factory.mktemp("losses") / "out"
    fastckpt.reshard(tensors, 2, config=config, quant="int4-group", out=out)
    return out, tensors


def decoded(data):
    """The colours of an eight-bit PNG whose rows have no filter."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (n,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + n]
        assert struct.unpack_from(">I", data, at + 8 + n)[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + n
    width, height, depth, colour = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    assert (depth, colour) == (8, 2) and list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_inspect_tells_every_quantised_tensor(made, capsys):
    out, tensors = made
    found = fastckpt.inspect(out)
    assert {x.name for x in found.losses} == {n for n in tensors if linear(n)}
    assert {x.rank for x in found.losses} == {0, 1} and {x.scheme for x in found.losses} == {"int4-group"}
    for x in found.losses:
        whole = tensors[x.name]
        assert x.dense_bytes == 2 * whole.numel() and x.nbytes < x.dense_bytes / 7
        assert 0 < x.noise < 0.2 and x.cosine > 0.98
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "quantised to int4-group (14 tensors" in text and " dB" in text and "largest error" in text
    assert main(["inspect", "--json", str(out)]) == 0
    assert len(json.loads(capsys.readouterr().out)["losses"]) == 14


def test_the_picture(made, tmp_path):
    out, _ = made
    assert main(["inspect", str(out), "--plot", str(tmp_path / "a.png")]) == 0
    points = decoded((tmp_path / "a.png").read_bytes())
    assert points.shape == (losses.HEIGHT, losses.WIDTH, 3)
    for ink in losses.INKS[:7]:  # q, k, v, o, gate, up and down
        assert (points == np.array(ink)).all(axis=2).sum() >= 25
    assert main(["inspect", str(out), "--plot", str(tmp_path / "a.jpg")]) == 2
    assert main(["inspect", str(out), "--plot", str(tmp_path / "none" / "a.png")]) == 4
    assert sorted(losses.by_role(fastckpt.inspect(out).losses)) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


def test_letters_stand_where_they_are_put():
    canvas = Canvas(40, 10)
    canvas.text(1, 1, "iL~", (0, 0, 0))
    dark = (canvas.points == 0).all(axis=2)
    assert dark[1:9, 3].sum() == 6  # the stem of the i and its point
    assert dark[1:8, 7].all() and dark[7, 7:12].all()
    assert len(GLYPHS) == 5 * (127 - 32)
    canvas.line(-5, -5, 60, 60, (1, 2, 3))  # what lies outside is not drawn


def test_many_layers_and_nothing_lost():
    some = [
        losses.Loss(0, f"model.layers.{n}.mlp.up_proj.weight", "int8", 8, 2, 0.1, 0.05, 20.0 + n, 0.99)
        for n in range(61)
    ]
    same = losses.Loss(1, "head.weight", "int8", 8, 2, 0.0, 0.0, None, 1.0)
    assert decoded(losses.picture([*some, same])).shape[2] == 3
    assert decoded(losses.picture([same])).shape[2] == 3
    lines = losses.text([*some, same])
    assert len(lines) == 2 + losses.SHOWN and "62 tensors" in lines[0]
    assert losses.text([]) == []
    with pytest.raises(SourceError, match="no quantised tensor"):
        losses.picture([])


ODD = '{"a": {"dense": "x", "scheme": "y", "dense_bytes": true}}'
FIGURES = dict(dense="x", scheme="y", dense_bytes=4, bytes=1, max_error=1, rms_error=1, snr_db=1, cosine=1)
WILD = [
    json.dumps({"a": FIGURES | {k: x}})
    for k, x in (
        ("snr_db", -1e308),
        ("snr_db", math.nan),
        ("max_error", math.inf),
        ("rms_error", 10**400),
        ("bytes", math.nan),
        ("bytes", None),
    )
]


@pytest.mark.parametrize("told", ["[]", '{"a": 1}', '{"a": {"dense": "x"}}', "{", ODD, *WILD])
def test_broken_figures_are_refused(tmp_path, told):
    (tmp_path / "quantisation-rank-0.json").write_text(told)
    with pytest.raises(SourceError, match="quantisation-rank-0"):
        losses.read(str(tmp_path))


def test_figures_that_there_are_none_of(tmp_path):
    """Nothing was lost, or all was: no ratio has a value."""
    (tmp_path / "quantisation-rank-0.json").write_text(json.dumps({"a": FIGURES | {"snr_db": None}}))
    (one,) = losses.read(str(tmp_path))
    assert one.snr_db is None and one.noise == 0.0


def test_a_checkpoint_without_figures_tells_none(tmp_path):
    fastckpt.reshard({"a.weight": torch.ones(2, 2)}, layout="same", out=tmp_path / "out")
    assert fastckpt.inspect(tmp_path / "out").losses == ()
