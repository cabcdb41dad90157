"""What a user tells a loader through the engine's own extra config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..checkpoint import Checkpoint
from ..errors import LayoutError
from ..opening import open as open_checkpoint
from ..paths import is_directory


@dataclass(frozen=True, slots=True)
class Asked:
    """`checkpoint`: another path than the model's; `tag` and `weights` as in `open`; `engine`: whose names
    hold, where the running version is not in layouts/engines.py ("" its own)."""

    checkpoint: str = ""
    tag: str = ""
    weights: str = "master"
    engine: str = ""

    @staticmethod
    def of(given: object) -> Asked:
        """The extra config as the engine has it.

        Raises LayoutError for another key, or a value that is no text."""
        known = [f.name for f in fields(Asked)]
        if not isinstance(given, Mapping):
            raise LayoutError(f"model_loader_extra_config: wanted a JSON object, got {type(given).__name__}")
        for key, value in given.items():
            if key not in known or not isinstance(value, str):
                raise LayoutError(
                    f"model_loader_extra_config: {key!r}: {value!r}; wanted text for {', '.join(known)}"
                )
        return Asked(**given)

    def opened(self, model: str) -> Checkpoint:
        """The checkpoint, where `model` is the engine's model path. Raises SourceError."""
        return open_checkpoint(
            self.checkpoint or model,
            tag=self.tag or None,
            weights=self.weights,
            config=model if is_directory(model) else None,
        )


def refuse(unknown: Mapping[str, object]) -> None:
    """Refuse, with a LayoutError, what was asked of an engine that these loaders do not do: name -> value."""
    for what, asked in unknown.items():
        if asked:
            raise LayoutError(f"load format fastckpt: {what} is not loaded this way, got {asked!r}")
