"""Write real ZeRO checkpoints: two training steps under DeepSpeed on gloo ranks, and the truth beside each.

    python make_zero.py --list
    python make_zero.py --out DIR NAME [NAME ...]

DIR/NAME holds what `engine.save_checkpoint` wrote (`latest`, TAG/), `config.json` for transformers' models,
and what the checkpoint must convert to:

    module.safetensors   the model's own state: parameters as they train, buffers
    master.safetensors   the fp32 masters, gathered one by one; frozen parameters and buffers as fp32.
                         Not written where DeepSpeed's gather cannot say: stage 0 has none, and under
                         round_robin_gradients it returns other parameters' values.
    truth.json           the run, versions, the tied names (alias -> holder) and the frozen parameters

All runs of one world size share one launch, because importing DeepSpeed costs more than training here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import save_file
from torch import nn

TAG = "global_step2"


@dataclass(frozen=True)
class Run:
    """One checkpoint: which model trains how. `groups` is 1, or 2 for decay and no decay. `sequence`: the
    ranks of Ulysses' sequence parallelism; `hpz`: those of ZeRO++'s second partitions."""

    name: str
    model: str
    stage: int
    world: int
    dtype: str = "bf16"
    groups: int = 1
    sub_group_size: int = 0
    round_robin: bool = False
    exclude_frozen: bool = False
    sequence: int = 1
    hpz: int = 1

    @property
    def has_master(self) -> bool:
        """Whether DeepSpeed's gather of the masters is right."""
        return self.stage > 0 and not self.round_robin


NORMAL = (
    Run("z2-llama-w1", "llama", 2, 1),
    Run("z0-llama-w2", "llama", 0, 2),
    Run("z1-mixed-w2", "mixed", 1, 2, groups=2),
    Run("z2-llama-w2-robin", "llama", 2, 2, groups=2, round_robin=True),
    Run("z3-llama-w2-subgroups", "llama", 3, 2, groups=2, sub_group_size=1500),
    Run("z3-mixed-w2-fp32", "mixed", 3, 2, dtype="fp32"),
    Run("z3-llama-w2-even", "llama-even", 3, 2, groups=2),
    Run("z2-mixtral-w2-even", "mixtral-even", 2, 2, groups=2),
    Run("z2-mixed-w3", "mixed", 2, 3, groups=2),
    Run("z3-mixtral-w3", "mixtral", 3, 3, groups=2),
    Run("z1-llama-w4-fp16", "llama", 1, 4, dtype="fp16", groups=2),
    Run("z3-mixed-w4", "mixed", 3, 4, groups=2),
    Run("z3-mixed-w4-hpz", "mixed", 3, 4, groups=2, hpz=2),
    Run("z2-llama-w4-sequence", "llama-even", 2, 4, groups=2, sequence=2),
)


def _matrix() -> Iterator[Run]:
    for model in ("llama", "mixed", "mixtral"):
        for stage in (0, 1, 2, 3):
            for world in (1, 2, 3, 4):
                for dtype, groups in (("bf16", 2), ("fp32", 1)):
                    name = f"n-z{stage}-{model}-w{world}-{dtype}"
                    yield Run(name, model, stage, world, dtype, groups)
                if stage in (1, 2) and world > 1:
                    name = f"n-z{stage}-{model}-w{world}-robin"
                    yield Run(name, model, stage, world, groups=2, round_robin=True)
                if stage == 3:
                    yield Run(
                        f"n-z3-{model}-w{world}-subgroups", model, 3, world, groups=2, sub_group_size=997
                    )
                if stage and model == "mixed":
                    name = f"n-z{stage}-mixed-w{world}-nofrozen"
                    yield Run(name, model, stage, world, groups=2, exclude_frozen=True)


NIGHTLY = tuple(_matrix())
FAMILIES = tuple(
    Run(f"z3-{model}-w2", model, 3, 2, groups=2)
    for model in ("gpt_neox", "bloom", "qwen3_moe", "deepseek_v3")
)
RUNS = {run.name: run for run in (*NORMAL, *NIGHTLY, *FAMILIES)}

Batch = dict[str, torch.Tensor]


