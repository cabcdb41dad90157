"""Masters that DeepSpeed offloaded to NVMe: at stage 3 a raw file of each rank's part of a sub-group.

Law: such a sub-group's tensor is empty in the optimizer file, whatever its dtype, and its attribute `ds_id`
names the raw file in offloaded_tensors/rankR beside it. That begins with the partition; what follows is
padding, or left from an earlier run. Source: deepspeed/runtime/zero/stage3.py (`ds_id`), swap_tensor/
optimizer_utils.py (names, `release_memory`) and engine.py (`save_checkpoint`) of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from ...dtypes import float32
from ...errors import SourceError
from ...extents import File
from ...paths import is_file
from .opening import Opening
from .partitions import Flat, Shape
from .state import ModelState, OptimState


def swapped_in(
    opening: Opening,
    state: ModelState,
    saved: Sequence[OptimState],
    flats: Sequence[Flat],
    paths: Sequence[str],
) -> list[Flat]:
    """The flats, those that are empty in the optimizer files `paths` in their raw files. Raises SourceError
    for one that is not there or too short, and where nothing says its dtype."""
    shapes = state.shapes or ()
    if len(shapes) != len(flats):
        return [*flats]  # is refused where lengths are compared
    held = (flat.dtype for flat in flats if flat.length.any())
    dtype = next(held, float32 if state.fp32_masters else None)
    found = []
    for g, (group, flat) in enumerate(zip(shapes, flats, strict=True)):
        numel = _part(group, flat.world)
        if flat.length.any() or not numel:  # small sub-groups stay in memory
            found.append(flat)
            continue
        where = f"{opening.files.folder}: flat group {g}: its masters were offloaded to NVMe"
        if state.mp_world > 1:
            raise SourceError(f"{where}, which is not read of several model-parallel ranks")
        if dtype is None:
            raise SourceError(f"{where}, and nothing says whether they are fp32: ds_config is not there")
        extents = []
        for rank, (said, path) in enumerate(zip(saved, paths, strict=True)):
            if (own := said.ids[g]) is None or own != saved[0].ids[g]:
                raise SourceError(f"{where}, and {path} says their file is {own}, wanted {saved[0].ids[g]}")
            name = os.path.join("offloaded_tensors", f"rank{rank:02}", f"{own}.tensor.swp")
            raw, nbytes = os.path.join(os.path.dirname(path), name), numel * dtype.itemsize
            extents.append(opening.raw(_file(raw, nbytes, where), nbytes, name))
        length = np.full(flat.world, numel, np.int64)
        found.append(Flat(dtype, np.array(extents, np.int64), length * 0, length))
    return found


def _part(group: Mapping[str, Shape], world: int) -> int:
    """The elements of a sub-group in each rank's partition (`partitions`)."""
    return sum(-(-math.prod(shape) // world) for shape in group.values())


def _file(path: str, nbytes: int, where: str) -> File:
    if not is_file(path):
        raise SourceError(
            f"{where}, to {path}, which is not there; copy it with the rest, or save without NVMe offload"
        )
    file = File.at(path)
    if file.nbytes < nbytes:
        raise SourceError(f"{where}, to {path}, which has {file.nbytes} bytes, wanted {nbytes}")
    return file
