"""The files of a sharded checkpoint: one file, an index and what it lists, or a directory of files.

Law: an index names files of its own directory only; every tensor lies in the one file the index says, and
no file of the set that it lists holds a tensor it does not name.
(A file there may be a symbolic link, as in the hub's cache.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint import JSON
from ..errors import SourceError
from ..paths import inside, is_directory, is_file
from ..plainjson import read_json
from .options import Options
from .ranks import natural

_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)(\D*)")
"""A file of a numbered set, as save_pretrained names them: stem, number, count, ending."""

_BESIDE_WEIGHTS = re.compile(r"(training_args|(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?)\.bin")
"""What transformers' Trainer (trainer.py) and accelerate (utils/constants.py) put beside the weights."""


@dataclass(frozen=True, slots=True)
class Shards:
    """`paths`: the files in order. `index`: tensor -> file name, None without an index. `directory`: where
    config.json may lie. `unread`: files of the same kind that were left alone, and why. `omitted`: those of
    them that carry a number of the index's own set. `total`: what the index's `total_size` says."""

    paths: tuple[str, ...]
    index: Mapping[str, str] | None
    directory: str
    unread: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()
    total: JSON = None

    def check(self, names: Sequence[Sequence[str]]) -> None:
        """`names`: the tensors of each file. Raises SourceError when a name is in two files, and when the
        index and the files disagree."""
        held: dict[str, str] = {}
        for path, tensors in zip(self.paths, names, strict=True):
            for name in tensors:
                if name in held:
                    raise SourceError(
                        f"{path}: {name} is also in {held[name]}; shards that another program cut are opened "
                        "by open_shards (--cut-as)"
                    )
                held[name] = path
        for name, file in (self.index or {}).items():
            if os.path.basename(held.get(name, "")) != file:
                raise SourceError(
                    f"{self.directory}: the index says {name} is in {file}; " + (
                        f"it is in {held[name]}" if name in held else "it is in no file"
                    )
                )  # fmt: skip
        if self.index is not None:
            extra = next((n for n in held if n not in self.index), None)
            if extra is not None:
                raise SourceError(f"{held[extra]}: the index does not name {extra}")

    def check_omitted(self, names_in: Callable[[str], Sequence[str]]) -> None:
        """Raises SourceError where a file of the index's own set, which the index does not name, holds a
        tensor that would be lost; `names_in`: the tensors of a file."""
        for path in self.omitted:
            lost = [n for n in names_in(path) if n not in (self.index or {})]
            if lost:
                raise SourceError(
                    f"{path}: is of the set that the index lists, but the index names neither it nor "
                    f"{lost[0]} ({len(lost)} tensors would be left out)"
                )


def find_shards(path: str, suffix: str, single: str, options: Options) -> Shards:
    """The shards in `path`: a file, an index file, or a directory. `single`: the name of an unsharded one.

    In a directory an index or `single` goes before all files that end in `suffix` but those that trainers put
    beside the weights. Raises SourceError where both are there, as save_pretrained leaves them after a save
    in one file and another in several."""
    if not is_directory(path):
        directory = os.path.dirname(os.path.abspath(path))
        if path.endswith(".index.json"):
            return _indexed(path, [directory, *options.also])
        options.refuse_also(path)
        return Shards((path,), None, directory)
    names = sorted(os.listdir(path), key=natural)
    files = [n for n in names if n.endswith(suffix)]
    indexes = [n for n in names if n.endswith(suffix + ".index.json")]
    if single + ".index.json" in indexes:
        indexes = [single + ".index.json"]
    if len(indexes) > 1:
        raise SourceError(f"{path}: several indexes: {', '.join(indexes)}; open the one that is meant")
    if indexes:
        found = _indexed(os.path.join(path, indexes[0]), [path, *options.also])
        if single in files and single not in map(os.path.basename, found.paths):
            raise SourceError(
                f"{path}: {single} lies beside the files of {indexes[0]}: transformers loads the one, vLLM "
                "the others; open the one that is meant"
            )
    elif single in files:
        options.refuse_also(os.path.join(path, single))
        found = Shards((os.path.join(path, single),), None, path)
    else:
        there = (path, *options.also)
        found = Shards(tuple(os.path.join(d, n) for d in there for n in _of(d, suffix)), None, path)
    used = {os.path.basename(p) for p in found.paths}
    if not indexes:
        _check_whole(path, used)
    meant = indexes[0] if indexes else single if single in used else "the weights"
    rest = tuple(f"{n}: not a part of {meant}" for n in files if n not in used)
    return replace(found, directory=path, unread=rest)


def _set_of(name: str) -> tuple[str, str, str] | None:
    """The numbered set that a file belongs to: stem, count, ending."""
    found = _NUMBERED.fullmatch(name)
    return (found[1], found[3], found[4]) if found else None


def _check_whole(path: str, used: set[str]) -> None:
    """Refuse a part of a numbered set without an index: what the others hold would be left out."""
    sets: dict[tuple[str, str, str], set[int]] = {}
    for name in used:
        if (found := _NUMBERED.fullmatch(name)) and (whole := _set_of(name)):
            sets.setdefault(whole, set()).add(int(found[2]))
    for (stem, count, ending), numbers in sets.items():
        if len(numbers) < int(count):
            raise SourceError(
                f"{path}: {stem}-*-of-{count}{ending}: only {len(numbers)} of the set are there "
                f"({', '.join(map(str, sorted(numbers)[:8]))}); what the others hold would be left out"
            )


def _of(directory: str, suffix: str) -> list[str]:
    """The files of a directory that may hold weights."""
    there = (n for n in os.listdir(directory) if n.endswith(suffix))
    return sorted((n for n in there if not _BESIDE_WEIGHTS.fullmatch(n)), key=natural)


def _indexed(index: str, directories: Sequence[str]) -> Shards:
    body = read_json(index)
    weight_map, told = body.get("weight_map"), body.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: no weight_map, or an empty one")
    placed: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not inside(file) or "/" in file:
            raise SourceError(f"{index}: {name} is in {file!r}, which is no file name of this directory")
        placed[name] = file
    paths = []
    for file in sorted(set(placed.values()), key=natural):
        there = [os.path.join(d, file) for d in directories if is_file(os.path.join(d, file))]
        if not there:
            raise SourceError(f"{index}: {file} is missing in {', '.join(directories)}")
        paths.append(there[0])
    here = os.path.dirname(os.path.abspath(index))
    sets = {_set_of(file) for file in placed.values()} - {None}
    there = sorted({*os.listdir(here)} - {*placed.values()}, key=natural)
    omitted = tuple(os.path.join(here, name) for name in there if _set_of(name) in sets)
    total = told.get("total_size") if isinstance(told, dict) else None
    return Shards(tuple(paths), placed, here, omitted=omitted, total=total)
