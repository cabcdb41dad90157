"""What a source returns: names, the views behind them, and what else the directory says.

Law: opening reads headers only. A view is built when its name is asked for, and can be dropped again, so that
a checkpoint of a thousand ranks costs its headers, not its fragments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from .dtypes import DType
from .errors import SourceError, near
from .extents import Extents, File
from .placement import Placement
from .views import View

JSON = str | int | float | bool | None | list["JSON"] | dict[str, "JSON"]


class Entry(Protocol):
    """One named tensor: its shape and dtype, what it is, and how its view is built."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> DType:
        """Its dtype as stored."""

    @property
    def kind(self) -> str:
        """What it is: "parameter", "frozen" (a parameter the optimizer does not own) or "buffer"."""

    def build(self) -> View:
        """Its view."""


@dataclass(frozen=True, slots=True)
class Single:
    """An entry that stands by itself: `make` builds its view."""

    shape: tuple[int, ...]
    dtype: DType
    make: Callable[[], View]
    kind: str = "parameter"

    @staticmethod
    def of(view: View) -> Single:
        """The entry of a view at hand."""
        return Single(view.shape, view.dtype, lambda: view)

    def build(self) -> View:
        """Its view."""
        return self.make()


def moved(entry: Entry, extents: Extents, first: int = 0) -> Entry:
    """The entry over a table that holds its own extents from number `first` on."""
    return Single(entry.shape, entry.dtype, lambda: entry.build().over(extents, first), entry.kind)


class _Cast:
    """An entry whose view is cast to `dtype`. It is made at every look-up, so that it has to be light."""

    __slots__ = ("_stored", "dtype")

    def __init__(self, stored: Entry, dtype: DType) -> None:
        self._stored, self.dtype = stored, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stored.shape

    @property
    def kind(self) -> str:
        return self._stored.kind

    def build(self) -> View:
        return self._stored.build().cast(self.dtype)


class Cast(Mapping[str, Entry]):
    """Entries whose floats are cast to `dtype` when their views are built; integers and bools stay."""

    __slots__ = ("_dtype", "_stored")

    def __init__(self, stored: Mapping[str, Entry], dtype: DType) -> None:
        self._stored, self._dtype = stored, dtype

    def __getitem__(self, name: str) -> Entry:
        entry = self._stored[name]
        return _Cast(entry, self._dtype) if entry.dtype.kind == "float" else entry

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """Elements that a checkpoint holds once more: those of `kept` are taken, and `other`, of the same shape
    and dtype, must be equal (room `replicas`).

    `what`: the tensor, and who holds it, in words. `always`: it is compared whole, whatever its size."""

    what: str
    kept: Callable[[], View]
    other: Callable[[], View]
    always: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """What the trainer says of its save.

    `tag`, `step`: of the save. `client_state`: plain values that the job gave it to keep. `args`: its own
    arguments of the model, Megatron's args or Meta's params.json. `grid`: the ranks whose parts the entries
    are, "rank/name" where they are several. None, or one rank, where it does not say."""

    tag: str | None = None
    step: int | None = None
    client_state: Mapping[str, JSON] | None = None
    args: Mapping[str, JSON] | None = None
    grid: Placement = field(default_factory=Placement)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of any format, opened.

    `path`: what was opened. `format`: the source's name. `entries`: name -> Entry, in the format's own order,
    without tied names. `aliases`: tied name -> the name that holds its bytes. `extents`: the table that every
    view refers to. `files`: those opened for their headers or needed for data. `config`: the model's
    config.json where there is one beside, else None. `beside`: config and tokenizer files that go with the
    weights. `saved`: what the trainer says of the save. `recipe`: the one that shards were cut and joined
    with, None for the config's. `unpadded`: sizes that `config` gives as they were before the shards were
    padded, which the file beside does not. `joins`: whether shards can be made the model they were cut from.
    `notes`: what the user should know. `facts`: stage, world and the like, for people. `unread`: what
    was not read, and why. `inert`: pickle globals that were kept as inert records. `structure`: hex digest
    of everything that shapes the views (names, shapes, dtypes, partition and storage sizes, tensor offsets
    and strides), but not of where a storage lies in its file. `headers`: hex digest of the headers and
    pickles themselves. `replicas`: what has to be equal before any of it is taken; `take_first`: where it is
    not, the first is taken and a note says so."""

    path: str
    format: str
    entries: Mapping[str, Entry]
    extents: Extents
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    config: Mapping[str, JSON] | None = None
    beside: tuple[File, ...] = ()
    saved: Saved = field(default_factory=Saved)
    recipe: str | None = None
    unpadded: Mapping[str, JSON] = field(default_factory=dict)
    joins: bool = True
    notes: tuple[str, ...] = ()
    facts: Mapping[str, JSON] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    structure: str = ""
    headers: str = ""
    replicas: tuple[Replica, ...] = ()
    take_first: bool = False

    @property
    def config_file(self) -> File | None:
        """The config.json among `beside`, whose values `config` has."""
        return config_among(self.beside)

    def __getitem__(self, name: str) -> View:
        """The view of a tensor; a tied name gives its holder's. Raises SourceError naming near misses."""
        entry = self.entries.get(self.aliases.get(name, name))
        if entry is None:
            raise SourceError(
                f"{self.path}: no tensor {name!r} among {len(self.entries)}{near(name, self.entries)}"
            )
        return entry.build()

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def config_among(beside: Iterable[File]) -> File | None:
    """The config.json of these files, None where there is none."""
    return next((file for file in beside if os.path.basename(file.path) == "config.json"), None)
