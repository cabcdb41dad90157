"""Records of what a pickle named and nobody imported, and the limits of a tree that holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...errors import SourceError

MAX_DEPTH = 200
"""The deepest nesting of containers in the finished tree."""

MAX_NODES = 1 << 24
"""The most values in the finished tree, a shared part counted each time it is reached."""


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


_CONTAINERS = (list, dict, tuple, Inert)

_LARGE = 1 << 10
"""Values in a part whose size is remembered: a smaller one is counted again each time it is reached."""


def check_tree(root: object) -> None:
    """Refuses a tree that contains itself, is too deep, or too large when walked without a memory."""
    if isinstance(root, _CONTAINERS):
        _measure(root, set(), {})


def _measure(node: object, path: set[int], known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values, depth) of a container, each shared part counted as often as it is reached."""
    if (found := known.get(id(node))) is not None:
        return found
    if id(node) in path:
        raise SourceError("pickle: a value contains itself")
    if len(path) == MAX_DEPTH:
        raise SourceError(f"pickle: values are nested deeper than {MAX_DEPTH}")
    path.add(id(node))
    nodes, depth = 1, 0
    for part in _parts(node):
        if isinstance(part, _CONTAINERS):
            inner = _measure(part, path, known)
            nodes += inner[0]
            depth = max(depth, inner[1])
            if len(path) + depth > MAX_DEPTH:
                raise SourceError(f"pickle: values are nested deeper than {MAX_DEPTH}")
        else:
            nodes += 1
        if nodes > MAX_NODES:
            raise SourceError(f"pickle: it unfolds to more than {MAX_NODES} values")
    path.remove(id(node))
    if nodes >= _LARGE:
        known[id(node)] = nodes, depth + 1
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
