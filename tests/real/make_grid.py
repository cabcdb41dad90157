"""Write a real checkpoint of DeepSpeed's tensor or pipeline parallel grids: two training steps on gloo ranks.

    python make_grid.py --model qwen2 --stage 2 --tp 2 --world 4 DIR     AutoTP of a transformers model
    python make_grid.py --model pipe --stage 1 --tp 2 --pp 2 --world 4 DIR     PipelineModule with an `mpu`

DIR gets what `engine.save_checkpoint` wrote, and the truth, gathered from the ranks: master.safetensors and
module.safetensors, the whole model in fp32 and as it trains. AutoTP's layers gather their parts themselves;
the pipeline's are cut by this file, which knows the axes. Of a padded vocabulary the truth has the real rows.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_rank import begin, free_port
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, linear, pad

Tensors = dict[str, torch.Tensor]
HIDDEN, WIDTH, VOCAB = 8, 12, 21
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
FUSED = {  # phi3's gate and up are one matrix; its attention does not know of parts
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [".*\\.gate_up_proj\\.weight$"], "partition_type": "column", "shape": [2, -1]},
        {"patterns": [".*\\.down_proj\\.weight$"], "partition_type": "row"},
    ],
}


def config(a: argparse.Namespace) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": a.dtype == "bfloat16"},
        "zero_optimization": {"stage": a.stage, "stage3_param_persistence_threshold": 0},
        **({"gradient_accumulation_steps": 2} if a.model == "pipe" else {"tensor_parallel": {
            "autotp_size": a.tp, **({"partition_config": FUSED} if a.model == "phi3" else {})}}),
        **({"data_types": {"grad_accum_dtype": "fp32"}} if a.wide_gradients else {}),
    }  # fmt: skip


def groups(model: nn.Module) -> list[dict[str, object]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() < 2]
    return [{"params": kind, "weight_decay": 0.1 * (k == 0)} for k, kind in enumerate(kinds) if kind]


def batch(step: int, data_rank: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, 8), generator=torch.Generator().manual_seed(100 * step + data_rank))


# ---- AutoTP ----


def autotp(rank: int, a: argparse.Namespace) -> tuple[Tensors, Tensors]:
    """Trains and saves; what rank 0 knows of the whole model, in fp32 and as it trains."""
    import deepspeed
    import transformers

    kinds = {"llama": "Llama", "qwen2": "Qwen2", "phi3": "Phi3"}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": a.layers}
    of = getattr(transformers, f"{kinds[a.model]}Config")
    made = of(**SIZES, **heads, tie_word_embeddings=a.model == "qwen2", pad_token_id=0)
    model = getattr(transformers, f"{kinds[a.model]}ForCausalLM")(made)
    if a.freeze:
        model.model.layers[0].requires_grad_(False)
    model = model.to(getattr(torch, a.dtype))
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(a))
    for step in range(2):
        ids = batch(step, rank // a.tp)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(a.out), tag="global_step2")
    if rank == 0:
        made.save_pretrained(a.out)
    return whole(model, a, masters=True), whole(model, a, masters=False)


def whole(model: nn.Module, a: argparse.Namespace, *, masters: bool) -> Tensors:
    """The whole model by DeepSpeed's own gathers: over data-parallel ranks, then of the layers' parts."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    parts: Tensors = {}
    for name, p in model.named_parameters():
        if masters and a.stage and p.requires_grad and getattr(p, "ds_numel", p.numel()):
            parts[name] = safe_get_full_fp32_param(p).detach().clone().float()
            continue
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            parts[name] = p.detach().clone().float() if masters else p.detach().clone()
    out = dict(parts)
    for at, layer in model.named_modules():
        if hasattr(layer, "gather_params"):
            own = {f"{at}.{name}": p for name, p in layer.named_parameters(recurse=False)}
            own = {name: p for name, p in own.items() if name in parts}
            held = {name: (p.data, p.dtype) for name, p in own.items()}
            for name, p in own.items():
                p.data = parts[name].clone()
            layer.gather_params([own.get(f"{at}.{name}") for name in ("weight", "bias")])
            for name, p in own.items():
                out[name] = p.detach().clone()
                p.data = held[name][0]
    return out


# ---- a pipeline with an mpu ----


