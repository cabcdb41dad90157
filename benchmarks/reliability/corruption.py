"""Damage to a commit's bytes: verify must see all of it, a restore must give none of it, and neither may see
any where there is none."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from fastckpt.errors import FastckptError
from fastckpt.manager.manager import CheckpointManager
from fastckpt.verification.outputs import verify
from tally import Outcome

PAGE = 4096
KINDS = ("bit", "bit", "bit", "cut", "zero page", "zeros", "longer", "swapped", "gone", "moved")


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
        elif name.startswith("fastckpt-rank-"):  # the commit record has all of it, so it may be missing
            continue
        else:
            new = None
        if new != data:
            yield kind, name, new


def shares(work: Path, wanted: int, loads: int, seed: int, parts: int) -> list[Iterator[Outcome]]:
    """The part in so many shares, each to be run in a process of its own."""
    numbers = [(len(range(k, wanted, parts)), len(range(k, loads, parts))) for k in range(parts)]
    return [outcomes(work / f"share-{k}", *n, f"{seed} {k}") for k, n in enumerate(numbers)]


def outcomes(root: Path, wanted: int, loads: int, seed: str) -> Iterator[Outcome]:
    """`wanted` damages of a commit, one at a time, then `loads` clean restores, every other with a verify."""
    with CheckpointManager(root, durable=False) as manager:
        for step in (0, 1):
            manager.save(step, state(step))
        path, other = Path(manager.path(1)), Path(manager.path(0))
        names = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()]
        sound = {n: (path / n).read_bytes() for n in names}
        made = damages(sound, {n: (other / n).read_bytes() for n in names}, random.Random(seed))
        for kind, name, data in islice(made, wanted):
            file = path / name
            if data is None:
                file.unlink()
            else:
                file.write_bytes(data)
            seen, right = not verify(path, threads=1).ok, _restores_right(root)
            file.write_bytes(sound[name])
            yield Outcome(
                f"{kind} of {name}", "damages", kind,
                {"missed": [] if seen else ["verify is content"], "wrong": [] if right else ["restored"]},
            )  # fmt: skip
        want = state(1)
        for k in range(loads):
            alarms = []
            try:
                if not equal(manager.restore(1), want):
                    alarms.append("the values differ")
                alarms += () if k % 2 else verify(path, threads=1).problems
            except FastckptError as e:
                alarms.append(str(e))
            yield Outcome(f"clean load {k}", "clean loads", "clean load", {"alarms": alarms})


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
