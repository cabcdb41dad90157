"""A ZeRO checkpoint's entries, out of files that are open: buffers, frozen parameters, copies of the weights.

Law: a name is one entry of one kind (`parts`); what a file holds otherwise than another says is a
SourceError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ...checkpoint import JSON, Checkpoint, Entry, Saved
from ...dtypes import int8
from ...errors import SourceError
from ...extents import Extents
from ..assembly import assemble
from ..torchfile import Tensor
from ..torchtensors import Opened, places
from .experts import is_expert
from .opening import Opening, Whole
from .partitions import Flat, Placed, sliced
from .parts import parts
from .state import ModelState


class Reading:
    """A checkpoint whose files are all open. `models`, `states`: rank 0's, or all ranks'; `state`: rank 0's;
    `found`: what its names are; `extents`: the one table of all views."""

    def __init__(
        self, path: str, opening: Opening, models: Sequence[Opened], states: Sequence[ModelState]
    ) -> None:
        self.path, self.opening, self.where = path, opening, opening.files.folder
        self.models, self.states, self.state = models, states, states[0]
        self.extents = Extents(opening.extents)
        self.found = parts(self.state, self.where)

    def module(self, names: Iterable[str], kind: str) -> dict[str, Entry]:
        """Whole tensors of `module`."""
        tensors = ((n, self.state.module[n]) for n in names)
        return {n: self._whole(t, kind) for n, t in tensors if isinstance(t, Tensor)}

    def beside_masters(self, at_stage_3: bool) -> dict[str, Entry]:
        """Buffers, and the frozen parameters where they are wanted."""
        entries = self.module(self.found.buffers, "buffer")
        if self.opening.options.exclude_frozen:
            return entries
        if self.found.lost:
            raise SourceError(
                f"{self.where}: the weights of {[*self.found.lost]!r:.120} are in no file; "
                "exclude_frozen=True (--exclude-frozen-parameters) leaves them out"
            )
        entries |= self.module(self.found.kept, "frozen")
        return entries | (self._frozen_cut() if at_stage_3 else self.frozen_whole())

    def frozen_whole(self) -> dict[str, Entry]:
        """Frozen parameters of stages 1 and 2: whole, in one file."""
        shapes, fragments = self.state.frozen_shapes or {}, self.state.fragments or {}
        for name, shape in shapes.items():
            if fragments[name].shape != shape:
                raise SourceError(
                    f"{self.where}: frozen {name} has shape {fragments[name].shape}, wanted {shape}"
                )
        return {name: self._whole(fragments[name], "frozen") for name in shapes}

    def _frozen_cut(self) -> dict[str, Entry]:
        """Frozen parameters of stage 3: each cut over all ranks' files."""
        shapes, where = self.state.frozen_shapes or {}, f"{self.where}: frozen"
        self._refuse_unsaved(shapes)
        flats = columns(self.models, [[(s.fragments or {})[n] for n in shapes] for s in self.states], where)
        out: dict[str, Entry] = {}
        for flat, (name, shape) in zip(flats, shapes.items(), strict=True):
            # A frozen parameter is a group of its own: the same formula, the same check.
            (placed,) = sliced([{name: shape}], [flat], f"{where} {name}")
            out |= placed.entries(self.extents, "frozen")
        return out

    def _refuse_unsaved(self, shapes: Iterable[str]) -> None:
        """Raises SourceError for frozen parameters of which DeepSpeed saves no weights."""
        for name, t in ((n, (s.fragments or {})[n]) for s in self.states for n in shapes):
            why = "int8 codes (zero_quantized_nontrainable_weights) without scales"
            if not t.shape:
                why = "a placeholder, since it was offloaded to NVMe"
            elif not self.state.quantised or t.dtype is not int8:
                continue
            raise SourceError(
                f"{self.where}: of frozen {name} DeepSpeed saved {why}: its weights are in no file; "
                "exclude_frozen=True (--exclude-frozen-parameters) leaves frozen parameters out"
            )

    def _whole(self, t: Tensor, kind: str) -> Entry:
        return Whole(self.models[0], t).entry(self.extents, kind)

    def copies(
        self, layout: Sequence[Placed], experts: Mapping[str, Whole], *, of_all: bool
    ) -> dict[str, Entry]:
        """The 16-bit copies of all parameters, or of the experts' alone."""
        out: dict[str, Entry] = {}
        for placed in layout:
            for name, shape in zip(placed.names, placed.shapes, strict=True):
                of_expert = is_expert(name, self.state.autoep)
                if not of_all and not of_expert:
                    continue
                expert = experts.get(name)
                t = expert.tensor if expert else self.state.module.get(name)
                if not isinstance(t, Tensor) or t.shape != shape:
                    got = t.shape if isinstance(t, Tensor) else "nothing"
                    held = "the experts' files have" if of_expert else "weights='module': `module` has"
                    more = "; at stage 3 `module` holds placeholders, use the masters"
                    raise SourceError(
                        f"{self.where}: {name}: {held} {got}, wanted {shape}{more if placed.sliced else ''}"
                    )
                out[name] = (expert or Whole(self.models[0], t)).entry(self.extents, "parameter")
        return out

    def checkpoint(
        self,
        entries: dict[str, Entry],
        *,
        facts: Mapping[str, JSON],
        notes: Sequence[str] = (),
        unread: Sequence[str],
        layout: Sequence[bytes],
    ) -> Checkpoint:
        """All of it, with what these entries leave unread."""
        files, opened, state = self.opening.files, self.opening.opened, self.state
        if state.autoep is not None:
            lack = self.opening.options.exclude_frozen
            entries = state.autoep.joined(entries, lack=lack, where=self.where)
        tied = {n: h for n, h in self.found.tied.items() if h in entries}
        left = list(unread)
        left += [f"`module` entry {n}: no tensor" for n in self.found.other]
        left += [f"{n}: tied to {h}, which is left out" for n, h in self.found.tied.items() if n not in tied]
        left += [f"client state that is not plain: {', '.join(state.opaque)}"] if state.opaque else []
        return assemble(
            self.path, "zero", entries, self.extents, self.opening.options,
            aliases=tied, files=self.opening.held(),
            search=[os.path.abspath(self.path), os.path.abspath(files.root)],
            saved=Saved(files.tag, state.global_steps, state.client), notes=notes,
            facts={**facts, "deepspeed": state.version}, unread=left,
            inert=[n for f in opened for n in f.inert], layout=layout, headers=self.opening.digests(),
        )  # fmt: skip


