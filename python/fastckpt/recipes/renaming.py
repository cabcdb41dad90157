"""Other names for the same thing: of a checkpoint's tensors, and of the roles that a recipe has made of them.

So a recipe reads the decoder within a larger model, which knows nothing of what is around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import TypeVar, cast

from ..checkpoint import Checkpoint
from ..errors import RecipeError
from ..model import Lazy, Model
from ..views import View

Role = TypeVar("Role")

NAMES = frozenset({"name", "bias_name", "fused", "gate_up", "down"})
"""The fields of roles that hold a name of the hub, where they are strings."""


def respelled(ckpt: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The tensors and tied names of `names` alone, which says what each new name is called in `ckpt`."""
    old = {stored: name for name, stored in names.items()}
    return replace(
        ckpt,
        entries={name: ckpt.entries[stored] for name, stored in names.items() if stored in ckpt.entries},
        aliases={old[a]: old[h] for a, h in ckpt.aliases.items() if a in old and h in old},
    )


def as_the_hub(ckpt: Checkpoint, spellings: Sequence[tuple[str, str]]) -> Checkpoint:
    """The checkpoint by the hub's names: in every name each pattern of `spellings` is replaced, in order.

    Raises RecipeError where two tensors would have one name."""
    patterns = [(re.compile(other), hub) for other, hub in spellings]

    def spell(name: str) -> str:
        for pattern, hub in patterns:
            name = pattern.sub(hub, name)
        return name

    return spelled(ckpt, spell)


def spelled(ckpt: Checkpoint, spell: Callable[[str], str]) -> Checkpoint:
    """The checkpoint by the hub's names, `spell` of its own. Raises RecipeError where two tensors would have
    one name."""
    names: dict[str, str] = {}
    for stored in (*ckpt.entries, *ckpt.aliases):
        name = spell(stored)
        if names.setdefault(name, stored) != stored:
            raise RecipeError(f"{ckpt.path}: {names[name]} and {stored} are both what the hub calls {name}")
    return ckpt if all(name == stored for name, stored in names.items()) else respelled(ckpt, names)


def renamed(model: Model, spell: Callable[[str], str]) -> Model:
    """The model with `spell` of every name in its roles."""
    return replace(_renamed(model, spell), ignored=tuple(map(spell, model.ignored)))


def _renamed(role: Role, spell: Callable[[str], str]) -> Role:
    """A role, or what a field of one holds, with other names; layers and experts when they are asked for."""
    made: object = role
    if isinstance(role, Lazy):
        made = role.map(partial(_renamed, spell=spell))
    elif isinstance(role, tuple):
        made = tuple([_renamed(each, spell) for each in role])
    elif is_dataclass(role) and not isinstance(role, type | View):
        held = {f.name: getattr(role, f.name) for f in fields(role)}
        new = {
            k: spell(v) if k in NAMES and isinstance(v, str) and v else _renamed(v, spell)
            for k, v in held.items()
        }
        made = replace(role, **new)
    return cast(Role, made)
