"""Masters of a universal checkpoint, as DeepSpeed's ds_to_universal writes them: zero/NAME/fp32.pt.

Law: a file holds one dense tensor of the parameter's elements, in its shape or (of stage 3) in one axis.
Source: deepspeed/checkpoint/ds_to_universal.py of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

from ...errors import SourceError
from ...paths import is_file
from ...views import dense_strides
from ..torchfile import Tensor
from .files import Files
from .partitions import Shape


def master_file(files: Files, name: str) -> str:
    """Where the master of a parameter lies. Raises SourceError where there is none."""
    if files.universal is None or "/" in name or "\0" in name or name in ("", ".", ".."):
        raise SourceError(f"{files.folder}: {name!r} is no directory of masters")
    path = os.path.join(files.universal, name, "fp32.pt")
    if not is_file(path):
        raise SourceError(f"{path}: missing: the conversion was not finished, or is of another run")
    return path


def master_tensors(root: object) -> list[Tensor]:
    """The tensor of a master's file."""
    found = root.get("param") if isinstance(root, dict) else root
    return [found] if isinstance(found, Tensor) else []


def master(root: object, shape: Shape, where: str) -> Tensor:
    """The master in its parameter's shape. Raises SourceError where it has other elements."""
    found = master_tensors(root)
    if not found or found[0].numel != math.prod(shape):
        got = list(found[0].shape) if found else "no tensor"
        raise SourceError(f"{where}: has {got}, wanted {list(shape)}")
    (t,) = found
    if t.shape == shape:
        return t
    if not t.flat:
        raise SourceError(f"{where}: has {list(t.shape)} of stride {t.stride}, wanted {list(shape)}")
    return replace(t, shape=shape, stride=tuple(dense_strides(shape)))
