"""Reads the files that FSDP's ranks save by themselves: `model_world_size_N_rank_R.pt`, as verl writes them,
and `pytorch_model_fsdp_0_rankR.bin`, accelerate's. The latter do not say of how many, but the parts of each
tensor must fit together and be the whole of it.

Each is a state dict, pickled with the rank's parts of the tensors that were cut (`distributed`) and with
tensors that every rank has whole. Where a run puts them, `steps` says.
Source: verl 0.9.1, verl/utils/checkpoint/fsdp_checkpoint_manager.py; accelerate 1.15,
accelerate/utils/fsdp_utils.py (save_fsdp_model with use_dcp=False).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import JSON, Checkpoint
from ..dtypes import DType
from ..errors import SourceError, naming
from ..extents import Extents
from ..paths import is_directory, is_file, listed
from ..plainjson import read_json
from ..stored import check_tiles, strided
from ..views import View
from . import steps, torchfile
from .assembly import Boxed, assemble
from .distributed import Box, Part, boxes_of, part_of
from .options import Options
from .ranks import check_ranks
from .samples import Agreement
from .torchfile import Tensor, TorchFile, type_name
from .torchtensors import in_one_table, refuse_unread

RECORD = "fsdp_config.json"

_FILE = re.compile(r"model_world_size_(?P<world>\d+)_rank_(\d+)\.pt|pytorch_model_fsdp_0_rank(\d+)\.bin")
_FILES = "*_rank*"


def matches(path: str) -> bool:
    """Whether `path` is a directory with such files, a save, or a run's directory with saves."""
    return is_directory(path) and any(map(_model, _saves(path)))


def read(path: str, options: Options) -> Checkpoint:
    """The model in a save: the last one, or `tag`'s. Raises SourceError."""
    save = steps.chosen(path, options.tag)
    replace(options, tag=None).refuse_zero_only(path)
    if (root := _model(save)) is None:
        raise SourceError(f"{save}: no model_world_size_N_rank_R.pt of a model that is served")
    names = _files(root, options.also)
    files = [torchfile.load(name, check_crc=options.check_crc, wanted=_wanted) for name in names]
    extents, opened = in_one_table(files)
    states = [_state(f) for f in files]
    for rank, state in enumerate(states):
        if odd := sorted({*state} ^ {*states[0]}):
            raise SourceError(f"{root}: only one of ranks 0 and {rank} holds {odd[0]}: of two runs")
    if not states[0]:
        raise SourceError(f"{root}: its ranks hold no tensor")
    same = Agreement(root, options.replicas)
    kinds: dict[str, tuple[DType, tuple[int, ...]]] = {}
    rows: dict[str, NDArray[np.int64]] = {}
    for name in states[0]:
        with naming(f"{root}: {name}, of {len(files)} ranks"):
            kinds[name], found = _placed({rank: state[name] for rank, state in enumerate(states)})
            held = (_Held(b, extents, opened[b.rank].base + b.tensor.storage.extent) for b in found)
            own = _first(name, held, same)
            shape = kinds[name][1]
            if 0 not in shape:
                check_tiles(shape, [(h.box.origin, h.box.size) for h in own])
        table = np.array([h.row() for h in own], np.int64)
        rows[name] = table.reshape(len(own), 3 + 3 * len(shape))
    same.check()
    search = [root, os.path.join(root, steps.HUB), save, os.path.join(save, steps.HUB)]
    aliases = _stored_once(kinds, rows)
    entries = {
        name: Boxed(shape, dtype, extents, rows[name])
        for name, (dtype, shape) in kinds.items()
        if name not in aliases
    }
    facts: dict[str, JSON] = {"ranks": len(files), "boxes": sum(map(len, rows.values()))}
    return assemble(
        path, "fsdp", entries, extents, options, aliases=aliases, files=[f.file for f in files],
        search=search, facts=facts, unread=[*_beside(save, root)],
        inert=[name for f in files for name in f.inert],
        layout=[table.tobytes() for table in rows.values()], headers=[f.digest for f in files],
        replicas=same.replicas,
    )  # fmt: skip


# ---- where the files are ----


def _saves(path: str) -> list[str]:
    """The directories of saves: this one, and those of a run."""
    return [path, *(os.path.join(path, n) for n in steps.saves(path))] if steps.is_run(path) else [path]


def _model(save: str) -> str | None:
    """The directory of the model in a save; None where there is none."""
    held = (d for d in steps.models(save) if any(map(_FILE.fullmatch, listed(d, _FILES))))
    return next(held, None)


