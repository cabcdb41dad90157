"""Versions for the servers: what the road gives, one link that moves in one step, and a way back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastckpt
import pytest
import torch
from fastckpt.errors import FastckptError, LayoutError, ManagerError, SourceError
from fastckpt.manager import publishing
from fastckpt.manager.manager import CheckpointManager
from fastckpt.verification.outputs import verify
from safetensors.torch import load_file

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    "max_position_embeddings": 64,
}  # fmt: skip


def llama(seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a tiny Llama."""
    torch.manual_seed(seed)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (64, 32),
        f"{layer}self_attn.q_proj.weight": (32, 32),
        f"{layer}self_attn.k_proj.weight": (16, 32),
        f"{layer}self_attn.v_proj.weight": (16, 32),
        f"{layer}self_attn.o_proj.weight": (32, 32),
        f"{layer}mlp.gate_proj.weight": (48, 32),
        f"{layer}mlp.up_proj.weight": (48, 32),
        f"{layer}mlp.down_proj.weight": (32, 48),
        f"{layer}input_layernorm.weight": (32,),
        f"{layer}post_attention_layernorm.weight": (32,),
        "model.norm.weight": (32,),
        "lm_head.weight": (64, 32),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_what_the_road_gives(tmp_path: Path, as_ranks: Callable[..., list[Any]]) -> None:
    """Of two training ranks with the same model and other things, two serving ranks."""
    weights = llama(1)

    def work(manager: CheckpointManager) -> object:
        state = {"net": weights, "optimizer": [t * 2 for t in weights.values()], "rank": manager.rank}
        manager.save(5, state)
        return manager.publish(
            5, 2, "vllm", to=tmp_path / "served", part="net", config=CONFIG, dtype="bfloat16"
        )

    report, none = as_ranks(2, tmp_path / "ck", work)
    assert none is None and report.ranks == (0, 1)
    want = fastckpt.reshard(weights, tp=2, layout="vllm", config=CONFIG, dtype="bfloat16")
    assert isinstance(want, list)
    for rank, shard in enumerate(want):
        found = load_file(tmp_path / f"served/current/model-rank-{rank}-part-0.safetensors")
        assert set(found) == set(shard) and all(torch.equal(found[n], t) for n, t in shard.items())
    assert verify(tmp_path / "served/current").ok
    assert os.readlink(tmp_path / "served/current") == "step-00000005"