def pipe(rank: int, a: argparse.Namespace) -> tuple[Tensors, Tensors]:
    """Trains and saves; what rank 0 knows of the whole model, in fp32 and as it trains."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from deepspeed.utils import safe_get_full_fp32_param

    grid = PipeModelDataParallelTopology(num_pp=a.pp, num_mp=a.tp, num_dp=a.world // a.pp // a.tp)
    lists = grid.get_axis_comm_lists("model") if a.tp > 1 else []
    made = [(dist.new_group(ranks), ranks) for ranks in lists]
    group = next((g for g, ranks in made if rank in ranks), None)
    place = grid.get_coord(rank)
    padded = -(-VOCAB // (4 * a.tp)) * 4 * a.tp

    def reduced(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        if group is not None:
            dist.all_reduce(x, group=group)
        return x

    class In(torch.autograd.Function):  # into the parts: gradients are summed
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, g):
            return reduced(g)

    class Out(torch.autograd.Function):  # out of them: values are summed
        @staticmethod
        def forward(ctx, x):
            return reduced(x)

        @staticmethod
        def backward(ctx, g):
            return g

    def part(seed: int, shape: tuple[int, ...], axis: int) -> nn.Parameter:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2
        p = nn.Parameter(drawn.chunk(a.tp, axis)[place.model].clone())
        p.tensor_model_parallel, p.axis = True, axis
        return p

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = part(1, (padded, HIDDEN), 0)

        def rows(self, ids):
            return nn.functional.one_hot(ids, padded).chunk(a.tp, -1)[place.model].to(self.weight.dtype)

        def forward(self, ids):
            return Out.apply(self.rows(ids) @ self.weight)

    def head(table, x):
        own = linear(In.apply(x), table.weight)
        before = place.model * own.shape[-1]
        return Out.apply(pad(own, (before, padded - before - own.shape[-1])))[..., :VOCAB]

    class Block(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.norm = nn.LayerNorm(HIDDEN)
            self.gate_up = nn.Module()  # each rank's part is its gate, then its up
            gate, up = (part(seed + k, (WIDTH, HIDDEN), 0) for k in (0, 1))
            self.gate_up.weight = nn.Parameter(torch.cat([gate.data, up.data]))
            self.gate_up.weight.axis, self.gate_up.weight.tensor_model_parallel = "halves", True
            self.down = nn.Module()
            self.down.weight = part(seed + 2, (HIDDEN, WIDTH), 1)
            self.down.bias = nn.Parameter(torch.linspace(-1, 1, HIDDEN))
            self.register_buffer("scale", torch.tensor([1.0, 0.5]))

        def forward(self, x):
            gate, up = linear(In.apply(self.norm(x)), self.gate_up.weight).chunk(2, -1)
            return x + Out.apply(linear(gate.relu() * up, self.down.weight)) + self.down.bias * self.scale[0]

    model = PipelineModule(
        layers=[
            TiedLayerSpec("embed", Table), *(LayerSpec(Block, 10 * k) for k in range(1, 1 + a.layers)),
            lambda x: x * 1, LayerSpec(nn.LayerNorm, HIDDEN), TiedLayerSpec("embed", Table, forward_fn=head),
        ],  # every stage has parameters of both groups, or DeepSpeed's norms wait for one another
        loss_fn=lambda out, ids: cross_entropy(out.float().flatten(0, 1), ids.flatten()),
        topology=grid, partition_method="uniform", activation_checkpoint_interval=0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(a))
    data = iter([(ids, ids) for ids in (batch(k, place.data) for k in range(4))])
    for _ in range(2):
        engine.train_batch(data_iter=data)
    said = {
        "universal_checkpoint_version": 0.2, "original_vocab_size": VOCAB, "padded_vocab_size": padded,
        "vocabulary_parameter_patterns": [r"tied_modules.embed.weight"],
        "pipeline_replicated_parameter_patterns": [r"tied_modules.embed.weight"],
        "tp_replicated_parameter_patterns": [
            r"\d+.norm.weight", r"\d+.norm.bias", r"\d+.down.bias", r"\d+.weight", r"\d+.bias"],
        "parameter_with_row_parallelism_patterns": [r"\d+.down.weight"],
        "parameter_with_2_sub_params_cat_dim_0": [r"\d+.gate_up.weight"],
    }  # fmt: skip
    engine.save_checkpoint(
        str(a.out), tag="global_step2", client_state={"universal_checkpoint_info": said} if a.tp > 1 else {}
    )
    own = {
        n: (safe_get_full_fp32_param(p).detach().clone() if a.stage else p.detach().float(),
            p.detach().clone(), getattr(p, "axis", None))
        for n, p in model.named_parameters()
    }  # fmt: skip
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    every: list[tuple[object, dict[str, tuple], Tensors] | None] = [None] * a.world
    dist.all_gather_object(every, (tuple(place), own, buffers))
    return tuple(joined(every, grid, a, kind) for kind in (0, 1))


def joined(every: list[tuple], grid: object, a: argparse.Namespace, kind: int) -> Tensors:
    """The parts of the tensor-parallel ranks put together, by the axes they were cut along."""
    out: Tensors = {}
    for _, own, buffers in every:
        out |= buffers
        for name in own:
            axis = own[name][2]
            parts = [
                theirs[name][kind]
                for rank, (_, theirs, _) in enumerate(every)
                if name in theirs and grid.get_coord(rank).data == 0
            ][: a.tp]
            if axis == "halves":
                out[name] = torch.cat([half for k in (0, 1) for half in (p.chunk(2)[k] for p in parts)])
            else:
                out[name] = parts[0] if axis is None else torch.cat(parts, axis)
            if "embed" in name and a.tp > 1:
                out[name] = out[name][:VOCAB]
    return out


def train(rank: int, a: argparse.Namespace, port: int) -> None:
    begin(rank, a.world, port)
    import deepspeed

    torch.manual_seed(3)
    master, module = (pipe if a.model == "pipe" else autotp)(rank, a)
    if rank == 0:
        for name, truth in (("master", master), ("module", module)):
            save_file({n: t.contiguous() for n, t in truth.items()}, a.out / f"{name}.safetensors")
        for script in a.out.glob("*.py"):  # DeepSpeed leaves its converter beside what it saves
            script.unlink()
        (a.out / "made.json").write_text(json.dumps({"deepspeed": deepspeed.__version__}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("llama", "qwen2", "phi3", "pipe"), default="qwen2")
    for name, default in (("world", 4), ("tp", 2), ("pp", 1), ("layers", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--freeze", action="store_true", help="the first layer")
    parser.add_argument("--wide-gradients", action="store_true", help="accumulated in fp32: BF16_Optimizer")
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    mp.spawn(train, (a, free_port()), nprocs=a.world)


if __name__ == "__main__":
    main()
