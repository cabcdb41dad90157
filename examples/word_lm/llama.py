"""A small Llama on the same text, quantised with every scheme: what each costs in perplexity.

    python llama.py --out run [--smoke]

trains (or goes on), saves through the CheckpointManager, publishes a Hugging Face directory, quantises that
with each scheme and prints the table: bytes, perplexity on test.txt, its change. Weights alone are
quantised, but for int8-dynamic, where torch's modules quantise what comes in as well. Needs transformers.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import fastckpt
import torch
from fastckpt.quant import Scheme, load_dynamic
from safetensors.torch import load_file
from text import Corpus, batchify, write_text
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Size:
    """How large, and how long."""

    hidden: int = 256
    intermediate: int = 512
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    length: int = 64
    batch: int = 16
    epochs: int = 5


SMOKE = Size(hidden=128, intermediate=256, layers=1, epochs=1, heads=2, kv_heads=2, batch=8)


def built(size: Size, ntoken: int) -> LlamaForCausalLM:
    """The model, its weights at random."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ntoken, hidden_size=size.hidden, intermediate_size=size.intermediate,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
            max_position_embeddings=2 * size.length, tie_word_embeddings=False,
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def loss_of(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """The mean loss of each row's words but its first, in nats."""
    scores = model(input_ids=rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())


def perplexity(model: torch.nn.Module, rows: Tensor, batch: int) -> float:
    """Of all rows together."""
    model.eval()
    with torch.no_grad():
        total = sum(loss_of(model, part).item() * len(part) for part in rows.split(batch))
    return math.exp(total / len(rows))


def train(model: LlamaForCausalLM, corpus: Corpus, size: Size, out: Path) -> None:
    """Train, or go on training; the newest epoch is published as OUT/served/current."""
    rows = batchify(corpus.train, len(corpus.train) // (size.length + 1)).t()
    valid = batchify(corpus.valid, len(corpus.valid) // (size.length + 1)).t()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.epochs)
    state: dict[str, object] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with fastckpt.CheckpointManager(out / "llama", max_to_keep=2) as manager:
        done = 0
        if manager.resume_step() is not None:
            manager.restore(template=state)
            done = manager.restored or 0
            print(f"resumed after epoch {done}")
        for epoch in range(done + 1, size.epochs + 1):
            model.train()
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
            for chosen in order.split(size.batch):
                optimizer.zero_grad()
                loss_of(model, rows[chosen]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            scheduler.step()
            print(f"epoch {epoch}: valid perplexity {perplexity(model, valid, size.batch):.2f}", flush=True)
            manager.save(epoch, state)
        config = model.config.to_dict()
        manager.publish(size.epochs, layout="hf", to=out / "served", part="model", config=config)


def dequantised(path: Path, scheme: Scheme) -> dict[str, Tensor]:
    """A quantised output as fp32 tensors, by the scheme's definition: (value - zero point) x scale."""
    stored = {n: t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}
    ends = scheme.named("weight", scheme.scale)
    dense = {}
    for name in [n.removesuffix(ends) + "weight" for n in stored if n.endswith(f".{ends}")]:
        scale = stored.pop(scheme.named(name, scheme.scale)).float()
        values = numbers(stored.pop(scheme.named(name, scheme.values)), scheme.packed)
        scale = torch.exp2(scale - 127) if scheme.microscaled else scale
        scale = spread(scale.reshape(scheme.grid(*values.shape)), scheme, values.shape)
        if scheme.bits == 4 and not scheme.microscaled:
            values -= 8
        if scheme.form:
            stored.pop(scheme.named(name, scheme.form))
        if scheme.zero:
            points = numbers(stored.pop(scheme.named(name, scheme.zero)), PACKED_POINTS[scheme.packed])
            values -= spread(points - scheme.zero_offset, scheme, values.shape)
        values *= scale
        dense[name] = values.t().contiguous() if scheme.turned else values
    return {**stored, **dense}


def spread(grid: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """What each block has, for each of its values."""
    down, across = (n or whole for n, whole in zip(scheme.block, shape, strict=True))
    return grid.repeat_interleave(down, 0).repeat_interleave(across, 1)[: shape[0], : shape[1]]


PACKED_POINTS = {"across": "down", "awq": "awq", "down": "across"}
"""How zero points are packed (eight outputs to an int32) where values are packed so."""


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What the codes of a float of four bits mean."""


def numbers(stored: Tensor, packed: str) -> Tensor:
    """Values as fp32; of four bits each, eight to an int32, by the ways of `schemes.Packed`: 0 to 15."""
    if not packed:
        return stored.float()
    if packed == "pairs":
        return E2M1[torch.stack([stored & 15, stored >> 4], 2).flatten(1).long()]
    order = (0, 2, 4, 6, 1, 3, 5, 7) if packed == "awq" else tuple(range(8))
    eight = torch.stack([stored >> 4 * order.index(k) & 15 for k in range(8)])
    whole = eight.movedim(0, 1).flatten(0, 1) if packed == "down" else eight.movedim(0, 2).flatten(1)
    return whole.float()


def main(out: Path, size: Size, smoke: bool) -> int:
    """Train and print the table."""
    torch.manual_seed(1111)
    write_text(out / "text", smoke=smoke)
    corpus = Corpus(out / "text")
    ntoken = len(corpus.dictionary)
    model = built(size, ntoken)
    train(model, corpus, size, out)
    served = out / "served/current"
    rows = batchify(corpus.test, len(corpus.test) // (size.length + 1)).t()
    fresh = built(size, ntoken)
    fastckpt.load_into(fresh, served)
    float_perplexity = perplexity(fresh, rows, size.batch)
    nbytes = sum(f.stat().st_size for f in served.glob("*.safetensors"))
    if float_perplexity >= ntoken / 2:
        print(f"perplexity {float_perplexity:.1f}: not below half of the uniform one, {ntoken / 2:g}")
        return 1
    print(f"\n| scheme | MB | perplexity of {ntoken} words | change |\n|---|---|---|---|")
    print(f"| float32 | {nbytes / 1e6:.2f} | {float_perplexity:.4f} | |")
    for name, scheme in fastckpt.SCHEMES.items():
        if scheme.stacks:  # of experts, which it has not
            continue
        dynamic = name.startswith("int8-dynamic")
        path = out / "quantised" / name
        layout = "same" if dynamic else "hf"
        fastckpt.reshard(served, layout=layout, quant=name, out=path, overwrite=True)
        if dynamic:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.ao is deprecated
                quantised = load_dynamic(built(size, ntoken), path)
        else:
            quantised = fresh
            fresh.load_state_dict(dequantised(path, scheme))
        got = perplexity(quantised, rows, size.batch)
        nbytes = sum(f.stat().st_size for f in path.glob("*.safetensors"))
        print(f"| {name} | {nbytes / 1e6:.2f} | {got:.4f} | {got / float_perplexity - 1:+.3%} |", flush=True)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A small Llama, quantised with every scheme.")
    parser.add_argument("--out", type=Path, required=True, help="where everything goes")
    parser.add_argument("--smoke", action="store_true", help="a few seconds' worth")
    given = parser.parse_args()
    sys.exit(main(given.out, SMOKE if given.smoke else Size(), given.smoke))