class WideNorm(nn.BatchNorm1d):
    """Batch norm in fp32: under ZeRO the weights are cast and the running statistics are not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        with torch.no_grad():
            self.running_mean.lerp_(wide.mean((0, 2)).to(self.running_mean.dtype), 0.1)
            self.running_var.lerp_(wide.var((0, 2)).to(self.running_var.dtype), 0.1)
            self.num_batches_tracked += 1
        out = nn.functional.batch_norm(wide, None, None, self.weight.float(), self.bias.float(), True)
        return out.to(x.dtype)


class Mixed(nn.Module):
    """What language models seldom have: frozen weights, buffers of four dtypes, one of them not saved,
    a parameter of one element, odd sizes everywhere, a tied pair outside transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(47, 11)
        self.mix = nn.Linear(11, 9)
        for p in (*self.table.parameters(), *self.mix.parameters()):
            p.requires_grad_(False)
        self.norm = WideNorm(9)
        self.conv = nn.Conv1d(9, 5, 3, padding=1)
        self.up = nn.Linear(5, 9)
        self.head = nn.Linear(9, 47, bias=False)
        self.echo = nn.Linear(9, 47, bias=False)
        self.echo.weight = self.head.weight
        self.gain = nn.Parameter(torch.tensor([1.25]))
        self.register_buffer("slopes", torch.linspace(0, 1, 9))
        self.register_buffer("keep", torch.tensor([True, False, True, True, False]))
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(7), persistent=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Batch:
        x = self.norm(self.mix(self.table(input_ids)).transpose(1, 2))
        x = self.up(self.conv(x).transpose(1, 2)) * self.gain
        logits = self.head(x + self.slopes.to(x.dtype)) + self.echo(x)
        # A dict, because ZeRO-3 does not hook tensors inside other objects.
        return {"loss": nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())}


def mixed() -> nn.Module:
    return Mixed()


def llama() -> nn.Module:
    """Tied, grouped queries, biases, sizes that need padding at every world size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24, intermediate_size=37, num_hidden_layers=2, vocab_size=101, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, max_position_embeddings=64, tie_word_embeddings=True,
        )
    )  # fmt: skip


def llama_even() -> nn.Module:
    """Sizes that two serving ranks can share."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=96, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _mixtral(hidden: int, intermediate: int, vocab: int, experts: int) -> nn.Module:
    # transformers' grouped expert matmul wants rows of multiples of 16 bytes.
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2, vocab_size=vocab,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2,
            max_position_embeddings=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _causal(family: str, **sizes: object) -> nn.Module:
    """A model of transformers' that two serving ranks can share."""
    import transformers

    plain = dict(hidden_size=32, vocab_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{family}Config")(**plain | sizes)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model


_EXPERTS = dict(
    intermediate_size=48, moe_intermediate_size=16, num_experts_per_tok=2, tie_word_embeddings=False,
    max_position_embeddings=64,
)  # fmt: skip

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-even": llama_even,
    "mixtral": lambda: _mixtral(24, 40, 101, 3),
    "mixtral-even": lambda: _mixtral(32, 48, 96, 4),
    "mixed": mixed,
    "qwen3_moe": partial(_causal, "Qwen3Moe", **_EXPERTS, num_key_value_heads=2, num_experts=4, head_dim=8),
    "deepseek_v3": partial(
        _causal,
        "DeepseekV3",
        **_EXPERTS,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
    ),
    "gpt_neox": partial(_causal, "GPTNeoX", intermediate_size=48, max_position_embeddings=64),
    "bloom": partial(_causal, "Bloom"),
}


def ds_config(run: Run) -> dict[str, object]:
    zero: dict[str, object] = {
        "stage": run.stage,
        "reduce_bucket_size": 1_000_000,
        "allgather_bucket_size": 1_000_000,
    }
    if run.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if run.sub_group_size:
        zero["sub_group_size"] = run.sub_group_size
    if run.hpz > 1:
        zero["zero_hpz_partition_size"] = run.hpz
    if run.round_robin:
        zero["round_robin_gradients"] = True
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if run.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif run.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 4}
    return config


