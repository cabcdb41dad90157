"""Adapters kept apart: the part of one that each rank needs, read off where the layout puts the base's
weights.

Law: a rank must hold whole rows and columns of an adapted weight, and so holds the same of B and A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from ..checkpoint import Checkpoint, Entry, Single
from ..dtypes import DType
from ..errors import LayoutError, SourceError
from ..extents import Extents, File
from ..roles import Linear, Thin
from ..target import Target
from ..views import ZERO, View, cat, dense_strides, zeros
from .adapters import PREFIX, Adapter, kind_of
from .finishes import multiple
from .nowhere import Ints, elements, lies_nowhere, nowhere, pitched, runs


def hollow(adapter: Adapter, dtype: DType | None) -> Checkpoint:
    """The base with names and shapes but no bytes, except for what the adapter replaces. Each adapted weight
    has an extent of its own, with the module as its key, which shows where a layout puts it.

    Raises SourceError where it is not known which of the base's tensors are the adapter's, and LayoutError
    for an adapter of parameters, whose pairs are of many matrices."""
    base = adapter.base
    if adapter.settings.parameters:
        raise LayoutError(
            f"{adapter.settings.path}: an adapter of target_parameters "
            f"{[*adapter.settings.parameters]} is merged, not kept apart"
        )
    if adapter.settings.biases and adapter.tensors.extents is base.extents:
        raise SourceError(f"{base.path}: its biases were trained with the adapter; save that with PEFT first")
    kinds = {n: kind_of(e.dtype, dtype) for n, e in base.entries.items()}
    weights = {f"{m}.weight": m for m in adapter.pairs}
    extents = Extents(nowhere(None, base.entries[n].shape, kinds[n], m) for n, m in weights.items())
    index = {n: i for i, n in enumerate(weights)}

    def build(name: str, entry: Entry) -> Callable[[], View]:
        if name in index:
            return lambda: pitched(extents, index[name], kinds[name], entry.shape)
        saved = adapter.saved.get(name)
        if saved is not None:
            return lambda: saved.entry.build().cast(kinds[name])
        return lambda: zeros(entry.shape, kinds[name])

    entries = {n: Single(adapter.entry(n).shape, kinds[n], build(n, e)) for n, e in base.entries.items()}
    return replace(
        adapter.applied(entries, adapter.tensors.extents), beside=(File.at(adapter.settings.path),)
    )


def cut(targets: Iterable[Target], adapter: Adapter, dtype: DType | None) -> Iterator[Target]:
    """What a rank holds of the adapter, under PEFT's names; `targets`: what it holds of a `hollow` base.

    Raises LayoutError where a rank's part of a weight is not whole rows and columns of it, and for a tensor
    of the adapter that has no place."""
    left = {*adapter.pairs, *adapter.saved}
    for target in targets:
        if target.name in adapter.saved and target.name.removesuffix(".weight") not in adapter.pairs:
            left.discard(target.name)
            yield Target(f"{PREFIX}{adapter.saved[target.name].name}", target.view)
        for module, down, across in _parts(target.name, target.view, adapter.base):
            if module not in left:
                raise LayoutError(f"adapter: two tensors of the layout hold parts of {module}.weight")
            left.discard(module)
            pair = adapter.pairs[module]
            outputs, inputs = (across, down) if pair.flipped else (down, across)
            thins = (pair.a_name, pair.a, 1, inputs), (pair.b_name, pair.b, 0, outputs)
            for name, thin, axis, held in thins:
                view = thin.build().cast(kind_of(thin.dtype, dtype))
                yield Target(f"{PREFIX}{name}", _picked(view, axis, held))
            saved = adapter.saved.get(f"{module}.weight")
            if saved is not None:
                left.discard(f"{module}.weight")
                view = saved.entry.build().cast(kind_of(saved.entry.dtype, dtype))
                yield Target(f"{PREFIX}{saved.name}", _picked(_picked(view, 0, down), 1, across))
    if left:
        raise LayoutError(f"adapter: the layout has no place for {', '.join(sorted(left)[:3])}")


def by_roles(
    make: Callable[[Callable[[Linear], Thin | None]], Iterable[Target]], adapter: Adapter, dtype: DType | None
) -> Iterator[Target]:
    """What a rank holds of the adapter under the names of a layout that has some (`layouts.Adapts`), over a
    `hollow` base. `make` gives the targets; it is given a function that says what is added to a matrix.

    Raises LayoutError where a matrix is not whole rows and columns of a module, and for a tensor of the
    adapter that has no place."""
    if adapter.saved:
        raise LayoutError(f"adapter: the layout has no place for {next(iter(adapter.saved))} beside a base")
    base = adapter.base
    left = {m: math.prod(base.entries[f"{m}.weight"].shape) for m in adapter.pairs}  # elements with no place

    def thin(linear: Linear) -> Thin | None:
        found = [*_parts(linear.name, linear.weight, base)]
        if not found:
            return None
        ((module, down, across),) = found
        left[module] -= len(down) * len(across)
        pair = adapter.pairs[module]
        outputs, inputs = (across, down) if pair.flipped else (down, across)
        b = multiple(pair.b_name, pair.b.build(), pair.scale).cast(kind_of(pair.b.dtype, dtype))
        a = pair.a.build().cast(kind_of(pair.a.dtype, dtype))
        return Thin(module, _picked(a, 1, inputs), _picked(b, 0, outputs))

    yield from make(thin)
    without = sorted(module for module, elements in left.items() if elements)
    if without:
        raise LayoutError(f"adapter: the layout has no place for all of {', '.join(without[:3])}")


def _picked(view: View, axis: int, held: Ints) -> View:
    """result[.., i, ..] == view[.., held[i], ..]."""
    return cat([view.narrow(axis, start, stop - start) for start, stop in runs(held)], axis)


def _parts(name: str, view: View, base: Checkpoint) -> Iterator[tuple[str, Ints, Ints]]:
    """The adapted modules whose weights a view is made of: (module, rows and columns of its weight)."""
    d = len(view.held_shape)
    steps = dense_strides(view.held_shape)
    found: dict[str, list[tuple[int, Ints, Ints]]] = {}
    for extent, _, first, *box in view.held.tolist():
        if extent == ZERO or not lies_nowhere(view.extents[extent]):
            continue
        module = view.extents[extent].key
        columns = base.entries[f"{module}.weight"].shape[1]
        at = sum(o * s for o, s in zip(box[:d], steps, strict=True))
        down, across, _ = elements(first, box[d : 2 * d], box[2 * d :], columns)
        found.setdefault(module, []).append((at, down, across))
    for module, boxes in found.items():
        _, downs, acrosses = zip(*sorted(boxes, key=lambda b: b[0]), strict=True)
        if all(np.array_equal(x, acrosses[0]) for x in acrosses):
            down, across = np.concatenate(downs), acrosses[0]
        elif all(np.array_equal(x, downs[0]) for x in downs):
            down, across = downs[0], np.concatenate(acrosses)
        else:
            raise LayoutError(f"adapter: {name} is not cut along rows or columns of {module}.weight")
        if len(down) * len(across) != view.numel:
            raise LayoutError(f"adapter: {name} {view.shape} holds more than a part of {module}.weight")
        yield module, down, across
