"""What a run tells: `log(dict)` writes one JSON line, and each picture in it as a PNG beside.

Another tracker (a web service's) is another class with this `log`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pictures


@dataclass(frozen=True)
class Shown:
    """A picture and its caption."""

    picture: pictures.Picture
    caption: str


class Tracker:
    """Appends to DIRECTORY/log.jsonl. A run that resumes at step `after` forgets what it had said since."""

    def __init__(self, directory: Path, after: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._path = directory, directory / "log.jsonl"
        said = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in said if json.loads(line)["step"] <= after]
        self._path.write_text("".join(f"{line}\n" for line in kept))

    def log(self, values: dict[str, object]) -> None:
        """Write one line; `step` must be among the values."""
        line: dict[str, object] = {}
        for key, value in values.items():
            if isinstance(value, Shown):
                name = f"{key}-{values['step']:06}.png"
                pictures.write(self._directory / name, value.picture, Description=value.caption)
                line |= {key: name, "caption": value.caption}
            else:
                line[key] = value
        with self._path.open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(
            " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()),
            flush=True,
        )
