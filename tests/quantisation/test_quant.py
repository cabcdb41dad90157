"""load_dynamic: the modules that quantize_dynamic makes, from an output that never saw torch.ao."""

from __future__ import annotations

import re
import sys

import fastckpt
import pytest
import torch
from fastckpt.errors import DeviceError, LayoutError
from fastckpt.quant import dynamic_state, load_dynamic
from fastckpt.quantisation.schemes import SCHEMES, Quant

quantization = pytest.importorskip("torch.ao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = {
    "int8-dynamic": quantization.default_dynamic_qconfig,
    "int8-dynamic-channel": quantization.per_channel_dynamic_qconfig,
}


class Words(torch.nn.Module):
    """A small word language model."""

    def __init__(self, kind, bidirectional=False):
        super().__init__()
        self.encoder = torch.nn.Embedding(40, 24)
        self.rnn = kind(24, 16, 2, bidirectional=bidirectional)
        self.decoder = torch.nn.Linear(32 if bidirectional else 16, 40, bias=not bidirectional)

    def forward(self, tokens):
        return self.decoder(self.rnn(self.encoder(tokens))[0])


def written(model, path, scheme):
    quant = Quant(SCHEMES[scheme], include=("decoder.weight",))
    fastckpt.reshard(model.state_dict(), layout="same", quant=quant, out=path)


@pytest.mark.parametrize("scheme", list(CONFIGS))
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equal_to_quantize_dynamic(tmp_path, scheme, kind, bidirectional):
    torch.manual_seed(5)
    model = Words(kind, bidirectional).eval()
    written(model, tmp_path / "out", scheme)
    want = quantization.quantize_dynamic(
        model, {torch.nn.Linear: CONFIGS[scheme], kind: CONFIGS[scheme]}, dtype=torch.qint8
    )
    blank = Words(kind, bidirectional).eval()
    got = load_dynamic(blank, tmp_path / "out")
    assert repr(got) == repr(want)
    tokens = torch.randint(40, (7, 3))
    assert torch.equal(got(tokens), want(tokens))
    a, b = got.decoder.weight(), want.decoder.weight()
    assert torch.equal(a.int_repr(), b.int_repr())
    assert torch.equal(a.dequantize(), b.dequantize())
    assert str(got.rnn.get_weight()) == str(want.rnn.get_weight())
    assert all(
        torch.equal(x.int_repr(), want.rnn.get_weight()[n].int_repr())
        for n, x in got.rnn.get_weight().items()
    )


@pytest.mark.parametrize("scheme", list(CONFIGS))
def test_torchs_own_state_dict(tmp_path, scheme):
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8, bias=False))
    quant = Quant(SCHEMES[scheme], include=("*.weight",))
    fastckpt.reshard(model.state_dict(), layout="same", quant=quant, out=tmp_path / "out")
    state = dynamic_state(model, tmp_path / "out")
    spec = {torch.nn.Linear: CONFIGS[scheme]}
    want = quantization.quantize_dynamic(model, spec, dtype=torch.qint8)
    assert list(state) == list(want.state_dict())
    parts = ("scale", "zero_point", "_packed_params.dtype", "_packed_params._packed_params")
    assert {f"0.{part}" for part in parts} <= set(state)
    other = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8, bias=False))
    fresh = quantization.quantize_dynamic(other, spec, dtype=torch.qint8)
    fresh.load_state_dict(state)
    x = torch.randn(5, 24)
    assert torch.equal(fresh(x), want(x)) and not torch.equal(other(x), model(x))


def test_what_does_not_fit_is_refused(tmp_path):
    model = Words(torch.nn.LSTM)
    written(model, tmp_path / "out", "int8-dynamic")
    wide = Words(torch.nn.LSTM)
    wide.decoder = torch.nn.Linear(16, 41)
    with pytest.raises(LayoutError, match=r"decoder\.weight: got \(40, 16\)"):
        load_dynamic(wide, tmp_path / "out")
    more = Words(torch.nn.LSTM)
    more.norm = torch.nn.LayerNorm(3)
    with pytest.raises(LayoutError, match="2 tensors of the model are not in it"):
        load_dynamic(more, tmp_path / "out")
    other = Words(torch.nn.LSTM)
    other.rnn = torch.nn.Embedding(3, 3)
    with pytest.raises(LayoutError, match="no quantised Embedding"):
        load_dynamic(other, tmp_path / "out")


def test_tensors_of_other_shapes(tmp_path):
    model = Words(torch.nn.LSTM)
    written(model, tmp_path / "out", "int8-dynamic")
    wide = Words(torch.nn.LSTM)
    wide.encoder = torch.nn.Embedding(41, 24)
    with pytest.raises(LayoutError, match=r"encoder\.weight: got \(40, 24\), the model has \(41, 24\)"):
        load_dynamic(wide, tmp_path / "out")
    narrow = Words(torch.nn.LSTM)
    narrow.rnn = torch.nn.LSTM(24, 16, 2, proj_size=3)
    with pytest.raises(LayoutError, match="rnn: torch does not quantise it without bias, or with proj_size"):
        load_dynamic(narrow, tmp_path / "out")


