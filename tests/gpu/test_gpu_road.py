"""Checkpoints to GPU tensors: from GPU memory, from files, into the caller's tensors and modules."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastckpt
import pytest
import torch
from fastckpt.dtypes import BY_NAME
from fastckpt.errors import DeviceError, WriteError
from fastckpt.layouts.same import Same
from fastckpt.running import gpu_transfer
from fastckpt.running.gpu_sinks import digests
from safetensors.torch import load_file, save_file

PLAN = {"*.up": "colwise", "*.down": "rowwise", "*": "replicate"}


def state(device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for i in range(2):
        made[f"{i}.up"] = torch.randn(1024, 768, generator=generator)
        made[f"{i}.down"] = torch.randn(768, 1024, generator=generator)
        made[f"{i}.turned"] = torch.randn(300, 512, generator=generator).t()
        made[f"{i}.norm"] = torch.randn(769, generator=generator)
    made["large"] = torch.randn(3_000_001, generator=generator)
    made["count"] = torch.arange(9)
    return {name: t.to(device) for name, t in made.items()}


def compare(got: object, wanted: object) -> None:
    assert isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert a[name].device.type == "cuda"
            assert torch.equal(a[name].cpu().view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_from_gpu_to_gpu(dtype: str | None) -> None:
    got = fastckpt.reshard(state("cuda"), 4, layout="hf", tp_plan=PLAN, dtype=dtype, device="cuda")
    compare(got, fastckpt.reshard(state(), 4, layout="hf", tp_plan=PLAN, dtype=dtype))


def test_from_files_to_gpu(tmp_path: Path) -> None:
    held = {n: t.contiguous() for n, t in state().items()}
    save_file(held, tmp_path / "model.safetensors")
    options = {"layout": "hf", "tp_plan": PLAN, "dtype": "bfloat16", "threads": 3}
    got = fastckpt.reshard(tmp_path, 4, device="cuda", **options)
    compare(got, fastckpt.reshard(tmp_path, 4, **options))


@pytest.mark.parametrize(
    "within", [torch.inference_mode, lambda: torch.device("cuda")], ids=["inference", "cuda"]
)
@pytest.mark.parametrize("way", ["cpu", "gpu", None])
def test_within_what_servers_set(
    tmp_path: Path, way: str | None, within: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither torch's default device nor inference mode is known in threads of ours."""
    held, there = state(), state("cuda")
    save_file({n: t.contiguous() for n, t in held.items()}, tmp_path / "model.safetensors")
    options = {"layout": "hf", "tp_plan": PLAN, "dtype": "bfloat16", "threads": 2}
    if way is not None:
        monkeypatch.setenv("FASTCKPT_CAST", way)
    monkeypatch.setattr(gpu_transfer, "LEAST", 1)
    monkeypatch.setattr(gpu_transfer, "SIDE", 512)
    gpu_transfer.faster.cache_clear()
    with within():
        got = fastckpt.reshard(tmp_path, 4, device="cuda", **options)
        fastckpt.reshard(there, 4, out=tmp_path / "out", **options)
        brought = fastckpt.reshard(there, 4, **options)
        assert fastckpt.verify_tensors(got[1], tmp_path / "out", rank=1).ok
    wanted = fastckpt.reshard(held, 4, **options)
    compare(got, wanted)
    for a, b in zip(brought, wanted, strict=True):
        assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in b)
    fastckpt.reshard(tmp_path, 4, device="cuda", out=got, **options)  # tensors made in inference mode
    compare(got, wanted)


def test_a_hot_reload_fills_the_same_tensors_again() -> None:
    source = state("cuda")
    ready = fastckpt.prepare(source, 4, rank=3, layout="hf", tp_plan=PLAN, dtype="bfloat16")
    for seed in range(2):
        torch.manual_seed(seed)
        for t in source.values():
            if t.is_floating_point():
                t.normal_()
        ready.run()
        fresh = {n: t.cpu() for n, t in source.items()}
        wanted = fastckpt.reshard(fresh, 4, rank=3, layout="hf", tp_plan=PLAN, dtype="bfloat16")
        compare(list(ready.out), [wanted])


