"""Which matrices of a base an adapter's pairs belong to.

A stack of experts (target_parameters) has one A [experts * rank, ..], expert by expert, and one B [..,
rank * experts], rank by rank: expert e adds scale * B[:, e::experts] @ A[e * rank:(e + 1) * rank], or that
turned, as the shapes say. Wrappers nest, the parameter that a module declares first innermost.
Source: ParamWrapper in peft 0.17 to 0.21, tuners/lora/layer.py, whose versions turn stacks differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..checkpoint import Checkpoint, Entry, Single
from ..errors import SourceError
from ..views import View
from .adapter_settings import Settings

WRAPPED = ".base_layer"
"""What PEFT appends to the name of a module that it wraps."""

DECLARED = ("gate_up_proj", "up_proj", "down_proj", "weight")
"""Parameters that PEFT wraps, in the order in which transformers' modules declare them."""

CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""What transformers calls its modules whose weights are [inputs, outputs]. Other models have plain ones of
these names, but c_attn, which holds q, k and v, has more outputs than inputs in all."""

SavedAs = Callable[[str], tuple[str, ...]]
"""What the hub calls a tensor of experts or of their router, by its name in training: one name, or with {}
for an expert's number those of the matrices whose rows it has in turn; () for other tensors."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The thin matrices of one module or expert: `a` [rank, inputs], `b` [outputs, rank], and the names in
    PEFT's files of those that they are or lie in; `flipped`: the weight is [inputs, outputs]; `scale`: what
    the product is multiplied by."""

    a: Entry
    b: Entry
    a_name: str
    b_name: str
    flipped: bool
    scale: float

    def expert(self, e: int, count: int) -> Pair:
        """That of the expert number `e`, where this is of a stack of `count`."""
        rank, inputs, outputs = self.a.shape[0] // count, self.a.shape[1], self.b.shape[0]

        def columns(view: View) -> View:
            return view.split(1, count).narrow(2, e, 1).reshape((outputs, rank))

        a = _of(self.a, (rank, inputs), lambda view: view.narrow(0, e * rank, rank))
        return replace(self, a=a, b=_of(self.b, (outputs, rank), columns))

    def rows(self, first: int, count: int) -> Pair:
        """That of some rows of the weight."""
        if self.flipped:
            return replace(self, a=_of(self.a, (self.a.shape[0], count), lambda v: v.narrow(1, first, count)))
        return replace(self, b=_of(self.b, (count, self.b.shape[1]), lambda v: v.narrow(0, first, count)))


@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor that an adapter names, as a base holds it: `names` by expert and then by rows, where it holds
    experts one by one, else the one; its `shape`, of a stack (experts, rows, columns)."""

    names: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many experts it is of, 1 for a matrix."""
        return self.shape[0] or 1 if len(self.shape) == 3 else 1


def _held(entries: Mapping[str, Entry], name: str, saved_as: SavedAs) -> _Held | None:
    """The tensor that an adapter calls `name`, None where the base has none."""
    each = (name,) if name in entries else saved_as(name)
    if len(each) == 1 and each[0] in entries:
        return _Held((each,), entries[each[0]].shape)
    found: list[tuple[str, ...]] = []
    while names := tuple(n.replace("{}", str(len(found))) for n in each):
        if any(n not in entries for n in names):
            break
        found.append(names)
    shapes = [entries[n].shape for n in found[0]] if found else []
    if not shapes or any(len(shape) != 2 for shape in shapes):
        return None
    return _Held((*found,), (len(found), sum(shape[0] for shape in shapes), shapes[0][1]))


def placed(
    settings: Settings, thin: Mapping[str, Pair], base: Checkpoint, saved_as: SavedAs, where: str
) -> tuple[dict[str, Pair], dict[str, tuple[Pair, ...]]]:
    """The adapter's pairs by the base's modules, and by its stacks. Raises SourceError."""
    wrapped: dict[str, list[str]] = {}  # module -> its wrappers, from the outermost on
    for wrapper in sorted(thin):
        wrapped.setdefault(re.sub(rf"({WRAPPED})+$", "", wrapper), []).append(wrapper)
    placing = _Placing(settings, base, saved_as, where)
    for module, wrappers in wrapped.items():
        held = placing.parameters(module)
        if wrappers != [module + WRAPPED * depth for depth in range(len(held) or 1)]:
            raise SourceError(
                f"{where}: holds pairs of {', '.join(wrappers)}; target_parameters {[*settings.parameters]} "
                f"are {', '.join(held) or 'none'} of the base {base.path}"
            )
        if held:
            placing.place_parameters(held, [thin[wrapper] for wrapper in reversed(wrappers)])
        else:
            placing.place_module(module, thin[module])
    return placing.pairs, placing.stacks


class _Placing:
    """An adapter's `pairs`, by the base's modules, and those of its `stacks`, placed module by module."""

    def __init__(self, settings: Settings, base: Checkpoint, saved_as: SavedAs, where: str) -> None:
        self.settings, self.base, self.saved_as, self.where = settings, base, saved_as, where
        self.pairs: dict[str, Pair] = {}
        self.stacks: dict[str, tuple[Pair, ...]] = {}
        wide = (e.shape for n, e in base.entries.items() if n.endswith(".c_attn.weight"))
        self.conv1d = any(len(shape) == 2 and shape[0] < shape[1] for shape in wide)

    def parameters(self, module: str) -> dict[str, _Held]:
        """The parameters of a module that PEFT wraps each on its own, innermost first."""
        declared = [f"{module}.{p}" for p in DECLARED if self.settings.targets(f"{module}.{p}")]
        found = {name: _held(self.base.entries, name, self.saved_as) for name in declared}
        return {name: held for name, held in found.items() if held is not None}

    def place_module(self, module: str, pair: Pair) -> None:
        """The pair of a module's weight."""
        found = _held(self.base.entries, f"{module}.weight", self.saved_as)
        scale = self.settings.scale(module, pair.a.shape[0])
        flipped = pair.flipped or (found is not None and self._flipped(module, pair, found.shape))
        self._add(found.names[0][0] if found else module, replace(pair, scale=scale, flipped=flipped))

    def _flipped(self, module: str, pair: Pair, shape: tuple[int, ...]) -> bool:
        """Whether a weight is [inputs, outputs]. PEFT turns what it adds to a Conv1D, and to no other module.
        The config's fan_in_fan_out is what it found the last one to be, or, of quantised modules, whatever
        was asked for."""
        outputs, inputs = pair.b.shape[0], pair.a.shape[1]
        if outputs != inputs:
            return shape == (inputs, outputs)
        return self.conv1d and module.rpartition(".")[2] in CONV1D

    def place_parameters(self, held: Mapping[str, _Held], pairs: Sequence[Pair]) -> None:
        """The pairs of a module's parameters, in their order."""
        wide: dict[str, Pair] = {}  # those of stacks
        for (name, found), pair in zip(held.items(), pairs, strict=True):
            rank, over = divmod(pair.a.shape[0], found.count)
            if over:
                raise SourceError(
                    f"{self.where}: {pair.a_name} {pair.a.shape}: wanted rows for {found.count} experts"
                )
            scaled = replace(pair, scale=self.settings.scale(name, rank))
            if len(found.shape) == 3:
                wide[name] = scaled
            else:
                self._add(found.names[0][0], scaled)
        turned = _turned({name: (pair, held[name].shape) for name, pair in wide.items()}, self.where)
        for name, pair in wide.items():
            self._place_stack(held[name], replace(pair, flipped=turned))

    def _place_stack(self, found: _Held, pair: Pair) -> None:
        """The pair of a stack, which the base may hold expert by expert, and those by their rows."""
        each = tuple(pair.expert(e, found.count) for e in range(found.count))
        first = [self.base.entries[name] for name in found.names[0]]
        if len(first[0].shape) == 3:
            self.stacks[found.names[0][0]] = each
            return
        sizes = [entry.shape[0] for entry in first]
        for names, one in zip(found.names, each, strict=True):
            for matrix, rows, end in zip(names, sizes, accumulate(sizes), strict=True):
                self._add(matrix, one.rows(end - rows, rows))

    def _add(self, name: str, pair: Pair) -> None:
        module = name.removesuffix(".weight")
        if module in self.pairs:
            raise SourceError(
                f"{self.where}: {pair.a_name} is a second A of {module}, which has "
                f"{self.pairs[module].a_name}"
            )
        self.pairs[module] = pair


