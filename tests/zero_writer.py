"""Writes ZeRO checkpoints the way DeepSpeed 0.19 does, from the documented formulas, without deepspeed.

The pickles carry DeepSpeed's own GLOBAL names (ZeroStageEnum, LossScaler, fragment_address); the classes
behind them are stubs that exist only while a file is saved. What must never be read holds garbage: stage-3
pads, optimizer moments, the tail behind a trimmed partition.
"""

from __future__ import annotations

import enum
import math
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.serialization import skip_data

VERSION = "0.19.8"
GARBAGE = (float("nan"), 1e33, -0.5, float("inf"), 7e-30)

Groups = Sequence[Sequence[str]]


class ZeroStageEnum(int, enum.Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale, self.dynamic = 1.0, False


@dataclass
class fragment_address:
    numel: int
    start: int


_HOMES = {
    ZeroStageEnum: "deepspeed.runtime.zero.config",
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
    fragment_address: "deepspeed.utils.tensor_fragment",
}


@contextmanager
def deepspeed_names() -> Iterator[None]:
    """Pickles written inside carry the stubs under DeepSpeed's module names."""
    saved: dict[str, types.ModuleType | None] = {}
    home = __name__
    for cls, module in _HOMES.items():
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            name = ".".join(parts[:n])
            if name not in saved:
                saved[name] = sys.modules.get(name)
                sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[module], cls.__name__, cls)
        cls.__module__ = module
    try:
        yield
    finally:
        for cls in _HOMES:
            cls.__module__ = home
        for name, old in saved.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def garbage(numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """`numel` values that no reader may use."""
    return (
        torch.tensor([GARBAGE[(i + seed) % len(GARBAGE)] for i in range(min(numel, 5))] or [0.0])
        .repeat(numel // 5 + 1)[:numel]
        .to(dtype)
    )


def aligned_partition(numel: int, world: int) -> int:
    """Stage 1/2: the length of every rank's partition of a flat group."""
    return -(-numel // (2 * world)) * 2


def sub_groups(
    names: Sequence[str], numel: Mapping[str, int], world: int, size: int | None
) -> list[list[str]]:
    """Stage 3: a sub-group closes after the parameter that brings it to `size` elements a rank."""
    part = {n: -(-numel[n] // world) for n in names}
    if size is None or sum(part.values()) <= size:
        return [list(names)]
    out: list[list[str]] = []
    have = 0
    for n in names:
        if not out or have >= size:
            out.append([])
            have = 0
        out[-1].append(n)
        have += part[n]
    return out


def alignment_paddings(numels: Sequence[int], unit: int) -> list[int]:
    """Elements after each parameter up to the next `unit`; the last has none. `unit` 0: none at all."""
    if not unit:
        return [0] * len(numels)
    return [(-n) % unit for n in numels[:-1]] + [0] * (1 if numels else 0)


def cut(flat: torch.Tensor, world: int) -> tuple[list[torch.Tensor], list[int]]:
    """Stage 1/2: each rank's untrimmed partition of the aligned flat group, and its padding."""
    n, p = flat.numel(), aligned_partition(flat.numel(), world)
    whole = torch.cat([flat, torch.zeros(world * p - n, dtype=flat.dtype)])
    lengths = [max(0, min(p, n - r * p)) for r in range(world)]
    return [whole[r * p : (r + 1) * p].clone() for r in range(world)], [p - length for length in lengths]


def pieces(t: torch.Tensor, world: int) -> list[torch.Tensor]:
    """Stage 3: each rank's ceil(numel / world) elements, garbage after the real ones."""
    p = -(-t.numel() // world)
    padded = torch.cat([t.reshape(-1), garbage(world * p - t.numel(), t.dtype)])
    return [padded[r * p : (r + 1) * p] for r in range(world)]


def _moments(lengths: Sequence[int], step: int) -> dict[str, object]:
    state = {
        g: {
            "step": torch.tensor(float(step)),
            "exp_avg": garbage(n, torch.float32),
            "exp_avg_sq": garbage(n, torch.float32, 1),
        }
        for g, n in enumerate(lengths)
    }
    groups = [
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "params": [g]} for g in state
    ]
    return {"state": state, "param_groups": groups}


def write_zero(
    path: str | os.PathLike[str],
    params: Mapping[str, torch.Tensor],
    *,
    stage: int,
    world: int,
    groups: Groups | None = None,
    frozen: Sequence[str] = (),
    buffers: Mapping[str, torch.Tensor] | None = None,
    tied: Mapping[str, str] | None = None,
    master: torch.dtype = torch.float32,
    model_dtype: torch.dtype = torch.bfloat16,
    sub_group_size: int | None = None,
    stripped: bool = True,
    alignment: int = 0,
    round_robin: bool = False,
    bf16_optimizer: bool = False,
    exclude_frozen: bool = False,
    shapes_as_one_dict: bool = False,
    tag: str = "global_step2",
    latest: bool = True,
    step: int = 2,
    client: Mapping[str, object] | None = None,
    legacy: bool = False,
    sequence: int = 1,
    sparse: bool = False,
    left_away: str = "",
) -> dict[str, torch.Tensor]:
    """Write PATH/latest and PATH/TAG/*; return name -> tensor as a converter must give them.

    `params`: all parameters, each cast to `master` (the frozen ones to `model_dtype`). `groups`: optimizer
    groups of names, default one of all that is not frozen. `alignment`: parameter_alignment in elements.
    `round_robin`: param_shapes and flat order are shuffled, param_slice_mappings left in plain order (as
    DeepSpeed does, wrongly). `stripped=False`: partitions keep their padding. `sequence`: the ranks of
    Ulysses' sequence parallelism, which DeepSpeed 0.18 took for model-parallel ones in the files' names, and
    0.19 takes for tensor-parallel ones in the degrees. `sparse`: no storage is written, the files are holes.
    `left_away`: the prefix that the model's own `state_dict` leaves away.
    Order of the result: buffers, frozen, trainable, tied."""
    if bf16_optimizer and (alignment or stage != 1):
        raise ValueError("BF16_Optimizer is stage 1 and knows no parameter_alignment")
    root = os.fspath(path)
    folder = os.path.join(root, tag)
    os.makedirs(folder, exist_ok=True)
    if latest:
        with open(os.path.join(root, "latest"), "w") as f:
            f.write(tag)
    buffers, tied = dict(buffers or {}), dict(tied or {})
    # The optimizer does not own a parameter without elements: DeepSpeed lists it among the frozen ones.
    idle = [n for n in params if n in set(frozen) or params[n].numel() == 0]
    if groups is None:
        groups = [[n for n in params if n not in idle]]
    masters = {n: params[n].to(master) for g in groups for n in g}
    models = {n: (masters[n] if n in masters else params[n]).to(model_dtype) for n in params}
    order = [list(reversed(g)) if round_robin else list(g) for g in groups]
    numel = {n: t.numel() for n, t in masters.items()}

    def save(name: str, obj: object) -> None:
        with deepspeed_names(), skip_data() if sparse else nullcontext():
            torch.save(obj, os.path.join(folder, name), _use_new_zipfile_serialization=not legacy)

    optim_prefix = "bf16_" if model_dtype is torch.bfloat16 else ""

    def save_optim(rank: int, state: dict[str, object]) -> None:
        content = {
            "optimizer_state_dict": state,
            "ds_config": {"zero_optimization": {"stage": stage}},
            "ds_version": VERSION,
        }
        save(f"{optim_prefix}zero_pp_rank_{rank}_mp_rank_{rank % sequence:02}_optim_states.pt", content)

    shapes: list[OrderedDict[str, torch.Size]] | None
    if stage == 3:
        order = [s for g in order for s in sub_groups(g, numel, world, sub_group_size)]
        cuts = {n: pieces(t, world) for n, t in masters.items()}
        for rank in range(world):
            flats = []
            for s, names in enumerate(order):
                flat = torch.cat([cuts[n][rank] for n in names]) if names else torch.zeros(0, dtype=master)
                flat.ds_id = f"{s}_{len(names)}"  # type: ignore[attr-defined]  # pickled as _rebuild_from_type_v2
                flats.append(flat)
            save_optim(rank, {
                "zero_stage": ZeroStageEnum(3), "loss_scaler": LossScaler(), "dynamic_loss_scale": False,
                "overflow": False, "partition_count": world,
                "optimizer_state_dict": _moments([f.numel() for f in flats], step), "fp32_flat_groups": flats,
            })  # fmt: skip
    elif stage in (1, 2):
        align = [alignment_paddings([numel[n] for n in names], alignment) for names in order]
        parts, pads = [], []
        for names, pad in zip(order, align, strict=True):
            row = [
                x
                for n, a in zip(names, pad, strict=True)
                for x in (masters[n].reshape(-1), garbage(a, master))
            ]
            p, rest = cut(torch.cat(row) if row else torch.zeros(0, dtype=master), world)
            parts.append(p)
            pads.append(rest)
        plain = [_slices(g, numel, align[k], len(parts[k][0]), world) for k, g in enumerate(groups)]
        for rank in range(world):
            flats = [p[rank] for p in parts]
            padding = [pads[g][rank] for g in range(len(groups))]
            if stripped and not bf16_optimizer:
                flats = [f[: f.numel() - n] for f, n in zip(flats, padding, strict=True)]
            state: dict[str, object] = {
                "clip_grad": 1.0, "base_optimizer_state": _moments([len(p[rank]) for p in parts], step),
                "single_partition_of_fp32_groups": flats, "group_paddings": padding,
                "partition_count": [world] * len(groups), "ds_version": VERSION,
                "param_slice_mappings": [s[rank] for s in plain],
            }  # fmt: skip
            if not bf16_optimizer:
                state |= {
                    "loss_scaler": LossScaler(), "dynamic_loss_scale": False, "overflow": False,
                    "zero_stage": ZeroStageEnum(stage), "param_alignment_paddings": align,
                }  # fmt: skip
            save_optim(rank, state)
    shapes = [OrderedDict((n, masters[n].shape) for n in names) for names in order] if stage else None

    def model_state(rank: int) -> dict[str, object]:
        module = OrderedDict()
        for n, t in models.items():
            if exclude_frozen and n in frozen:
                continue
            module[n] = torch.zeros(0, dtype=model_dtype) if stage == 3 else t
        module.update((alias, module[holder]) for alias, holder in tied.items() if holder in module)
        module.update(
            {n: t if rank == 0 or not t.is_floating_point() else t + rank for n, t in buffers.items()}
        )
        frozen_shapes: OrderedDict[str, torch.Size] | None = None
        fragments: OrderedDict[str, torch.Tensor] | None = None
        if stage >= 2 and not exclude_frozen:
            frozen_shapes = OrderedDict((n, models[n].shape) for n in idle)
            whole = stage == 2
            fragments = OrderedDict(
                (n, models[n] if whole else pieces(models[n], world)[rank].clone()) for n in idle
            )
        return {
            "module": {n.removeprefix(left_away): t for n, t in module.items()},
            "buffer_names": list(buffers),
            "optimizer": None if stage else {"fp32_groups": [list(masters.values())]},
            "param_shapes": shapes[0] if shapes and shapes_as_one_dict else shapes,
            "frozen_param_shapes": frozen_shapes,
            "shared_params": (dict(tied) if rank == 0 else {}) if stage else None,
            "frozen_param_fragments": fragments, "lr_scheduler": None, "data_sampler": None,
            "random_ltd": None, "skipped_steps": 0, "global_steps": step, "global_samples": step * world,
            "dp_world_size": world, "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": sequence},
            "ds_config": {"zero_optimization": {"stage": stage}}, "ds_version": VERSION,
            **(client or {}),
        }  # fmt: skip

    if stage == 3:
        for rank in range(world):
            save(f"zero_pp_rank_{rank}_mp_rank_{rank % sequence:02}_model_states.pt", model_state(rank))
    else:
        save("mp_rank_00_model_states.pt", model_state(0))

    out = dict(buffers)
    if not exclude_frozen:
        out |= {n: models[n] for n in idle}
    for names in order if stage else groups:
        out |= {n: masters[n] if stage else models[n] for n in names}
    out |= {alias: out[holder] for alias, holder in tied.items() if holder in out}
    return out


def _slices(
    names: Sequence[str], numel: Mapping[str, int], align: Sequence[int], part: int, world: int
) -> list[OrderedDict[str, fragment_address]]:
    """param_slice_mappings: each rank's (numel, start) of the parameters it holds a piece of."""
    out: list[OrderedDict[str, fragment_address]] = [OrderedDict() for _ in range(world)]
    at = 0
    for n, a in zip(names, align, strict=True):
        for rank in range(at // part if part else 0, math.ceil((at + numel[n]) / part) if part else 0):
            low, high = max(at, rank * part), min(at + numel[n], (rank + 1) * part)
            if high > low:
                out[rank][n] = fragment_address(high - low, low - rank * part)
        at += numel[n] + a
    return out
