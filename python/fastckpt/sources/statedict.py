"""Reads PyTorch state dicts (.bin, .pt, .pth): a file, a sharded directory with its index. Never executed.

Law: a file is a flat dict of tensors, or one of the usual wrapper keys leads to exactly one such dict, at the
top or one key below it (Composer's `state`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoint import Checkpoint, Entry
from ..errors import SourceError
from ..paths import is_directory, listed
from . import torchfile
from .assembly import WRAPPERS, assemble
from .options import Options
from .shards import find_shards
from .torchfile import Inert, Tensor, type_name
from .torchtensors import by_storage, in_one_table, places, refuse_unread

SUFFIX = ".bin"
SINGLE = "pytorch_model.bin"


@dataclass(frozen=True, slots=True, eq=False)
class StateDict:
    """The tensors of one file by name, and in `rest` a note on everything else in it."""

    tensors: dict[str, Tensor]
    rest: tuple[str, ...]


def matches(path: str) -> bool:
    """Whether `path` is a torch file, an index of such, or a directory that holds pytorch_model*.bin."""
    if is_directory(path):
        return bool(listed(path, "pytorch_model*.bin*"))
    return path.endswith(SUFFIX + ".index.json") or torchfile.is_torch_file(path)


def read(path: str, options: Options) -> Checkpoint:
    """The checkpoint in a file or directory. Raises SourceError."""
    options.refuse_zero_only(path)
    shards = find_shards(path, SUFFIX, SINGLE, options)
    files = [torchfile.load(p, check_crc=options.check_crc, wanted=tensors_in) for p in shards.paths]
    dicts = [state_dict(f.root) for f in files]
    shards.check([list(d.tensors) for d in dicts])
    shards.check_omitted(lambda p: list(state_dict(torchfile.load(p, wanted=tensors_in).root).tensors))
    extents, opened = in_one_table(files)
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    for o, d in zip(opened, dicts, strict=True):
        tied = by_storage(d.tensors)
        aliases |= tied
        entries |= {n: o.entry(t, extents) for n, t in d.tensors.items() if n not in tied}
    return assemble(
        path, "statedict", entries, extents, options, aliases=aliases, files=[f.file for f in files],
        search=[shards.directory],
        unread=[*shards.unread, *(note for d in dicts for note in d.rest)],
        inert=[n for f in files for n in f.inert], layout=[places(d.tensors.values()) for d in dicts],
        headers=[f.digest for f in files],
    )  # fmt: skip


def state_dict(root: object) -> StateDict:
    """The flat dict of tensors in a parsed file. Raises SourceError listing the keys where there is none or
    several."""
    if not isinstance(root, dict):
        raise SourceError(f"wanted a dict of tensors, got {type_name(root)}")
    if not root or _has_tensors(root):
        if any(_has_tensors(v) and not str(k).endswith("_extra_state") for k, v in root.items()):
            raise SourceError(f"tensors beside dicts of tensors; keys: {_keys(root)}")
        return _flat(root)
    if "param_shapes" in root or {"optimizer_state_dict", "ds_version"} <= root.keys():
        raise SourceError("one file of a DeepSpeed checkpoint; open its directory")
    inner = _wrapped(root) or {
        (key, *path): table for key, value in root.items() for path, table in _wrapped(value).items()
    }
    if not inner:
        for table in (root, *(v for v in (root.get(k) for k in WRAPPERS) if isinstance(v, dict))):
            for name, value in table.items():
                if isinstance(value, Inert):
                    refuse_unread(str(name), value)
    if len(inner) != 1:
        shown = ", ".join(".".join(map(str, path)) for path in inner)
        what = f"several dicts of tensors: {shown}" if inner else "no dict of tensors"
        raise SourceError(
            f"{what}; looked at the top and under {', '.join(WRAPPERS)}; keys: {_keys(root)}; a dict that "
            "torch.load gives can be opened in place of the file"
        )
    ((path, table),) = inner.items()
    found, beside, at = _flat(table), [], root
    for key in path:
        beside += [f"{k}: beside the state dict" for k in at if k != key]
        at = at[key]
    return StateDict(found.tensors, (*found.rest, *beside))


def tensors_in(root: object) -> Iterable[Tensor]:
    """The tensors of a file that holds a state dict. Raises as `state_dict`."""
    return state_dict(root).tensors.values()


def _wrapped(value: object) -> dict[tuple[object, ...], dict[object, object]]:
    """The dicts of tensors under WRAPPERS, by (key,)."""
    held = ((k, value.get(k)) for k in WRAPPERS) if isinstance(value, dict) else ()
    return {(k,): table for k, table in held if isinstance(table, dict) and _has_tensors(table)}


def _flat(table: dict[object, object]) -> StateDict:
    tensors, rest = {}, []
    for name, value in table.items():
        if not isinstance(value, Tensor):
            refuse_unread(str(name), value)
            rest.append(f"{name}: no tensor")
        elif not isinstance(name, str):
            raise SourceError(f"a tensor has the name {name!r}, which is no string")
        else:
            tensors[name] = value
    return StateDict(tensors, tuple(rest))


def _has_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values())


def _keys(table: dict[object, object]) -> str:
    return ", ".join(str(k)[:40] for k in list(table)[:20]) + (", ..." if len(table) > 20 else "")
