"""One save over all ranks: digests agreed, parts written, and the commit last.

Law: every step ends with an exchange, so that a rank that fails takes all of them out of the save and the
commits that stood stay as they were. What the commit says was written was written, with those digests.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from .. import __version__
from ..checkpoint import JSON
from ..digest import LEAF, combine, digest, digest64, values_digest
from ..errors import ManagerError, WriteError
from ..output.files import safetensors_layout
from ..output.filesystem import as_write_errors
from ..output.manifest import Origin, Record
from ..output.writer import Output
from ..pipeline import cores, each
from ..sources.training import LAYOUT, SCHEMA, TABLE, Shared, engine_directory, rank_directory
from .commits import Store
from .coordination import Group, together
from .metadata import Took
from .pieces import Claim, Piece, Taken, raw, shared
from .state_tree import Engine

ENGINES = ".engine"
"""Where engines write before their files become part of the commit."""
_THREADS = min(4, cores())
_FILE = 64 << 20
"""Bytes of tensors from which on a rank writes a further file, by a thread of its own: up to _THREADS."""


@dataclass(frozen=True, slots=True)
class Disk:
    """Who shares this rank's disk: `ranks` of it, `index` of this rank among them."""

    ranks: tuple[int, ...]
    index: int

    @staticmethod
    def of(group: Group, node: str | None) -> Disk:
        """The disk of the ranks that say this node's name too; of all ranks for None. Collective."""
        if node is None:
            return Disk(tuple(range(group.world)), group.rank)
        ranks = tuple(r for r, said in enumerate(group.exchange(node)) if said == node)
        return Disk(ranks, ranks.index(group.rank))

    @property
    def coordinator(self) -> bool:
        """Whether this rank is the one that changes the disk's directories."""
        return self.index == 0


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be saved by this rank at a step.

    `token` is this save's own, the same on all ranks. `aside`: what stands at the step already is broken
    and is set aside; else it is to be overwritten."""

    step: int
    token: str
    tree: JSON
    taken: Taken
    engines: Mapping[str, Engine]
    client_state: Mapping[str, object]
    metrics: Mapping[str, float]
    aside: bool


def engine_tag(step: int) -> str:
    """The tag under which an engine saves a step."""
    return f"global_step{step}"


def save(store: Store, group: Group, disk: Disk, request: Request) -> Took:
    """Make a step real on every disk; what that took. Collective.

    Raises ManagerError or WriteError, on every rank, and leaves what stood before."""
    try:
        return _Save(store, group, disk, request).run()
    except BaseException:
        if disk.coordinator:
            store.drop(request.step, request.token)
        raise


class _Save:
    """The steps of one save, in order; each is a round that all ranks pass or none."""

    def __init__(self, store: Store, group: Group, disk: Disk, request: Request) -> None:
        self.store, self.group, self.disk, self.request = store, group, disk, request
        self.began = time.perf_counter()
        self.staging = store.saving(request.step, request.token)
        self.output = Output(
            self.staging, key=request.token, rank=disk.index, world=len(disk.ranks), durable=store.durable
        )
        self.claims: list[dict[str, Claim]] = []
        self.table: dict[str, Shared] = {}
        self.mine: list[Piece] = []
        self.rounds = 0

    def run(self) -> Took:
        """All of it."""
        said = self._round(self._claim)
        self.claims = [{n: Claim.of(c) for n, c in s.items()} for s in said if isinstance(s, dict)]
        with ExitStack() as stack:
            opened = self._round(lambda: self._open(stack))
            self._round(lambda: self._reserve([str(opened[r]).split() for r in self.disk.ranks]))
            files: list[str] = []
            if self.request.engines:
                self._round(self._run_engines)
                listed = self._round(self._list_engines)[self.group.rank]
                files = [str(f) for f in listed] if isinstance(listed, list) else []
            done = self._round(lambda: self._write(stack, files))
        self._round(self._seal)
        return Took.of(done)

    def _round(self, work: Callable[[], JSON]) -> list[JSON]:
        self.rounds += 1
        at = f"({self.request.token}, round {self.rounds})"
        return together(self.group, f"save of step {self.request.step}", work, at=at)

    def _claim(self) -> JSON:
        """What this rank holds; when all have said it the directory is there.

        With digests where ranks must learn what they hold alike: else they are taken while writing."""
        if self.disk.coordinator:
            self.store.take()
            self.store.begin(self.request.step, self.request.token)
        pieces = list(self.request.taken.pieces.values())
        digests = [""] * len(pieces)
        if self.group.world > 1:
            digests = each(lambda p: digest(raw(p.data)), pieces, _THREADS)
        return {
            p.name: Claim(p.dtype.name, p.shape, d, *((p.box.whole, p.box.offset) if p.box else ())).json()
            for p, d in zip(pieces, digests, strict=True)
        }

    def _open(self, stack: ExitStack) -> JSON:
        """Begin the output; how many bytes this rank will write, and a digest of who writes what."""
        if not os.path.isdir(self.staging):
            raise WriteError(
                f"{self.staging}: rank {self.disk.ranks[0]} made it and this rank does not see it: they do "
                "not share this directory (shared=False and node= are for nodes with disks of their own)"
            )
        self.table = shared(self.claims, self.disk.ranks)
        rank = self.group.rank
        for name, piece in self.request.taken.pieces.items():
            found = self.table.get(name)
            offset = piece.box.offset if piece.box else (0,) * len(piece.shape)
            if found is None or (rank, offset, piece.shape) in found.boxes:
                self.mine.append(piece)
        stack.enter_context(self.output)
        return f"{sum(p.nbytes for p in self.mine)} {values_digest(self._table())}"

    def _table(self) -> dict[str, JSON]:
        return {name: t.json() for name, t in self.table.items()}

    def _reserve(self, opened: list[list[str]]) -> JSON:
        """Room for what the ranks of this disk write. Each worked out by itself who writes what."""
        if len({table for _, table in opened}) > 1:
            raise ManagerError(f"ranks {[*self.disk.ranks]} do not agree on which of them writes what")
        if self.disk.coordinator:
            self.output.reserve(sum(int(nbytes) for nbytes, _ in opened))
        return None

    def _run_engines(self) -> JSON:
        """Every engine's own save, into a directory of its own beside ours."""
        for name, engine in self.request.engines.items():
            where = os.path.join(self.staging, ENGINES, engine_directory(name))
            engine.save_checkpoint(where, engine_tag(self.request.step), dict(self.request.client_state))
        return None

    def _list_engines(self) -> JSON:
        """The share of the engines' files that this rank takes into the commit; nothing moves meanwhile."""
        root = os.path.join(self.staging, ENGINES)
        files = sorted(
            os.path.relpath(os.path.join(d, f), root).replace(os.sep, "/")
            for d, _, names in os.walk(root)
            for f in names
        )
        share: list[JSON] = [*files[self.disk.index :: len(self.disk.ranks)]]
        return share

    def _write(self, stack: ExitStack, engine_files: list[str]) -> JSON:
        """This rank's files and its record; the rank that comes last writes the commit record."""
        rank, request, output = self.group.rank, self.request, self.output
        groups = _groups(self.mine)
        count = len(groups)
        names = [f"state-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
        files = list(zip(["state.safetensors"] if count == 1 else names, groups, strict=True))
        each(lambda file: self._write_tensors(*file), files, count)
        state: dict[str, JSON] = {
            "schema": SCHEMA,
            "rank": rank,
            "world": self.group.world,
            "tree": request.tree,
            "aliases": dict(request.taken.aliases),
        }
        output.text(f"{rank_directory(rank)}/state.json", json.dumps(state).encode(), self.disk.index)
        if self.disk.coordinator:
            output.text(TABLE, json.dumps(self._table()).encode())
        engine_bytes = 0
        for name in engine_files:
            path = os.path.join(self.staging, ENGINES, name)
            engine_bytes += os.path.getsize(path)
            output.adopt(path, name)
        output.commit(self._record())
        stack.close()  # before the directory gets its name
        return [time.perf_counter() - self.began, sum(p.nbytes for p in self.mine) + engine_bytes]

    def _write_tensors(self, name: str, pieces: Sequence[Piece]) -> None:
        """One file: a leaf is digested, then written while it is in the cache."""
        rank, held = self.group.rank, {p.name: p for p in pieces}
        specs = [(p.name, p.dtype, p.shape) for p in pieces]
        layout = safetensors_layout(f"{rank_directory(rank)}/{name}", specs, {"format": "pt"})
        file = self.output.create(layout, self.disk.index)
        digests = []
        for slot in layout.slots:
            data, known = raw(held[slot.name].data).data, self.claims[rank][slot.name].digest
            leaves = np.zeros(-(-slot.nbytes // LEAF), np.uint64)
            for k in range(len(leaves)):
                piece = data[k * LEAF : (k + 1) * LEAF]
                if not known:
                    leaves[k] = digest64(piece)
                file.write(slot.offset + k * LEAF, piece)
            digests.append(int(known or combine(leaves), 16))
        file.close({}, np.array(digests, np.uint64))

    def _record(self) -> Record:
        """What the manifest says of this save."""
        request, store = self.request, self.store
        options: dict[str, JSON] = {
            "metrics": dict(request.metrics),
            "ranks": [*self.disk.ranks],
            "engines": [*sorted(request.engines)],
            "allow_nonfinite": True,  # what training holds is training's business
        }
        origin = Origin(store.place, LAYOUT, store.name(request.step), request.step)
        return Record(origin, __version__, LAYOUT, {"ranks": self.group.world}, options)

    def _seal(self) -> JSON:
        if self.disk.coordinator:
            for folder, _, late in os.walk(os.path.join(self.staging, ENGINES), topdown=False):
                if late:
                    raise WriteError(f"{folder}: {late[0]} came after save_checkpoint had returned")
                with as_write_errors(folder):
                    os.rmdir(folder)
            self.store.seal(self.request.step, self.request.token, aside=self.request.aside)
        return None


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """A rank's pieces by files of about the same size; none where there are no pieces."""
    number = max(1, min(_THREADS, sum(p.nbytes for p in pieces) // _FILE))
    groups: list[list[Piece]] = [[] for _ in range(number)]
    sizes = [0] * number
    for piece in sorted(pieces, key=lambda p: -p.nbytes):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(piece)
        sizes[smallest] += piece.nbytes
    return [g for g in groups if g]
