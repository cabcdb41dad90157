"""One rank of tensor-parallel models, filled with a rank's slices; saves each model's logits.

    python tp_forward.py STORE FOLDER...

RANK and WORLD_SIZE are torch.distributed's; STORE is a file that does not exist yet, where the ranks meet. A
FOLDER holds config.json and rank-RR/model.safetensors, and gets logits.safetensors.

Families that transformers has a plan for run as it distributes them; those of PLAIN have none, and run as
textbooks say: every matrix is the rank's slice, what a rank makes of its heads and widths is summed, each
token is looked up where it lies.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

IDS = torch.arange(24).reshape(2, 12) * 5 % 89 + 1


def run_ranks(store: Path, folders: Sequence[Path], world: int = 2) -> None:
    """This script on gloo ranks; fails with what they printed."""
    ranks = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *map(str, [store, *folders])]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=600)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [p.returncode for p in ranks] == [0] * world, "\n".join(said)


def same_logits(folder: Path, wanted: torch.Tensor) -> None:
    """Two ranks add in another order: this is the one comparison of the tests that is not exact."""
    got = load_file(folder / "logits.safetensors")["logits"]
    assert got.shape == wanted.shape
    assert wanted.abs().max().item() > 0.05
    assert (got - wanted).abs().max().item() <= 1e-5 * max(1.0, wanted.abs().max().item()), folder.name


# ---- what transformers distributes ----

TRAINED = (
    (".block_sparse_moe.", ".mlp."), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."),
    ("embed_out.", "lm_head."),
)  # fmt: skip


def stacked(slices: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    """The hub's names as transformers' modules hold them: experts in stacks, gate above up."""
    out = {}
    for name, x in slices.items():
        for old, new in TRAINED:
            name = name.replace(old, new)
        out[name] = x
    for name in [n for n in names if n.endswith("experts.gate_up_proj") and n not in out]:
        at = name.removesuffix("gate_up_proj")
        each = range(sum(n.startswith(at) and n.endswith("gate_proj.weight") for n in out))
        gate, up, down = (
            torch.stack([out.pop(f"{at}{e}.{p}_proj.weight") for e in each]) for p in ("gate", "up", "down")
        )
        out |= {name: torch.cat([gate, up], 1), f"{at}down_proj": down}
    return out


def distributed_model(config: AutoConfig, slices: dict[str, torch.Tensor], world: int) -> nn.Module:
    """transformers' own tensor-parallel model, every local part filled."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plan, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=world))
    model = type(model).maybe_distribute_model(model, plan, mesh)
    held = model.state_dict(keep_vars=True)
    parts = {n: x.detach().to_local() if hasattr(x, "to_local") else x.detach() for n, x in held.items()}
    for part in parts.values():
        part.fill_(float("nan"))  # what no slice fills is seen
    slices = stacked(slices, set(parts))
    for name, part in parts.items():
        if part.shape != slices[name].shape:
            raise SystemExit(f"{name}: slice {tuple(slices[name].shape)}, local part {tuple(part.shape)}")
        part.copy_(slices.pop(name))
    if slices:
        raise SystemExit(f"slices that the model lacks: {sorted(slices)}")
    return model


# ---- what it does not ----


def summed(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    """What the ranks make of their inputs, added up."""
    distributed.all_reduce(output)
    return output


def gathered(world: int, module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    """The ranks' parts of the vocabulary, side by side."""
    parts = [torch.empty_like(output) for _ in range(world)]
    distributed.all_gather(parts, output.contiguous())
    return torch.cat(parts, -1)


def looked_up(table: nn.Embedding, first: int, ids: torch.Tensor) -> torch.Tensor:
    """The vectors of tokens, of which this rank holds those from `first` on."""
    mine = (ids >= first) & (ids < first + len(table.weight))
    out = nn.functional.embedding((ids - first).masked_fill(~mine, 0), table.weight)
    out = out.masked_fill(~mine[..., None], 0.0)
    distributed.all_reduce(out)
    return out


def gpt2(module: nn.Module, world: int) -> None:
    if hasattr(module, "split_size"):
        module.split_size //= world
        module.num_heads //= world
        module.c_attn.nf //= world
    elif hasattr(module, "c_fc"):
        module.c_fc.nf //= world


def heads(module: nn.Module, world: int) -> None:
    """BLOOM's and Falcon's attention; a single kv head is every rank's."""
    if hasattr(module, "query_key_value"):
        module.num_heads //= world
        if getattr(module, "num_kv_heads", 1) > 1:
            module.num_kv_heads //= world


PLAIN: dict[str, tuple[Callable[[nn.Module, int], None], tuple[str, ...]]] = {
    "gpt2": (gpt2, ("c_proj",)),
    "bloom": (heads, ("dense", "dense_4h_to_h")),
    "falcon": (heads, ("dense", "dense_4h_to_h")),
}
"""model_type -> how a module's sizes become a rank's, and the modules whose outputs are summed."""


def sloped(rank: int, world: int) -> None:
    """Alibi's slopes are by head: each rank takes its own."""
    slopes, whole = modeling_bloom._get_alibi_slopes, modeling_falcon.build_alibi_tensor
    modeling_bloom._get_alibi_slopes = lambda *a: slopes(*a).chunk(world)[rank]

    def mine(mask: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
        all_heads = whole(mask, count, dtype).view(len(mask), count, 1, -1)
        return all_heads.chunk(world, 1)[rank].flatten(0, 1)

    modeling_falcon.build_alibi_tensor = mine


def plain_model(config: AutoConfig, slices: dict[str, torch.Tensor], rank: int, world: int) -> nn.Module:
    """transformers' model with a rank's slices for parameters."""
    shrink, sums = PLAIN[config.model_type]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    table.forward = partial(looked_up, table, rank * config.vocab_size // world)
    head.register_forward_hook(partial(gathered, world))
    tied = "lm_head.weight" not in slices
    for name, module in model.named_modules():
        shrink(module, world)
        for leaf in [n for n, _ in module.named_parameters(recurse=False)]:
            key = f"{name}.{leaf}"
            if tied and module is head:
                key = next(f"{n}.weight" for n, m in model.named_modules() if m is table)
                x = slices[key]
            else:
                x = slices.pop(key) if not (tied and module is table) else slices[key]
            if leaf == "bias" and name.rpartition(".")[2] in sums and rank:
                x = torch.zeros_like(x)  # added once
            setattr(module, leaf, nn.Parameter(x, requires_grad=False))
        if name.rpartition(".")[2] in sums:
            module.register_forward_hook(summed)
    left = [n for n in slices if not (tied and n.startswith(("transformer.word_emb", "transformer.wte")))]
    if left:
        raise SystemExit(f"slices that the model lacks: {left}")
    return model


def forward(folder: Path, rank: int, world: int) -> None:
    """The logits of the model in `folder`, from this rank's slices."""
    config = AutoConfig.from_pretrained(folder)
    slices = load_file(folder / f"rank-{rank:02d}" / "model.safetensors")
    if config.model_type in PLAIN:
        model = plain_model(config, slices, rank, world)
    else:
        model = distributed_model(config, slices, world)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    if rank == 0:
        save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")


def main(store: Path, folders: list[Path]) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    sloped(rank, world)
    for folder in folders:
        forward(folder, rank, world)
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(a) for a in sys.argv[2:]])