def test_a_thread_that_has_another_gpu(tmp_path: Path) -> None:
    """Each thread has a current GPU of its own, at the start the first; what is asked for is the last."""
    held, there = state(), state("cuda")
    where = str(there["large"].device)
    save_file({n: t.contiguous() for n, t in held.items()}, tmp_path / "model.safetensors")
    options = {"layout": "hf", "tp_plan": PLAN, "dtype": "bfloat16", "threads": 2}
    ready = fastckpt.prepare(there, 4, rank=1, layout="hf", tp_plan=PLAN, dtype="bfloat16")
    made: dict[str, Any] = {}

    def work() -> None:
        ready.run()
        made["there"] = fastckpt.reshard(there, 4, device=where, **options)
        made["files"] = fastckpt.reshard(tmp_path, 4, device=where, **options)
        fastckpt.reshard(there, 4, out=tmp_path / "out", **options)
        made["same"] = fastckpt.verify_tensors(ready.out[0], tmp_path / "out", rank=1).ok
        torch.cuda.synchronize(where)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
    wanted = fastckpt.reshard(held, 4, **options)
    assert made["same"]
    compare(list(ready.out), wanted[1:2])
    compare(made["there"], wanted)
    compare(made["files"], wanted)


def test_nothing_is_made_ready_in_a_capture(tmp_path: Path) -> None:
    """Copies would be captured instead of made, and the tensors given back empty."""
    held, there = {"w": torch.randn(300, 200)}, torch.zeros(300, 200, device="cuda")
    save_file(held, tmp_path / "model.safetensors")
    out, graph = {"w": there.clone()}, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for source in (tmp_path, {"w": there}):
            with pytest.raises(DeviceError, match=r"a CUDA graph is being captured; call fastckpt\.prepare"):
                fastckpt.reshard(source, rank=0, layout=Same(), device="cuda", out=out)
    fastckpt.reshard(tmp_path, rank=0, layout=Same(), device="cuda", out=out)
    assert torch.equal(out["w"].cpu(), held["w"])


def test_the_callers_tensors() -> None:
    source = {n: t.contiguous() for n, t in state("cuda").items()}
    out = {n: torch.full(t.shape, 3, dtype=t.dtype, device="cuda") for n, t in source.items()}
    at = {n: t.data_ptr() for n, t in out.items()}
    report = fastckpt.reshard(source, rank=0, layout=Same(), device="cuda", out=out)
    assert isinstance(report, fastckpt.Report) and at == {n: t.data_ptr() for n, t in out.items()}
    for name, t in source.items():
        assert torch.equal(out[name], t), name
    with pytest.raises(DeviceError, match=rf"is on cpu, wanted {out['large'].device}"):
        fastckpt.reshard(
            source, rank=0, layout=Same(), device="cuda", out={n: t.cpu() for n, t in out.items()}
        )
    with pytest.raises(fastckpt.LayoutError, match="same memory"):
        fastckpt.reshard(source, rank=0, layout=Same(), device="cuda", out=source)


def test_a_module_on_the_gpu(tmp_path: Path) -> None:
    weights = {"0.weight": torch.randn(500, 300), "1.weight": torch.randn(200, 500)}
    save_file(weights, tmp_path / "model.safetensors")
    module = torch.nn.Sequential(
        torch.nn.Linear(300, 500, bias=False, device="cuda", dtype=torch.bfloat16),
        torch.nn.Linear(500, 200, bias=False, device="meta", dtype=torch.bfloat16),
    )
    fastckpt.load_into(module, tmp_path)
    for i in range(2):
        assert module[i].weight.device.type == "cuda"
        assert torch.equal(module[i].weight.cpu(), weights[f"{i}.weight"].to(torch.bfloat16))


def test_too_large_an_output_says_how_much_it_needs() -> None:
    source = {"w": torch.zeros(1, 1, device="cuda").expand(1 << 21, 1 << 21)}
    with pytest.raises(DeviceError, match=f"the outputs need {4 << 42} bytes"):
        fastckpt.reshard(source, layout=Same(), device="cuda")


