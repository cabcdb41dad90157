"""Records of what a pickle named and nobody imported, and the limits of a tree that holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import SourceError

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


def _parts(node: object) -> Iterable[object]:
    if isinstance(node, dict):
        return node.values()  # keys are flat
    if isinstance(node, Inert):
        return (node.args, node.state, node.items)
    return node  # type: ignore[return-value]


_CONTAINERS = (list, dict, tuple, Inert)


def check_tree(root: object) -> None:
    """Refuses a tree that contains itself, is too deep, or too large when walked without a memory."""
    if not isinstance(root, _CONTAINERS):
        return
    unfinished = (0, 0)
    known: dict[int, tuple[int, int]] = {}  # id -> (values in it, depth)
    work: list[object] = [root]
    while work:
        node = work[-1]
        state = known.get(id(node))
        if state is None:
            known[id(node)] = unfinished
            for part in _parts(node):
                if isinstance(part, _CONTAINERS):
                    if (inner := known.get(id(part))) is None:
                        work.append(part)
                    elif inner is unfinished:
                        raise SourceError("pickle: a value contains itself")
        elif state is unfinished:
            nodes, depth = 1, 0
            for part in _parts(node):
                if isinstance(part, _CONTAINERS):
                    inner = known[id(part)]
                    nodes += inner[0]
                    depth = max(depth, inner[1])
                else:
                    nodes += 1
            if depth >= MAX_DEPTH:
                raise SourceError(f"pickle: values are nested deeper than {MAX_DEPTH}")
            if nodes > MAX_NODES:
                raise SourceError(f"pickle: it unfolds to more than {MAX_NODES} values")
            known[id(node)] = (nodes, depth + 1)
            work.pop()
        else:
            work.pop()
