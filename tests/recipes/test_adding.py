"""The family and the layout that docs/adding.md shows: they are what the page says, and they work."""

from __future__ import annotations

import sys
from pathlib import Path

import fastckpt
import pytest
import torch
from fastckpt import layouts
from fastckpt.errors import LayoutError, RecipeError
from outputs import hub_directory
from safetensors.torch import load_file

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"
RECIPE, LAYOUT = (text.partition("```")[0] for text in PAGE.read_text().split("```python\n")[1:])
CONFIG = dict(model_type="toy", d_model=32, d_ff=48, n_heads=4, n_kv_heads=2, n_layers=2, vocab_size=64)
SHAPES = {
    "norm1.weight": (32,), "norm2.weight": (32,), "attn.q.weight": (32, 32), "attn.k.weight": (16, 32),
    "attn.v.weight": (16, 32), "attn.o.weight": (32, 32), "mlp.gate.weight": (48, 32),
    "mlp.up.weight": (48, 32), "mlp.down.weight": (32, 48), "mlp.down.bias": (32,),
}  # fmt: skip


@pytest.fixture
def toy(tmp_path):
    """(the checkpoint's directory, its tensors, the recipe's file)."""
    torch.manual_seed(1)
    shapes = {"tokens.weight": (64, 32), "norm.weight": (32,), "head.weight": (64, 32)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    hub_directory(tmp_path, CONFIG, tensors)
    recipe = tmp_path / "mine.py"
    recipe.write_text(RECIPE + "\n\nRECIPE = recipe\n")
    return tmp_path, tensors, str(recipe)


def there_and_back(toy, tmp_path, layout):
    source, tensors, recipe = toy
    fastckpt.reshard(source, 2, layout=layout, recipe=recipe, out=tmp_path / "out", durable=False)
    got = fastckpt.reshard(fastckpt.open(tmp_path / "out", recipe=recipe), layout="same")[0]
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], x) for name, x in tensors.items())


@pytest.mark.parametrize("layout", ["hf", "vllm", "rtp_llm", "megatron"])
def test_the_family(toy, tmp_path, layout):
    there_and_back(toy, tmp_path, layout)


def test_the_family_refuses(toy):
    source, _, recipe = toy
    for name, change, said in (
        ("n_kv_heads", 3, "4 attention heads do not share 3 kv heads evenly"),
        ("n_layers", 3, r"needs layers\.2\.norm1\.weight, which is not there"),
        ("n_layers", 1, r"no place for layers\.1\."),
        ("d_ff", 50, r"layers\.0\.mlp\.gate\.weight: got shape \(48, 32\), wanted \(50, 32\)"),
    ):
        with pytest.raises(RecipeError, match=said):
            fastckpt.plan(source, 2, recipe=recipe, config=CONFIG | {name: change})
    with pytest.raises(LayoutError, match="number of attention heads 4 does not divide by tp 3"):
        fastckpt.plan(source, 3, recipe=recipe)


@pytest.mark.parametrize("transposed", [True, False])
def test_the_layout(toy, tmp_path, monkeypatch, transposed):
    (tmp_path / "toy.py").write_text(LAYOUT)
    monkeypatch.setattr(layouts, "__path__", [*layouts.__path__, str(tmp_path)])  # as layouts/toy.py
    monkeypatch.setitem(layouts.LAYOUTS, "toy", "toy.Toy")
    there_and_back(toy, tmp_path, layouts.layout("toy", {"transposed": str(transposed).lower()}))
    sys.modules.pop("fastckpt.layouts.toy")
    _, tensors, _ = toy
    for rank in range(2):
        got = load_file(tmp_path / "out" / f"rank-{rank:02d}" / "model.safetensors")
        gate, up = (tensors[f"layers.1.mlp.{n}.weight"].chunk(2)[rank] for n in ("gate", "up"))
        want = torch.cat([gate, up])
        assert torch.equal(got["blocks.1.gate_up.weight"], want.T if transposed else want)
        q, k, v = (tensors[f"layers.0.attn.{n}.weight"].chunk(2)[rank] for n in "qkv")
        want = torch.cat([q, k, v])
        assert torch.equal(got["blocks.0.qkv.weight"], want.T if transposed else want)