def test_every_argument_of_reshard(tmp_path: Path) -> None:
    """What `reshard` does with the same arguments, file for file: quantised, on a grid, by a user's plan."""
    weights = llama(3)
    plans = {"model.*.q_proj.weight": "colwise", "model.*.o_proj.weight": "rowwise", "*": "replicate"}
    ways: dict[str, dict[str, Any]] = {
        "int8": {"quant": "int8", "dtype": "bfloat16", "config": CONFIG, "layout": "vllm", "tp": 2},
        "pp": {"placement": fastckpt.Placement(tp=2, pp=1), "config": CONFIG, "vocab_size": 60},
        "plan": {"tp_plan": plans, "tp": 2, "max_shard_size": 2000},
    }
    with CheckpointManager(tmp_path / "ck") as manager:
        manager.save(0, {"net": weights})
        for name, way in ways.items():
            report = manager.publish(0, to=tmp_path / name, part="net", **way)
            fastckpt.reshard(weights, out=tmp_path / f"{name}-want", **way)
            found, want = (
                {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
                for root in (tmp_path / f"{name}/step-00000000", tmp_path / f"{name}-want")
            )
            assert report is not None and verify(tmp_path / name / "current").ok
            del found["fastckpt.json"], want["fastckpt.json"]  # their sources differ
            assert len(want) > 1 and found == want
            assert manager.publish(0, to=tmp_path / name, part="net", **way) is None
        with pytest.raises(ManagerError, match="or made otherwise"):
            manager.publish(0, to=tmp_path / "int8", part="net", **{**ways["int8"], "quant": None})
        manager.save(1, {"net": {"w": torch.tensor([1.0, float("nan")])}})
        with pytest.raises(SourceError, match="NaN"):
            manager.publish(1, to=tmp_path / "nan", layout="same", part="net")
        manager.publish(1, to=tmp_path / "nan", layout="same", part="net", allow_nonfinite=True)
        assert publishing.current(tmp_path / "nan") == "step-00000001"


def test_versions_and_the_way_back(tmp_path: Path) -> None:
    to = tmp_path / "served"
    assert publishing.versions(to) == [] and publishing.current(to) is None
    with CheckpointManager(tmp_path / "ck") as manager:
        for step in range(4):
            manager.save(step, torch.nn.Linear(2, step + 1))
            manager.publish(step, layout="same", to=to)
            assert publishing.current(to) == f"step-0000000{step}"
        publishing.point(to, "step-00000001")
        assert load_file(to / "current/model.safetensors")["weight"].shape == (2, 2)
        assert manager.publish(2, layout="same", to=to) is None  # there already: only the link moves
        assert publishing.current(to) == "step-00000002"
        publishing.point(to, "step-00000000")
        (to / ".trash-step-00000009-0123abcd/half").mkdir(parents=True)  # a run was killed while it removed
        shutil.copytree(to / "step-00000000", to / "another")  # somebody's output
        assert publishing.gc(to, 2) == ["step-00000001"]  # not the current one
        assert publishing.versions(to) == ["step-00000000", "step-00000002", "step-00000003"]
        manager.publish(1, layout="same", to=to, keep=1)
        assert publishing.versions(to) == ["step-00000001"]
        with pytest.raises(ManagerError, match="no whole version 'step-00000009'; there are step-00000001"):
            publishing.point(to, "step-00000009")
        with pytest.raises(ManagerError, match="no plain name"):
            publishing.point(to, "../ck")
    assert sorted(os.listdir(to)) == ["another", "current", "step-00000001"]


def test_keeping_no_version_is_refused_before_one_is_made(tmp_path: Path) -> None:
    to = tmp_path / "served"
    with CheckpointManager(tmp_path / "ck") as manager:
        for step in range(2):
            manager.save(step, torch.nn.Linear(2, 2))
        manager.publish(0, layout="same", to=to)
        for keep, said in ((0, "keep: wanted at least 1, got 0"), ("2", "keep: wanted int, got str '2'")):
            with pytest.raises(FastckptError, match=said):
                manager.publish(1, layout="same", to=to, keep=keep)  # type: ignore[arg-type]
            with pytest.raises(FastckptError, match=said):
                publishing.gc(to, keep)  # type: ignore[arg-type]
    assert publishing.versions(to) == ["step-00000000"] and publishing.current(to) == "step-00000000"


def test_versions_are_no_commits(tmp_path: Path) -> None:
    """A manager that is pointed at the versions neither restores nor removes them, though they are named as
    steps are."""
    with CheckpointManager(tmp_path / "ck") as manager:
        for step in range(3):
            manager.save(step, torch.nn.Linear(2, 2))
            manager.publish(step, layout="same", to=tmp_path / "served")
    with CheckpointManager(tmp_path / "served", max_to_keep=1) as manager:
        assert manager.steps() == [] and manager.latest() is None
        manager.save(7, {})
        assert manager.steps() == [7]
    assert publishing.versions(tmp_path / "served")[:3] == [f"step-0000000{step}" for step in range(3)]


def test_a_version_that_lost_a_file_is_not_made_current(tmp_path: Path) -> None:
    to = tmp_path / "served"
    with CheckpointManager(tmp_path / "ck") as manager:
        for step in range(2):
            manager.save(step, torch.nn.Linear(2, 2))
            manager.publish(step, layout="same", to=to)
        (to / "step-00000000/model.safetensors").unlink()
        for way in (
            lambda: publishing.point(to, "step-00000000"),
            lambda: manager.publish(0, layout="same", to=to),
        ):
            with pytest.raises(ManagerError, match=r"is no longer whole: model.safetensors: No such file"):
                way()
        assert publishing.current(to) == "step-00000001"


def test_a_version_of_something_else(tmp_path: Path) -> None:
    to = tmp_path / "served"
    for seed in range(2):
        with CheckpointManager(tmp_path / f"ck{seed}") as manager:
            torch.manual_seed(seed)
            manager.save(0, torch.nn.Linear(2, 2))
            if seed == 0:
                manager.publish(0, layout="same", to=to)
                continue
            with pytest.raises(ManagerError, match="is there already, of another save"):
                manager.publish(0, layout="same", to=to)
    assert publishing.current(to) == "step-00000000"


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"layout": "hf"}, {"tp": 2}])
def test_a_version_made_otherwise(tmp_path: Path, other: dict[str, str | int]) -> None:
    """Servers that asked for bf16 are not pointed at fp32."""
    to = tmp_path / "served"
    with CheckpointManager(tmp_path / "ck") as manager:
        manager.save(0, llama(0))
        made = {"tp": 1, "layout": "vllm", "config": CONFIG, "to": to}
        manager.publish(0, **made)
        assert manager.publish(0, **made) is None
        with pytest.raises(ManagerError, match="is there already, of another save or made otherwise"):
            manager.publish(0, **{**made, **other})


def test_failures_leave_the_link(tmp_path: Path) -> None:
    to = tmp_path / "served"
    with CheckpointManager(tmp_path / "ck") as manager:
        for step in range(2):
            manager.save(step, {"net": llama(step)})
        manager.publish(0, 2, to=to, part="net", config=CONFIG)
        with pytest.raises(LayoutError, match="attention heads 4 does not divide by tp 8"):
            manager.publish(1, 8, to=to, part="net", config=CONFIG)
        bad = tmp_path / "ck/step-00000001/rank-00000/state.safetensors"
        data = bytearray(bad.read_bytes())
        data[-1] ^= 1
        bad.write_bytes(data)
        with pytest.raises(SourceError, match="digest"):
            manager.publish(1, 2, to=to, part="net", config=CONFIG)
    assert publishing.current(to) == "step-00000000" and publishing.versions(to) == ["step-00000000"]


def test_which_part_is_the_model(tmp_path: Path, as_ranks: Callable[..., list[Any]]) -> None:
    def module() -> torch.nn.Module:
        return torch.nn.Linear(2, 2)

    with CheckpointManager(tmp_path / "a") as manager:
        manager.save(0, {"student": module(), "teacher": module(), "n": 1})
        with pytest.raises(ManagerError, match="which part is the model"):
            manager.publish(0, layout="same", to=tmp_path / "served")
        with pytest.raises(ManagerError, match="no part 'pupil'; it has n, student, teacher"):
            manager.publish(0, layout="same", to=tmp_path / "served", part="pupil")
        with pytest.raises(ManagerError, match="part 'n' holds no tensors"):
            manager.publish(0, layout="same", to=tmp_path / "served", part="n")
        manager.publish(0, layout="same", to=tmp_path / "served", part="student")
        assert set(load_file(tmp_path / "served/current/model.safetensors")) == {"weight", "bias"}

    def differing(manager: CheckpointManager) -> None:
        manager.save(0, {"net": {"w": torch.ones(2) + manager.rank}})
        with pytest.raises(ManagerError, match="differs from rank to rank"):
            manager.publish(0, layout="same", to=tmp_path / "other", part="net")

    as_ranks(2, tmp_path / "b", differing)
