"""Whether a template fits what was saved, found out before anything of it is changed.

Law: the checks are those of a restore that would go wrong halfway; each error names the place in the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checkpoint import JSON
from ..errors import ManagerError
from ..sources.training import ENGINE, STATE, items_of, pairs_of, tag_of
from .state_tree import MISSING, Engine, Stateful, below, dict_of

Shape = Callable[[str], tuple[int, ...]]
"""The shape of a saved tensor by its name, of the whole where it is cut."""


def check(tree: JSON, template: object, shape: Shape, allow_missing: bool) -> None:
    """Refuse, before anything is changed, a template that does not fit: a ManagerError names the place."""
    _Check(shape, allow_missing).visit(tree, template, "")


@dataclass(frozen=True, slots=True)
class _Check:
    """A walk over a saved tree and a template at once."""

    shape: Shape
    allow_missing: bool

    def visit(self, node: JSON, held: object, path: str) -> None:
        """Compare a node with what the template holds in its place, and all below them."""
        if held is MISSING:
            return
        tag, content = tag_of(node)
        saved, has = tag or "a value", type(held).__name__
        if isinstance(held, torch.Tensor):
            if tag not in ("tensor", "array"):
                raise _refused(path, f"the template has a tensor, the commit {saved}")
            self._tensor(str(content), held, path)
        elif isinstance(held, Engine) != (tag == ENGINE):
            raise _refused(path, f"an engine on one side only ({tag or 'a plain value'} saved)")
        elif isinstance(held, Stateful) and tag != ENGINE:
            if tag != STATE:
                raise _refused(path, f"the template has a {has}, the commit {saved}")
            self._object(items_of(content)[1], held, path)
        elif isinstance(held, dict) and tag in ("dict", "ordered"):
            self._dict(content, held, path)
        elif isinstance(held, (list, tuple)) and tag in ("list", "tuple"):
            self._list(items_of(content), held, path)
        elif isinstance(held, (dict, list, tuple)) and held and not isinstance(held, torch.Size):
            raise _refused(path, f"the template has a {has}, the commit {saved}")
        elif tag == STATE:
            raise _refused(path, f"wanted an object with load_state_dict, got {has}")

    def _tensor(self, name: str, held: torch.Tensor, path: str) -> None:
        saved = self.shape(name)
        if tuple(held.shape) != saved:
            raise _refused(path, f"saved shape {saved}, the template's is {tuple(held.shape)}")

    def _object(self, saved: JSON, held: Stateful, path: str) -> None:
        """An object's saved state dict."""
        if isinstance(held, torch.optim.Optimizer):
            before, sizes = _group_sizes(saved), [len(g["params"]) for g in held.param_groups]
            if before is not None and before != sizes:
                raise _refused(
                    path, f"groups of {before} parameters were saved, the optimizer's are of {sizes}"
                )
        if isinstance(held, torch.nn.Module):
            own = dict_of(held)
            more = [k for k, _ in pairs_of(tag_of(saved)[1]) if isinstance(own, dict) and k not in own]
            if more and not self.allow_missing:
                raise _refused(path, f"the module has no {more[0]!r} ({len(more)} in all)")
            self.visit(saved, own, path)

    def _dict(self, content: JSON, held: dict[object, object], path: str) -> None:
        saved = dict(pairs_of(content))
        lacking = [k for k in held if k not in saved]
        if lacking and not self.allow_missing:
            raise _refused(
                path,
                f"{lacking[0]!r} is not in the commit ({len(lacking)} in all); "
                "allow_missing=True leaves it as it is",
            )
        for key, value in saved.items():
            self.visit(value, held.get(key, MISSING), below(path, key))

    def _list(self, saved: list[JSON], held: list[object] | tuple[object, ...], path: str) -> None:
        filled = any(isinstance(v, (torch.Tensor, Stateful)) for v in held)
        if filled and len(saved) != len(held) and not self.allow_missing:
            raise _refused(path, f"{len(saved)} were saved, the template has {len(held)}")
        for k, (value, own) in enumerate(zip(saved, held, strict=False)):
            self.visit(value, own, below(path, k))


def _refused(path: str, why: str) -> ManagerError:
    return ManagerError(f"restore at {path or 'its root'}: {why}")


def _group_sizes(optimizer: JSON) -> list[int] | None:
    """How many parameters each group of a saved optimizer had; None where it keeps none so."""
    groups = dict(pairs_of(tag_of(optimizer)[1])).get("param_groups")
    if groups is None:
        return None
    inside = [dict(pairs_of(tag_of(g)[1])).get("params") for g in items_of(tag_of(groups)[1])]
    return [len(items_of(tag_of(params)[1])) for params in inside]
