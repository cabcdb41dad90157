"""The files of a pipeline's layers, 16-bit weights and buffers, under the names that the stages use.

Law: layer N's tensors are `N.NAME` in param_shapes and buffer_names, those of a tied module
`tied_modules.KEY.NAME`; which layer holds a tied module is said nowhere, so its tensors must fit, and agree
with the masters. Source: deepspeed/runtime/pipe/module.py (`save_state_dict`, `_build`) of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...checkpoint import Entry
from ...errors import SourceError
from ...extents import Extents
from ..plain_values import mapping
from ..samples import Agreement, check_copy, difference, one_axis
from ..torchfile import Tensor
from ..torchtensors import Opened, refuse_unread
from .opening import Whole
from .partitions import Shape
from .parts import trainable
from .state import ModelState

TIED = "tied_modules."


@dataclass(slots=True)
class Layers:
    """One tensor-parallel rank's tensors in files of layers: parameters that the optimizer owns, frozen ones,
    and buffers. `idle`: the layers of which no stage knows a name; `other`: names of what is no tensor."""

    copies: dict[str, Entry] = field(default_factory=dict)
    frozen: dict[str, Entry] = field(default_factory=dict)
    buffers: dict[str, Entry] = field(default_factory=dict)
    idle: list[int] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    def beside(self, exclude_frozen: bool) -> dict[str, Entry]:
        """What no master is of."""
        return self.buffers | ({} if exclude_frozen else self.frozen)


def layers(
    held: Mapping[int, Opened],
    states: Sequence[ModelState],
    masters: Mapping[str, Entry],
    extents: Extents,
    same: Agreement,
    where: str,
) -> Layers:
    """What the files of layers hold of one tensor-parallel rank; `states`, `masters`: those of its stages,
    the masters as far as they are read; what two files hold goes to `same`.

    Raises SourceError for a parameter in no file, for other shapes, and for copies of other values."""
    shapes = {n: s for state in states for n, s in trainable(state).items()}
    buffers = {n for state in states for n in state.buffers}
    out = Layers()
    off = states[0].shapes is None  # nothing says what the optimizer owns
    for layer, opened in held.items():
        file = opened.file.file.path
        tensors: dict[str, Tensor] = {}
        other: list[str] = []
        for key, t in mapping(opened.file.root, file).items():
            if isinstance(t, Tensor):
                tensors[str(key)] = t
            else:
                refuse_unread(f"{file}: {key}", t)
                other.append(str(key))
        prefix = f"{layer}."
        if not off and not any(prefix + key in shapes or prefix + key in buffers for key in tensors):
            whole = {key: Whole(opened, t).entry(extents, "parameter") for key, t in tensors.items()}
            tied = _tied_to(whole, shapes, masters, file)
            prefix = tied or prefix
            out.idle += [layer] if tensors and not tied else []
        out.other += [prefix + key for key in other]
        for key, t in tensors.items():
            name = prefix + key
            if name in shapes and t.shape != shapes[name]:
                raise SourceError(f"{file}: {name} has shape {t.shape}, its shape is {shapes[name]}")
            kind, mine = "frozen", out.frozen
            if name in buffers:
                kind, mine = "buffer", out.buffers
            elif off or name in shapes:
                kind, mine = "parameter", out.copies
            entry = Whole(opened, t).entry(extents, kind)
            if mine.setdefault(name, entry) is not entry:  # a tied module that is a layer in two places
                same.add(f"{name}, of which {file} has a copy", mine[name], entry)
    for lost in (n for n in (*shapes, *sorted(buffers)) if n not in out.copies and n not in out.buffers):
        if not lost.startswith(TIED):  # of which only a function of it may be a layer
            raise SourceError(
                f"{where}: {lost} is in no file of a layer: not saved, or left on another node's disk, "
                "which also= (--also) names"
            )
    check_copy(one_axis({n: e for n, e in out.copies.items() if n in masters}), one_axis(masters), where)
    return out


def _tied_to(
    tensors: Mapping[str, Entry], shapes: Mapping[str, Shape], masters: Mapping[str, Entry], file: str
) -> str | None:
    """The prefix of the tied module whose tensors these are, if one fits. Raises SourceError for several."""
    modules: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if name.startswith(TIED):
            key, _, rest = name[len(TIED) :].partition(".")
            modules.setdefault(f"{TIED}{key}.", {})[rest] = shape
    fitting = [
        prefix
        for prefix, own in modules.items()
        if all(key in tensors and tensors[key].shape == shape for key, shape in own.items())
    ]
    if len(fitting) > 1:
        alike, fitting = fitting, [p for p in fitting if not _differs(p, modules[p], tensors, masters)]
        if len(fitting) != 1:
            raise SourceError(
                f"{file}: its tensors have the shapes of {len(alike)} tied modules, {', '.join(alike)}, and "
                f"the values of {len(fitting)}: which it is is in doubt"
            )
    return fitting[0] if fitting else None


def _differs(
    prefix: str, keys: Mapping[str, Shape], tensors: Mapping[str, Entry], masters: Mapping[str, Entry]
) -> bool:
    """Whether a tied module's copy has other values than its masters, where they are read."""
    copies = {prefix + key: tensors[key] for key in keys if prefix + key in masters}
    return difference(one_axis(copies), one_axis(masters)) is not None
