"""Whole models in few launches: a mixture of experts in 64 ZeRO-3 partitions to one rank of eight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import fastckpt
import numpy as np
import pytest
import torch
from fastckpt.executors.tiles import Tiles, tile
from fastckpt.extents import Buffer
from fastckpt.placement import Placement
from fastckpt.planning import plans
from fastckpt.planning.binding import Binding
from fastckpt.planning.request import Request
from fastckpt.running import gpu_sources, tensors

_C = pytest.importorskip("fastckpt._C", reason="the compiled module is not built")

WORLD, TP, RANK = 64, 8, 3
HIDDEN, INNER, VOCAB, EXPERTS = 64, 32, 64, 64


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for k in range(layers):
        p = f"model.layers.{k}."
        shapes |= {f"{p}self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes[f"{p}block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            w = f"{p}block_sparse_moe.experts.{e}."
            shapes |= {f"{w}{n}.weight": (INNER, HIDDEN) for n in ("w1", "w3")}
            shapes[f"{w}w2.weight"] = (HIDDEN, INNER)
        shapes |= {f"{p}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def config_of(layers: int) -> dict[str, int | str | bool]:
    return {
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }


def partitions(weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Equal flat slices, padded, one buffer a rank."""
    share = {n: -(-t.numel() // WORLD) for n, t in weights.items()}
    parts = []
    for r in range(WORLD):
        flat = torch.zeros(sum(share.values()))
        mine = dict(zip(share, flat.split(list(share.values())), strict=True))
        for n, t in weights.items():
            piece = t.reshape(-1)[r * share[n] : (r + 1) * share[n]]
            mine[n][: len(piece)] = piece
        parts.append(mine)
    return parts


Run = Callable[[np.ndarray, Sequence[Buffer], Sequence[Buffer]], None]
"""Runs rows from some buffers into others."""


def cut(rows: np.ndarray, sources: Sequence[int], destinations: Sequence[int]) -> Tiles:
    """The tiles of rows over buffers at these addresses, for three launches at most."""
    made = tile(rows, np.array(sources, np.uint64), np.array(destinations, np.uint64))
    assert 1 <= np.count_nonzero(np.diff(made.borders)) <= 3
    return made


def on_the_host(rows: np.ndarray, sources: Sequence[Buffer], destinations: Sequence[Buffer]) -> None:
    made = cut(rows, [b.address for b in sources], [b.address for b in destinations])
    _C.run_tiles_on_host(made.rows.view(np.uint8), made.owner, made.sources, made.destinations, 1)


def launched(layers: int, layout: str, run: Run = on_the_host) -> None:
    """What at most three launches write is what the CPU writes."""
    torch.manual_seed(0)
    shapes, config = shapes_of(layers), config_of(layers)
    weights = {n: torch.randn(s) for n, s in shapes.items()}
    parts = partitions(weights)
    ckpt = fastckpt.partitioned(parts, shapes)
    wanted = Request(Placement(tp=TP), RANK, layout, config, dtype="bfloat16")
    drafted = plans.draft(ckpt, wanted, in_memory=True)
    binding = Binding.of(drafted.extents)
    (out,), buffers = tensors.allocate(drafted)
    rows = gpu_sources.placed(drafted, binding)
    assert sum(t.numel() for t in out.values()) > 0 and len(rows) > layers * EXPERTS
    for t in out.values():
        t.view(torch.uint8).fill_(0xA5)
    run(rows, [p for p in binding.places if isinstance(p, Buffer)], buffers)
    expected = fastckpt.reshard(weights, TP, rank=RANK, layout=layout, config=config, dtype="bfloat16")
    assert set(expected) == set(out)
    for n, t in expected.items():
        assert torch.equal(out[n].view(torch.int16), t.view(torch.int16)), n


@pytest.mark.parametrize("layout", ["vllm", "rtp_llm"])
def test_a_mixture_of_experts_in_three_launches(layout: str) -> None:
    launched(2, layout)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["vllm", "rtp_llm"])
def test_ten_thousand_expert_matrices_in_three_launches(layout: str) -> None:
    launched(52, layout)
