"""A commit opened for reading: whose tensors lie where, and tensors that are read with proof.

Law: a byte that is given out was checked against the digest of the tensor it belongs to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..checkpoint import JSON, Checkpoint, Single
from ..digest import LEAF, Digesting, combine, digest64
from ..dtypes import DType
from ..errors import ManagerError, SourceError, near
from ..output.manifest import FileEntry, Manifest, TensorEntry
from ..paths import fill, pieces_of
from ..road import reshard
from ..running.tensors import torch_dtype
from ..sources.training import CommitFiles, Shared, aliases_of, names_in
from .pieces import raw
from .state_tree import merged

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""A box: offset and shape."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A step as one rank sees it: its tree, the names it may ask for, and where their bytes lie.

    `own`: name -> this rank's own tensor; `differing`: places of the tree where the saved ranks differ, left
    out of it."""

    commit: CommitFiles
    world: int
    tree: JSON
    aliases: Mapping[str, str]
    own: Mapping[str, TensorEntry]
    differing: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where the step lies."""
        return self.commit.path

    @property
    def table(self) -> Mapping[str, Shared]:
        """The tensors shared by ranks, by name."""
        return self.commit.table

    @property
    def names(self) -> list[str]:
        """All tensors of this rank's tree."""
        return names_in(self.tree)

    def holder(self, name: str) -> str:
        """The stored tensor behind a name: itself, or the one it is tied to."""
        return self.aliases.get(name, name)

    def lost(self) -> list[str]:
        """Names whose tensors each saved rank had its own of: not given to a world of another size."""
        return [n for n in self.names if (held := self.holder(n)) not in self.table and held not in self.own]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, of the whole where it is cut. Raises ManagerError naming near misses."""
        held = self.holder(name)
        if held in self.table:
            return self.table[held].shape
        if held in self.own:
            return self.own[held].shape
        known = [*self.table, *self.own, *self.aliases]
        raise ManagerError(f"{self.path}: no tensor {name!r}{near(name, known)}")

    def dtype(self, name: str) -> DType:
        """The dtype of a tensor that has a shape here."""
        held = self.holder(name)
        return (self.table if held in self.table else self.own)[held].dtype

    def read(self, name: str, box: Place | None = None) -> torch.Tensor:
        """A tensor, or a box of one that is cut, in fresh CPU memory. Raises SourceError for wrong bytes."""
        held = self.holder(name)
        shape = self.shape(held)
        wanted = box or ((0,) * len(shape), shape)
        if held not in self.table:
            if box is not None:
                raise ManagerError(f"{self.path}: {name} is not cut over ranks, the template's is")
            return self._tensor(held, self.own[held])
        shared = self.table[held]
        for rank, offset, size in shared.boxes:
            if (offset, size) == wanted:
                return self._tensor(held, self.commit.entry(rank, held))
        for rank, offset, size in shared.boxes:
            if _meet((offset, size), wanted):
                self._tensor(held, self.commit.entry(rank, held))  # proof; the road below gives no digests
        whole = self.commit.checkpoint({held: held})
        view = whole[held]
        for axis, (start, length) in enumerate(zip(*wanted, strict=True)):
            view = view.narrow(axis, start, length)
        part = {held: Single(view.shape, view.dtype, lambda: view)}
        return reshard(replace(whole, entries=part, structure=""), layout="same", rank=0)[held]

    def prove(self, names: Sequence[str]) -> None:
        """Read tensors and check their digests. Raises SourceError for the first that differs."""
        for name in dict.fromkeys(self.holder(n) for n in names):
            self.shape(name)
            if name in self.table:
                for rank, _, _ in self.table[name].boxes:
                    self._tensor(name, self.commit.entry(rank, name))
            else:
                self._tensor(name, self.own[name])

    def checkpoint(self, names: Mapping[str, str], *, own: bool = False) -> Checkpoint:
        """Tensors of this commit as a checkpoint for the road; `names`: new name -> name here.

        Raises ManagerError for a tensor that each rank has its own of, unless `own` asks for this rank's."""
        held = {new: self.holder(name) for new, name in names.items()}
        for name in held.values():
            self.shape(name)
            if name not in self.table and not own:
                raise ManagerError(
                    f"{self.path}: {name} differs from rank to rank; it is no part of one model"
                )
        return self.commit.checkpoint(held, own=self.own)

    def _tensor(self, name: str, entry: TensorEntry) -> torch.Tensor:
        """A stored tensor, read and checked a leaf at a time."""
        out = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="cpu")
        into = raw(out).data
        path = os.path.join(self.path, entry.file)
        leaves = np.zeros(-(-entry.nbytes // LEAF), np.uint64)
        try:
            with open(path, "rb", buffering=0) as f:
                for k in range(len(leaves)):
                    piece = into[k * LEAF : (k + 1) * LEAF]
                    fill(piece, f.fileno(), entry.offset + k * LEAF)
                    leaves[k] = digest64(piece)
        except OSError as e:
            raise SourceError(f"{path}: {name}: {e.strerror}") from None
        except SourceError as e:
            raise SourceError(f"{path}: {name}: {e}") from None
        if combine(leaves) != entry.digest:
            raise SourceError(f"{path}: {name}: its bytes differ from the commit's digest")
        return out


def _meet(a: Place, b: Place) -> bool:
    """Whether two boxes have an element in common."""
    return all(i < j + m and j < i + n for i, n, j, m in zip(a[0], a[1], b[0], b[1], strict=True))


def open_step(path: str, manifest: Manifest, rank: int, world: int) -> Opened:
    """A committed step as `rank` of `world` sees it; in a world of another size, what all saved ranks share.

    Raises SourceError for records that are not what was committed, ManagerError for what cannot be given."""
    commit, saved = CommitFiles(path, manifest), manifest.record.placement.get("ranks", 1)
    if saved == world:
        state = commit.state(rank)
        own = {n: e for (r, n), e in commit.places.items() if r == rank and n not in commit.table}
        return Opened(commit, saved, state["tree"], aliases_of(state), own)
    states = [commit.state(r) for r in range(saved)]
    tree, differing = merged([s["tree"] for s in states])
    aliases = aliases_of(states[0])
    for r, s in enumerate(states):
        if aliases_of(s) != aliases:
            raise ManagerError(f"{path}: ranks 0 and {r} tie other tensors; resume with {saved} ranks")
    return Opened(commit, saved, tree, aliases, {}, tuple(differing))


def check_files(path: str, names: Sequence[str], files: Mapping[str, FileEntry]) -> int:
    """Read files that are no tensors' in pieces and check their digests; the bytes read.

    Raises SourceError for the first that differs."""
    total = 0
    for name in names:
        digesting = Digesting.of(pieces_of(os.path.join(path, name), LEAF))
        if digesting.digest() != files[name].digest:
            raise SourceError(f"{path}: {name}: its bytes differ from the commit's digest")
        total += digesting.nbytes
    return total
