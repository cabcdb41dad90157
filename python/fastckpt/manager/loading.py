"""One restore over all ranks: read with proof, agreed by all, and only then put into the job.

Law: nothing of the template changes before every rank has read and checked all that it will take.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from ..checkpoint import JSON
from ..errors import ManagerError
from ..pipeline import cores, each
from ..running.tensors import torch_dtype
from ..sources.memory import has_memory
from ..sources.training import engine_directory
from .commits import Store
from .coordination import Group, together
from .metadata import Took
from .opened import Opened, check_files, open_step
from .pieces import PLAIN, box_of
from .saving import Disk, engine_tag
from .state_tree import MISSING, Builder, Engine, Flat, fill, flatten
from .template_check import check

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Asked:
    """What a restore is to give: all, or `names`; into `template` where there is one."""

    names: tuple[str, ...] | None
    allow_missing: bool
    template: object


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a restore gave, the names the commit has, and what it took."""

    value: object
    saved_names: tuple[str, ...]
    took: Took
    notes: tuple[str, ...]


def load(store: Store, group: Group, disk: Disk, step: int, asked: Asked) -> Loaded:
    """Restore a step. Collective. Raises SourceError, on every rank, where a byte of it is wrong, and
    ManagerError where it does not fit what was asked."""
    return _Load(store, group, disk, step, asked).run()


class _Load:
    """The rounds of one restore."""

    def __init__(self, store: Store, group: Group, disk: Disk, step: int, asked: Asked) -> None:
        self.store, self.group, self.disk, self.step, self.asked = store, group, disk, step, asked
        self.began = time.perf_counter()
        self.tensors: dict[str, torch.Tensor] = {}
        self.notes: list[str] = []
        self.opened: Opened  # from the first round on
        self.nbytes = 0
        self.engines: dict[str, Engine] = {}

    def run(self) -> Loaded:
        """Read, agree, apply."""
        what = f"restore of step {self.step}"
        together(self.group, what, self._read)
        client_state: dict[str, object] = {}
        value: object = None

        def apply() -> JSON:
            nonlocal value
            for name, engine in self.engines.items():
                client_state.update(self._load_engine(name, engine))
            value = self._value(client_state)
            return [time.perf_counter() - self.began, self.nbytes]

        done = together(self.group, what, apply)
        return Loaded(value, tuple(self.opened.names), Took.of(done), tuple(self.notes))

    def _read(self) -> JSON:
        asked = self.asked
        held = flatten(asked.template) if asked.template is not None and asked.names is None else Flat()
        self.engines = held.engines
        manifest = self.store.manifest(self.step)
        self.opened = opened = open_step(
            self.store.path(self.step), manifest, self.group.rank, self.group.world
        )
        files = manifest.all_files()
        if self.engines:
            mine = [n for n in sorted(manifest.files) if n.startswith("engine")][
                self.disk.index :: len(self.disk.ranks)
            ]
            self.nbytes += check_files(opened.path, mine, files)
        if asked.names is None:
            self._all(opened, held.tensors)
        else:
            known = {*opened.table, *opened.own, *opened.aliases} & set(opened.names)
            missing = [n for n in asked.names if n not in known]
            if missing and not asked.allow_missing:
                opened.shape(missing[0])  # says what is near
                raise ManagerError(f"{opened.path}: {missing[0]} is not in this rank's state")
            self._tensors(opened, [n for n in asked.names if n in known], _held(asked.template))
        return None

    def _all(self, opened: Opened, held: Mapping[str, torch.Tensor]) -> None:
        """Everything of the tree that the template (if any) can take; `held`: the template's tensors."""
        asked = self.asked
        own = dict.fromkeys(opened.lost())
        lost = [*opened.differing, *own]
        if lost and not asked.allow_missing:
            raise ManagerError(
                f"{opened.path}: saved by {opened.world} ranks, restored by {self.group.world}: {lost[0]} "
                f"differs from rank to rank ({len(lost)} such in all); allow_missing=True leaves them out"
            )
        if lost:
            self.notes.append(f"left out, as each of {opened.world} ranks had its own: {', '.join(lost[:8])}")
        names = [n for n in opened.names if n not in own]
        if asked.template is not None:
            check(opened.tree, asked.template, opened.shape, asked.allow_missing)
        shared = {n: opened.table.get(opened.holder(n)) for n in names if n not in held}
        cut = [n for n, found in shared.items() if found is not None and not found.everywhere]
        if cut and asked.template is not None:
            raise ManagerError(
                f"{opened.path}: {cut[0]} is cut over a device mesh and the template has none to say how "
                f"({len(cut)} such in all); build that state first (an optimizer: take a step)"
            )
        self._tensors(opened, names, held)

    def _tensors(self, opened: Opened, names: Sequence[str], held: Mapping[str, torch.Tensor]) -> None:
        """Read by name, in parallel, each as the template's is cut; tied names are one tensor."""
        for name in names:
            if name in held:
                _fits(opened, name, held[name])
        boxes = {n: box_of(n, held[n]) for n in names if n in held}
        jobs: dict[tuple[str, object], str] = {}
        for name in names:
            jobs.setdefault((opened.holder(name), boxes.get(name)), name)

        def read(name: str) -> torch.Tensor:
            box = boxes.get(name)
            if box is None:
                return opened.read(name)
            template = cast("DTensor", held[name])  # else it had no box
            local = tuple(template.to_local().shape)
            if 0 in local:
                return _like(template, torch.empty(local, dtype=template.dtype, device="cpu"))
            return _like(template, opened.read(name, (box.offset, local)))

        found = dict(zip(jobs, each(read, list(jobs.values()), min(4, cores())), strict=True))
        for name in names:
            self.tensors[name] = found[opened.holder(name), boxes.get(name)]
        unique = {id(t): t for t in found.values()}
        self.nbytes += sum(_bytes(t) for t in unique.values())

    def _value(self, client_state: Mapping[str, object]) -> object:
        """What the caller gets; the template is filled here."""
        asked = self.asked
        if asked.names is not None:
            held = _held(asked.template)
            return {n: fill(held[n], t) if n in held else t for n, t in self.tensors.items()}
        template = MISSING if asked.template is None else asked.template
        if isinstance(template, Engine):
            return dict(client_state)
        value = Builder(self.tensors, asked.allow_missing).build(self.opened.tree, template)
        if isinstance(value, dict) and client_state:
            value.setdefault("client_state", dict(client_state))
        return value

    def _load_engine(self, name: str, engine: Engine) -> Mapping[str, object]:
        """An engine's own load, of files that were checked; the client state it gives."""
        where = os.path.join(self.store.path(self.step), engine_directory(name))
        path, client_state = engine.load_checkpoint(where, engine_tag(self.step))
        if path is None:
            raise ManagerError(f"{where}: the engine found nothing to load")
        return client_state if isinstance(client_state, dict) else {}


