"""Training states in GPU memory: saved from there, through pinned memory, and restored to where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastckpt.manager.manager import CheckpointManager


def state(seed: int) -> dict[str, Any]:
    """A model on the GPU with its optimizer after a step, a strided tensor, a tensor of the host."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128, device="cuda"),
        torch.nn.LayerNorm(128, device="cuda"),
        torch.nn.Linear(128, 8, device="cuda"),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 64, device="cuda")).square().sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "ema": {n: p.detach().bfloat16() for n, p in model.named_parameters()},
        "turned": torch.randn(33, 20, device="cuda").t(),
        "large": torch.randn(3_000_001, device="cuda"),
        "host": torch.arange(9),
        "step": seed,
    }


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a state by a name of its own."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if isinstance(value, dict):
        return {n: t for k, v in value.items() for n, t in tensors(v, f"{name}/{k}").items()}
    if isinstance(value, list):
        return {n: t for k, v in enumerate(value) for n, t in tensors(v, f"{name}/{k}").items()}
    return {}


def compare(got: object, wanted: dict[str, torch.Tensor], device: str | None = None) -> None:
    found = tensors(got)
    assert list(found) == list(wanted) and len(wanted) > 20
    for name, t in wanted.items():
        assert found[name].device.type == (device or t.device.type) and found[name].dtype == t.dtype, name
        raw = [x.cpu().contiguous().view(-1).view(torch.uint8) for x in (found[name], t)]
        assert torch.equal(*raw), name


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_there_and_back(tmp_path: Path, background: bool) -> None:
    saved = state(1)
    with CheckpointManager(tmp_path / "ck", async_save=background) as manager:
        manager.save(1, saved)
    template = state(2)
    with CheckpointManager(tmp_path / "ck") as manager:
        restored = manager.restore(template=template)
        assert isinstance(restored, dict) and restored["step"] == 1
        compare(template, tensors(saved))
        compare(manager.restore(), tensors(saved), device="cpu")  # no template: in host memory


def test_async_takes_what_was_there_at_the_call(tmp_path: Path) -> None:
    """The copy to pinned memory is over when `save` returns: what the GPU does next is not in the commit."""
    x = torch.zeros(16 << 20, device="cuda")
    with CheckpointManager(tmp_path / "ck", async_save=True) as manager:
        for step in range(4):
            x.fill_(step)
            manager.save(step, {"x": x})
            x.fill_(-1)
        manager.wait()
        for step in range(4):
            found = manager.restore(step)
            assert isinstance(found, dict) and torch.equal(found["x"], torch.full((16 << 20,), float(step)))


def test_only_some_names_into_tensors_of_the_gpu(tmp_path: Path) -> None:
    saved = state(1)
    with CheckpointManager(tmp_path / "ck") as manager:
        manager.save(1, saved)
        into = {
            "large": torch.zeros_like(saved["large"]),
            "model.0.bias": torch.zeros(128, device="cuda").half(),
        }
        found = manager.restore(names=list(into), template=into)
        assert isinstance(found, dict) and list(found) == list(into)
        assert torch.equal(into["large"], saved["large"])
        assert torch.equal(into["model.0.bias"], saved["model"][0].bias.half())  # the template's dtype
        assert all(t.device.type == "cuda" for t in found.values())


def test_what_is_trained_on_is_the_same(tmp_path: Path) -> None:
    """A run that goes on from a restore takes the same steps."""

    def steps(held: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(3):
            held["optimizer"].zero_grad()
            held["model"](torch.randn(4, 64, device="cuda")).square().sum().backward()
            held["optimizer"].step()

    one, other = state(1), state(2)
    with CheckpointManager(tmp_path / "ck") as manager:
        manager.save(1, {"model": one["model"], "optimizer": one["optimizer"]})
        manager.restore(template={"model": other["model"], "optimizer": other["optimizer"]})
    steps(one, 7)
    steps(other, 7)
    compare([other["model"], other["optimizer"]], tensors([one["model"], one["optimizer"]]))
