"""State as a tree of plain values and tensors by name, and back. Nothing is pickled.

Law: what `flatten` takes apart, `Builder` gives back with equal values and types; what cannot be written
so is refused with its place. A container is a JSON object of one key, its tag, so that nothing is guessed.
"""

from __future__ import annotations

import base64
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from ..checkpoint import JSON
from ..errors import ManagerError
from ..sources.training import ENGINE, STATE, items_of, names_in, pairs_of, tag_of


@runtime_checkable
class Stateful(Protocol):
    """A module, optimizer, scheduler or anything else with torch's two methods."""

    def state_dict(self) -> Mapping[str, object]: ...

    def load_state_dict(self, state_dict: Mapping[str, object]) -> object: ...


@runtime_checkable
class Engine(Protocol):
    """A DeepSpeed engine: it writes and reads its own checkpoints."""

    def zero_optimization_stage(self) -> int: ...

    def save_checkpoint(self, save_dir: str, tag: str, client_state: dict[str, object]) -> object: ...

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[object, object]: ...


@dataclass(slots=True)
class Flat:
    """A state taken apart: the tree, its tensors by name, and the engines found, by name."""

    tree: JSON = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)


def flatten(state: object) -> Flat:
    """Take a state apart. Raises ManagerError for what is no plain value, naming its place."""
    flat = Flat()
    flat.tree = _tree(state, "", flat)
    return flat


def _tree(value: object, path: str, flat: Flat) -> JSON:
    """The JSON of a value; tensors and engines go to `flat` under their path."""
    if value is None or type(value) in (bool, int, str):
        return value  # type: ignore[return-value]
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.Tensor):
        return {"tensor": _enter(flat, path, value)}
    if isinstance(value, np.ndarray) and not hasattr(value, "mask"):
        return {"array": _enter(flat, path, _from_numpy(value, path))}
    if type(value) in _CONTAINERS and isinstance(value, (list, tuple, set, frozenset)):
        held = value if isinstance(value, (list, tuple)) else sorted(value, key=repr)
        return {type(value).__name__: [_tree(v, below(path, k), flat) for k, v in enumerate(held)]}
    if type(value) in (dict, OrderedDict) and isinstance(value, dict):
        pairs: list[JSON] = [[_key(k, path), _tree(v, below(path, k), flat)] for k, v in value.items()]
        if type(value) is dict:
            return {"dict": pairs}
        return {"ordered": pairs, "metadata": _tree(getattr(value, "_metadata", None), path, flat)}
    for kind, tag, write, _ in _LEAVES:
        if type(value) is kind:
            return {tag: write(value)}
    if isinstance(value, np.generic) and value.dtype.names is None:  # whose str would not say the fields
        return {"number": [value.dtype.str, value.tobytes().hex()]}
    if isinstance(value, Engine):
        flat.engines[path] = value
        return {ENGINE: path}
    if isinstance(value, Stateful):
        kind_name = "module" if isinstance(value, torch.nn.Module) else "object"
        return {STATE: [kind_name, _tree(dict_of(value), path, flat)]}
    raise ManagerError(
        f"state at {path or 'its root'}: a {type(value).__name__} is no tensor, plain value or object with "
        "state_dict and load_state_dict; turn it into one of these"
    )


def dict_of(value: Stateful) -> object:
    """An object's state dict, as the plain or ordered dict that it is."""
    found = value.state_dict()
    return found if isinstance(found, dict) else dict(found)


def _enter(flat: Flat, path: str, tensor: torch.Tensor) -> str:
    """Enter a tensor under its path; its name."""
    name = path or "tensor"
    if name in flat.tensors:
        raise ManagerError(f"state: two tensors are named {name!r}; a key with dots in it meets a nested one")
    flat.tensors[name] = tensor
    return name


def _key(key: object, path: str) -> JSON:
    if key is None or type(key) in (bool, int, str):
        return key  # type: ignore[return-value]
    raise ManagerError(f"state at {path or 'its root'}: key {key!r} is no string, int, bool or None")


