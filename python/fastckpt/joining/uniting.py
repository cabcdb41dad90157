"""Shards and the layout that cut them, made the model they were cut from.

A layout is asked again for the targets of every rank, over tensors that have names and shapes and no bytes.
Each fragment of such a target says which elements of a tensor lie where in the target; read the other way
round (`inverse`), the tensor is made of the shards. So whatever a layout can write can be read, and no layout
says how.

Law: a tensor is given back only where the shards hold every element of it; what several ranks hold is taken
from the first, and must be equal (`Replica`); what a layout padded is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from .. import layouts
from ..checkpoint import JSON, Checkpoint, Entry, Replica, Single
from ..digest import values_digest
from ..dtypes import DType
from ..errors import SourceError
from ..extents import Buffer, Extent, Extents
from ..layouts import ByRoles
from ..model import Model
from ..placement import Placement
from ..stored import strided
from ..target import Target
from ..views import View
from .inverse import Axis, Piece, joined, kept, other, pieces_of

Kinds = Mapping[str, tuple[DType, tuple[int, ...]]]
"""name -> dtype and shape."""


def phantom_of(ckpt: Checkpoint, kinds: Kinds, aliases: Mapping[str, str]) -> Checkpoint:
    """A checkpoint of those tensors and tied names, with an extent a tensor and no byte behind it."""
    nowhere = [Buffer(None, 0, math.prod(s) * d.itemsize) for d, s in kinds.values()]
    extents = Extents(Extent(b, 0, b.nbytes, n) for b, n in zip(nowhere, kinds, strict=True))
    entries = {
        name: Single(shape, dtype, partial(strided, extents, k, dtype, shape))
        for k, (name, (dtype, shape)) in enumerate(kinds.items())
    }
    return Checkpoint(ckpt.path, "phantom", entries, extents, aliases, config=ckpt.config)


def whole_of(
    shards: Checkpoint,
    phantom: Checkpoint,
    model: Model,
    layout: ByRoles,
    grid: Placement,
) -> Checkpoint:
    """The model whose shards these are, cut by `layout` for `grid`.

    `shards`: named "rank/name"; `phantom`, `model`: the whole model's names and shapes, and their roles.
    Raises SourceError where the shards are not what the layout makes of it, LayoutError where it makes
    none."""
    name = layouts.name_of(type(layout)) or type(layout).__name__
    targets = over_ranks(partial(layout.targets, model), grid)
    found = united(shards, phantom, name, targets)
    kinds: JSON = {n: [e.dtype.name, list(e.shape)] for n, e in phantom.entries.items()}
    config: JSON = dict(shards.config or {})
    shaped: JSON = [shards.structure, layouts.VERSION, repr(layout), repr(grid), model.family, kinds, config]
    return replace(
        found,
        facts={"layout": name, **shards.facts},
        structure=values_digest(shaped),
    )


def united(
    ckpt: Checkpoint,
    phantom: Checkpoint,
    layout: str,
    targets: Iterable[tuple[int, Target]],
    digests: Mapping[str, str] | None = None,
) -> Checkpoint:
    """The tensors of `phantom` made of the shards in `ckpt`; what no shard holds is in `unread`.

    `phantom`: names and shapes, an extent a tensor and no bytes; `targets`: what `layout` makes of it, as
    (rank, target); `ckpt`: the shards' entries, named "rank/name"; `digests`: what is known of their bytes.
    Raises SourceError where those are others, do not hold every element of a tensor, or hold the same with
    other digests."""
    known = dict(zip(phantom.extents, phantom.entries, strict=True))
    pieces: dict[str, list[Piece]] = {name: [] for name in phantom.entries}
    alike = _Alike(ckpt.path, {} if ckpt.take_first else digests or {})
    seen: set[str] = set()
    for rank, target in targets:
        name = f"{rank}/{target.name}"
        held = ckpt.entries.get(name)
        if held is None or held.shape != target.shape:
            got = "none" if held is None else str(held.shape)
            raise SourceError(f"{ckpt.path}: {name}: the layout makes {target.shape}, the shard holds {got}")
        seen.add(name)
        for view in (target.view, *target.also):
            for tensor, piece in pieces_of(view, ckpt[name], known):
                pieces[tensor].append(piece)
                alike.check(name, view, tensor, piece)
    unseen = next((name for name in ckpt.entries if name not in seen), None)
    if unseen is not None:
        raise SourceError(f"{ckpt.path}: {unseen} is no tensor of layout {layout}")
    entries: dict[str, Entry] = {}
    unread: list[str] = []
    replicas: list[Replica] = []
    for name, entry in phantom.entries.items():
        if pieces[name]:
            view, again = joined(f"{ckpt.path}: {name}", entry.shape, pieces[name], ckpt.extents)
            entries[name] = Single.of(view)
            what = f"{name}, of which two shards hold the same elements"
            replicas += [Replica(what, partial(kept, view, box), partial(other, view, box)) for box in again]
        elif math.prod(entry.shape) == 0:
            entries[name] = entry
        else:
            unread.append(f"{name}: layout {layout} does not write it as it is")
    return replace(
        ckpt,
        format="served",
        entries=entries,
        aliases={a: h for a, h in phantom.aliases.items() if h in entries},
        unread=(*ckpt.unread, *unread),
        replicas=(*ckpt.replicas, *replicas),
    )


class _Alike:
    """Shards' tensors that are the same elements in the same order: their digests must be equal."""

    def __init__(self, path: str, digests: Mapping[str, str]) -> None:
        self._path, self._digests = path, digests
        self._known: dict[tuple[str, int, tuple[Axis, ...]], str] = {}

    def check(self, name: str, view: View, tensor: str, piece: Piece) -> None:
        """`piece` of `tensor` is what shard `name` holds of `view`. Raises SourceError."""
        said = self._digests.get(name)
        if said is None or math.prod(n for n, _, _ in piece.axes) != view.numel:
            return
        first = self._known.setdefault((tensor, piece.start, piece.axes), name)
        if said != self._digests[first]:
            raise SourceError(
                f"{self._path}: {first} and {name} are the same elements of {tensor}, and the record has "
                f"digests {self._digests[first]} and {said} of them: which one is meant is in doubt"
            )


def over_ranks(
    targets: Callable[[Placement], Iterable[Target]], grid: Placement
) -> Iterator[tuple[int, Target]]:
    """The targets of every rank of a grid, as (rank, target)."""
    return ((p.rank, t) for p in grid.ranks() for t in targets(p))
