"""Records of what a pickle named and nobody imported, and the limits of a tree that holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...errors import SourceError

MAX_DEPTH = 200
"""The deepest nesting of containers in the finished tree."""

MAX_NODES = 1 << 24
"""The most values in the finished tree of a pickle that has fewer bytes, a shared part counted each time it
is reached."""


@dataclass(slots=True, eq=False)
class Inert:
    """A global, call or object the pickle named and nobody imported.

    `name` is "module.qualname"; `args` what it was called with; `state` what BUILD gave it (None when
    nothing did); `items` what was appended to it, or (key, value) pairs set on it. Filled while the
    pickle is read and left alone after; two records are equal when they are the same object."""

    name: str
    args: tuple[object, ...] = ()
    state: object | None = None
    items: list[object] = field(default_factory=list)


_CONTAINERS = frozenset({list, dict, tuple, Inert})
"""The types of what holds values; nothing of a type made from these is in a tree."""

_EMPTY = 1, 1
"""(values, depth) of an empty container."""

_LARGE = 1 << 6
"""Values in a part whose size is remembered: a smaller one is counted again each time it is reached."""


def check_tree(root: object, nbytes: int) -> None:
    """Refuses the tree of a pickle of `nbytes` that contains itself, is too deep, or too large when walked
    without a memory."""
    if type(root) in _CONTAINERS:
        _measure(root, max(MAX_NODES, nbytes), set(), {})


def _measure(node: object, most: int, path: set[int], known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values, depth) of a container, each shared part counted as often as it is reached."""
    here = id(node)
    if here in known:
        return known[here]
    if here in path:
        raise SourceError("pickle: a value contains itself")
    if len(path) == MAX_DEPTH:
        raise SourceError(f"pickle: values are nested deeper than {MAX_DEPTH}")
    path.add(here)
    nodes, depth = 1, 0
    for part in _parts(node):
        if type(part) not in _CONTAINERS:
            nodes += 1
            continue
        inner = _measure(part, most, path, known) if part else _EMPTY
        nodes += inner[0]
        if inner[1] > depth:
            depth = inner[1]
            if len(path) + depth > MAX_DEPTH:
                raise SourceError(f"pickle: values are nested deeper than {MAX_DEPTH}")
        if nodes > most:
            raise SourceError(f"pickle: it unfolds to more than {most} values")
    path.remove(here)
    if nodes >= _LARGE:
        known[here] = nodes, depth + 1
    return nodes, depth + 1


def _parts(node: object) -> Iterable[object]:
    if isinstance(node, dict):  # plain keys are flat
        return (*node.values(), *(key for key in node if type(key) is Inert))
    if isinstance(node, Inert):
        return (node.args, node.state, node.items)
    return node  # type: ignore[return-value]


def type_name(value: object) -> str:
    """What a pickled value is, in a word: its type, or the global it named."""
    return value.name if isinstance(value, Inert) else type(value).__name__