def below(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _from_numpy(value: np.ndarray[tuple[int, ...], np.dtype[np.generic]], path: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except TypeError as e:
        raise ManagerError(f"state at {path}: {e}") from None


_CONTAINERS = (list, tuple, set, frozenset)
_BUILD: Mapping[str, Callable[[list[object]], object]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}
_LEAVES: tuple[tuple[type, str, Callable[..., JSON], Callable[..., object]], ...] = (
    (bytes, "bytes", lambda v: base64.b64encode(v).decode(), base64.b64decode),
    (complex, "complex", lambda v: [v.real.hex(), v.imag.hex()], lambda j: complex(*map(float.fromhex, j))),
    (torch.dtype, "dtype", lambda v: str(v).removeprefix("torch."), lambda j: getattr(torch, j)),
    (torch.device, "device", str, torch.device),
    (torch.Size, "size", list, torch.Size),
)
"""type, its tag, to JSON and back."""


# ---- reading a tree ----


def merged(trees: list[JSON]) -> tuple[JSON, list[str]]:
    """The tree all ranks share, and the places where theirs differ; those are left out of dicts.

    Where a difference lies in no dict it is the whole that differs: ("", ...)."""
    differing: list[str] = []

    def merge(nodes: list[JSON], path: str) -> JSON:
        if all(n == nodes[0] for n in nodes):
            return nodes[0]
        tags = {tag_of(n)[0] for n in nodes}
        tag = tag_of(nodes[0])[0]
        if len(tags) == 1 and tag == STATE:
            kinds = {str(items_of(tag_of(n)[1])[0]) for n in nodes}
            if len(kinds) == 1:
                inner = merge([items_of(tag_of(n)[1])[1] for n in nodes], path)
                return {STATE: [kinds.pop(), inner]}
        if len(tags) == 1 and tag in ("dict", "ordered"):
            dicts = [dict(pairs_of(tag_of(n)[1])) for n in nodes]
            keys = dict.fromkeys(k for d in dicts for k in d)
            out: list[JSON] = []
            for key in keys:
                here = below(path, key)
                if not all(key in d for d in dicts):
                    differing.append(here)
                    continue
                before = len(differing)
                found = merge([d[key] for d in dicts], here)
                if len(differing) == before or tag_of(found)[0] in ("dict", "ordered", STATE):
                    out.append([key, found])
            node: dict[str, JSON] = {tag: out}
            if tag == "ordered" and isinstance(nodes[0], dict):
                node["metadata"] = nodes[0].get("metadata")
            return node
        differing.append(path)
        return None

    return merge(trees, ""), differing


# ---- back to values ----


class Missing:
    """No template."""


MISSING = Missing()


@dataclass(frozen=True, slots=True)
class Builder:
    """Gives values back; `tensors` by name, `allow_missing`: what only one side has is left alone."""

    tensors: Mapping[str, torch.Tensor]
    allow_missing: bool = False

    def build(self, tree: JSON, template: object = MISSING) -> object:
        """The value of a tree: filled into the template's objects and tensors where one is given."""
        tag, content = tag_of(tree)
        if tag == "":
            return content
        if tag == "tensor":
            found = self.tensors[str(content)]
            return fill(template, found) if isinstance(template, torch.Tensor) else found
        if tag == "array":
            return self.tensors[str(content)].numpy()
        if tag in ("dict", "ordered"):
            return self._dict(tag, tree, content, template)
        if tag in _BUILD:
            inner = template if isinstance(template, (list, tuple)) else ()
            return _BUILD[tag](
                [
                    self.build(v, inner[k] if k < len(inner) else MISSING)
                    for k, v in enumerate(items_of(content))
                ]
            )
        if tag == STATE:
            value = self.build(items_of(content)[1])
            if isinstance(template, torch.nn.Module) and isinstance(value, dict):
                template.load_state_dict(value, strict=not self.allow_missing)
                return template
            if isinstance(template, Stateful) and isinstance(value, dict):
                template.load_state_dict(value)
                return template
            return value
        if tag == "float":
            return float(str(content))
        if tag == "number":
            spelled, data = items_of(content)
            return np.frombuffer(bytes.fromhex(str(data)), np.dtype(str(spelled)))[0]
        for _, known, _, read in _LEAVES:
            if tag == known:
                return read(content)
        if tag == ENGINE:
            return template
        raise ManagerError(f"state: no kind of value {tag!r} here; was it written by a newer version?")

    def _dict(self, tag: str, tree: JSON, content: JSON, template: object) -> object:
        held = template if isinstance(template, dict) else None
        out: dict[object, object] = {} if tag == "dict" else OrderedDict()
        if held is not None:
            out = held
        for key, value in pairs_of(content):
            if not self._there(value):
                continue
            out[key] = self.build(value, MISSING if held is None or key not in held else held[key])
        if tag == "ordered" and held is None and isinstance(tree, dict) and tree.get("metadata") is not None:
            out._metadata = self.build(tree["metadata"])  # type: ignore[attr-defined]
        return out

    def _there(self, tree: JSON) -> bool:
        """Whether all tensors of a node were read; else, in a partial restore, it is left alone."""
        return (
            not self.allow_missing or tag_of(tree)[0] != "tensor" or set(names_in(tree)) <= set(self.tensors)
        )


def fill(template: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Put what was read into a tensor of the caller's, cast to its dtype, on its device.

    Raises ManagerError for another shape: nothing is spread over a larger tensor."""
    if template.shape != found.shape:
        raise ManagerError(f"restore: read shape {tuple(found.shape)}, wanted {tuple(template.shape)}")
    with torch.no_grad():
        template.copy_(found)
    return template
