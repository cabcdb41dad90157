"""What people do today, on the same bytes: DeepSpeed's converter, torch's, eager, with care, safetensors.

Plain torch, written the way one would; none of it imports fastckpt.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from safetensors.torch import save_file

Shard = dict[str, torch.Tensor]
Styles = Mapping[str, int | None]
"""Name pattern (a regular expression) -> the axis that is cut, None for a replica; the first match counts."""

LLAMA: Styles = {
    r"(q|k|v|gate|up)_proj|embed_tokens|lm_head": 0,
    r"(o|down)_proj": 1,
    r".": None,
}
WHOLE: Styles = {r".": None}


def axis_of(name: str, styles: Styles) -> int | None:
    return next(axis for pattern, axis in styles.items() if re.search(pattern, name))


def slice_of(whole: torch.Tensor, axis: int | None, rank: int, tp: int) -> torch.Tensor:
    """A rank's part, as a view."""
    if axis is None:
        return whole
    n = whole.shape[axis] // tp
    return whole.narrow(axis, rank * n, n)


def split(whole: Shard, out: str, tp: int, styles: Styles) -> None:
    """Tensors by name to one bf16 safetensors file a rank."""
    os.makedirs(out)
    for rank in range(tp):
        shard = {
            name: slice_of(t, axis_of(name, styles), rank, tp).to(torch.bfloat16).contiguous()
            for name, t in whole.items()
        }
        save_file(shard, os.path.join(out, f"rank-{rank}.safetensors"))


def split_files(folder: str, out: str, tp: int, styles: Styles) -> None:
    """A directory of fp32 `.bin` files, likewise."""
    whole: Shard = {}
    for path in sorted(glob.glob(os.path.join(folder, "pytorch_model*.bin"))):
        whole |= torch.load(path)
    split(whole, out, tp, styles)


def split_in_memory(checkpoint: str, out: str, tp: int, styles: Styles) -> None:
    """A ZeRO checkpoint, likewise, without a file in between: one fp32 tensor is held at a time."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    lazy = get_fp32_state_dict_from_zero_checkpoint(checkpoint, lazy_mode=True)
    split({name: t.contiguous().to(torch.bfloat16) for name, t in lazy.items()}, out, tp, styles)


def zero_to_fp32(checkpoint: str, out: str) -> None:
    """DeepSpeed's converter, in process."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(checkpoint, out)


def dcp_to_torch_save(checkpoint: str, out: str) -> None:
    """torch's converter of torch.distributed.checkpoint's saves, in process."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    os.makedirs(out)
    dcp_to_torch_save(checkpoint, os.path.join(out, "pytorch_model.bin"))


def convert_and_split(
    convert: Callable[[str, str], None], checkpoint: str, out: str, tp: int, styles: Styles
) -> None:
    """A converter's whole model, which is left beside `out`, then `split_files`."""
    convert(checkpoint, f"{out}-whole")
    split_files(f"{out}-whole", out, tp, styles)


SPLITS: Mapping[str, Callable[[str, str, int, Styles], None]] = {
    "zero_to_fp32 + torch split": partial(convert_and_split, zero_to_fp32),
    "get_fp32_state_dict_from_zero_checkpoint + torch split": split_in_memory,
    "dcp_to_torch_save + torch split": partial(convert_and_split, dcp_to_torch_save),
}
"""Today's roads from a checkpoint to bf16 files, one a rank: (checkpoint, out, tp, styles)."""


def partitions(checkpoint: str) -> tuple[list[torch.Tensor], dict[str, torch.Size]]:
    """Each rank's flat fp32 group, mapped, and the parameters' shapes in its order (ZeRO-3, one group)."""
    with open(os.path.join(checkpoint, "latest")) as f:
        folder = os.path.join(checkpoint, f.read().strip())
    files = sorted(glob.glob(os.path.join(folder, "*_optim_states.pt")))
    loaded = [torch.load(f, map_location="cpu", mmap=True, weights_only=False) for f in files]
    flats = [state["optimizer_state_dict"]["fp32_flat_groups"][0] for state in loaded]
    (model, *_) = sorted(glob.glob(os.path.join(folder, "*_model_states.pt")))
    (shapes,) = torch.load(model, map_location="cpu", mmap=True, weights_only=False)["param_shapes"]
    return flats, shapes


def pieces(
    flats: list[torch.Tensor], shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, torch.Size, list[torch.Tensor]]]:
    """Every parameter and its rank's pieces, the last ones padded."""
    at = 0
    for name, shape in shapes.items():
        n = -(-math.prod(shape) // len(flats))
        yield name, shape, [flat.narrow(0, at, n) for flat in flats]
        at += n


def eager(checkpoint: str, tp: int, styles: Styles) -> list[Shard]:
    """Map, cat, cast, cut: fresh tensors at every step."""
    out: list[Shard] = [{} for _ in range(tp)]
    for name, shape, parts in pieces(*partitions(checkpoint)):
        whole = torch.cat(parts).narrow(0, 0, math.prod(shape)).view(shape).to(torch.bfloat16)
        axis = axis_of(name, styles)
        for rank in range(tp):
            out[rank][name] = slice_of(whole, axis, rank, tp).clone()
    return out


def careful(checkpoint: str, tp: int, styles: Styles, out: list[Shard], reused: torch.Tensor) -> None:
    """The same by copy_ alone: cast into one reused bf16 buffer, then into tensors that exist."""
    for name, shape, parts in pieces(*partitions(checkpoint)):
        at = 0
        for part in parts:
            reused.narrow(0, at, part.numel()).copy_(part)
            at += part.numel()
        whole = reused.narrow(0, 0, math.prod(shape)).view(shape)
        axis = axis_of(name, styles)
        for rank in range(tp):
            out[rank][name].copy_(slice_of(whole, axis, rank, tp))


def save(shards: Iterable[Shard], out: str) -> None:
    """safetensors' save_file of tensors that are there already."""
    os.makedirs(out)
    for rank, shard in enumerate(shards):
        save_file(shard, os.path.join(out, f"rank-{rank}.safetensors"))
