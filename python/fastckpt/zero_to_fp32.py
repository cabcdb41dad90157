"""DeepSpeed's `deepspeed.utils.zero_to_fp32` by its own names, arguments and results: change one import.

    from fastckpt.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

What differs, on purpose: no byte of the checkpoint is executed and deepspeed need not be there; errors are
FastckptError; tied weights can be written as safetensors (one name, as the hub does); frozen parameters of
stage 1 are kept, and all of them are fp32 in memory too, as in DeepSpeed's files. The output directory is
made real in one step, with a manifest beside the weights: it must be new, empty, or hold nothing but an
earlier output of this package, which is replaced. Where DeepSpeed would write among other files, this
refuses. Options that a message names and these functions lack are those of `fastckpt.consolidate` and
`fastckpt.open`.

Law: nothing is computed here; every function is `consolidate` or `load_into` with DeepSpeed's defaults.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import road
from .checkpoint import Checkpoint, Entry
from .dtypes import float32
from .errors import FastckptError, WriteError
from .output.manifest import NAME, Manifest
from .sources import open as open_checkpoint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is gathered when `contiguous` is called, as DeepSpeed's GatheredTensor.

    `shape` and `dtype` are torch's and those of the gathered tensor."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    source: Checkpoint

    def contiguous(self) -> torch.Tensor:
        """The tensor, gathered anew at each call. Raises SourceError when its files have changed."""
        return road.reshard(self.source, layout="same", dtype=float32, rank=0)[self.name]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, torch.Tensor] | dict[str, LazyTensor]:
    """The fp32 state dict of a ZeRO checkpoint: buffers, frozen, trainable, tied names, in this order.

    `lazy_mode`: values are gathered one by one by their `contiguous()`; tied names share one value. Raises
    SourceError where the checkpoint is incomplete or broken."""
    if lazy_mode:
        ckpt = open_checkpoint(checkpoint_dir, tag=tag, exclude_frozen=exclude_frozen_parameters)
        lazy = {name: _lazy(ckpt, name, entry) for name, entry in ckpt.entries.items()}
        return lazy | {alias: lazy[holder] for alias, holder in ckpt.aliases.items()}
    state = road.consolidate(checkpoint_dir, tag=tag, exclude_frozen=exclude_frozen_parameters)
    assert isinstance(state, dict)  # no `out`
    return state


def _lazy(ckpt: Checkpoint, name: str, entry: Entry) -> LazyTensor:
    import torch

    from .running.tensors import torch_dtype

    alone = replace(ckpt, entries={name: entry}, aliases={}, structure="")  # a plan a tensor is not kept
    dtype = float32 if entry.dtype.kind == "float" else entry.dtype
    return LazyTensor(name, torch.Size(entry.shape), torch_dtype(dtype), alone)


def convert_zero_checkpoint_to_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    dtype: str | torch.dtype = "float32",
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the state dict to `output_dir` under DeepSpeed's file names, floats cast to `dtype`.

    `max_shard_size`: bytes of one file at most ("5GB"), None for a single file. Raises FastckptError; then
    nothing is written."""
    road.consolidate(
        checkpoint_dir,
        output_dir,
        tag=tag,
        exclude_frozen=exclude_frozen_parameters,
        safe_serialization=safe_serialization,
        max_shard_size=max_shard_size,
        dtype=str(dtype),
        overwrite=_replaces(os.fspath(output_dir)),
    )


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """`convert_zero_checkpoint_to_state_dict` in fp32."""
    convert_zero_checkpoint_to_state_dict(
        checkpoint_dir,
        output_dir,
        "float32",
        max_shard_size,
        safe_serialization,
        tag,
        exclude_frozen_parameters,
    )


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> torch.nn.Module:
    """Move the model to the CPU and fill it from the masters; returns it. No second copy of it is made.

    As with DeepSpeed, names that only one side has are left alone; a shape that differs is an error."""
    return road.load_into(model.cpu(), open_checkpoint(checkpoint_dir, tag=tag), strict=False)


def _replaces(path: str) -> bool:
    """Whether an earlier output of this package is there. Raises WriteError where anything else is."""
    found = {
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in names
    }
    if not found:
        return False
    with suppress(FastckptError):  # then none of it is
        found -= {*Manifest.read(os.path.join(path, NAME)).all_files(), NAME}
    if found:
        raise WriteError(f"{path}: not empty, {min(found)} is of no earlier output; name a new directory")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The script's own command line; returns the exit code (0 ok, else that of the error)."""
    parser = argparse.ArgumentParser(
        prog="python -m fastckpt.zero_to_fp32",
        description="A ZeRO checkpoint's fp32 weights as one state dict.",
    )
    parser.add_argument("checkpoint_dir", help="the directory that holds the tag's folder and `latest`")
    parser.add_argument("output_dir", help="new, empty, or holding only an earlier output of this command")
    parser.add_argument("--max_shard_size", default="5GB", help="bytes of one file at most (default: 5GB)")
    parser.add_argument("--safe_serialization", action="store_true", help="safetensors, not .bin files")
    parser.add_argument("-t", "--tag", help="the checkpoint's tag (default: what `latest` says)")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave them out")
    parser.add_argument("-d", "--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        convert_zero_checkpoint_to_fp32_state_dict(
            args.checkpoint_dir,
            args.output_dir,
            max_shard_size=args.max_shard_size,
            safe_serialization=args.safe_serialization,
            tag=args.tag,
            exclude_frozen_parameters=args.exclude_frozen_parameters,
        )
    except FastckptError as e:
        if args.debug:
            raise
        print(f"zero_to_fp32: error: {e}", file=sys.stderr)
        if not isinstance(e, WriteError):
            print("zero_to_fp32: `fastckpt consolidate` has more options, such as --also", file=sys.stderr)
        return e.exit_code
    except (OSError, MemoryError) as e:
        if args.debug:
            raise
        print(f"zero_to_fp32: error: {str(e) or 'out of memory'}", file=sys.stderr)
        return WriteError.exit_code
    except KeyboardInterrupt:
        print("zero_to_fp32: interrupted, nothing half made was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
