"""Tensors of a torch file as entries, and which of them are the same tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..checkpoint import Entry
from ..errors import SourceError
from ..extents import Extents
from .assembly import Strided
from .torchfile import Inert, Tensor, TorchFile

_REBUILDS = "torch._utils.", "torch._tensor."
"""How the names of the functions begin that make tensors."""


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A file, whose first extent is number `base` of its checkpoint's table."""

    file: TorchFile
    base: int

    def entry(self, t: Tensor, extents: Extents, kind: str = "parameter") -> Entry:
        """The entry of a tensor in it. Raises SourceError when its storage was not among the wanted ones."""
        if t.numel and t.storage.extent < 0:
            raise SourceError(f"{self.file.file.path}: storage {t.storage.key} was not located")
        return Strided(t.shape, t.dtype, extents, self.base + t.storage.extent, t.offset, t.stride, kind)


def in_one_table(files: Sequence[TorchFile]) -> tuple[Extents, list[Opened]]:
    """The extents of all files as one table, and the files in it."""
    bases = accumulate((len(f.extents) for f in files), initial=0)
    opened = [Opened(f, base) for f, base in zip(files, bases, strict=False)]
    return Extents(e for f in files for e in f.extents), opened


def by_storage(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Tied name -> holder, the first name: tensors of one file over the same elements of one storage."""
    first: dict[object, str] = {}
    tied = {}
    for name, t in tensors.items():
        holder = first.setdefault(place(t), name) if t.numel else name
        if holder != name:
            tied[name] = holder
    return tied


def places(tensors: Iterable[object]) -> bytes:
    """Where the tensors of one file lie, those that were located, for a digest: extent, offset, strides."""
    found = (t for t in tensors if isinstance(t, Tensor) and t.storage.extent >= 0)
    return repr([(t.storage.extent, t.offset, t.stride) for t in found]).encode()


def refuse_unread(name: str, value: object) -> None:
    """Raises SourceError for a tensor that stays inert (sparse, quantised, distributed, of a subclass), and
    for values that hold a tensor: unlike a plain value, it must not be left out. What a module keeps as
    torch's extra state is no weight."""
    if name.endswith("_extra_state"):
        return
    if isinstance(value, Inert) and not value.name.startswith("torch.") and _holds_tensor(value):
        raise SourceError(
            f"{name}: a tensor of another library's class (made by {value.name}), such as Transformer "
            "Engine's fp8, or an object that holds tensors: not read; save each dense, by a name of its own"
        )
    within = tuple(value.values()) if isinstance(value, dict) else value
    for held in within if isinstance(within, list | tuple) else ():
        if isinstance(held, Tensor):
            raise SourceError(f"{name}: holds a tensor, where a state dict has each under a name of its own")
        refuse_unread(name, held)
    if isinstance(value, Inert) and value.name.startswith("torch."):
        kinds = [a.name for a in value.args if isinstance(a, Inert) and a.name.startswith("torch.")]
        kinds = [kind for kind in kinds if not kind.endswith("Storage")] or kinds
        if name.endswith("_flat_param"):
            raise SourceError(
                f"{name}: FSDP's flat parameters (LOCAL_STATE_DICT) do not say what is in them; save "
                "SHARDED_STATE_DICT or FULL_STATE_DICT"
            )
        if part := next((kind for kind in kinds if kind.startswith("torch.distributed.")), None):
            raise SourceError(
                f"{name}: is the part of one rank ({part}); the files of all N ranks are read together where "
                "they are called model_world_size_N_rank_R.pt"
            )
        of = f" of {kinds[0]}" if kinds else ""
        raise SourceError(f"{name}: a tensor{of} made by {value.name} is not read; save it dense and whole")


def _holds_tensor(value: object) -> bool:
    """Whether a tensor, or what torch rebuilds one of, is anywhere in a value. What else of torch's stands in
    an object of settings, a function or an enum, is none."""
    if isinstance(value, Inert):
        return value.name.startswith(_REBUILDS) or _holds_tensor([value.args, value.state, value.items])
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, Tensor) or any(map(_holds_tensor, within))


def place(t: Tensor) -> tuple[object, ...]:
    """Equal for tensors of one file over the same elements."""
    return t.storage.key, t.dtype.name, t.offset, t.shape, t.stride
