"""DeepSpeed engines: their own files become part of the commit, and are checked before the engine reads them.

This file is also the program that each rank of the real run runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fastckpt
import pytest
import torch
from fastckpt.errors import ManagerError, SourceError, WriteError
from fastckpt.manager.manager import CheckpointManager
from fastckpt.output.manifest import Manifest
from fastckpt.output.writer import Output
from fastckpt.verification.outputs import verify
from safetensors.torch import load_file, save_file

AsRanks = Callable[..., list[Any]]


class Engine:
    """What the manager uses of a DeepSpeed engine; each rank writes a file of its own, rank 0 `latest`."""

    def __init__(self, rank: int, value: int = 0) -> None:
        self.rank, self.value = rank, value

    def zero_optimization_stage(self) -> int:
        return 3

    def save_checkpoint(self, save_dir: str, tag: str, client_state: dict[str, object]) -> bool:
        os.makedirs(os.path.join(save_dir, tag), exist_ok=True)
        said = json.dumps([self.value, client_state])
        Path(save_dir, tag, f"part-{self.rank}.pt").write_text(said)
        if self.rank == 0:
            Path(save_dir, "latest").write_text(tag)
        return True

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, dict[str, object] | None]:
        path = Path(load_dir, tag, f"part-{self.rank}.pt")
        if not path.exists():
            return None, None
        self.value, client_state = json.loads(path.read_text())
        return str(path), client_state


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_an_engine_alone(tmp_path: Path, as_ranks: AsRanks, background: bool) -> None:
    def work(manager: CheckpointManager) -> None:
        engine = Engine(manager.rank, 10 + manager.rank)
        manager.save(4, engine, client_state={"epoch": 2})
        engine.value = -1
        assert manager.restore(template=engine) == {"epoch": 2}
        assert engine.value == 10 + manager.rank

    as_ranks(2, tmp_path, work, async_save=background)
    step = tmp_path / "step-00000004"
    assert verify(step).ok and not verify(step).notes
    files = {n for n in Manifest.read(step).all_files() if n.startswith("engine")}
    assert files == {"engine/latest", "engine/global_step4/part-0.pt", "engine/global_step4/part-1.pt"}
    assert not (step / ".engine").exists()


def test_an_engine_among_others(tmp_path: Path, as_ranks: AsRanks) -> None:
    def work(manager: CheckpointManager) -> None:
        state = {"engine": Engine(manager.rank, 7), "mean": torch.ones(2), "epoch": 3}
        manager.save(1, state, client_state={"hparams": [1]})
        template = {"engine": Engine(manager.rank), "mean": torch.zeros(2), "epoch": 0}
        found = manager.restore(template=template)
        assert found is template and template["epoch"] == 3 and template["client_state"] == {"hparams": [1]}
        assert template["engine"].value == 7 and template["mean"].tolist() == [1.0, 1.0]  # type: ignore[attr-defined]
        plain = manager.restore(names=["mean"])
        assert list(plain) == ["mean"]  # type: ignore[call-overload]
        with pytest.raises(ManagerError, match="an engine on one side only"):
            manager.restore(template={"engine": 5, "mean": torch.zeros(2), "epoch": 0})

    as_ranks(2, tmp_path, work)


def test_an_engine_never_sees_wrong_bytes(tmp_path: Path, as_ranks: AsRanks) -> None:
    as_ranks(2, tmp_path, lambda m: m.save(0, Engine(m.rank, 5)))
    bad = tmp_path / "step-00000000/engine/global_step0/part-1.pt"
    bad.write_text(bad.read_text().replace("5", "6"))

    def work(manager: CheckpointManager) -> int:
        engine = Engine(manager.rank)
        with pytest.raises(SourceError, match=r"part-1\.pt: its bytes differ"):
            manager.restore(0, template=engine)
        return engine.value

    assert as_ranks(2, tmp_path, work) == [0, 0]


def test_an_engine_that_finds_nothing(tmp_path: Path) -> None:
    """More ranks than the engine's files are of, as it sees them."""
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, Engine(0, 5))
        with pytest.raises(ManagerError, match="step-00000000/engine: the engine found nothing to load"):
            manager.restore(template=Engine(1))