def test_digests_are_those_of_the_manifest(tmp_path: Path) -> None:
    made = {n: t.contiguous() for n, t in state("cuda").items()} | {"empty": torch.empty(0, device="cuda")}
    report = fastckpt.reshard({n: t.cpu() for n, t in made.items()}, layout=Same(), out=tmp_path / "out")
    assert isinstance(report, fastckpt.Report)
    assert digests(made) == dict(report.digests)
    made["norm"] = torch.randn((8 << 20) + 5, device="cuda")[1:]  # at an odd address
    wanted = fastckpt.reshard({"norm": made["norm"].cpu()}, layout=Same(), out=tmp_path / "odd")
    assert isinstance(wanted, fastckpt.Report) and digests({"norm": made["norm"]}) == dict(wanted.digests)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each pinned tensor that is made."""
    real, found = torch.empty, []

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        found.extend(shape if pin_memory else ())
        return real(*shape, pin_memory=pin_memory, **options)

    monkeypatch.setattr(torch, "empty", empty)
    return found


def test_a_small_plan_pins_no_more_than_it_uses(pinned: list[int]) -> None:
    """However many cores the machine has."""
    got = fastckpt.reshard({"w": torch.arange(10)}, rank=0, layout="same", device="cuda", threads=64)
    assert len(pinned) == 1 and torch.equal(got["w"].cpu(), torch.arange(10))


@pytest.mark.parametrize(("memory", "sent"), [(None, gpu_transfer.SENT), (96 << 20, 1 << 20)])
def test_many_threads_send_as_much_at_once(memory: int | None, sent: int, pinned: list[int]) -> None:
    """Python starts one batch at a time, however many workers wait for theirs."""
    held = {"w": torch.randn(6 << 20)}
    options = {"rank": 0, "layout": "same", "dtype": "bfloat16", "threads": 64, "memory": memory}
    got = fastckpt.reshard(held, device="cuda", **options)
    assert set(pinned) == {sent}
    compare([got], [fastckpt.reshard(held, **options)])


def test_a_large_machine_pins_no_more_than_a_bus_takes(
    pinned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_transfer, "SENT", 1 << 20)
    monkeypatch.setitem(gpu_transfer.MOST_WORKERS, "cpu", 2)
    held = {"w": torch.randn(6 << 20)}
    options = {"rank": 0, "layout": "same", "dtype": "bfloat16", "threads": 64}
    got = fastckpt.reshard(held, device="cuda", **options)
    assert pinned == [1 << 20] * len(pinned) and len(pinned) <= 2 * 2
    compare([got], [fastckpt.reshard(held, **options)])


@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_from_files_either_way(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_CAST", way)
    held = state()
    held["wide"] = torch.randn(3000, 1500)
    held["narrow"] = torch.randn(700, 33).to(torch.float16)
    torch.save(held, tmp_path / "pytorch_model.bin")  # transposed as they are
    options = {"layout": "hf", "tp_plan": PLAN, "dtype": "bfloat16", "threads": 3}
    for source in (tmp_path, held):
        got = fastckpt.reshard(source, 4, device="cuda", **options)
        compare(got, fastckpt.reshard(source, 4, **options))


def test_the_faster_way_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_transfer, "LEAST", 1)
    monkeypatch.setattr(gpu_transfer, "SIDE", 512)
    gpu_transfer.faster.cache_clear()
    held = {"w": torch.randn(1024, 768), "norm": torch.randn(5)}
    for _ in range(2):
        got = fastckpt.reshard(held, rank=0, layout="same", dtype="bfloat16", device="cuda", threads=2)
        compare([got], [fastckpt.reshard(held, rank=0, layout="same", dtype="bfloat16")])
    assert gpu_transfer.faster.cache_info().misses == 1
    for turned in (False, True):
        way = gpu_transfer.faster(str(got["w"].device), BY_NAME["float16"], BY_NAME["float32"], turned, 2)
        assert way in gpu_transfer.WAYS
    gpu_transfer.faster.cache_clear()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), DeviceError("full")])
def test_a_gpu_without_room_to_measure_in(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs may fill it; the CPU casts then."""

    def timed(*arguments: object) -> float:
        raise error

    monkeypatch.setattr(gpu_transfer, "LEAST", 1)
    monkeypatch.setattr(gpu_transfer, "_time", timed)
    gpu_transfer.faster.cache_clear()
    held = {"w": torch.randn(300, 200)}
    options = {"rank": 0, "layout": "same", "dtype": "bfloat16"}
    compare([fastckpt.reshard(held, device="cuda", **options)], [fastckpt.reshard(held, **options)])


