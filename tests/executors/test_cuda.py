"""The cuda executor as far as it goes without a GPU: what it says where it cannot run, and its table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from executors.test_copy_rows import buffer, noise, random_row
from fastckpt.dtypes import BY_NAME
from fastckpt.errors import DeviceError
from fastckpt.executors import cuda
from fastckpt.executors.tiles import tile
from fastckpt.executors.torch import Torch

_C = pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

STATE = {"devices": 1, "driver": 13000, "runtime": 13000, "error": 0, "why": ""}


def test_refusals_say_why() -> None:
    assert cuda.refusal(True, STATE, "13.0") is None
    for state, torch_cuda, said in [
        ({"driver": 0, "error": 35, "devices": 0}, "13.0", "no NVIDIA driver"),
        ({"driver": 12080, "error": 35, "devices": 0}, "13.0", "runs CUDA 12.8, this build needs 13.0"),
        ({"error": 100, "devices": 0, "why": "no CUDA-capable device"}, "13.0", "no CUDA-capable device"),
        ({"devices": 0}, "13.0", "the driver finds none"),
        ({"error": 3, "devices": 0, "why": "initialization error"}, "13.0", "forked"),
        ({}, None, "is built for the CPU only"),
    ]:
        why = cuda.refusal(True, {**STATE, **state}, torch_cuda)
        assert why is not None and said in why
    assert "FASTCKPT_CUDA=1" in (cuda.refusal(False, STATE, "13.0") or "")


def test_devices_that_are_none() -> None:
    with pytest.raises(DeviceError, match="wanted cpu, cuda or cuda:N"):
        cuda.usable("meta")
    with pytest.raises(DeviceError, match="device 'gpu'"):
        cuda.usable("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="device 'cuda'"):
            cuda.Cuda()


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_a_driver_that_is_too_old_for_torch_alone(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """torch brings a CUDA of its own, which may want a newer driver than ours."""

    def init() -> None:
        raise error("The NVIDIA driver on your system is too old\nand more")

    monkeypatch.setattr(_C, "built_with_cuda", True)
    monkeypatch.setattr(_C, "device_state", lambda: STATE, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(DeviceError, match=r"^device 'cuda': torch .* cannot use it: The NVIDIA .* too old$"):
        cuda.usable("cuda")


def test_the_table_runs_from_where_its_parts_lie() -> None:
    """What is brought to the GPU as one run of bytes, run on the host from those bytes."""
    rng = np.random.default_rng(21)
    f32, bf16 = BY_NAME["float32"], BY_NAME["bfloat16"]
    r, n, m = random_row(rng, f32, bf16, 5000)
    source, got = noise(rng, n), noise(rng, m + 64)
    wanted = got.copy()
    Torch().bind([buffer(source)]).run(r, [buffer(wanted)])
    made = tile(r, cuda.addresses([buffer(source)]), cuda.addresses([buffer(got)]))
    data, parts = cuda.packed(made)
    columns = (made.rows.nbytes, made.owner.nbytes, made.sources.nbytes, made.destinations.nbytes)
    assert all(p % 16 == 0 for p in parts)
    _C.run_tiles_on_host(*(data[p : p + size] for p, size in zip(parts, columns, strict=True)), 1)
    assert np.array_equal(got, wanted)