def parameter_groups(model: nn.Module, groups: int) -> list[dict[str, object]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if groups == 1:
        return [{"params": trained}]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def gathered(
    model: nn.Module, run: Run
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, str]]:
    """(master, module, tied names); every rank must call it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    master: dict[str, torch.Tensor] = {}
    module: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    holder: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in holder:
            shared[name] = holder[id(p)]
            continue
        holder[id(p)] = name
        if run.stage == 3:
            with deepspeed.zero.GatheredParameters([p]):
                module[name] = p.detach().clone()
        else:
            module[name] = p.detach().clone()
        full = safe_get_full_fp32_param(p) if p.requires_grad and run.has_master else None
        source = module[name] if full is None else full.detach()
        master[name] = source.float().reshape(module[name].shape).clone()
    for path, owner in model.named_modules():
        for key, b in owner.named_buffers(recurse=False):
            if key not in owner._non_persistent_buffers_set:
                name = f"{path}.{key}" if path else key
                module[name] = b.detach().clone()
                master[name] = b.detach().float() if b.is_floating_point() else b.detach().clone()
    return master, module, shared


def sequence_parallel(ranks: int) -> types.ModuleType:
    """What DeepSpeed's `UlyssesSPAttentionHF` hands to `initialize` as `mpu`."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    parallel_state_sp.initialize_sequence_parallel(ranks)
    return parallel_state_sp


def train(run: Run, rank: int, out: Path) -> None:
    """Two steps, the checkpoint and its truth, at `out`."""
    import deepspeed

    torch.manual_seed(7)
    model = MODELS[run.model]()
    config = getattr(model, "config", None)
    optimizer = torch.optim.AdamW(parameter_groups(model, run.groups), lr=1e-2)
    mpu = sequence_parallel(run.sequence) if run.sequence > 1 else None
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(run), mpu=mpu)
    vocab = 47 if config is None else config.vocab_size
    for step in range(2):
        seed = torch.Generator().manual_seed(100 * step + rank)
        ids = torch.randint(0, vocab, (2, 8), generator=seed)
        engine.backward(engine(input_ids=ids, labels=ids)["loss"])
        engine.step()
    deepspeed.utils.groups.mpu = None  # it would be the next run's too
    state = {"epoch": 1, "note": "client state"}
    engine.save_checkpoint(
        str(out), tag=TAG, client_state=state, exclude_frozen_parameters=run.exclude_frozen
    )
    master, module, shared = gathered(model, run)
    if rank == 0:
        save_file({k: v.contiguous() for k, v in module.items()}, out / "module.safetensors")
        if run.has_master:
            save_file({k: v.contiguous() for k, v in master.items()}, out / "master.safetensors")
        if config is not None:
            config.save_pretrained(out)
        versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        truth = {"run": dataclasses.asdict(run), "shared": shared, "frozen": frozen, "versions": versions}
        (out / "truth.json").write_text(json.dumps(truth, indent=1, sort_keys=True) + "\n")


def worker(rank: int, runs: list[Run], out: Path, port: int) -> None:
    world = runs[0].world
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Plain gloo instead of a C++ op that would be compiled on first use.
    for op in list(deepspeed.ops.__compatible_ops__):
        deepspeed.ops.__compatible_ops__[op] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # DeepSpeed refuses fp16 on most CPUs; torch computes it all the same.
    device = get_accelerator()
    device.is_fp16_supported = lambda: True
    device.supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.float16]
    for run in runs:
        final, partial = out / run.name, out / f"{run.name}.partial"
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        deepspeed.comm.barrier()
        train(run, rank, partial)
        deepspeed.comm.barrier()
        if rank == 0:
            partial.rename(final)
    torch.distributed.destroy_process_group()
    # All is written. Threads of gloo that still run have aborted a process on its way out.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def make(names: list[str], out: Path) -> None:
    """Make these checkpoints under `out`, one launch a world size."""
    import torch.multiprocessing as mp

    for world in sorted({RUNS[n].world for n in names}):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        runs = [RUNS[n] for n in names if RUNS[n].world == world]
        mp.spawn(worker, args=(runs, out, port), nprocs=world, join=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write real ZeRO checkpoints with DeepSpeed on CPU.")
    parser.add_argument("--out", type=Path, help="directory that gets one directory a run")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument("names", nargs="*", metavar="NAME")
    a = parser.parse_args()
    if a.list or not a.names or a.out is None:
        print("\n".join(str(r) for r in RUNS.values()))
        return 0
    make(a.names, a.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