def test_an_error_on_the_way_is_raised_and_nothing_travels_on(tmp_path: Path) -> None:
    save_file({"w": torch.randn(3_000_000), "x": torch.randn(9)}, tmp_path / "model.safetensors")
    opened = fastckpt.open(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.truncate(8_000_000)
    for _ in range(3):
        with pytest.raises(fastckpt.SourceError):
            fastckpt.reshard(opened, rank=0, layout="same", dtype="bfloat16", device="cuda", threads=2)
    torch.cuda.synchronize()


@pytest.mark.parametrize("quant", [None, "fp8-block", "int8"])
def test_from_the_gpu_to_files(tmp_path: Path, quant: str | None) -> None:
    """The files of the CPU's road on the same weights, byte for byte, and to tensors in main memory."""
    held = state() | {"a.q_proj.weight": torch.randn(1152, 640)}
    there = {n: t.to("cuda") for n, t in held.items()}
    options = {"layout": "hf", "tp_plan": PLAN, "dtype": "bfloat16", "quant": quant}
    reports = [
        fastckpt.reshard(source, 4, out=tmp_path / name, threads=3, **options)
        for name, source in (("there", there), ("here", held))
    ]
    assert reports[0].digests == reports[1].digests and reports[0].bytes_read > 0
    assert fastckpt.verify(tmp_path / "there").ok
    files = sorted(p.name for p in (tmp_path / "here").iterdir() if p.suffix == ".safetensors")
    for name in files:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    got, wanted = (fastckpt.reshard(s, 4, threads=2, **options) for s in (there, held))
    for a, b in zip(got, wanted, strict=True):
        assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in b)
        assert all(t.device.type == "cpu" for t in a.values())


def test_sources_that_were_just_written(tmp_path: Path) -> None:
    """Files are made after what the current stream still does to the sources."""
    source = {"w": torch.zeros(2_000_000, device="cuda")}
    torch.cuda._sleep(100_000_000)
    source["w"].copy_(torch.arange(2_000_000, dtype=torch.float32, device="cuda"))
    fastckpt.reshard(source, layout="same", out=tmp_path / "out")
    (got,) = (load_file(p)["w"] for p in (tmp_path / "out").glob("*.safetensors"))
    assert torch.equal(got, torch.arange(2_000_000, dtype=torch.float32))


def test_the_bytes_on_the_gpu_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    held = {n: t.contiguous() for n, t in state().items()}
    save_file(held, tmp_path / "model.safetensors")
    options = {"layout": "hf", "tp_plan": PLAN}
    made = fastckpt.reshard(tmp_path, 4, rank=2, dtype="bfloat16", device="cuda", **options)
    fastckpt.reshard(tmp_path, 4, dtype="bfloat16", out=tmp_path / "out", **options)
    assert fastckpt.verify_tensors(made, tmp_path, 4, 2, **options).ok
    assert fastckpt.verify_tensors(made, tmp_path / "out", rank=2).ok
    made["1.down"].view(torch.int16)[100, 3] ^= 64
    for found in (
        fastckpt.verify_tensors(made, tmp_path, 4, 2, **options),
        fastckpt.verify_tensors(made, tmp_path / "out", rank=2),
    ):
        assert found.problems == ("1.down: its bytes differ from the checkpoint's",)


def test_ranks_of_files_are_of_one_step(tmp_path: Path) -> None:
    """What lies on the GPU has the key of what lies in main memory, and another step's has another."""
    held, out = state("cuda"), tmp_path / "out"
    for rank in (0, 1):
        fastckpt.reshard(held, 2, rank=rank, tp_plan=PLAN, out=out, durable=False)
    host = fastckpt.reshard(state(), 2, rank=1, tp_plan=PLAN, out=out, durable=False)
    assert fastckpt.verify(out).ok and host.ranks == (1,)
    held["0.up"].add_(1)
    with pytest.raises(WriteError, match="is of another plan"):
        fastckpt.reshard(held, 2, rank=1, tp_plan=PLAN, out=out, durable=False)