def _files(root: str, also: Sequence[str]) -> list[str]:
    """The files of all ranks, in order, here and in further directories. Raises SourceError."""
    found: dict[int, dict[int, str]] = {}  # world size, 0 where the names do not tell -> rank -> file
    for directory in (root, *also):
        for name in listed(directory, _FILES):
            if (m := _FILE.fullmatch(name)) is None:
                continue
            path, rank = os.path.join(directory, name), int(m[2] or m[3])
            earlier = found.setdefault(int(m["world"] or 0), {}).setdefault(rank, path)
            if earlier != path:
                raise SourceError(f"{path}: rank {rank} is in {os.path.dirname(earlier)} too")
    if len(found) != 1:
        raise SourceError(f"{root}: files of world sizes {sorted(found)}: of several runs")
    ((world, ranks),) = found.items()
    world = world or 1 + max(ranks)
    if is_file(record := os.path.join(root, RECORD)):
        said = read_json(record).get("world_size", world)
        if said != world:
            raise SourceError(f"{record}: world_size {said!r}, the files are of {world}")
    return check_ranks(ranks, world, "files", root)


def _beside(save: str, root: str) -> Iterator[str]:
    """What is not read of a save."""
    for what in (
        "optim_world_size_",
        "extra_state_world_size_",
        "optimizer_0_rank",
        "pytorch_model_fsdp_1_rank",
    ):
        if count := len(listed(root, f"{what}*")):
            yield f"{what}*: {count} files of ranks"
    if root != save:
        others = [n for n in listed(save, "*") if _model(os.path.join(save, n)) not in (None, root)]
        yield from (f"{name}: another model" for name in others)


# ---- what a rank holds ----


def _state(file: TorchFile) -> dict[str, Tensor | Part]:
    """The tensors and parts of tensors in a file."""
    where = file.file.path
    if not isinstance(file.root, dict):
        raise SourceError(f"{where}: wanted a state dict, got {type_name(file.root)}")
    out: dict[str, Tensor | Part] = {}
    for name, value in file.root.items():
        with naming(f"{where}: {name}"):
            held = value if isinstance(value, Tensor) else part_of(value)
        if held is None:
            refuse_unread(f"{where}: {name}", value)
        elif not isinstance(name, str):
            raise SourceError(f"{where}: a tensor's name is {name!r}")
        else:
            out[name] = held
    return out


def _wanted(root: object) -> Iterator[Tensor]:
    for value in root.values() if isinstance(root, dict) else ():
        if isinstance(value, Tensor):
            yield value
        elif (part := part_of(value)) is not None:
            yield from part.tensors


def _stored_once(
    kinds: Mapping[str, tuple[DType, tuple[int, ...]]], rows: Mapping[str, NDArray[np.int64]]
) -> dict[str, str]:
    """Tied name -> the first name of the same elements of the same storages, on every rank."""
    first: dict[object, str] = {}
    holders = {n: first.setdefault((kinds[n], t.tobytes()), n) if len(t) else n for n, t in rows.items()}
    return {name: holder for name, holder in holders.items() if holder != name}


def _placed(held: Mapping[int, Tensor | Part]) -> tuple[tuple[DType, tuple[int, ...]], list[Box]]:
    """(dtype and shape, boxes) of a tensor of which that is what each rank holds."""
    whole = {rank: x for rank, x in held.items() if isinstance(x, Tensor)}
    parts = {rank: x for rank, x in held.items() if not isinstance(x, Tensor)}
    if whole and parts:
        raise SourceError(f"whole on rank {min(whole)}, a part of it on rank {min(parts)}")
    tensors = [t for x in held.values() for t in ([x] if isinstance(x, Tensor) else x.tensors)]
    if len({t.dtype for t in tensors}) != 1:
        raise SourceError(f"its ranks hold it in dtypes {sorted({t.dtype.name for t in tensors})}")
    if parts:
        return (tensors[0].dtype, parts[0].shape), [*boxes_of(parts)]
    if len({t.shape for t in tensors}) != 1:
        raise SourceError(f"its ranks hold it whole, in shapes {sorted({t.shape for t in tensors})}")
    none = (0,) * len(tensors[0].shape)
    found = [Box(none, t.shape, rank, t, none) for rank, t in whole.items() if 0 not in t.shape]
    return (tensors[0].dtype, tensors[0].shape), found


@dataclass(frozen=True, slots=True)
class _Held:
    """A box, in the extents of all files; `extent` is its storage's."""

    box: Box
    extents: Extents
    extent: int

    def row(self) -> list[int]:
        """Its row in the table of a view (`views`)."""
        box, t = self.box, self.box.tensor
        return [self.extent, t.dtype.code, self._offset, *box.origin, *box.size, *t.stride]

    def build(self) -> View:
        """Its elements alone."""
        box, t = self.box, self.box.tensor
        return strided(self.extents, self.extent, t.dtype, box.size, offset=self._offset, stride=t.stride)

    @property
    def _offset(self) -> int:
        t = self.box.tensor
        return t.offset + sum(i * s for i, s in zip(self.box.start, t.stride, strict=True))


def _first(name: str, found: Iterable[_Held], same: Agreement) -> list[_Held]:
    """The boxes that no earlier rank holds."""
    out: dict[tuple[tuple[int, ...], tuple[int, ...]], _Held] = {}
    for held in found:
        box = held.box
        earlier = out.setdefault((box.origin, box.size), held)
        if earlier is not held:
            same.add(f"{name}, which ranks {earlier.box.rank} and {box.rank} both hold", earlier, held)
    return [*out.values()]
