"""What each name of a ZeRO checkpoint is: trainable, frozen, a buffer, or tied to another.

Law: every tensor that `module` names is accounted for, so that no weight is dropped silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import SourceError
from ..torchfile import Tensor
from ..torchtensors import place, refuse_unread
from .partitions import Shape
from .state import ModelState


@dataclass(frozen=True, slots=True)
class Parts:
    """Names by what they are, each in file order.

    `buffers`: in `module`. `kept`: parameters that only `module` holds (all frozen ones at stage 1). `tied`:
    name -> holder. `other`: entries of `module` that are no tensors. `lost`: stage-3 placeholders whose
    weights are in no file."""

    buffers: tuple[str, ...]
    kept: tuple[str, ...]
    tied: dict[str, str]
    other: tuple[str, ...]
    lost: tuple[str, ...]


def trainable(state: ModelState) -> Mapping[str, Shape]:
    """Name -> shape of what the optimizer owns."""
    groups = state.shapes or ()
    return groups[0] if len(groups) == 1 else {n: s for group in groups for n, s in group.items()}


def parts(state: ModelState, where: str) -> Parts:
    """The Parts of a model-states file. Raises SourceError for names that are two things at once, and for
    shapes that disagree."""
    owned = trainable(state)
    frozen = state.frozen_shapes or {}
    both = next((n for n in frozen if n in owned), None)
    if both is not None:
        raise SourceError(f"{where}: {both} is in param_shapes and in frozen_param_shapes")
    missing = next((n for n in frozen if n not in (state.fragments or {})), None)
    if missing is not None:
        raise SourceError(f"{where}: {missing} is in frozen_param_shapes, frozen_param_fragments lacks it")
    every = {**frozen, **owned} if frozen else owned
    tied = _tied(state, every, where)
    other = tuple(n for n, t in state.module.items() if not isinstance(t, Tensor))
    for name in other:
        refuse_unread(f"{where}: {name}", state.module[name])
    module = {n: t for n, t in state.module.items() if isinstance(t, Tensor)}
    named = set(state.buffers) - owned.keys() - frozen.keys()
    buffers = tuple(n for n in module if n in named)
    for name, shape in every.items():
        copy = module.get(name)
        # A stage-3 placeholder has no elements; everything else is the parameter itself.
        if copy is not None and copy.numel and copy.shape != shape:
            raise SourceError(f"{where}: {name}: `module` has shape {copy.shape}, its shape is {shape}")
    holders = {place(t): n for n, t in module.items() if t.numel and n in every}
    at_stage_3 = all(t.numel == 0 for n, t in module.items() if n in owned)  # `module` holds placeholders
    kept, lost = [], []
    for name, t in module.items():
        if name in every or name in tied or name in named:
            continue
        holder = holders.setdefault(place(t), name) if t.numel else name
        if holder != name:
            tied[name] = holder
        elif t.numel == 0 and at_stage_3:
            lost.append(name)
        else:
            kept.append(name)
    return Parts(buffers, tuple(kept), tied, other, tuple(lost))


def _tied(state: ModelState, own: Mapping[str, Shape], where: str) -> dict[str, str]:
    """`shared_params`, without the empty parameters, which DeepSpeed takes for one another (all have address
    0)."""
    out = {}
    buffers = {*state.buffers}
    others = [name for name in state.module if name not in buffers]
    routers = state.autoep.routers(others) if state.autoep is not None else {}
    for name, holder in {**state.shared, **routers}.items():
        if name in own:
            if math.prod(own[name]):
                raise SourceError(
                    f"{where}: {name} is tied to {holder} in shared_params and has a shape of its own"
                )
            continue
        copies = [state.module.get(n) for n in (name, holder)]
        shapes = [c.shape for c in copies if isinstance(c, Tensor)]
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            raise SourceError(f"{where}: {name} {shapes[0]} is tied to {holder} {shapes[1]}")
        out[name] = holder
    return out