def places_in(state: ModelState) -> bytes:
    """Where the tensors of one model-states file lie that were wanted."""
    return places([*state.module.values(), *(state.fragments or {}).values()])


def places_of(states: Sequence[ModelState]) -> list[bytes]:
    """`places_in` each; states that are one are looked at once."""
    known = {id(state): places_in(state) for state in {id(s): s for s in states}.values()}
    return [known[id(state)] for state in states]


def columns(opened: Sequence[Opened], tensors: Sequence[Sequence[Tensor]], where: str) -> list[Flat]:
    """The k-th tensor of every rank as one Flat."""
    counts = {len(row) for row in tensors}
    if len(counts) != 1:
        odd = next(r for r, row in enumerate(tensors) if len(row) != len(tensors[0]))
        raise SourceError(f"{where}: rank {odd} saved {len(tensors[odd])} groups, rank 0 {len(tensors[0])}")
    for r, row in enumerate(tensors):
        for k, t in enumerate(row):
            if t.dtype is not tensors[0][k].dtype:
                raise SourceError(
                    f"{where}: group {k}: rank {r} holds {t.dtype}, rank 0 {tensors[0][k].dtype}"
                )
            if not t.flat:
                raise SourceError(
                    f"{where}: group {k}: rank {r}: wanted one dense axis, got {t.shape}, stride {t.stride}"
                )
    size = (len(tensors), counts.pop())
    local = np.array([[t.storage.extent for t in row] for row in tensors], np.int64).reshape(size)
    offset = np.array([[t.offset for t in row] for row in tensors], np.int64).reshape(size)
    length = np.array([[t.numel for t in row] for row in tensors], np.int64).reshape(size)
    lost = np.argwhere((local < 0) & (length > 0))
    if len(lost):
        raise SourceError(f"{where}: group {lost[0][1]}: rank {lost[0][0]}: its storage was not located")
    extent = local + np.array([o.base for o in opened], np.int64)[:, None]
    return [
        Flat(tensors[0][k].dtype, extent[:, k].copy(), offset[:, k].copy(), length[:, k].copy())
        for k in range(size[1])
    ]
