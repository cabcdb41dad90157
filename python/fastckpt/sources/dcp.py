"""Reads what torch.distributed.checkpoint (DCP) wrote: the shards of FSDP, of tensor parallelism, of both.

Law: `.metadata` says which box of which tensor lies at which bytes of which file; each box of a tensor that
is wanted is opened to find its storage, and the boxes of a tensor tile it. Optimizer state is not opened.

Source of the format: torch/distributed/checkpoint/metadata.py, filesystem.py and _nested_dict.py of torch
2.13: a pickle of dataclasses, and files that are torch files one after another, one for each box.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..dtypes import DType
from ..errors import SourceError, naming
from ..extents import Extent, Extents, File
from ..paths import is_directory, is_file, listed
from . import torchfile
from .assembly import WRAPPERS, Boxed, assemble
from .dcp_metadata import Metadata, Sizes, metadata
from .options import Options
from .torchfile import Reader, Tensor, type_name

NAME = ".metadata"
SUFFIX = ".distcp"
TRAINERS = ("pytorch_model_fsdp_0", "model_and_optim")
"""The directory in which accelerate and the Hugging Face Trainer put the model; that of OLMo-core."""

OPTIMIZERS = frozenset(
    {"optim", "optims", "optimizer", "optimizers", "optim_state_dict", "optimizer_state_dict"}
)
"""Keys under which trainers put the state of an optimizer."""


def matches(path: str) -> bool:
    """Whether `path` is a directory of a DCP save, or of a trainer with one in it."""
    return is_directory(path) and _directory(path) is not None


def read(path: str, options: Options) -> Checkpoint:
    """The model in a DCP save. Raises SourceError for what is missing, contradicts itself, or is no model."""
    options.refuse_zero_only(path)
    root = _directory(path) or path
    where = os.path.join(root, NAME)
    if not is_file(where):
        raise SourceError(
            f"{root}: a torch distributed checkpoint without {NAME}: not finished, or a part of one"
        )
    if is_file(f"{where}.tmp"):
        raise SourceError(f"{where}.tmp: a save over this one was interrupted: {NAME} is of the one before")
    with naming(where):
        found = metadata(where, nbytes(root))
        prefix, names = _model(found)
    extents, rows, digests, files = located(found, names.values(), (root, *options.also), options.check_crc)
    table = Extents(extents)
    search = [root, os.path.dirname(os.path.abspath(root))]
    entries = {
        name: Boxed(found.tensors[key].shape, found.tensors[key].dtype, table, rows[key])
        for name, key in names.items()
    }
    model = {*names.values()}
    rest = Counter(path[0] for key, path in found.paths.items() if key not in model)
    return assemble(
        path, "dcp", entries, table, options, files=files, search=search,
        facts={"state dict": ".".join(prefix) or "at the top", "boxes": len(extents)},
        notes=later(where, files),
        unread=[f"{key}: {count} values beside the state dict" for key, count in sorted(rest.items())]
        + [f"{name}: another model" for name in _others(path, root)],
        layout=[row.tobytes() for row in rows.values()], headers=[found.digest, *digests],
    )  # fmt: skip


def later(where: str, files: Sequence[File]) -> list[str]:
    """What to know of files that were written after `.metadata`, which a save writes last."""
    written = os.stat(where).st_mtime_ns
    after = [file.path for file in files if os.stat(file.path).st_mtime_ns > written]
    if not after:
        return []
    return [
        f"{len(after)} of {len(files)} files were written after {NAME}, such as "
        f"{os.path.basename(after[0])}: unless the save was copied, one over it was interrupted, and "
        "tensors are of two steps"
    ]


def _directory(path: str) -> str | None:
    """Where the save lies: here, or where trainers put it."""
    for root in (path, *(os.path.join(path, name) for name in TRAINERS)):
        try:
            inside = os.listdir(root)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if NAME in inside or any(n.endswith(SUFFIX) for n in inside):
            return root
    return None


def _others(path: str, root: str) -> list[str]:
    """The further models that accelerate saved beside the first."""
    stem = TRAINERS[0].rstrip("0")
    return [n for n in listed(path, f"{stem}*") if n != os.path.basename(root)] if root != path else []


def _model(found: Metadata) -> tuple[tuple[str, ...], dict[str, str]]:
    """(the path of the model's state dict, name -> key of its tensors).

    A state dict lies under one of WRAPPERS; where none does, all that is no optimizer's is one."""
    inside: dict[tuple[str, ...], dict[str, str]] = {}
    for key in found.tensors:
        path = found.paths[key]
        if OPTIMIZERS.intersection(path[:-1]):
            continue
        cut = next((k + 1 for k, part in enumerate(path[:-1]) if part in WRAPPERS), 0)
        name, table = ".".join(path[cut:]), inside.setdefault(path[:cut], {})
        if name in table:
            raise SourceError(f"{key} and {table[name]} would both be {name}")
        table[name] = key
    nested = [prefix for prefix in inside if prefix]
    if len(nested) > 1:
        shown = ", ".join(".".join(prefix) for prefix in nested)
        raise SourceError(f"several state dicts of models: {shown}; save the one to serve by itself")
    if not inside:
        keys = ", ".join(sorted({path[0] for path in found.paths.values()})[:8])
        raise SourceError(f"no tensors of a model; at the top: {keys or 'nothing'}")
    prefix = nested[0] if nested else ()
    return prefix, inside[prefix]


def nbytes(root: str) -> int:
    """What a save's files have in all."""
    return sum(entry.stat().st_size for entry in os.scandir(root) if entry.is_file())


# ---- the boxes ----


def located(
    found: Metadata, keys: Iterable[str], directories: Sequence[str], check_crc: bool
) -> tuple[list[Extent], dict[str, NDArray[np.int64]], list[str], list[File]]:
    """The extent of each box, in file order; the fragments of each tensor, [extent, stored, offset, origin,
    size, stride]; the digests of the boxes' headers; the files."""
    wanted: dict[str, list[tuple[int, int, str, Sizes, Sizes]]] = {}
    rows: dict[str, list[list[int]]] = {}
    for key in keys:
        rows[key] = []
        for at, size in found.tensors[key].boxes:
            place = found.places.get((key, at))
            if place is None:
                raise SourceError(f"{directories[0]}: {NAME} does not say where {key} at {at} is")
            wanted.setdefault(place.file, []).append((place.offset, place.nbytes, key, at, size))
    extents: list[Extent] = []
    digests, files = [], []
    known = torchfile.Known()
    for name in sorted(wanted):
        file = File.at(_file(name, directories))
        files.append(file)
        with Reader(file) as reader:
            for offset, nbytes, key, at, size in sorted(wanted[name]):
                dtype = found.tensors[key].dtype
                with naming(f"{file.path}: {key} at {at}"):
                    blob = torchfile.embedded(reader, offset, nbytes, check_crc=check_crc, known=known)
                    t = _tensor(blob.root, dtype, size)
                where = blob.extents[t.storage.extent]
                rows[key].append([len(extents), dtype.code, t.offset, *at, *size, *t.stride])
                extents.append(Extent(file, where.offset, where.nbytes, f"{key}@{','.join(map(str, at))}"))
                digests.append(blob.digest)
        if file.nbytes != found.files[name]:
            raise SourceError(
                f"{file.path}: has {file.nbytes} bytes, {NAME} says {found.files[name]}: cut short, or of "
                "another save"
            )
    width = {key: 3 + 3 * len(found.tensors[key].shape) for key in rows}
    tables = {key: np.array(r, np.int64).reshape(len(r), width[key]) for key, r in rows.items()}
    return extents, tables, digests, files


def _file(name: str, directories: Sequence[str]) -> str:
    for directory in directories:
        if is_file(path := os.path.join(directory, name)):
            return path
    raise SourceError(f"{directories[0]}: {NAME} names {name}, which is missing in {', '.join(directories)}")


def _tensor(root: object, dtype: DType, size: Sizes) -> Tensor:
    if not isinstance(root, Tensor):
        raise SourceError(f"wanted a tensor, got {type_name(root)}")
    if root.dtype is not dtype or root.shape != size:
        raise SourceError(f"holds {root.dtype}{list(root.shape)}; {NAME} says {dtype}{list(size)}")
    return root
