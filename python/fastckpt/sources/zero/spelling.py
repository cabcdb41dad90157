"""A model whose `state_dict` leaves a prefix of its own names away, as trl's with a value head does: in
DeepSpeed's files the shapes have the parameters' names, and `module` those of `state_dict`.

Law: a tensor gets another name only where all of them do: no parameter is left that `module` lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..torchfile import Tensor
from .partitions import Shape


def respelled(
    module: Mapping[str, object], parameters: Sequence[Mapping[str, Shape]], others: Collection[str]
) -> Mapping[str, object]:
    """`module` under the names of `parameters`, group by group, and `others` (buffers, tied names). As it is
    where the parameters that it lacks have no prefix in common without which it has them all."""
    missing = {n: s for group in parameters for n, s in group.items() if n not in module}
    prefix = _prefix(missing, module)
    if not prefix or not all(_fits(module.get(n.removeprefix(prefix)), s) for n, s in missing.items()):
        return module
    new = {n.removeprefix(prefix): n for n in (*missing, *others) if n.startswith(prefix) and n not in module}
    if any(name in group for group in parameters for name in new):
        return module
    return {new.get(name, name): t for name, t in module.items()}


def _prefix(missing: Mapping[str, Shape], module: Mapping[str, object]) -> str:
    """The shortest prefix without which the first of `missing` is in `module`; "" for none."""
    first = next(iter(missing), "")
    dots = (i + 1 for i, c in enumerate(first) if c == ".")
    prefix = next((first[:i] for i in dots if first[i:] in module), "")
    return prefix if all(n.startswith(prefix) for n in missing) else ""


def _fits(value: object, shape: Shape) -> bool:
    """Whether it may be that parameter's copy: at stage 3 a placeholder without elements."""
    return isinstance(value, Tensor) and (value.shape == shape or not value.numel)