def _turned(wide: Mapping[str, tuple[Pair, tuple[int, ...]]], where: str) -> bool:
    """Whether a module's stacks are [experts, inputs, outputs]: in every version all are, or none. Raises
    SourceError."""
    seen: set[bool] = set()
    for name, (pair, (count, *matrix)) in wide.items():
        product = [pair.b.shape[0], pair.a.shape[1]]
        either = (False, True) if count > 1 else (False,)  # PEFT turns none of a stack of one
        fits = {turned for turned in either if product[:: -1 if turned else 1] == matrix}
        if not fits or pair.flipped:
            raise SourceError(
                f"{where}: B {pair.b.shape} @ A {pair.a.shape} of {count} experts does not fit {name} "
                f"{(count, *matrix)}"
            )
        seen |= fits if len(fits) == 1 else set()
    if wide and len(seen) != 1:
        raise SourceError(
            f"{where}: {', '.join(wide)}: the shapes do not tell whether these are [experts, outputs, "
            "inputs]; PEFT's merge_and_unload makes one model of it"
        )
    return seen == {True}


def _of(entry: Entry, shape: tuple[int, ...], part: Callable[[View], View]) -> Entry:
    """A part of an entry, of that shape."""
    return Single(shape, entry.dtype, lambda: part(entry.build()))
