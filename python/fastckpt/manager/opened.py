"""A commit opened for reading: whose tensors lie where, and tensors that are read with proof.

Law: a byte that is given out was checked against the digest of the tensor it belongs to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash

from ..checkpoint import JSON, Checkpoint, Single
from ..digest import LEAF, Digesting, combine, digest, digest64
from ..dtypes import BY_NAME, DType
from ..errors import ManagerError, SourceError, near
from ..extents import Extent, Extents, File, content, fill, pieces_of
from ..output.manifest import FileEntry, Manifest, TensorEntry
from ..road import reshard
from ..running.tensors import torch_dtype
from ..sources.training import names_in
from ..stored import boxes
from ..views import View, dense_strides
from .pieces import Shared, raw
from .saving import SCHEMA, TABLE, rank_directory
from .values import merged

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""A box: offset and shape."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A step as one rank sees it: its tree, the names it may ask for, and where their bytes lie.

    `own`: name -> this rank's own tensor; `table`: name -> a tensor shared by ranks; `places`: (rank, name)
    -> a stored tensor; `differing`: places of the tree where the saved ranks differ, left out of it."""

    path: str
    manifest: Manifest
    world: int
    tree: JSON
    aliases: Mapping[str, str]
    own: Mapping[str, TensorEntry]
    table: Mapping[str, Shared]
    places: Mapping[tuple[int, str], TensorEntry]
    differing: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All tensors of this rank's tree."""
        return names_in(self.tree)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, of the whole where it is cut. Raises ManagerError naming near misses."""
        held = self.aliases.get(name, name)
        if held in self.table:
            return self.table[held].shape
        if held in self.own:
            return self.own[held].shape
        known = [*self.table, *self.own, *self.aliases]
        raise ManagerError(f"{self.path}: no tensor {name!r}{near(name, known)}")

    def dtype(self, name: str) -> DType:
        """The dtype of a tensor that has a shape here."""
        held = self.aliases.get(name, name)
        return BY_NAME[self.table[held].dtype] if held in self.table else self.own[held].dtype

    def entry(self, rank: int, name: str) -> TensorEntry:
        """Where the part of a tensor that a rank wrote lies. Raises SourceError where it is not here."""
        found = self.places.get((rank, name))
        if found is None:
            raise SourceError(
                f"{self.path}: {name}: the part of rank {rank} is not on this disk; bring the ranks' "
                "directories together"
            )
        return found

    def read(self, name: str, box: Place | None = None) -> torch.Tensor:
        """A tensor, or a box of one that is cut, in fresh CPU memory. Raises SourceError for wrong bytes."""
        held = self.aliases.get(name, name)
        shape = self.shape(held)
        wanted = box or ((0,) * len(shape), shape)
        if held not in self.table:
            if box is not None:
                raise ManagerError(f"{self.path}: {name} is not cut over ranks, the template's is")
            return self._tensor(held, self.own[held])
        shared = self.table[held]
        for rank, offset, size in shared.boxes:
            if (offset, size) == wanted:
                return self._tensor(held, self.entry(rank, held))
        near = [b for b in shared.boxes if _meet((b[1], b[2]), wanted)]
        for rank, _, _ in near:
            self._tensor(held, self.entry(rank, held))  # proof; the road below gives no digests
        view = self.view(held)
        for axis, (start, length) in enumerate(zip(*wanted, strict=True)):
            view = view.narrow(axis, start, length)
        out = reshard(self._checkpoint({held: view}), layout="same", rank=0)
        if not isinstance(out, dict):
            raise ManagerError(f"{self.path}: {name}: the road gave no tensors")
        return out[held]

    def prove(self, names: Sequence[str]) -> None:
        """Read tensors and check their digests. Raises SourceError for the first that differs."""
        for name in dict.fromkeys(self.aliases.get(n, n) for n in names):
            self.shape(name)
            if name in self.table:
                for rank, _, _ in self.table[name].boxes:
                    self._tensor(name, self.entry(rank, name))
            else:
                self._tensor(name, self.own[name])

    def view(self, name: str) -> View:
        """The whole of a tensor, as it lies in the files of its rank or ranks."""
        if name in self.table:
            shape = self.table[name].shape
            parts = [(self.entry(r, name), offset, size) for r, offset, size in self.table[name].boxes]
        else:
            shape = self.shape(name)
            parts = [(self.own[name], (0,) * len(shape), shape)]
        dtype = parts[0][0].dtype
        files = {e.file: File.at(os.path.join(self.path, e.file)) for e, _, _ in parts}
        extents = Extents(Extent(files[e.file], e.offset, e.nbytes, f"{e.file}/{name}") for e, _, _ in parts)
        rows = [
            [k, dtype.code, 0, *offset, *size, *dense_strides(size)]
            for k, (_, offset, size) in enumerate(parts)
        ]
        return boxes(extents, dtype, shape, rows)

    def checkpoint(self, names: Mapping[str, str], *, own: bool = False) -> Checkpoint:
        """Tensors of this commit as a checkpoint for the road; `names`: new name -> name here.

        Raises ManagerError for a tensor that each rank has its own of, unless `own` asks for this rank's."""
        views = {}
        aliases = {}
        first: dict[str, str] = {}
        for new, name in names.items():
            held = self.aliases.get(name, name)
            self.shape(held)
            if held not in self.table and not own:
                raise ManagerError(
                    f"{self.path}: {name} differs from rank to rank; it is no part of one model"
                )
            if held in first:
                aliases[new] = first[held]
            else:
                first[held] = new
                views[new] = self.view(held)
        return self._checkpoint(views, aliases, _structure(views, aliases))

    def _checkpoint(
        self,
        views: Mapping[str, View],
        aliases: Mapping[str, str] | None = None,
        structure: str = "",
    ) -> Checkpoint:
        extents, moved = Extents(), {}
        for name, view in views.items():
            extents, where = extents.union(view.extents)
            rows = view.rows.copy()
            rows[:, 0] = np.array(where, np.int64)[rows[:, 0]] if len(where) else rows[:, 0]
            moved[name] = rows
        entries = {
            n: Single(v.shape, v.dtype, partial(View, v.shape, v.dtype, extents, moved[n]))
            for n, v in views.items()
        }
        files = tuple({x.where.path: x.where for x in extents if isinstance(x.where, File)}.values())
        step = self.manifest.record.source.step
        return Checkpoint(
            self.path, "training", entries, extents, aliases or {}, files,
            facts={"tag": self.manifest.record.source.tag, "step": step}, headers=self.manifest.key,
            structure=structure,
        )  # fmt: skip

    def _tensor(self, name: str, entry: TensorEntry) -> torch.Tensor:
        """A stored tensor, read and checked a leaf at a time."""
        out = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        into = raw(out).data
        path = os.path.join(self.path, entry.file)
        leaves = np.zeros(-(-entry.nbytes // LEAF), np.uint64)
        try:
            with open(path, "rb", buffering=0) as f:
                for k in range(len(leaves)):
                    piece = into[k * LEAF : (k + 1) * LEAF]
                    fill(piece, f.fileno(), entry.offset + k * LEAF)
                    leaves[k] = digest64(piece)
        except (OSError, SourceError) as e:
            raise SourceError(f"{path}: {name}: {e}") from None
        if combine(leaves) != entry.digest:
            raise SourceError(f"{path}: {name}: its bytes differ from the commit's digest")
        return out


def _meet(a: Place, b: Place) -> bool:
    """Whether two boxes have an element in common."""
    return all(i < j + m and j < i + n for i, n, j, m in zip(a[0], a[1], b[0], b[1], strict=True))


def _structure(views: Mapping[str, View], aliases: Mapping[str, str]) -> str:
    """Digest of all that shapes the views but where their bytes lie."""
    h = xxhash.xxh3_64(json.dumps(dict(aliases)).encode())
    for name, view in views.items():
        h.update(json.dumps([name, view.shape, view.dtype.name, view.rows.tolist()]).encode())
    return h.hexdigest()


def open_step(path: str, manifest: Manifest, rank: int, world: int) -> Opened:
    """A committed step as `rank` of `world` sees it; in a world of another size, what all saved ranks share.

    Raises SourceError for records that are not what was committed, ManagerError for what cannot be given."""
    saved = manifest.record.placement.get("ranks", 1)
    places = {}
    for shard in manifest.shards:
        for name, entry in shard.tensors.items():
            places[int(os.path.dirname(entry.file).rpartition("-")[2]), name] = entry
    said = _document(path, manifest, TABLE)
    table = {name: Shared.of(name, t) for name, t in said.items()}
    if saved == world:
        state = _state(path, manifest, rank)
        own = {name: e for (r, name), e in places.items() if r == rank and name not in table}
        return Opened(path, manifest, saved, state["tree"], _aliases(state), own, table, places)
    states = [_state(path, manifest, r) for r in range(saved)]
    tree, differing = merged([s["tree"] for s in states])
    aliases = _aliases(states[0])
    for r, s in enumerate(states):
        if _aliases(s) != aliases:
            raise ManagerError(f"{path}: ranks 0 and {r} tie other tensors; resume with {saved} ranks")
    return Opened(path, manifest, saved, tree, aliases, {}, table, places, tuple(differing))


def own_names(opened: Opened) -> list[str]:
    """Tensors of the tree that each saved rank had its own of: not given to a world of another size."""
    return [
        n
        for n in opened.names
        if opened.aliases.get(n, n) not in opened.table and opened.aliases.get(n, n) not in opened.own
    ]


def _state(path: str, manifest: Manifest, rank: int) -> dict[str, JSON]:
    state = _document(path, manifest, f"{rank_directory(rank)}/state.json")
    if state.get("schema") != SCHEMA or state.get("rank") != rank or "tree" not in state:
        raise SourceError(
            f"{path}: state of rank {rank}: schema {state.get('schema')}, rank {state.get('rank')}; "
            f"wanted schema {SCHEMA}"
        )
    return state


def _aliases(state: Mapping[str, JSON]) -> dict[str, str]:
    held = state.get("aliases")
    return {a: str(h) for a, h in held.items()} if isinstance(held, dict) else {}


def _document(path: str, manifest: Manifest, name: str) -> dict[str, JSON]:
    """A JSON file of the commit, checked against its digest."""
    data = checked(path, name, manifest.all_files())
    found = json.loads(data)
    if not isinstance(found, dict):
        raise SourceError(f"{path}: {name} is no JSON object")
    return found


def checked(path: str, name: str, files: Mapping[str, FileEntry]) -> bytes:
    """The bytes of a small file of a commit. Raises SourceError where they are not those committed."""
    entry = files.get(name)
    if entry is None:
        raise SourceError(f"{path}: no {name} in the commit; it holds {len(files)} files")
    data = content(os.path.join(path, name))
    if digest(data) != entry.digest:
        raise SourceError(f"{path}: {name}: its bytes differ from the commit's digest")
    return data


def check_files(path: str, names: Sequence[str], files: Mapping[str, FileEntry]) -> int:
    """Read files that are no tensors' in pieces and check their digests; the bytes read.

    Raises SourceError for the first that differs."""
    total = 0
    for name in names:
        digesting = Digesting()
        for piece in pieces_of(os.path.join(path, name), LEAF):
            digesting.add(piece)
        if digesting.digest() != files[name].digest:
            raise SourceError(f"{path}: {name}: its bytes differ from the commit's digest")
        total += digesting.nbytes
    return total
