"""Serving conventions: each layout turns a Model (or a Checkpoint) and a placement into targets.

A layout is a file here and a line in LAYOUTS: a frozen dataclass whose fields are its options. Where `roles`
is True, `targets` takes a Model; where it is False, the Checkpoint itself. A run imports only the layout it
asks for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints, runtime_checkable

from ..checkpoint import Checkpoint
from ..errors import LayoutError
from ..model import Model
from ..placement import Placement
from ..roles import Linear, Thin
from ..target import Target
from .naming import Naming
from .patterns import Patterns

__all__ = [
    "LAYOUTS", "VERSION", "Adapts", "ByNames", "ByRoles", "Layout", "Naming", "Patterns", "Resizes", "chosen",
    "layout", "name_of", "options_of",
]  # fmt: skip


class ByRoles(Protocol):
    """A layout over roles: it needs a recipe."""

    roles: ClassVar[Literal[True]]

    def targets(self, model: Model, placement: Placement) -> Iterator[Target]:
        """One rank's tensors. Raises LayoutError, before the first, for sizes this placement cannot cut."""

    def naming(self, placement: Placement) -> Naming:
        """The names of that rank's files."""


class ByNames(Protocol):
    """A layout over names: it needs neither recipe nor config."""

    roles: ClassVar[Literal[False]]

    def targets(self, ckpt: Checkpoint, placement: Placement) -> Iterator[Target]:
        """One rank's tensors. Raises LayoutError, before the first, for sizes this placement cannot cut."""

    def naming(self, placement: Placement) -> Naming:
        """The names of that rank's files."""


@runtime_checkable
class Resizes(Protocol):
    """A layout that may pad sizes which the server reads from config.json."""

    def resized(self, model: Model, placement: Placement) -> Mapping[str, int]:
        """config.json's keys whose numbers change, with the new numbers. Raises LayoutError where no key can
        say a new size."""


@runtime_checkable
class Adapts(Protocol):
    """A layout by roles that has its own names for an adapter that is kept apart."""

    def adapted(
        self, model: Model, placement: Placement, thin: Callable[[Linear], Thin | None]
    ) -> Iterator[Target]:
        """One rank's part of the adapter; `thin` says what it adds to a matrix. Raises LayoutError."""

    def adapted_naming(self, placement: Placement) -> Naming:
        """The names of that rank's files of an adapter."""


Layout = ByRoles | ByNames

LAYOUTS: dict[str, str] = {
    "same": "same.Same",
    "hf": "hf.Hf",
    "vllm": "vllm.Vllm",
    "rtp_llm": "rtp_llm.RtpLlm",
    "megatron": "megatron.Megatron",
}
"""Name -> module and class of the layout."""


VERSION = 1
"""One for all layouts; it goes up when any of them makes other tensors from the same model and options.
Records hold it, because reading shards back asks the layout again."""


def layout(name: str, options: Mapping[str, str] | None = None) -> Layout:
    """The layout of that name, its options read from strings (`-L key=value`).

    Booleans are "true" or "false". Raises LayoutError naming the layouts, options or values there are."""
    if name not in LAYOUTS:
        raise LayoutError(f"no layout {name!r}; known: {', '.join(LAYOUTS)}")
    fields = _fields(name)
    values: dict[str, bool | int | str] = {}
    for key, text in (options or {}).items():
        if key not in fields:
            raise LayoutError(f"layout {name} has no option {key!r}; known: {', '.join(fields) or 'none'}")
        values[key] = _parsed(f"layout {name}: {key}", text, fields[key])
    make: Callable[..., Layout] = _kind(name)
    return make(**values)


def chosen(asked: str | Layout) -> Layout:
    """The layout of a name, or an object, its options held to what `layout` reads. Raises LayoutError."""
    if isinstance(asked, str):
        return layout(asked)
    if isinstance(asked, type) or not all(hasattr(asked, part) for part in ("roles", "targets", "naming")):
        raise LayoutError(f"layout: wanted a name or a layout's object, got {asked!r:.80}")
    name = name_of(type(asked))
    return asked if name is None else layout(name, options_of(asked))


def _kind(name: str) -> type:
    """The class of a layout."""
    module, _, kind = LAYOUTS[name].partition(".")
    found: type = getattr(import_module(f".{module}", __name__), kind)
    return found


@cache
def _fields(name: str) -> dict[str, object]:
    """The options of a layout and their types."""
    kind = _kind(name)
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def name_of(kind: type) -> str | None:
    """The name of a class of LAYOUTS; None for any other."""
    where = f"{kind.__module__}.{kind.__qualname__}"
    return next((name for name, home in LAYOUTS.items() if where == f"{__name__}.{home}"), None)


def options_of(made: Layout) -> dict[str, str]:
    """The options that differ from the defaults, as `layout` reads them; {} for a layout not in LAYOUTS."""
    kind: type = type(made)
    if all(name_of(base) is None for base in kind.__mro__):  # a user's own may be derived from one of ours
        return {}
    found = [(f.name, getattr(made, f.name), f.default) for f in dataclasses.fields(kind)]
    changed = {name: value for name, value, default in found if value != default}
    return {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in changed.items()}


def _parsed(where: str, text: str, kind: object) -> bool | int | str:
    if kind is bool:
        choices: Mapping[str, bool | str] = {"true": True, "false": False}
    elif get_origin(kind) is Literal:
        choices = {choice: choice for choice in get_args(kind)}
    elif kind is int:
        if not re.fullmatch("[0-9]{1,18}", text):
            raise LayoutError(f"{where}: wanted a number, got {text[:40]!r}")
        return int(text)
    else:
        return text
    if text not in choices:
        raise LayoutError(f"{where}: wanted {' or '.join(choices)}, got {text!r}")
    return choices[text]