@pytest.mark.parametrize("backend", ["torch.ao", "torchao"])
@pytest.mark.parametrize("held", [True, False])
def test_a_bias_that_one_of_them_lacks(tmp_path, backend, held):
    """It is neither left out of what was saved, nor of the model."""
    if backend == "torchao":
        pytest.importorskip("torchao.quantization", reason="needs torchao")
    model, other = (torch.nn.Sequential(torch.nn.Linear(24, 16, bias=b)) for b in (held, not held))
    quant = Quant(SCHEMES["int8-dynamic"], include=("0.weight",))
    fastckpt.reshard(model.state_dict(), layout="same", quant=quant, out=tmp_path / "out")
    got, wanted = ("(16,)", "none") if held else ("none", "(16,)")
    with pytest.raises(
        LayoutError, match=rf"0\.bias: got {re.escape(got)}, the model has {re.escape(wanted)}"
    ):
        load_dynamic(other, tmp_path / "out", backend=backend)


@pytest.mark.parametrize("backend", ["torch.ao", "torchao"])
def test_a_matrix_whose_scale_is_gone(tmp_path, backend):
    if backend == "torchao":
        pytest.importorskip("torchao.quantization", reason="needs torchao")
    held = {"weight": torch.zeros(16, 24, dtype=torch.int8), "weight_zero_point": torch.tensor(0)}
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(LayoutError, match=r"weight: wanted int8 values with a scale, got torch.int8"):
        load_dynamic(torch.nn.Linear(24, 16, bias=False), tmp_path / "x.pt", backend=backend)


def test_one_module_is_a_model(tmp_path):
    model = torch.nn.Linear(24, 16)
    quant = Quant(SCHEMES["int8-dynamic"], include=("weight",))
    fastckpt.reshard(model.state_dict(), layout="same", quant=quant, out=tmp_path / "out")
    want = quantization.quantize_dynamic(
        torch.nn.Sequential(model), {torch.nn.Linear: CONFIGS["int8-dynamic"]}, dtype=torch.qint8
    )
    x = torch.randn(3, 24)
    assert torch.equal(
        load_dynamic(torch.nn.Linear(24, 16), tmp_path / "out", backend="torch.ao")(x), want(x)
    )


# ---- torchao: opt-in, where it is installed ----


def sequence(seed):
    torch.manual_seed(seed)
    first, last = torch.nn.Linear(24, 16), torch.nn.Linear(16, 8, bias=False)
    return torch.nn.Sequential(torch.nn.Embedding(40, 24), first, torch.nn.ReLU(), last).eval()


@pytest.mark.parametrize("scheme", list(CONFIGS))
def test_equal_to_torchaos_quantize(tmp_path, scheme):
    q = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = sequence(6)
    quant = Quant(SCHEMES[scheme], include=("1.weight", "3.weight"))
    fastckpt.reshard(model.state_dict(), layout="same", quant=quant, out=tmp_path / "out")
    got = load_dynamic(sequence(7), tmp_path / "out", backend="torchao")
    by = q.PerTensor() if scheme == "int8-dynamic" else q.PerRow()
    q.quantize_(model, q.Int8DynamicActivationInt8WeightConfig(granularity=by))
    for a, b in ((got[1].weight, model[1].weight), (got[3].weight, model[3].weight)):
        assert torch.equal(a.qdata, b.qdata) and torch.equal(a.scale, b.scale)
        assert torch.equal(a.zero_point, b.zero_point) and a.zero_point.dtype is b.zero_point.dtype
        assert (a.block_size, a.dtype, a.act_quant_kwargs) == (b.block_size, b.dtype, b.act_quant_kwargs)
    tokens = torch.randint(40, (5, 3))
    assert torch.equal(got(tokens), model(tokens))
    assert list(got.state_dict()) == list(model.state_dict())


def test_what_torchao_has_not_is_refused(tmp_path):
    pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = Words(torch.nn.LSTM)
    written(model, tmp_path / "out", "int8-dynamic")
    with pytest.raises(LayoutError, match="rnn: torchao has no quantised LSTM"):
        load_dynamic(Words(torch.nn.LSTM), tmp_path / "out", backend="torchao")


def test_a_package_that_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    model = sequence(6)
    quant = Quant(SCHEMES["int8-dynamic"], include=("1.weight",))
    fastckpt.reshard(model.state_dict(), layout="same", quant=quant, out=tmp_path / "out")
    with pytest.raises(DeviceError, match="torchao is not installed"):
        load_dynamic(model, tmp_path / "out", backend="torchao")
