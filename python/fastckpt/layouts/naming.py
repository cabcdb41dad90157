"""How one rank's files are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Naming:
    """The file names of one rank's shard.

    `directory`: below the output, "" for the output itself. `single`: the file's name where one holds the
    whole shard. `part`: the pattern for several, formatted with `part` (counted from `first`) and `parts`
    (how many). `index`: the index file's name, None where the format has none. `metadata`: the string pairs
    of a safetensors header. The suffix of `single` tells the container: `.safetensors` or `.bin`."""

    directory: str
    single: str
    part: str
    first: int = 0
    index: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def file(self, part: int, parts: int) -> str:
        """The name of the `part`-th (from 0) of `parts` files."""
        return self.single if parts == 1 else self.part.format(part=self.first + part, parts=parts)


def hub(directory: str = "") -> Naming:
    """The names transformers' save_pretrained gives to safetensors files."""
    return Naming(
        directory,
        "model.safetensors",
        "model-{part:05d}-of-{parts:05d}.safetensors",
        1,
        "model.safetensors.index.json",
        {"format": "pt"},
    )


def ranked(tp: int, rank: int) -> Naming:
    """The hub's names, at tp > 1 inside the rank's own directory."""
    return hub(f"rank-{rank:02d}" if tp > 1 else "")
