"""Processes with torch.distributed (gloo): tensors cut over a mesh, into worlds of other sizes.

This file is also the program that each rank runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fastckpt.errors import ManagerError, SourceError
from fastckpt.manager.coordination import Distributed
from fastckpt.manager.manager import CheckpointManager

SHAPES = {"rows": (7, 5), "columns": (4, 6), "few": (2, 3), "all": (3, 3), "none": (0, 4)}


def whole(name: str, step: int = 0) -> torch.Tensor:
    """The tensor as if it were on one rank."""
    n = torch.Size(SHAPES[name]).numel()
    return (torch.arange(n) + 100 * len(name) + step).reshape(SHAPES[name]).to(torch.bfloat16)


def start(world: int, what: str, root: Path) -> None:
    """Run this file on `world` ranks and wait for all of them."""
    meet = root.parent / f"meet-{what}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"WORLD_SIZE": str(world), "MEET": str(meet)}
    command = [sys.executable, __file__, what, str(root)]
    ranks = [
        subprocess.Popen(
            command, env={**env, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for r in range(world)
    ]
    try:
        said = [r.communicate(timeout=120)[0].decode() for r in ranks]
    finally:
        for r in ranks:
            r.kill()
    assert [r.returncode for r in ranks] == [0] * world, "\n".join(said)


TRAINS = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's FSDP2 does not train on a CPU"
)


@TRAINS
def test_cut_tensors(tmp_path: Path) -> None:
    root = tmp_path / "ck"
    start(2, "save", root)
    with CheckpointManager(root) as manager:  # one rank alone, no mesh: the whole tensors
        found = manager.restore(1)
        assert isinstance(found, dict) and found["step"] == 1
        for name in SHAPES:
            assert torch.equal(found[name], whole(name, 1)) and found[name].dtype == torch.bfloat16
        one = manager.restore(1, names=["rows"])
        assert isinstance(one, dict) and torch.equal(one["rows"], whole("rows", 1))
        model = manager.restore(1, names=["model.0.weight"])
        torch.manual_seed(5)
        want = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
        assert isinstance(model, dict) and torch.equal(model["model.0.weight"], want[0].weight.detach() + 1)
    bad = root / "step-00000001/rank-00001/state.safetensors"
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    with CheckpointManager(root) as manager, pytest.raises(SourceError, match="digest"):
        manager.restore(1)


@TRAINS
@pytest.mark.nightly
def test_into_a_larger_world(tmp_path: Path) -> None:
    start(2, "save", tmp_path / "ck")
    start(3, "other", tmp_path / "ck")


def test_groups_end(tmp_path: Path) -> None:
    """With torch 2.6 the end of a gloo group could wait for ever."""
    start(2, "groups", tmp_path / "none")


def test_a_rank_does_not_come(tmp_path: Path) -> None:
    start(2, "late", tmp_path / "none")


def test_what_is_refused(tmp_path: Path) -> None:
    start(2, "refused", tmp_path / "ck")


# ---- what each rank runs ----


def ranks_refused(root: str) -> None:
    """What are no parts of one tensor, and places that cannot take one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    rank = torch.distributed.get_rank()
    said = f"rank {1 - rank} of None was asked for, torch.distributed says {rank} of 2"
    with pytest.raises(ManagerError, match=said):
        CheckpointManager(root, rank=1 - rank)
    mesh, plain = init_device_mesh("cpu", (2,)), torch.arange(4.0)
    rows = distribute_tensor(plain, mesh, [Shard(0)])
    sums = DTensor.from_local(plain, mesh, [Partial()])
    drifted = DTensor.from_local(plain + rank, mesh, [Replicate()], run_check=False)
    with CheckpointManager(root) as manager:
        for held, said in (
            (sums, "x: placement .* is no plain shard"),
            (drifted, "x is replicated, but ranks 0 and 1 hold different bytes"),
            (
                rows if rank else plain,
                r"x is float32 \(4,\) on rank 0, float32 \(2,\), a part of \(4,\) on rank 1",
            ),
        ):
            with pytest.raises(ManagerError, match=said):
                manager.save(0, {"x": held})
        assert manager.steps() == []
        manager.save(0, {"rows": rows, "own": plain + rank})
        with pytest.raises(ManagerError, match="own is not cut over ranks, the template's is"):
            manager.restore(0, names=["own"], template={"own": rows})
        with pytest.raises(ManagerError, match="rows is cut over a device mesh and the template has none"):
            manager.restore(0, template={"own": torch.zeros(4)})


