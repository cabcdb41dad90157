"""What a checkpoint holds, as text and as JSON.

Law: nothing here reads a tensor byte; figures come from headers and entries.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .. import recipes
from ..checkpoint import JSON, Checkpoint, Entry
from ..errors import RecipeError, expect
from ..opening import open as open_checkpoint
from .losses import Loss
from .losses import read as losses_of
from .losses import text as losses_text
from .text import columns, cut, size, some, spelled


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint as its headers tell it.

    `dtypes`: name -> (tensors, bytes). `parameters`, `frozen`, `buffers`: names by kind; `tied`: tied name ->
    holder. `biggest`: (name, dtype, shape, bytes), largest first. `files`: (path, bytes) of every file.
    `family`: the recipe's name where one recognises names and shapes, else None and `family_note` says why.
    `nbytes`: bytes of all tensors, tied ones once. `losses`: what quantising cost, where the output says."""

    path: str
    format: str
    facts: Mapping[str, JSON]
    tensors: int
    elements: int
    nbytes: int
    dtypes: Mapping[str, tuple[int, int]]
    parameters: tuple[str, ...]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]
    tied: Mapping[str, str]
    biggest: tuple[tuple[str, str, tuple[int, ...], int], ...]
    files: tuple[tuple[str, int], ...]
    config: str | None
    family: str | None
    family_note: str
    beside: tuple[str, ...]
    unread: tuple[str, ...]
    inert: tuple[str, ...]
    structure: str
    headers: str
    losses: tuple[Loss, ...] = ()

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(n for _, n in self.files)

    def text(self) -> str:
        """The inspection for people; long lists are cut, JSON has them whole."""
        lines = [f"{self.path}: {self.format}"]
        tables = {k: v for k, v in self.facts.items() if _is_table(v)}
        scalars = [(k, cut(spelled(v))) for k, v in self.facts.items() if k not in tables]
        scalars += [
            ("tensors", f"{self.tensors} ({self.elements:,} elements, {size(self.nbytes)})"),
            ("files", f"{len(self.files)} ({size(self.file_bytes)})"),
            ("config", self.config or "none beside"),
            ("family", self.family or f"none: {self.family_note}"),
        ]
        lines += columns(scalars)
        for key, rows in tables.items():
            lines += [key, *columns(_table_rows(rows))]
        lines += ["dtypes", *columns([(d, str(n), size(b)) for d, (n, b) in self.dtypes.items()])]
        lines += some("parameters", self.parameters)
        lines += some("frozen", self.frozen)
        lines += some("buffers", self.buffers)
        lines += some("tied", [f"{a} = {b}" for a, b in self.tied.items()])
        lines += ["biggest", *columns([(n, d, str(list(s)), size(b)) for n, d, s, b in self.biggest])]
        lines += losses_text(self.losses)
        lines += some("left unread", self.unread)
        lines += some("inert records (named by a pickle, never called)", self.inert)
        lines += some("goes with the weights", [os.path.basename(p) for p in self.beside])
        return "\n".join(lines)

    def json(self) -> dict[str, JSON]:
        """All of it as JSON values."""
        return {
            "path": self.path,
            "format": self.format,
            "facts": dict(self.facts),
            "tensors": self.tensors,
            "elements": self.elements,
            "bytes": self.nbytes,
            "dtypes": {d: {"tensors": n, "bytes": b} for d, (n, b) in self.dtypes.items()},
            "parameters": [*self.parameters],
            "frozen": [*self.frozen],
            "buffers": [*self.buffers],
            "tied": dict(self.tied),
            "biggest": [{"name": n, "dtype": d, "shape": [*s], "bytes": b} for n, d, s, b in self.biggest],
            "files": [{"path": p, "bytes": n} for p, n in self.files],
            "file_bytes": self.file_bytes,
            "config": self.config,
            "family": self.family,
            "family_note": self.family_note,
            "beside": [*self.beside],
            "unread": [*self.unread],
            "inert": [*self.inert],
            "structure": self.structure,
            "headers": self.headers,
            "losses": [x.json() for x in self.losses],
        }


def inspect(
    path: str | os.PathLike[str] | Checkpoint, *, recipe: str | None = None, biggest: int = 10
) -> Inspection:
    """What a checkpoint holds, from its headers: a path, or what `open` gave with options of its own.

    `biggest`: how many of the largest tensors to name. Raises SourceError as `open` does."""
    expect("biggest", biggest, int)
    ckpt = path if isinstance(path, Checkpoint) else open_checkpoint(path, recipe=recipe)
    count: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for entry in ckpt.entries.values():
        count[entry.dtype.name] += 1
        held[entry.dtype.name] += _nbytes(entry)
    large = heapq.nlargest(biggest, ckpt.entries.items(), key=lambda item: _nbytes(item[1]))
    family, note = _family(ckpt, recipe)
    beside = tuple(f.path for f in ckpt.beside)
    return Inspection(
        path=ckpt.path,
        format=ckpt.format,
        facts=_facts(ckpt),
        tensors=len(ckpt.entries),
        elements=sum(math.prod(e.shape) for e in ckpt.entries.values()),
        nbytes=sum(held.values()),
        dtypes={d: (count[d], held[d]) for d in sorted(count)},
        parameters=_of_kind(ckpt, "parameter"),
        frozen=_of_kind(ckpt, "frozen"),
        buffers=_of_kind(ckpt, "buffer"),
        tied=dict(ckpt.aliases),
        biggest=tuple((n, e.dtype.name, e.shape, _nbytes(e)) for n, e in large),
        files=tuple((f.path, f.nbytes) for f in ckpt.files),
        config=None if ckpt.config_file is None else ckpt.config_file.path,
        family=family,
        family_note=note,
        beside=beside,
        unread=ckpt.unread,
        inert=ckpt.inert,
        structure=ckpt.structure,
        headers=ckpt.headers,
        losses=losses_of(ckpt.path),
    )


def _facts(ckpt: Checkpoint) -> dict[str, JSON]:
    """What the trainer says of its save, and the format of itself."""
    saved = ckpt.saved
    first: dict[str, JSON] = {"tag": saved.tag, "step": saved.step}
    last: dict[str, JSON] = {
        "client_state": None if saved.client_state is None else dict(saved.client_state),
        "params" if ckpt.format == "meta" else "args": None if saved.args is None else dict(saved.args),
        "notes": [*ckpt.notes] or None,
        "recipe": ckpt.recipe,
        "unpadded": dict(ckpt.unpadded) or None,
    }
    return {
        **{key: value for key, value in first.items() if value is not None},
        **ckpt.facts,
        **{key: value for key, value in last.items() if value is not None},
    }


def _family(ckpt: Checkpoint, recipe: str | None) -> tuple[str | None, str]:
    """The recipe that recognises every name and shape, or None and why not."""
    if ckpt.config is None:
        return None, "no config.json"
    asked = recipe or ckpt.recipe
    try:
        find = recipes.named(asked) if asked is not None else recipes.find(ckpt.config)
        find(ckpt, ckpt.config)
    except RecipeError as e:
        return None, str(e)
    return str(asked or ckpt.config.get("model_type")), ""


def _of_kind(ckpt: Checkpoint, kind: str) -> tuple[str, ...]:
    return tuple(n for n, e in ckpt.entries.items() if e.kind == kind)


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _is_table(value: JSON) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _table_rows(value: JSON) -> list[tuple[str, ...]]:
    """A list of objects as rows under the keys of the first."""
    objects = [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
    keys = list(objects[0])
    return [tuple(keys), *(tuple(spelled(o.get(k)) for k in keys) for o in objects)]
