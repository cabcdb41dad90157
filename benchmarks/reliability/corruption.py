"""Damage to a commit's bytes: verify must see all of it, a restore must give none of it, and neither may see
any where there is none."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastckpt.errors import FastckptError
from fastckpt.manager.manager import CheckpointManager
from fastckpt.verification import verify

PAGE = 4096
KINDS = ("bit", "bit", "bit", "cut", "zero page", "zeros", "longer", "swapped", "gone", "moved")


@dataclass(slots=True)
class Found:
    """Damages and clean loads, and what was missed or seen where nothing was."""

    damages: int = 0
    missed: int = 0
    wrong: int = 0
    clean: int = 0
    alarms: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    words: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.damages > 0 and not (self.missed or self.wrong or self.alarms)

    def json(self) -> dict[str, object]:
        """For the results."""
        return {
            "damages": self.damages, "missed by verify": self.missed, "restored wrong": self.wrong,
            "clean loads": self.clean, "false alarms": self.alarms, "by_kind": dict(self.by_kind),
            "words": self.words[:100],
        }  # fmt: skip


def state(step: int) -> dict[str, object]:
    """Some tensors of several types and sizes, and values."""
    made = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(64, 96, generator=made),
        "half": torch.randn(3000, generator=made).bfloat16(),
        "bytes": torch.randint(0, 255, (700,), generator=made, dtype=torch.uint8),
        "step": step,
        "text": "words",
    }


def equal(a: object, b: object) -> bool:
    """Equal values, tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def damages(
    files: dict[str, bytes], others: dict[str, bytes], chance: random.Random
) -> Iterator[tuple[str, str, bytes | None]]:
    """(kind, file, its damaged bytes; None: it is gone), for ever; large files are hit more often."""
    names = sorted(files)
    sizes = [len(files[n]) for n in names]
    while True:
        name = chance.choices(names, sizes)[0] if chance.random() < 0.7 else chance.choice(names)
        data = files[name]
        at = chance.randrange(len(data))
        kind = chance.choice(KINDS)
        new: bytes | None
        if kind == "bit":
            new = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif kind == "cut":
            new = data[:at]
        elif kind == "zero page":
            low = at // PAGE * PAGE
            new = data[:low] + bytes(len(data[low : low + PAGE])) + data[low + PAGE :]
        elif kind == "zeros":
            n = chance.randrange(1, 64)
            new = data[:at] + bytes(len(data[at : at + n])) + data[at + n :]
        elif kind == "longer":
            new = data + bytes(chance.randrange(1, 64))
        elif kind == "swapped":  # the file of this name, or of another, from another commit
            new = others[name] if chance.random() < 0.5 else others[chance.choice(names)]
        elif kind == "moved":  # two runs of bytes change places
            n = min(chance.randrange(1, 256), len(data) // 2)
            a = chance.randrange(len(data) - 2 * n + 1)
            b = chance.randrange(a + n, len(data) - n + 1)
            new = data[:a] + data[b : b + n] + data[a + n : b] + data[a : a + n] + data[b + n :]
        else:
            new = None
        if new != data:
            yield kind, name, new


def run(root: Path, wanted: int, loads: int, seed: int, found: Found) -> None:
    """`wanted` damages of a commit, one at a time, then `loads` clean restores."""
    chance = random.Random(seed)
    with CheckpointManager(root, durable=False) as manager:
        for step in (0, 1):
            manager.save(step, state(step))
        path, other = Path(manager.path(1)), Path(manager.path(0))
        # The commit record repeats each rank's record, which is read by nobody once it stands.
        names = [
            p.relative_to(path).as_posix()
            for p in sorted(path.rglob("*"))
            if p.is_file() and not p.name.startswith("fastckpt-rank-")
        ]
        sound = {n: (path / n).read_bytes() for n in names}
        others = {n: (other / n).read_bytes() for n in names}
        made = damages(sound, others, chance)
        for _ in range(wanted):
            kind, name, data = next(made)
            file = path / name
            if data is None:
                file.unlink()
            else:
                file.write_bytes(data)
            seen = not verify(path, threads=1).ok
            found.damages += 1
            found.by_kind[kind] += 1
            if not seen:
                found.missed += 1
                found.words.append(f"verify missed: {kind} of {name}")
            if not _restores_right(root):
                found.wrong += 1
                found.words.append(f"restored wrong: {kind} of {name}")
            file.write_bytes(sound[name])
        want = state(1)
        for k in range(loads):
            try:
                sane = equal(manager.restore(1), want) and (k % 2 or verify(path, threads=1).ok)
            except FastckptError as e:
                sane = False
                found.words.append(f"false alarm: {e}")
            found.clean += 1
            found.alarms += not sane


def _restores_right(root: Path) -> bool:
    """A restart takes the damaged commit as it was, passes it over for the one before it, or refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with CheckpointManager(root, durable=False) as fresh:
                value = fresh.restore()
                return equal(value, state(fresh.restored or 0))
        except FastckptError:
            return True
