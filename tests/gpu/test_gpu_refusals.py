"""What is refused on the roads to and from a GPU: memory that is too short, and what lies elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fastckpt
import peft_writer
import pytest
import torch
from fastckpt import _C
from fastckpt.errors import DeviceError
from fastckpt.executors.cuda import Cuda
from fastckpt.extents import Buffer

MATRIX = "a.q_proj.weight"


def held(device: str = "cpu") -> dict[str, torch.Tensor]:
    return {MATRIX: torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(device)}


def reshard(source: dict[str, torch.Tensor], **options: object) -> object:
    return fastckpt.reshard(source, rank=0, layout="same", **options)  # type: ignore[call-overload]


def to_main_memory() -> None:
    reshard(held("cuda"), dtype="bfloat16")


def to_the_gpu() -> None:
    reshard(held(), dtype="bfloat16", device="cuda")


def quantised() -> None:
    reshard({MATRIX: held("cuda")[MATRIX].t()}, quant="int8", device="cuda")


def copied() -> None:
    reshard(held("cuda"), dtype="bfloat16", device="cuda")


def beside_main_memory() -> None:
    reshard(held("cuda") | {"here": torch.randn(300)}, device="cuda")


def short(name: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no tensor of that dtype be made on the GPU by `torch.NAME`, nor brought there by `Tensor.to`."""
    owner = torch.Tensor if name == "to" else torch
    real = getattr(owner, name)

    def full(*args: object, **kwargs: object) -> object:
        given = [kwargs.get("device"), *args[1:]]
        there = any(x is not None and str(x).startswith("cuda") for x in given)
        kind = args[0].dtype if isinstance(args[0], torch.Tensor) else kwargs.get("dtype")
        size = args[0].numel() if isinstance(args[0], torch.Tensor) else args[0][0]  # type: ignore[index]
        if there and kind is dtype and size:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)


@pytest.mark.parametrize(
    ("road", "name", "dtype", "what"),
    [
        (to_main_memory, "empty", torch.uint8, "a batch on its way to main memory need"),
        (to_the_gpu, "empty", torch.uint8, "a batch on its way there need"),
        (quantised, "empty", torch.uint8, "dense rows to quantise need"),
        (quantised, "empty", torch.int32, "the table of matrices need"),
        (copied, "to", torch.uint8, "the table of copies need"),
        (beside_main_memory, "to", torch.uint8, "sources in main memory need 1200 bytes"),
    ],
)
def test_memory_that_is_too_short(
    road: Callable[[], None], name: str, dtype: torch.dtype, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCKPT_CAST", "gpu")
    road()  # with room it goes
    short(name, dtype, monkeypatch)
    with pytest.raises(DeviceError, match=rf"^cuda:\d: out of memory: {what}.* are free and torch holds \d"):
        road()
    torch.cuda.synchronize()


def test_a_way_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_CAST", "tpu")
    with pytest.raises(DeviceError, match="FASTCKPT_CAST: got 'tpu', wanted one of cpu, gpu"):
        to_the_gpu()


def test_sources_on_a_gpu_and_in_files(tmp_path: Path) -> None:
    """An adapter that adds to nothing and replaces a tensor: nothing is computed on the way."""
    base = held("cuda") | {"norm.weight": torch.ones(300, device="cuda")}
    adapter = peft_writer.write(
        tmp_path / "adapter", peft_writer.settings(), {}, {"norm.weight": torch.zeros(300)}
    )
    with pytest.raises(DeviceError, match="some sources are in GPU memory, others in files; bring them tog"):
        reshard(base, adapter=adapter)


def test_sources_on_another_gpu() -> None:
    cuda = Cuda()
    with pytest.raises(DeviceError, match=f"wanted sources on {cuda.device}, got one on cuda:7"):
        cuda.bind([Buffer(None, 0, 4, "cuda:7")])


def test_a_launch_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*numbers: int) -> None:
        raise RuntimeError("invalid argument (1)")

    monkeypatch.setattr(_C, "launch_tiles", launch)
    with pytest.raises(DeviceError, match=r"^executor cuda: invalid argument \(1\)$"):
        copied()