def ranks_groups(root: str) -> None:
    for k in range(20):
        group = Distributed(60)
        assert group.exchange([group.rank, k]) == [[0, k], [1, k]]
        group.close()


def ranks_late(root: str) -> None:
    missed = Path(f"{root}-missed")
    if torch.distributed.get_rank() == 0:
        with pytest.raises(ManagerError, match="rank 0 of 2: the ranks did not meet"):
            Distributed(1)
        missed.touch()
    end = time.monotonic() + 100  # who leaves before the other has connected breaks torch's own meeting
    while not missed.exists() and time.monotonic() < end:
        time.sleep(0.01)


def ranks_save(root: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    cut = {"rows": [Shard(0)], "columns": [Shard(1)], "few": [Shard(0)], "all": [Replicate()]}
    cut |= {"none": [Shard(1)]}
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    fully_shard(model[0])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    with CheckpointManager(root, async_save=True, max_to_keep=2) as manager:
        for step in range(3):
            with torch.no_grad():
                torch.manual_seed(5)
                fresh = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
                for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
                    p.copy_(distribute_tensor(q.detach() + step, mesh, p.placements))
            state = {n: distribute_tensor(whole(n, step), mesh, cut[n]) for n in SHAPES}
            manager.save(step, {**state, "model": model, "optimizer": optimizer, "step": step})
        moments = [v.to_local().clone() for s in optimizer.state.values() for v in [s["exp_avg"]]]
        weights = [p.to_local().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            for s in optimizer.state.values():
                s["exp_avg"].zero_()
        template = {n: torch.zeros_like(t) for n, t in state.items()}
        held = dict(template)
        manager.restore(template={**template, "model": model, "optimizer": optimizer, "step": 0})
        assert manager.restored == 2
        for n, t in held.items():
            assert torch.equal(t.full_tensor(), whole(n, 2)), n
        assert all(torch.equal(p.to_local(), w) for p, w in zip(model.parameters(), weights, strict=True))
        after = [s["exp_avg"].to_local() for s in optimizer.state.values()]
        assert all(map(torch.equal, after, moments)) and any(m.any() for m in moments)
    ranks_other(root)


def gloo_threads() -> int:
    """Those that a group of torch's keeps: two each."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has just ended
            names.append(path.read_text())
    return names.count("pt_gloo_runloop\n")


def ranks_other(root: str) -> None:
    """Other cuts than those that were saved."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for cut in (
        {"rows": [Shard(0)], "columns": [Shard(0)], "few": [Shard(0)], "all": [Shard(1)]},
        {"rows": [Shard(1)], "columns": [Replicate()], "few": [Shard(1)], "all": [Shard(0)]},
    ):
        cut |= {"none": cut["rows"]}
        template = {
            n: distribute_tensor(torch.zeros(SHAPES[n], dtype=torch.float32), mesh, cut[n]) for n in SHAPES
        }
        before = gloo_threads()
        with CheckpointManager(root) as manager:
            manager.restore(1, names=list(SHAPES), template=template)
        end = time.monotonic() + 60  # a thread that was joined may be listed for a moment
        while gloo_threads() > before and time.monotonic() < end:
            time.sleep(0.01)
        assert gloo_threads() <= before
        for n, t in template.items():
            assert t.dtype == torch.float32 and torch.equal(t.full_tensor(), whole(n, 1).float()), n


if __name__ == "__main__":
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['MEET']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    run = {"save": ranks_save, "other": ranks_other, "groups": ranks_groups, "late": ranks_late}
    run["refused"] = ranks_refused
    run[sys.argv[1]](sys.argv[2])
    torch.distributed.destroy_process_group()
    # destroy_process_group leaves a group alive that torch's own caches hold (DTensor's). A thread of it
    # frees the last collective's tensors, which takes the GIL: Python that ends meanwhile aborts it. All is
    # written.
    sys.stdout.flush()
    os._exit(0)