def _fits(opened: Opened, name: str, template: torch.Tensor) -> None:
    """Refuse a tensor that cannot hold what was saved. Raises ManagerError."""
    shape, dtype = opened.shape(name), torch_dtype(opened.dtype(name))
    why = ""
    if tuple(template.shape) != shape:
        why = f"saved shape {shape}, the template's is {tuple(template.shape)}"
    elif template.is_meta:
        why = "the template is on the meta device, which holds nothing; to_empty() gives it memory"
    elif type(template) in PLAIN and not has_memory(template):
        why = "the template has no plain memory (or no more)"
    elif not torch.can_cast(dtype, template.dtype):
        why = f"saved as {dtype}, the template's {template.dtype} cannot hold that"
    elif any(n > 1 and step == 0 for n, step in zip(template.shape, template.stride(), strict=True)):
        why = "elements of the template share memory (it was expanded); clone() it"
    if why:
        raise ManagerError(f"{opened.path}: {name}: {why}")


def _held(template: object) -> Mapping[str, torch.Tensor]:
    """The tensors of a template for a restore by name."""
    if template is None:
        return {}
    if isinstance(template, Mapping) and all(isinstance(t, torch.Tensor) for t in template.values()):
        return template
    raise ManagerError("restore of names: wanted a dict of tensors by name as template")


def _like(template: DTensor, local: torch.Tensor) -> DTensor:
    """A local part as a tensor cut like the template."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local.to(template.device),
        template.device_mesh,
        template.placements,
        shape=template.shape,
        stride=template.stride(),
        run_check=False,
    )


def _bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())
