"""`same`: names and tensors as they are, for one rank, of any model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..checkpoint import Checkpoint
from ..errors import LayoutError
from ..placement import Placement
from ..target import Target
from .naming import Naming, hub


@dataclass(frozen=True, slots=True)
class Same:
    """The checkpoint's own tensors. `container`: "safetensors" with the hub's file names, or "bin" with
    torch's (`pytorch_model.bin`)."""

    container: Literal["safetensors", "bin"] = "safetensors"
    roles: ClassVar[Literal[False]] = False

    def targets(self, ckpt: Checkpoint, placement: Placement) -> Iterator[Target]:
        """Every tensor, in the checkpoint's order. Raises LayoutError for more than one rank."""
        if placement.world != 1 or placement.ep != 1:
            raise LayoutError(f"layout same cuts nothing: wanted tp, pp, dp and ep 1, got {placement}")
        return (Target(name, entry.build()) for name, entry in ckpt.entries.items())

    def naming(self, placement: Placement) -> Naming:
        """The hub's names, or torch's."""
        if self.container == "safetensors":
            return hub()
        part = "pytorch_model-{part:05d}-of-{parts:05d}.bin"
        return Naming("", "pytorch_model.bin", part, 1, "pytorch_model.bin.index.json")
