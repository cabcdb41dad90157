"""Whole models in GPU memory: ZeRO-3 over 64 partitions to one rank of eight, for gpu.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import fastckpt
import torch
from gpu_rows import Case, State

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, int | str | bool]

WORLD, TP, RANK = 64, 8, 3


def llama(small: bool) -> tuple[Shapes, Config]:
    """Llama-3-8B's shapes."""
    h, inner, kv, vocab, layers = (256, 512, 64, 1024, 3) if small else (4096, 14336, 1024, 128256, 32)
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, h)}
    for k in range(layers):
        p = f"model.layers.{k}."
        shapes |= {
            f"{p}self_attn.q_proj.weight": (h, h),
            f"{p}self_attn.k_proj.weight": (kv, h),
            f"{p}self_attn.v_proj.weight": (kv, h),
            f"{p}self_attn.o_proj.weight": (h, h),
            f"{p}mlp.gate_proj.weight": (inner, h),
            f"{p}mlp.up_proj.weight": (inner, h),
            f"{p}mlp.down_proj.weight": (h, inner),
            f"{p}input_layernorm.weight": (h,),
            f"{p}post_attention_layernorm.weight": (h,),
        }
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (vocab, h)}
    return shapes, {
        "model_type": "llama",
        "hidden_size": h,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }


def moe(small: bool) -> tuple[Shapes, Config]:
    """A Mixtral of 52 layers of 64 small experts: 9,984 expert matrices."""
    h, inner, vocab, layers, experts = (256, 128, 1024, 3, 8) if small else (1024, 512, 32000, 52, 64)
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, h)}
    for k in range(layers):
        p = f"model.layers.{k}."
        shapes |= {f"{p}self_attn.{n}_proj.weight": (h, h) for n in "qkvo"}
        shapes[f"{p}block_sparse_moe.gate.weight"] = (experts, h)
        for e in range(experts):
            w = f"{p}block_sparse_moe.experts.{e}."
            shapes |= {f"{w}w1.weight": (inner, h), f"{w}w2.weight": (h, inner), f"{w}w3.weight": (inner, h)}
        shapes |= {f"{p}input_layernorm.weight": (h,), f"{p}post_attention_layernorm.weight": (h,)}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (vocab, h)}
    return shapes, {
        "model_type": "mixtral",
        "hidden_size": h,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }


def cut(shapes: Mapping[str, tuple[int, ...]], world: int) -> list[State]:
    """Random fp32 slices of every rank, in one flat buffer a rank."""
    sizes = {n: -(-math.prod(s) // world) for n, s in shapes.items()}
    parts = []
    for _ in range(world):
        flat = torch.empty((sum(sizes.values()),), device="cuda").normal_()
        parts.append(dict(zip(sizes, flat.split(list(sizes.values())), strict=True)))
    return parts


def gathered(parts: list[State], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([p[name] for p in parts])[: math.prod(shape)].view(shape)


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name."""
    return next((int(x) for x in name.split(".") if x.isdigit()), None)


def renamed(name: str, layer: int, to: int) -> str:
    return name.replace(f"layers.{layer}.", f"layers.{to}.")


def cases(kind: str, small: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """A row for each layout, over the same partitions."""
    shapes, config = llama(small) if kind == "llama-8b" else moe(small)

    @cache
    def sources() -> tuple[list[State], fastckpt.Checkpoint]:
        parts = cut(shapes, WORLD)
        return parts, fastckpt.partitioned(parts, shapes)

    def whole(layout: str) -> Case:
        parts, ckpt = sources()
        options = {"layout": layout, "config": config, "dtype": "bfloat16", "rank": RANK}
        ready = fastckpt.prepare(ckpt, TP, **options)
        (out,) = ready.out
        for t in out.values():
            t.view(torch.uint8).fill_(0xA5)
        written = sum(t.nbytes for t in out.values())  # each from twice as many bytes

        def eager() -> State:
            """cat, narrow, view, t().contiguous(), to: one tensor after the other, as loaders do it."""
            made = {}
            for name, shape in shapes.items():
                x = gathered(parts, name, shape)
                if len(shape) == 2:
                    axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")) else 0
                    x = x.chunk(TP, axis)[RANK].to(torch.bfloat16).contiguous()
                    x = x.t().contiguous() if layout == "rtp_llm" else x
                made[name] = x.to(torch.bfloat16)
            return made

        def right() -> bool:
            """The first, the middle and the last layer and what is outside them, made by the CPU's road."""
            layers = int(config["num_hidden_layers"])
            kept = {k: i for i, k in enumerate(sorted({0, layers // 2, layers - 1}))}
            held = {}
            for n, s in shapes.items():
                k = layer_of(n.partition("experts")[0])
                if k is None or k in kept:
                    name = n if k is None else renamed(n, k, kept[k])
                    held[name] = gathered(parts, n, s).to(torch.bfloat16).cpu()
            fewer = {**config, "num_hidden_layers": len(kept)}
            wanted = fastckpt.reshard(held, TP, **{**options, "config": fewer})
            back = {i: k for k, i in kept.items()}
            for n, t in wanted.items():
                i = layer_of(n.partition("experts")[0])
                if not torch.equal(out[n if i is None else renamed(n, i, back[i])].cpu(), t):
                    return False
            return True

        launches = sum(
            a < b for a, b in zip(ready.prepared.borders, ready.prepared.borders[1:], strict=False)
        )
        return Case(
            f"model {kind} {layout}",
            f"{len(shapes)} tensors, {WORLD} parts, rank {RANK} of {TP}, {launches} launches",
            ready.run,
            3 * written,
            eager,
            right,
        )

    for layout in ("vllm", "rtp_llm"):
        yield f"model {kind} {layout}", lambda layout=layout: whole(layout)