def test_an_engine_that_fails(tmp_path: Path, as_ranks: AsRanks) -> None:
    class Broken(Engine):
        def save_checkpoint(self, save_dir: str, tag: str, client_state: dict[str, object]) -> bool:
            super().save_checkpoint(save_dir, tag, client_state)
            if self.rank == 1:
                raise RuntimeError("out of memory")
            return True

    def work(manager: CheckpointManager) -> None:
        manager.save(0, Engine(manager.rank))
        with pytest.raises(ManagerError, match="save of step 1: rank 1: RuntimeError: out of memory"):
            manager.save(1, Broken(manager.rank))

    as_ranks(2, tmp_path, work)
    assert sorted(e for e in os.listdir(tmp_path) if "step" in e) == ["step-00000000"]


def test_an_engine_that_still_writes(
    tmp_path: Path, as_ranks: AsRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that comes when the engine has said that it is done would be missing: no commit."""
    adopt = Output.adopt

    def late(self: Output, path: str, name: str) -> None:
        adopt(self, path, name)
        Path(os.path.dirname(path), "late").write_text("more")

    def work(manager: CheckpointManager) -> None:
        manager.save(1, Engine(manager.rank))
        with monkeypatch.context() as patch:
            patch.setattr(Output, "adopt", late)
            with pytest.raises(WriteError, match="late came after save_checkpoint had returned"):
                manager.save(2, Engine(manager.rank))
        assert manager.steps() == [1]
        manager.save(2, Engine(manager.rank))

    as_ranks(1, tmp_path, work)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step-00000001", "step-00000002"]


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed(tmp_path: Path) -> None:
    """ZeRO-3 on two ranks: saved, trained on, restored, trained on again to the same weights."""
    meet = tmp_path / "meet"
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**env, "WORLD_SIZE": "2", "RANK": str(r), "LOCAL_RANK": str(r), "MEET": str(meet)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]
    said = [r.communicate(timeout=180)[0].decode() for r in ranks]
    assert [r.returncode for r in ranks] == [0, 0], "\n".join(said)
    step = tmp_path / "ck/step-00000003"
    assert verify(step).ok
    found = fastckpt.consolidate(step)
    assert isinstance(found, dict)
    want = load_file(tmp_path / "weights.safetensors")
    assert set(found) == set(want)
    for name, tensor in want.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    with CheckpointManager(tmp_path / "ck", rank=0, world=1) as manager:
        manager.publish(3, layout="same", to=tmp_path / "served", dtype="float32")
    served = load_file(tmp_path / "served/current/model.safetensors")
    for name, tensor in want.items():
        assert torch.equal(served[name].to(tensor.dtype), tensor), name


def rank_of_deepspeed(out: Path) -> None:
    import deepspeed

    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['MEET']}", rank=rank, world_size=2
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # leaves 64 MiB in /dev/shm; gloo does
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def weights() -> dict[str, torch.Tensor]:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {n: p.detach().clone() for n, p in model.named_parameters()}

    def train(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 7, generator=generator).bfloat16()
        engine.backward(engine(x).square().sum())
        engine.step()
        return weights()

    with CheckpointManager(out / "ck") as manager:
        train(1)
        saved = weights()
        manager.save(3, engine, client_state={"epoch": 1, "hparams": {"dim": 7}})
        if rank == 0:
            save_file(saved, out / "weights.safetensors")
        want = train(2)
        train(9)
        assert manager.restore(template=engine)["epoch"] == 1
        again = train(2)
        assert all(torch.equal(want[n], again[n]) for n in want)
        assert not all(torch.equal(want[n], saved[n]) for n in want)
    torch.distributed.destroy_process_group()
    # DeepSpeed still holds its groups, whose threads may abort Python as it ends (test_distributed says why).
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    rank_of_deepspeed(Path(sys.argv[1]))
